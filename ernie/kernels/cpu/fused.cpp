// The operations of serving: products with packed weights, with a norm in front and a residual behind.
//
// Every output is summed by one thread in one order, so results depend neither on the number of threads
// nor on the rows beside a row.
#include <algorithm>
#include <vector>

#include "program.h"
#include "products.h"
#include "rows.h"

namespace {

constexpr long TASK_BYTES = 48 * 1024;     // of weights: small enough to share out evenly
constexpr long CACHE_BYTES = 256 * 1024;   // of rows in one task: a part of the second-level cache
constexpr long SERIAL_PRODUCTS = 64 * 1024;  // below this a second thread costs more than it brings

struct Task {
    const Weight *weight;
    long expert, first_row, rows, first_block, blocks;

    const uint8_t *begin() const { return weight->block(expert, first_block, 0); }
    const uint8_t *end() const { return weight->block(expert, first_block + blocks, 0); }
};

// Blocks of a weight (`pairs`: a block of each part counts as one) times rows [first, first + count).
void add_tasks(std::vector<Task> &tasks, const Weight &w, long expert, long first, long count) {
    const long stride = row_bytes(w), bytes = w.block_bytes() * w.parts, all = w.blocks_of_part();
    const long fits = std::max(CACHE_BYTES / stride, 4L * MOST_ROWS);
    const long chunk = std::max(TASK_BYTES / bytes, w.parts > 1 ? 1L : 2L);  // no block alone
    for (long m = 0; m < count; m += fits)
        for (long b = 0; b < all; b += chunk)
            tasks.push_back({&w, expert, first + m, std::min(fits, count - m), b, std::min(chunk, all - b)});
}

// use(row, index, lanes) for some rows and blocks; TOGETHER blocks are given at once, MOST_ROWS lanes apart.
// Few rows meet several blocks at a time; of many, all meet a block while it is in the cache. This thread will read
// `after` next.
template <int TOGETHER, class Use>
void multiply(const Weight &w, const uint8_t *block, long blocks, const uint8_t *after, const Rows &x, long first,
              long count, const Use &use) {
    const long step = count <= most_rows(w) ? MOST_BLOCKS : TOGETHER, bytes = w.block_bytes();
    for (long b = 0; b < blocks; b += step) {
        const long some = std::min(step, blocks - b);
        const uint8_t *next = b + some < blocks ? block + (b + some) * bytes : after;
        balanced(count, most_rows(w), [&](long m, long rows) {
            Floats out[MOST_BLOCKS * MOST_ROWS];
            tile_of(w, rows)(block + b * bytes, some, bytes, x.row(first + m), x.stride, w.groups(), out, next);
            for (long n = 0; n < some; n += TOGETHER)
                for (long i = 0; i < rows; i++) use(first + m + i, b + n, out + n * MOST_ROWS + i);
        });
    }
}

// to[0, kept) = lanes + each of the others that is given.
void store_sum(float *to, long kept, Floats lanes, const float *bias, const float *residual) {
    if (kept == LANES) {
        if (bias) lanes = lanes + load_floats(bias);
        if (residual) lanes = load_floats(residual) + lanes;
        return store(to, lanes);
    }
    float all[LANES];
    store(all, lanes);
    for (long i = 0; i < kept; i++) {
        if (bias) all[i] += bias[i];
        to[i] = residual ? residual[i] + all[i] : all[i];
    }
}

Floats gated(const Floats &gate, const Floats &up) {
    return each<Floats>([&](int p) { return gate.v[p] * sigmoid(gate.v[p]) * up.v[p]; });
}

// Task i of a gate and up product: hidden rows, `ldh` floats apart.
void run_gate_up(const std::vector<Task> &tasks, long i, const Rows &x, float *hidden, long ldh) {
    const Task &task = tasks[i];
    const uint8_t *after = i + 1 < (long)tasks.size() ? tasks[i + 1].begin() : task.end();
    multiply<2>(*task.weight, task.begin(), 2 * task.blocks, after, x, task.first_row, task.rows,
                [&](long row, long index, const Floats *lanes) {
                    float *to = hidden + row * ldh + (task.first_block + index / 2) * LANES;
                    store(to, gated(lanes[0], lanes[MOST_ROWS]));
                });
}

long padded(long width) { return (width + GROUP - 1) / GROUP * GROUP; }

int threads_for(int threads, long rows, const Weight &w) {
    return rows * w.width * w.outputs * w.parts < SERIAL_PRODUCTS ? 1 : threads;
}

struct InputSlot;
struct HiddenSlot;
struct HiddenRowsSlot;

void project(const Rows &x, long rows, const Weight &w, const float *bias, const float *residual, long ldr,
             float *out, int threads) {
    std::vector<Task> tasks;
    add_tasks(tasks, w, 0, 0, rows);
    const long ld = w.outputs * w.parts;
    parallel_ranges(threads, tasks.size(), [&](long i) {
        const Task &task = tasks[i];
        multiply<1>(w, task.begin(), w.parts * task.blocks, task.end(), x, task.first_row, task.rows,
                    [&](long row, long index, const Floats *lanes) {
                        const long b = task.first_block + index / w.parts;
                        const long column = index % w.parts * w.outputs + b * LANES;
                        store_sum(out + row * ld + column, std::min<long>(LANES, w.outputs - b * LANES), *lanes,
                                  bias ? bias + column : nullptr, residual ? residual + row * ldr + column : nullptr);
                    });
    });
}

// --- mixture of experts ------------------------------------------------------------------------------------

struct NormedSlot;
struct LogitsSlot;
struct SharedSlot;
struct SharedHiddenSlot;
struct SharedHiddenRowsSlot;
struct SortedSlot;

struct Routed {  // a token's share in an expert
    long token, expert;
    float weight;
};

// logits (count, experts) = y @ router.T, where rows of y are padded with zeros.
void route_logits(const float *y, long ldy, long count, long width, const float *router, long experts,
                  float *logits, int threads) {
    parallel_for(threads, (experts + 3) / 4, [&](long task) {
        const long e = task * 4, kept = std::min(4L, experts - e);
        const float *rows[4];
        for (int r = 0; r < 4; r++) rows[r] = router + (e + (r < kept ? r : 0)) * width;
        balanced(count, DOT_ROWS, [&](long m, long tile) {
            float sums[DOT_ROWS][4];
            dot_tile(tile, rows, 4 * width, y + m * ldy, ldy, width, sums);
            for (long i = 0; i < tile; i++)
                for (long r = 0; r < kept; r++) logits[(m + i) * experts + e + r] = sums[i][r];
        });
    });
}

// The chosen experts of one token. `logits` becomes the probabilities, then those of the chosen are
// marked by -1.
void choose(float *logits, const float *bias, long experts, long top_k, float norm_min, long token, Routed *out) {
    const float highest = *std::max_element(logits, logits + experts);
    float sum = 0, chosen = 0;
    for (long e = 0; e < experts; e++) sum += logits[e] = std::exp(logits[e] - highest);
    for (long e = 0; e < experts; e++) logits[e] /= sum;
    for (long k = 0; k < top_k; k++) {
        long best = -1;
        for (long e = 0; e < experts; e++)
            if (logits[e] != -1 && (best < 0 || logits[e] + bias[e] > logits[best] + bias[best])) best = e;
        out[k] = {token, best, logits[best]};
        chosen += logits[best];
        logits[best] = -1;
    }
    for (long k = 0; k < top_k; k++) out[k].weight /= std::max(chosen, norm_min);
}

struct Experts {
    const Weight *gate_up, *down, *shared_gate_up, *shared_down;
};

// Where the rows of each expert begin; `routed` is put in that order, tokens in theirs.
std::vector<long> sort_by_expert(std::vector<Routed> &routed, long experts) {
    std::vector<long> begin(experts + 1, 0);
    for (const Routed &r : routed) begin[r.expert + 1]++;
    for (long e = 0; e < experts; e++) begin[e + 1] += begin[e];
    std::vector<long> next(begin.begin(), begin.end() - 1);
    std::vector<Routed> sorted(routed.size());
    for (const Routed &r : routed) sorted[next[r.expert]++] = r;
    routed.swap(sorted);
    return begin;
}

void run_experts(const float *y, long ldy, long count, std::vector<Routed> &routed, const Experts &e,
                 const float *residual, long ldr, float *out, int threads) {
    const std::vector<long> begin = sort_by_expert(routed, e.gate_up->experts);
    const long rows = routed.size(), width = e.down->outputs;
    const Norm none{};
    const Rows tokens = prepare<InputSlot>(y, ldy, count, none, *e.gate_up, threads);
    const Rows sorted{reinterpret_cast<const uint8_t *>(scratch<SortedSlot>(rows * row_bytes(*e.gate_up) / 4)),
                      row_bytes(*e.gate_up)};
    for (long i = 0; i < rows; i++)
        memcpy(const_cast<uint8_t *>(sorted.row(i)), tokens.row(routed[i].token), sorted.stride);

    std::vector<Task> tasks;
    const Weight *shared = e.shared_gate_up;
    const Rows inputs = shared ? prepare<SharedSlot>(y, ldy, count, none, *shared, threads) : Rows{};
    if (shared) add_tasks(tasks, *shared, 0, 0, count);
    for (long expert = 0; expert < e.gate_up->experts; expert++)
        add_tasks(tasks, *e.gate_up, expert, begin[expert], begin[expert + 1] - begin[expert]);
    const long ldh = padded(e.gate_up->outputs), lds = shared ? padded(shared->outputs) : 0;
    float *hidden = scratch<HiddenSlot>(rows * ldh), *shared_hidden = scratch<SharedHiddenSlot>(count * lds);
    parallel_ranges(threads, tasks.size(), [&](long i) {
        if (tasks[i].weight == shared)
            run_gate_up(tasks, i, inputs, shared_hidden, lds);
        else
            run_gate_up(tasks, i, sorted, hidden, ldh);
    });

    const Rows h = prepare<HiddenRowsSlot>(hidden, ldh, rows, none, *e.down, threads);
    const Rows s = shared ? prepare<SharedHiddenRowsSlot>(shared_hidden, lds, count, none, *e.shared_down, threads)
                          : Rows{};
    const Floats nothing{};
    std::vector<long> chosen;  // experts with rows
    for (long expert = 0; expert < e.gate_up->experts; expert++)
        if (begin[expert + 1] > begin[expert]) chosen.push_back(expert);
    // A task owns some columns of all tokens and adds the experts to them one after the other.
    const long blocks = e.down->blocks_of_part(), together = std::clamp(blocks / (4L * threads), 4L, 16L);
    parallel_ranges(threads, (blocks + together - 1) / together, [&](long task) {
        const long first = task * together, end = std::min(blocks, first + together);
        const auto own = [&](long b) { return std::min<long>(LANES, width - b * LANES); };
        const auto start = [&](long row, long index, const Floats *lanes) {
            const long column = (first + index) * LANES;
            store_sum(out + row * width + column, own(first + index), *lanes, nullptr,
                      residual ? residual + row * ldr + column : nullptr);
        };
        // What is read behind chosen[i]: the next of them, or the first weight's columns of the next task.
        const auto after = [&](size_t i) {
            if (i + 1 < chosen.size()) return e.down->block(chosen[i + 1], first, 0);
            return shared ? e.shared_down->block(0, end, 0) : e.down->block(chosen[0], end, 0);
        };
        if (shared)
            multiply<1>(*e.shared_down, e.shared_down->block(0, first, 0), end - first, after(-1), s, 0, count, start);
        else
            for (long b = first; b < end; b++)
                for (long row = 0; row < count; row++) start(row, b - first, &nothing);
        for (size_t i = 0; i < chosen.size(); i++)
            multiply<1>(*e.down, e.down->block(chosen[i], first, 0), end - first, after(i), h, begin[chosen[i]],
                        begin[chosen[i] + 1] - begin[chosen[i]], [&](long row, long index, const Floats *lanes) {
                            const Routed &r = routed[row];
                            float *to = out + r.token * width + (first + index) * LANES;
                            const vf weight = splat(r.weight);
                            store_sum(to, own(first + index),
                                      each<Floats>([&](int p) { return lanes->v[p] * weight; }), nullptr, to);
                        });
    });
}

}  // namespace

// x (rows, width) with row stride ldx; residual (rows, all outputs) with ldr, or null; bias or null; the norm's
// weight of type `norm_dtype`, or null; out (rows, all outputs) contiguous.
extern "C" void ernie_project(const float *x, long ldx, long rows, const Weight *w, const float *bias,
                              const void *norm, int norm_dtype, float eps, const float *residual, long ldr,
                              float *out, int threads) {
    threads = threads_for(threads, rows, *w);
    const Rows prepared = prepare<InputSlot>(x, ldx, rows, {norm, norm_dtype, eps}, *w, threads);
    project(prepared, rows, *w, bias, residual, ldr, out, threads);
}
ERNIE_RECORDABLE(project)

// gate_up of two parts.
extern "C" void ernie_mlp(const float *x, long ldx, long rows, const Weight *gate_up, const Weight *down,
                          const void *norm, int norm_dtype, float eps, const float *residual, long ldr,
                          float *out, int threads) {
    threads = threads_for(threads, rows, *gate_up);
    const Rows prepared = prepare<InputSlot>(x, ldx, rows, {norm, norm_dtype, eps}, *gate_up, threads);
    std::vector<Task> tasks;
    add_tasks(tasks, *gate_up, 0, 0, rows);
    const long ldh = padded(gate_up->outputs);
    float *hidden = scratch<HiddenSlot>(rows * ldh);
    parallel_ranges(threads, tasks.size(), [&](long i) { run_gate_up(tasks, i, prepared, hidden, ldh); });
    const Rows h = prepare<HiddenRowsSlot>(hidden, ldh, rows, {}, *down, threads);
    project(h, rows, *down, nullptr, residual, ldr, out, threads);
}
ERNIE_RECORDABLE(mlp)

// router (experts, width) and bias (experts) float32; the shared weights may be null.
extern "C" void ernie_moe(const float *x, long ldx, long rows, const float *router, const float *bias,
                          const Weight *gate_up, const Weight *down, const Weight *shared_gate_up,
                          const Weight *shared_down, long top_k, float norm_min, const void *norm, int norm_dtype,
                          float eps, const float *residual, long ldr, float *out, int threads) {
    const long experts = gate_up->experts, width = gate_up->width, ldy = padded(width);
    Weight plain{};  // the form of float32 rows
    plain.width = width;
    float *y = scratch<NormedSlot>(rows * ldy), *logits = scratch<LogitsSlot>(rows * experts);
    const int few = rows * width < SERIAL_COLUMNS ? 1 : threads;
    parallel_for(few, rows, [&](long i) {
        uint8_t *to = reinterpret_cast<uint8_t *>(y + i * ldy);
        if (norm && norm_dtype == BFLOAT16)
            prepare_row(x + i * ldx, static_cast<const bf16 *>(norm), eps, plain, to);
        else
            prepare_row(x + i * ldx, static_cast<const float *>(norm), eps, plain, to);
    });
    route_logits(y, ldy, rows, width, router, experts, logits, threads);
    std::vector<Routed> routed(rows * top_k);
    parallel_for(few, rows, [&](long i) {
        choose(logits + i * experts, bias, experts, top_k, norm_min, i, &routed[i * top_k]);
    });
    run_experts(y, ldy, rows, routed, {gate_up, down, shared_gate_up, shared_down}, residual, ldr, out, threads);
}
ERNIE_RECORDABLE(moe)
