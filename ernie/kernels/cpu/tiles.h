// Tiles of attention: the forward pass of a packed row and of a chunk of a prompt.
//
// No matrix of scores exists: a tile of queries meets one tile of KEYS keys after the other, with a running
// maximum and sum (Source: FlashAttention, arXiv:2205.14135 and 2307.08691). Keys are transposed once for
// all query heads of their group. Everything is float32.
#pragma once

#include <cmath>

#include "products.h"
#include "threads.h"

constexpr long KEYS = 64;

struct Shape {
    long heads, groups, width;
    float scale;
    int threads;
    bool causal = true;
    long share() const { return heads / groups; }
    // How many of a segment's keys query `i` of it sees.
    long seen(long i, long length) const { return causal ? i + 1 : length; }
};

// rows[count][width] with stride ld -> out[width][KEYS], zeros behind `count` up to a whole vector.
template <class T>
static void transpose(const T *rows, long ld, long count, long width, float *out) {
    const long padded = (count + VL - 1) / VL * VL;
    for (long d = 0; d < width; d += VL)
        for (long j = 0; j < padded; j++) {
            float lanes[VL] = {};
            if (j < count) store(lanes, load(rows + j * ld + d));
            for (long i = 0; i < VL; i++) out[(d + i) * KEYS + j] = lanes[i];
        }
}

ERNIE_INLINE vf lanes_below(long limit, long start, vf inside, vf outside) {
    vi index;
    for (int i = 0; i < VL; i++) index[i] = i;
    return index < (vi{} + (int32_t)(limit - start)) ? inside : outside;
}

// Scores of one row -> weights: sees `visible` of `padded` columns. Returns what the older sums must be
// multiplied with, and updates the row's running maximum and sum.
static float soften(float *scores, long visible, long padded, float scale, float &maximum, float &total) {
    vf top = splat(-INFINITY);
    for (long j = 0; j < padded; j += VL) {
        const vf s = lanes_below(visible, j, load(scores + j) * splat(scale), splat(-INFINITY));
        store(scores + j, s);
        top = vmax(top, s);
    }
    const float highest = largest(top), old = maximum;
    maximum = highest > old ? highest : old;
    vf added = {};
    for (long j = 0; j < padded; j += VL) {
        const vf p = lanes_below(visible, j, vexp(load(scores + j) - splat(maximum)), vf{});
        store(scores + j, p);
        added += p;
    }
    const float decay = old == -INFINITY ? 0.0f : std::exp(old - maximum);
    total = total * decay + sum(added);
    return decay;
}

static void multiply(float *row, long width, float factor) {
    for (long d = 0; d < width; d += VL) store(row + d, load(row + d) * splat(factor));
}

struct Piece {  // queries [first, first + count) of a segment, heads of one group
    long segment, group, first, count;
};

struct TileSlot;

static long queries_of_tile(long share) { return share >= 4 ? 32 : 64; }

// Queries [first, first + count) of a sequence of `length` tokens and all heads of one group. `Keys` gives the
// keys of a tile transposed and its values as rows.
template <class Keys>
static void attend_tile(const Shape &shape, const Keys &keys, const float *q, long ldq, long first, long count,
                 long length, float *out, float *lse) {
    const long width = shape.width, share = shape.share(), rows = share * count;
    float *tile_k = scratch<TileSlot>(KEYS * width * 2 + count * KEYS + rows * (width + 2));
    float *tile_v = tile_k + KEYS * width, *scores = tile_v + KEYS * width;
    float *sums = scores + count * KEYS, *maxima = sums + rows * width, *totals = maxima + rows;
    for (long i = 0; i < rows; i++) maxima[i] = -INFINITY, totals[i] = 0;
    memset(sums, 0, rows * width * sizeof(float));
    const long end = shape.seen(first + count - 1, length);
    for (long k = 0; k < end; k += KEYS) {
        const long num = end - k < KEYS ? end - k : KEYS, vectors = (num + VL - 1) / VL;
        long ldv;
        const float *values = keys.tile(k, num, tile_k, tile_v, ldv);
        for (long h = 0; h < share; h++) {
            outer_gemm(count, vectors, width, {q + h * width, ldq, 1}, tile_k, KEYS, scores, KEYS, false);
            float *own = sums + h * count * width;
            for (long i = 0; i < count; i++) {
                const long seen = shape.seen(first + i, length) - k, visible = seen < num ? seen : num;
                const long row = h * count + i;
                if (visible <= 0) {
                    memset(scores + i * KEYS, 0, vectors * VL * sizeof(float));
                    continue;
                }
                const float decay = soften(scores + i * KEYS, visible, vectors * VL, shape.scale,
                                           maxima[row], totals[row]);
                if (decay != 1.0f) multiply(own + i * width, width, decay);
            }
            outer_gemm(count, width / VL, num, {scores, KEYS, 1}, values, ldv, own, width, true);
        }
    }
    for (long h = 0; h < share; h++)
        for (long i = 0; i < count; i++) {
            const long row = h * count + i;
            float *to = out + i * shape.heads * width + h * width;
            for (long d = 0; d < width; d += VL)
                store(to + d, load(sums + row * width + d) / splat(totals[row]));
            if (lse) lse[i * shape.heads + h] = maxima[row] + std::log(totals[row]);
        }
}
