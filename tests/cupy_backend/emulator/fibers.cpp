// See fibers.h. Fibers are switched by hand on x86-64, elsewhere by ucontext.
#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fibers {

Thread threads[MOST_THREADS];
int thread_count, order;
const char* failure;

namespace {

constexpr int STACK = 64 * 1024, GUARD = 256;
constexpr uint64_t CANARY = 0x5a5ac3c3a5a53c3cull;

char message[256];
bool any_true;
void (*entry)(const void*);
const void* entry_argument;
unsigned char* stacks;

#if defined(__x86_64__)
void* scheduler_stack_pointer;
extern "C" void adasplash_switch(void** save, void* restore);
asm(R"(
.text
.globl adasplash_switch
adasplash_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void to_scheduler(Thread& t) { adasplash_switch(&t.stack_pointer, scheduler_stack_pointer); }
void to_fiber(Thread& t) { adasplash_switch(&scheduler_stack_pointer, t.stack_pointer); }
#else
ucontext_t scheduler_context;
void to_scheduler(Thread& t) { swapcontext(&t.context, &scheduler_context); }
void to_fiber(Thread& t) { swapcontext(&scheduler_context, &t.context); }
#endif

void start() {
    Thread& me = *static_cast<Thread*>(current);
    entry(entry_argument);
    me.done = true;
    to_scheduler(me);
    std::abort();
}

void prepare(Thread& t) {
    t.done = false;
    t.waits_for = Operation::NONE;
    t.copies.clear();
    t.groups = 0;
    t.products.clear();
    t.product_groups = 0;
    t.products_open = false;
    t.products_seen = 0;
    t.unpublished.clear();
#if defined(__x86_64__)
    auto* top = reinterpret_cast<void**>(t.stack + STACK);
    *--top = nullptr;  // the stack of a function that was called is 8 off a multiple of 16
    *--top = reinterpret_cast<void*>(&start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    t.stack_pointer = top;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = STACK;
    t.context.uc_link = nullptr;
    makecontext(&t.context, start, 0);
#endif
}

// c += a b as the tensor cores lay out their operands: words 0-3 are c, 4-7 a, 8-9 b.
void multiply(Thread* lanes, bool is_half) {
    float a[16][16], b[16][8], c[16][8];  // b's inner dimension first: the loop over columns is one of vectors
    for (int l = 0; l < 32; ++l) {
        const uint32_t* w = lanes[l].words;
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 2; ++i) {
            a[g][2 * t + i] = element(w[4], i, is_half);
            a[g + 8][2 * t + i] = element(w[5], i, is_half);
            a[g][2 * t + 8 + i] = element(w[6], i, is_half);
            a[g + 8][2 * t + 8 + i] = element(w[7], i, is_half);
            b[2 * t + i][g] = element(w[8], i, is_half);
            b[2 * t + 8 + i][g] = element(w[9], i, is_half);
            std::memcpy(&c[g][2 * t + i], &w[i], 4);
            std::memcpy(&c[g + 8][2 * t + i], &w[2 + i], 4);
        }
    }
    for (int m = 0; m < 16; ++m) {
        float sums[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) sums[n] += a[m][k] * b[k][n];
        for (int n = 0; n < 8; ++n) c[m][n] += sums[n];
    }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) std::memcpy(&lanes[l].words[i], &c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2], 4);
}

void load(Thread* lanes, bool transposed) {
    uint16_t matrices[4][8][8];
    for (int l = 0; l < 32; ++l) {
        const void* row;
        std::memcpy(&row, lanes[l].words, sizeof(row));
        if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of an address that is no multiple of 16", lanes[l]);
        std::memcpy(matrices[l / 8][l % 8], row, 16);
    }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            int g = l / 4, t = l % 4 * 2;
            uint32_t low = transposed ? matrices[i][t][g] : matrices[i][g][t];
            uint32_t high = transposed ? matrices[i][t + 1][g] : matrices[i][g][t + 1];
            lanes[l].words[i] = low | high << 16;
        }
}

void complete_warp(Thread* lanes) {
    Operation operation = lanes[0].waits_for;
    for (int l = 1; l < 32; ++l)
        if (lanes[l].waits_for != operation) return fail("lanes of a warp meet at different operations", lanes[l]);
    if (operation == Operation::BALLOT) {
        uint32_t bits = 0;
        for (int l = 0; l < 32; ++l) bits |= (lanes[l].words[0] & 1) << l;
        for (int l = 0; l < 32; ++l) lanes[l].words[0] = bits;
    } else if (operation == Operation::SHUFFLE) {
        uint32_t values[32];
        for (int l = 0; l < 32; ++l) values[l] = lanes[l].words[0];
        for (int l = 0; l < 32; ++l) lanes[l].words[0] = values[lanes[l].words[1] % 32];
    } else if (operation == Operation::LEAST) {
        int32_t least = INT32_MAX;
        for (int l = 0; l < 32; ++l) least = std::min(least, static_cast<int32_t>(lanes[l].words[0]));
        for (int l = 0; l < 32; ++l) lanes[l].words[0] = static_cast<uint32_t>(least);
    } else if (operation == Operation::PRODUCTS) {
        complete_products(lanes);
    } else if (operation == Operation::LOAD || operation == Operation::LOAD_TRANSPOSED) {
        load(lanes, operation == Operation::LOAD_TRANSPOSED);
    } else if (operation != Operation::MEET) {
        multiply(lanes, operation == Operation::MULTIPLY_HALF);
    }
    for (int l = 0; l < 32; ++l) lanes[l].waits_for = Operation::NONE;
}

bool of_warp(Operation operation) { return operation >= Operation::MEET && operation <= Operation::PRODUCTS; }

// Threads that name the same barrier, once they are as many as they say.
bool complete_named(int id) {
    int waiting = 0, wanted = 0;
    for (int i = 0; i < thread_count; ++i) {
        Thread& t = threads[i];
        if (t.done || t.waits_for != Operation::NAMED_BARRIER || t.barrier_id != id) continue;
        if (wanted != 0 && wanted != t.barrier_threads) fail("threads name the same barrier and differ in how many they are", t);
        wanted = t.barrier_threads;
        ++waiting;
    }
    if (waiting == 0 || waiting < wanted) return false;
    if (waiting > wanted) fail("more threads at a named barrier than it is for", threads[0]);
    for (int i = 0; i < thread_count; ++i)
        if (threads[i].waits_for == Operation::NAMED_BARRIER && threads[i].barrier_id == id) threads[i].waits_for = Operation::NONE;
    return true;
}

bool complete_waiting() {
    bool progress = false;
    int at_barrier = 0, at_named = 0, done = 0;
    for (int w = 0; w < thread_count; w += 32) {
        int waiting = 0;
        for (int l = 0; l < 32; ++l) {
            Thread& t = threads[w + l];
            done += t.done;
            at_barrier += !t.done && t.waits_for == Operation::BARRIER;
            at_named += !t.done && t.waits_for == Operation::NAMED_BARRIER;
            waiting += !t.done && of_warp(t.waits_for);
        }
        if (waiting == 32 && threads[w].waits_for != Operation::PRODUCTS) {
            complete_warp(threads + w);
            progress = true;
        }
    }
    if (at_barrier > 0 && at_barrier + done == thread_count) {
        for (int i = 0; i < thread_count; ++i)
            if (!threads[i].done) threads[i].words[0] = any_true, threads[i].waits_for = Operation::NONE;
        any_true = false;
        progress = true;
    }
    for (int id = 1; id < 16 && at_named > 0; ++id) progress = complete_named(id) || progress;
    if (progress || release_phases()) return true;
    // Products and copies under way: as late as may be.
    for (int w = 0; w < thread_count; w += 32) {
        bool together = true;
        for (int l = 0; l < 32; ++l) together = together && !threads[w + l].done && threads[w + l].waits_for == Operation::PRODUCTS;
        if (!together) continue;
        complete_warp(threads + w);
        progress = true;
    }
    return progress || complete_copies();
}

void run_block() {
    forget_phases();
    for (int i = 0; i < thread_count; ++i) prepare(threads[i]);
    any_true = false;
    for (int finished = 0; finished < thread_count && failure == nullptr;) {
        for (int i = 0; i < thread_count; ++i) {
            Thread& t = threads[order == 0 ? i : order == 1 ? thread_count - 1 - i : i * 37 % thread_count];
            if (t.done || t.waits_for != Operation::NONE) continue;
            current = &t;
            to_fiber(t);
            finished += t.done;
            if (t.done && !t.copies.empty()) fail("a thread ends before its copies", t);
            if (t.done && !t.products.empty()) fail("a thread ends before its products", t);
        }
        if (finished < thread_count && failure == nullptr && !complete_waiting())
            fail("threads wait for others that never come: a barrier or a warp operation is not reached by all", threads[0]);
    }
}

}  // namespace

Fiber* current;
Block block;

void fail(const char* what, const Thread& t) {
    if (failure == nullptr) {
        std::snprintf(message, sizeof(message), "%s (block %d, %d, %d, thread %d)", what, block.at[0], block.at[1], block.at[2], t.index);
        failure = message;
    }
}

Thread& wait(Operation operation) {
    Thread& me = *static_cast<Thread*>(current);
    me.waits_for = operation;
    to_scheduler(me);
    return me;
}

bool block_barrier(bool x) {
    any_true = any_true || x;
    return wait(Operation::BARRIER).words[0] != 0;
}

void warp_meeting(Operation operation, void* words, int count) {
    Thread& me = *static_cast<Thread*>(current);
    if (count > 0) std::memcpy(me.words, words, 4 * count);
    wait(operation);
    if (count > 0) std::memcpy(words, me.words, 4 * count);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    Thread& me = *static_cast<Thread*>(current);
    std::memcpy(me.words, &row, sizeof(row));
    wait(transposed ? Operation::LOAD_TRANSPOSED : Operation::LOAD);
    std::memcpy(r, me.words, 16);
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool half) {
    Thread& me = *static_cast<Thread*>(current);
    std::memcpy(me.words, c, 16);
    std::memcpy(me.words + 4, a, 16);
    me.words[8] = b0;
    me.words[9] = b1;
    wait(half ? Operation::MULTIPLY_HALF : Operation::MULTIPLY_BFLOAT);
    std::memcpy(c, me.words, 16);
}

void copy_16(void* to, const void* from, bool there) {
    Thread& me = *static_cast<Thread*>(current);
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) fail("a copy of 16 bytes is not aligned", me);
    me.copies.push_back({to, from, there, me.groups});
}

void add_four(float* p, const float (&x)[4]) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return fail("four atomic additions are not aligned", *static_cast<Thread*>(current));
    for (int i = 0; i < 4; ++i) p[i] += x[i];
}

void commit_copies() { ++static_cast<Thread*>(current)->groups; }

void wait_copies(int pending) {
    Thread& me = *static_cast<Thread*>(current);
    size_t done = 0;
    for (; done < me.copies.size() && me.copies[done].group < me.groups - pending; ++done) {
        const Copy& copy = me.copies[done];
        if (copy.there)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
        note_copy(copy.to, me);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<long>(done));
}

uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (x != x) return 0x7fff;
    float size = std::fabs(x);
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));  // to even, as the device
    std::memcpy(&bits, &size, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

const char* run(void (*kernel)(const void*), const void* argument, const int (&grid)[3], int count, int shared_bytes, int order_) {
    if (stacks == nullptr) {
        stacks = static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<size_t>(STACK) * MOST_THREADS));
        for (int i = 0; i < MOST_THREADS; ++i) threads[i].stack = stacks + static_cast<size_t>(STACK) * i;
    }
    std::vector<unsigned char> memory(static_cast<size_t>(shared_bytes) + GUARD + 16);
    block.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    thread_count = count;
    order = order_;
    failure = nullptr;
    entry = kernel;
    entry_argument = argument;
    for (int i = 0; i < 3; ++i) block.grid[i] = grid[i];
    for (int i = 0; i < count; ++i) threads[i].index = i;
    for (block.at[2] = 0; block.at[2] < grid[2]; ++block.at[2])
        for (block.at[1] = 0; block.at[1] < grid[1]; ++block.at[1])
            for (block.at[0] = 0; block.at[0] < grid[0]; ++block.at[0]) {
                std::memset(block.shared, 0xff, static_cast<size_t>(shared_bytes));
                for (int i = 0; i + 8 <= GUARD - 16; i += 8) std::memcpy(block.shared + shared_bytes + i, &CANARY, 8);
                copied.assign(static_cast<size_t>(shared_bytes) / 16 + 1, 0);
                run_block();
                for (int i = 0; i + 8 <= GUARD - 16 && failure == nullptr; i += 8)
                    if (std::memcmp(block.shared + shared_bytes + i, &CANARY, 8) != 0) fail("a write past shared memory", threads[0]);
                if (failure != nullptr) return failure;
            }
    return nullptr;
}

}  // namespace fibers
