// One thread block at a time, its threads as fibers.
#pragma once

#include <cstdint>

namespace fibers {

enum class Operation : int {
    NONE,
    // of the 32 lanes of a warp
    MEET,
    BALLOT,
    SHUFFLE,
    LEAST,
    LOAD,
    LOAD_TRANSPOSED,
    MULTIPLY_HALF,
    MULTIPLY_BFLOAT,
    PRODUCTS,
    // of threads
    BARRIER,
    NAMED_BARRIER,
    PHASE,
};

struct Fiber {
    int index;
};

struct Block {
    int at[3], grid[3];
    unsigned char* shared;
};

extern Fiber* current;
extern Block block;

// Waits for all threads of the block; whether x is true in any.
bool block_barrier(bool x);
// Waits for the other lanes with the words that `operation` needs, and receives its result in them.
void warp_meeting(Operation operation, void* words, int count);

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool half);
void copy_16(void* to, const void* from, bool there);
void commit_copies();
void wait_copies(int pending);
void add_four(float* p, const float (&x)[4]);
// The exponent moved by 2^112, which makes subnormals right as well; infinities and NaNs end above all others.
inline float half_to_float(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x & 0x7fff) << 13;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y *= 0x1p112f;
    __builtin_memcpy(&bits, &y, 4);
    if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= static_cast<uint32_t>(x & 0x8000) << 16;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
uint16_t float_to_half(float x);

// -- Hopper: see hopper.cpp ------------------------------------------------------------------------------------------------------

// A (batch, heads, length, columns) tensor: where src/hopper.cuh has what the driver encodes.
struct alignas(64) TensorMap {
    const unsigned char* base;
    int64_t lengths[4], strides[3];  // columns, length, heads, batch; bytes from one to the next, columns are contiguous
    int32_t box[2], item_bytes, of_this_layout;
};

uint32_t shared_address(const void* p);
void named_barrier(int id, int threads);
void open_barrier(uint64_t* barrier, int count);
void publish_barriers();
void arrive(uint64_t* barrier, int bytes);
void wait_phase(uint64_t* barrier, uint32_t parity);
void copy_tile(void* to, const TensorMap& map, uint64_t* barrier, int column, int row, int head, int batch);
// Of a product: columns of the sums, whether they are added to, and for which operands the inner dimension runs from row to row.
struct ProductKind {
    int columns;
    bool add, half, a_down, b_down;
};

void open_products();
// The left operand is `a`, or in `registers` where that is not null.
void multiply_tiles(float* d, const ProductKind& kind, uint64_t a, const uint32_t* registers, uint64_t b);
void publish_stores();
void commit_products();
void wait_products(int pending);

// Runs `kernel(argument)` for every block of a grid. `order` chooses in which order fibers take turns: results must not depend on it.
// Returns an error message, or null.
const char* run(void (*kernel)(const void*), const void* argument, const int (&grid)[3], int threads, int shared_bytes, int order);

}  // namespace fibers
