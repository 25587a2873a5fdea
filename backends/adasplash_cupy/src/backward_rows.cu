// Backward, a program per block of 64 query rows: dQ, and over lists dK and dV as well.
//
//     dQ = scale ds K      dK = scale ds^T Q      dV = p^T dO
//
// with p, u = p^(2-alpha) recomputed from the saved (m, c). A block whose support was saved as a list walks the list and adds to dK and
// dV by fp32 atomics; the others walk their whole range and leave dK and dV to backward_keys.
#include "ptx.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "tiles.cuh"
#include "gradient.cuh"

template <class S>
struct RowsTiles : Tiles<S> {
    using T = typename S::T;
    static constexpr int PW = pitch<T>(S::BN);  // of the weights
    T *d_out, *p, *ds;

    DEVICE RowsTiles() : Tiles<S>(true) {
        u8* at = reinterpret_cast<u8*>(this->scratch + 32);
        at = Tiles<S>::take(at, d_out, ROWS * S::PV);
        at = Tiles<S>::take(at, p, ROWS * PW);
        Tiles<S>::take(at, ds, ROWS * PW);
    }
    DEVICE static constexpr int bytes() { return Tiles<S>::bytes(true) + ROWS * (S::PV + 2 * PW) * static_cast<int>(sizeof(T)); }
};

// This thread's two rows of a block.
template <class S>
struct RowState {
    Point at[2];
    float delta[2];
    AlphaSums alpha[2];
};

// x and dp of a tile.
template <class S>
DEVICE void tile_products(const Block<S>& x, const RowsTiles<S>& shared, const typename S::T* k, const typename S::T* v,
                          const int* index, bool whole, float (&a)[1][S::NT][4], float (&dp)[1][S::NT][4]) {
    clear(a[0]);
    multiply_rows<typename S::T, S::BE>(a, shared.q + warp() * 16 * S::PK, k);
    to_scores(a[0], x, index, whole);
    clear(dp[0]);
    multiply_rows<typename S::T, S::BEV>(dp, shared.d_out + warp() * 16 * S::PV, v);
}

// a, dp -> p, ds in place.
template <class S>
DEVICE void tile_gradient(const Block<S>& x, const int* index, RowState<S>& state, float (&a)[S::NT][4], float (&dp)[S::NT][4]) {
    bool dropout = S::is(DROPOUT) && x.p.seed != nullptr, alpha = S::is(ALPHA_GRAD) && x.p.d_alpha != nullptr;
    x.entmax.choose([&](auto chosen) {
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int r = i / 2;
                float keep = S::is(DROPOUT) && dropout ? x.keep(r, index[n * 8 + lane() % 4 * 2 + i % 2]) : 1.f;
                if (S::is(ALPHA_GRAD) && alpha) {
                    float p, u;
                    chosen.weigh(a[n][i], state.at[r], p, u);
                    state.alpha[r].add(p, dp[n][i] * keep, x.entmax.h);
                }
                float p, ds;
                score_gradient(chosen, a[n][i], state.at[r], dp[n][i], keep, state.delta[r], ds, p);
                a[n][i] = p;
                dp[n][i] = ds;
            }
    });
}

// dQ += ds K, in the columns of a chunk.
template <class S, int C>
DEVICE void add_d_q(float (&d_q)[C][4], const float (&ds)[S::NT][4], const typename S::T* k, bool in_two_parts) {
    using T = typename S::T;
#pragma unroll
    for (int n = 0; n < S::NT; n += 2) {
        float part[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[j][i] = ds[n + j][i];
        multiply_weights<T, S::PK>(d_q, part, k + n * 8 * S::PK);
        if (sizeof(T) == 2 && in_two_parts) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) part[j][i] -= ptx::to_float(ptx::from_float<T>(part[j][i]));
            multiply_weights<T, S::PK>(d_q, part, k + n * 8 * S::PK);
        }
    }
}

// Adds w^T rows (16 keys from `first` on, all columns) to `sums` by atomics.
template <class S, int D, int P>
DEVICE void scatter(const typename S::T* w, const typename S::T* rows, const int* index, int first, float factor, float* sums,
                    int columns) {
    using T = typename S::T;
    constexpr int C = D < 64 ? D / 8 : 8;
#pragma unroll 1
    for (int column = 0; column < D; column += 8 * C) {
        float d[C][4];
        clear(d);
        multiply_columns<T, ROWS, RowsTiles<S>::PW, P>(d, w + first, rows + column);
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

template <class S>
KERNEL(THREADS, programs<S>(3))
backward_rows(PARAMS p) {
    using T = typename S::T;
    constexpr int C = (S::BE < 128 ? S::BE : 128) / 8;
    RowsTiles<S> shared;
    Block<S> x(p, ptx::block_x() / p.q_blocks, p.q_blocks - 1 - ptx::block_x() % p.q_blocks);
    copy_rows<T, S::BE, ROWS>(shared.q, x.q(), p.q_row, p.head_dim, x.block * ROWS, p.q_len);
    copy_rows<T, S::BEV, ROWS>(shared.d_out, x.d_out(), p.d_out_row, p.head_dim_v, x.block * ROWS, p.q_len);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    x.find_rows(shared.scratch);  // syncs
    RowState<S> state;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        T* d_out = shared.d_out + (warp() * 16 + lane() / 4 + 8 * r) * S::PV;
        bool inside = x.row[r] < p.q_len;
        const T* o2 = static_cast<const T*>(p.o2) + x.row_at(r) * p.head_dim_v;
        float delta = 0.f;
        for (int i = lane() % 4; i < S::BEV; i += 4) {
            // Rows that see no key get no gradient: masks are not applied to them where all other rows need none.
            if (!x.some(r)) d_out[i] = ptx::from_float<T>(0.f);
            else if (i < p.head_dim_v) delta += ptx::to_float(d_out[i]) * ptx::to_float(o2[i]);
        }
        state.delta[r] = row_sum(delta);
        state.at[r] = x.entmax.point(inside ? p.m[x.row_at(r)] : 0.f, inside ? p.c[x.row_at(r)] : 0.f);
    }
    int count = -1;
    i64 base = 0;
    if (p.blocks != nullptr) base = p.blocks[2 * x.block_at()], count = p.blocks[2 * x.block_at() + 1];
    ptx::sync();
    Range<S::BN> range(x, 1, true);
    List<S::BN> list{p.pool + base, count};
    float a[1][S::NT][4], dp[1][S::NT][4];
    if (count < 0) {
        // O2 was rounded to the inputs' dtype. Over a handful of keys that is lost in the noise; over thousands with equal weights it
        // is one bias that all of them add up, so here delta is summed anew.
        float weighted[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};
        each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
            tile_products(x, shared, k, v, index, whole, a, dp);
            x.entmax.choose([&](auto chosen) {
#pragma unroll
                for (int n = 0; n < S::NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float weight, u;
                        chosen.weigh(a[0][n][i], state.at[i / 2], weight, u);
                        float keep = 1.f;
                        if (S::is(DROPOUT) && p.seed != nullptr) keep = x.keep(i / 2, index[n * 8 + lane() % 4 * 2 + i % 2]);
                        total[i / 2] += u;
                        weighted[i / 2] += u == 0.f ? 0.f : u * keep * dp[0][n][i];
                    }
            });
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] = row_sum(total[r]), weighted[r] = row_sum(weighted[r]);
            state.delta[r] = total[r] > 0.f ? weighted[r] / total[r] : total[r] != total[r] ? total[r] : 0.f;
        }
    }
#pragma unroll 1
    for (int column = 0; column < S::BE; column += 8 * C) {
        float d_q[C][4];
        clear(d_q);
        if (column > 0) state.alpha[0] = state.alpha[1] = AlphaSums();
        if (count < 0) {
            each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                tile_products(x, shared, k, v, index, whole, a, dp);
                tile_gradient(x, index, state, a[0], dp[0]);
                // Sparsemax weighs all keys of the support alike, so over long ones the roundings of ds add up.
                add_d_q<S>(d_q, dp[0], k + column, x.entmax.is(LINEAR));
            });
        } else {
            i64 kv_head = x.b * (p.heads / p.group) + x.head / p.group;
            float* dk_sum = p.dk_sum + kv_head * p.kv_len * p.head_dim;
            float* dv_sum = p.dv_sum + kv_head * p.kv_len * p.head_dim_v;
            each_tile(x, shared, list, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                tile_products(x, shared, k, v, index, whole, a, dp);
                tile_gradient(x, index, state, a[0], dp[0]);
                add_d_q<S>(d_q, dp[0], k + column, false);
                if (column > 0) return;
#pragma unroll
                for (int n = 0; n < S::NT; ++n)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        int at = (warp() * 16 + lane() / 4 + 8 * r) * RowsTiles<S>::PW + n * 8 + lane() % 4 * 2;
                        store_pair(shared.p + at, a[0][n][2 * r], a[0][n][2 * r + 1]);
                        store_pair(shared.ds + at, dp[0][n][2 * r], dp[0][n][2 * r + 1]);
                    }
                ptx::sync();
                // A warp takes 16 keys of dK or of dV at a time.
                for (int job = warp(); job < S::BN / 8; job += WARPS) {
                    int first = job / 2 * 16;
                    if (index[first] < 0) continue;
                    if (job % 2 == 0) scatter<S, S::BE, S::PK>(shared.ds, shared.q, index, first, p.scale, dk_sum, p.head_dim);
                    else scatter<S, S::BEV, S::PV>(shared.p, shared.d_out, index, first, 1.f, dv_sum, p.head_dim_v);
                }
            });
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (x.row[r] >= p.q_len) continue;
            T* to = static_cast<T*>(p.d_q) + x.b * p.d_q_batch + x.head * p.d_q_head + x.row[r] * p.d_q_row;
            float factor = x.some(r) ? p.scale : 0.f;
#pragma unroll
            for (int n = 0; n < C; ++n) {
                int at = column + n * 8 + lane() % 4 * 2;
                if (at < p.head_dim)
                    store_pair(to + at, x.some(r) ? d_q[n][2 * r] * factor : 0.f, x.some(r) ? d_q[n][2 * r + 1] * factor : 0.f);
            }
        }
    }
    float d_alpha = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (lane() % 4 == 0 && x.row[r] < p.q_len) p.delta[x.row_at(r)] = state.delta[r];
        if (S::is(ALPHA_GRAD) && p.d_alpha != nullptr) {
            float total = state.alpha[r].total(x.entmax.h);
            if (lane() % 4 == 0 && x.some(r)) d_alpha += total;
        }
    }
    if (S::is(ALPHA_GRAD) && p.d_alpha != nullptr) {
#pragma unroll
        for (int i = 4; i < 32; i *= 2) d_alpha += ptx::shuffle_xor(d_alpha, i);
        float* parts = reinterpret_cast<float*>(shared.scratch);
        if (lane() == 0) parts[warp()] = d_alpha;
        ptx::sync();
        if (ptx::thread() == 0) p.d_alpha[x.block_at()] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
}
