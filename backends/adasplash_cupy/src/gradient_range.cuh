// A block of 64 query rows over all keys, by a warpgroup: the tensor cores multiply while scores are weighed.
//
// Of a tile, u K is under way while ds follows from dp; and from three stages on ds K while the next tile's scores are multiplied, so that
// its rows of K stay a tile longer. Tiles that all rows see are copied by address, without indices.
#pragma once

template <class S>
inline constexpr int TILES_AHEAD = S::STAGES - 1 - (DEFERS<S> ? 1 : 0);  // whose copies are under way

// The tiles of a range, and the copies of their rows of K and V.
template <class S, class Shared>
struct RangeTiles {
    using T = typename S::T;
    const Block<S>& x;
    const Shared& shared;
    const Range<S::BN>& range;
    int first_whole, count_whole;  // tiles of which every row sees every key
    InnerRows<T, S::BE, S::BN> keys;
    InnerRows<T, S::BEV, S::BN> values;

    DEVICE RangeTiles(const Block<S>& x_, const Shared& shared_, const Range<S::BN>& range_)
        : x(x_), shared(shared_), range(range_), first_whole(range.left_tiles),
          count_whole(range.key_mask == nullptr ? range.mid_tiles : 0), keys(x.k, x.p.k_row, x.p.head_dim, range.mid_start),
          values(x.v, x.p.v_row, x.p.head_dim_v, range.mid_start) {}

    DEVICE bool whole(int tile) const { return static_cast<u32>(tile - first_whole) < static_cast<u32>(count_whole); }
    // The indices of a tile that is not, or whose keys' places count: after them a sync(), and then the copies.
    DEVICE void index(int tile) const {
        static_assert(S::BN <= THREADS, "a thread a key");
        bool looked_at = S::is(ALIBI) || S::is(DROPOUT) || !whole(tile);
        if (!looked_at || tile >= range.tiles()) return;
        int me = ptx::thread();
        if (me < S::BN) shared.index[tile % Shared::SLOTS * S::BN + me] = range.key(tile, me);
    }
    // A group of copies, empty beyond the last tile; of one tile after another.
    DEVICE void copy(int tile, int stage) {
        if (tile < range.tiles()) {
            T *k = shared.k + stage * Shared::K_SIZE, *v = shared.v + stage * Shared::V_SIZE;
            if (whole(tile)) {
                keys.copy(k);
                values.copy(v);
            } else {
                const int* index = shared.index + tile % Shared::SLOTS * S::BN;
                gather_rows<T, S::BE, S::BN, true>(k, x.k, x.p.k_row, x.p.head_dim, index);
                gather_rows<T, S::BEV, S::BN, true>(v, x.v, x.p.v_row, x.p.head_dim_v, index);
            }
        }
        ptx::commit_copies();
    }
    // The first TILES_AHEAD of them.
    DEVICE void start() {
        for (int tile = 0; tile <= TILES_AHEAD<S>; ++tile) index(tile);
        ptx::sync();
        for (int tile = 0; tile < TILES_AHEAD<S>; ++tile) copy(tile, tile);
    }
};

// d_q += ds K and u_k += u K over the range, and of each row rest += sum ds, total += sum u, of this thread's columns. After start(),
// and no other copies since.
template <class S, class Shared, int C>
DEVICE void sum_range(RangeTiles<S, Shared>& range, const RowOperands<S>& rows, const RowState<S>& state, bool in_two_parts,
                      float (&d_q)[C][4], float (&u_k)[C][4], float (&rest)[2], float (&total)[2]) {
    const Block<S>& x = range.x;
    const Shared& shared = range.shared;
    using T = typename S::T;
    constexpr int AHEAD = TILES_AHEAD<S>, SLOTS = Shared::SLOTS;
    float a[S::NT][4], dp[S::NT][4];
    Weights<T, S::NT> w, w_u, w_rest;
    int tiles = range.range.tiles();
    bool dropout = S::is(DROPOUT) && x.p.seed != nullptr;
    bool huge = ptx::sync_any(!(fabsf(state.at[0].m) < 1e4f && fabsf(state.at[1].m) < 1e4f));  // an m that would cost c its digits
    int stage = 0, next_stage = AHEAD;
    for (int tile = 0; tile < tiles; ++tile) {
        if constexpr (AHEAD == 0) range.copy(tile, 0);
        land_copies<S, AHEAD == 0 ? 0 : AHEAD - 1>();
        ptx::sync();
        const T *k = shared.k + stage * Shared::K_SIZE, *v = shared.v + stage * Shared::V_SIZE;
        const int* index = shared.index + tile % SLOTS * S::BN;
        open_products<S>();
        multiply_left(a, rows.q, k);
        commit_products<S>();
        auto multiply_values = [&] {
            multiply_left(dp, rows.d_out, v);
            commit_products<S>();
        };
        if constexpr (!DEFERS<S>) multiply_values();
        if constexpr (AHEAD > 0) range.copy(tile + AHEAD, next_stage);
        range.index(tile + AHEAD + 1);
        bool whole = range.whole(tile), as_they_are = !S::is(ALIBI) && whole && !huge;
        if constexpr (DEFERS<S>) {
            land_products<S, 0>(a);
            open_products<S>();
            multiply_values();
        } else {
            land_products<S, 1>(a);
        }
        x.entmax.choose([&](auto chosen) {
            auto take = [&](auto weigh) {
#pragma unroll
                for (int n = 0; n < S::NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float p, u;
                        weigh(a[n][i], state.at[i / 2], p, u);
                        total[i / 2] += u;
                        a[n][i] = u;
                    }
            };
            if (as_they_are) {
                take([&](float y, const Point& at, float& p, float& u) { chosen.weigh_product(y, x.x_scale, at, p, u); });
            } else {
                if (whole) to_scores(a, x, index, true);
                else to_scores(a, x, index, false);
                take([&](float y, const Point& at, float& p, float& u) { chosen.weigh(y, at, p, u); });
            }
        });
        w_u.set(a);
        w_u.settle();
        open_products<S>();
        multiply_weights<typename S::KTile>(u_k, w_u, k, 0);
        commit_products<S>();
        land_products<S, 1>(dp);
        auto each = [&](auto gradient) {
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) dp[n][i] = gradient(n, i), rest[i / 2] += dp[n][i];
        };
        if (!S::is(DROPOUT) && whole) {
            each([&](int n, int i) { return a[n][i] * (dp[n][i] - state.delta[i / 2]); });
        } else {
            each([&](int n, int i) {
                float keep = dropout ? x.keep(i / 2, index[n * 8 + lane() % 4 * 2 + i % 2]) : 1.f, p = 0.f;
                return score_gradient<S::is(DROPOUT)>(dp[n][i], keep, state.delta[i / 2], a[n][i], p);
            });
        }
        if constexpr (DEFERS<S>) {
            ptx::settle(dp);
            land_products<S, 0>(u_k);
        }
        w.set(dp);
        w.settle();
        if (in_two_parts) {
            w_rest.set_rest(dp);
            w_rest.settle();
        }
        open_products<S>();
        multiply_weights<typename S::KTile>(d_q, w, k, 0);
        if (in_two_parts) multiply_weights<typename S::KTile>(d_q, w_rest, k, 0);
        commit_products<S>();
        if constexpr (!DEFERS<S>) land_products<S, 0>(d_q, u_k);
        if constexpr (AHEAD == 0) ptx::sync();
        stage = stage == S::STAGES - 1 ? 0 : stage + 1, next_stage = next_stage == S::STAGES - 1 ? 0 : next_stage + 1;
    }
    if constexpr (DEFERS<S>) land_products<S, 0>(d_q, u_k);
    ptx::sync();
}
