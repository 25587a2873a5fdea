// Forward, first pass, where forward_mark follows: T and its margin, as forward_select has them. A program a block of 64 rows.
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

template <class S>
KERNEL(THREADS, S::ALPHA != 0 && S::BN <= 64 ? 4 : 3)
forward_bound(PARAMS p) {
    using T = typename S::T;
    Tiles<S> shared(false);
    int bh = ptx::block_x() / p.q_blocks, block = p.q_blocks - 1 - ptx::block_x() % p.q_blocks;
    Block<S> x(p, bh, block);
    copy_rows<T, S::BE, ROWS, S::WARPGROUP>(shared.q, x.q(), p.q_row, p.head_dim, block * ROWS, p.q_len);
    ptx::commit_copies();
    land_copies<S, 0>();
    x.find_rows(shared.scratch);  // syncs
    float k_max = largest_key(x), margin[2], t[2];
    sampled_bound(x, shared, t);
    score_margin(x, shared, k_max < INFINITE ? k_max : 0.f, margin);
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (lane() % 4 == 0 && x.row[r] < p.q_len) p.t[x.row_at(r)] = t[r], p.margin[x.row_at(r)] = margin[r];
}
