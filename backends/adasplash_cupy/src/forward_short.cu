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
    T *q, *tiles;  // STAGES tiles of K, then of V
    float* sums;   // 2 x WARPS x 16 rows x 2
    int *index, *scratch;

    DEVICE ShortTiles() {
        u8* at = ptx::shared_memory();
        at = Tiles<S>::take(at, q, SHORT_ROWS * S::PK);
        at = Tiles<S>::take(at, tiles, S::STAGES * TILE * P);
        at = Tiles<S>::take(at, sums, 2 * WARPS * 16 * 2);
        at = Tiles<S>::take(at, index, 2 * S::BN);
        Tiles<S>::take(at, scratch, 32);
    }
    DEVICE static constexpr int bytes() {
        return (SHORT_ROWS * S::PK + S::STAGES * TILE * P) * static_cast<int>(sizeof(T)) + (WARPS * 64 + 2 * S::BN + 32) * 4;
    }
};

// What both warps of a row know of it, in the same order for both. Two exchanges in turn take different places, so that one barrier
// each is enough.
template <class S>
struct Exchange {
    const ShortTiles<S>& shared;
    int place = 0;

    DEVICE void give(const float (&mine)[2][2]) {
        place ^= 1;
        if (lane() % 4 == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) *at(warp(), lane() / 4 + 8 * r) = {mine[r][0], mine[r][1]};
        }
        ptx::sync();
    }
    // Of the first and the second half of the keys, row 0 .. 31.
    DEVICE Two take(int half, int row) const { return *at(row / 16 + 2 * half, row % 16); }

    DEVICE void sum(const float (&mine)[2][2], float (&all)[2][2]) {
        give(mine);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = warp() % 2 * 16 + lane() / 4 + 8 * r;
            Two first = take(0, row), second = take(1, row);
            all[r][0] = first.x[0] + second.x[0], all[r][1] = first.x[1] + second.x[1];
        }
    }

private:
    DEVICE Two* at(int of_warp, int row) const { return reinterpret_cast<Two*>(shared.sums) + (place * WARPS + of_warp) * 16 + row; }
};

// The rows first .. first + TILE of keys, zeros where `index` is negative: they follow each other, so that no index need be multiplied.
template <class T, int D>
DEVICE void copy_keys(T* to, const T* from, i64 stride, int columns, int first, const int* index) {
    constexpr int STEP = 16 / sizeof(T), CHUNKS = D / STEP, AT_ONCE = THREADS / CHUNKS;
    int row = ptx::thread() / CHUNKS, column = ptx::thread() % CHUNKS * STEP;
    bool inside = column < columns;
    const T* at = from + (first + row) * stride + column;
    to += row * pitch<T>(D) + column;
#pragma unroll
    for (int i = 0; i < TILE; i += AT_ONCE) {
        bool there = inside && index[row + i] >= 0;
        ptx::copy_16(to + i * pitch<T>(D), there ? at : from, there);
        at += AT_ONCE * stride;
    }
}

// tile(step, rows) for each tile, copied by copy(step, to); the next is under way meanwhile. The first one's copy has begun.
template <class S, class Copy, class Tile>
DEVICE void each_step(const ShortTiles<S>& shared, int steps, Copy&& copy, Tile&& tile) {
    constexpr int MOST = S::BN / SPAN, SIZE = TILE * ShortTiles<S>::P;
#pragma unroll
    for (int step = 0; step < MOST; ++step) {
        if (step < steps) {
            if (S::STAGES == 1 && step > 0) copy(step, shared.tiles);
            ptx::wait_copies<0>();
            ptx::sync();
            if (S::STAGES > 1 && step + 1 < steps) copy(step + 1, shared.tiles + (step + 1) % S::STAGES * SIZE);
            tile(step, shared.tiles + step % S::STAGES * SIZE);
            if constexpr (S::STAGES == 1) ptx::sync();
        }
    }
}

// Half-precision scores to weights, in place: of 16 keys, p packed as the tensor cores take it where the first 8 were, then u.
template <class S, int N>
DEVICE void pack_weights(const Block<S>& x, float (&a)[N][4], const int* index, const Point (&at)[2], Sums<S>& sums) {
    using T = typename S::T;
    bool dropout = S::is(DROPOUT) && x.p.seed != nullptr, count = x.p.tau != nullptr;
    x.entmax.choose([&](auto chosen) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 packed[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float p[2], u[2];  // of two neighbours in row i % 2
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    int r = i % 2;
                    chosen.weigh(a[n + i / 2][2 * r + j], at[r], p[j], u[j]);
                    sums.p[r] += p[j];
                    sums.u[r] += u[j];
                    if (count) sums.support[r] += p[j] > 0.f;
                    if (S::is(DROPOUT) && dropout) {
                        float keep = x.keep(r, index[(n + i / 2) * 8 + lane() % 4 * 2 + j]);
                        p[j] *= keep;
                        u[j] *= keep;
                    }
                }
                packed[0][i] = ptx::pack<T>(p[0], p[1]), packed[1][i] = ptx::pack<T>(u[0], u[1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) a[n][i] = ptx::float_of(packed[0][i]), a[n + 1][i] = ptx::float_of(packed[1][i]);
        }
    });
}

template <class S>
KERNEL(THREADS, programs<S>(2))
forward_short(PARAMS p) {
    using T = typename S::T;
    constexpr int STEPS = S::BN / SPAN, N = SPAN / 8, C = S::BEV / 8;
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
    ptx::sync();
    int steps = (x.end - x.low + TILE - 1) / TILE;
    auto copy_k = [&](int step, T* to) {
        copy_keys<T, S::BE>(to, x.k, p.k_row, p.head_dim, x.low + step * TILE, shared.index + step * TILE);
        ptx::commit_copies();
    };
    auto copy_v = [&](int step, T* to) {
        copy_keys<T, S::BEV>(to, x.v, p.v_row, p.head_dim_v, x.low + step * TILE, shared.index + step * TILE);
        ptx::commit_copies();
    };

    float a[STEPS][1][N][4];
    float top[2][2] = {{-INFINITE, 0.f}, {-INFINITE, 0.f}}, m[2], c[2];
    if (steps > 0) copy_k(0, shared.tiles);
    each_step(shared, steps, copy_k, [&](int step, const T* k) {
        int first = x.low + step * TILE + half * SPAN;
        bool whole = x.key_mask == nullptr && first >= x.lo_max && first + SPAN <= x.hi_min;
        clear(a[step][0]);
        multiply_rows<T, S::BE>(a[step], shared.q + pair * 16 * S::PK, k + half * SPAN * S::PK);
        to_scores(a[step][0], x, shared.index + step * TILE + half * SPAN, whole);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) top[i / 2][0] = fmaxf(top[i / 2][0], a[step][0][n][i]);
    });
    ptx::wait_copies<0>();  // of Q, where no row sees a key
    Exchange<S> exchange{shared};
    top[0][0] = row_max(top[0][0]), top[1][0] = row_max(top[1][0]);
    exchange.give(top);
    if (steps > 0) copy_v(0, shared.tiles);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = pair * 16 + lane() / 4 + 8 * r;
        m[r] = fmaxf(exchange.take(0, row).x[0], exchange.take(1, row).x[0]);
        if (m[r] == -INFINITE) m[r] = 0.f;
        c[r] = x.entmax.first_c();
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        if (step < steps) {
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[step][0][n][i] -= m[i / 2];
        }
    // Every warp steps all 32 rows, a lane each, and so knows when they are solved: one barrier a turn is enough.
    Course course;
    float c_of_lane = x.entmax.first_c(), most = static_cast<float>(x.end - x.low), ahead = tolerance_ahead(p);
    for (int turn = 0; turn < MAX_STEPS; ++turn) {
        Point at[2] = {x.entmax.point(0.f, c[0]), x.entmax.point(0.f, c[1])};
        float mine[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
        x.entmax.choose([&](auto chosen) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (step < steps) {
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float weight, u;
                            chosen.weigh(a[step][0][n][i], at[i / 2], weight, u);
                            mine[i / 2][0] += weight;
                            mine[i / 2][1] += u;
                        }
                }
            }
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) mine[r][0] = row_sum(mine[r][0]), mine[r][1] = row_sum(mine[r][1]);
        exchange.give(mine);
        Two first = exchange.take(0, lane()), second = exchange.take(1, lane());
        float f = first.x[0] + second.x[0], s = first.x[1] + second.x[1];
        bool more = course.step(x.entmax, 0.f, c_of_lane, f, s, most, p.tol, ahead);
#pragma unroll
        for (int r = 0; r < 2; ++r) c[r] = ptx::shuffle(c_of_lane, pair * 16 + lane() / 4 + 8 * r);
        if (ptx::ballot(more) == 0) break;
    }

    Point at[2] = {x.entmax.point(0.f, c[0]), x.entmax.point(0.f, c[1])};
    Sums<S> sums;
    auto finish_sums = [&] {
        sums.finish();
        float mine[2][2] = {{sums.p[0], sums.u[0]}, {sums.p[1], sums.u[1]}}, all[2][2];
        float counts[2][2] = {{static_cast<float>(sums.support[0]), 0.f}, {static_cast<float>(sums.support[1]), 0.f}}, both[2][2];
        exchange.sum(mine, all);
        exchange.sum(counts, both);
#pragma unroll
        for (int r = 0; r < 2; ++r) sums.p[r] = all[r][0], sums.u[r] = all[r][1], sums.support[r] = static_cast<int>(both[r][0]);
        if (half == 0) store_states(x, sums, m, c);
    };
    constexpr bool PACKED = sizeof(T) == 2;
    if constexpr (PACKED) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            if (step < steps) pack_weights(x, a[step][0], shared.index + step * TILE + half * SPAN, at, sums);
        finish_sums();
    }
    float o[C][4], o2[C][4];
    clear(o);
    clear(o2);
    each_step(shared, steps, copy_v, [&](int step, const T* v) {
        v += half * SPAN * S::PV;
        if constexpr (PACKED) {
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 weights[2][4];
#pragma unroll
                for (int i = 0; i < 8; ++i) weights[i / 4][i % 4] = ptx::bits_of(a[step][0][n + i / 4][i % 4]);
                multiply_packed<S>(o, o2, weights[0], weights[1], v + n * 8 * S::PV, p.o2 != nullptr);
            }
        } else {
            add_output(x, a[step][0], v, 0, shared.index + step * TILE + half * SPAN, at, true, false, sums, o, o2);
        }
    });
    if constexpr (!PACKED) finish_sums();
    ptx::sync();  // the tiles are read
    // Each warp of a row finishes half of the columns. The other half of its sums goes through shared memory, where the tiles were.
    float* part = reinterpret_cast<float*>(shared.tiles) + pair * 32 * 8 * C + lane();
    float out[C / 2][4], out_2[C / 2][4];
#pragma unroll
    for (int n = 0; n < C / 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float* to = part + (half * C / 2 + n) * 2 * 4 * 32 + i * 32;
            to[0] = half == 0 ? o[n + C / 2][i] : o[n][i];
            to[4 * 32] = half == 0 ? o2[n + C / 2][i] : o2[n][i];
        }
    ptx::sync();
#pragma unroll
    for (int n = 0; n < C / 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* from = part + ((1 - half) * C / 2 + n) * 2 * 4 * 32 + i * 32;
            out[n][i] = (half == 0 ? o[n][i] : o[n + C / 2][i]) + from[0];
            out_2[n][i] = (half == 0 ? o2[n][i] : o2[n + C / 2][i]) + from[4 * 32];
        }
    store_output(x, shared.q, pair * 16, sums, out, out_2, half * 4 * C);
}
