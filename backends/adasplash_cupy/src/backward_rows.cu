// Backward over all keys, a program per block of 64 query rows that kept no list: dQ, and the delta that backward_keys needs.
//
//     dQ = scale ds K
//
// with u = p^(2-alpha) recomputed from the saved (m, c).
#include "ptx.cuh"
#include "wgmma.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "blocks.cuh"
#include "tiles.cuh"
#include "gradient.cuh"
#include "gradient_rows.cuh"
#include "gradient_range.cuh"

template <class S>
KERNEL(THREADS, programs<S>(S::WARPGROUP ? 2 : 3))
backward_rows(PARAMS p) {
    using T = typename S::T;
    constexpr int C = (S::BE < 128 ? S::BE : 128) / 8;
    // dQ's bias, see below, is taken out at the end where u K has room in registers, and else is known before.
    constexpr bool ONE_PASS = S::BE <= 64, OVERLAPS = ONE_PASS && S::WARPGROUP && !S::is(ALPHA_GRAD);
    RowsTiles<S, false> shared;
    auto [bh, block] = block_in_turn(p, ptx::block_x());
    Block<S> x(p, bh, block);
    if (p.blocks != nullptr && p.blocks[2 * x.block_at() + 1] >= 0) return;  // backward_lists has it
    copy_operands(x, shared);
    x.find_rows(shared.scratch);
    // Each of these takes the time of a trip to memory: all are under way before one is waited for.
    Range<S::BN> range(x, 1, true);
    [[maybe_unused]] RangeTiles<S, RowsTiles<S, false>> tiles(x, shared, range);
    if constexpr (OVERLAPS) tiles.start();
    else start_tiles(x, shared, range, true);
    RowState<S> state;
    state.load(x);
    land_copies<S, OVERLAPS ? TILES_AHEAD<S> : S::STAGES - 1>();
    ptx::sync();  // a row's chunks were copied by others
    state.open(x, shared);
    ptx::sync();
    RowOperands<S> rows(shared);
    [[maybe_unused]] float a[S::NT][4], dp[S::NT][4];
    // Sparsemax weighs all keys of the support alike, so over long ones the roundings of ds add up.
    bool in_two_parts = x.entmax.is(LINEAR);
    // O2 was rounded to the inputs' dtype. Over a handful of keys that is lost in the noise; over thousands with equal weights it is one
    // bias that all of them add up. So delta is summed anew; or sum ds, which is not 0 then, tells it, and u K takes it out of dQ.
    if constexpr (ONE_PASS) {
        float d_q[C][4], u_k[C][4], rest[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};
        clear(d_q);
        clear(u_k);
        if constexpr (OVERLAPS) {
            sum_range(tiles, rows, state, in_two_parts, d_q, u_k, rest, total);
        } else {
            walk_tiles(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                bool products = tile_products(x, rows, state, k, v, index, whole, true, a, dp);
                tile_gradient(x, index, products, state, a, dp, [&](int n, int i, float u, float ds) {
                    rest[i / 2] += ds, total[i / 2] += u;
                    a[n][i] = u;  // p is not wanted
                });
                add_d_q<S>(d_q, dp, k, 0, in_two_parts);
                add_d_q<S>(u_k, a, k, 0, false);
            });
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rest[r] = row_sum(rest[r]), total[r] = row_sum(total[r]);
            float bias = total[r] > 0.f ? rest[r] / total[r] : total[r] != total[r] ? total[r] : 0.f;
            state.delta[r] += bias;
#pragma unroll
            for (int n = 0; n < C; ++n)
                d_q[n][2 * r] -= bias * u_k[n][2 * r], d_q[n][2 * r + 1] -= bias * u_k[n][2 * r + 1];
        }
        store_d_q(x, d_q, 0);
    } else {
        float weighted[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};
        walk_tiles(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
            tile_products(x, rows, state, k, v, index, whole, false, a, dp);
            x.entmax.choose([&](auto chosen) {
#pragma unroll
                for (int n = 0; n < S::NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float weight, u;
                        chosen.weigh(a[n][i], state.at[i / 2], weight, u);
                        float keep = 1.f;
                        if (S::is(DROPOUT) && p.seed != nullptr) keep = x.keep(i / 2, index[n * 8 + lane() % 4 * 2 + i % 2]);
                        total[i / 2] += u;
                        weighted[i / 2] += u == 0.f ? 0.f : u * keep * dp[n][i];
                    }
            });
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] = row_sum(total[r]), weighted[r] = row_sum(weighted[r]);
            state.delta[r] = total[r] > 0.f ? weighted[r] / total[r] : total[r] != total[r] ? total[r] : 0.f;
        }
#pragma unroll 1
        for (int column = 0; column < S::BE; column += 8 * C) {
            float d_q[C][4];
            clear(d_q);
            if (column > 0) state.alpha[0] = state.alpha[1] = AlphaSums();
            each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                bool products = tile_products(x, rows, state, k, v, index, whole, true, a, dp);
                tile_gradient(x, index, products, state, a, dp, [](int, int, float, float) {});
                add_d_q<S>(d_q, dp, k, column, in_two_parts);
            });
            store_d_q(x, d_q, column);
        }
    }
    store_state(x, state, shared.scratch);
}
