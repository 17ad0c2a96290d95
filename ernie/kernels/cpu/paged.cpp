// Causal attention over the paged cache: chunks of a prompt, and the few newest tokens of a sequence.
//
// A chunk goes through the tiles of the packed row. Few queries are bound by reading the cache: their keys
// are split, SPLIT at a time whatever the batch and the number of threads, so that all cores work on one
// long context and no sequence's result depends on its neighbours; a last step joins the splits.
//
//   S sequences   B blocks of P positions   M width of the tables   G key/value heads   d head width
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

constexpr long SPLIT = 128;       // keys
constexpr long FEW_QUERIES = 16;  // at most so many take the split path

template <class T>
struct Cache {
    const T *k, *v;
    const int32_t *tables;
    long positions, row;  // P, and G * d
    const T *at(const T *base, const int32_t *table, long group_offset, long key) const {
        return base + (table[key / positions] * positions + key % positions) * row + group_offset;
    }
};

template <class T>
struct PagedKeys {  // for attend_tile: gathers a tile, block by block
    const Cache<T> &cache;
    const int32_t *table;
    long offset, width;
    const float *tile(long first, long count, float *tile_k, float *tile_v, long &ldv) const {
        T rows[KEYS * 512];
        for (long j = 0; j < count; j++) {
            memcpy(rows + j * width, cache.at(cache.k, table, offset, first + j), width * sizeof(T));
            const T *value = cache.at(cache.v, table, offset, first + j);
            for (long d = 0; d < width; d += VL) store(tile_v + j * width + d, load(value + d));
        }
        transpose(rows, width, count, width, tile_k);
        ldv = width;
        return tile_v;
    }
};

// Some keys of one sequence, for all its query rows in the order (group, query, head of the group). All
// groups together, so that the cache is read as it lies: whole rows of G * d.
struct Split {
    long segment, first, count;
    float *sums, *maxima, *totals;  // (rows, d), (rows), (rows): unnormalised
};

constexpr long AHEAD = 16;  // keys

struct SplitSlot;
struct JoinSlot;

template <class T>
ERNIE_INLINE void fetch(const T *row, long width) {  // into the second-level cache
    for (long d = 0; d < width; d += 64 / (long)sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

template <class T>
void run_split(const Shape &shape, const Cache<T> &cache, const int32_t *table, const float *q, long ldq,
               long queries, long length, const Split &split) {
    const long width = shape.width, share = shape.share(), rows = queries * share;
    const long padded = padded_width<T>(width);
    float *packed = scratch<SplitSlot>(shape.groups * rows * (padded + SPLIT));
    float *scores = packed + shape.groups * rows * padded;
    for (long g = 0, row = 0; g < shape.groups; g++)
        for (long i = 0; i < queries; i++)
            for (long h = g * share; h < (g + 1) * share; h++, row++)
                pack_row<T>(q + i * ldq + h * width, width, packed + row * padded);
    for (long j = 0; j < split.count; j += 4)
        for (long g = 0; g < shape.groups; g++) {
            // The arithmetic hides no memory latency by itself: ask for later keys, and for the values.
            for (long key = j; key < std::min(j + 4, split.count); key++) {
                fetch(cache.at(cache.v, table, g * width, split.first + key), width);
                if (key + AHEAD < split.count)
                    fetch(cache.at(cache.k, table, g * width, split.first + key + AHEAD), width);
            }
            const T *keys[4];
            for (long r = 0; r < 4; r++) {
                const long key = j + r < split.count ? j + r : split.count - 1;
                keys[r] = cache.at(cache.k, table, g * width, split.first + key);
            }
            balanced(rows, DOT_ROWS, [&](long m, long tile) {
                float sums[DOT_ROWS][4];
                m += g * rows;
                dot_tile(tile, keys, 4 * cache.row, packed + m * padded, padded, width, sums);
                for (long i = 0; i < tile; i++) memcpy(scores + (m + i) * SPLIT + j, sums[i], sizeof sums[i]);
            });
        }
    const long vectors = (split.count + VL - 1) / VL;
    for (long row = 0; row < shape.groups * rows; row++) {
        const long seen = length - queries + row % rows / share + 1 - split.first;
        split.maxima[row] = -INFINITY, split.totals[row] = 0;
        if (seen > 0)
            soften(scores + row * SPLIT, seen < split.count ? seen : split.count, vectors * VL, shape.scale,
                   split.maxima[row], split.totals[row]);
        else
            memset(scores + row * SPLIT, 0, split.count * sizeof(float));
    }
    for (long j = 0, run; j < split.count; j += run) {
        const long left = cache.positions - (split.first + j) % cache.positions;
        run = left < split.count - j ? left : split.count - j;
        run = run < 16 ? run : 16;  // rows of all groups that fit the first-level cache
        for (long g = 0; g < shape.groups; g++)
            outer_gemm(rows, width / VL, run, {scores + g * rows * SPLIT + j, SPLIT, 1},
                       cache.at(cache.v, table, g * width, split.first + j), cache.row,
                       split.sums + g * rows * width, width, j > 0);
    }
}

// The `count` splits of a sequence, joined into one head's output for one query.
void join(const Shape &shape, const Split *splits, long count, long row, float *out) {
    float maximum = -INFINITY, total = 0;
    for (long s = 0; s < count; s++) maximum = std::max(maximum, splits[s].maxima[row]);
    for (long d = 0; d < shape.width; d += VL) store(out + d, vf{});
    for (long s = 0; s < count; s++) {
        const float weight = std::exp(splits[s].maxima[row] - maximum);
        total += weight * splits[s].totals[row];
        for (long d = 0; d < shape.width; d += VL)
            store(out + d, fma(load(splits[s].sums + row * shape.width + d), splat(weight), load(out + d)));
    }
    multiply(out, shape.width, 1.0f / total);
}

template <class T>
void attend(const Shape &shape, const Cache<T> &cache, long table_width, const float *q, long ldq,
            const int32_t *bounds, const int32_t *lens, long sequences, float *out) {
    const long width = shape.width, share = shape.share(), groups = shape.groups;
    const long tile = queries_of_tile(shape);
    std::vector<Piece> pieces;
    std::vector<Split> splits;
    std::vector<long> firsts;  // the first split of each sequence that has some
    long floats = 0;
    for (long s = 0; s < sequences; s++) {
        const long queries = bounds[s + 1] - bounds[s];
        if (queries > FEW_QUERIES)
            for (long t = (queries + tile - 1) / tile - 1; t >= 0; t--)
                for (long g = 0; g < groups; g++)
                    pieces.push_back({s, g, t * tile, queries - t * tile < tile ? queries - t * tile : tile});
        else if (queries > 0) {
            firsts.push_back(splits.size());
            for (long k = 0; k < lens[s]; k += SPLIT) {
                splits.push_back({s, k, lens[s] - k < SPLIT ? lens[s] - k : SPLIT, nullptr, nullptr, nullptr});
                floats += queries * shape.heads * (width + 2);
            }
        }
    }
    float *memory = scratch<JoinSlot>(floats);
    for (Split &split : splits) {
        const long rows = (bounds[split.segment + 1] - bounds[split.segment]) * shape.heads;
        split.sums = memory, split.maxima = memory + rows * width, split.totals = split.maxima + rows;
        memory += rows * (width + 2);
    }
    const long num_pieces = pieces.size();
    parallel_for(shape.threads, num_pieces + splits.size(), [&](long index) {
        if (index < num_pieces) {
            const Piece &p = pieces[index];
            const long at = bounds[p.segment] + p.first, head = p.group * share;
            const PagedKeys<T> keys{cache, cache.tables + p.segment * table_width, p.group * width, width};
            attend_tile(shape, keys, q + at * ldq + head * width, ldq, p.first, p.count,
                        lens[p.segment] - (bounds[p.segment + 1] - bounds[p.segment]),
                        out + (at * shape.heads + head) * width, nullptr);
        } else {
            const Split &split = splits[index - num_pieces];
            const long s = split.segment;
            run_split(shape, cache, cache.tables + s * table_width, q + bounds[s] * ldq, ldq,
                      bounds[s + 1] - bounds[s], lens[s], split);
        }
    });
    parallel_for(firsts.size() > 4 ? shape.threads : 1, firsts.size(), [&](long index) {
        const Split *first = &splits[firsts[index]];
        const long s = first->segment, queries = bounds[s + 1] - bounds[s];
        for (long g = 0, row = 0; g < groups; g++)
            for (long i = 0; i < queries; i++)
                for (long h = g * share; h < (g + 1) * share; h++, row++)
                    join(shape, first, (lens[s] + SPLIT - 1) / SPLIT, row,
                         out + ((bounds[s] + i) * shape.heads + h) * width);
    });
}

}  // namespace

// q (T, H, d) with row stride ldq; caches (B, P, G, d) contiguous; tables (S, table_width); out (T, H, d).
extern "C" void ernie_attend_paged(const float *q, long ldq, const void *k, const void *v, int dtype,
                                   const int32_t *tables, long table_width, const int32_t *bounds,
                                   const int32_t *lens, long sequences, long positions, long heads,
                                   long groups, long width, float scale, float *out, int threads) {
    const Shape shape{heads, groups, width, scale, threads};
    const auto run = [&](auto type) {
        using T = decltype(type);
        const Cache<T> cache{static_cast<const T *>(k), static_cast<const T *>(v), tables, positions, groups * width};
        attend(shape, cache, table_width, q, ldq, bounds, lens, sequences, out);
    };
    if (dtype == BFLOAT16) return run(bf16{});
    if (dtype == FLOAT16) return run(f16{});
    run(float{});
}
