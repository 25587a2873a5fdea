// O and O2 of a block of rows, once their states are known: a pass over the keys, or the scores themselves where they are on chip.
#pragma once

// Columns of V in registers at a time: O and O2 of wider heads take two passes.
template <class S>
DEVICE constexpr int value_columns() {
    constexpr int most = S::is(GRAD) ? 64 : 128;
    return S::BEV < most ? S::BEV : most;
}

template <class S>
struct Sums {
    float p[2] = {0.f, 0.f}, u[2] = {0.f, 0.f};
    int support[2] = {0, 0};

    DEVICE void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            p[r] = row_sum(p[r]), u[r] = row_sum(u[r]);
            support[r] += ptx::shuffle_xor(support[r], 1);
            support[r] += ptx::shuffle_xor(support[r], 2);
        }
    }
};

// o += p V and, where `grad`, o2 += u V, over 16 keys whose weights are packed as the tensor cores take them.
template <class S, int C>
DEVICE void multiply_packed(float (&o)[C][4], float (&o2)[C][4], const u32 (&p)[4], const u32 (&u)[4], const typename S::T* v,
                            bool grad) {
    using T = typename S::T;
    const T* row = v + lane() % 16 * S::PV + lane() / 16 * 8;
#pragma unroll
    for (int n = 0; n < C; n += 2) {
        u32 part[4];
        ptx::load_matrices_transposed(part, row + n * 8);
        ptx::multiply_add<T>(o[n], p, part[0], part[1]);
        ptx::multiply_add<T>(o[n + 1], p, part[2], part[3]);
        if (S::is(GRAD) && grad) {
            ptx::multiply_add<T>(o2[n], u, part[0], part[1]);
            ptx::multiply_add<T>(o2[n + 1], u, part[2], part[3]);
        }
    }
}

// As multiply_weights of each, with V loaded once where it is more than two tiles wide.
template <class S, int C>
DEVICE void multiply_weights(float (&o)[C][4], float (&o2)[C][4], const float (&p)[2][4], const float (&u)[2][4],
                             const typename S::T* v, bool grad) {
    using T = typename S::T;
    if constexpr (sizeof(T) == 2 && S::is(GRAD) && C > 2) {
        u32 packed_p[4], packed_u[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            packed_p[i] = ptx::pack<T>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
            packed_u[i] = ptx::pack<T>(u[i / 2][i % 2 * 2], u[i / 2][i % 2 * 2 + 1]);
        }
        multiply_packed<S>(o, o2, packed_p, packed_u, v, grad);
    } else {
        multiply_weights<T, S::PV>(o, p, v);
        if (S::is(GRAD) && grad) multiply_weights<T, S::PV>(o2, u, v);
    }
}

// Weights of the scores a of N tiles of 8 keys: then(n, p, u) for each two tiles. Adds to `sums` where `count`; where `mark`, returns the
// bits of the columns that some row weighs, for mark_columns. `product`: a are products, seen by all rows, and no support is asked for.
template <class S, int N, class Index, class Then>
DEVICE u32 weigh_keys(const Block<S>& x, const float (&a)[N][4], const Index& index, const Point (&at)[2], bool count, bool mark,
                      Sums<S>& sums, bool product, Then&& then) {
    bool dropout = S::is(DROPOUT) && x.p.seed != nullptr;
    u32 bits = 0;
    x.entmax.choose([&](auto chosen) {
        auto each = [&](bool support, auto weigh) {
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                float p[2][4], u[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        int r = i / 2;
                        weigh(a[n + j][i], at[r], p[j][i], u[j][i]);
                        if (count) {
                            sums.p[r] += p[j][i];
                            sums.u[r] += u[j][i];
                            if (support) sums.support[r] += p[j][i] > 0.f;
                        }
                        if (mark && u[j][i] != 0.f) bits |= 1u << (2 * (n + j) + i % 2);
                        if (S::is(DROPOUT) && dropout) {
                            float keep = x.keep(r, index[(n + j) * 8 + lane() % 4 * 2 + i % 2]);
                            p[j][i] *= keep;
                            u[j][i] *= keep;
                        }
                    }
                then(n, p, u);
            }
        };
        if (product) each(false, [&](float y, const Point& of, float& p, float& u) { chosen.weigh_product(y, x.x_scale, of, p, u); });
        else each(true, [&](float y, const Point& of, float& p, float& u) { chosen.weigh(y, of, p, u); });
    });
    return bits;
}

// The same, as left operands of a warpgroup.
template <class S, int N>
struct OutputWeights {
    Weights<typename S::T, N> p, u;

    template <class Index>
    DEVICE u32 set(const Block<S>& x, const float (&a)[N][4], const Index& index, const Point (&at)[2], bool count, bool mark,
                   Sums<S>& sums, bool product = false) {
        auto take = [&](int n, const float (&tile_p)[2][4], const float (&tile_u)[2][4]) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                p.set(n + j, tile_p[j]);
                if (S::is(GRAD)) u.set(n + j, tile_u[j]);
            }
        };
        u32 bits = weigh_keys(x, a, index, at, count, mark, sums, product, take);
        p.settle();
        if (S::is(GRAD)) u.settle();
        return bits;
    }
    // Adds to (O, O2) within open_products() and close_products().
    template <int C>
    DEVICE void multiply(const typename S::T* v, int column, float (&o)[C][4], float (&o2)[C][4]) const {
        multiply_weights<typename S::VTile>(o, p, v, column);
        if constexpr (S::is(GRAD)) multiply_weights<typename S::VTile>(o2, u, v, column);
    }
};

// Adds the scores a of N tiles of 8 keys to columns `column` ... of (O, O2); returns as weigh_keys does.
template <class S, int N, int C, class Index>
DEVICE u32 add_output(const Block<S>& x, const float (&a)[N][4], const typename S::T* v, int column, const Index& index,
                      const Point (&at)[2], bool count, bool mark, Sums<S>& sums, float (&o)[C][4], float (&o2)[C][4],
                      bool product = false) {
    if constexpr (S::WARPGROUP) {
        OutputWeights<S, N> weights;
        u32 bits = weights.set(x, a, index, at, count, mark, sums, product);
        open_products<S>();
        weights.multiply(v, column, o, o2);
        close_products<S>(o, o2);
        return bits;
    } else {
        bool grad = S::is(GRAD) && x.p.o2 != nullptr;
        return weigh_keys(x, a, index, at, count, mark, sums, false, [&](int n, const float (&p)[2][4], const float (&u)[2][4]) {
            multiply_weights<S>(o, o2, p, u, v + column + n * 8 * S::PV, grad);
        });
    }
}

// Whether a row of Q holds NaN or inf: such a query spoils its own row, whatever its keys.
template <class S>
DEVICE bool broken_row(const typename S::T* q, int row) {
    using Part = Chunk<typename S::T>;
    float zero = 0.f;  // until it is NaN
    for (int i = lane() % 4; i < S::BE / Part::SIZE; i += 4) {
        Part part = *reinterpret_cast<const Part*>(q + S::QTile::at(row, i * Part::SIZE));
#pragma unroll
        for (int j = 0; j < Part::SIZE; ++j) zero = fmaf(ptx::to_float(part.x[j]), 0.f, zero);
    }
    int any = zero != 0.f;
    any |= ptx::shuffle_xor(any, 1);
    return (any | ptx::shuffle_xor(any, 2)) != 0;
}

// Normalises and writes columns first_column ... of this warp's rows, from row `first` of q on; rows that see no key become 0.
template <class S, int C>
DEVICE void store_output(const Block<S>& x, const typename S::T* q, int first, const Sums<S>& sums, const float (&o)[C][4],
                         const float (&o2)[C][4], int first_column) {
    using T = typename S::T;
    const Params& p = x.p;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bool some = x.some(r), live = some && sums.p[r] > 0.f;
        bool broken = broken_row<S>(q, first + lane() / 4 + 8 * r) || sums.p[r] != sums.p[r];
        float scale = live ? 1.f / sums.p[r] : 0.f, scale_2 = live && sums.u[r] > 0.f ? 1.f / sums.u[r] : 0.f;
        if (x.row[r] >= p.q_len) continue;
        T* out = static_cast<T*>(p.out) + x.b * p.out_batch + x.head * p.out_head + x.row[r] * p.out_row;
        T* out_2 = static_cast<T*>(p.o2) + x.row_at(r) * p.head_dim_v;
#pragma unroll
        for (int n = 0; n < C; ++n) {
            int column = first_column + n * 8 + lane() % 4 * 2;
            if (column < p.head_dim_v) {
                float left = live ? o[n][2 * r] * scale : 0.f, right = live ? o[n][2 * r + 1] * scale : 0.f;
                if (some && broken) left = right = ptx::float_of(0x7fc00000u);
                store_pair(out + column, left, right);
                if (S::is(GRAD) && p.o2 != nullptr)
                    store_pair(out_2 + column, live ? o2[n][2 * r] * scale_2 : 0.f, live ? o2[n][2 * r + 1] * scale_2 : 0.f);
            }
        }
    }
}

// What is kept of each row besides.
template <class S>
DEVICE void store_states(const Block<S>& x, const Sums<S>& sums, const float (&m)[2], const float (&c)[2]) {
    const Params& p = x.p;
    if (lane() % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (x.row[r] >= p.q_len) continue;
        i64 at = x.row_at(r);
        bool live = x.some(r) && sums.p[r] > 0.f;
        // O is divided by sum p, which the backward's p are not: for these, the step from the sums at hand.
        if (S::is(GRAD) && p.o2 != nullptr) p.m[at] = m[r], p.c[at] = x.entmax.newton(c[r], sums.p[r], sums.u[r]);
        if (p.tau != nullptr) {
            p.tau[at] = live ? x.entmax.tau(m[r], c[r]) : 0.f;
            p.support[at] = live ? sums.support[r] : 0;
        }
    }
}

// O and O2 over `keys`. With `list`, the keys that some row weighs are left there, and their number is returned (by warp 0).
template <class S, class Keys>
DEVICE int write_output(const Block<S>& x, const Tiles<S>& shared, const Keys& keys, const float (&m)[2], const float (&c)[2],
                        int* list) {
    using T = typename S::T;
    constexpr int C = value_columns<S>() / 8;
    Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
    // As in evaluate().
    bool plain = S::WARPGROUP && !S::is(ALIBI) && x.p.tau == nullptr && fabsf(m[0]) < 1e4f && fabsf(m[1]) < 1e4f;
    Sums<S> sums;
    int kept = 0;
    // The sums of wider values leave no registers for Q. And NVRTC 13.0 would give the registers of a warpgroup's Q, if they had to last
    // through the loop, to the weights (13.5 does not).
    Left<S, S::BE, !S::WARPGROUP && S::BEV <= 64> q(shared.q);
#pragma unroll 1
    for (int column = 0; column < S::BEV; column += 8 * C) {
        float o[C][4], o2[C][4];
        clear(o);
        clear(o2);
        each_product<S::WARPGROUP>(x, shared, keys, q, true, [&](int tile, auto& a, const T* v, const auto& index, bool whole) {
            bool product = plain && whole;
            if (!product) to_scores(a, x, index, whole && !S::WARPGROUP);
            // In the last pass: the others still find the list as it was.
            bool mark = !Keys::ALL && column + 8 * C >= S::BEV;
            [[maybe_unused]] u32 bits = add_output(x, a, v, column, index, at, column == 0, mark, sums, o, o2, product);
            if constexpr (!Keys::ALL) {
                if (!mark) return;
                int* flags = shared.flags + tile % 2 * S::BN;
                mark_columns<S::NT>(bits, flags);
                ptx::sync();
                if (warp() == 0) kept = append_flagged(list, kept, index, flags, S::BN);
            }
        });
        if (column == 0) sums.finish();
        store_output(x, shared.q, warp() * 16, sums, o, o2, column);
    }
    store_states(x, sums, m, c);
    return kept;
}

// tau and the output over `keys`; returns as write_output does.
template <class S, class Keys>
DEVICE int solve_and_write(const Block<S>& x, const Tiles<S>& shared, const Keys& keys, int* list) {
    const Params& p = x.p;
    float m[2], c[2];
    if (p.entries != nullptr && x.entmax.starts_anywhere()) {
        // From the bound, which is near tau after forward_lists' steps.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            bool inside = x.row[r] < p.q_len;
            x.entmax.start(inside ? p.t[x.row_at(r)] : 0.f, inside ? p.margin[x.row_at(r)] : 0.f, m[r], c[r]);
        }
        if constexpr (Keys::ALL) guess(x, shared, m, c);
    } else {
        Point zero[2] = {{0.f, 0.f, 1.f}, {0.f, 0.f, 1.f}};
        float f[2], s[2];
        evaluate<false, false>(x, shared, keys, zero, f, s, m);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (m[r] == -INFINITE) m[r] = 0.f;
            c[r] = x.entmax.first_c();
        }
    }
    solve(x, shared, keys, m, c);
    return write_output(x, shared, keys, m, c, list);
}

// A value of warp 0, to all threads.
DEVICE int from_first_warp(int x, int* scratch) {
    ptx::sync();
    if (ptx::thread() == 0) scratch[0] = x;
    ptx::sync();
    x = scratch[0];
    ptx::sync();
    return x;
}

// Copies `kept` keys (known to warp 0) to the pool that the backward walks, if it has room; negative: the backward walks all keys.
template <class S>
DEVICE void keep_list(const Block<S>& x, const int* list, int kept, int* scratch) {
    const Params& p = x.p;
    if (!S::is(GRAD) || p.blocks == nullptr) return;
    kept = from_first_warp(kept, scratch);
    i64 base = -1;
    if (kept >= 0) {
        u64 place = ptx::thread() == 0 ? ptx::fetch_add(p.counters + POOLED, static_cast<u64>(kept)) : 0;
        base = from_first_warp(place + static_cast<u64>(kept) <= static_cast<u64>(p.pool_size) ? static_cast<int>(place) : -1, scratch);
    }
    if (base >= 0)
        for (int i = ptx::thread(); i < kept; i += THREADS) p.pool[base + i] = list[i];
    if (ptx::thread() == 0) {
        p.blocks[2 * x.block_at()] = base >= 0 ? static_cast<int>(base) : 0;
        p.blocks[2 * x.block_at() + 1] = base >= 0 ? kept : -1;
    }
}
