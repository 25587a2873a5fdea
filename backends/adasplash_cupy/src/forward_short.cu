// Forward for short sequences: all scores of a block of 32 rows on chip, one launch.
//
//     x = Q K^T   ->   m, c by Newton over registers   ->   O = P V / sum p,  O2 = U V / sum u
//
// Two warps share 16 rows and take every other 64 keys, so that a causal mask's short rows keep both busy; S::BN keys are a warp's most.
// Tiles that no row of the block sees are neither loaded nor visited.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "blocks.cuh"
#include "tiles.cuh"
#include "evaluate.cuh"
#include "output.cuh"

inline constexpr int SHORT_ROWS = 32;
inline constexpr int SPAN = 64;         // keys of a warp in a row
inline constexpr int TILE = 2 * SPAN;  // keys in shared memory at a time

template <class S>
struct ShortTiles {
    using T = typename S::T;
    static constexpr int P = S::PK > S::PV ? S::PK : S::PV;
    T *q, *tiles;   // STAGES tiles of K, then of V
    float* sums;    // WARPS x 16 rows x 2
    int *index, *scratch;

    DEVICE ShortTiles() {
        u8* at = ptx::shared_memory();
        at = Tiles<S>::take(at, q, SHORT_ROWS * S::PK);
        at = Tiles<S>::take(at, tiles, S::STAGES * TILE * P);
        at = Tiles<S>::take(at, sums, WARPS * 16 * 2);
        at = Tiles<S>::take(at, index, 2 * S::BN);
        Tiles<S>::take(at, scratch, 32);
    }
    DEVICE static constexpr int bytes() {
        return (SHORT_ROWS * S::PK + S::STAGES * TILE * P) * static_cast<int>(sizeof(T)) + (WARPS * 32 + 2 * S::BN + 32) * 4;
    }
};

// Sums of this thread's two rows over the other warp's keys too, in the same order for both.
template <class S>
DEVICE void over_both_halves(const ShortTiles<S>& shared, const float (&mine)[2][2], float (&all)[2][2]) {
    int pair = warp() % 2, row = lane() / 4;
    if (lane() % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) shared.sums[(warp() * 16 + row + 8 * r) * 2 + i] = mine[r][i];
    }
    ptx::sync();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            all[r][i] = shared.sums[(pair * 16 + row + 8 * r) * 2 + i] + shared.sums[((pair + 2) * 16 + row + 8 * r) * 2 + i];
}

// tile(step, rows) for each tile, copied by gather(to, index); the next is under way meanwhile.
template <class S, class Gather, class Tile>
DEVICE void each_step(const ShortTiles<S>& shared, int steps, Gather&& gather, Tile&& tile) {
    constexpr int MOST = S::BN / SPAN, SIZE = TILE * ShortTiles<S>::P;
    if (S::STAGES > 1 && steps > 0) gather(shared.tiles, shared.index);
    ptx::commit_copies();
#pragma unroll
    for (int step = 0; step < MOST; ++step) {
        if (step < steps) {
            int next = S::STAGES > 1 ? step + 1 : step;
            if (next < steps) gather(shared.tiles + next % S::STAGES * SIZE, shared.index + next * TILE);
            ptx::commit_copies();
            if constexpr (S::STAGES > 1) ptx::wait_copies<1>();
            else ptx::wait_copies<0>();
            ptx::sync();
            tile(step, shared.tiles + step % S::STAGES * SIZE);
            ptx::sync();
        }
    }
    ptx::wait_copies<0>();
}

template <class S>
KERNEL(THREADS, programs<S>(2))
forward_short(PARAMS p) {
    using T = typename S::T;
    constexpr int STEPS = S::BN / SPAN, N = SPAN / 8;
    constexpr int C = (S::BN > 128 ? (S::BEV < 32 ? S::BEV : 32) : S::BEV) / 8;  // long rows of scores leave few registers for O
    int blocks = (p.q_len + SHORT_ROWS - 1) / SHORT_ROWS, half = warp() / 2, pair = warp() % 2;
    ShortTiles<S> shared;
    Block<S> x(p, ptx::block_x() / blocks, blocks - 1 - ptx::block_x() % blocks);
    copy_rows<T, S::BE, SHORT_ROWS>(shared.q, x.q(), p.q_row, p.head_dim, x.block * SHORT_ROWS, p.q_len);
    ptx::commit_copies();
    x.find_rows(shared.scratch, x.block * SHORT_ROWS + pair * 16);
    for (int i = ptx::thread(); i < 2 * S::BN; i += THREADS) {
        int key = x.low + i;
        shared.index[i] = key < x.end && (x.key_mask == nullptr || x.key_mask[key] != 0) ? key : -1;
    }
    ptx::wait_copies<0>();
    ptx::sync();
    int steps = (x.end - x.low + TILE - 1) / TILE;

    float a[STEPS][1][N][4];
    float m[2] = {-INFINITE, -INFINITE}, c[2];
    each_step(
        shared, steps,
        [&](T* to, const int* index) { gather_rows<T, S::BE, TILE>(to, x.k, p.k_row, p.head_dim, index); },
        [&](int step, const T* k) {
            int first = x.low + step * TILE + half * SPAN;
            bool whole = x.key_mask == nullptr && first >= x.lo_max && first + SPAN <= x.hi_min;
            clear(a[step][0]);
            multiply_rows<T, S::BE>(a[step], shared.q + pair * 16 * S::PK, k + half * SPAN * S::PK);
            to_scores(a[step][0], x, shared.index + step * TILE + half * SPAN, whole);
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) m[i / 2] = fmaxf(m[i / 2], a[step][0][n][i]);
        });
    // The larger of two maxima, exchanged as a sum would be.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        m[r] = row_max(m[r]);
        if (lane() % 4 == 0) shared.sums[(warp() * 16 + lane() / 4 + 8 * r) * 2] = m[r];
    }
    ptx::sync();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        m[r] = fmaxf(m[r], shared.sums[((pair + 2 * (1 - half)) * 16 + lane() / 4 + 8 * r) * 2]);
        if (m[r] == -INFINITE) m[r] = 0.f;
        c[r] = x.entmax.first_c();
    }
    ptx::sync();
    for (int turn = 0; turn < MAX_STEPS; ++turn) {
        Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
        float mine[2][2] = {{0.f, 0.f}, {0.f, 0.f}}, all[2][2];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step < steps) {
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float weight, u;
                        x.entmax.weigh(a[step][0][n][i], at[i / 2], weight, u);
                        mine[i / 2][0] += weight;
                        mine[i / 2][1] += u;
                    }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) mine[r][0] = row_sum(mine[r][0]), mine[r][1] = row_sum(mine[r][1]);
        over_both_halves(shared, mine, all);
        bool more = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            more = more || (x.some(r) && all[r][1] > 0.f && fabsf(all[r][0] - 1.f) > p.tol);
            c[r] = x.entmax.newton(c[r], all[r][0], all[r][1]);
        }
        if (!ptx::sync_any(more)) break;
    }

    Point at[2] = {x.entmax.point(m[0], c[0]), x.entmax.point(m[1], c[1])};
    Sums<S> sums;
#pragma unroll 1
    for (int column = 0; column < S::BEV; column += 8 * C) {
        float o[C][4], o2[C][4];
        clear(o);
        clear(o2);
        at[0].c = ptx::renewed(at[0].c), at[1].c = ptx::renewed(at[1].c);
        each_step(
            shared, steps,
            [&](T* to, const int* index) { gather_rows<T, S::BEV, TILE>(to, x.v, p.v_row, p.head_dim_v, index); },
            [&](int step, const T* v) {
                const int* index = shared.index + step * TILE + half * SPAN;
                add_output(x, a[step][0], v + half * SPAN * S::PV, column, index, at, column == 0, sums, o, o2);
            });
        if (column == 0) {
            sums.finish();
            float mine[2][2] = {{sums.p[0], sums.u[0]}, {sums.p[1], sums.u[1]}}, all[2][2];
            over_both_halves(shared, mine, all);
            ptx::sync();
            float counts[2][2] = {{static_cast<float>(sums.support[0]), 0.f}, {static_cast<float>(sums.support[1]), 0.f}}, both[2][2];
            over_both_halves(shared, counts, both);
#pragma unroll
            for (int r = 0; r < 2; ++r) sums.p[r] = all[r][0], sums.u[r] = all[r][1], sums.support[r] = static_cast<int>(both[r][0]);
            if (half == 0) store_states(x, sums, m, c);
        }
        // The second half's part goes through shared memory, where the tiles were.
        float* part = reinterpret_cast<float*>(shared.tiles) + pair * 32 * 8 * C + lane();
        ptx::sync();
        if (half == 1) {
#pragma unroll
            for (int n = 0; n < C; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) part[(n * 4 + i) * 32] = o[n][i], part[(4 * C + n * 4 + i) * 32] = o2[n][i];
        }
        ptx::sync();
        if (half == 0) {
#pragma unroll
            for (int n = 0; n < C; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) o[n][i] += part[(n * 4 + i) * 32], o2[n][i] += part[(4 * C + n * 4 + i) * 32];
            store_output(x, shared.q, sums, o, o2, column);
        }
        ptx::sync();
    }
}
