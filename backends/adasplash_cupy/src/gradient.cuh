// The gradient of a score, and the terms of alpha's.
//
//     dp = dO V^T          delta = dO . O2,  O2 = U V / sum u          ds = u (dp - delta)
//
// in score units (AdaSplash, arXiv 2502.12082, App. A). A dropped entry is absent from O2, dp and the p of dV, and stays in u.
#pragma once

template <class S>
inline constexpr bool DEFERS = S::WARPGROUP && S::STAGES > 2;  // whether a tile's last products end beside the next one's first

// Copies of a matrix's rows to panels, N rows of D columns at a time, all of which are there: what does not change from one to the next
// is held.
template <class T, int D, int N>
struct InnerRows {
    static constexpr int CHUNK = 16 / sizeof(T), CHUNKS = D / CHUNK, STEP = THREADS / CHUNKS;
    using Tile = Layout<T, D, N, true>;
    const u8* at;  // this thread's first chunk of the next N rows
    u32 row_bytes;
    bool within;

    DEVICE InnerRows(const T* matrix, i64 stride, int columns, int first)
        : row_bytes(static_cast<u32>(stride * static_cast<int>(sizeof(T)))), within(column() < columns) {
        at = reinterpret_cast<const u8*>(matrix + (within ? column() : 0)) + static_cast<u64>(static_cast<u32>(first + row())) * row_bytes;
    }
    DEVICE void skip(int rows) { at += static_cast<u64>(static_cast<u32>(rows)) * row_bytes; }
    DEVICE void copy(T* to) {
        T* in_tile = to + Tile::at(row(), column());
#pragma unroll
        for (int r = 0; r < N / STEP; ++r, skip(STEP)) {
            // Eight rows on, chunks are swizzled alike.
            T* place = STEP % 8 == 0 ? in_tile + Tile::at(r * STEP, 0) : to + Tile::at(row() + r * STEP, column());
            ptx::copy_16(place, at, within);
        }
    }

private:
    DEVICE static int row() { return ptx::thread() / CHUNKS; }
    DEVICE static int column() { return ptx::thread() % CHUNKS * CHUNK; }
};

// ds of an entry from its u, p and dp = dO . V; p becomes what dV needs. `keep` counts where DROPS alone.
template <bool DROPS>
DEVICE float score_gradient(float dp, float keep, float delta, float u, float& p) {
    if (DROPS) p = p == 0.f ? 0.f : p * keep;
    // Not merely u * (...): beside a key that does not exist, whatever its memory holds, 0 must stay 0.
    return u == 0.f ? 0.f : u * ((DROPS ? dp * keep : dp) - delta);
}

// d alpha of a row, with L = ln p, g = (e^(-h L) - 1 + h L) / h^2 and S = sum u (Correia et al. 2019, without its cancellation at h = 0):
//
//     -(1/S) sum_j dp_j p_j [ (g_j - G) + h (L_j G - g_j E) ],   G = sum p g,  E = sum p L.
struct AlphaSums {
    float pg = 0.f, pl = 0.f, dp = 0.f, dpg = 0.f, dpl = 0.f, u = 0.f;

    DEVICE void add(float p, float d, float h) {
        if (!(p > 0.f)) {
            if (p != p) pg = p;
            return;
        }
        float l = logf(p), t = -h * l;
        // (e^t - 1 - t) / t^2: its series where the quotient cancels.
        float series = 0.5f + t * (1.f / 6 + t * (1.f / 24 + t * (1.f / 120 + t * (1.f / 720 + t * (1.f / 5040 + t * (1.f / 40320))))));
        float g = l * l * (t > 0.5f ? (expf(t) - 1.f - t) / (t * t) : series);
        pg += p * g, pl += p * l, dp += d * p, dpg += d * p * g, dpl += d * p * l, u += p * expf(t);
    }
    DEVICE float total(float h) const {
        float g = row_sum(pg), l = row_sum(pl), d = row_sum(dp), dg = row_sum(dpg), dl = row_sum(dpl), s = row_sum(u);
        return -(dg - d * g + h * (dl * g - dg * l)) / (s > 0.f ? s : 1.f);
    }
};
