// Work sharing on torch's own OpenMP pool, and scratch memory of each thread.
//
// A second pool would spin against torch's on the same cores. So the library links no OpenMP runtime:
// build.py looks up what it needs in the one that torch has loaded and hands it over. (libgomp, and
// LLVM's and Intel's runtimes, export it.)
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdlib>

typedef void (*ParallelCall)(void (*)(void *), void *, unsigned, unsigned);
extern ParallelCall gomp_parallel;  // both are set once, by ernie_start
extern int (*num_threads_of_team)();

// Threads that stay together from one parallel loop to the next, while a program is replayed. Between loops
// they wait awake for some microseconds, then give way to whoever wants the processor.
class Team {
  public:
    // On the leader: everybody runs run(argument) once.
    void lead(void (*run)(void *), void *argument) {
        run_ = run, argument_ = argument;
        ended_.store(0, std::memory_order_relaxed);
        loops_.fetch_add(1, std::memory_order_release);
        run(argument);
        wait([&] { return ended_.load(std::memory_order_acquire) == others; });
    }
    // On the others: run what the leader leads, until it dismisses them.
    void follow() {
        for (long seen = 1;; seen++) {
            wait([&] { return loops_.load(std::memory_order_acquire) == seen; });
            if (!run_) return;
            run_(argument_);
            ended_.fetch_add(1, std::memory_order_release);
        }
    }
    void dismiss() {
        run_ = nullptr;
        loops_.fetch_add(1, std::memory_order_release);
    }
    int others = 0;  // threads beside the leader

  private:
    template <class Condition>
    static void wait(const Condition &condition) {
        for (long spins = 0; !condition(); spins++) {
            if (spins >= 4096) sched_yield();
#if defined(__SSE2__)
            __builtin_ia32_pause();
#endif
        }
    }
    alignas(64) std::atomic<long> loops_{0};
    void (*run_)(void *) = nullptr;
    void *argument_ = nullptr;
    alignas(64) std::atomic<int> ended_{0};
};
inline thread_local Team *team = nullptr;  // that this thread leads

// run(work) on every thread. The team is always the whole pool: libgomp ends the threads that a smaller team
// leaves over and would have to start them again.
template <class Work>
static void on_all_threads(int threads, Work &work) {
    const auto run = [](void *argument) { static_cast<Work *>(argument)->run(); };
    team ? team->lead(run, &work) : gomp_parallel(run, &work, threads, 0);
}

// body(i) for i in [0, count), in any order, on up to `threads` threads.
template <class Body>
static void parallel_for(int threads, long count, const Body &body) {
    if (threads <= 1 || count <= 1) {
        for (long i = 0; i < count; i++) body(i);
        return;
    }
    struct Shared {
        std::atomic<long> next;
        long count;
        const Body &body;
        void run() {
            for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
        }
    } shared{{0}, count, body};
    on_all_threads(threads, shared);
}

// The same, but each thread goes through neighbours in their order, then helps the others: what a body asks of
// memory beyond its own share is then for the same thread.
template <class Body>
static void parallel_ranges(int threads, long count, const Body &body) {
    constexpr long MOST_RANGES = 64;
    if (threads <= 1 || count <= 1) return parallel_for(1, count, body);
    struct alignas(64) Range {
        std::atomic<long> next;
        long end;
    };
    struct Shared {
        std::atomic<long> arrived;
        long num_ranges;
        const Body &body;
        Range ranges[MOST_RANGES];
        void run() {
            const long own = arrived.fetch_add(1, std::memory_order_relaxed);
            for (long r = own; r < own + num_ranges; r++) {
                Range &range = ranges[r % num_ranges];
                for (long i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) body(i);
            }
        }
    } shared{{0}, threads < MOST_RANGES ? threads : MOST_RANGES, body, {}};
    for (long r = 0; r < shared.num_ranges; r++) {
        shared.ranges[r].next = count * r / shared.num_ranges;
        shared.ranges[r].end = count * (r + 1) / shared.num_ranges;
    }
    on_all_threads(threads, shared);
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
