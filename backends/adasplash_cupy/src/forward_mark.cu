// Forward, second pass on Hopper: the lists of forward_select from the bounds of forward_bound, by products of whole warpgroups.
//
// A program takes items of 128 query rows a group until there are none left. Its first warpgroup only supplies the others: one warp
// copies Q, and K a stage of 128 keys at a time, and looks up what the rows see; three turn the marks of the item before into lists.
// Each other warpgroup multiplies all keys with its own 128 queries, keys on the M side: 64 keys at a time, so that "some query
// of this block wants this key" is an AND of sign bits of the thread's own registers. Where AHEAD, a second product is under way
// meanwhile; where TURNS, groups start theirs in turn, each when the one before has one left, so that the tensor cores never run dry.
// Where FOLLOW, T rises with the running max of the scores, at stages that double. Where SPLIT is 2, two warpgroups share a group's
// queries, and each takes one of a stage's two tiles: twice the warps to hide latencies behind, with half the sums each.
//
// "Is scale * s - T negative?" is asked of one fused multiply-add, in one rounding. Where SUBTRACT, of the tensor cores' sums: one more
// step adds -T / |scale|, as the sum of three bfloat16 in place of a query's columns, to the products of K and sign(scale) Q.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "hopper.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "marking.cuh"

// -- the multiplying warpgroups ------------------------------------------------------------------------------------------------------

// A descriptor that is the same in all lanes, as what the compiler does not compute anew for each product.
DEVICE u64 held(u64 descriptor) {
    u32 low = ptx::shuffle(static_cast<u32>(descriptor), 0);
    return (descriptor & ~0xffffffffull) | low;
}

// 64 keys by the group's 128 queries, as one group of products. Descriptors, which count in 16 bytes, of both, and of `parts` where
// SUBTRACT.
template <class S>
DEVICE void multiply_group(float (&sums)[16][4], u64 k, u64 q, u64 parts, int group) {
    ptx::open_products();
#pragma unroll
    for (int column = 0; column < S::BE; column += 16) {
        int to = column / 64 * S::PANEL / 8 + column % 64 / 8;
        if (column == 0)
            ptx::multiply_tiles<typename S::T, false, false, false>(sums, k + to, q + to);
        else
            ptx::multiply_tiles<typename S::T, true, false, false>(sums, k + to, q + to);
    }
    if (S::SUBTRACT) ptx::multiply_tiles<bf16_t, true, false, false>(sums, parts + 2 * S::ONES, parts + 2 * group);
    ptx::commit_products();
}

// A thread's queries 8 n + 2 (lane % 4) + e of its group, n < 16, e < 2, at [2 n + e].
template <bool SUBTRACT>
struct Wanted {
    float start[32];
    int top[32];
    float factor;

    DEVICE void load(const float* from) {
        if constexpr (!SUBTRACT) {
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                Two two = *reinterpret_cast<const Two*>(from + n * 8 + lane() % 4 * 2);
                start[2 * n] = two.x[0], start[2 * n + 1] = two.x[1];
            }
        }
    }
    DEVICE void forget() {
#pragma unroll
        for (int i = 0; i < 32; ++i) top[i] = -1;
    }
};

struct Seen {
    const int *lo, *hi;
    const u8* key_mask;
    int kv_len;
};

// -- thresholds that the tensor cores subtract ---------------------------------------------------------------------------------------

// By what share of T a sum with T in it may be wrong: four terms, cut off at 2^-23 of the largest, and T / |scale| rounded.
DEVICE float cut_off() { return 9.5367432e-7f; }  // 2^-20

// A query's `start` in units of s as three bfloat16, in which 24 bits fit, in the group's columns of its row. `start` grows by what a sum
// may lack.
template <class S>
DEVICE void write_parts(const MarkTiles<S>& shared, int group, int query, float start, float factor) {
    constexpr float MOST = 3e38f;  // no infinity, whose parts would have NaN as their sum: of rows that want nothing, or a scale of 0
    float inverse = 1.f / fabsf(factor), x = start + fabsf(start) * cut_off(), parts[3];
    x = x >= 0.f ? fminf(x * inverse, MOST) : fmaxf(x * inverse, -MOST);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        parts[i] = ptx::to_float(ptx::from_float<bf16_t>(x));
        x -= parts[i];
    }
    u32* row = shared.part(query, group);
    row[0] = ptx::pack<bf16_t>(parts[0], parts[1]), row[1] = ptx::pack<bf16_t>(parts[2], 0.f);
}

// At the start of an item.
template <class S>
DEVICE void subtract(const MarkTiles<S>& shared, int group, typename S::T* queries, const float* start, float factor) {
    int thread = (ptx::thread() - 128) % (128 * S::SPLIT);
    if (factor < 0.f) {
        u32* words = reinterpret_cast<u32*>(queries);
        for (int i = thread; i < S::SIZE / 2; i += 128 * S::SPLIT) words[i] ^= 0x80008000u;
    }
    ptx::sync_some(1 + group, 128 * S::SPLIT);  // the products of the item before are done
    if (thread < 128) write_parts<S>(shared, group, thread, start[thread], factor);
    ptx::publish_stores();
    ptx::sync_some(1 + group, 128 * S::SPLIT);
}

// -- marks -----------------------------------------------------------------------------------------------------------------------------

// This thread's two of a warp's 16 keys, `key` ...; -1 in place of one that no query sees.
DEVICE void find_keys(int key, const Seen& seen, int (&keys)[2]) {
    // Not held in a register by the tiles that all queries see.
    int own_row = static_cast<int>(ptx::bits_of(ptx::renewed(ptx::float_of(static_cast<u32>(ptx::thread()))))) % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        keys[r] = key + own_row + 8 * r;
        if (seen.key_mask != nullptr && (keys[r] >= seen.kv_len || seen.key_mask[keys[r]] == 0)) keys[r] = -1;
    }
}

// Sums of queries and keys that they do not see become negative.
DEVICE void hide(float (&sums)[16][4], int key, const Seen& seen) {
    int keys[2];
    find_keys(key, seen, keys);
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int query = n * 8 + lane() % 4 * 2 + e, lo = seen.lo[query], hi = seen.hi[query];
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (keys[r] < lo || keys[r] >= hi) sums[n][2 * r + e] = -1.f;
        }
}

// Which of this warp's 16 keys, `key` ..., this thread's queries do not want: the highest bits of four bytes, of both halves of the
// queries, and in each of keys lane / 4 and 8 later.
template <bool FOLLOW, bool WHOLE, bool SUBTRACT>
DEVICE u32 judge(const float (&sums)[16][4], Wanted<SUBTRACT>& wanted, int key, const Seen& seen) {
    u32 signs[2][2] = {{~0u, ~0u}, {~0u, ~0u}};
    int keys[2];
    if (!WHOLE) find_keys(key, seen, keys);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        u32 over[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x = SUBTRACT ? sums[n][i] : fmaf(sums[n][i], wanted.factor, wanted.start[2 * n + i % 2]);
            if (!WHOLE) {
                int query = n * 8 + lane() % 4 * 2 + i % 2;
                if (keys[i / 2] < seen.lo[query] || keys[i / 2] >= seen.hi[query]) x = -1.f;
            }
            over[i] = ptx::bits_of(x);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) signs[n / 8][r] &= over[2 * r] & over[2 * r + 1];
        if (FOLLOW) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
                wanted.top[2 * n + e] = ptx::largest(wanted.top[2 * n + e], static_cast<int>(over[e]), static_cast<int>(over[2 + e]));
        }
    }
    return ptx::high_bytes(signs[0][0], signs[0][1], signs[1][0], signs[1][1]);
}

// What the four lanes of the same keys agree on.
DEVICE u32 agreed(u32 bytes) {
    bytes &= ptx::shuffle_xor(bytes, 1);
    return bytes & ptx::shuffle_xor(bytes, 2);
}
// A word of marks, see write_list, from bit `bit` of the bytes that lanes agreed on.
DEVICE u32 marks_of(u32 bytes, u32 bit) { return ptx::ballot((bytes & bit << 8 * (lane() % 4)) == 0); }

// Largest of the lanes with the same lane % 4, of 32 values each: 4 remain, those at FIRST + 4 (lane / 4) of the lane. Halves go back and forth.
DEVICE void gather_tops(int (&top)[32], int (&found)[4]) {
    int half[16], quarter[8];
    bool upper = (lane() & 16) != 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        int other = ptx::shuffle_xor(upper ? top[i] : top[i + 16], 16), own = upper ? top[i + 16] : top[i];
        half[i] = own > other ? own : other;
    }
    upper = (lane() & 8) != 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int other = ptx::shuffle_xor(upper ? half[i] : half[i + 8], 8), own = upper ? half[i + 8] : half[i];
        quarter[i] = own > other ? own : other;
    }
    upper = (lane() & 4) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int other = ptx::shuffle_xor(upper ? quarter[i] : quarter[i + 4], 4), own = upper ? quarter[i + 4] : quarter[i];
        found[i] = own > other ? own : other;
    }
}

// T rises to the max of the scores seen, minus the width and a margin: the bound of any subset of the keys.
template <class S>
DEVICE void raise(Wanted<S::SUBTRACT>& wanted, const MarkTiles<S>& shared, int group, float* start, const float* below) {
    int found[4], *top = shared.top + group * S::GROUP;
    gather_tops(wanted.top, found);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int at = lane() / 4 * 4 + i;
        ptx::maximise_shared(top + at / 2 * 8 + lane() % 4 * 2 + at % 2, found[i]);
    }
    ptx::sync_some(1 + group, 128 * S::SPLIT);
    int query = (ptx::thread() - 128) % (128 * S::SPLIT);
    if (query < 128) {
        float over = ptx::float_of(static_cast<u32>(top[query])), old = start[query];
        if (S::SUBTRACT) over = over * fabsf(wanted.factor) * (1.f - cut_off()) - 2.f * cut_off() * fabsf(old);
        if (over > below[query] && over < INFINITE) {
            start[query] = old - (over - below[query]);
            if constexpr (S::SUBTRACT) write_parts<S>(shared, group, query, start[query], wanted.factor);
        }
        top[query] = -1;
    }
    if (S::SUBTRACT) ptx::publish_stores();
    ptx::sync_some(1 + group, 128 * S::SPLIT);
    wanted.load(start);
    wanted.forget();
}

template <class S>
DEVICE void mark(const Params& p, const MarkTiles<S>& shared, u32* hits) {
    using T = typename S::T;
    int warpgroup = ptx::shuffle(ptx::thread() / 128 - 1, 0), group = warpgroup / S::SPLIT, part = warpgroup % S::SPLIT;
    int warp_of_group = ptx::shuffle(warp() % 4, 0);
    Place<S::BUFFERS> q;
    Place<S::STAGES> k;
    Place<2> buffer;
    u32 turn = 0;
    Wanted<S::SUBTRACT> wanted;
    float a[16][4], b[S::AHEAD ? 16 : 1][4];
    u64 tiles = held(ptx::rows_of_128_bytes(shared.k)), parts = held(ptx::rows_of_128_bytes(shared.parts));
    for (;;) {
        ptx::wait(shared.q_full + q.at, q.parity);
        const Item<S>& item = shared.items[buffer.at];
        int bh = ptx::shuffle(item.bh, 0);
        if (bh < 0) break;
        float* start = shared.start + q.at * S::QUERIES + group * S::GROUP;
        const float* below = shared.below + q.at * S::QUERIES + group * S::GROUP;
        const u8* key_mask = p.key_mask == nullptr ? nullptr : p.key_mask + bh / p.heads * p.key_mask_batch;
        Seen seen{shared.lo + q.at * S::QUERIES + group * S::GROUP, shared.hi + q.at * S::QUERIES + group * S::GROUP, key_mask,
                  p.kv_len};
        Entmax<float, 0> entmax(p.alpha[bh % p.heads * p.alpha_head]);
        wanted.factor = p.scale * entmax.unit();
        wanted.load(start);
        wanted.forget();
        T* queries = shared.q + (q.at * S::GROUPS + group) * S::SIZE;
        u64 of_queries = held(ptx::rows_of_128_bytes(queries));
        if constexpr (S::SUBTRACT) subtract(shared, group, queries, start, wanted.factor);
        // Of the item's stages, those that this group sees.
        int low = item.low[2 * group], end = item.end[2 * group];
        if (low >= end || (item.low[2 * group + 1] < item.end[2 * group + 1] && item.low[2 * group + 1] < low)) low = item.low[2 * group + 1];
        end = -least(-end, -item.end[2 * group + 1]);
        int tile = ptx::shuffle(item.first, 0), last = ptx::shuffle(tile + item.tiles, 0);
        low = ptx::shuffle(low, 0), end = ptx::shuffle(end, 0);
        int until = low < end && tile < last ? (end + S::KEYS - 1) / S::KEYS : tile;
        int whole_from = ptx::shuffle(key_mask == nullptr ? item.lo_max[group] : OPEN, 0), whole_to = ptx::shuffle(item.hi_min[group], 0);
        u32* words = hits + static_cast<i64>(buffer.at * S::GROUPS + group) * p.hit_words + warp_of_group;
        auto pass = [&](Place<S::STAGES>& stage) {
            ptx::sync_warp();
            if (lane() == 0) ptx::arrive(shared.k_empty + stage.at);
        };
        // The first group starts; then each may when the one before it has had its turn.
        auto await_turn = [&] {
            if constexpr (S::TURNS) {
                ptx::wait(shared.turns + group, turn ^ (group == 0 ? 1u : 0u));
                turn ^= 1;
            }
        };
        auto end_turn = [&] {
            if constexpr (S::TURNS) {
                ptx::sync_warp();
                if (lane() == 0) ptx::arrive(shared.turns + (group + 1 == S::GROUPS ? 0 : group + 1));
            }
        };
        auto skip = [&](int to) {
            for (; tile < to; ++tile) {
                await_turn();
                end_turn();
                ptx::wait(shared.k_full + k.at, k.parity);
                pass(k);
                k.next();
            }
        };
        auto multiply = [&](float (&sums)[16][4], int half) {
            multiply_group<S>(sums, tiles + (k.at * (S::SIZE / 8) + half * (64 * 64 / 8)), of_queries, parts, group);
        };
        auto look = [&](float (&sums)[16][4], int half) {
            int first = tile * S::KEYS + half * 64, key = first + warp_of_group * 16;
            if (first < whole_from || first + 64 > whole_to) {
                if (!S::SUBTRACT) return judge<S::FOLLOW, false>(sums, wanted, key, seen);
                hide(sums, key, seen);
            }
            return judge<S::FOLLOW, true>(sums, wanted, key, seen);
        };
        // The words of a tile, and of both tiles of a stage: lanes shuffle once, and two of them store.
        auto note = [&](u32 bytes, int half) {
            u32 word = marks_of(agreed(bytes), 0x80);
            if (lane() == 0) words[tile * 8 + half * 4] = word;
        };
        auto note_both = [&](u32 first, u32 second) {
            u32 bytes = agreed((first & 0x80808080u) | (second >> 1 & 0x7f7f7f7fu)), one = marks_of(bytes, 0x80), other = marks_of(bytes, 0x40);
            if (lane() < 2) words[tile * 8 + lane() * 4] = lane() == 0 ? one : other;
        };
        if (tile < until) skip(low / S::KEYS);
        int raise_after = tile + 2, run = 2;
        auto follow = [&]() {
            if (S::FOLLOW && tile + 1 == raise_after) {
                raise(wanted, shared, group, start, below);
                raise_after += run, run *= 2;
            }
        };
        bool some = tile < until;
        if constexpr (S::AHEAD) {
            for (; tile < until; ++tile) {
                ptx::wait(shared.k_full + k.at, k.parity);
                await_turn();
                multiply(a, 0);
                multiply(b, 1);
                ptx::wait_products<1>();
                ptx::settle(a);
                end_turn();
                u32 first = look(a, 0);
                ptx::wait_products<0>();
                ptx::settle(b);
                pass(k);
                k.next();
                note_both(first, look(b, 1));
                follow();
            }
        } else if constexpr (S::SPLIT == 2) {
            for (; tile < until; ++tile) {
                ptx::wait(shared.k_full + k.at, k.parity);
                multiply(a, part);
                ptx::wait_products<0>();
                ptx::settle(a);
                pass(k);
                k.next();
                note(look(a, part), part);
                follow();
            }
        } else {
            for (; tile < until; ++tile) {
                ptx::wait(shared.k_full + k.at, k.parity);
                multiply(a, 0);
                ptx::wait_products<0>();
                ptx::settle(a);
                u32 first = look(a, 0);
                multiply(a, 1);
                ptx::wait_products<0>();
                ptx::settle(a);
                pass(k);
                k.next();
                note_both(first, look(a, 1));
                follow();
            }
        }
        skip(last);
        if (S::FOLLOW && some) {
            raise(wanted, shared, group, start, below);
            int query = ptx::thread() % 128, row = item.block * S::QUERIES + group * S::GROUP + query;
            if (part == 0 && row < p.q_len && start[query] > -INFINITE) {
                i64 at = static_cast<i64>(bh) * p.q_len + row;
                p.t[at] = fmaxf(p.t[at], p.margin[at] - start[query]);
            }
        }
        ptx::sync_warp();
        if (lane() == 0) {
            ptx::arrive(shared.q_empty + q.at);
            ptx::arrive(shared.marks_full + buffer.at);
        }
        q.next();
        buffer.next();
    }
    if (lane() == 0) ptx::arrive(shared.marks_full + buffer.at);
}

template <class S>
KERNEL(S::THREADS_ALL, S::PROGRAMS)
forward_mark(PARAMS p, TENSOR_MAP q_map, TENSOR_MAP k_map) {
    MarkTiles<S> shared;
    if (ptx::thread() == 0) {
        ptx::prefetch(q_map);
        ptx::prefetch(k_map);
        for (int i = 0; i < S::BUFFERS; ++i) ptx::open_barrier(shared.q_full + i, 1), ptx::open_barrier(shared.q_empty + i, 4 * S::WARPGROUPS);
        for (int i = 0; i < S::STAGES; ++i) ptx::open_barrier(shared.k_full + i, 1), ptx::open_barrier(shared.k_empty + i, 4 * S::WARPGROUPS);
        for (int i = 0; i < 2; ++i) ptx::open_barrier(shared.marks_full + i, 4 * S::WARPGROUPS);
        for (int i = 0; i < S::GROUPS; ++i) ptx::open_barrier(shared.turns + i, 4);
        ptx::publish_barriers();
    }
    for (int query = ptx::thread(); query < S::QUERIES; query += S::THREADS_ALL) shared.top[query] = -1;
    if (S::SUBTRACT) {
        for (int row = ptx::thread(); row < 128; row += S::THREADS_ALL) {
            for (int i = 0; i < 32; ++i) shared.parts[row * 32 + i] = 0;  // what meets zeros must be finite
            u32* ones = shared.part(row, S::ONES);
            ones[0] = 0x3f803f80u, ones[1] = 0x3f80u;
        }
        ptx::publish_stores();
    }
    ptx::sync();
    u32* hits = reinterpret_cast<u32*>(p.hits) + static_cast<i64>(ptx::block_x()) * 2 * S::GROUPS * p.hit_words;
    if (ptx::thread() < 128) {
        ptx::leave_registers<S::FEW>();
        if (warp() == 0)
            supply(p, q_map, k_map, shared);
        else
            write_lists(p, shared, hits);
    } else {
        ptx::take_registers<S::MANY>();
        mark(p, shared, hits);
    }
}
