// One look at keys: sum p and sum u of this thread's two rows for given states, or max x; and the solve, which looks until it has tau.
#pragma once

inline constexpr int MAX_STEPS = 40;  // Newton's steps converge quadratically, 12 were the most seen: this only ends loops

// Where SUMS, f and s, and where COUNT, in `top` the number of entries above the threshold; else, in `top`, the max.
template <bool SUMS, bool COUNT, class S, class Shared, class Keys>
DEVICE void evaluate(const Block<S>& x, const Shared& shared, const Keys& keys, const Point (&at)[2], float (&f)[2], float (&s)[2],
                     float (&top)[2]) {
    f[0] = f[1] = s[0] = s[1] = 0.f;
    top[0] = top[1] = SUMS ? 0.f : -INFINITE;
    bool small = fabsf(at[0].m) < 1e4f && fabsf(at[1].m) < 1e4f;
    Left<S, S::BE, true> q(shared.q);
    each_tile(x, shared, keys, false, [&](int, const auto* k, const auto*, const int* index, bool whole) {
        float a[S::NT][4];
        open_products<S>();
        multiply_left(a, q, k);
        close_products<S>(a);
        // Tiles that all rows see are weighed as the product left them: most of the time goes into these few instructions an entry.
        bool product = SUMS && !S::is(ALIBI) && whole && small;
        if (!product) to_scores(a, x, index, whole);
        if constexpr (SUMS) {
            x.entmax.choose([&](auto chosen) {
                auto add = [&](auto weigh) {
#pragma unroll
                    for (int n = 0; n < S::NT; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float p, u;
                            weigh(a[n][i], at[i / 2], p, u);
                            f[i / 2] += p;
                            s[i / 2] += u;
                            if (COUNT) top[i / 2] += u > 0.f ? 1.f : 0.f;
                        }
                };
                if (product) add([&](float y, const Point& of, float& p, float& u) { chosen.weigh_product(y, x.x_scale, of, p, u); });
                else add([&](float y, const Point& of, float& p, float& u) { chosen.weigh(y, of, p, u); });
            });
        } else {
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], a[n][i]);
        }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) f[r] = row_sum(f[r]), s[r] = row_sum(s[r]), top[r] = SUMS ? row_sum(top[r]) : row_max(top[r]);
}

// c to a residual |sum p - 1| of at most tol, after which one more step is taken. Any reference serves as m.
template <class S, class Shared, class Keys>
DEVICE void solve(const Block<S>& x, const Shared& shared, const Keys& keys, const float (&m)[2], float (&c)[2]) {
    for (int step = 0; step < MAX_STEPS; ++step) {
        Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
        float f[2], s[2], top[2];
        evaluate<true, false>(x, shared, keys, at, f, s, top);
        bool more = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            more = more || (x.some(r) && s[r] > 0.f && fabsf(f[r] - 1.f) > x.p.tol);
            c[r] = x.entmax.newton(c[r], f[r], s[r]);
        }
        if (!ptx::sync_any(more)) break;
    }
}
