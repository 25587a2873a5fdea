// alpha-entmax of rows of scores: the transform without attention.
//
// A program a row; the scores stay in shared memory where they fit (`cached`), and are read again for each step where not.
#include "ptx.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"

struct RowSums {
    float f, s, top;
};

// Over all threads; `scratch`: 3 * WARPS floats.
DEVICE RowSums over_block(RowSums x, float* scratch) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        x.f += ptx::shuffle_xor(x.f, i);
        x.s += ptx::shuffle_xor(x.s, i);
        x.top = fmaxf(x.top, ptx::shuffle_xor(x.top, i));
    }
    if (lane() == 0) scratch[warp()] = x.f, scratch[WARPS + warp()] = x.s, scratch[2 * WARPS + warp()] = x.top;
    ptx::sync();
    x = {0.f, 0.f, -INFINITE};
    for (int w = 0; w < WARPS; ++w) {
        x.f += scratch[w];
        x.s += scratch[WARPS + w];
        x.top = fmaxf(x.top, scratch[2 * WARPS + w]);
    }
    ptx::sync();
    return x;
}

// q: (rows, kv_len) scores; out: their weights. q_row, out_row: strides; alpha_head: stride of alpha over rows; left: 1 where cached.
template <class T>
KERNEL(THREADS, 1)
transform(PARAMS p) {
    float* scratch = reinterpret_cast<float*>(ptx::shared_memory());
    float* cache = scratch + 3 * WARPS;
    i64 row = static_cast<i64>(ptx::block_y()) * ptx::blocks_x() + ptx::block_x();
    if (row >= p.lists_size) return;
    const T* x = static_cast<const T*>(p.q) + row * p.q_row;
    T* out = static_cast<T*>(p.out) + row * p.out_row;
    Entmax<float, 0> entmax(p.alpha[row * p.alpha_head]);
    bool cached = p.left != 0;
    RowSums sums{0.f, 0.f, -INFINITE};
    for (int i = ptx::thread(); i < p.kv_len; i += THREADS) {
        float score = ptx::to_float(x[i]) * entmax.unit();
        if (cached) cache[i] = score;
        sums.top = fmaxf(sums.top, score);
        if (score != score) sums.f = score;
    }
    sums = over_block(sums, scratch);
    float nan = sums.f, m = sums.top == -INFINITE ? 0.f : sums.top, c = entmax.first_c();
    bool infinite = m == INFINITE;  // entries of +inf share the row's weight
    if (infinite) m = 0.f;
    auto score = [&](int i) {
        float s = cached ? cache[i] : ptx::to_float(x[i]) * entmax.unit();
        return infinite ? (s == INFINITE ? 0.f : -INFINITE) : s;
    };
    float f = 0.f;
    for (int step = 0, last = 0; step < 40; ++step) {
        Point at = entmax.point(m, c);
        sums = {0.f, 0.f, 0.f};
        for (int i = ptx::thread(); i < p.kv_len; i += THREADS) {
            float weight, u;
            entmax.weigh(score(i), at, weight, u);
            sums.f += weight;
            sums.s += u;
        }
        sums = over_block(sums, scratch);
        f = sums.f;
        if (last || !(sums.s > 0.f)) break;
        last = !(fabsf(f - 1.f) > 1e-5f);
        c = entmax.newton(c, f, sums.s);
    }
    Point at = entmax.point(m, c);
    float factor = f > 0.f ? 1.f / f : 0.f;
    for (int i = ptx::thread(); i < p.kv_len; i += THREADS) {
        float weight, u;
        entmax.weigh(score(i), at, weight, u);
        out[i] = ptx::from_float<T>(nan != nan ? nan : weight * factor);
    }
}
