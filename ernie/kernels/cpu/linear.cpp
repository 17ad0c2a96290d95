// Products of float32 rows with float32 or bfloat16 weights, for one weight or one for each expert.
//
// A block of weight rows is read from memory once and multiplied with all rows of x that it meets, which
// stay in the second-level cache: memory speed for a few rows, arithmetic speed for many.
#include <vector>

#include "products.h"
#include "threads.h"

namespace {

struct Task {
    long row, rows;      // of x and out
    long output, outputs;  // of the weight
    long group;
};

constexpr long CACHE_FLOATS = 96 * 1024;    // of x in one task: 384 KiB, a part of the second-level cache
constexpr long WEIGHT_BYTES = 64 * 1024;    // of one task: small enough to share out evenly

template <class W>
void run_task(const Task &task, const float *x, long ldx, const W *weight, long width, long outputs,
              const float *bias, float *out, long ldo) {
    const W *base = weight + task.group * outputs * width;
    for (long o = task.output; o < task.output + task.outputs; o += 4) {
        const long kept = outputs - o < 4 ? outputs - o : 4;
        const W *rows[4];
        for (int r = 0; r < 4; r++) rows[r] = base + (o + (r < kept ? r : 0)) * width;
        balanced(task.rows, DOT_ROWS, [&](long m, long tile) {
            float sums[DOT_ROWS][4];
            dot_tile(tile, rows, 4 * width, x + (task.row + m) * ldx, ldx, width, sums);
            for (long i = 0; i < tile; i++)
                for (long r = 0; r < kept; r++)
                    out[(task.row + m + i) * ldo + o + r] =
                        sums[i][r] + (bias ? bias[o + r] : 0.0f);
        });
    }
}

template <class W>
void product(const float *x, long ldx, const W *weight, const float *bias, float *out, long ldo,
             const int64_t *counts, long groups, long total, long width, long outputs, int threads) {
    struct Packed;
    const long padded = padded_width<W>(width);
    if (total * outputs * width < SERIAL_PRODUCTS) threads = 1;
    if (Steps<W>::parts > 1 || padded != width) {
        float *packed = scratch<Packed>(total * padded);
        const float *unpacked = x;
        const long ld = ldx;
        parallel_for(total * padded < 32 * 1024 ? 1 : threads, total,
                     [&](long t) { pack_row<W>(unpacked + t * ld, width, packed + t * padded); });
        x = packed, ldx = padded;
    }
    const long share = WEIGHT_BYTES / (width * (long)sizeof(W)) / 4 * 4;
    const long chunk = share < 4 ? 4 : share > 64 ? 64 : share;
    const long fits = CACHE_FLOATS / padded / DOT_ROWS * DOT_ROWS;
    const long block = fits < 4 * DOT_ROWS ? 4 * DOT_ROWS : fits;
    std::vector<Task> tasks;
    for (long g = 0, row = 0; g < groups; row += counts[g++])
        for (long m = 0; m < counts[g]; m += block)
            for (long o = 0; o < outputs; o += chunk)
                tasks.push_back({row + m, counts[g] - m < block ? counts[g] - m : block, o,
                                 outputs - o < chunk ? outputs - o : chunk, g});
    parallel_for(threads, tasks.size(),
                 [&](long i) { run_task(tasks[i], x, ldx, weight, width, outputs, bias, out, ldo); });
}

}  // namespace

// x (rows, width) with row stride ldx, sorted by group, counts[g] rows each; weight (groups, outputs, width)
// contiguous; bias (outputs) or null; out (rows, outputs) with row stride ldo. One group needs no counts.
extern "C" void ernie_linear(const float *x, long ldx, const void *weight, int dtype, const float *bias,
                             float *out, long ldo, const int64_t *counts, long groups, long rows,
                             long width, long outputs, int threads) {
    const int64_t all = rows;
    if (!counts) counts = &all;
    if (dtype == BFLOAT16)
        product(x, ldx, static_cast<const bf16 *>(weight), bias, out, ldo, counts, groups, rows,
                width, outputs, threads);
    else
        product(x, ldx, static_cast<const float *>(weight), bias, out, ldo, counts, groups, rows,
                width, outputs, threads);
}
