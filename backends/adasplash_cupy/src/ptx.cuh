// The machine: types, special registers, warp and block operations, tensor cores, copies and atomics, each a function of plain C++.
//
// Everything else in this folder is written against these functions alone, without an #include of the toolkit: NVRTC needs no headers,
// and another definition of this file runs the kernels on a CPU.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define PARAMS const __grid_constant__ Params

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

// What registers allow: programs a multiprocessor (but for Hopper a third one would spill), and columns of two matrices of sums.
#if __CUDA_ARCH__ / 100 == 9
inline constexpr int MOST_PROGRAMS = 3, MOST_COLUMNS = 128;
#elif __CUDA_ARCH__ >= 800
inline constexpr int MOST_PROGRAMS = 2, MOST_COLUMNS = 128;
#else
inline constexpr int MOST_PROGRAMS = 2, MOST_COLUMNS = 64;
#endif

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }

DEVICE u8* shared_memory() {
    extern __shared__ __align__(16) u8 memory[];
    return memory;
}

DEVICE void sync() { __syncthreads(); }
DEVICE bool sync_any(bool x) { return __syncthreads_or(x); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }
template <class X>
DEVICE X shuffle(X x, int lane) {
    return __shfl_sync(~0u, x, lane);
}
template <class X>
DEVICE X shuffle_xor(X x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
DEVICE int count_bits(u32 x) { return __popc(x); }
DEVICE int lowest_bit(u32 x) { return __ffs(x) - 1; }
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// The same value, of which the compiler knows nothing: what depends on it is computed anew instead of being held in registers.
DEVICE float renewed(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
DEVICE int renewed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The larger of two numbers, but NaN where x is.
DEVICE float at_least(float x, float least) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(least));
    return y;
#else
    return x <= least ? least : x;
#endif
}
DEVICE float positive(float x) { return at_least(x, 0.f); }

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// To 2^-22 of the result.
DEVICE float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float divide_fast(float x, float by) {
    float y;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(by));
    return y;
}

// -- element types ------------------------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_float(bf16_t x) { return float_of(static_cast<u32>(x.bits) << 16); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
DEVICE bf16_t from_float<bf16_t>(float x) {
    bf16_t y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 bits = bits_of(x);
    y.bits = x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
    return y;
}

// Two elements in one register, the first in the lower half.
template <class T>
DEVICE u32 pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<u32>(from_float<T>(high).bits) << 16;
}
#if __CUDA_ARCH__ >= 800
template <>
DEVICE u32 pack<half_t>(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
DEVICE u32 pack<bf16_t>(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
#endif

// -- tensor cores -------------------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and receives of each the elements
// (l / 4, 2 (l % 4)) and its right neighbour, or, transposed, (2 (l % 4), l / 4) and its lower one.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16x8) += a (16x16) b (16x8), fp32 sums.
template <class T>
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void multiply_add<half_t>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
DEVICE void multiply_add<bf16_t>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// -- copies to shared memory that a thread does not wait for --------------------------------------------------------------------

// 16 bytes, or zeros where not `there`; `from` must be a valid address even then.
DEVICE void copy_16(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
#else
    uint4 x = make_uint4(0, 0, 0, 0);
    if (there) x = *static_cast<const uint4*>(from);
    *static_cast<uint4*>(to) = x;
#endif
}
// Closes a group of copies; wait_copies<N> waits for all but the N youngest groups of this thread.
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// -- atomics ------------------------------------------------------------------------------------------------------------------

DEVICE u64 fetch_add(u64* p, u64 x) { return atomicAdd(p, x); }
DEVICE void maximise(u32* p, u32 x) { atomicMax(p, x); }
// p[0] += x, p[1] += y; p is aligned to 8 bytes.
DEVICE void add_pair(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
    atomicAdd(p, x);
    atomicAdd(p + 1, y);
#endif
}
// p[0 ... 3] += x where ADDS_FOUR; p is aligned to 16 bytes.
#if __CUDA_ARCH__ >= 900
inline constexpr bool ADDS_FOUR = true;
DEVICE void add_four(float* p, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
#else
inline constexpr bool ADDS_FOUR = false;
DEVICE void add_four(float*, const float (&)[4]) {}
#endif

}  // namespace ptx
