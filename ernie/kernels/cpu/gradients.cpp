// Products of the backward pass, float32: what reaches the rows, and what reaches the weights.
//
//   rows      out[n][i] (+)= sum_o grad[n][o] * weight[o][i]
//   weights   out[o][i]  += sum_n grad[n][o] * x[n][i]
//
// for one weight, or for each expert and the rows sorted to it. Both are A @ B with B as it lies in memory; a part
// of B is copied so that a panel of it is contiguous, and a transposed A too. Sums go through the inner dimension
// in one order, whatever the threads.
#include <algorithm>
#include <vector>

#include "products.h"
#include "threads.h"

namespace {

constexpr long DEPTH = 256;                       // of a part of A and B
constexpr long PANEL = OUTER_VECTORS * VL;        // columns of B side by side in the registers
constexpr long COLUMNS = 4 * PANEL;               // of one task
constexpr long ROWS = 16 * OUTER_ROWS;            // of one task

// C (rows, columns) = A @ B, or += with `add`; C and B are contiguous along columns.
template <class B>
struct Problem {
    Broadcast a;
    const B *b;
    long ldb;
    float *c;
    long ldc, rows, columns, depth;
    bool add;
};

struct Task {
    long problem, row, rows, column, columns;
};

// B[depth][columns] as panels [depth][PANEL], zeros behind the last column.
template <class B>
void pack_panels(const B *b, long ldb, long depth, long columns, float *out) {
    for (long n = 0; n < columns; n += PANEL, out += depth * PANEL)
        for (long k = 0; k < depth; k++) {
            const B *from = b + k * ldb + n;
            float *to = out + k * PANEL;
            const long kept = std::min(PANEL, columns - n), whole = kept / VL * VL;
            for (long v = 0; v < whole; v += VL) store(to + v, load(from + v));
            if (whole < kept) {
                B tail[VL] = {};
                memcpy(tail, from + whole, (kept - whole) * sizeof(B));
                store(to + whole, load(tail));
            }
        }
}

// Rows of a transposed A, whose neighbours are far apart for each k: side by side.
Broadcast pack_rows(Broadcast a, long rows, long depth, float *out) {
    for (long k = 0; k < depth; k++) memcpy(out + k * ROWS, a.data + k * a.column, rows * sizeof(float));
    return {out, 1, ROWS};
}

struct TaskSlot;

template <class B>
void run_task(const Problem<B> &p, const Task &task) {
    float *panels = scratch<TaskSlot>(DEPTH * COLUMNS + DEPTH * ROWS + ROWS * PANEL);
    float *turned = panels + DEPTH * COLUMNS, *edge = turned + DEPTH * ROWS;
    const long whole = task.columns / PANEL * PANEL, ragged = task.columns - whole;
    float *c = p.c + task.row * p.ldc + task.column;
    const long padded = (ragged + VL - 1) / VL * VL;
    memset(edge, 0, ROWS * PANEL * sizeof(float));
    if (p.add && ragged)
        for (long m = 0; m < task.rows; m++) memcpy(edge + m * PANEL, c + m * p.ldc + whole, ragged * sizeof(float));
    for (long k = 0; k < p.depth; k += DEPTH) {
        const long depth = std::min(DEPTH, p.depth - k);
        pack_panels(p.b + k * p.ldb + task.column, p.ldb, depth, task.columns, panels);
        Broadcast all{p.a.data + task.row * p.a.row + k * p.a.column, p.a.row, p.a.column};
        if (all.row == 1) all = pack_rows(all, task.rows, depth, turned);
        balanced(task.rows, OUTER_ROWS, [&](long m, long tile) {
            const Broadcast a{all.data + m * all.row, all.row, all.column};
            const bool add = p.add || k > 0;
            for (long n = 0; n < whole; n += PANEL)
                outer_gemm(tile, OUTER_VECTORS, depth, a, panels + n * depth, PANEL, c + m * p.ldc + n, p.ldc, add);
            if (ragged)
                outer_gemm(tile, padded / VL, depth, a, panels + whole * depth, PANEL, edge + m * PANEL, PANEL, true);
        });
    }
    if (ragged)
        for (long m = 0; m < task.rows; m++) memcpy(c + m * p.ldc + whole, edge + m * PANEL, ragged * sizeof(float));
}

template <class B>
void solve(const std::vector<Problem<B>> &problems, int threads) {
    std::vector<Task> tasks;
    long products = 0;
    for (long i = 0; i < (long)problems.size(); i++) {
        const Problem<B> &p = problems[i];
        products += p.rows * p.columns * p.depth;
        for (long n = 0; n < p.columns; n += COLUMNS)
            for (long m = 0; m < p.rows; m += ROWS)
                tasks.push_back({i, m, std::min(ROWS, p.rows - m), n, std::min(COLUMNS, p.columns - n)});
    }
    parallel_for(products < SERIAL_PRODUCTS ? 1 : threads, tasks.size(),
                 [&](long i) { run_task(problems[tasks[i].problem], tasks[i]); });
}

template <class W>
void rows_gradient(const float *grad, long ldg, const W *weight, float *out, const int64_t *counts, long groups,
                   long outputs, long width, bool add, int threads) {
    std::vector<Problem<W>> problems;
    for (long g = 0, row = 0; g < groups; row += counts[g++])
        problems.push_back({{grad + row * ldg, ldg, 1}, weight + g * outputs * width, width, out + row * width, width,
                            counts[g], width, outputs, add});
    solve(problems, threads);
}

}  // namespace

// grad (rows, outputs) with row stride ldg, sorted by group, counts[g] rows each; weight (groups, outputs, width)
// contiguous; set, or with `add` added to, out (rows, width), contiguous. One group needs no counts.
extern "C" void ernie_rows_gradient(const float *grad, long ldg, const void *weight, int dtype, float *out,
                                    const int64_t *counts, long groups, long rows, long outputs, long width,
                                    int add, int threads) {
    const int64_t all = rows;
    if (!counts) counts = &all;
    if (dtype == BFLOAT16)
        rows_gradient(grad, ldg, static_cast<const bf16 *>(weight), out, counts, groups, outputs, width, add, threads);
    else
        rows_gradient(grad, ldg, static_cast<const float *>(weight), out, counts, groups, outputs, width, add, threads);
}

// grad (rows, outputs) and x (rows, width) with row strides ldg and ldx; added to out (groups, outputs, width),
// contiguous. Counts as above.
extern "C" void ernie_weight_gradient(const float *grad, long ldg, const float *x, long ldx, float *out,
                                      const int64_t *counts, long groups, long rows, long outputs, long width,
                                      int threads) {
    const int64_t all = rows;
    if (!counts) counts = &all;
    std::vector<Problem<float>> problems;
    for (long g = 0, row = 0; g < groups; row += counts[g++])
        problems.push_back({{grad + row * ldg, 1, ldg}, x + row * ldx, ldx, out + g * outputs * width, width, outputs,
                            width, counts[g], true});
    solve(problems, threads);
}
