// forward_mark's shape, what lies in shared memory, and the warps that supply its warpgroups and turn their marks into lists.
#pragma once

// One instantiation: element type, padded head dim, groups of 128 queries, stages of keys, programs a multiprocessor, warpgroups a group,
// and see above.
template <class T_, int BE_, int GROUPS_, int STAGES_, int PROGRAMS_, int AHEAD_, int FOLLOW_, int SPLIT_, int SUBTRACT_>
struct Marking {
    using T = T_;
    static constexpr int BE = BE_, GROUPS = GROUPS_, STAGES = STAGES_, PROGRAMS = PROGRAMS_;
    static constexpr int SPLIT = SPLIT_, WARPGROUPS = GROUPS * SPLIT;
    static constexpr bool AHEAD = AHEAD_ != 0 && SPLIT == 1, TURNS = AHEAD && AHEAD_ == 2 && GROUPS > 1;
    static constexpr bool FOLLOW = FOLLOW_ != 0, SUBTRACT = SUBTRACT_ != 0;
    static constexpr int GROUP = 128, QUERIES = GROUP * GROUPS, KEYS = 128;  // queries a group and an item, keys a stage
    static constexpr int THREADS_ALL = 128 * (1 + WARPGROUPS);
    static constexpr int PANEL = 128 * 64;                                   // elements of 128 rows of 64 columns
    static constexpr int SIZE = 128 * BE;                                    // of a stage, or of a group's queries
    static constexpr int BUFFERS = BE <= 64 ? 2 : 1;                         // items whose queries are on chip
    static constexpr int BLOCKS = 2 * GROUPS;                                // lists an item
    static constexpr int LISTERS = 3;                                        // warps that write lists
    // setmaxnreg: what the supplying warpgroup leaves goes to the others.
    static constexpr int ENTRY = 65536 / (THREADS_ALL * PROGRAMS) / 8 * 8;
    static constexpr int FEW = WARPGROUPS == 1 ? 40 : WARPGROUPS <= 3 ? 56 : 64;
    static constexpr int SHARE = (ENTRY + (ENTRY - FEW) / WARPGROUPS) / 8 * 8, MANY = SHARE < 240 ? SHARE : 240;
    static constexpr int ONES = 3;  // their place in a row of `parts`
    static_assert(SPLIT <= 2 && GROUPS <= ONES, "a stage has two tiles, a row of `parts` places of three groups and of ones");
};

// An item, and the keys that its rows see: low <= key < end those of some row, lo_max <= key < hi_min those of all.
template <class S>
struct Item {
    int bh, block;                             // block: of QUERIES rows; bh is -1 after the last item
    int first, tiles;                          // stages of keys
    int finite;                                // a NaN or infinite key must reach every row that sees it: then no list may leave it out
    int low[S::BLOCKS], end[S::BLOCKS];        // of each block of 64 rows
    int lo_max[S::GROUPS], hi_min[S::GROUPS];
    float width;                               // the max minus the least possible tau
};

template <class S>
struct MarkTiles {
    using T = typename S::T;
    T *q, *k;               // BUFFERS x GROUPS x SIZE, STAGES x SIZE; multiples of 1024 bytes
    u32* parts;             // SUBTRACT: 128 rows of 64 bfloat16 as tiles lie; in columns 16 g ... a sum's terms: `start` of group g's query
    float *start, *below;   // BUFFERS x QUERIES: margin - T, -inf for rows that want nothing; width + what a max may be wrong by
    int *lo, *hi;           // BUFFERS x QUERIES
    int* top;               // QUERIES: the largest scale * s - T since T rose last, as the bits of a float that is not negative
    Item<S>* items;         // 2
    u64 *q_full, *q_empty, *k_full, *k_empty, *marks_full, *turns;

    DEVICE MarkTiles() {
        u8* at = ptx::shared_memory();
        at += (1024 - ptx::shared_address(at) % 1024) % 1024;
        at = take(at, q, S::BUFFERS * S::GROUPS * S::SIZE);
        at = take(at, k, S::STAGES * S::SIZE);
        at = take(at, parts, S::SUBTRACT ? 128 * 32 : 0);
        at = take(at, q_full, S::BUFFERS);
        at = take(at, q_empty, S::BUFFERS);
        at = take(at, k_full, S::STAGES);
        at = take(at, k_empty, S::STAGES);
        at = take(at, marks_full, 2);
        at = take(at, turns, S::GROUPS);
        at = take(at, start, S::BUFFERS * S::QUERIES);
        at = take(at, below, S::BUFFERS * S::QUERIES);
        at = take(at, lo, S::BUFFERS * S::QUERIES);
        at = take(at, hi, S::BUFFERS * S::QUERIES);
        at = take(at, top, S::QUERIES);
        take(at, items, 2);
    }
    DEVICE static constexpr int bytes() {
        return 1024 + (S::BUFFERS * S::GROUPS + S::STAGES) * S::SIZE * 2 + (S::SUBTRACT ? 128 * 128 : 0) + (2 * S::BUFFERS + 2 * S::STAGES + 2 + S::GROUPS) * 8 +
               (4 * S::BUFFERS + 1) * S::QUERIES * 4 + 2 * static_cast<int>(sizeof(Item<S>));
    }
    // Columns 16 `place` ... of a row of `parts`.
    DEVICE u32* part(int row, int place) const { return parts + row * 32 + ((2 * place) ^ row % 8) * 4; }
    template <class X>
    DEVICE static u8* take(u8* at, X*& piece, int count) {
        piece = reinterpret_cast<X*>(at);
        return at + count * sizeof(X);
    }
};

// A place in a ring of `SIZE`, and the parity of its phase.
template <int SIZE>
struct Place {
    int at = 0;
    u32 parity = 0;
    DEVICE void next() {
        if (++at == SIZE) at = 0, parity ^= 1;
    }
};

DEVICE int least(int a, int b) { return a < b ? a : b; }

// The copying warp meets the listing warps once an item's last keys are asked for and the lists of the item before are written, whose place
// in `items` is free then. A named barrier: racecheck reported the same order, kept by barriers in shared memory, as a race.
template <class S>
DEVICE void hand_back() {
    ptx::sync_apart(1 + S::GROUPS, 32 * (1 + S::LISTERS));
}

// -- the copying warp -----------------------------------------------------------------------------------------------------------

// What the rows of an item see and want, by all lanes.
template <class S>
DEVICE void look_up(const Params& p, const MarkTiles<S>& shared, Item<S>& item, int buffer) {
    Entmax<float, 0> entmax(p.alpha[item.bh % p.heads * p.alpha_head]);
    float width = !entmax.is(POWER) ? 1.f : entmax.h > 0.f ? entmax.inverse_h : INFINITE;
    int b = item.bh / p.heads, row = item.block * S::QUERIES;
    int low = OPEN, end = 0;
#pragma unroll 1
    for (int group = 0; group < S::GROUPS; ++group) {
        int bounds[6] = {OPEN, OPEN, OPEN, OPEN, OPEN, OPEN};  // low and -end of both blocks, -lo_max, hi_min
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < ROWS; i += 32) {
                int query = group * S::GROUP + half * ROWS + i + lane(), at = buffer * S::QUERIES + query;
                Interval seen = interval(p, b, row + query);
                bool some = seen.lo < seen.hi;
                float t = 0.f, margin = 0.f;
                if (some) {
                    i64 from = static_cast<i64>(item.bh) * p.q_len + row + query;
                    t = p.t[from], margin = p.margin[from];
                    bounds[2 * half] = least(bounds[2 * half], seen.lo), bounds[2 * half + 1] = least(bounds[2 * half + 1], -seen.hi);
                    bounds[4] = least(bounds[4], -seen.lo), bounds[5] = least(bounds[5], seen.hi);
                } else if (row + query < p.q_len) {
                    bounds[4] = -OPEN;
                }
                shared.start[at] = some ? margin - t : -INFINITE;
                shared.below[at] = width + 1.5f * margin;
                shared.lo[at] = seen.lo, shared.hi[at] = seen.hi;
            }
#pragma unroll
        for (int i = 0; i < 6; ++i) bounds[i] = ptx::warp_least(bounds[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool none = bounds[2 * half] == OPEN;
            if (!none) low = least(low, bounds[2 * half]), end = -least(-end, bounds[2 * half + 1]);
            if (lane() == 0) {
                item.low[2 * group + half] = none ? 0 : bounds[2 * half];
                item.end[2 * group + half] = none ? 0 : -bounds[2 * half + 1];
            }
        }
        if (lane() == 0) item.lo_max[group] = -bounds[4], item.hi_min[group] = bounds[5];
    }
    if (lane() == 0) {
        bool finite = ptx::float_of(p.key_max[b * (p.heads / p.group) + item.bh % p.heads / p.group]) < INFINITE;
        item.first = low / S::KEYS;
        item.tiles = finite && low < end ? (end + S::KEYS - 1) / S::KEYS - low / S::KEYS : 0;
        item.finite = finite;
        item.width = width;
    }
}

// The next item: its queries and what they want, then its keys as stages become free.
template <class S>
DEVICE void supply(const Params& p, const ptx::TensorMap& q_map, const ptx::TensorMap& k_map, const MarkTiles<S>& shared) {
    constexpr int BYTES = S::SIZE * 2;
    int blocks = (p.q_len + S::QUERIES - 1) / S::QUERIES, all = p.batch * p.heads;
    i64 items = static_cast<i64>(all) * blocks;
    Place<S::BUFFERS> q;
    Place<S::STAGES> k;
    Place<2> mark;
    for (bool first = true;; first = false) {
        u64 next = lane() == 0 ? ptx::fetch_add(p.counters + 2, 1) : 0;
        i64 at = static_cast<i64>(static_cast<u64>(ptx::shuffle(static_cast<u32>(next >> 32), 0)) << 32 | ptx::shuffle(static_cast<u32>(next), 0));
        bool last = at >= items;
        // In a few heads at a time, the longest rows of a causal mask first.
        int turn = static_cast<int>(at / (static_cast<i64>(p.heads_together) * blocks)) * p.heads_together;
        int heads = least(p.heads_together, all - turn), of_turn = static_cast<int>(at - static_cast<i64>(turn) * blocks);
        ptx::wait(shared.q_empty + q.at, q.parity ^ 1);
        Item<S>& item = shared.items[mark.at];
        if (lane() == 0) {
            item.bh = last ? -1 : turn + of_turn % heads;
            item.block = last ? 0 : blocks - 1 - of_turn / heads;
        }
        ptx::sync_warp();
        if (!last) look_up(p, shared, item, q.at);
        ptx::sync_warp();
        if (lane() == 0) {
            int tiles = last ? 0 : item.tiles;
            ptx::arrive_announcing(shared.q_full + q.at, tiles > 0 ? BYTES * S::GROUPS : 0);
            if (tiles > 0) {
                int head = item.bh % p.heads, b = item.bh / p.heads;
#pragma unroll 1
                for (int group = 0; group < S::GROUPS; ++group)
                    for (int column = 0; column < S::BE; column += 64)
                        ptx::copy_tile(shared.q + (q.at * S::GROUPS + group) * S::SIZE + column / 64 * S::PANEL, q_map, shared.q_full + q.at,
                                       column, item.block * S::QUERIES + group * S::GROUP, head, b);
#pragma unroll 1
                for (int tile = item.first; tiles > 0; ++tile, --tiles) {
                    ptx::wait(shared.k_empty + k.at, k.parity ^ 1);
                    ptx::arrive_announcing(shared.k_full + k.at, BYTES);
                    for (int column = 0; column < S::BE; column += 64)
                        ptx::copy_tile(shared.k + k.at * S::SIZE + column / 64 * S::PANEL, k_map, shared.k_full + k.at, column,
                                       tile * S::KEYS, head / p.group, b);
                    k.next();
                }
            }
        }
        ptx::sync_warp();
        if (!first) hand_back<S>();
        if (last) break;
        q.next();
        mark.next();
    }
}

// -- the listing warps ------------------------------------------------------------------------------------------------------------

// Bits 0, 4, 8, ... of x as the lowest eight.
DEVICE u32 every_fourth(u32 x) {
    x &= 0x11111111u;
    x = (x | x >> 3) & 0x03030303u;
    x = (x | x >> 6) & 0x000f000fu;
    return (x | x >> 12) & 0xffu;
}

// A warp: the list of one block of 64 rows. A word holds 16 keys' marks: bit 4 (key % 8) + 2 half + key / 8 % 2.
template <class S>
DEVICE void write_list(const Params& p, const Item<S>& item, const u32* words, int block) {
    i64 block_at = static_cast<i64>(item.bh) * p.q_blocks + item.block * S::BLOCKS + block;
    int low = item.low[block], end = item.end[block], half = block % 2;
    int from = low / 16, to = (end + 15) / 16, base = 0, count = -1;
    if (item.finite) {
        int marked = 0;
#pragma unroll 4
        for (int at = from + lane(); at < to; at += 32) marked += ptx::count_bits(words[at] & 0x33333333u << 2 * half);
        marked = warp_sum(marked);
        int limit = (end - low) / 100 * p.list_percent;
        if (marked <= (limit > p.least_list ? limit : p.least_list)) {
            if (lane() == 0) {
                u64 place = ptx::fetch_add(p.counters, static_cast<u64>(marked));
                base = place + static_cast<u64>(marked) <= static_cast<u64>(p.lists_size) ? static_cast<int>(place) : -1;
            }
            base = ptx::shuffle(base, 0);
            if (base >= 0) count = marked;
        }
    }
    if (lane() == 0) {
        p.entries[2 * block_at] = base;
        p.entries[2 * block_at + 1] = count;
    }
    int* list = p.lists + base;
    if (count <= 0) return;
    u32 ahead = from + lane() < to ? words[from + lane()] : 0;
    for (int first = from; first < to; first += 32) {
        int at = first + lane();
        u32 word = ahead >> 2 * half;
        ahead = at + 32 < to ? words[at + 32] : 0;
        u32 bits = every_fourth(word) | every_fourth(word >> 1) << 8;
        int mine = ptx::count_bits(bits), before = mine;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int other = ptx::shuffle(before, lane() >= i ? lane() - i : lane());
            if (lane() >= i) before += other;
        }
        int* place = list + before - mine;
        for (; bits != 0; bits &= bits - 1) *place++ = at * 16 + ptx::lowest_bit(bits);
        list += ptx::shuffle(before, 31);
    }
}

template <class S>
DEVICE void write_lists(const Params& p, const MarkTiles<S>& shared, const u32* hits) {
    for (Place<2> mark;; mark.next()) {
        ptx::wait(shared.marks_full + mark.at, mark.parity);
        const Item<S>& item = shared.items[mark.at];
        if (item.bh < 0) break;
        for (int block = warp() - 1; block < S::BLOCKS; block += S::LISTERS)
            if (item.block * S::BLOCKS + block < p.q_blocks)
                write_list(p, item, hits + static_cast<i64>(mark.at * S::GROUPS + block / 2) * p.hit_words, block);
        hand_back<S>();
    }
}
