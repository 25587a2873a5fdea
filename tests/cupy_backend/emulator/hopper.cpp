// Hopper's machine: barriers with phases, copies by tensor maps, products of a warpgroup. See fibers.h.
//
// A copy happens when every thread waits for others, as late as it may, or at once where `order` is 1, as early as it may. A product
// reads shared memory when it is waited for; until then its sums are NaN. Tiles lie swizzled, and are read through their descriptors.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "machine.h"

namespace fibers {

std::vector<uint16_t> copied;

namespace {

struct CopyTile {
    unsigned char* to;
    const TensorMap* map;
    int at[4];  // column, row, head, batch
};

struct Phases {
    int count, pending;
    int64_t bytes;  // announced and not yet here
    uint32_t ended;
    bool published;
    std::vector<CopyTile> copies;
};

constexpr uint32_t WINDOW = 1040;  // where shared memory starts among its addresses: no multiple of what tiles are aligned to
std::map<uint64_t*, Phases> phases;
std::map<int, std::vector<std::pair<uint64_t, uint64_t>>> sequences;  // of each warpgroup's products, as its first warp has them

Thread& me() { return *static_cast<Thread*>(current); }

// Where the bytes of a tile lie: bits 4 to 6 of the address, changed by bits 7 to 9.
unsigned char* swizzled(uint32_t address) { return block.shared + ((address ^ (address >> 7 & 7) << 4) - WINDOW); }

// In pieces of 16 bytes, which stay together when a tile is swizzled; zeros outside the tensor.
void copy(const CopyTile& tile) {
    const TensorMap& map = *tile.map;
    uint32_t to = shared_address(tile.to);
    const int piece = 16 / map.item_bytes;
    for (int row = 0; row < map.box[1]; ++row) {
        int64_t at[3] = {tile.at[1] + row, tile.at[2], tile.at[3]}, offset = 0;
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
            inside = inside && at[i] >= 0 && at[i] < map.lengths[i + 1];
            offset += at[i] * map.strides[i];
        }
        for (int column = 0; column < map.box[0]; column += piece, to += 16) {
            int64_t first = tile.at[0] + column;
            int64_t low = std::clamp<int64_t>(-first, 0, piece), high = std::clamp<int64_t>(map.lengths[0] - first, low, piece);
            std::memset(swizzled(to), 0, 16);
            if (inside && low < high)
                std::memcpy(swizzled(to) + low * map.item_bytes, map.base + offset + (first + low) * map.item_bytes,
                            static_cast<size_t>((high - low) * map.item_bytes));
        }
    }
}

bool end_phase(Phases& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return false;
    barrier.pending = barrier.count;
    ++barrier.ended;
    return true;
}

void take(Phases& barrier, const CopyTile& tile) {
    copy(tile);
    barrier.bytes -= static_cast<int64_t>(tile.map->box[0]) * tile.map->box[1] * tile.map->item_bytes;
}

Phases& find(uint64_t* barrier) {
    auto found = phases.find(barrier);
    if (found == phases.end()) {
        fail("a barrier that was not opened", me());
        return phases[barrier];
    }
    if (!found->second.published) fail("a barrier that was not published", me());
    return found->second;
}

// An operand of `rows` rows, which count from `first` on, and 16 columns of the product's inner dimension; entry (i, e) goes to
// to[i * by_row + e * by_column].
void load(float* to, int by_row, int by_column, uint64_t descriptor, bool down, int first, int rows, bool half, const Thread& t) {
    uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    uint32_t panel = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor of another layout than 128 swizzled bytes a row", t);
    if (group % 1024 != 0 || start / 128 % 8 != 0 || start % 128 % 32 != 0) fail("a descriptor whose tile is not aligned", t);
    if (down && (start % 1024 != 0 || (rows > 64 && panel % 1024 != 0))) fail("a descriptor of columns whose tile is not aligned", t);
    for (uint32_t i = 0; i < static_cast<uint32_t>(rows); ++i) {
        uint32_t row = static_cast<uint32_t>(first) + i;
        for (uint32_t e = 0; e < 16; ++e) {
            unsigned char* at = swizzled(down ? start + row / 64 * panel + e / 8 * group + e % 8 * 128 + row % 64 * 2
                                              : start + row / 8 * group + row % 8 * 128 + e * 2);
            if (copied[static_cast<size_t>(at - block.shared) / 16] != 0) return fail("a product reads what was copied and not published", t);
            uint16_t bits;
            std::memcpy(&bits, at, 2);
            to[static_cast<int>(i) * by_row + static_cast<int>(e) * by_column] = element(bits, 0, half);
        }
    }
}

// A warp's 16 rows of the left operand from its registers.
void load_registers(float* to, const Thread* lanes, size_t at) {
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 8; ++i) {
            int row = l / 4 + i / 2 % 2 * 8, column = l % 4 * 2 + i / 4 * 8 + i % 2;
            const Product& product = lanes[l].products[at];
            to[row * 16 + column] = element(product.held[i / 2], i % 2, product.kind.half);
        }
}

bool same_kind(const Product& x, const Product& y) {
    const ProductKind &a = x.kind, &b = y.kind;
    return x.a == y.a && x.b == y.b && (x.registers == nullptr) == (y.registers == nullptr) && a.columns == b.columns && a.add == b.add &&
           a.half == b.half && a.a_down == b.a_down && a.b_down == b.b_down;
}

}  // namespace

void forget_phases() {
    phases.clear();
    sequences.clear();
}

// Threads whose phase has ended.
bool release_phases() {
    bool progress = false;
    for (int i = 0; i < thread_count; ++i) {
        Thread& t = threads[i];
        if (t.done || t.waits_for != Operation::PHASE || (phases[t.phase_of].ended & 1) == t.parity) continue;
        t.waits_for = Operation::NONE;
        progress = true;
    }
    return progress;
}

bool complete_copies() {
    for (auto& [at, barrier] : phases) {
        if (barrier.pending != 0 || barrier.copies.empty()) continue;
        for (const CopyTile& tile : barrier.copies) take(barrier, tile);
        barrier.copies.clear();
        if (!end_phase(barrier)) fail("copies brought other numbers of bytes than were announced", threads[0]);
        if (release_phases()) return true;
    }
    return false;
}

// The products of a warp's own 16 rows.
void complete_products(Thread* lanes) {
    auto left = static_cast<int>(lanes[0].words[0]);
    size_t count = 0;
    while (count < lanes[0].products.size() && lanes[0].products[count].group < lanes[0].product_groups - left) ++count;
    int warp = lanes[0].index / 32, first = warp % 4 * 16;
    auto& sequence = sequences[warp / 4];
    std::vector<float> a(16 * 16), b(16 * 128), sums(16 * 128);  // b's inner dimension first: the loop over columns is one of vectors
    for (size_t i = 0; i < count; ++i) {
        const Product& product = lanes[0].products[i];
        const ProductKind& kind = product.kind;
        for (int l = 0; l < 32; ++l) {
            const Thread& t = lanes[l];
            if (t.products.size() <= i || !same_kind(t.products[i], product) || t.words[0] != lanes[0].words[0])
                return fail("lanes of a warp differ in their products", t);
            if (product.registers != nullptr && std::memcmp(t.products[i].registers, t.products[i].held, 16) != 0)
                return fail("registers of a product changed before it was waited for", t);
        }
        size_t seen = lanes[0].products_seen++;
        if (seen == sequence.size()) sequence.emplace_back(product.a, product.b);
        if (sequence[seen] != std::make_pair(product.a, product.b)) return fail("warps of a warpgroup differ in their products", lanes[0]);
        if (product.registers != nullptr) load_registers(a.data(), lanes, i);
        else load(a.data(), 16, 1, product.a, kind.a_down, first, 16, kind.half, lanes[0]);
        load(b.data(), 1, 128, product.b, kind.b_down, 0, kind.columns, kind.half, lanes[0]);
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k) {
                const float left = a[static_cast<size_t>(m * 16 + k)], *right = b.data() + k * 128;
                float* to = sums.data() + m * 128;
                for (int n = 0; n < kind.columns; ++n) to[n] += left * right[n];
            }
        for (int l = 0; l < 32; ++l) {
            const Product& mine = lanes[l].products[i];
            // What an earlier product of the same sums left, unless that was waited for before this one was issued.
            bool chained = false;
            for (size_t j = 0; j < i; ++j) chained = chained || lanes[l].products[j].d == mine.d;
            for (int j = 0; j < kind.columns / 2; ++j) {
                float before = !kind.add ? 0.f : chained ? mine.d[j] : mine.before[j];
                mine.d[j] = before + sums[static_cast<size_t>((l / 4 + j / 2 % 2 * 8) * 128 + j / 4 * 8 + l % 4 * 2 + j % 2)];
            }
        }
    }
    for (int l = 0; l < 32; ++l) lanes[l].products.erase(lanes[l].products.begin(), lanes[l].products.begin() + static_cast<long>(count));
}

uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block.shared) + WINDOW;
}

void named_barrier(int id, int count) {
    if (id < 1 || id > 15 || count % 32 != 0) fail("a named barrier is one of 1 to 15, for whole warps", me());
    me().barrier_id = id;
    me().barrier_threads = count;
    wait(Operation::NAMED_BARRIER);
}

void open_barrier(uint64_t* barrier, int count) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("a barrier is not aligned", me());
    phases[barrier] = {count, count, 0, 0, false, {}};
}

void publish_barriers() {
    for (auto& [at, barrier] : phases) barrier.published = true;
}

void arrive(uint64_t* at, int bytes) {
    Phases& barrier = find(at);
    if (barrier.pending == 0) return fail("more arrivals than a phase counts", me());
    barrier.bytes += bytes;
    --barrier.pending;
    end_phase(barrier);
}

void wait_phase(uint64_t* at, uint32_t parity) {
    if ((find(at).ended & 1) != parity) return;
    me().phase_of = at;
    me().parity = parity;
    wait(Operation::PHASE);
}

void copy_tile(void* to, const TensorMap& map, uint64_t* at, int column, int row, int head, int batch) {
    Phases& barrier = find(at);
    if (shared_address(to) % 1024 != 0) fail("a tile is not aligned to 1024 bytes", me());
    if (map.box[0] * map.item_bytes != 128 || map.of_this_layout != 1) fail("a map whose rows are not 128 bytes", me());
    CopyTile tile{static_cast<unsigned char*>(to), &map, {column, row, head, batch}};
    if (order != 1) return barrier.copies.push_back(tile);
    take(barrier, tile);
    end_phase(barrier);
}

void open_products() { me().products_open = true; }

void multiply_tiles(float* d, const ProductKind& kind, uint64_t a, const uint32_t* registers, uint64_t b) {
    Thread& t = me();
    if (!t.products_open) fail("products without a fence after sums were touched", t);
    Product product{d, kind, a, b, registers, {}, t.product_groups, {}};
    if (registers != nullptr) std::memcpy(product.held, registers, sizeof(product.held));
    size_t bytes = static_cast<size_t>(kind.columns / 2) * sizeof(float);
    std::memcpy(product.before, d, bytes);
    t.products.push_back(product);
    std::memset(d, 0xff, bytes);
}

void note_copy(const void* to, Thread& t) {
    size_t piece = static_cast<size_t>(static_cast<const unsigned char*>(to) - block.shared) / 16;
    if (piece >= copied.size() || copied[piece] == t.index + 1) return;
    copied[piece] = static_cast<uint16_t>(t.index + 1);
    t.unpublished.push_back(piece);
}

void publish_stores() {
    for (size_t piece : me().unpublished)
        if (copied[piece] == me().index + 1) copied[piece] = 0;
    me().unpublished.clear();
}

void commit_products() { ++me().product_groups; }

void wait_products(int pending) {
    Thread& t = me();
    t.words[0] = static_cast<uint32_t>(pending);
    wait(Operation::PRODUCTS);
    t.products_open = false;
}

}  // namespace fibers
