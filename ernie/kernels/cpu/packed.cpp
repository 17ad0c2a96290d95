// Attention inside each segment of a packed row, causal or not: forward, and backward from the saved logarithm
// of each row's sum.
//
//   S segments   T tokens   H query heads   G key/value heads   d head width
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

struct RowKeys {  // keys and values of one head in the rows of a tensor
    const float *k, *v;
    long ldk, ldv_, width;
    const float *tile(long first, long count, float *tile_k, float *, long &ldv) const {
        transpose(k + first * ldk, ldk, count, width, tile_k);
        ldv = ldv_;
        return v + first * ldv_;
    }
};

// --- backward ------------------------------------------------------------------------------------------

struct GradSlot;

struct Backward {
    const float *q, *k, *v, *dout, *lse, *delta;
    float *dq, *dk, *dv;  // dk and dv: (parts, T, G, d)
    long ldq, ldk, ldv, tokens, parts;
};

// One segment, one key/value head, one part of its query heads: dq is its own, dk and dv its part's.
void backward_piece(const Shape &shape, const Backward &b, long begin, long length, long group, long part) {
    const long width = shape.width, vectors = width / VL, share = shape.share() / b.parts;
    const long row = shape.heads * width, kv_row = shape.groups * width;
    float *key_t = scratch<GradSlot>(KEYS * width * 4 + 2 * KEYS * KEYS);
    float *value_t = key_t + KEYS * width, *dk = value_t + KEYS * width, *dv = dk + KEYS * width;
    float *weights = dv + KEYS * width, *grads = weights + KEYS * KEYS;
    const long first_head = group * shape.share() + part * share;
    for (long k0 = 0; k0 < length; k0 += KEYS) {
        const long num = length - k0 < KEYS ? length - k0 : KEYS, columns = (num + VL - 1) / VL;
        const float *keys = b.k + (begin + k0) * b.ldk + group * width;
        const float *values = b.v + (begin + k0) * b.ldv + group * width;
        transpose(keys, b.ldk, num, width, key_t);
        transpose(values, b.ldv, num, width, value_t);
        memset(dk, 0, 2 * KEYS * width * sizeof(float));
        for (long h = first_head; h < first_head + share; h++)
            for (long q0 = shape.causal ? k0 : 0; q0 < length; q0 += KEYS) {
                const long count = length - q0 < KEYS ? length - q0 : KEYS, at = begin + q0;
                const float *q = b.q + at * b.ldq + h * width;
                const float *dout = b.dout + at * row + h * width;
                outer_gemm(count, columns, width, {q, b.ldq, 1}, key_t, KEYS, weights, KEYS, false);
                outer_gemm(count, columns, width, {dout, row, 1}, value_t, KEYS, grads, KEYS, false);
                for (long i = 0; i < count; i++) {
                    const vf lse = splat(b.lse[(at + i) * shape.heads + h]), scale = splat(shape.scale);
                    const vf delta = splat(b.delta[(at + i) * shape.heads + h]);
                    const long seen = shape.seen(q0 + i, length) - k0, visible = seen < num ? seen : num;
                    for (long j = 0; j < columns * VL; j += VL) {
                        float *w = weights + i * KEYS + j, *g = grads + i * KEYS + j;
                        const vf p = lanes_below(visible, j, vexp(load(w) * scale - lse), vf{});
                        store(w, p);
                        store(g, p * (load(g) - delta) * scale);
                    }
                }
                outer_gemm(num, vectors, count, {weights, 1, KEYS}, dout, row, dv, width, true);
                outer_gemm(num, vectors, count, {grads, 1, KEYS}, q, b.ldq, dk, width, true);
                outer_gemm(count, vectors, num, {grads, KEYS, 1}, keys, b.ldk, b.dq + at * row + h * width,
                           row, k0 > 0);
            }
        for (long j = 0; j < num; j++) {
            const long to = (part * b.tokens + begin + k0 + j) * kv_row + group * width;
            memcpy(b.dk + to, dk + j * width, width * sizeof(float));
            memcpy(b.dv + to, dv + j * width, width * sizeof(float));
        }
    }
}

}  // namespace

// q (T, H, d), k and v (T, G, d) with row strides ld*; out (T, H, d); lse (T, H) or null.
extern "C" void ernie_attend_packed(const float *q, long ldq, const float *k, long ldk, const float *v, long ldv,
                                    const int32_t *bounds, long segments, long heads, long groups, long width,
                                    float scale, int causal, float *out, float *lse, int threads) {
    const Shape shape{heads, groups, width, scale, threads, causal != 0};
    const long tile = queries_of_tile(shape.share());
    std::vector<Piece> pieces;
    // The last queries of a segment see the most keys: dealt out first, nothing long is left for the end.
    for (long s = 0; s < segments; s++)
        for (long length = bounds[s + 1] - bounds[s], t = (length + tile - 1) / tile - 1; t >= 0; t--)
            for (long g = 0; g < groups; g++)
                pieces.push_back({s, g, t * tile, length - t * tile < tile ? length - t * tile : tile});
    parallel_for(threads, pieces.size(), [&](long index) {
        const Piece &p = pieces[index];
        const long begin = bounds[p.segment], at = begin + p.first, head = p.group * shape.share();
        const RowKeys keys{k + begin * ldk + p.group * width, v + begin * ldv + p.group * width, ldk, ldv, width};
        attend_tile(shape, keys, q + at * ldq + head * width, ldq, p.first, p.count,
                    bounds[p.segment + 1] - begin,
                    out + at * heads * width + head * width, lse ? lse + at * heads + head : nullptr);
    });
}

// dout, out and dq contiguous (T, H, d); delta (T, H) is scratch; dk and dv (parts, T, G, d), where `parts`
// divides H / G: the caller adds the parts up.
extern "C" void ernie_attend_packed_backward(const float *q, long ldq, const float *k, long ldk, const float *v,
                                             long ldv, const float *out, const float *dout, const float *lse,
                                             const int32_t *bounds, long segments, long heads, long groups,
                                             long width, float scale, int causal, long parts, float *delta,
                                             float *dq, float *dk, float *dv, int threads) {
    const Shape shape{heads, groups, width, scale, threads, causal != 0};
    const long tokens = bounds[segments];
    parallel_for(threads, tokens, [&](long t) {
        for (long h = t * heads; h < (t + 1) * heads; h++) {
            vf products = {};
            for (long d = 0; d < width; d += VL)
                products = fma(load(out + h * width + d), load(dout + h * width + d), products);
            delta[h] = sum(products);
        }
    });
    const Backward b{q, k, v, dout, lse, delta, dq, dk, dv, ldq, ldk, ldv, tokens, parts};
    std::vector<long> order(segments);
    for (long s = 0; s < segments; s++) order[s] = s;
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) {
        return bounds[a + 1] - bounds[a] > bounds[b + 1] - bounds[b];
    });
    parallel_for(threads, segments * groups * parts, [&](long index) {
        const long s = order[index / (groups * parts)], g = index / parts % groups;
        backward_piece(shape, b, bounds[s], bounds[s + 1] - bounds[s], g, index % parts);
    });
}
