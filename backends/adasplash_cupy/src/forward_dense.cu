// Forward, last pass: the blocks of rows that are not finished. Those whose lists are long walk them; those whose lists would hold most
// of the keys, or found no room, and all of short sequences walk all keys.
//
// A pass over the keys for the row max, one for each Newton step, and one for the output. Programs of all other blocks end at once.
#include "ptx.cuh"
#include "params.cuh"
#include "entmax.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "tiles.cuh"
#include "evaluate.cuh"
#include "output.cuh"

// tau and the output over `keys`; returns as write_output does.
template <class S, class Keys>
DEVICE int solve_and_write(const Block<S>& x, const Tiles<S>& shared, const Keys& keys, int* list) {
    const Params& p = x.p;
    Point zero[2] = {{0.f, 0.f, 1.f}, {0.f, 0.f, 1.f}};
    float f[2], s[2], m[2], c[2];
    evaluate(x, shared, keys, zero, false, f, s, m);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (m[r] == -INFINITE) m[r] = 0.f;
        c[r] = x.entmax.first_c();
        if (p.entries != nullptr && !x.entmax.is(POWER) && x.row[r] < p.q_len)
            c[r] = fminf(c[r], m[r] - p.t[x.row_at(r)] + p.margin[x.row_at(r)]);
    }
    solve(x, shared, keys, m, c);
    return write_output(x, shared, keys, m, c, list);
}

template <class S>
KERNEL(THREADS, programs<S>(2))
forward_dense(PARAMS p) {
    using T = typename S::T;
    int bh = ptx::block_x() / p.q_blocks, block = p.q_blocks - 1 - ptx::block_x() % p.q_blocks;
    const int* entry = p.entries + (static_cast<i64>(bh) * p.q_blocks + block) * 2;
    int count = p.entries == nullptr ? static_cast<int>(EVERY_KEY) : entry[1];
    if (count == FINISHED) return;
    Tiles<S> shared(true);
    Block<S> x(p, bh, block);
    copy_rows<T, S::BE, ROWS>(shared.q, x.q(), p.q_row, p.head_dim, block * ROWS, p.q_len);
    ptx::commit_copies();
    for (int i = ptx::thread(); i < 2 * S::BN; i += THREADS) shared.flags[i] = 0;
    ptx::wait_copies<0>();
    x.find_rows(shared.scratch);  // syncs
    int kept = -1;
    int* list = count >= 0 ? p.lists + entry[0] : nullptr;
    if (count >= 0) kept = solve_and_write(x, shared, List<S::BN>{list, count}, list);
    else solve_and_write(x, shared, Range<S::BN>(x, 1, true), nullptr);
    keep_list(x, list, kept, shared.scratch);
}
