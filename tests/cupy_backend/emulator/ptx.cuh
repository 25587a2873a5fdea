// The twin of src/ptx.cuh for a CPU: a block's threads are fibers that take turns at barriers and warp operations (fibers.h).
//
// Copies to shared memory happen when they are waited for and not before, shared memory starts as NaN, and all lanes of a warp must
// meet at the same operation: a missing wait, an uninitialised read or a divergent shuffle shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define DEVICE inline
#define KERNEL(threads, blocks) static void
#define PARAMS const Params

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct half_t {
    u16 bits;
};
struct bf16_t {
    u16 bits;
};

namespace ptx {

inline constexpr int MOST_PROGRAMS = 1, MOST_COLUMNS = 128;

DEVICE int thread() { return fibers::current->index; }
DEVICE int block_x() { return fibers::block.at[0]; }
DEVICE int block_y() { return fibers::block.at[1]; }
DEVICE int block_z() { return fibers::block.at[2]; }
DEVICE int blocks_x() { return fibers::block.grid[0]; }
DEVICE u8* shared_memory() { return fibers::block.shared; }

DEVICE void sync() { fibers::block_barrier(false); }
DEVICE bool sync_any(bool x) { return fibers::block_barrier(x); }
DEVICE void sync_warp() { fibers::warp_meeting(fibers::Operation::MEET, nullptr, 0); }
DEVICE u32 ballot(bool x) {
    u32 result[1] = {x};
    fibers::warp_meeting(fibers::Operation::BALLOT, result, 1);
    return result[0];
}
template <class X>
DEVICE X shuffle(X x, int lane) {
    static_assert(sizeof(X) == 4);
    u32 words[2];
    std::memcpy(words, &x, 4);
    words[1] = lane;
    fibers::warp_meeting(fibers::Operation::SHUFFLE, words, 2);
    std::memcpy(&x, words, 4);
    return x;
}
template <class X>
DEVICE X shuffle_xor(X x, int mask) {
    return shuffle(x, thread() % 32 ^ mask);
}
DEVICE int count_bits(u32 x) { return __builtin_popcount(x); }
DEVICE int lowest_bit(u32 x) { return __builtin_ffs(x) - 1; }
DEVICE u32 multiply_high(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
DEVICE u32 bits_of(float x) {
    u32 y;
    std::memcpy(&y, &x, 4);
    return y;
}
DEVICE float float_of(u32 x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
DEVICE float renewed(float x) { return x; }
DEVICE int renewed(int x) { return x; }
DEVICE float at_least(float x, float least) { return x <= least ? least : x; }
DEVICE float positive(float x) { return at_least(x, 0.f); }
DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float log2_fast(float x) { return std::log2(x); }
DEVICE float sqrt_fast(float x) { return std::sqrt(x); }
DEVICE float divide_fast(float x, float by) { return x / by; }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) { return fibers::half_to_float(x.bits); }
DEVICE float to_float(bf16_t x) { return float_of(static_cast<u32>(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline half_t from_float<half_t>(float x) {
    return {fibers::float_to_half(x)};
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
    u32 bits = bits_of(x);
    if (x != x) return {0x7fff};
    return {static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T>
DEVICE u32 pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<u32>(from_float<T>(high).bits) << 16;
}

DEVICE u32 shared_address(const void* p) { return fibers::shared_address(p); }
DEVICE void load_matrices(u32 (&r)[4], const void* row) { fibers::load_matrices(r, row, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) { fibers::load_matrices(r, row, true); }

template <class T>
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    fibers::multiply_add(c, a, b0, b1, sizeof(T) == 2 && std::is_same_v<T, half_t>);
}

DEVICE void copy_16(void* to, const void* from, bool there) { fibers::copy_16(to, from, there); }
DEVICE void commit_copies() { fibers::commit_copies(); }
template <int N>
DEVICE void wait_copies() {
    fibers::wait_copies(N);
}

DEVICE u64 fetch_add(u64* p, u64 x) {
    u64 before = *p;
    *p += x;
    return before;
}
DEVICE void maximise(u32* p, u32 x) {
    if (x > *p) *p = x;
}
DEVICE void add_pair(float* p, float x, float y) {
    p[0] += x;
    p[1] += y;
}
inline constexpr bool ADDS_FOUR = true;
DEVICE void add_four(float* p, const float (&x)[4]) { fibers::add_four(p, x); }

}  // namespace ptx
