// Products of a warp: tiles in shared memory and registers, fp32 sums.
//
// A 16 x 8 tile of sums lies in four registers a thread, whatever the element type: lane l holds, of row l / 4 and then of row
// l / 4 + 8, the columns 2 (l % 4) and the next. 16-bit elements go through the tensor cores; fp32 through fused multiply-adds in
// the same layout, in the order of the inner dimension, so that nothing is rounded but the products' sums.
//
// Rows of a tile in shared memory are 16 bytes longer than their content: eight rows then start in eight different groups of banks. Tiles that
// a warpgroup multiplies lie in panels instead, see Layout.
#pragma once

inline constexpr int ROWS = 64;      // query rows a block, which share one list of keys
inline constexpr int WARPS = 4;
inline constexpr int THREADS = 32 * WARPS;

template <class T>
DEVICE constexpr int pitch(int columns) {
    return columns + 16 / static_cast<int>(sizeof(T));
}

// R rows of D columns in shared memory: one behind another; or, where PANELS, each 64 columns as wgmma.cuh wants them, chunk c (of 8
// elements) of row r in the place of chunk c ^ r % 8: eight rows of a chunk lie in different banks then too.
template <class T, int D, int R, bool PANELS>
struct Layout {
    static constexpr int SIZE = R * (PANELS ? (D + 63) / 64 * 64 : pitch<T>(D)), PANEL = R * 64;  // elements
    DEVICE static int at(int row, int column) {
        if (!PANELS) return row * pitch<T>(D) + column;
        return column / 64 * PANEL + row * 64 + ((column / 8 ^ row) % 8) * 8 + column % 8;
    }
};

DEVICE int lane() { return ptx::thread() % 32; }
DEVICE int warp() { return ptx::thread() / 32; }

template <int N>
DEVICE void clear(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.f;
}

// Two sums of a row, as elements.
template <class T>
DEVICE void store_pair(T* to, float first, float second) {
    if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<u32*>(to) = ptx::pack<T>(first, second);
    } else {
        to[0] = first;
        to[1] = second;
    }
}

// What a thread loads at once.
template <class T>
struct alignas(16) Chunk {
    static constexpr int SIZE = 16 / sizeof(T);
    T x[SIZE];
};
struct alignas(16) Four {
    float x[4];
};
struct alignas(8) Two {
    float x[2];
};

// c[m][n] += a b^T: a has M * 16 rows, b N * 8, both D columns and their pitch.
template <class T, int D, int M, int N>
DEVICE void multiply_rows(float (&c)[M][N][4], const T* a, const T* b) {
    constexpr int P = pitch<T>(D);
    int l = lane();
    if constexpr (sizeof(T) == 2) {
        static_assert(N % 2 == 0, "b comes in pairs of 8 rows");
        const T* a_row = a + (l % 16) * P + l / 16 * 8;
        const T* b_row = b + (l / 16 * 8 + l % 8) * P + l / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            u32 fa[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) ptx::load_matrices(fa[m], a_row + m * 16 * P + k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 fb[4];
                ptx::load_matrices(fb, b_row + n * 8 * P + k);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    ptx::multiply_add<T>(c[m][n], fa[m], fb[0], fb[1]);
                    ptx::multiply_add<T>(c[m][n + 1], fa[m], fb[2], fb[3]);
                }
            }
        }
    } else {
        const float* a_row = a + l / 4 * P;
        const float* b_row = b + l % 4 * 2 * P;
#pragma unroll 1
        for (int k = 0; k < D; k += 4) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                Four a0 = *reinterpret_cast<const Four*>(a_row + m * 16 * P + k);
                Four a1 = *reinterpret_cast<const Four*>(a_row + (m * 16 + 8) * P + k);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    Four b0 = *reinterpret_cast<const Four*>(b_row + n * 8 * P + k);
                    Four b1 = *reinterpret_cast<const Four*>(b_row + (n * 8 + 1) * P + k);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        c[m][n][0] = fmaf(a0.x[i], b0.x[i], c[m][n][0]);
                        c[m][n][1] = fmaf(a0.x[i], b1.x[i], c[m][n][1]);
                        c[m][n][2] = fmaf(a1.x[i], b0.x[i], c[m][n][2]);
                        c[m][n][3] = fmaf(a1.x[i], b1.x[i], c[m][n][3]);
                    }
                }
            }
        }
    }
}

// c (16 x 8N) += w b: w are sums in registers, 16 rows and as many columns as b has rows, 16; b has the pitch P.
template <class T, int P, int N>
DEVICE void multiply_weights(float (&c)[N][4], const float (&w)[2][4], const T* b) {
    int l = lane();
    if constexpr (sizeof(T) == 2) {
        static_assert(N % 2 == 0, "b comes in pairs of 8 columns");
        u32 fa[4] = {ptx::pack<T>(w[0][0], w[0][1]), ptx::pack<T>(w[0][2], w[0][3]), ptx::pack<T>(w[1][0], w[1][1]),
                     ptx::pack<T>(w[1][2], w[1][3])};
        const T* b_row = b + l % 16 * P + l / 16 * 8;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 fb[4];
            ptx::load_matrices_transposed(fb, b_row + n * 8);
            ptx::multiply_add<T>(c[n], fa, fb[0], fb[1]);
            ptx::multiply_add<T>(c[n + 1], fa, fb[2], fb[3]);
        }
    } else {
        // A row's weights lie with the four lanes of its quad.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll 1
            for (int j = 0; j < 8; j += 2) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float w0 = ptx::shuffle(w[half][e], (l & ~3) | j / 2), w1 = ptx::shuffle(w[half][2 + e], (l & ~3) | j / 2);
                    const float* row = b + (half * 8 + j + e) * P + l % 4 * 2;
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        Two x = *reinterpret_cast<const Two*>(row + n * 8);
                        c[n][0] = fmaf(w0, x.x[0], c[n][0]);
                        c[n][1] = fmaf(w0, x.x[1], c[n][1]);
                        c[n][2] = fmaf(w1, x.x[0], c[n][2]);
                        c[n][3] = fmaf(w1, x.x[1], c[n][3]);
                    }
                }
            }
        }
    }
}

// c (16 x 8N) += w^T b over K rows: w has 16 columns of the pitch PW, b 8N of the pitch P.
template <class T, int K, int PW, int P, int N>
DEVICE void multiply_columns(float (&c)[N][4], const T* w, const T* b) {
    int l = lane();
    if constexpr (sizeof(T) == 2) {
        const T* w_row = w + (l / 16 * 8 + l % 8) * PW + l / 8 % 2 * 8;
        const T* b_row = b + l % 16 * P + l / 16 * 8;
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            u32 fa[4];
            ptx::load_matrices_transposed(fa, w_row + k * PW);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 fb[4];
                ptx::load_matrices_transposed(fb, b_row + k * P + n * 8);
                ptx::multiply_add<T>(c[n], fa, fb[0], fb[1]);
                ptx::multiply_add<T>(c[n + 1], fa, fb[2], fb[3]);
            }
        }
    } else {
#pragma unroll 4
        for (int k = 0; k < K; ++k) {
            float w0 = w[k * PW + l / 4], w1 = w[k * PW + l / 4 + 8];
            const float* row = b + k * P + l % 4 * 2;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                Two x = *reinterpret_cast<const Two*>(row + n * 8);
                c[n][0] = fmaf(w0, x.x[0], c[n][0]);
                c[n][1] = fmaf(w0, x.x[1], c[n][1]);
                c[n][2] = fmaf(w1, x.x[0], c[n][2]);
                c[n][3] = fmaf(w1, x.x[1], c[n][3]);
            }
        }
    }
}

// Sums and maxima along a row: over the four lanes of a quad.
DEVICE float row_sum(float x) {
    x += ptx::shuffle_xor(x, 1);
    return x + ptx::shuffle_xor(x, 2);
}
DEVICE float row_max(float x) {
    x = fmaxf(x, ptx::shuffle_xor(x, 1));
    return fmaxf(x, ptx::shuffle_xor(x, 2));
}
DEVICE int warp_sum(int x) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) x += ptx::shuffle_xor(x, i);
    return x;
}
DEVICE int warp_min(int x) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        int other = ptx::shuffle_xor(x, i);
        x = other < x ? other : x;
    }
    return x;
}
