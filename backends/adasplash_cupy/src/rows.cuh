// A block of 64 query rows of one head: who it is, which keys its rows see, where its tiles lie in shared memory.
#pragma once

// What may be compiled in; each is used only where the parameters ask for it too.
enum Flags { GRAD = 1, ALIBI = 2, DROPOUT = 4, ALPHA_GRAD = 8 };

inline constexpr int OPEN = 1 << 30;  // no bound

// What a block of rows has in place of a list's length.
enum Entry { EVERY_KEY = -1, FINISHED = -2 };

// One instantiation: element type, padded head dims, what is known of alpha, keys a tile, tiles in flight, Flags, whether the four warps
// of a block multiply together, as a warpgroup (sm_90a), programs a multiprocessor that registers must allow (0: the pass knows), and whether
// a warpgroup looks at two tiles at once.
template <class T_, int BE_, int BEV_, int ALPHA_, int BN_, int STAGES_, int FLAGS_, int WARPGROUP_ = 0, int PROGRAMS_ = 0,
          int PAIRS_ = 0>
struct Shape {
    using T = T_;
    static constexpr int BE = BE_, BEV = BEV_, ALPHA = ALPHA_, BN = BN_, STAGES = STAGES_, FLAGS = FLAGS_,
                         PROGRAMS = PROGRAMS_;
    static constexpr int PK = pitch<T>(BE), PV = pitch<T>(BEV);  // of rows of Q and K, and of V and dO
    static constexpr int NT = BN / 8;                            // tiles of 8 keys
    static constexpr bool WARPGROUP = WARPGROUP_ != 0, PAIRS = PAIRS_ != 0;
    static_assert(!WARPGROUP || (BE >= 32 && BEV >= 32 && sizeof(T) == 2), "panels of 64 columns of 16 bits, the only one half empty");
    using QTile = Layout<T, BE, ROWS, WARPGROUP>;                // of Q, dO, K and V in shared memory
    using OTile = Layout<T, BEV, ROWS, WARPGROUP>;
    using KTile = Layout<T, BE, BN, WARPGROUP>;
    using VTile = Layout<T, BEV, BN, WARPGROUP>;
    DEVICE static constexpr bool is(Flags flag) { return (FLAGS & flag) != 0; }
};

// Programs a multiprocessor that registers must allow: `plain` where a program needs few, else as many as may be.
template <class S>
DEVICE constexpr int programs(int plain) {
    if (S::PROGRAMS != 0) return S::PROGRAMS;
    bool few = sizeof(typename S::T) == 2 && S::BE <= 64 && S::BEV <= 64 && S::ALPHA != 0 && (S::FLAGS & ~GRAD) == 0;
    return !few ? 1 : plain < ptx::MOST_PROGRAMS ? plain : ptx::MOST_PROGRAMS;
}

// The at-th block of rows of those that programs take: of so many heads in turn that their keys and values stay in the L2 cache, the blocks
// that see most under a causal mask first, so that no long one is left for the end.
struct BlockOfRows {
    int bh, block;
};
DEVICE BlockOfRows block_in_turn(const Params& p, int at) {
    int first = at / (p.heads_in_turn * p.q_blocks) * p.heads_in_turn, left = p.batch * p.heads - first;
    int heads = p.heads_in_turn < left ? p.heads_in_turn : left;
    at -= first * p.q_blocks;
    // One number, of which both follow: where registers are scarce, those are computed anew.
    int place = ptx::renewed((first + at % heads) * p.q_blocks + p.q_blocks - 1 - at / heads);
    return {place / p.q_blocks, place % p.q_blocks};
}

// Visible keys lo <= j < hi of a row and its diagonal; rows past the end are empty.
struct Interval {
    int lo, hi, diag;
};
DEVICE Interval interval(const Params& p, int b, int row) {
    if (row >= p.q_len) return {0, 0, 0};
    if (p.lo != nullptr) {
        i64 at = b * p.mask_batch + row;
        return {p.lo[at], p.hi[at], p.diag[at]};
    }
    int diag = row + p.shift, lo = diag - p.left, hi = diag + p.right + 1;
    return {lo > 0 ? lo : 0, hi < p.kv_len ? hi : p.kv_len, diag};
}

template <class S>
struct Block {
    using T = typename S::T;
    const Params& p;
    Entmax<T, S::ALPHA> entmax;
    int bh, b, head, block;      // bh = b * heads + head
    float x_scale, slope;        // score -> x
    int row[2], lo[2], hi[2], diag[2];  // this thread's two rows
    int low, end, lo_max, hi_min;       // keys that some row sees, and that all do; lo_max is OPEN if a row sees none
    const T *k, *v;
    const u8* key_mask;
    u64 seed;

    DEVICE Block(const Params& p_, int bh_, int block_)
        : p(p_), entmax(p_.alpha[bh_ % p_.heads * p_.alpha_head]), bh(bh_), b(bh_ / p_.heads), head(bh_ % p_.heads), block(block_) {
        x_scale = p.scale * entmax.unit();
        slope = 0.f;
        if (S::is(ALIBI) && p.slopes != nullptr) slope = p.slopes[b * p.slopes_batch + head] * entmax.unit();
        k = static_cast<const T*>(p.k) + b * p.k_batch + head / p.group * p.k_head;
        v = static_cast<const T*>(p.v) + b * p.v_batch + head / p.group * p.v_head;
        seed = S::is(DROPOUT) && p.seed != nullptr ? static_cast<u64>(*p.seed) : 0;
        key_mask = p.key_mask == nullptr ? nullptr : p.key_mask + b * p.key_mask_batch;
    }

    // `scratch`: 4 * WARPS ints in shared memory; `first`: this warp's first row.
    DEVICE void find_rows(int* scratch) { find_rows(scratch, block * ROWS + warp() * 16); }
    DEVICE void find_rows(int* scratch, int first) {
        int bounds[4] = {OPEN, OPEN, OPEN, OPEN};  // low, -end, -lo_max, hi_min
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            row[r] = first + lane() / 4 + 8 * r;
            Interval seen = interval(p, b, row[r]);
            lo[r] = seen.lo, hi[r] = seen.hi, diag[r] = seen.diag;
            if (some(r)) {
                bounds[0] = min_(bounds[0], lo[r]), bounds[1] = min_(bounds[1], -hi[r]);
                bounds[2] = min_(bounds[2], -lo[r]), bounds[3] = min_(bounds[3], hi[r]);
            } else if (row[r] < p.q_len) {
                bounds[2] = -OPEN;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int x = warp_min(bounds[i]);
            if (lane() == 0) scratch[i * WARPS + warp()] = x;
        }
        ptx::sync();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bounds[i] = scratch[i * WARPS];
            for (int w = 1; w < WARPS; ++w) bounds[i] = min_(bounds[i], scratch[i * WARPS + w]);
        }
        ptx::sync();
        low = bounds[0], end = -bounds[1], lo_max = -bounds[2], hi_min = bounds[3];
        if (low == OPEN) low = end = 0;
    }

    DEVICE bool some(int r) const { return lo[r] < hi[r]; }
    DEVICE i64 row_at(int r) const { return static_cast<i64>(bh) * p.q_len + row[r]; }
    DEVICE i64 block_at() const { return static_cast<i64>(bh) * p.q_blocks + block; }
    DEVICE const T* q() const { return static_cast<const T*>(p.q) + b * p.q_batch + head * p.q_head; }
    DEVICE const T* d_out() const { return static_cast<const T*>(p.d_out) + b * p.d_out_batch + head * p.d_out_head; }

    DEVICE float keep(int r, int key) const {
        return dropout_factor(seed, p.keep_from, p.keep_scale, row[r], key, bh);
    }

private:
    DEVICE static int min_(int a, int b) { return a < b ? a : b; }
};

// place(chunk's row, its first column) for each chunk of 16 bytes of N rows of D columns, by all threads.
template <class T, int D, int N, bool PANELS, class Place>
DEVICE void each_chunk(Place&& place) {
    constexpr int STEP = 16 / sizeof(T), CHUNKS = D / STEP;
    if constexpr (PANELS) {
        static_assert(N * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "as many chunks for each thread");
        // A thread's chunks lie in the same column: what follows from it is computed once.
        [[maybe_unused]] constexpr int AT_ONCE = CHUNKS > 8 ? 1 : 4;  // addresses take registers
        int row = ptx::thread() / CHUNKS, column = ptx::thread() % CHUNKS * STEP;
#pragma unroll AT_ONCE
        for (int r = 0; r < N; r += THREADS / CHUNKS) place(row + r, column);
    } else {
#pragma unroll 2
        for (int i = ptx::thread(); i < N * CHUNKS; i += THREADS) place(i / CHUNKS, i % CHUNKS * STEP);
    }
}

// Copies what columns `column` ... of row `row` hold to shared memory, or zeros where not `there`. Rows are less than 4 GiB apart (the host
// sees to it): in PANELS one instruction finds a row. What that holds in registers is too much beside the sums of 64 columns by warps.
template <bool PANELS, class T>
DEVICE void copy_chunk(T* to, const T* from, i64 stride, int columns, int row, int column, bool there) {
    bool within = column < columns;
    if constexpr (PANELS) {
        const u8* first = reinterpret_cast<const u8*>(from + (within ? column : 0));
        u64 below = static_cast<u64>(static_cast<u32>(there ? row : 0)) * static_cast<u32>(stride * static_cast<int>(sizeof(T)));
        ptx::copy_16(to, first + below, there && within);
    } else {
        there = there && within;
        ptx::copy_16(to, there ? from + row * stride + column : from, there);
    }
}

// Rows first .. first + N of a (length, columns) matrix with contiguous columns, as N x D in shared memory; zeros elsewhere.
template <class T, int D, int N, bool PANELS = false>
DEVICE void copy_rows(T* to, const T* from, i64 stride, int columns, int first, int length) {
    each_chunk<T, D, N, PANELS>([&](int r, int column) {
        copy_chunk<PANELS>(to + Layout<T, D, N, PANELS>::at(r, column), from, stride, columns, first + r, column, first + r < length);
    });
}

// The rows that `index` names; zeros where it is negative.
template <class T, int D, int N, bool PANELS = false>
DEVICE void gather_rows(T* to, const T* from, i64 stride, int columns, const int* index) {
    each_chunk<T, D, N, PANELS>([&](int r, int column) {
        int key = index[r];
        copy_chunk<PANELS>(to + Layout<T, D, N, PANELS>::at(r, column), from, stride, columns, key, column, key >= 0);
    });
}

// Waits for all but the N youngest groups of this thread's copies. They are there for all after a sync().
template <class S, int N>
DEVICE void land_copies() {
    ptx::wait_copies<N>();
    if constexpr (S::WARPGROUP) ptx::publish_copies();
}
