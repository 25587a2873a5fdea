// The twin of src/wgmma.cuh for a CPU: see hopper.cpp for what it demands of a kernel.
#pragma once

namespace ptx {

DEVICE u64 rows_of_128_bytes(const void* rows) {
    return static_cast<u64>((shared_address(rows) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
DEVICE u64 columns_of_128_bytes(const void* rows, int panel) {
    return static_cast<u64>((shared_address(rows) & 0x3ffff) >> 4) | static_cast<u64>(panel >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
DEVICE void open_products() { fibers::open_products(); }
DEVICE void commit_products() { fibers::commit_products(); }
template <int N>
DEVICE void wait_products() {
    fibers::wait_products(N);
}
template <class X, int N>
DEVICE void settle(X (&)[N][4]) {}
template <class T, bool ADD, bool A_DOWN, bool B_DOWN, int N>
DEVICE void multiply_tiles(float (&d)[N][4], u64 a, u64 b) {
    fibers::multiply_tiles(d[0], {8 * N, ADD, std::is_same_v<T, half_t>, A_DOWN, B_DOWN}, a, nullptr, b);
}
template <class T, bool ADD, bool B_DOWN, int N>
DEVICE void multiply_tiles(float (&d)[N][4], const u32 (&a)[4], u64 b) {
    fibers::multiply_tiles(d[0], {8 * N, ADD, std::is_same_v<T, half_t>, false, B_DOWN}, 0, a, b);
}
DEVICE void publish_stores() { fibers::publish_stores(); }
DEVICE void publish_copies() { fibers::publish_stores(); }

}  // namespace ptx
