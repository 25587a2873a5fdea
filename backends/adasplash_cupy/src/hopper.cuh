// What only Hopper (sm_90a) has: barriers that copies complete, and tiles copied by tensor maps. Products are in wgmma.cuh.
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
// Likewise, where the threads meet from different places in the program, which `bar` promises that they do not.
DEVICE void sync_apart(int barrier, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

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

// -- the rest ---------------------------------------------------------------------------------------------------------------------

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
