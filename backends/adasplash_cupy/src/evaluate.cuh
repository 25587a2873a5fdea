// One look at keys: sum p and sum u of this thread's two rows for given states, or max x; and the solve, which looks until it has tau.
#pragma once

inline constexpr int MAX_STEPS = 40;  // Newton's steps converge quadratically, 12 were the most seen: this only ends loops

// A row's way to its threshold, and when it may end: where the last look found |sum p - 1| <= tol, after one more step; and for alpha = 1.5
// also where no further look is needed to know that it will be. There, f = sum a^2 falls with tau by 2 s, s = sum a, and s by n, the number
// of keys above tau. So after a step of d
//
//     f - 2 s d  <=  f_after  <=  f - 2 s d + n d^2,     n: at tau where d >= 0, else at most all keys that the row sees
//
// and since s is convex, n is at most (s_before - s) / rise where tau rose by `rise` to where it is.
struct Course {
    float c_before = 0.f, s_before = INFINITE;  // of the look before; at first such that they bound nothing

    // Takes the step from a look's f and s; returns whether another look is needed. `keys`: at least as many as the row sees. `ahead`: in place
    // of tol for what is not looked at.
    template <class E>
    DEVICE bool step(const E& entmax, float m, float& c, float f, float s, float keys, float tol, float ahead) {
        float next = entmax.newton(c, f, s), rise = c_before - c, d = c - next;
        bool more = s > 0.f && fabsf(f - 1.f) > tol;
        if (entmax.is(SQUARE)) {
            // Of a smaller rise rounding would tell: of c - m, or of the two sums. Above it, 1 % is more than that.
            if (d >= 0.f && rise > 1e-4f * fmaxf(1.f, fabsf(m))) keys = fminf(keys, 1.01f * (s_before - s) / rise);
            float least = f - 1.f - 2.f * s * d, off = fmaxf(fabsf(least), fabsf(least + keys * d * d));
            // The second bounds the sum of |error| over the normalised u, which the gradients are made of.
            more = more && !(2.f * off <= ahead && keys * off <= 2.f * ahead * s * s);
            c_before = c, s_before = s;
        }
        c = next;
        return more;
    }
};

// The tolerance where the sums after a step are known without a look. Statistics hold tau to the last bits: then every row is looked at.
DEVICE float tolerance_ahead(const Params& p) { return p.tau == nullptr ? p.tol : 0.f; }

// body(tile, scores' products, V rows, indices, whether every row sees every key): each_tile, and the products with Q. A warpgroup's need no
// instructions while they are under way: what starts the next copies comes then where MEANWHILE.
template <bool MEANWHILE, class S, class Shared, class Keys, class Rows, class Body>
DEVICE void each_product(const Block<S>& x, const Shared& shared, const Keys& keys, const Rows& q, bool values, Body&& body) {
    each_tile<MEANWHILE>(x, shared, keys, values, [&](int tile, const auto* k, const auto* v, const auto& index, bool whole, auto... meanwhile) {
        float a[S::NT][4];
        if constexpr (!S::WARPGROUP) (meanwhile(), ...);
        open_products<S>();
        multiply_left(a, q, k);
        commit_products<S>();
        if constexpr (S::WARPGROUP) (meanwhile(), ...);
        land_products<S, 0>(a);
        body(tile, a, v, index, whole);
    });
}

// The same of a list or a direct range, without values, in whose place the next tile's keys lie: of two tiles, the second is multiplied while
// body has the first.
template <class S, class Shared, class Keys, class Rows, class Body>
DEVICE void each_product_of_pairs(const Block<S>& x, const Shared& shared, const Keys& keys, const Rows& q, Body&& body) {
    static_assert(S::STAGES > 1 && Shared::K_SIZE == Shared::V_SIZE, "two tiles of keys a stage");
    int tiles = keys.tiles(), stage = 0;
    KeyCopies<S, Keys> copies[2];
    copies[0].look_up(keys, 0), copies[1].look_up(keys, 1);
    auto copy = [&](int tile, int to) {
        copies[0].copy(x, shared.k + to * Shared::K_SIZE, keys, tile);
        copies[1].copy(x, shared.v + to * Shared::K_SIZE, keys, tile + 1);
        ptx::commit_copies();
        copies[0].look_up(keys, tile + 2), copies[1].look_up(keys, tile + 3);
    };
    for (int i = 0; i < S::STAGES - 1; ++i) copy(2 * i, i);
    for (int tile = 0; tile < tiles; tile += 2, stage = stage_after<S>(stage)) {
        land_copies<S, S::STAGES - 2>();
        ptx::sync();
        const typename S::T *k = shared.k + stage * Shared::K_SIZE, *next = shared.v + stage * Shared::K_SIZE;
        bool both = tile + 1 < tiles;
        float a[2][S::NT][4];
        open_products<S>();
        multiply_left(a[0], q, k);
        commit_products<S>();
        multiply_left(a[1], q, both ? next : k);
        commit_products<S>();
        copy(tile + 2 * (S::STAGES - 1), stage_before<S>(stage));
        auto first = keys.span(tile), second = keys.span(tile + 1);
        bool first_whole = seen_by_all(x, first), second_whole = seen_by_all(x, second);
        land_products<S, 1>(a[0]);
        body(tile, a[0], k, first, first_whole);
        land_products<S, 0>(a[1]);
        if (both) body(tile + 1, a[1], next, second, second_whole);
    }
    ptx::sync();
}

// Where SUMS, f and s, and where COUNT, in `top` the number of entries above the threshold; else, in `top`, the max.
template <bool SUMS, bool COUNT, class S, class Shared, class Keys>
DEVICE void evaluate(const Block<S>& x, const Shared& shared, const Keys& keys, const Point (&at)[2], float (&f)[2], float (&s)[2],
                     float (&top)[2]) {
    f[0] = f[1] = s[0] = s[1] = 0.f;
    top[0] = top[1] = SUMS ? 0.f : -INFINITE;
    bool small = fabsf(at[0].m) < 1e4f && fabsf(at[1].m) < 1e4f;
    Left<S, S::BE, true> q(shared.q);
    auto add = [&](int tile, auto& a, const auto*, const auto& index, bool whole) {
        // Tiles that all rows see are weighed as the product left them: most of the time goes into these few instructions an entry.
        bool product = SUMS && !S::is(ALIBI) && whole && small;
        if (!product) to_scores(a, x, index, whole && !S::WARPGROUP);  // one question less
        if constexpr (SUMS) {
            float weight = keys.weight(tile);
            x.entmax.choose([&](auto chosen) {
                auto each = [&](auto weigh) {
#pragma unroll
                    for (int n = 0; n < S::NT; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float p, u;
                            weigh(a[n][i], at[i / 2], p, u);
                            f[i / 2] += weight * p;
                            s[i / 2] += weight * u;
                            if (COUNT) top[i / 2] += u > 0.f ? 1.f : 0.f;
                        }
                };
                if (product) each([&](float y, const Point& of, float& p, float& u) { chosen.weigh_product(y, x.x_scale, of, p, u); });
                else each([&](float y, const Point& of, float& p, float& u) { chosen.weigh(y, of, p, u); });
            });
        } else {
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], a[n][i]);
        }
    };
    if constexpr (S::PAIRS && !Keys::HELD) each_product_of_pairs(x, shared, keys, q, add);
    else each_product<true>(x, shared, keys, q, false, add);
#pragma unroll
    for (int r = 0; r < 2; ++r) f[r] = row_sum(f[r]), s[r] = row_sum(s[r]), top[r] = SUMS ? row_sum(top[r]) : row_max(top[r]);
}

// Sums over the block's rows of what each of their quads of lanes has. `scratch` was read by all before the last sync(), and must not be
// written before the next.
template <int N>
DEVICE void block_sums(float (&x)[N], int* scratch) {
    float* sums = reinterpret_cast<float*>(scratch);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        for (int i = 4; i < 32; i *= 2) x[k] += ptx::shuffle_xor(x[k], i);
        if (lane() == 0) sums[k * WARPS + warp()] = x[k];
    }
    ptx::sync();
#pragma unroll
    for (int k = 0; k < N; ++k) {
        x[k] = 0.f;
        for (int w = 0; w < WARPS; ++w) x[k] += sums[k * WARPS + w];
    }
}

// A guess of tau for rows that walk all keys: Newton's steps over an estimate of their sums, from c, which stands for a lower bound of tau, and
// no further down. In rows that are nearly uniform such a bound is far below tau, and each step over a part of the keys saves one over all.
// It bounds nothing. But it lies below the largest score of the part, (f - sqrt f) / s and (f - 1) / s being less than that is over tau:
// so the row's own sums are not empty there, and Newton's steps converge from either side.
inline constexpr int GUESS_STEP = 16, LEAST_STEP = 4, LEAST_GUESSED = 4, GUESS_STEPS = 6;  // so many of the middle's tiles at least
inline constexpr float GUESSED = 0.1f;                                   // the rows' mean of |f - 1| that is near enough

template <class S, class Shared>
DEVICE void guess(const Block<S>& x, const Shared& shared, const float (&m)[2], float (&c)[2]) {
    Range<S::BN> all(x, 1, false);
    int step = all.mid_tiles / LEAST_GUESSED < GUESS_STEP ? all.mid_tiles / LEAST_GUESSED : GUESS_STEP;
    if (x.entmax.is(POWER) || step < LEAST_STEP) return;
    Estimate<S::BN, S::WARPGROUP> keys(x, step);
    float bound[2] = {c[0], c[1]};
#pragma unroll 1
    for (int turn = 0; turn < GUESS_STEPS; ++turn) {
        Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
        float f[2], s[2], top[2], sums[2] = {0.f, 0.f};  // of |f - 1|, and how many
        evaluate<true, false>(x, shared, keys, at, f, s, top);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Where m is huge, c is too coarse for the above.
            if (!(s[r] > 0.f && fabsf(m[r]) < 1e3f)) continue;
            sums[0] += fminf(fabsf(f[r] - 1.f), 1e30f), sums[1] += 1.f;
            c[r] = fminf(bound[r], x.entmax.newton(c[r], f[r], s[r]));
        }
        block_sums(sums, shared.scratch);
        if (!(sums[0] > GUESSED * sums[1])) break;
    }
}

// c to a residual |sum p - 1| of at most tol, see Course. Any reference serves as m.
template <class S, class Shared, class Keys>
DEVICE void solve(const Block<S>& x, const Shared& shared, const Keys& keys, const float (&m)[2], float (&c)[2]) {
    Course course[2];
    float ahead = tolerance_ahead(x.p);
    for (int step = 0; step < MAX_STEPS; ++step) {
        Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
        float f[2], s[2], top[2];
        evaluate<true, false>(x, shared, keys, at, f, s, top);
        bool more = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int most = x.hi[r] - x.lo[r] < keys.most() ? x.hi[r] - x.lo[r] : keys.most();
            bool again = course[r].step(x.entmax, m[r], c[r], f[r], s[r], static_cast<float>(most), x.p.tol, ahead);
            more = more || (x.some(r) && again);
        }
        if (!ptx::sync_any(more)) break;
    }
}
