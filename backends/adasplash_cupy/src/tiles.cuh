// Walking over keys a tile at a time, the copies of the next tiles under way while one is used.
//
// Which keys is told by an object with tiles() and key(tile, i), -1 for none, most() keys in all: a range, a sample of it, or a list. Their indices lie in
// shared memory as long as the tile does, so that masks and gathers treat all three alike; but where a range is DIRECT none are stored.
#pragma once

// The keys of a tile where their indices do not lie in shared memory: of a range, and of a list.
struct Span {
    int first;
    DEVICE int operator[](int i) const { return first + i; }
};
struct ListSpan {
    const int* list;
    int first, count;
    DEVICE int operator[](int i) const { return first + i < count ? list[first + i] : -1; }
};

// The tiles of BN keys that cover low .. end; between the edges, where all rows see all keys, only every step-th.
template <int BN, bool DIRECT_ = false>
struct Range {
    static constexpr bool ALL = true, HELD = false, DIRECT = DIRECT_;  // ALL: and not a list
    const u8* key_mask;
    int low, end, start, left_tiles, mid_start, mid_tiles, mid_end, right_tiles, step;

    template <class S>
    DEVICE Range(const Block<S>& x, int step_, bool edges) : key_mask(x.key_mask), low(x.low), end(x.end), step(step_) {
        int top = (end + BN - 1) / BN * BN;
        start = low / BN * BN;
        i64 first_whole = (static_cast<i64>(x.lo_max) + BN - 1) / BN * BN;
        mid_start = first_whole < start ? start : first_whole > top ? top : static_cast<int>(first_whole);
        mid_end = x.hi_min / BN * BN;
        mid_end = mid_end < mid_start ? mid_start : mid_end > top ? top : mid_end;
        left_tiles = edges ? (mid_start - start) / BN : 0;
        mid_tiles = ((mid_end - mid_start) / BN + step - 1) / step;
        right_tiles = edges ? (top - mid_end) / BN : 0;
        if (low >= end) left_tiles = mid_tiles = right_tiles = 0;
    }

    DEVICE int most() const { return end - low; }  // no more keys than this
    DEVICE int tiles() const { return left_tiles + mid_tiles + right_tiles; }
    DEVICE int first(int tile) const {
        if (tile < left_tiles) return start + tile * BN;
        tile -= left_tiles;
        return tile < mid_tiles ? mid_start + tile * step * BN : mid_end + (tile - mid_tiles) * BN;
    }
    DEVICE Span span(int tile) const { return {first(tile)}; }
    DEVICE int key(int tile, int i) const {
        int j = first(tile) + i;
        return j >= low && j < end && (key_mask == nullptr || key_mask[j] != 0) ? j : -1;
    }
    DEVICE float weight(int) const { return 1.f; }  // of what a tile adds to sums
};

// A range's edges, and of its middle so many tiles, each of which stands for those that are left out: an estimate of the whole range's sums.
template <int BN, bool DIRECT = false>
struct Estimate : Range<BN, DIRECT> {
    float share;

    template <class S>
    DEVICE Estimate(const Block<S>& x, int step) : Range<BN, DIRECT>(x, step, true) {
        share = static_cast<float>((this->mid_end - this->mid_start) / BN) / static_cast<float>(this->mid_tiles);
    }
    DEVICE float weight(int tile) const {
        return tile >= this->left_tiles && tile < this->left_tiles + this->mid_tiles ? share : 1.f;
    }
};

template <int BN>
struct List {
    static constexpr bool ALL = false, HELD = false, DIRECT = false;
    const int* list;
    int count;

    DEVICE int most() const { return count; }
    DEVICE int tiles() const { return (count + BN - 1) / BN; }
    DEVICE ListSpan span(int tile) const { return {list, tile * BN, count}; }
    DEVICE int key(int tile, int i) const { return span(tile)[i]; }
    DEVICE float weight(int) const { return 1.f; }
};

// A list short enough that the rows of K and V of all its tiles lie in shared memory at once: later walks copy nothing.
template <int BN>
struct Held {
    static constexpr bool ALL = false, HELD = true, DIRECT = false;
    int count;

    DEVICE int most() const { return count; }
    DEVICE int tiles() const { return (count + BN - 1) / BN; }
    DEVICE float weight(int) const { return 1.f; }

    // Starts the copies: those of V may go on as long as none is asked for.
    template <class S, class Shared>
    DEVICE void take(const Block<S>& x, const Shared& shared, const int* list) const {
        for (int i = ptx::thread(); i < tiles() * BN; i += THREADS) shared.index[i] = i < count ? list[i] : -1;
        ptx::sync();
        for (int tile = 0; tile < tiles(); ++tile)
            gather_rows<typename S::T, S::BE, BN, S::WARPGROUP>(shared.k + tile * Shared::K_SIZE, x.k, x.p.k_row, x.p.head_dim, shared.index + tile * BN);
        ptx::commit_copies();
        for (int tile = 0; tile < tiles(); ++tile) {
            const int* index = shared.index + tile * BN;
            gather_rows<typename S::T, S::BEV, BN, S::WARPGROUP>(shared.v + tile * Shared::V_SIZE, x.v, x.p.v_row, x.p.head_dim_v, index);
        }
        ptx::commit_copies();
    }
};

// Whether every row sees every key of a tile.
template <class S, class Index>
DEVICE bool seen_by_all(const Block<S>& x, const Index& index) {
    int first = index[0], last = index[S::BN - 1];
    return x.key_mask == nullptr && first >= x.lo_max && last >= 0 && last < x.hi_min;
}

// Shared memory of the passes over keys for a block of rows. Python's shared_bytes() knows the sizes too.
template <class S>
struct Tiles {
    using T = typename S::T;
    static constexpr int SLOTS = S::STAGES + 1;  // of indices
    static constexpr int K_SIZE = S::KTile::SIZE, V_SIZE = S::VTile::SIZE;
    static constexpr int ALIGNED = S::WARPGROUP ? 1024 : 16;  // bytes
    T *q, *k, *v, *more;  // more: of a pass's own
    int* index;       // SLOTS x BN
    int* flags;       // 2 BN: marks of a tile's columns
    int* scratch;     // 32

    DEVICE explicit Tiles(bool values, int more_elements = 0) {
        u8* at = ptx::shared_memory();
        if (S::WARPGROUP) at += (ALIGNED - ptx::shared_address(at) % ALIGNED) % ALIGNED;
        at = take(at, q, S::QTile::SIZE);
        at = take(at, k, S::STAGES * K_SIZE);
        at = take(at, v, values ? S::STAGES * V_SIZE : 0);
        at = take(at, more, more_elements);
        at = take(at, index, SLOTS * S::BN);
        at = take(at, flags, 2 * S::BN);
        take(at, scratch, 32);
    }
    DEVICE static constexpr int bytes(bool values, int more_elements = 0) {
        int elements = S::QTile::SIZE + S::STAGES * (K_SIZE + (values ? V_SIZE : 0)) + more_elements;
        return (S::WARPGROUP ? ALIGNED : 0) + elements * static_cast<int>(sizeof(T)) + ((SLOTS + 2) * S::BN + 32) * 4;
    }

    template <class X>
    DEVICE static u8* take(u8* at, X*& piece, int count) {
        piece = reinterpret_cast<X*>(at);
        return at + count * sizeof(X);
    }
};

// The rows of a tile whose indices are there; a group of copies, empty beyond the last tile.
template <class S, class Shared>
DEVICE void copy_tile(const Block<S>& x, const Shared& shared, int tile, int tiles, bool values) {
    if (tile < tiles) {
        const int* index = shared.index + tile % Shared::SLOTS * S::BN;
        int stage = tile % S::STAGES;
        gather_rows<typename S::T, S::BE, S::BN, S::WARPGROUP>(shared.k + stage * Shared::K_SIZE, x.k, x.p.k_row, x.p.head_dim, index);
        if (values)
            gather_rows<typename S::T, S::BEV, S::BN, S::WARPGROUP>(shared.v + stage * Shared::V_SIZE, x.v, x.p.v_row, x.p.head_dim_v, index);
    }
    ptx::commit_copies();
}

// Starts the copies of the first STAGES - 1 tiles, a group each: what else a pass must wait for comes between this and walk_tiles().
template <class S, class Shared, class Keys>
DEVICE void start_tiles(const Block<S>& x, const Shared& shared, const Keys& keys, bool values) {
    static_assert(S::BN <= THREADS, "a thread a key");
    int tiles = keys.tiles(), me = ptx::thread();
    if (me < S::BN)
        for (int tile = 0; tile < S::STAGES && tile < tiles; ++tile) shared.index[tile * S::BN + me] = keys.key(tile, me);
    ptx::sync();
    for (int tile = 0; tile < S::STAGES - 1; ++tile) copy_tile(x, shared, tile, tiles, values);
}

// body(tile, K rows, V rows, indices, whether every row sees every key of the tile); where MEANWHILE also what starts the next copies: to
// be called once, when the tile's products are under way. After start_tiles(), and no other copies since.
template <bool MEANWHILE = false, class S, class Shared, class Keys, class Body>
DEVICE void walk_tiles(const Block<S>& x, const Shared& shared, const Keys& keys, bool values, Body&& body) {
    constexpr int AHEAD = S::STAGES, SLOTS = Shared::SLOTS;
    int tiles = keys.tiles(), me = ptx::thread();
    for (int tile = 0; tile < tiles; ++tile) {
        if constexpr (S::STAGES == 1) {
            copy_tile(x, shared, tile, tiles, values);
            land_copies<S, 0>();
            ptx::sync();
        } else {
            land_copies<S, S::STAGES - 2>();
            ptx::sync();
            if constexpr (!MEANWHILE) copy_tile(x, shared, tile + AHEAD - 1, tiles, values);
        }
        // A tile earlier than its copies start: those wait for their indices.
        bool more = me < S::BN && tile + AHEAD < tiles;
        int ahead = more ? keys.key(tile + AHEAD, me) : -1;
        const int* index = shared.index + tile % SLOTS * S::BN;
        int stage = tile % S::STAGES;
        const typename S::T *k = shared.k + stage * Shared::K_SIZE, *v = shared.v + stage * Shared::V_SIZE;
        bool whole = seen_by_all(x, index);
        if constexpr (MEANWHILE) {
            body(tile, k, v, index, whole, [&] {
                if constexpr (S::STAGES > 1) copy_tile(x, shared, tile + AHEAD - 1, tiles, values);
            });
        } else {
            body(tile, k, v, index, whole);
        }
        if (more) shared.index[(tile + AHEAD) % SLOTS * S::BN + me] = ahead;
        if constexpr (S::STAGES == 1) ptx::sync();
    }
    ptx::sync();
}

// Rows of K of a tile of a direct range, if there is such a tile.
template <class S, class Keys>
DEVICE void copy_keys(const Block<S>& x, typename S::T* to, const Keys& keys, int tile) {
    if (tile < keys.tiles()) copy_rows<typename S::T, S::BE, S::BN, true>(to, x.k, x.p.k_row, x.p.head_dim, keys.first(tile), keys.end);
}

// The rows of a tile of a direct range; a group of copies, empty beyond the last tile. Hidden keys' rows of V are zeros, as a weight of zero does
// not undo NaN; their scores are not looked at.
template <class S, class Shared, class Keys>
DEVICE void copy_span(const Block<S>& x, const Shared& shared, const Keys& keys, int tile, int stage, bool values) {
    using T = typename S::T;
    copy_keys(x, shared.k + stage * Shared::K_SIZE, keys, tile);
    if (values && tile < keys.tiles()) {
        int first = keys.first(tile);
        T* v = shared.v + stage * Shared::V_SIZE;
        if (first >= keys.low && x.key_mask == nullptr) {
            copy_rows<T, S::BEV, S::BN, true>(v, x.v, x.p.v_row, x.p.head_dim_v, first, keys.end);
        } else {
            each_chunk<T, S::BEV, S::BN, true>([&](int r, int column) {
                int key = keys.key(tile, r);
                copy_chunk<true>(v + S::VTile::at(r, column), x.v, x.p.v_row, x.p.head_dim_v, key, column, key >= 0);
            });
        }
    }
    ptx::commit_copies();
}

// Which of the tiles in shared memory comes before or after one.
template <class S>
DEVICE int stage_before(int stage) {
    return stage == 0 ? S::STAGES - 1 : stage - 1;
}
template <class S>
DEVICE int stage_after(int stage) {
    return stage == S::STAGES - 1 ? 0 : stage + 1;
}

// As each_tile, of a direct range.
template <bool MEANWHILE, class S, class Shared, class Keys, class Body>
DEVICE void each_span(const Block<S>& x, const Shared& shared, const Keys& keys, bool values, Body&& body) {
    int tiles = keys.tiles(), stage = 0;
    for (int tile = 0; tile < S::STAGES - 1; ++tile) copy_span(x, shared, keys, tile, tile, values);
    for (int tile = 0; tile < tiles; ++tile, stage = stage_after<S>(stage)) {
        auto copy = [&] { copy_span(x, shared, keys, tile + S::STAGES - 1, stage_before<S>(stage), values); };
        if constexpr (S::STAGES == 1) copy();
        land_copies<S, S::STAGES == 1 ? 0 : S::STAGES - 2>();
        ptx::sync();
        if constexpr (S::STAGES > 1 && !MEANWHILE) copy();
        const typename S::T *k = shared.k + stage * Shared::K_SIZE, *v = shared.v + stage * Shared::V_SIZE;
        Span index = keys.span(tile);
        bool whole = seen_by_all(x, index);
        if constexpr (MEANWHILE && S::STAGES > 1) body(tile, k, v, index, whole, copy);
        else if constexpr (MEANWHILE) body(tile, k, v, index, whole, [] {});
        else body(tile, k, v, index, whole);
        if constexpr (S::STAGES == 1) ptx::sync();
    }
    ptx::sync();
}

template <bool MEANWHILE = false, class S, class Shared, class Keys, class Body>
DEVICE void each_tile(const Block<S>& x, const Shared& shared, const Keys& keys, bool values, Body&& body) {
    if constexpr (Keys::DIRECT) {
        each_span<MEANWHILE>(x, shared, keys, values, body);
    } else {
        start_tiles(x, shared, keys, values);
        walk_tiles<MEANWHILE>(x, shared, keys, values, body);
    }
}

template <bool MEANWHILE = false, class S, class Shared, class Body>
DEVICE void each_tile(const Block<S>& x, const Shared& shared, const Held<S::BN>& keys, bool values, Body&& body) {
    if (values) land_copies<S, 0>();
    else land_copies<S, 1>();
    ptx::sync();
    for (int tile = 0; tile < keys.tiles(); ++tile) {
        const int* index = shared.index + tile * S::BN;
        const typename S::T *k = shared.k + tile * Shared::K_SIZE, *v = shared.v + tile * Shared::V_SIZE;
        if constexpr (MEANWHILE) body(tile, k, v, index, seen_by_all(x, index), [] {});
        else body(tile, k, v, index, seen_by_all(x, index));
    }
}

// What a thread copies of tiles of K whose indices do not lie in shared memory. Those of a list are looked up a while before.
template <class S, class Keys>
struct KeyCopies {
    DEVICE void look_up(const Keys&, int) {}
    DEVICE void copy(const Block<S>& x, typename S::T* to, const Keys& keys, int tile) const { copy_keys(x, to, keys, tile); }
};
template <class S>
struct KeyCopies<S, List<S::BN>> {
    static constexpr int CHUNKS = S::BE * static_cast<int>(sizeof(typename S::T)) / 16, STEP = THREADS / CHUNKS, OWN = S::BN / STEP;
    int keys[OWN];

    DEVICE void look_up(const List<S::BN>& list, int tile) {
        ListSpan span = list.span(tile);
#pragma unroll
        for (int i = 0; i < OWN; ++i) keys[i] = span[ptx::thread() / CHUNKS + i * STEP];
    }
    DEVICE void copy(const Block<S>& x, typename S::T* to, const List<S::BN>& list, int tile) const {
        if (tile >= list.tiles()) return;
        int row = ptx::thread() / CHUNKS, column = ptx::thread() % CHUNKS * (S::BE / CHUNKS);
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            copy_chunk<true>(to + S::KTile::at(row + i * STEP, column), x.k, x.p.k_row, x.p.head_dim, keys[i], column, keys[i] >= 0);
    }
};

// Products to x, in place; -inf where a row does not see a key.
template <class S, int N, class Index>
DEVICE void to_scores(float (&s)[N][4], const Block<S>& x, const Index& index, bool whole) {
    bool biased = S::is(ALIBI) && x.p.slopes != nullptr;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= x.x_scale;
        if (biased || !whole) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int r = i / 2, key = index[n * 8 + lane() % 4 * 2 + i % 2];
                if (S::is(ALIBI) && biased) {
                    int distance = x.diag[r] - key;
                    s[n][i] -= x.slope * static_cast<float>(distance < 0 ? -distance : distance);
                }
                if (!whole && (key < x.lo[r] || key >= x.hi[r])) s[n][i] = -INFINITE;
            }
        }
    }
}

// The same of a direct range's tile, of which nobody has asked yet what a key mask hides.
template <class S, int N>
DEVICE void to_scores(float (&s)[N][4], const Block<S>& x, const Span& keys, bool whole) {
    to_scores<S, N, Span>(s, x, keys, whole);
    if (x.key_mask == nullptr) return;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int key = keys[n * 8 + lane() % 4 * 2 + e];
            bool hidden = x.key_mask[key >= x.low && key < x.end ? key : x.low] == 0;
            if (hidden) s[n][e] = s[n][2 + e] = -INFINITE;
        }
}

// Sets flags[column] where a thread has bit 2 n + e of its own column n * 8 + 2 (lane % 4) + e.
template <int N>
DEVICE void mark_columns(u32 bits, int* flags) {
    bits |= ptx::shuffle_xor(bits, 4);
    bits |= ptx::shuffle_xor(bits, 8);
    bits |= ptx::shuffle_xor(bits, 16);
    if (lane() < 4) {
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
            if ((bits >> i & 1) != 0) flags[i / 2 * 8 + lane() * 2 + i % 2] = 1;
    }
}

// By one warp: appends the flagged of `count` indices to list[kept ...] and clears their flags; returns the new length.
DEVICE int append_flagged(int* list, int kept, const int* index, int* flags, int count) {
    for (int i = 0; i < count; i += 32) {
        int at = i + lane();
        bool hit = at < count && flags[at] != 0 && index[at] >= 0;  // a row of NaN flags them all
        u32 hits = ptx::ballot(hit);
        if (hit) list[kept + ptx::count_bits(hits & ((1u << lane()) - 1))] = index[at];
        if (at < count) flags[at] = 0;
        kept += ptx::count_bits(hits);
    }
    return kept;
}
