// What the machine can do at most: bytes moved and float32 operations a second, by all threads.
#include "threads.h"
#include "vec.h"

ParallelCall gomp_parallel = nullptr;
extern "C" void ernie_start(void *parallel) { gomp_parallel = reinterpret_cast<ParallelCall>(parallel); }

constexpr long PIECE = 1 << 18;  // floats

// The sum of `count` floats, so that none of the reads can be left out.
extern "C" float read_all(const float *data, long count, int threads) {
    float total = 0;
    parallel_for(threads, count / PIECE, [&](long i) {
        vf sums[8] = {};
        for (long k = i * PIECE; k < (i + 1) * PIECE; k += 8 * VL)
            for (int j = 0; j < 8; j++) sums[j] += load(data + k + j * VL);
        for (int j = 1; j < 8; j++) sums[0] += sums[j];
        if (sum(sums[0]) == 0.12345f) total = 1;
    });
    return total;
}

// y = x + 2 y: two floats read and one written for each element.
extern "C" void update_all(const float *x, float *y, long count, int threads) {
    parallel_for(threads, count / PIECE, [&](long i) {
        for (long k = i * PIECE; k < (i + 1) * PIECE; k += VL)
            store(y + k, fma(load(y + k), splat(2.0f), load(x + k)));
    });
}

// `rounds` times 12 independent multiply-adds of VL lanes on each thread.
extern "C" float multiply_add(long rounds, int threads) {
    float total = 0;
    parallel_for(threads, threads, [&](long) {
        vf sums[12];
        for (int j = 0; j < 12; j++) sums[j] = splat(j);  // all different: equal ones would be computed once
        const vf factor = splat(0.5f), term = splat(1.0f);
        for (long k = 0; k < rounds; k++)
            for (int j = 0; j < 12; j++) sums[j] = fma(sums[j], factor, term);
        for (int j = 1; j < 12; j++) sums[0] += sums[j];
        if (sum(sums[0]) == 0.12345f) total = 1;
    });
    return total;
}

extern "C" int lanes() { return VL; }
