// Forward, last pass: the blocks of rows that are not finished. Those whose lists are long walk them; those whose lists would hold most
// of the keys, or found no room, and all of short sequences walk all keys.
//
// A pass over the keys for each Newton step from the bound T, or from a guess where all keys are walked, and one for the output; where there
// is no bound, one for the row max first.
// Programs of all other blocks end at once.
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

// This program's block, or -1: in the order of the queue, so that the blocks that walk all keys, which take longest, come first.
DEVICE int find_item(const Params& p) {
    if (p.entries == nullptr) return ptx::block_x();
    u64 at = ptx::block_x(), all = p.counters[QUEUED_ALL], lists = p.counters[QUEUED_LISTS];
    return at < all ? p.queue[at] : at < all + lists ? p.queue[ptx::blocks_x() - 1 - static_cast<int>(at - all)] : -1;
}

template <class S>
KERNEL(THREADS, programs<S>(2))
forward_dense(PARAMS p) {
    using T = typename S::T;
    int item = find_item(p);
    if (item < 0) return;
    auto [bh, block] = block_in_turn(p, item);
    const int* entry = p.entries + (static_cast<i64>(bh) * p.q_blocks + block) * 2;
    int count = p.entries == nullptr ? static_cast<int>(EVERY_KEY) : entry[1];
    Tiles<S> shared(true);
    Block<S> x(p, bh, block);
    copy_rows<T, S::BE, ROWS, S::WARPGROUP>(shared.q, x.q(), p.q_row, p.head_dim, block * ROWS, p.q_len);
    ptx::commit_copies();
    for (int i = ptx::thread(); i < 2 * S::BN; i += THREADS) shared.flags[i] = 0;
    land_copies<S, 0>();
    x.find_rows(shared.scratch);  // syncs
    int kept = -1;
    int* list = count >= 0 ? p.lists + entry[0] : nullptr;
    if (count >= 0 && count <= S::STAGES * S::BN) {
        Held<S::BN> keys{count};
        keys.take(x, shared, list);
        kept = solve_and_write(x, shared, keys, list);
    } else if (count >= 0) {
        kept = solve_and_write(x, shared, List<S::BN>{list, count}, list);
    } else {
        solve_and_write(x, shared, Range<S::BN, S::WARPGROUP>(x, 1, true), nullptr);
    }
    keep_list(x, list, kept, shared.scratch);
}
