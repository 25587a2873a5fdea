// A block of 64 query rows in the backward: what backward_rows does over all keys and backward_lists over a list.
#pragma once

// Tiles of K and V, and dO; where LISTED, the weights of a tile too.
template <class S, bool LISTED>
struct RowsTiles : Tiles<S> {
    using T = typename S::T;
    using Weighed = Layout<T, S::BN, ROWS, S::WARPGROUP>;  // a row a query
    static constexpr int PW = pitch<T>(S::BN), MORE = S::OTile::SIZE + (LISTED ? 2 * Weighed::SIZE : 0);
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
    template <class Shared>
    DEVICE explicit RowOperands(const Shared& shared) : q(shared.q), d_out(shared.d_out) {}
};

// Starts the copies of Q and dO, one group.
template <class S, class Shared>
DEVICE void copy_operands(const Block<S>& x, const Shared& shared) {
    using T = typename S::T;
    copy_rows<T, S::BE, ROWS, S::WARPGROUP>(shared.q, x.q(), x.p.q_row, x.p.head_dim, x.block * ROWS, x.p.q_len);
    copy_rows<T, S::BEV, ROWS, S::WARPGROUP>(shared.d_out, x.d_out(), x.p.d_out_row, x.p.head_dim_v, x.block * ROWS, x.p.q_len);
    ptx::commit_copies();
}

// This thread's two rows of a block.
template <class S>
struct RowState {
    using T = typename S::T;
    using Part = Chunk<T>;
    // A quad of lanes shares a row: each has every fourth chunk of it. Those of O2 are on their way while Q and dO are, where few.
    static constexpr int PARTS = S::BEV / Part::SIZE, OWN = (PARTS + 3) / 4, EARLY = OWN <= 4 ? OWN : 0;
    Point at[2];
    float delta[2];
    AlphaSums alpha[2];
    Part o2[2][EARLY > 0 ? EARLY : 1];
    float m[2], c[2];

    // After find_rows().
    DEVICE void load(const Block<S>& x) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            bool inside = x.row[r] < x.p.q_len;
            m[r] = inside ? x.p.m[x.row_at(r)] : 0.f, c[r] = inside ? x.p.c[x.row_at(r)] : 0.f;
#pragma unroll
            for (int i = 0; i < EARLY; ++i) o2[r][i] = part_of_o2(x, r, i);
        }
    }
    // Once Q and dO are there for all; a sync() must follow.
    template <class Shared>
    DEVICE void open(const Block<S>& x, const Shared& shared) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = 0.f;
#pragma unroll EARLY > 0 ? EARLY : 4
            for (int i = 0; i < OWN; ++i) {
                int column = (lane() % 4 + 4 * i) * Part::SIZE;
                if (column >= S::BEV) continue;
                Part of_o2 = EARLY > 0 ? o2[r][EARLY > 0 ? i : 0] : part_of_o2(x, r, i);
                Part* place = reinterpret_cast<Part*>(shared.d_out + S::OTile::at(warp() * 16 + lane() / 4 + 8 * r, column));
                Part d_out = *place;
#pragma unroll
                for (int j = 0; j < Part::SIZE; ++j) sum += ptx::to_float(d_out.x[j]) * ptx::to_float(of_o2.x[j]);
                // Rows that see no key get no gradient: masks are not applied to them where all other rows need none.
                if (!x.some(r)) *place = zeros();
            }
            if (!x.some(r)) sum = 0.f;
            delta[r] = row_sum(sum);
            at[r] = x.entmax.point(m[r], c[r]);
        }
        if constexpr (S::WARPGROUP) ptx::publish_stores();
    }

private:
    DEVICE static Part zeros() {
        Part part;
#pragma unroll
        for (int j = 0; j < Part::SIZE; ++j) part.x[j] = ptx::from_float<T>(0.f);
        return part;
    }
    DEVICE Part part_of_o2(const Block<S>& x, int r, int i) const {
        int column = (lane() % 4 + 4 * i) * Part::SIZE;
        if (x.row[r] >= x.p.q_len || column >= x.p.head_dim_v) return zeros();
        return *reinterpret_cast<const Part*>(static_cast<const T*>(x.p.o2) + x.row_at(r) * x.p.head_dim_v + column);
    }
};

// x and dp of a tile. Where every row sees every key, and no huge m costs c its digits, the products may be left to be weighed as they
// are: then true is returned.
template <class S>
DEVICE bool tile_products(const Block<S>& x, const RowOperands<S>& rows, const RowState<S>& state, const typename S::T* k,
                          const typename S::T* v, const int* index, bool whole, bool as_they_are, float (&a)[S::NT][4],
                          float (&dp)[S::NT][4]) {
    bool products = as_they_are && !S::is(ALIBI) && whole && fabsf(state.at[0].m) < 1e4f && fabsf(state.at[1].m) < 1e4f;
    open_products<S>();
    multiply_left(a, rows.q, k);
    if (!S::WARPGROUP && !products) to_scores(a, x, index, whole);
    multiply_left(dp, rows.d_out, v);
    close_products<S>(a, dp);
    if (S::WARPGROUP && !products) to_scores(a, x, index, whole);
    return products;
}

// a, dp -> p, ds in place; each(n, i, u, ds) for each entry. `products`: as tile_products() says.
template <class S, class Each>
DEVICE void tile_gradient(const Block<S>& x, const int* index, bool products, RowState<S>& state, float (&a)[S::NT][4],
                          float (&dp)[S::NT][4], Each&& each) {
    bool dropout = S::is(DROPOUT) && x.p.seed != nullptr, alpha = S::is(ALPHA_GRAD) && x.p.d_alpha != nullptr;
    x.entmax.choose([&](auto chosen) {
        auto take = [&](auto weigh) {
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int r = i / 2;
                    float keep = S::is(DROPOUT) && dropout ? x.keep(r, index[n * 8 + lane() % 4 * 2 + i % 2]) : 1.f, p, u;
                    weigh(a[n][i], state.at[r], p, u);
                    if (S::is(ALPHA_GRAD) && alpha) state.alpha[r].add(p, dp[n][i] * keep, x.entmax.h);
                    dp[n][i] = score_gradient<S::is(DROPOUT)>(dp[n][i], keep, state.delta[r], u, p);
                    a[n][i] = p;
                    each(n, i, u, dp[n][i]);
                }
        };
        if (products) take([&](float y, const Point& at, float& p, float& u) { chosen.weigh_product(y, x.x_scale, at, p, u); });
        else take([&](float y, const Point& at, float& p, float& u) { chosen.weigh(y, at, p, u); });
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

// dQ in the columns of a chunk.
template <class S, int C>
DEVICE void store_d_q(const Block<S>& x, const float (&d_q)[C][4], int column) {
    using T = typename S::T;
    const Params& p = x.p;
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

// delta, and the block's part of d alpha.
template <class S>
DEVICE void store_state(const Block<S>& x, const RowState<S>& state, int* scratch) {
    const Params& p = x.p;
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
        float* parts = reinterpret_cast<float*>(scratch);
        if (lane() == 0) parts[warp()] = d_alpha;
        ptx::sync();
        if (ptx::thread() == 0) p.d_alpha[x.block_at()] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
}
