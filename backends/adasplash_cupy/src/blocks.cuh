// Products of a block of 64 rows: each warp's own 16 by itself (products.cuh), or all four warps' as a warpgroup (wgmma.cuh). Sums lie
// in registers alike: lane l of warp w has rows 16 w + l / 4 and 8 later.
//
// Products of a warpgroup are under way from open_products() to close_products(): nothing that they read or sum may be touched meanwhile.
#pragma once

template <class S>
DEVICE void open_products() {
    if constexpr (S::WARPGROUP) ptx::open_products();
}
// Closes a group of products.
template <class S>
DEVICE void commit_products() {
    if constexpr (S::WARPGROUP) ptx::commit_products();
}
// The sums of all but the LEFT youngest groups are there from here on.
template <class S, int LEFT, int... N>
DEVICE void land_products(float (&... sums)[N][4]) {
    if constexpr (S::WARPGROUP) {
        ptx::wait_products<LEFT>();
        (ptx::settle(sums), ...);
    }
}
// The sums of all products since open_products() are there from here on.
template <class S, int... N>
DEVICE void close_products(float (&... sums)[N][4]) {
    commit_products<S>();
    land_products<S, 0>(sums...);
}

// The block's rows as the left operand of many products: a warp's in registers where HOLD and they fit there beside what else a pass
// holds.
template <class S, int D, bool HOLD>
struct Left {
    using T = typename S::T;
    using Rows = Layout<T, D, ROWS, S::WARPGROUP>;
    static constexpr bool HELD = HOLD && sizeof(T) == 2 && D <= 64;
    const T* rows;
    u32 held[HELD ? D / 16 : 1][4];

    DEVICE explicit Left(const T* rows_) : rows(rows_) {
        if constexpr (HELD) {
#pragma unroll
            for (int k = 0; k < D; k += 16)
                ptx::load_matrices(held[k / 16], rows + Rows::at(warp() * 16 + lane() % 16, k + lane() / 16 * 8));
        }
    }
};

// c = left b^T; b has 8 N rows.
template <class S, int D, bool HOLD, int N>
DEVICE void multiply_left(float (&c)[N][4], const Left<S, D, HOLD>& left, const typename S::T* b) {
    using T = typename S::T;
    constexpr bool HELD = Left<S, D, HOLD>::HELD;
    if constexpr (S::WARPGROUP) {
        u64 rows = ptx::rows_of_128_bytes(b), left_rows = ptx::rows_of_128_bytes(left.rows);
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            int right = k / 64 * (8 * N * 8) + k % 64 / 8;
            if constexpr (HELD) {
                if (k == 0) ptx::multiply_tiles<T, false, false>(c, left.held[0], rows);
                else ptx::multiply_tiles<T, true, false>(c, left.held[k / 16], rows + right);
            } else {
                int to = k / 64 * (ROWS * 8) + k % 64 / 8;
                if (k == 0) ptx::multiply_tiles<T, false, false, false>(c, left_rows, rows);
                else ptx::multiply_tiles<T, true, false, false>(c, left_rows + to, rows + right);
            }
        }
    } else if constexpr (HELD) {
        int l = lane();
        const T* b_row = b + (l / 16 * 8 + l % 8) * pitch<T>(D) + l / 8 % 2 * 8;
        clear(c);
#pragma unroll
        for (int k = 0; k < D; k += 16)
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 fb[4];
                ptx::load_matrices(fb, b_row + n * 8 * pitch<T>(D) + k);
                ptx::multiply_add<T>(c[n], left.held[k / 16], fb[0], fb[1]);
                ptx::multiply_add<T>(c[n + 1], left.held[k / 16], fb[2], fb[3]);
            }
    } else {
        clear(c);
        multiply_rows<T, D>(reinterpret_cast<float (&)[1][N][4]>(c), left.rows + warp() * 16 * pitch<T>(D), b);
    }
}

// Sums of N tiles of 8 columns, rounded, as left operands of a warpgroup.
template <class T, int N>
struct Weights {
    u32 pairs[N / 2][4];

    DEVICE void set(int n, const float (&w)[4]) {
        pairs[n / 2][n % 2 * 2] = ptx::pack<T>(w[0], w[1]);
        pairs[n / 2][n % 2 * 2 + 1] = ptx::pack<T>(w[2], w[3]);
    }
    DEVICE void set(const float (&w)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) set(n, w[n]);
    }
    // What rounding took from w.
    DEVICE void set_rest(const float (&w)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float rest[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) rest[i] = w[n][i] - ptx::to_float(ptx::from_float<T>(w[n][i]));
            set(n, rest);
        }
    }
    // Before open_products().
    DEVICE void settle() { ptx::settle(pairs); }
};

// c (64 x 8C) += w b: b are the columns from `column` on, a multiple of 64, of 8 N rows that lie as Rows.
template <class Rows, class T, int N, int C>
DEVICE void multiply_weights(float (&c)[C][4], const Weights<T, N>& w, const T* b, int column) {
    u64 columns = ptx::columns_of_128_bytes(b + column / 64 * Rows::PANEL, Rows::PANEL * 2);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) ptx::multiply_tiles<T, true, true>(c, w.pairs[k], columns + k * 128);
}

// c (64 x 8C) = w^T b over the block's rows: w and b are panels of 64 columns, of which b's first 8 C count.
template <class T, int C>
DEVICE void multiply_columns(float (&c)[C][4], const T* w, const T* b) {
    static_assert(C <= 8, "a panel");
    u64 left = ptx::columns_of_128_bytes(w, ROWS * 128), right = ptx::columns_of_128_bytes(b, ROWS * 128);
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        if (k == 0) ptx::multiply_tiles<T, false, true, true>(c, left, right);
        else ptx::multiply_tiles<T, true, true, true>(c, left + k * 128, right + k * 128);
    }
}
