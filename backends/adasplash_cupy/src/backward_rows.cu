// Backward, a program per block of 64 query rows: dQ, and over lists dK and dV as well.
//
//     dQ = scale ds K      dK = scale ds^T Q      dV = p^T dO
//
// with p, u = p^(2-alpha) recomputed from the saved (m, c). A block whose support was saved as a list walks the list and adds to dK and
// dV by fp32 atomics; the others walk their whole range and leave dK and dV to backward_keys.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "blocks.cuh"
#include "tiles.cuh"
#include "gradient.cuh"

template <class S>
struct RowsTiles : Tiles<S> {
    using T = typename S::T;
    using Weighed = Layout<T, S::BN, ROWS, S::WARPGROUP>;  // the weights, a row a query
    static constexpr int PW = pitch<T>(S::BN), MORE = S::OTile::SIZE + 2 * Weighed::SIZE;
    T *d_out, *p, *ds;

    DEVICE RowsTiles() : Tiles<S>(true, MORE) {
        d_out = this->more, p = d_out + S::OTile::SIZE, ds = p + Weighed::SIZE;
    }
    DEVICE static constexpr int bytes() { return Tiles<S>::bytes(true, MORE); }
};

// The block's rows of Q and dO.
template <class S>
struct RowOperands {
    Left<S, S::BE, false> q;
    Left<S, S::BEV, false> d_out;
    DEVICE explicit RowOperands(const RowsTiles<S>& shared) : q(shared.q), d_out(shared.d_out) {}
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
DEVICE void tile_products(const Block<S>& x, const RowOperands<S>& rows, const typename S::T* k, const typename S::T* v, const int* index,
                          bool whole, float (&a)[S::NT][4], float (&dp)[S::NT][4]) {
    open_products<S>();
    multiply_left(a, rows.q, k);
    if (!S::WARPGROUP) to_scores(a, x, index, whole);
    multiply_left(dp, rows.d_out, v);
    close_products<S>(a, dp);
    if (S::WARPGROUP) to_scores(a, x, index, whole);
}

// a, dp -> p, ds in place; each(n, i, u, ds) for each entry.
template <class S, class Each>
DEVICE void tile_gradient(const Block<S>& x, const int* index, RowState<S>& state, float (&a)[S::NT][4], float (&dp)[S::NT][4],
                          Each&& each) {
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
                float p, ds, u;
                score_gradient(chosen, a[n][i], state.at[r], dp[n][i], keep, state.delta[r], ds, p, u);
                a[n][i] = p;
                dp[n][i] = ds;
                each(n, i, u, ds);
            }
    });
}

// dQ += ds K, in the columns of a chunk.
template <class S, int C>
DEVICE void add_d_q(float (&d_q)[C][4], const float (&ds)[S::NT][4], const typename S::T* k, int column, bool in_two_parts) {
    using T = typename S::T;
    if constexpr (S::WARPGROUP) {
        Weights<T, S::NT> w;
        w.set(ds);
        for (int part = 0; part < (in_two_parts ? 2 : 1); ++part) {
            if (part == 1) w.set_rest(ds);
            w.settle();
            open_products<S>();
            multiply_weights<typename S::KTile>(d_q, w, k, column);
            close_products<S>(d_q);
        }
    } else {
#pragma unroll
        for (int n = 0; n < S::NT; n += 2) {
            float part[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) part[j][i] = ds[n + j][i];
            multiply_weights<T, S::PK>(d_q, part, k + column + n * 8 * S::PK);
            if (sizeof(T) == 2 && in_two_parts) {
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[j][i] -= ptx::to_float(ptx::from_float<T>(part[j][i]));
                multiply_weights<T, S::PK>(d_q, part, k + column + n * 8 * S::PK);
            }
        }
    }
}

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

// 16 keys from `first` on by a warp: w^T rows, all columns.
template <class S, int D, int P>
DEVICE void multiply_and_scatter(const typename S::T* w, const typename S::T* rows, const int* index, int first, float factor,
                                 float* sums, int columns) {
    constexpr int C = D < 64 ? D / 8 : 8;
#pragma unroll 1
    for (int column = 0; column < D; column += 8 * C) {
        float d[C][4];
        clear(d);
        multiply_columns<typename S::T, ROWS, RowsTiles<S>::PW, P>(d, w + first, rows + column);
        scatter(d, index, first, factor, sums, columns, column);
    }
}

// dK and dV of a tile of a list, from p and ds, and dQ.
template <class S, int C>
DEVICE void add_list_tile(const Block<S>& x, const RowsTiles<S>& shared, const KeySums<S>& sums, const typename S::T* k, const int* index,
                          const float (&p)[S::NT][4], const float (&ds)[S::NT][4], float (&d_q)[C][4]) {
    using T = typename S::T;
    using Weighed = typename RowsTiles<S>::Weighed;
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
                float d_k[8][4], d_v[8][4];
                open_products<S>();
                if (first == 0 && column == 0) multiply_weights<typename S::KTile>(d_q, w, k, 0);
                if (column < S::BE) multiply_columns(d_k, shared.ds + first * ROWS, shared.q + column * ROWS);
                if (column < S::BEV) multiply_columns(d_v, shared.p + first * ROWS, shared.d_out + column * ROWS);
                close_products<S>(d_q, d_k, d_v);
                int key = first + warp() * 16;
                if (column < S::BE) scatter(d_k, index, key, x.p.scale, sums.d_k, x.p.head_dim, column);
                if (column < S::BEV) scatter(d_v, index, key, 1.f, sums.d_v, x.p.head_dim_v, column);
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
backward_rows(PARAMS p) {
    using T = typename S::T;
    constexpr int C = (S::BE < 128 ? S::BE : 128) / 8;
    // dQ's bias, see below, is taken out at the end where u K has room in registers, and else is known before.
    constexpr bool ONE_PASS = S::WARPGROUP && S::BE <= 64;
    RowsTiles<S> shared;
    Block<S> x(p, ptx::block_x() / p.q_blocks, p.q_blocks - 1 - ptx::block_x() % p.q_blocks);
    copy_rows<T, S::BE, ROWS, S::WARPGROUP>(shared.q, x.q(), p.q_row, p.head_dim, x.block * ROWS, p.q_len);
    copy_rows<T, S::BEV, ROWS, S::WARPGROUP>(shared.d_out, x.d_out(), p.d_out_row, p.head_dim_v, x.block * ROWS, p.q_len);
    ptx::commit_copies();
    land_copies<S, 0>();
    x.find_rows(shared.scratch);  // syncs
    RowState<S> state;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bool inside = x.row[r] < p.q_len;
        const T* o2 = static_cast<const T*>(p.o2) + x.row_at(r) * p.head_dim_v;
        float delta = 0.f;
        for (int i = lane() % 4; i < S::BEV; i += 4) {
            // Rows that see no key get no gradient: masks are not applied to them where all other rows need none.
            T& d_out = shared.d_out[S::OTile::at(warp() * 16 + lane() / 4 + 8 * r, i)];
            if (!x.some(r)) d_out = ptx::from_float<T>(0.f);
            else if (i < p.head_dim_v) delta += ptx::to_float(d_out) * ptx::to_float(o2[i]);
        }
        state.delta[r] = row_sum(delta);
        state.at[r] = x.entmax.point(inside ? p.m[x.row_at(r)] : 0.f, inside ? p.c[x.row_at(r)] : 0.f);
    }
    int count = -1;
    i64 base = 0;
    if (p.blocks != nullptr) base = p.blocks[2 * x.block_at()], count = p.blocks[2 * x.block_at() + 1];
    if constexpr (S::WARPGROUP) ptx::publish_stores();
    ptx::sync();
    RowOperands<S> rows(shared);
    Range<S::BN> range(x, 1, true);
    List<S::BN> list{p.pool + base, count};
    float a[S::NT][4], dp[S::NT][4];
    // O2 was rounded to the inputs' dtype. Over a handful of keys that is lost in the noise; over thousands with equal weights it is one
    // bias that all of them add up. So delta is summed anew; or sum ds, which is not 0 then, tells it, and u K takes it out of dQ.
    if (!ONE_PASS && count < 0) {
        float weighted[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};
        each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
            tile_products(x, rows, k, v, index, whole, a, dp);
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
    }
#pragma unroll 1
    for (int column = 0; column < S::BE; column += 8 * C) {
        float d_q[C][4];
        clear(d_q);
        if (column > 0) state.alpha[0] = state.alpha[1] = AlphaSums();
        auto nothing = [](int, int, float, float) {};
        // Sparsemax weighs all keys of the support alike, so over long ones the roundings of ds add up.
        bool in_two_parts = x.entmax.is(LINEAR);
        if constexpr (ONE_PASS) {
            if (count < 0) {
                float u_k[C][4], rest[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};
                clear(u_k);
                each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                    tile_products(x, rows, k, v, index, whole, a, dp);
                    tile_gradient(x, index, state, a, dp, [&](int n, int i, float u, float ds) {
                        rest[i / 2] += ds, total[i / 2] += u;
                        a[n][i] = u;  // p is not wanted
                    });
                    Weights<T, S::NT> w, w_u;
                    w.set(dp);
                    w_u.set(a);
                    w.settle();
                    w_u.settle();
                    open_products<S>();
                    multiply_weights<typename S::KTile>(d_q, w, k, 0);
                    multiply_weights<typename S::KTile>(u_k, w_u, k, 0);
                    close_products<S>(d_q, u_k);
                    if (in_two_parts) {
                        w.set_rest(dp);
                        w.settle();
                        open_products<S>();
                        multiply_weights<typename S::KTile>(d_q, w, k, 0);
                        close_products<S>(d_q);
                    }
                });
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    rest[r] = row_sum(rest[r]), total[r] = row_sum(total[r]);
                    float bias = total[r] > 0.f ? rest[r] / total[r] : total[r] != total[r] ? total[r] : 0.f;
                    state.delta[r] += bias;
#pragma unroll
                    for (int n = 0; n < C; ++n)
                        d_q[n][2 * r] -= bias * u_k[n][2 * r], d_q[n][2 * r + 1] -= bias * u_k[n][2 * r + 1];
                }
            }
        } else if (count < 0) {
            each_tile(x, shared, range, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                tile_products(x, rows, k, v, index, whole, a, dp);
                tile_gradient(x, index, state, a, dp, nothing);
                add_d_q<S>(d_q, dp, k, column, in_two_parts);
            });
        }
        if (count >= 0) {
            KeySums<S> sums(x);
            each_tile(x, shared, list, true, [&](int, const T* k, const T* v, const int* index, bool whole) {
                tile_products(x, rows, k, v, index, whole, a, dp);
                tile_gradient(x, index, state, a, dp, nothing);
                if (column == 0) add_list_tile(x, shared, sums, k, index, a, dp, d_q);
                else add_d_q<S>(d_q, dp, k, column, false);
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
