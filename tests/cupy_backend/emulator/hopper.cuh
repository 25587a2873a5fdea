// The twin of src/hopper.cuh for a CPU: see hopper.cpp for what it demands of a kernel.
#pragma once

#define TENSOR_MAP const ptx::TensorMap&

namespace ptx {

using fibers::TensorMap;
using u64_t = uint64_t;

DEVICE u64_t* phases(u64* barrier) { return reinterpret_cast<u64_t*>(barrier); }

DEVICE void open_barrier(u64* barrier, int count) { fibers::open_barrier(phases(barrier), count); }
DEVICE void publish_barriers() { fibers::publish_barriers(); }
DEVICE void arrive(u64* barrier) { fibers::arrive(phases(barrier), 0); }
DEVICE void arrive_announcing(u64* barrier, int bytes) { fibers::arrive(phases(barrier), bytes); }
DEVICE void wait(u64* barrier, u32 parity) { fibers::wait_phase(phases(barrier), parity); }
DEVICE void sync_some(int barrier, int threads) { fibers::named_barrier(barrier, threads); }
DEVICE void sync_apart(int barrier, int threads) { fibers::named_barrier(barrier, threads); }

DEVICE void prefetch(const TensorMap&) {}
DEVICE void copy_tile(void* to, const TensorMap& map, u64* barrier, int column, int row, int head, int batch) {
    fibers::copy_tile(to, map, phases(barrier), column, row, head, batch);
}

template <int N>
DEVICE void take_registers() {}
template <int N>
DEVICE void leave_registers() {}
DEVICE int warp_least(int x) {
    fibers::warp_meeting(fibers::Operation::LEAST, &x, 1);
    return x;
}
DEVICE int largest(int a, int b, int c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }
DEVICE void maximise_shared(int* p, int x) {
    if (x > *p) *p = x;
}
DEVICE u32 high_bytes(u32 a, u32 b, u32 c, u32 d) { return a >> 24 | (b >> 24) << 8 | (c >> 24) << 16 | (d >> 24) << 24; }

}  // namespace ptx
