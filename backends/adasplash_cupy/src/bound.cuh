// A lower bound of tau from a sample of the keys, and by how much a score may miss it.
#pragma once

inline constexpr int COARSE_STEPS = 4;
inline constexpr float FEW = 0.03f;  // of the keys: a block that is expected to mark no more takes no further step

// max x of this thread's two rows over keys.
template <class S, class Keys>
DEVICE void largest_score(const Block<S>& x, const Tiles<S>& shared, const Keys& keys, float (&m)[2]) {
    // Of tiles that all rows see, the largest product is the largest score as well, and is scaled once.
    bool products = !S::is(ALIBI) && x.x_scale > 0.f;
    float raw[2] = {-INFINITE, -INFINITE};
    m[0] = m[1] = -INFINITE;
    Left<S, S::BE, true> q(shared.q);
    each_tile(x, shared, keys, false, [&](int, const auto* k, const auto*, const int* index, bool whole) {
        float a[S::NT][4];
        open_products<S>();
        multiply_left(a, q, k);
        close_products<S>(a);
        auto rise = [&](float (&to)[2]) {
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i / 2] = fmaxf(to[i / 2], a[n][i]);
        };
        if (products && whole) {
            rise(raw);
        } else {
            to_scores(a, x, index, whole);
            rise(m);
        }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) m[r] = row_max(raw[r] > -INFINITE ? fmaxf(m[r], raw[r] * x.x_scale) : m[r]);
}

// Lower bounds of tau for this thread's two rows, in units of x. Returns whether most of the sample is above them: then a list of the
// keys above would save nothing.
template <class S>
DEVICE bool sampled_bound(const Block<S>& x, const Tiles<S>& shared, float (&t)[2]) {
    const Params& p = x.p;
    float f[2], s[2], m[2], c[2], above[2];
    // Where a key mask hides all of a row's sample, the max of nothing bounds nothing: then all keys are looked at.
#pragma unroll 1
    for (int step = p.sample;; step = 1) {
        largest_score(x, shared, Range<S::BN>(x, step, true), m);
        bool none = (x.some(0) && m[0] == -INFINITE) || (x.some(1) && m[1] == -INFINITE);
        if (x.key_mask == nullptr || step == 1 || !ptx::sync_any(none)) break;
    }
    bool some[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        some[r] = x.some(r) && m[r] > -INFINITE;
        if (!some[r]) m[r] = 0.f;
        c[r] = x.entmax.first_c();
    }
    // Steps are only taken where the sum over a subset of the keys exceeds 1, so c never passes the root. Those over a quarter of the
    // sample cost little and tell whether more pay: whether T can rise much, and a block marks many keys. Then the sample grows to four
    // times its size, a step at each.
    int stride = p.sample * 4;
    float share = 0.f;
    for (int step = 0, fine = 0;; ++step) {
        Range<S::BN> keys(x, stride, false);
        if (keys.tiles() == 0) break;
        Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
        evaluate<true, true>(x, shared, keys, at, f, s, above);
        float sums[3] = {0.f, 0.f, 0.f};  // of p, of entries above the bound, and of rows
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (some[r]) {
                if (f[r] > 1.f) c[r] = x.entmax.newton(c[r], f[r], s[r]);
                sums[0] += f[r], sums[1] += above[r], sums[2] += 1.f;
            }
        block_sums(sums, shared.scratch);
        float live = sums[2];
        bool worth = sums[0] > p.sample_worth * live;
        if (stride > p.sample) {
            share = sums[1] / (live * static_cast<float>(keys.tiles() * S::BN) + 1.f);
            worth = worth && share * static_cast<float>(ROWS) > FEW;
            bool dense = share * 100.f > static_cast<float>(p.list_percent);
            if (dense || (!worth && step == 0)) break;
            if (!worth || step + 1 == COARSE_STEPS) stride = p.sample;
        } else {
            if (!worth || stride * 4 <= p.sample || ++fine >= p.sample_steps) break;
            stride = (stride + 1) / 2;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) t[r] = x.entmax.threshold(m[r], c[r]);
    return share * 100.f > static_cast<float>(p.list_percent);
}

// By how much scores may differ between two ways of summing them, in units of x, for this thread's two rows. Each of two roundings lies
// within 2^-22 sum_d |q_d k_d| of the exact score, and that sum is at most E max|q| max|k|. `k_max` must be finite.
template <class S>
DEVICE void score_margin(const Block<S>& x, const Tiles<S>& shared, float k_max, float (&margin)[2]) {
    using Part = Chunk<typename S::T>;
    const Params& p = x.p;
    int longest = p.q_len > p.kv_len ? p.q_len : p.kv_len;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp() * 16 + lane() / 4 + 8 * r;
        float q_max = 0.f;
        for (int i = lane() % 4; i < S::BE / Part::SIZE; i += 4) {
            Part part = *reinterpret_cast<const Part*>(shared.q + S::QTile::at(row, i * Part::SIZE));
#pragma unroll
            for (int j = 0; j < Part::SIZE; ++j) q_max = fmaxf(q_max, fabsf(ptx::to_float(part.x[j])));
        }
        q_max = row_max(q_max);
        margin[r] = q_max * (k_max * fabsf(x.x_scale) * (static_cast<float>(p.head_dim) * 4.8e-7f)) + 1e-6f;
        margin[r] += fabsf(x.slope) * static_cast<float>(longest) * 2.4e-7f;
    }
}

// max |k| of the block's key head; inf if a key is not finite.
template <class S>
DEVICE float largest_key(const Block<S>& x) {
    return ptx::float_of(x.p.key_max[x.b * (x.p.heads / x.p.group) + x.head / x.p.group]);
}
