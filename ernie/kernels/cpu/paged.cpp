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
#include <vector>

#include "program.h"
#include "cache.h"
#include "tiles.h"

namespace {

constexpr long AHEAD = 16;        // keys
constexpr long FEW_QUERIES = 16;  // at most so many are not worth a tile
constexpr long TASKS = 4;         // for each thread, so that none waits long for the last

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

// --- one split -----------------------------------------------------------------------------------------

struct Partial {  // of some rows: sums of weighted values, not yet divided by the total weight
    float *sums, *maxima, *totals;
    static long floats(long rows, long width) { return (rows * (width + 2) + 15) / 16 * 16; }
    static Partial at(float *memory, long rows, long width) {
        return {memory, memory + rows * width, memory + rows * (width + 1)};
    }
};

// scores[m][r] = <q[m], keys[r]> for M rows and four keys. Each is summed in one order, whatever M.
template <int M, class T>
ERNIE_INLINE void score_tile(const T *const keys[4], const float *q, long ldq, long width, float *scores) {
    vf acc[4][M] = {};
    const T *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
    for (long d = 0; d < width; d += VL) {
        const T *const at[4] = {k0 + d, k1 + d, k2 + d, k3 + d};
        vf x[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) x[m] = load(q + m * ldq + d);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const vf key = load(at[r]);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[r][m] = fma(key, x[m], acc[r][m]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum4(acc[0][m], acc[1][m], acc[2][m], acc[3][m], scores + m * SPLIT);
}

template <class T>
ERNIE_INLINE void score_rows(const T *const four[4], const float *q, long ldq, long rows, long width, float *scores) {
    balanced(rows, DOT_ROWS, [&](long m, long tile) {
        const float *x = q + m * ldq;
        float *to = scores + m * SPLIT;
        switch (tile) {
            case 1: return score_tile<1>(four, x, ldq, width, to);
            case 2: return score_tile<2>(four, x, ldq, width, to);
            case 3: return score_tile<3>(four, x, ldq, width, to);
#if defined(__AVX512F__)
            case 4: return score_tile<4>(four, x, ldq, width, to);
            case 5: return score_tile<5>(four, x, ldq, width, to);
            case 6: return score_tile<6>(four, x, ldq, width, to);
#endif
        }
    });
}

// Keys [first, first + count) for `rows` query rows, of which row i sees the keys below visible(i). `ahead` is
// told of every fourth key when its turn comes in the first and in the second half of the work.
template <class Source, class Visible, class Ahead>
void attend_split(const Source &source, long first, long count, const float *q, long ldq, long rows, long width,
                  float scale, const Visible &visible, float *scores, const Partial &out, const Ahead &ahead) {
    typedef typename Source::Element T;
    float scales[SPLIT];
    for (long j = 0; j < count; j += 4) {
        const T *four[4];
        ahead(0, j);
        source.keys(first + j, first + count - 1, four);
        score_rows(four, q, ldq, rows, width, scores + j);
    }
    const auto scale_columns = [&](long row) {
        for (long j = 0; j < count; j += VL)
            store(scores + row * SPLIT + j, load(scores + row * SPLIT + j) * load(scales + j));
    };
    if (Source::scaled) source.key_scales(first, count, scales);
    const long padded = (count + VL - 1) / VL * VL;
    for (long i = 0; i < rows; i++) {
        const long seen = std::min(visible(i) - first, count);
        out.maxima[i] = -INFINITY, out.totals[i] = 0;
        if (Source::scaled) scale_columns(i);
        if (seen > 0)
            soften(scores + i * SPLIT, seen, padded, scale, out.maxima[i], out.totals[i]);
        else
            memset(scores + i * SPLIT, 0, padded * sizeof(float));
    }
    if (Source::scaled) {
        source.value_scales(first, count, scales);
        for (long i = 0; i < rows; i++) scale_columns(i);
    }
    for (long j = 0, run; j < count; j += run) {
        long stride;
        run = count - j;
        const T *values = source.values(first + j, run, stride);
        for (long k = (j + 3) & ~3L; k < j + run; k += 4) ahead(1, k);
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
    const vf factor = splat(1.0f / all.totals[row]);
    for (long d = 0; d < width; d += VL) store(out + d, load(all.sums + row * width + d) * factor);
}

// --- a tile of a chunk ---------------------------------------------------------------------------------

struct TileScratch;

template <class T>
void attend_chunk(const Call &c, const Piece &piece) {
    const long width = c.width, share = c.heads / c.groups, rows = piece.count;
    const long begin = c.bounds[piece.segment], offset = c.lens[piece.segment] - (c.bounds[piece.segment + 1] - begin);
    const long at = begin + piece.first, head = piece.group * share, end = offset + piece.first + piece.count;
    const Cached<T> cached{c, c.tables + piece.segment * c.table_width, piece.group};
    const long sizes[] = {Widened<T>::floats(width), rows * SPLIT, Partial::floats(rows, width)};
    float *widened = scratch<TileScratch>(sizes[0] + sizes[1] + sizes[2] + Partial::floats(rows * share, width));
    float *scores = widened + sizes[0];
    const Partial split = Partial::at(scores + sizes[1], rows, width);
    const Partial all = Partial::at(split.sums + sizes[2], rows * share, width);
    start(all, rows * share, width);
    for (long first = 0; first < end; first += SPLIT) {
        const long count = std::min(SPLIT, end - first);
        const Widened<T> source(cached, first, count, widened);
        for (long h = 0; h < share; h++) {
            attend_split(source, first, count, c.q + at * c.ldq + (head + h) * width, c.ldq, rows,
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
            const auto ahead = [&](int half, long at) __attribute__((always_inline)) {
                if (half == 0 && at < count) cached.fetch(c.v, first + at);
                if (half == 0 && cold && at + AHEAD < count) cached.fetch(c.k, first + at + AHEAD);
                if (half == 1 && at < next_count) next.fetch(c.k, next_first + at);
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
ERNIE_RECORDABLE(attend_paged)

// Only stores; of the call, what `write` reads.
extern "C" void ernie_write_cache(const Call *call) {
    with_dtype(call->dtype, [&](auto type) { write<decltype(type)>(*call); });
}
ERNIE_RECORDABLE(write_cache)
