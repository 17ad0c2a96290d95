// Causal attention over the paged cache: chunks of a prompt, and the few newest tokens of a sequence.
//
// The keys of a sequence are met SPLIT at a time, each split by itself, and the splits are joined in their
// order. That is so whatever the chunk, the batch, the blocks and the threads are: the bits of a query's
// result depend on the query and its own keys and values alone. What differs is who works where. A chunk is
// cut into tiles of queries, whose splits follow each other in one thread. Few queries are bound by reading
// the cache: their splits are spread over the threads and joined at the end.
//
//   S sequences   B blocks of P positions   M width of the tables   G key/value heads   d head width
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cache.h"
#include "tiles.h"

namespace {

constexpr long SPLIT = 128;       // keys
constexpr long RUN = 16;          // keys that are widened at a time, so that they stay in the first-level cache
constexpr long FEW_QUERIES = 16;  // at most so many are not worth a tile
constexpr long TASKS = 4;         // for each thread, so that none waits long for the last

// One call; attention.py packs it. All fields have 8 bytes.
struct Call {
    const float *q;             // (T, H, d) with row stride ldq
    int64_t ldq;
    const float *new_k;  // (T, G, d) with row strides: stored first, if there are any
    int64_t ld_new_k;
    const float *new_v;
    int64_t ld_new_v;
    const int64_t *slots;
    int64_t new_tokens;
    char *k, *v;  // (B, P, G, row_bytes) contiguous
    int64_t dtype;
    const int32_t *tables;  // (S, table_width)
    int64_t table_width;
    const int32_t *bounds, *lens;
    int64_t sequences, positions, groups, heads, width;
    float *out;  // (T, H, d)
    int64_t threads;
    double scale;
};

template <class T>
void write_rows(const float *from, long ld, char *cache, const int64_t *slots, long tokens, long groups, long width,
                int threads) {
    const long bytes = row_bytes<T>(width), block = 64;
    parallel_for(tokens * groups * width > 64 * 1024 ? threads : 1, (tokens + block - 1) / block, [&](long i) {
        for (long t = i * block; t < std::min(tokens, (i + 1) * block); t++)
            for (long g = 0; g < groups && slots[t] >= 0; g++)
                narrow_row<T>(from + t * ld + g * width, width, cache + (slots[t] * groups + g) * bytes);
    });
}

// --- where keys and values come from -------------------------------------------------------------------

struct WidenSlot;

// One head of one sequence in the cache.
template <class T>
struct Cached {
    const Call &call;
    const int32_t *table;
    long group, bytes = row_bytes<T>(call.width), ld = call.groups * bytes;

    const char *row(const char *cache, long key) const {
        const long slot = table[key / call.positions] * call.positions + key % call.positions;
        return cache + slot * ld + group * bytes;
    }
    void widen(const char *cache, long first, long count, float *out) const {
        for (long j = 0; j < count; j++) widen_row<T>(row(cache, first + j), call.width, out + j * call.width);
    }
    // `count` (at most RUN, within one multiple of RUN) rows as float32, `stride` apart.
    const float *run(const char *cache, long first, long count, long &stride) const {
        if (std::is_same<T, float>::value && call.positions % RUN == 0) {
            stride = ld / sizeof(float);
            return reinterpret_cast<const float *>(row(cache, first));
        }
        float *out = scratch<WidenSlot>(RUN * call.width);
        widen(cache, first, count, out);
        stride = call.width;
        return out;
    }
    const float *keys(long first, long count, long &stride) const { return run(call.k, first, count, stride); }
    const float *values(long first, long count, long &stride) const { return run(call.v, first, count, stride); }
    void fetch(const char *cache, long key) const {  // into the second-level cache
        for (const char *at = row(cache, key), *end = at + bytes; at < end; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// The same after a whole split was widened, for many queries.
struct Widened {
    const float *k, *v;
    long origin, width;
    const float *keys(long first, long, long &stride) const { return stride = width, k + (first - origin) * width; }
    const float *values(long first, long, long &stride) const { return stride = width, v + (first - origin) * width; }
};

// --- one split -----------------------------------------------------------------------------------------

struct Partial {  // of some rows: sums of weighted values, not yet divided by the total weight
    float *sums, *maxima, *totals;
    static long floats(long rows, long width) { return (rows * (width + 2) + 15) / 16 * 16; }
    static Partial at(float *memory, long rows, long width) {
        return {memory, memory + rows * width, memory + rows * (width + 1)};
    }
};

// Keys [first, first + count) for `rows` query rows, of which row i sees the keys below visible(i). `ahead` is
// told of each key whose turn it is in the first and in the second half of the work.
template <class Source, class Visible, class Ahead>
void attend_split(const Source &source, long first, long count, const float *q, long ldq, long rows, long width,
                  float scale, const Visible &visible, float *scores, const Partial &out, const Ahead &ahead) {
    for (long j = 0; j < count; j += RUN) {
        long stride;
        const long run = std::min(RUN, count - j);
        const float *keys = source.keys(first + j, run, stride);
        for (long k = 0; k < run; k += 4) {
            const float *four[4];
            for (long r = 0; r < 4; r++) four[r] = keys + std::min(k + r, run - 1) * stride;
            ahead(0, j + k);
            balanced(rows, DOT_ROWS, [&](long m, long tile) {
                float sums[DOT_ROWS][4];
                dot_tile(tile, four, 0, q + m * ldq, ldq, width, sums);
                for (long i = 0; i < tile; i++) memcpy(scores + (m + i) * SPLIT + j + k, sums[i], sizeof sums[i]);
            });
        }
    }
    const long padded = (count + VL - 1) / VL * VL;
    for (long i = 0; i < rows; i++) {
        const long seen = std::min(visible(i) - first, count);
        out.maxima[i] = -INFINITY, out.totals[i] = 0;
        if (seen > 0)
            soften(scores + i * SPLIT, seen, padded, scale, out.maxima[i], out.totals[i]);
        else
            memset(scores + i * SPLIT, 0, padded * sizeof(float));
    }
    for (long j = 0; j < count; j += RUN) {
        long stride;
        const long run = std::min(RUN, count - j);
        const float *values = source.values(first + j, run, stride);
        for (long k = 0; k < run; k += 4) ahead(1, j + k);
        outer_gemm(rows, width / VL, run, {scores + j, SPLIT, 1}, values, stride, out.sums, width, j > 0);
    }
}

// One more split of a row joins those before it. A split of which the row sees nothing changes nothing.
void join(const Partial &all, long to, const Partial &split, long from, long width) {
    const float old = all.maxima[to], own = split.maxima[from];
    if (own == -INFINITY) return;
    const float decay = own > old ? std::exp(old - own) : 1.0f, weight = own > old ? 1.0f : std::exp(own - old);
    all.maxima[to] = std::max(old, own);
    all.totals[to] = all.totals[to] * decay + split.totals[from] * weight;
    float *sums = all.sums + to * width;
    const float *added = split.sums + from * width;
    for (long d = 0; d < width; d += VL)
        store(sums + d, fma(load(added + d), splat(weight), load(sums + d) * splat(decay)));
}

void start(const Partial &all, long rows, long width) {
    memset(all.sums, 0, rows * width * sizeof(float));
    for (long i = 0; i < rows; i++) all.maxima[i] = -INFINITY, all.totals[i] = 0;
}

void finish(const Partial &all, long row, long width, float *out) {
    for (long d = 0; d < width; d += VL) store(out + d, load(all.sums + row * width + d) / splat(all.totals[row]));
}

// --- a tile of a chunk ---------------------------------------------------------------------------------

struct TileScratch;

template <class T>
void attend_chunk(const Call &c, const Piece &piece) {
    const long width = c.width, share = c.heads / c.groups, rows = piece.count;
    const long begin = c.bounds[piece.segment], offset = c.lens[piece.segment] - (c.bounds[piece.segment + 1] - begin);
    const long at = begin + piece.first, head = piece.group * share, end = offset + piece.first + piece.count;
    const Cached<T> cached{c, c.tables + piece.segment * c.table_width, piece.group};
    float *k = scratch<TileScratch>(2 * SPLIT * width + rows * SPLIT + Partial::floats(rows * (share + 1), width));
    float *v = k + SPLIT * width, *scores = v + SPLIT * width;
    const Partial split = Partial::at(scores + rows * SPLIT, rows, width);
    const Partial all = Partial::at(split.sums + Partial::floats(rows, width), rows * share, width);
    start(all, rows * share, width);
    for (long first = 0; first < end; first += SPLIT) {
        const long count = std::min(SPLIT, end - first);
        cached.widen(c.k, first, count, k);
        cached.widen(c.v, first, count, v);
        for (long h = 0; h < share; h++) {
            attend_split(Widened{k, v, first, width}, first, count, c.q + at * c.ldq + (head + h) * width, c.ldq, rows,
                         width, c.scale, [&](long i) { return offset + piece.first + i + 1; }, scores, split,
                         [](int, long) {});
            for (long i = 0; i < rows; i++) join(all, h * rows + i, split, i, width);
        }
    }
    for (long h = 0; h < share; h++)
        for (long i = 0; i < rows; i++)
            finish(all, h * rows + i, width, c.out + ((at + i) * c.heads + head + h) * width);
}

// --- few queries ---------------------------------------------------------------------------------------

// Consecutive splits of one sequence, for the groups [group, last_group).
struct Task {
    long sequence, group, last_group, first, count;  // splits
    float *partials;                                 // of the sequence: (splits, groups, rows), see `partial`
};

struct Few {  // what a task needs to know of its sequence
    long queries, rows, length;  // rows of one group, in the order (query, head)
    Few(const Call &c, long sequence)
        : queries(c.bounds[sequence + 1] - c.bounds[sequence]),
          rows(queries * (c.heads / c.groups)),
          length(c.lens[sequence]) {}
    long splits() const { return (length + SPLIT - 1) / SPLIT; }
    Partial partial(const Call &c, float *partials, long split, long group) const {
        return Partial::at(partials + (split * c.groups + group) * Partial::floats(rows, c.width), rows, c.width);
    }
};

struct ScoreSlot;
struct PartialSlot;

template <class T>
void attend_few(const Call &c, const Task &task) {
    const Few few(c, task.sequence);
    const long width = c.width, share = c.heads / c.groups, last = task.first + task.count;
    float *scores = scratch<ScoreSlot>(few.rows * (SPLIT + width)), *packed = scores + few.rows * SPLIT;
    for (long s = task.first; s < last; s++)
        for (long g = task.group; g < task.last_group; g++) {
            const float *q = c.q + c.bounds[task.sequence] * c.ldq + g * share * width;
            long ldq = width;
            if (few.queries > 1) {
                for (long i = 0; i < few.queries; i++)
                    memcpy(packed + i * share * width, q + i * c.ldq, share * width * sizeof(float));
                q = packed;
            }
            const Cached<T> cached{c, c.tables + task.sequence * c.table_width, g};
            const long first = s * SPLIT, count = std::min(SPLIT, few.length - first);
            // The arithmetic hides no memory latency by itself. During the scores ask for the values, and for
            // the keys a little ahead; during the sums for the keys that come next.
            const bool more = g + 1 < task.last_group;
            const Cached<T> next{c, cached.table, more ? g + 1 : task.group};
            const long next_first = more ? first : first + SPLIT;
            const long next_count = more || s + 1 < last ? std::min(SPLIT, few.length - next_first) : 0;
            const bool cold = s == task.first && g == task.group;
            const auto ahead = [&](int half, long at) {
                for (long key = at; key < at + 4; key++) {
                    if (half == 0 && key < count) cached.fetch(c.v, first + key);
                    if (half == 0 && cold && key + RUN < count) cached.fetch(c.k, first + key + RUN);
                    if (half == 1 && key < next_count) next.fetch(c.k, next_first + key);
                }
            };
            attend_split(cached, first, count, q, ldq, few.rows, width, c.scale,
                         [&](long row) { return few.length - few.queries + row / share + 1; }, scores,
                         few.partial(c, task.partials, s, g), ahead);
        }
}

void join_few(const Call &c, const Task &task) {
    const Few few(c, task.sequence);
    const long width = c.width, share = c.heads / c.groups;
    for (long g = task.group; g < task.last_group; g++) {
        // The first split is kept as it is: every row sees its first key.
        const Partial all = few.partial(c, task.partials, 0, g);
        for (long row = 0; row < few.rows; row++) {
            for (long s = 1; s < few.splits(); s++) join(all, row, few.partial(c, task.partials, s, g), row, width);
            const long query = c.bounds[task.sequence] + row / share, head = g * share + row % share;
            finish(all, row, width, c.out + (query * c.heads + head) * width);
        }
    }
}

// --- the whole batch -----------------------------------------------------------------------------------

struct Work {  // kept between calls for its memory
    std::vector<Piece> pieces;
    std::vector<Task> tasks, joins;
};

// A task for each sequence, split and group if there are few of them, else longer ones.
void plan_few(const Call &c, long splits, float *memory, Work &work) {
    const long together = splits >= TASKS * c.threads ? c.groups : 1;
    const long longest = std::max(1L, splits * c.groups / together / (TASKS * c.threads));
    for (long s = 0; s < c.sequences; s++) {
        const Few few(c, s);
        if (few.queries == 0 || few.queries > FEW_QUERIES) continue;
        for (long g = 0; g < c.groups; g += together)
            for (long first = 0; first < few.splits(); first += longest)
                work.tasks.push_back(
                    {s, g, g + together, first, std::min(longest, few.splits() - first), memory});
        for (long g = 0; g < c.groups; g++) work.joins.push_back({s, g, g + 1, 0, 0, memory});
        memory += few.splits() * c.groups * Partial::floats(few.rows, c.width);
    }
}

template <class T>
void attend(const Call &c) {
    static thread_local Work work;
    work.pieces.clear(), work.tasks.clear(), work.joins.clear();
    long splits = 0, floats = 0;
    const long tile = queries_of_tile(c.heads / c.groups);
    for (long s = 0; s < c.sequences; s++) {
        const Few few(c, s);
        if (few.queries > FEW_QUERIES) {
            // The last queries see the most keys: dealt out first, nothing long is left for the end.
            for (long t = (few.queries + tile - 1) / tile - 1; t >= 0; t--)
                for (long g = 0; g < c.groups; g++)
                    work.pieces.push_back({s, g, t * tile, std::min(tile, few.queries - t * tile)});
        } else if (few.queries > 0) {
            splits += few.splits();
            floats += few.splits() * c.groups * Partial::floats(few.rows, c.width);
        }
    }
    if (splits) plan_few(c, splits, scratch<PartialSlot>(floats), work);
    const Work &planned = work;  // `work` would be another one in another thread
    const long num_pieces = planned.pieces.size(), num_tasks = planned.tasks.size();
    parallel_for(c.threads, num_pieces + num_tasks, [&](long index) {
        if (index < num_pieces)
            attend_chunk<T>(c, planned.pieces[index]);
        else
            attend_few<T>(c, planned.tasks[index - num_pieces]);
    });
    // Joining a few splits is quicker than waking a thread.
    parallel_for(floats > 64 * 1024 ? c.threads : 1, planned.joins.size(),
                 [&](long index) { join_few(c, planned.joins[index]); });
}

template <class Run>
void with_dtype(long dtype, const Run &run) {
    switch (dtype) {
        case BFLOAT16: return run(bf16{});
        case FLOAT16: return run(f16{});
        case INT8: return run(int8_t{});
        default: return run(float{});
    }
}

template <class T>
void write(const Call &c) {
    write_rows<T>(c.new_k, c.ld_new_k, c.k, c.slots, c.new_tokens, c.groups, c.width, c.threads);
    write_rows<T>(c.new_v, c.ld_new_v, c.v, c.slots, c.new_tokens, c.groups, c.width, c.threads);
}

}  // namespace

// Stores the new keys and values if there are some, then attends.
extern "C" void ernie_attend_paged(const Call *call) {
    with_dtype(call->dtype, [&](auto type) {
        if (call->new_tokens) write<decltype(type)>(*call);
        attend<decltype(type)>(*call);
    });
}

// Only stores; of the call, what `write` reads.
extern "C" void ernie_write_cache(const Call *call) {
    with_dtype(call->dtype, [&](auto type) { write<decltype(type)>(*call); });
}
