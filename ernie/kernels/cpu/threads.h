// Work sharing on torch's own OpenMP pool, and scratch memory of each thread.
//
// A second pool would spin against torch's on the same cores. So the library links no OpenMP runtime:
// build.py looks up GOMP_parallel in the one that torch has loaded and hands it over. (libgomp, and
// LLVM's and Intel's runtimes, export it.)
#pragma once

#include <atomic>
#include <cstdlib>

typedef void (*ParallelCall)(void (*)(void *), void *, unsigned, unsigned);
extern ParallelCall gomp_parallel;  // set once, by ernie_start

// body(i) for i in [0, count), in any order, on up to `threads` threads. The team is always the whole pool:
// libgomp ends the threads that a smaller team leaves over and would have to start them again.
template <class Body>
static void parallel_for(int threads, long count, const Body &body) {
    if (threads <= 1 || count <= 1) {
        for (long i = 0; i < count; i++) body(i);
        return;
    }
    struct Shared {
        std::atomic<long> next;
        long count;
        const Body *body;
    } shared{{0}, count, &body};
    gomp_parallel(
        [](void *argument) {
            Shared &work = *static_cast<Shared *>(argument);
            for (long i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;)
                (*work.body)(i);
        },
        &shared, threads, 0);
}

// Memory kept between calls; each thread and each `Slot` type has its own.
template <class Slot>
static float *scratch(size_t floats) {
    struct Buffer {
        void *memory = nullptr;
        size_t size = 0;
        ~Buffer() { free(memory); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < floats) {
        free(buffer.memory);
        buffer.size = (floats + floats / 4 + 15) / 16 * 16;
        buffer.memory = aligned_alloc(64, buffer.size * sizeof(float));
        if (!buffer.memory) abort();
    }
    return static_cast<float *>(buffer.memory);
}
