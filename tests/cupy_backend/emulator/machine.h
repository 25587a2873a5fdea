// What fibers.cpp and hopper.cpp share: the threads of the block at hand.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "fibers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fibers {

constexpr int MOST_THREADS = 640, WORDS = 12;

struct Copy {
    void* to;
    const void* from;
    bool there;
    int group;
};

// A product that is under way: it is computed when it is waited for and not before.
struct Product {
    float* d;
    ProductKind kind;
    uint64_t a, b;
    const uint32_t* registers;
    uint32_t held[4];  // what was in `registers`
    int group;
    float before[64];
};

struct Thread : Fiber {
    bool done;
    Operation waits_for;
    uint64_t meeting;  // how many warp operations and barriers this thread has entered
    uint32_t words[WORDS];
    std::vector<Copy> copies;
    int groups;
    int barrier_id, barrier_threads;  // of NAMED_BARRIER
    uint64_t* phase_of;               // of PHASE
    uint32_t parity;
    std::vector<Product> products;
    int product_groups;
    bool products_open;
    std::vector<size_t> unpublished;  // pieces of 16 bytes that this thread's copies wrote and no fence followed
    size_t products_seen;  // how many products of its warpgroup's sequence this thread has taken part in
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    unsigned char* stack;
};

extern Thread threads[MOST_THREADS];
extern int thread_count, order;
extern const char* failure;

void fail(const char* what, const Thread& t);
// Lets others go on until what this thread waits for has happened.
Thread& wait(Operation operation);
inline float element(uint32_t word, int half_word, bool is_half) {
    auto bits = static_cast<uint16_t>(word >> (16 * half_word));
    if (is_half) return half_to_float(bits);
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// Hopper's part of a block: at its start, when no thread can go on (was there progress?), and when a warp waits for products.
void forget_phases();
bool release_phases();
bool complete_copies();
void complete_products(Thread* lanes);
// Pieces of 16 bytes of shared memory that were copied: the copying thread's number + 1 until publish_stores().
extern std::vector<uint16_t> copied;
void note_copy(const void* to, Thread& t);

}  // namespace fibers
