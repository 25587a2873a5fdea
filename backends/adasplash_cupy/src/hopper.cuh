// What only Hopper (sm_90a) has: barriers that copies complete, tiles copied by tensor maps, products of a warpgroup.
//
// As ptx.cuh, this is the machine: another definition of this file runs kernels on a CPU.
#pragma once

#define TENSOR_MAP const __grid_constant__ ptx::TensorMap

namespace ptx {

// How a (batch, heads, length, columns) tensor lies in memory, as the driver encodes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

// -- barriers in shared memory ------------------------------------------------------------------------------------------------
//
// A phase ends once `count` arrivals, and the bytes that were announced, have come. wait() returns when the phase of a parity has
// ended; of a new barrier the phase before the first, of parity 1, counts as ended.

DEVICE void open_barrier(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// By the thread that opened them, before a sync(): lets copies and other threads see the barriers.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void arrive_announcing(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Waits for `threads` threads that name the same barrier, 1 to 15.
DEVICE void sync_some(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// -- copies of tiles ------------------------------------------------------------------------------------------------------------

DEVICE void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(&map)) : "memory");
}
// The map's box at (column, row, head, batch) to shared memory, zeros outside of the tensor; `barrier` counts the bytes. In each 1024
// bytes of the tile, chunk c (of 16 bytes) of row r lies in the place of chunk c ^ r % 8.
DEVICE void copy_tile(void* to, const TensorMap& map, u64* barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
            shared_address(to)),
        "l"(reinterpret_cast<u64>(&map)), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
        : "memory");
}

// -- products of a warpgroup ------------------------------------------------------------------------------------------------------

// Rows of 64 elements as copy_tile() leaves them: eight rows of 128 bytes a group, groups behind one another. `rows` is a multiple of
// 1024, plus 32 bytes for each 16 columns further to the right.
DEVICE u64 rows_of_128_bytes(const void* rows) {
    return static_cast<u64>((shared_address(rows) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Before the first product after sums were touched.
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the N youngest groups are done, of which d is none.
template <int N>
DEVICE void wait_products(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x 128) = or += a (64 x 16) b (128 x 16)^T, fp32 sums, by four warps; d must not be touched until it is waited for. Warp w % 4
// holds rows 16 (w % 4) ..., in tiles of 8 columns as multiply_add() does.
template <class T, bool ADD>
DEVICE void multiply_tiles(float (&d)[64], u64 a, u64 b);
#define WGMMA(type, add, scale)                                                                                                  \
    template <>                                                                                                                 \
    DEVICE void multiply_tiles<type##_t, add>(float (&d)[64], u64 a, u64 b) {                                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." WGMMA_##type "." WGMMA_##type " {"                           \
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                                                                                          \
                     "}, %64, %65, " scale ", 1, 1, 0, 0;"                                                                             \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                       "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                       "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                       "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                       "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                       "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                       "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])   \
                     : "l"(a), "l"(b));                                                                                         \
    }
#define WGMMA_half "f16"
#define WGMMA_bf16 "bf16"
WGMMA(half, false, "0")
WGMMA(half, true, "1")
WGMMA(bf16, false, "0")
WGMMA(bf16, true, "1")
#undef WGMMA

// -- the rest ---------------------------------------------------------------------------------------------------------------------

// Lets the tensor cores see what this thread stored to shared memory, once the threads of a barrier that follows have met.
DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// From here on a thread of this warpgroup has so many registers.
template <int N>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
DEVICE int warp_least(int x) { return __reduce_min_sync(~0u, x); }
DEVICE int largest(int a, int b, int c) { return __vimax3_s32(a, b, c); }
DEVICE void maximise_shared(int* p, int x) { atomicMax(p, x); }
// The highest bytes of four words, a's in the lowest place.
DEVICE u32 high_bytes(u32 a, u32 b, u32 c, u32 d) { return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x7300), 0x7610); }

}  // namespace ptx
