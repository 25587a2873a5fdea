// Products of a warpgroup (sm_90a): 64 x 16 by 16 x N, fp32 sums, operands in shared memory or the left one in registers.
//
// As ptx.cuh, this is the machine: another definition of this file runs kernels on a CPU. A kernel that is compiled for other
// architectures may name these functions as long as it calls none.
#pragma once

namespace ptx {

// Operands in shared memory are rows of 64 elements, 128 bytes, in multiples of 1024 bytes, eight a group, groups behind one another; chunk
// c (of 16 bytes) of row r lies in the place of chunk c ^ r % 8. A descriptor counts in 16 bytes.
//
// Along: the inner dimension of a product runs along the rows, 16 elements of them: 32 bytes more for each 16 further to the right.
DEVICE u64 rows_of_128_bytes(const void* rows) {
    return static_cast<u64>((shared_address(rows) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// Down: the inner dimension runs from row to row, 16 of them: 2048 bytes more for each 16 further down. Columns beyond 64 lie `panel` bytes on.
DEVICE u64 columns_of_128_bytes(const void* rows, int panel) {
    return static_cast<u64>((shared_address(rows) & 0x3ffff) >> 4) | static_cast<u64>(panel >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// Before the first product after sums or operands in registers were touched.
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the N youngest groups are done; sums are to be touched after settle() alone.
template <int N>
DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Values that the compiler must have in place here, and may move neither up nor down from here.
template <int N>
DEVICE void settle(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
template <int N>
DEVICE void settle(u32 (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

template <class A, class B>
inline constexpr bool SAME = false;
template <class A>
inline constexpr bool SAME<A, A> = true;

#define SUMS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SUMS_2 SUMS(0), SUMS(1)
#define SUMS_4 SUMS_2, SUMS(2), SUMS(3)
#define SUMS_8 SUMS_4, SUMS(4), SUMS(5), SUMS(6), SUMS(7)
#define SUMS_16 SUMS_8, SUMS(8), SUMS(9), SUMS(10), SUMS(11), SUMS(12), SUMS(13), SUMS(14), SUMS(15)
#define NAMES_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_4 NAMES_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_8 NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_16                                                                                                                     \
    NAMES_8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                     \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SHARED_2 "%8, %9, %10, 1, 1, %11, %12;"
#define SHARED_4 "%16, %17, %18, 1, 1, %19, %20;"
#define SHARED_8 "%32, %33, %34, 1, 1, %35, %36;"
#define SHARED_16 "%64, %65, %66, 1, 1, %67, %68;"
#define HELD_2 "{%8, %9, %10, %11}, %12, %13, 1, 1, %14;"
#define HELD_4 "{%16, %17, %18, %19}, %20, %21, 1, 1, %22;"
#define HELD_8 "{%32, %33, %34, %35}, %36, %37, 1, 1, %38;"
#define HELD_16 "{%64, %65, %66, %67}, %68, %69, 1, 1, %70;"
#define WGMMA_OF(tiles, columns, type, operands, ...)                                                                               \
    if constexpr (N == tiles)                                                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NAMES_##tiles "}, " operands##tiles     \
                 : SUMS_##tiles                                                                                                     \
                 : __VA_ARGS__)
#define WGMMA(type, operands, ...)                                                                                                   \
    do {                                                                                                                             \
        WGMMA_OF(2, 16, type, operands, __VA_ARGS__);                                                                                \
        WGMMA_OF(4, 32, type, operands, __VA_ARGS__);                                                                                \
        WGMMA_OF(8, 64, type, operands, __VA_ARGS__);                                                                                \
        WGMMA_OF(16, 128, type, operands, __VA_ARGS__);                                                                              \
    } while (false)

// d (64 x 8N) = or += a (64 x 16) b (16 x 8N) by four warps; d must not be touched until it is waited for. Warp w % 4 holds rows
// 16 (w % 4) ..., in tiles of 8 columns as multiply_add() does. A_DOWN, B_DOWN: which of the two kinds a descriptor is.
template <class T, bool ADD, bool A_DOWN, bool B_DOWN, int N>
DEVICE void multiply_tiles(float (&d)[N][4], u64 a, u64 b) {
    static_assert(N == 2 || N == 4 || N == 8 || N == 16, "16 to 128 columns");
    if constexpr (SAME<T, half_t>)
        WGMMA("f16", SHARED_, "l"(a), "l"(b), "n"(ADD), "n"(A_DOWN), "n"(B_DOWN));
    else
        WGMMA("bf16", SHARED_, "l"(a), "l"(b), "n"(ADD), "n"(A_DOWN), "n"(B_DOWN));
}
// The same with a warp's 16 rows of a in registers, as multiply_add() has them; they too must not be touched.
template <class T, bool ADD, bool B_DOWN, int N>
DEVICE void multiply_tiles(float (&d)[N][4], const u32 (&a)[4], u64 b) {
    static_assert(N == 2 || N == 4 || N == 8 || N == 16, "16 to 128 columns");
    if constexpr (SAME<T, half_t>)
        WGMMA("f16", HELD_, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), "n"(B_DOWN));
    else
        WGMMA("bf16", HELD_, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), "n"(B_DOWN));
}

#undef WGMMA
#undef WGMMA_OF
#undef SUMS

// Lets the tensor cores see what this thread stored in shared memory, once the threads of a barrier that follows have met.
DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for what cp.async brought and was waited for. PTX asks for that fence here too. But it compiles to a MEMBAR, which orders all that
// this thread has under way, the copies of later tiles with it; and CUTLASS's cp.async main loops for wgmma, and Triton's, take none.
DEVICE void publish_copies() {}

}  // namespace ptx
