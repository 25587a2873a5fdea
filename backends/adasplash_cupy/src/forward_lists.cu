// Forward, second pass: exact tau, O and O2 of the blocks of rows whose lists are short.
//
// A long list is swept first: the keys found while T was still rising drop out, and T takes a Newton step. A list that fits is then
// solved with its scores on chip, or, where that is compiled in, with its keys and values on chip. A longer one is left to forward_dense,
// as is one that still holds most of the keys. The keys that some row really weighs are kept for the backward, as long as the pool has
// room.
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

inline constexpr int SWEEPS = 2;  // after which T is near tau in most rows

// Drops the keys below T, and raises T by a Newton step over the list, until it is at most `fits` long, or after the first time `most`, or
// this was done twice; returns its new length.
template <class S>
DEVICE int shrink(const Block<S>& x, const Tiles<S>& shared, int* list, int count, int fits, int most) {
    if (!x.entmax.starts_anywhere()) return count;  // nothing is below such a T
    const Params& p = x.p;
    float f[2], s[2], t[2], margin[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bool inside = x.row[r] < p.q_len;
        t[r] = inside ? p.t[x.row_at(r)] : 0.f;
        margin[r] = inside ? p.margin[x.row_at(r)] : 0.f;
    }
    Left<S, S::BE, true> q(shared.q);
    for (int sweep = 0; sweep < SWEEPS && count > (sweep == 0 ? fits : most); ++sweep) {
        // The sums are those at tau = T.
        float least[2];  // over T, of what stays
#pragma unroll
        for (int r = 0; r < 2; ++r) f[r] = s[r] = 0.f, least[r] = x.some(r) ? -margin[r] : INFINITE;
        int kept = 0;
        each_tile(x, shared, List<S::BN>{list, count}, false, [&](int tile, const auto* k, const auto*, const int* index, bool whole) {
            float a[S::NT][4];
            open_products<S>();
            multiply_left(a, q, k);
            close_products<S>(a);
            u32 bits = 0;
            bool product = !S::is(ALIBI) && whole;
            float factor = product ? x.x_scale : 1.f;
            if (!product) to_scores(a, x, index, whole);
            x.entmax.choose([&](auto chosen) {
#pragma unroll
                for (int n = 0; n < S::NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float over = fmaf(a[n][i], factor, -t[i / 2]), w, u;
                        if (over >= least[i / 2]) bits |= 1u << (2 * n + i % 2);
                        chosen.weigh_over(over, w, u);
                        f[i / 2] += w;
                        s[i / 2] += u;
                    }
            });
            int* flags = shared.flags + tile % 2 * S::BN;
            mark_columns<S::NT>(bits, flags);
            ptx::sync();
            if (warp() == 0) kept = append_flagged(list, kept, index, flags, S::BN);
        });
        count = from_first_warp(kept, shared.scratch);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            f[r] = row_sum(f[r]), s[r] = row_sum(s[r]);
            // Where c = 0 stands for T, whatever the reference.
            float next = x.entmax.newton(0.f, f[r], s[r]), rise = x.entmax.is(POWER) ? next : -next;
            if (f[r] > 1.f && f[r] < INFINITE) t[r] = fmaxf(t[r], t[r] + rise - margin[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (lane() % 4 == 0 && x.row[r] < p.q_len) p.t[x.row_at(r)] = t[r];
    return count;
}

// Longer lists that are solved here too: where there is room, their keys and values stay in shared memory, and each Newton step multiplies
// anew. A warpgroup does that in few instructions.
template <class S>
DEVICE constexpr int keys_held() {
    return S::WARPGROUP && S::STAGES > 3 ? S::STAGES * S::BN : 0;
}

// As many as the tiles in shared memory hold, unless the registers hold fewer.
template <class S>
DEVICE constexpr int keys_on_chip() {
    return S::STAGES > 1 && S::ALPHA != 0 ? 2 * S::BN : S::BN;
}

// A list of at most keys_on_chip keys: everything from one product. Returns how many are weighed.
template <class S>
DEVICE int on_chip(const Block<S>& x, const Tiles<S>& shared, int* list, int count) {
    using T = typename S::T;
    constexpr int BS = keys_on_chip<S>(), NT = BS / 8, TILES = BS / S::BN;
    // The scores take most of the registers, until a warpgroup's weights take their place, in half as many.
    constexpr int C = S::WARPGROUP ? value_columns<S>() / 8 : (S::BEV < 32 ? S::BEV : 32) / 8;
    using Tile = float (&)[S::NT][4];
    if (ptx::thread() < BS) shared.index[ptx::thread()] = ptx::thread() < count ? list[ptx::thread()] : -1;
    ptx::sync();
    for (int tile = 0; tile < TILES; ++tile) {
        T* k = shared.k + tile * Tiles<S>::K_SIZE;
        gather_rows<T, S::BE, S::BN, S::WARPGROUP>(k, x.k, x.p.k_row, x.p.head_dim, shared.index + tile * S::BN);
    }
    ptx::commit_copies();
    for (int tile = 0; tile < TILES; ++tile) {
        T* v = shared.v + tile * Tiles<S>::V_SIZE;
        gather_rows<T, S::BEV, S::BN, S::WARPGROUP>(v, x.v, x.p.v_row, x.p.head_dim_v, shared.index + tile * S::BN);
    }
    ptx::commit_copies();
    land_copies<S, 1>();
    ptx::sync();
    float a[NT][4];
    {
        Left<S, S::BE, S::WARPGROUP> q(shared.q);
        open_products<S>();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            multiply_left(reinterpret_cast<Tile>(a[tile * S::NT]), q, shared.k + tile * Tiles<S>::K_SIZE);
        close_products<S>(a);
    }
    to_scores(a, x, shared.index, false);
    float m[2] = {-INFINITE, -INFINITE}, c[2];
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) m[i / 2] = fmaxf(m[i / 2], a[n][i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        m[r] = row_max(m[r]);
        if (m[r] == -INFINITE) m[r] = 0.f;
        c[r] = x.entmax.first_c();
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[n][i] -= m[i / 2];
    Course course[2];
    float ahead = tolerance_ahead(x.p);
    for (int step = 0; step < MAX_STEPS; ++step) {
        Point at[2] = {x.entmax.point(0.f, c[0]), x.entmax.point(0.f, c[1])};
        float f[2] = {0.f, 0.f}, s[2] = {0.f, 0.f};
        x.entmax.choose([&](auto chosen) {
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float p, u;
                    chosen.weigh(a[n][i], at[i / 2], p, u);
                    f[i / 2] += p;
                    s[i / 2] += u;
                }
        });
        bool more = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            f[r] = row_sum(f[r]), s[r] = row_sum(s[r]);
            bool again = course[r].step(x.entmax, 0.f, c[r], f[r], s[r], static_cast<float>(count), x.p.tol, ahead);
            more = more || again;
        }
        if (ptx::ballot(more) == 0) break;
    }
    land_copies<S, 0>();
    ptx::sync();
    Point at[2] = {x.entmax.point(0.f, c[0]), x.entmax.point(0.f, c[1])};
    Sums<S> sums;
    u32 bits = 0;
    if constexpr (S::WARPGROUP) {
        OutputWeights<S, S::NT> weights[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            u32 found = weights[tile].set(x, reinterpret_cast<Tile>(a[tile * S::NT]), shared.index + tile * S::BN, at, true, true, sums);
            bits |= found << tile * 2 * S::NT;
        }
        sums.finish();
#pragma unroll 1
        for (int column = 0; column < S::BEV; column += 8 * C) {
            float o[C][4], o2[C][4];
            clear(o);
            clear(o2);
            open_products<S>();
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) weights[tile].multiply(shared.v + tile * Tiles<S>::V_SIZE, column, o, o2);
            close_products<S>(o, o2);
            store_output(x, shared.q, warp() * 16, sums, o, o2, column);
        }
    } else {
#pragma unroll 1
        for (int column = 0; column < S::BEV; column += 8 * C) {
            float o[C][4], o2[C][4];
            clear(o);
            clear(o2);
            at[0].c = ptx::renewed(at[0].c), at[1].c = ptx::renewed(at[1].c);
            u32 found = add_output(x, a, shared.v, column, shared.index, at, column == 0, column == 0, sums, o, o2);
            if (column == 0) {
                bits = found;
                sums.finish();
            }
            store_output(x, shared.q, warp() * 16, sums, o, o2, column);
        }
    }
    store_states(x, sums, m, c);
    mark_columns<NT>(bits, shared.flags);
    ptx::sync();
    return warp() == 0 ? append_flagged(list, 0, shared.index, shared.flags, BS) : 0;
}

// Leaves this program's block to forward_dense, which takes those that walk all keys first.
DEVICE void enqueue(const Params& p, int count) {
    if (count < 0) p.queue[ptx::fetch_add(p.counters + QUEUED_ALL, 1)] = ptx::block_x();
    else p.queue[static_cast<u64>(ptx::blocks_x()) - 1 - ptx::fetch_add(p.counters + QUEUED_LISTS, 1)] = ptx::block_x();
}

template <class S>
KERNEL(THREADS, programs<S>(keys_held<S>() > 0 ? 2 : 3))
forward_lists(PARAMS p) {
    using T = typename S::T;
    constexpr int FITS = keys_on_chip<S>(), HELD = keys_held<S>(), MOST = HELD > FITS ? HELD : FITS;
    auto [bh, block] = block_in_turn(p, ptx::block_x());
    int* entry = p.entries + (static_cast<i64>(bh) * p.q_blocks + block) * 2;
    int count = entry[1];
    if (count < 0) {
        if (ptx::thread() == 0) enqueue(p, count);
        return;
    }
    Tiles<S> shared(true);
    Block<S> x(p, bh, block);
    copy_rows<T, S::BE, ROWS, S::WARPGROUP>(shared.q, x.q(), p.q_row, p.head_dim, block * ROWS, p.q_len);
    ptx::commit_copies();
    for (int i = ptx::thread(); i < 2 * S::BN; i += THREADS) shared.flags[i] = 0;
    land_copies<S, 0>();
    x.find_rows(shared.scratch);  // syncs
    int* list = p.lists + entry[0];
    if (count > FITS) count = shrink(x, shared, list, count, FITS, MOST);
    if (count <= FITS) {
        keep_list(x, list, on_chip(x, shared, list, count), shared.scratch);
        count = FINISHED;
    } else if (count <= MOST) {
        Held<S::BN> keys{count};
        keys.take(x, shared, list);
        keep_list(x, list, solve_and_write(x, shared, keys, list), shared.scratch);
        count = FINISHED;
    } else {
        int limit = (x.end - x.low) / 100 * p.dense_percent;
        if (count > (limit > p.least_list ? limit : p.least_list)) count = EVERY_KEY;
    }
    if (ptx::thread() == 0) {
        entry[1] = count;
        if (count != FINISHED) enqueue(p, count);
    }
}
