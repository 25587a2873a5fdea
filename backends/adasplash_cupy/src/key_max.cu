// max |k| of every key head: with it, the select pass knows how far two roundings of a score may differ.
#include "ptx.cuh"
#include "params.cuh"
#include "products.cuh"

// A block a stretch of KEYS_A_BLOCK keys of a head. NaN counts as inf.
inline constexpr int KEYS_A_BLOCK = 128;

template <class T>
KERNEL(THREADS, 1)
key_max(PARAMS p) {
    int blocks = (p.kv_len + KEYS_A_BLOCK - 1) / KEYS_A_BLOCK, bh = ptx::block_x() / blocks;
    int kv_heads = p.heads / p.group, b = bh / kv_heads, head = bh % kv_heads;
    const T* k = static_cast<const T*>(p.k) + b * p.k_batch + head * p.k_head;
    int first = ptx::block_x() % blocks * KEYS_A_BLOCK, rows = p.kv_len - first < KEYS_A_BLOCK ? p.kv_len - first : KEYS_A_BLOCK;
    int chunks = p.head_dim / Chunk<T>::SIZE;
    float most = 0.f;
    // Eight loads at a time: a block has little else to wait for.
    for (int first_chunk = ptx::thread(); first_chunk < rows * chunks; first_chunk += 8 * THREADS) {
        Chunk<T> held[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            int i = first_chunk + j * THREADS < rows * chunks ? first_chunk + j * THREADS : first_chunk;
            held[j] = *reinterpret_cast<const Chunk<T>*>(k + (first + i / chunks) * p.k_row + i % chunks * Chunk<T>::SIZE);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < Chunk<T>::SIZE; ++e) {
                float x = fabsf(ptx::to_float(held[j].x[e]));
                most = x <= most ? most : x != x ? ptx::float_of(0x7f800000u) : x;
            }
    }
    for (int i = 1; i < 32; i *= 2) most = fmaxf(most, ptx::shuffle_xor(most, i));
    if (lane() == 0 && ptx::bits_of(most) > p.key_max[bh]) ptx::maximise(p.key_max + bh, ptx::bits_of(most));
}
