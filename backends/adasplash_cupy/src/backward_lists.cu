// Backward over lists, a program per block of 64 query rows whose support was saved as one: dQ, and by fp32 atomics dK and dV.
//
//     dQ = scale ds K      dK = scale ds^T Q      dV = p^T dO
//
// with p, u = p^(2-alpha) recomputed from the saved (m, c). backward_rows and backward_keys do the other blocks.
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

// Where dK and dV over lists are summed, of this block's key head.
template <class S>
struct KeySums {
    float *d_k, *d_v;
    DEVICE explicit KeySums(const Block<S>& x) {
        i64 kv_head = x.b * (x.p.heads / x.p.group) + x.head / x.p.group;
        d_k = x.p.dk_sum + kv_head * x.p.kv_len * x.p.head_dim;
        d_v = x.p.dv_sum + kv_head * x.p.kv_len * x.p.head_dim_v;
    }
};

// Adds d, columns `column` ... of 16 keys from `first` on, by atomics.
template <int C>
DEVICE void scatter(const float (&d)[C][4], const int* index, int first, float factor, float* sums, int columns, int column) {
    if constexpr (ptx::ADDS_FOUR && C % 4 == 0) {
        // Lanes trade sums until eight of them have 32 columns of one key: an instruction then asks the L2 cache for four whole lines, and
        // not for a sector of each of eight.
        bool odd = lane() % 2 != 0, upper = lane() >= 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int of_row = first + 8 * r + lane() / 4 % 4, keys[2] = {index[of_row], index[of_row + 4]};
#pragma unroll
            for (int n = 0; n < C; n += 4) {
                // With the neighbour: four columns of the one or the other of two tiles.
                float four[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float of_even = d[n + 2 * j][2 * r + e] * factor, of_odd = d[n + 2 * j + 1][2 * r + e] * factor;
                        float got = ptx::shuffle_xor(odd ? of_even : of_odd, 1);
                        four[j][e] = odd ? got : of_even;
                        four[j][2 + e] = odd ? of_odd : got;
                    }
                // With the lane four rows on: both have the same row first, and then both the other.
                float to_first[4], to_second[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float got = ptx::shuffle_xor(upper ? four[0][e] : four[1][e], 16);
                    to_first[e] = upper ? got : four[0][e];
                    to_second[e] = upper ? four[1][e] : got;
                }
                int at = column + (n + 2 * upper + odd) * 8 + lane() % 4 / 2 * 4;
                if (at >= columns) continue;
                if (keys[0] >= 0) ptx::add_four(sums + static_cast<i64>(keys[0]) * columns + at, to_first);
                if (keys[1] >= 0) ptx::add_four(sums + static_cast<i64>(keys[1]) * columns + at, to_second);
            }
        }
    } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int key = index[first + lane() / 4 + 8 * r];
            if (key < 0) continue;
            float* to = sums + static_cast<i64>(key) * columns;
#pragma unroll
            for (int n = 0; n < C; ++n) {
                int at = column + n * 8 + lane() % 4 * 2;
                if (at < columns) ptx::add_pair(to + at, d[n][2 * r] * factor, d[n][2 * r + 1] * factor);
            }
        }
    }
}

// 16 keys from `first` on by a warp: w^T rows, all columns.
template <class S, int D, int P>
DEVICE void multiply_and_scatter(const typename S::T* w, const typename S::T* rows, const int* index, int first, float factor,
                                 float* sums, int columns) {
    constexpr int C = D < 64 ? D / 8 : 8;
#pragma unroll 1
    for (int column = 0; column < D; column += 8 * C) {
        float d[C][4];
        clear(d);
        multiply_columns<typename S::T, ROWS, RowsTiles<S, true>::PW, P>(d, w + first, rows + column);
        scatter(d, index, first, factor, sums, columns, column);
    }
}

// dK and dV of a tile of a list, from p and ds, and dQ.
template <class S, int C>
DEVICE void add_list_tile(const Block<S>& x, const RowsTiles<S, true>& shared, const KeySums<S>& sums, const typename S::T* k, const int* index,
                          const float (&p)[S::NT][4], const float (&ds)[S::NT][4], float (&d_q)[C][4]) {
    using T = typename S::T;
    using Weighed = typename RowsTiles<S, true>::Weighed;
    if constexpr (!S::WARPGROUP) add_d_q<S>(d_q, ds, k, 0, false);
#pragma unroll
    for (int n = 0; n < S::NT; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int at = Weighed::at(warp() * 16 + lane() / 4 + 8 * r, n * 8 + lane() % 4 * 2);
            store_pair(shared.p + at, p[n][2 * r], p[n][2 * r + 1]);
            store_pair(shared.ds + at, ds[n][2 * r], ds[n][2 * r + 1]);
        }
    if constexpr (S::WARPGROUP) {
        constexpr int WIDER = S::BE > S::BEV ? S::BE : S::BEV;
        Weights<T, S::NT> w;
        w.set(ds);
        w.settle();
        ptx::publish_stores();
        ptx::sync();
#pragma unroll 1
        for (int first = 0; first < S::BN; first += 64)
#pragma unroll
            for (int column = 0; column < WIDER; column += 64) {
                // dK and dV one after the other where registers must allow three programs.
                constexpr bool TOGETHER = S::PROGRAMS < 3;
                float d_k[S::BE < 64 ? S::BE / 8 : 8][4], d_v[S::BEV < 64 ? S::BEV / 8 : 8][4];
                int key = first + warp() * 16;
                open_products<S>();
                if (first == 0 && column == 0) multiply_weights<typename S::KTile>(d_q, w, k, 0);
                if (column < S::BE) multiply_columns(d_k, shared.ds + first * ROWS, shared.q + column * ROWS);
                if (TOGETHER && column < S::BEV) multiply_columns(d_v, shared.p + first * ROWS, shared.d_out + column * ROWS);
                if constexpr (TOGETHER) close_products<S>(d_q, d_k, d_v);
                else close_products<S>(d_q, d_k);
                if (column < S::BE) scatter(d_k, index, key, x.p.scale, sums.d_k, x.p.head_dim, column);
                if (column >= S::BEV) continue;
                if constexpr (!TOGETHER) {
                    open_products<S>();
                    multiply_columns(d_v, shared.p + first * ROWS, shared.d_out + column * ROWS);
                    close_products<S>(d_v);
                }
                scatter(d_v, index, key, 1.f, sums.d_v, x.p.head_dim_v, column);
            }
    } else {
        ptx::sync();
        // A warp takes 16 keys of dK or of dV at a time.
        for (int job = warp(); job < S::BN / 8; job += WARPS) {
            int first = job / 2 * 16;
            if (index[first] < 0) continue;
            if (job % 2 == 0) multiply_and_scatter<S, S::BE, S::PK>(shared.ds, shared.q, index, first, x.p.scale, sums.d_k, x.p.head_dim);
            else multiply_and_scatter<S, S::BEV, S::PV>(shared.p, shared.d_out, index, first, 1.f, sums.d_v, x.p.head_dim_v);
        }
    }
}

template <class S>
KERNEL(THREADS, programs<S>(S::WARPGROUP ? 2 : 3))
backward_lists(PARAMS p) {
    using T = typename S::T;
    constexpr int C = (S::BE < 128 ? S::BE : 128) / 8;
    RowsTiles<S, true> shared;
    Block<S> x(p, ptx::block_x() / p.q_blocks, p.q_blocks - 1 - ptx::block_x() % p.q_blocks);
    copy_operands(x, shared);
    List<S::BN> list{p.pool + p.blocks[2 * x.block_at()], p.blocks[2 * x.block_at() + 1]};
    if (list.count < 0) return ptx::wait_copies<0>();
    // Each of these takes the time of a trip to memory: all are under way before one is waited for.
    start_tiles(x, shared, list, true);
    x.find_rows(shared.scratch);
    RowState<S> state;
    state.load(x);
    land_copies<S, S::STAGES - 1>();
    ptx::sync();  // a row's chunks were copied by others
    state.open(x, shared);
    ptx::sync();
    RowOperands<S> rows(shared);
    KeySums<S> sums(x);
    float a[S::NT][4], dp[S::NT][4];
#pragma unroll 1
    for (int column = 0; column < S::BE; column += 8 * C) {
        float d_q[C][4];
        clear(d_q);
        if (column > 0) state.alpha[0] = state.alpha[1] = AlphaSums(), start_tiles(x, shared, list, true);
        walk_tiles(x, shared, list, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
            bool products = tile_products(x, rows, state, k, v, index, whole, true, a, dp);
            tile_gradient(x, index, products, state, a, dp, [](int, int, float, float) {});
            if (column == 0) add_list_tile(x, shared, sums, k, index, a, dp, d_q);
            else add_d_q<S>(d_q, dp, k, column, false);
        });
        store_d_q(x, d_q, column);
    }
    store_state(x, state, shared.scratch);
}
