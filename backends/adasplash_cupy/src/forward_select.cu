// Forward, first pass: for each block of 64 query rows, a list of keys that holds every key with a weight.
//
//     T <- max over a sample of the keys - 1, raised by Newton steps over the sample while that pays: a lower bound of tau, whatever
//          the other keys are
//     L <- the keys that some row of the block wants above T
//
// The sample is the range's edges (the diagonal is one) and every `sample`-th tile between: in trained models the best keys are near
// the diagonal and at the start. A block whose list is too long, or finds the pool full, gets length -1 and is left to forward_dense.
//
// Marking is the one dense product of a sparse row. Keys lie on the M side of K Q^T, so that "some query wants this key" is a reduction
// along the thread's own axis; sums start at -T, so that it is one of sign bits. A program takes blocks until there are none left, and
// keeps the marks of the one at hand in a row of bits of its own.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "blocks.cuh"
#include "tiles.cuh"
#include "evaluate.cuh"
#include "bound.cuh"

// What of the 64 rows the marks need, a row a place.
struct Columns {
    float* start;  // -T / scale, -inf for rows that want nothing
    int *lo, *hi, *diag;
};

// A bit a key into `hits`, for the keys of `keys`; returns this thread's count of marks.
template <class S>
DEVICE int mark(const Block<S>& x, const Tiles<S>& shared, const Range<S::BN>& keys, const Columns& rows, u16* hits) {
    constexpr int M = S::BN / (16 * WARPS);
    float bias = x.slope / fmaxf(fabsf(x.x_scale), 1e-30f);
    int marked = 0;
    each_tile(x, shared, keys, false, [&](int tile, const auto* k, const auto*, const int* index, bool whole) {
        float a[M][ROWS / 8][4];
#pragma unroll
        for (int n = 0; n < ROWS / 8; ++n) {
            int column = n * 8 + lane() % 4 * 2;
            float first = rows.start[column], second = rows.start[column + 1];
#pragma unroll
            for (int m = 0; m < M; ++m) a[m][n][0] = a[m][n][2] = first, a[m][n][1] = a[m][n][3] = second;
        }
        multiply_rows<typename S::T, S::BE>(a, k + warp() * 16 * M * S::PK, shared.q);
        bool biased = S::is(ALIBI) && x.p.slopes != nullptr;
        u32 hit[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            u32 signs[2] = {~0u, ~0u};
            int key[2] = {index[(warp() * M + m) * 16 + lane() / 4], index[(warp() * M + m) * 16 + lane() / 4 + 8]};
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float over = a[m][n][i];
                    if (biased || !whole) {
                        int column = n * 8 + lane() % 4 * 2 + i % 2;
                        if (S::is(ALIBI) && biased) {
                            int distance = rows.diag[column] - key[i / 2];
                            over -= bias * static_cast<float>(distance < 0 ? -distance : distance);
                        }
                        if (key[i / 2] < rows.lo[column] || key[i / 2] >= rows.hi[column]) over = -1.f;
                    }
                    signs[i / 2] &= ptx::bits_of(over);
                }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                signs[r] &= ptx::shuffle_xor(signs[r], 1);
                signs[r] &= ptx::shuffle_xor(signs[r], 2);
            }
            hit[m] = (~signs[0] >> 31) | (~signs[1] >> 31) << 1;
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            // Lane l < 16 takes the bit of key l, which the lanes 4 (l % 8) ... hold.
            u32 bits = ptx::ballot((ptx::shuffle(hit[m], lane() % 8 * 4) >> (lane() / 8 & 1) & 1) != 0) & 0xffff;
            if (lane() == 0) {
                hits[keys.first(tile) / 16 + warp() * M + m] = static_cast<u16>(bits);
                marked += ptx::count_bits(bits);
            }
        }
    });
    return marked;
}

// Writes the marked keys of low .. end as an ascending list.
DEVICE void write_list(const u16* hits, int low, int end, int* list, int* scratch) {
    int written = 0;
    for (int first = low / 16; first < (end + 15) / 16; first += THREADS) {
        int at = first + ptx::thread();
        u32 bits = at < (end + 15) / 16 ? hits[at] : 0;
        int mine = ptx::count_bits(bits), before = mine;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int other = ptx::shuffle(before, lane() >= i ? lane() - i : lane());
            if (lane() >= i) before += other;
        }
        if (lane() == 31) scratch[warp()] = before;
        ptx::sync();
        int place = written + before - mine;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp()) place += scratch[w];
            written += scratch[w];
        }
        for (; bits != 0; bits &= bits - 1) list[place++] = at * 16 + ptx::lowest_bit(bits);
        ptx::sync();
    }
}

template <class S>
KERNEL(THREADS, programs<S>(3))
forward_select(PARAMS p) {
    using T = typename S::T;
    Tiles<S> shared(false);
    Columns columns;
    u8* at = reinterpret_cast<u8*>(shared.scratch + 32);
    at = Tiles<S>::take(at, columns.start, ROWS);
    at = Tiles<S>::take(at, columns.lo, ROWS);
    at = Tiles<S>::take(at, columns.hi, ROWS);
    Tiles<S>::take(at, columns.diag, ROWS);
    u16* hits = p.hits + static_cast<i64>(ptx::block_x()) * p.hit_words;
    i64 items = static_cast<i64>(p.batch) * p.heads * p.q_blocks;
    for (;;) {
        // Head by head, so that K stays in the L2 cache; in a head the longest rows of a causal mask first.
        if (ptx::thread() == 0) {
            u64 next = ptx::fetch_add(p.counters + SELECTED, 1);
            shared.scratch[16] = static_cast<int>(next), shared.scratch[17] = static_cast<int>(next >> 32);
        }
        ptx::sync();
        i64 item = static_cast<i64>(static_cast<u64>(static_cast<u32>(shared.scratch[17])) << 32 | static_cast<u32>(shared.scratch[16]));
        if (item >= items) break;
        Block<S> x(p, static_cast<int>(item / p.q_blocks), p.q_blocks - 1 - static_cast<int>(item % p.q_blocks));
        bool turned = x.x_scale < 0.f;
        x.x_scale = fabsf(x.x_scale);
        copy_rows<T, S::BE, ROWS>(shared.q, x.q(), p.q_row, p.head_dim, x.block * ROWS, p.q_len);
        ptx::commit_copies();
        ptx::wait_copies<0>();
        x.find_rows(shared.scratch);  // syncs
        if (turned) {
            for (int i = ptx::thread(); i < ROWS * S::BE; i += THREADS) {
                T& e = shared.q[i / S::BE * S::PK + i % S::BE];
                e = ptx::from_float<T>(-ptx::to_float(e));
            }
            ptx::sync();
        }
        float t[2];
        bool dense = sampled_bound(x, shared, t);

        float k_max = largest_key(x), margin[2];
        bool finite = k_max < INFINITE;
        score_margin(x, shared, finite ? k_max : 0.f, margin);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = warp() * 16 + lane() / 4 + 8 * r;
            if (lane() % 4 == 0) {
                float wanted = (t[r] - margin[r]) / fmaxf(x.x_scale, 1e-30f);
                columns.start[row] = x.some(r) ? -wanted : -INFINITE;
                columns.lo[row] = x.lo[r], columns.hi[row] = x.hi[r], columns.diag[row] = x.diag[r];
                if (x.row[r] < p.q_len) p.t[x.row_at(r)] = t[r], p.margin[x.row_at(r)] = margin[r];
            }
        }
        ptx::sync();
        // A NaN or infinite key must reach every row that sees it, so no list may leave it out.
        i64 base = 0;
        int count = -1;
        if (finite && !dense) {
            int marked = warp_sum(mark(x, shared, Range<S::BN>(x, 1, true), columns, hits));
            if (lane() == 0) shared.scratch[warp()] = marked;
            ptx::sync();
            marked = 0;
            for (int w = 0; w < WARPS; ++w) marked += shared.scratch[w];
            ptx::sync();
            int limit = (x.end - x.low) / 100 * p.list_percent;
            if (marked <= (limit > p.least_list ? limit : p.least_list)) {
                if (ptx::thread() == 0) {
                    u64 place = ptx::fetch_add(p.counters + LISTED, static_cast<u64>(marked));
                    bool room = place + static_cast<u64>(marked) <= static_cast<u64>(p.lists_size);
                    shared.scratch[8] = room ? static_cast<int>(place) : -1;
                }
                ptx::sync();
                base = shared.scratch[8];
                ptx::sync();
                if (base >= 0) {
                    count = marked;
                    write_list(hits, x.low, x.end, p.lists + base, shared.scratch);
                }
            }
        }
        if (ptx::thread() == 0) {
            p.entries[2 * x.block_at()] = static_cast<int>(base);
            p.entries[2 * x.block_at() + 1] = count;
        }
        ptx::sync();
    }
}
