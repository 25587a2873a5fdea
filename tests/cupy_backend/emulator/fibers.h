// One thread block at a time, its threads as fibers.
#pragma once

#include <cstdint>

namespace fibers {

enum class Operation : int { NONE, MEET, BALLOT, SHUFFLE, LOAD, LOAD_TRANSPOSED, MULTIPLY_HALF, MULTIPLY_BFLOAT, BARRIER };

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
float half_to_float(uint16_t x);
uint16_t float_to_half(float x);

// Runs `kernel(argument)` for every block of a grid. `order` chooses in which order fibers take turns: results must not depend on it.
// Returns an error message, or null.
const char* run(void (*kernel)(const void*), const void* argument, const int (&grid)[3], int threads, int shared_bytes, int order);

}  // namespace fibers
