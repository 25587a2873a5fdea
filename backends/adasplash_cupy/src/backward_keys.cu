// Backward, a program per block of 64 keys: dK and dV of the query blocks that kept no list, in a fixed order.
//
//     dK = scale ds^T Q,  dV = p^T dO,  summed over the query heads that share the key head.
//
// Starts from what backward_rows added by atomics (if lists were kept) and writes the gradients in their own dtype; with no lists at all
// the result is the same bits in every run. Keys lie on the M side: p^T and ds^T are at once the left operands of the second products.
// S::BN query rows are taken at a time, and with two stages the next are on their way meanwhile; wide heads are split over programs
// (block_y), which compute the same scores. A warpgroup multiplies while it weighs: p^T dO is under way while ds follows from dp, and with
// three stages ds^T Q while the next rows' scores are multiplied.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "blocks.cuh"
#include "gradient.cuh"

inline constexpr int KEYS = 16 * WARPS;

// Columns of dK and dV a program: what registers hold beside the transform. The grid has enough programs for 64 each.
template <class S>
DEVICE constexpr int key_columns() {
    return S::ALPHA != 0 && S::FLAGS == 0 ? ptx::MOST_COLUMNS : 64;
}

template <class S>
struct KeysTiles {
    using T = typename S::T;
    static constexpr int RB = S::BN;
    static_assert(KEYS == ROWS, "keys lie where other passes have queries, and query rows where they have keys");
    T *k, *v, *q, *d_out;
    float *m, *c, *e, *start, *delta;  // as q and d_out of STAGES times RB rows; start: Entmax::intercept()
    int *lo, *hi, *diag;

    DEVICE KeysTiles() {
        u8* at = ptx::shared_memory();
        if (S::WARPGROUP) at += (1024 - ptx::shared_address(at) % 1024) % 1024;
        at = take(at, k, S::QTile::SIZE);
        at = take(at, v, S::OTile::SIZE);
        at = take(at, q, S::STAGES * S::KTile::SIZE);
        at = take(at, d_out, S::STAGES * S::VTile::SIZE);
        at = take(at, m, S::STAGES * RB);
        at = take(at, c, S::STAGES * RB);
        at = take(at, e, S::STAGES * RB);
        at = take(at, start, S::STAGES * RB);
        at = take(at, delta, S::STAGES * RB);
        at = take(at, lo, S::STAGES * RB);
        at = take(at, hi, S::STAGES * RB);
        take(at, diag, S::STAGES * RB);
    }
    DEVICE static constexpr int bytes() {
        int elements = S::QTile::SIZE + S::OTile::SIZE + S::STAGES * (S::KTile::SIZE + S::VTile::SIZE);
        return (S::WARPGROUP ? 1024 : 0) + elements * static_cast<int>(sizeof(T)) + S::STAGES * 8 * RB * 4;
    }

    template <class X>
    DEVICE static u8* take(u8* at, X*& piece, int count) {
        piece = reinterpret_cast<X*>(at);
        return at + count * sizeof(X);
    }
};

// d times factor, and the sums of lists' keys, where there are any.
template <int C>
DEVICE void add_sums(float (&d)[C][4], float factor, const float* sums, i64 first, int keys, int columns, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int key = warp() * 16 + lane() / 4 + 8 * r;
#pragma unroll
        for (int n = 0; n < C; ++n) {
            int at = column + n * 8 + lane() % 4 * 2;
            Two more{0.f, 0.f};
            if (sums != nullptr && key < keys && at < columns) more = *reinterpret_cast<const Two*>(sums + (first + key) * columns + at);
            d[n][2 * r] = fmaf(d[n][2 * r], factor, more.x[0]);
            d[n][2 * r + 1] = fmaf(d[n][2 * r + 1], factor, more.x[1]);
        }
    }
}

DEVICE Two pair_of(const float* of) { return *reinterpret_cast<const Two*>(of); }

template <class T, int C>
DEVICE void store_sums(T* to, const float (&d)[C][4], i64 stride, int keys, int columns, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int key = warp() * 16 + lane() / 4 + 8 * r;
        if (key >= keys) continue;
#pragma unroll
        for (int n = 0; n < C; ++n) {
            int at = column + n * 8 + lane() % 4 * 2;
            if (at < columns) store_pair(to + key * stride + at, d[n][2 * r], d[n][2 * r + 1]);
        }
    }
}

// As block_in_turn(), of blocks of keys: the first ones are seen by most rows under a causal mask.
DEVICE BlockOfRows keys_in_turn(const Params& p, int at) {
    int key_blocks = (p.kv_len + KEYS - 1) / KEYS, together = (p.heads_in_turn + p.group - 1) / p.group;
    int first = at / (together * key_blocks) * together, left = p.batch * (p.heads / p.group) - first;
    int heads = together < left ? together : left;
    at -= first * key_blocks;
    return {first + at % heads, at / heads};
}

template <class S>
KERNEL(THREADS, programs<S>(2))
backward_keys(PARAMS p) {
    using T = typename S::T;
    constexpr int RB = S::BN, MOST = key_columns<S>();
    constexpr int CK = (S::BE < MOST ? S::BE : MOST) / 8, CV = (S::BEV < MOST ? S::BEV : MOST) / 8;
    // Wide heads lack the registers for a second form of the loop over entries, and for a row's state while it is on its way.
    constexpr bool ROOM = S::BE + S::BEV <= 128, OVERLAPS = S::WARPGROUP && ROOM;
    KeysTiles<S> shared;
    auto [kv_bh, key_block] = keys_in_turn(p, ptx::block_x());
    int kv_heads = p.heads / p.group, b = kv_bh / kv_heads, kv_head = kv_bh % kv_heads;
    int first = key_block * KEYS, keys = p.kv_len - first < KEYS ? p.kv_len - first : KEYS;
    // A chunk of columns of dK and one of dV; a head that is narrower has fewer.
    int column = ptx::block_y() * MOST, k_column = column < S::BE ? column : 0, v_column = column < S::BEV ? column : 0;
    if (column >= S::BE && column >= S::BEV) return;
    const T* k_head = static_cast<const T*>(p.k) + b * p.k_batch + kv_head * p.k_head;
    const T* v_head = static_cast<const T*>(p.v) + b * p.v_batch + kv_head * p.v_head;
    copy_rows<T, S::BE, KEYS, S::WARPGROUP>(shared.k, k_head, p.k_row, p.head_dim, first, p.kv_len);
    copy_rows<T, S::BEV, KEYS, S::WARPGROUP>(shared.v, v_head, p.v_row, p.head_dim_v, first, p.kv_len);
    ptx::commit_copies();
    int key[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        key[r] = first + warp() * 16 + lane() / 4 + 8 * r;
        if (key[r] >= p.kv_len || (p.key_mask != nullptr && p.key_mask[b * p.key_mask_batch + key[r]] == 0)) key[r] = -1;
    }
    float d_k[CK][4], d_v[CV][4];
    clear(d_k);
    clear(d_v);
    bool keys_open = p.key_mask == nullptr && keys == KEYS;  // no key is hidden from all rows
    Left<S, S::BE, false> k(shared.k);
    Left<S, S::BEV, false> v(shared.v);
    // Rows that see some of the keys, the first a tile's, and those that see all of them. Where intervals only move to the right from row
    // to row, this is all there is to know.
    int from = 0, until = p.q_len, whole_from = OPEN, whole_until = 0;
    if (p.lo == nullptr) {
        auto row_within = [&](i64 row) { return static_cast<int>(row < 0 ? 0 : row < p.q_len ? row : p.q_len); };
        i64 on_diagonal = static_cast<i64>(first) - p.shift;
        from = row_within(on_diagonal - p.right) / RB * RB;
        until = row_within(on_diagonal + KEYS + p.left);
        if (keys_open) whole_from = row_within(on_diagonal + KEYS - 1 - p.right), whole_until = row_within(on_diagonal + p.left + 1);
    }
    int first_block = from / ROWS, last_block = (until + ROWS - 1) / ROWS;
    for (int g = 0; g < p.group; ++g) {
        int head = kv_head * p.group + g, bh = b * p.heads + head;
        Block<S> x(p, bh, 0);
        const int* blocks = p.blocks == nullptr ? nullptr : p.blocks + 2 * static_cast<i64>(bh) * p.q_blocks;
        if (blocks != nullptr) {
            bool dense = false;
            for (int i = first_block + ptx::thread(); i < last_block; i += THREADS) dense = dense || blocks[2 * i + 1] < 0;
            if (!ptx::sync_any(dense)) continue;
        }
        bool dropout = S::is(DROPOUT) && p.seed != nullptr, biased = S::is(ALIBI) && p.slopes != nullptr;
        // Lengths of the lists of the rows that find() looks at next, on their way while it is not asked.
        auto listed = [&](int row) { return blocks != nullptr && row < until ? blocks[2 * (row / ROWS) + 1] : -1; };
        int ahead = listed(from);
        // The first rows from `row` on that want some key. All threads are done with the rows before when there are some.
        auto find = [&](int row) {
            for (; row < until; row += RB) {
                int length = ahead;
                ahead = listed(row + RB);
                if (length >= 0) continue;
                if (p.lo == nullptr) break;
                bool wanted = false;
                if (ptx::thread() < RB) {
                    Interval seen = interval(p, b, row + ptx::thread());
                    wanted = seen.lo < seen.hi && seen.hi > first && seen.lo < first + KEYS;
                }
                if (ptx::sync_any(wanted)) break;
            }
            return ptx::shuffle(row, 0);  // all lanes know it already; now the compiler does
        };
        [[maybe_unused]] InnerRows<T, S::BE, RB> inner_q(x.q(), p.q_row, p.head_dim, 0);
        [[maybe_unused]] InnerRows<T, S::BEV, RB> inner_d_out(x.d_out(), p.d_out_row, p.head_dim_v, 0);
        [[maybe_unused]] int copied = 0;
        auto copy = [&](int row, int stage) {
            T *q = shared.q + stage * S::KTile::SIZE, *d_out = shared.d_out + stage * S::VTile::SIZE;
            if (OVERLAPS && row + RB <= until) {
                inner_q.skip(row - copied), inner_d_out.skip(row - copied);
                inner_q.copy(q), inner_d_out.copy(d_out);
                copied = row + RB;
            } else if (row < until) {
                copy_rows<T, S::BE, RB, S::WARPGROUP>(q, x.q(), p.q_row, p.head_dim, row, p.q_len);
                copy_rows<T, S::BEV, RB, S::WARPGROUP>(d_out, x.d_out(), p.d_out_row, p.head_dim_v, row, p.q_len);
            }
            ptx::commit_copies();
        };
        // A row's state, a thread each: loaded as early as the copies start, and stored when it had the time to arrive.
        struct {
            float m, c, delta;
        } of_row;
        auto load = [&](int row) {
            int own = row + ptx::thread();
            bool inside = ptx::thread() < RB && own < until;
            i64 at = static_cast<i64>(bh) * p.q_len + own;
            of_row.m = inside ? p.m[at] : 0.f, of_row.c = inside ? p.c[at] : 0.f, of_row.delta = inside ? p.delta[at] : 0.f;
        };
        auto store = [&](int row, int stage) {
            if (ptx::thread() >= RB) return;
            int i = stage * RB + ptx::thread();
            Point point = x.entmax.point(of_row.m, of_row.c);
            shared.m[i] = point.m, shared.c[i] = point.c, shared.e[i] = point.e;
            if (OVERLAPS) x.entmax.choose([&](auto chosen) { shared.start[i] = chosen.intercept(point); });
            shared.delta[i] = of_row.delta;
            Interval seen = interval(p, b, row + ptx::thread());
            shared.lo[i] = seen.lo, shared.hi[i] = seen.hi, shared.diag[i] = seen.diag;
        };
        auto after = [](int stage) { return stage == S::STAGES - 1 ? 0 : stage + 1; };
        int row = find(from), next = row, stage = 0;
        if (S::STAGES > 1) {
            ptx::sync();  // the head before is done with
            copy(row, 0);
            load(row);
            store(row, 0);
        }
        for (; row < until; row = next) {
            if (S::STAGES == 1) {
                copy(row, 0);
                load(row);
                store(row, 0);
            }
            land_copies<S, 0>();
            bool huge = ptx::sync_any(ROOM && !(fabsf(of_row.m) < 1e4f));  // an m that would cost c its digits
            const T *q = shared.q + stage * S::KTile::SIZE, *d_out = shared.d_out + stage * S::VTile::SIZE;
            float a[RB / 8][4], dp[RB / 8][4];
            auto multiply_values = [&] {
                open_products<S>();
                multiply_left(dp, v, d_out);
                commit_products<S>();
            };
            if constexpr (OVERLAPS) {
                open_products<S>();
                multiply_left(a, k, q);
                commit_products<S>();
                if constexpr (!DEFERS<S>) multiply_values();
            }
            if (S::STAGES > 1) {
                next = find(row + RB);
                copy(next, after(stage));
                load(next);
                if (!ROOM && next < until) store(next, after(stage));
            }
            bool whole = ROOM && row >= whole_from && row + RB <= whole_until && !biased && !huge;
            // x of a product.
            auto score_of = [&](float y, int at, int j) {
                float score = y * x.x_scale;
                if (S::is(ALIBI) && biased) {
                    int distance = shared.diag[at] - j;
                    score -= x.slope * static_cast<float>(distance < 0 ? -distance : distance);
                }
                bool hidden = static_cast<int>(j < shared.lo[at]) | static_cast<int>(j >= shared.hi[at]);
                return hidden ? -INFINITE : score;
            };
            auto keep_of = [&](int in_tile, int r) {
                return dropout_factor(x.seed, p.keep_from, p.keep_scale, row + in_tile, key[r], bh);
            };
            if constexpr (OVERLAPS) {
                if constexpr (DEFERS<S>) {
                    land_products<S, 0>(a);
                    multiply_values();
                } else {
                    land_products<S, 1>(a);
                }
                Weights<T, RB / 8> weights, ds;
                u32 kept = 0;  // bits of entries
                x.entmax.choose([&](auto chosen) {
                    auto take = [&](auto weigh) {
#pragma unroll
                        for (int n = 0; n < RB / 8; ++n) {
                            int in_tile = n * 8 + lane() % 4 * 2;
                            float weight[4];
                            weigh(n, stage * RB + in_tile, weight);
                            if (S::is(DROPOUT) && dropout) {
#pragma unroll
                                for (int i = 0; i < 4; ++i) {
                                    float keep = keep_of(in_tile + i % 2, i / 2);
                                    weight[i] = weight[i] == 0.f ? 0.f : weight[i] * keep;
                                    kept |= keep > 0.f ? 1u << (4 * n + i) : 0;
                                }
                            }
                            weights.set(n, weight);
                        }
                    };
                    if (whole) {
                        take([&](int n, int at, float (&weight)[4]) {
                            Two start = pair_of(shared.start + at);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                float u;
                                chosen.weigh_line(a[n][i], x.x_scale, start.x[i % 2], weight[i], u);
                                a[n][i] = u;
                            }
                        });
                    } else {
                        take([&](int n, int at, float (&weight)[4]) {
                            Two m = pair_of(shared.m + at), c = pair_of(shared.c + at), e = pair_of(shared.e + at);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                int j = i % 2;
                                float u;
                                chosen.weigh(score_of(a[n][i], at + j, key[i / 2]), Point{m.x[j], c.x[j], e.x[j]}, weight[i], u);
                                a[n][i] = u;
                            }
                        });
                    }
                });
                weights.settle();
                open_products<S>();
                multiply_weights<typename S::VTile>(d_v, weights, d_out, v_column);
                commit_products<S>();
                land_products<S, 1>(dp);
                auto each = [&](auto gradient) {
#pragma unroll
                    for (int n = 0; n < RB / 8; ++n) {
                        Two delta = pair_of(shared.delta + stage * RB + n * 8 + lane() % 4 * 2);
#pragma unroll
                        for (int i = 0; i < 4; ++i) dp[n][i] = gradient(n, i, delta.x[i % 2]);
                    }
                };
                if (!S::is(DROPOUT) && whole) {
                    each([&](int n, int i, float delta) { return a[n][i] * (dp[n][i] - delta); });
                } else {
                    each([&](int n, int i, float delta) {
                        float keep = !dropout ? 1.f : (kept >> (4 * n + i) & 1) != 0 ? p.keep_scale : 0.f, weight = 0.f;
                        return score_gradient<S::is(DROPOUT)>(dp[n][i], keep, delta, a[n][i], weight);
                    });
                }
                if constexpr (DEFERS<S>) {
                    ptx::settle(dp);
                    land_products<S, 0>(d_v);
                }
                ds.set(dp);
                ds.settle();
                open_products<S>();
                multiply_weights<typename S::KTile>(d_k, ds, q, k_column);
                commit_products<S>();
                if constexpr (!DEFERS<S>) land_products<S, 0>(d_v, d_k);
            } else {
                open_products<S>();
                multiply_left(a, k, q);
                multiply_left(dp, v, d_out);
                close_products<S>(a, dp);
                x.entmax.choose([&](auto chosen) {
                    auto take = [&](auto weigh) {
#pragma unroll
                        for (int n = 0; n < RB / 8; ++n) {
                            int in_tile = n * 8 + lane() % 4 * 2, at = stage * RB + in_tile;
                            Two m = pair_of(shared.m + at), c = pair_of(shared.c + at), e = pair_of(shared.e + at);
                            Two delta = pair_of(shared.delta + at);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                int j = i % 2;
                                float keep = 1.f, weight, u;
                                if (S::is(DROPOUT) && dropout)
                                    keep = keep_of(in_tile + j, i / 2);
                                weigh(a[n][i], Point{m.x[j], c.x[j], e.x[j]}, at + j, key[i / 2], weight, u);
                                dp[n][i] = score_gradient<S::is(DROPOUT)>(dp[n][i], keep, delta.x[j], u, weight);
                                a[n][i] = weight;
                            }
                        }
                    };
                    if (whole) {
                        take([&](float y, const Point& of, int, int, float& weight, float& u) {
                            chosen.weigh_product(y, x.x_scale, of, weight, u);
                        });
                    } else {
                        take([&](float y, const Point& of, int at, int j, float& weight, float& u) {
                            chosen.weigh(score_of(y, at, j), of, weight, u);
                        });
                    }
                });
                if constexpr (S::WARPGROUP) {
                    Weights<T, RB / 8> weights, ds;
                    weights.set(a);
                    ds.set(dp);
                    weights.settle();
                    ds.settle();
                    ptx::settle(d_v);
                    ptx::settle(d_k);
                    open_products<S>();
                    multiply_weights<typename S::VTile>(d_v, weights, d_out, v_column);
                    multiply_weights<typename S::KTile>(d_k, ds, q, k_column);
                    close_products<S>(d_v, d_k);
                } else {
#pragma unroll
                    for (int n = 0; n < RB / 8; n += 2) {
                        float part[2][4];
#pragma unroll
                        for (int j = 0; j < 2; ++j)
#pragma unroll
                            for (int i = 0; i < 4; ++i) part[j][i] = a[n + j][i];
                        multiply_weights<T, S::PV>(d_v, part, d_out + n * 8 * S::PV + v_column);
#pragma unroll
                        for (int j = 0; j < 2; ++j)
#pragma unroll
                            for (int i = 0; i < 4; ++i) part[j][i] = dp[n + j][i];
                        multiply_weights<T, S::PK>(d_k, part, q + n * 8 * S::PK + k_column);
                    }
                }
            }
            if (S::STAGES > 1) {
                stage = after(stage);
                if (ROOM && next < until) store(next, stage);
            } else {
                next = find(row + RB);
                ptx::sync();
            }
        }
        if constexpr (OVERLAPS && DEFERS<S>) land_products<S, 0>(d_v, d_k);
    }
    ptx::wait_copies<0>();
    i64 kv_at = static_cast<i64>(kv_bh) * p.kv_len + first;
    add_sums(d_k, p.scale, p.dk_sum, kv_at, keys, p.head_dim, k_column);
    add_sums(d_v, 1.f, p.dv_sum, kv_at, keys, p.head_dim_v, v_column);
    T* to_k = static_cast<T*>(p.d_k) + b * p.d_k_batch + kv_head * p.d_k_head + first * p.d_k_row;
    T* to_v = static_cast<T*>(p.d_v) + b * p.d_v_batch + kv_head * p.d_v_head + first * p.d_v_row;
    if (column < S::BE) store_sums(to_k, d_k, p.d_k_row, keys, p.head_dim, k_column);
    if (column < S::BEV) store_sums(to_v, d_v, p.d_v_row, keys, p.head_dim_v, v_column);
}
