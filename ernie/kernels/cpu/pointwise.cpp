// Normalisation, rotation, gating and the optimizer's step: one pass over memory each.
#include <algorithm>
#include <cmath>
#include <vector>

#include "program.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr long TASK_FLOATS = 16 * 1024;
constexpr long GELU_ROW = 4 * 1024;
constexpr float QUICK = 1.702f;
constexpr long SERIAL_FLOATS = 64 * 1024;  // up to here waking a second thread costs more than it brings

// body(first_row, rows) over blocks of whole rows.
template <class Body>
void for_rows(int threads, long rows, long width, const Body &body) {
    const long block = width < TASK_FLOATS ? TASK_FLOATS / (width ? width : 1) : 1;
    if (rows * width <= SERIAL_FLOATS) threads = 1;
    parallel_for(threads, (rows + block - 1) / block, [&](long i) {
        const long first = i * block;
        body(first, rows - first < block ? rows - first : block);
    });
}

// body(i, load, store) for each vector of a row; the last one is partial.
struct Whole {
    template <class T>
    vf get(const T *p) const { return load(p); }
    template <class T>
    void put(T *p, vf v) const { store(p, v); }
    void put_halves(bf16 *p, vu v) const { store_halves(p, v); }
};
struct Partial {
    long lanes;
    template <class T>
    vf get(const T *p) const { return load_first(p, lanes); }
    template <class T>
    void put(T *p, vf v) const { store_first(p, v, lanes); }
    void put_halves(bf16 *p, vu v) const {
        bf16 padded[VL];
        store_halves(padded, v);
        memcpy(p, padded, lanes * sizeof(bf16));
    }
};
template <class Body>
ERNIE_INLINE void for_vectors(long width, const Body &body) {
    long i = 0;
    for (; i + VL <= width; i += VL) body(i, Whole{});
    if (i < width) body(i, Partial{width - i});
}

struct RotateSlot;

template <class W>
void rms_norm(const float *x, long ldx, const W *weight, float eps, float *out, float *rstd, long rows,
              long width, int threads) {
    for_rows(threads, rows, width, [&](long first, long count) {
        for (long t = first; t < first + count; t++) {
            const float *row = x + t * ldx;
            vf squares = {};
            for_vectors(width, [&](long i, auto part) {
                const vf v = part.get(row + i);
                squares = fma(v, v, squares);
            });
            const float r = 1.0f / std::sqrt(sum(squares) / width + eps);
            if (rstd) rstd[t] = r;
            for_vectors(width, [&](long i, auto part) {
                part.put(out + t * width + i, part.get(row + i) * splat(r) * part.get(weight + i));
            });
        }
    });
}

template <class W>
void rms_norm_backward(const float *grad, const float *x, long ldx, const W *weight, const float *rstd, float *dx,
                       float *dweight, long rows, long width, long block, int threads) {
    parallel_for(threads, (rows + block - 1) / block, [&](long index) {
        const long first = index * block, last = first + block < rows ? first + block : rows;
        float *sums = dweight ? dweight + index * width : nullptr;
        if (sums) memset(sums, 0, width * sizeof(float));
        for (long t = first; t < last; t++) {
            const float *g = grad + t * width, *row = x + t * ldx;
            const float r = rstd[t];
            vf products = {};
            for_vectors(width, [&](long i, auto part) {
                const vf dy_x = part.get(g + i) * part.get(row + i);
                products = fma(dy_x, part.get(weight + i), products);
                if (sums) part.put(sums + i, fma(dy_x, splat(r), part.get(sums + i)));
            });
            const float mean = sum(products) * r * r / width;
            for_vectors(width, [&](long i, auto part) {
                const vf scaled = part.get(g + i) * part.get(weight + i);
                part.put(dx + t * width + i, (scaled - part.get(row + i) * splat(mean)) * splat(r));
            });
        }
    });
}

// --- AdamW ---------------------------------------------------------------------------------------------

ERNIE_INLINE vf root(vf v) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(v);
#else
    for (int i = 0; i < VL; i++) v[i] = std::sqrt(v[i]);
    return v;
#endif
}

// 32 random bits of an element: 16 for each moment. The twin is reference._rounding_bits.
// Source: the finaliser of MurmurHash3 over a multiplicative counter.
ERNIE_INLINE vu random_bits(long element, uint32_t key) {
    vu lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    vu h = (lane + (uint32_t)element) * 0x9e3779b1u + ((uint32_t)(element >> 32) * 0x85ebca6bu + key);
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}
// Rounding at random is adding random bits below the last one that is kept, and cutting there.
template <class Part>
ERNIE_INLINE void put_rounded(const Part &part, float *p, vf v, vu) {
    part.put(p, v);
}
template <class Part>
ERNIE_INLINE void put_rounded(const Part &part, bf16 *p, vf v, vu random) {
    part.put_halves(p, (as_bits(v) + random) >> 16);
}

struct Update {  // the constants of a step; see reference.adamw_step
    float decay, step_size, beta1, rest1, beta2, rest2, root_scale, eps, grad_scale;
    uint32_t key;
};

template <class G, class M>
void adamw(float *p, const G *grad, M *moment, M *square, long count, const Update &u, int threads) {
    for_rows(threads, (count + VL - 1) / VL, VL, [&](long first, long vectors) {
        const long begin = first * VL, end = begin + vectors * VL < count ? begin + vectors * VL : count;
        for_vectors(end - begin, [&](long i, auto part) {
            i += begin;
            const vf g = part.get(grad + i) * splat(u.grad_scale);
            const vf m = part.get(moment + i) * splat(u.beta1) + g * splat(u.rest1);
            const vf v = part.get(square + i) * splat(u.beta2) + g * g * splat(u.rest2);
            const vf step = m * splat(u.step_size) / (root(v) * splat(u.root_scale) + splat(u.eps));
            part.put(p + i, part.get(p + i) * splat(u.decay) - step);
            const vu random = random_bits(i, u.key);
            put_rounded(part, moment + i, m, random & 0xffffu);
            put_rounded(part, square + i, v, random >> 16);
        });
    });
}

constexpr long MOMENT_BLOCK = 256;  // weights that share the two scales of their 8-bit moments

// The codes of one block. Rounding is at random, upwards with the probability of what is cut off; no
// root above zero becomes zero, which would turn the next update into a leap.
ERNIE_INLINE void put_codes(const float *m, const float *root, const vu *random, long n, float top_m, float top_r,
                            int8_t *moment, uint8_t *square) {
    const float to_m = top_m > 1e-30f ? 127.0f / top_m : 0.0f, to_r = top_r > 1e-30f ? 255.0f / top_r : 0.0f;
    const auto *bits = reinterpret_cast<const uint32_t *>(random);
    for (long i = 0; i < n; i++) {
        const float low = (float)(int)(bits[i] & 0xffffu) * 0x1p-16f, high = (float)(int)(bits[i] >> 16) * 0x1p-16f;
        const int a = (int)(m[i] * to_m + 128.0f + low), b = (int)(root[i] * to_r + high);
        const int least = root[i] > 0.0f;
        moment[i] = (int8_t)((a < 255 ? a : 255) - 128);
        square[i] = (uint8_t)(b > 255 ? 255 : b < least ? least : b);
    }
}

template <class G>
void adamw_8bit(float *p, const G *grad, int8_t *moment, uint8_t *square, float *scales, long count,
                const Update &u, int threads) {
    const long blocks = (count + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
    for_rows(threads, blocks, MOMENT_BLOCK, [&](long first, long some) {
        for (long block = first; block < first + some; block++) {
            const long begin = block * MOMENT_BLOCK;
            const long n = count - begin < MOMENT_BLOCK ? count - begin : MOMENT_BLOCK;
            alignas(64) float m[MOMENT_BLOCK], r[MOMENT_BLOCK];
            vu random[MOMENT_BLOCK / VL];
            const float scale_m = scales[block], scale_r = scales[blocks + block];
            for (long i = 0; i < n; i++) {
                m[i] = moment[begin + i] * scale_m;
                r[i] = square[begin + i] * scale_r;
            }
            for_vectors(n, [&](long i, auto part) {
                const vf g = part.get(grad + begin + i) * splat(u.grad_scale), old = part.get(r + i);
                const vf mean = part.get(m + i) * splat(u.beta1) + g * splat(u.rest1);
                const vf now = root(old * old * splat(u.beta2) + g * g * splat(u.rest2));
                const vf step = mean * splat(u.step_size) / (now * splat(u.root_scale) + splat(u.eps));
                part.put(p + begin + i, part.get(p + begin + i) * splat(u.decay) - step);
                part.put(m + i, mean);
                part.put(r + i, now);
                random[i / VL] = random_bits(begin + i, u.key);
            });
            float top_m = 0.0f, top_r = 0.0f;
            for (long i = 0; i < n; i++) {
                const float size = std::fabs(m[i]);
                top_m = size > top_m ? size : top_m;
                top_r = r[i] > top_r ? r[i] : top_r;
            }
            put_codes(m, r, random, n, top_m, top_r, moment + begin, square + begin);
            scales[block] = top_m / 127.0f;
            scales[blocks + block] = top_r / 255.0f;
        }
    });
}

}  // namespace

// x (T, D) with row stride ldx; weight (D); out (T, D); rstd (T) or null.
extern "C" void ernie_rms_norm(const float *x, long ldx, const void *weight, int dtype, float eps, float *out,
                               float *rstd, long rows, long width, int threads) {
    if (dtype == BFLOAT16)
        rms_norm(x, ldx, static_cast<const bf16 *>(weight), eps, out, rstd, rows, width, threads);
    else
        rms_norm(x, ldx, static_cast<const float *>(weight), eps, out, rstd, rows, width, threads);
}
ERNIE_RECORDABLE(rms_norm)

// dweight (ceil(T / block), D), one row for each block of rows, or null: the caller adds them up.
extern "C" void ernie_rms_norm_backward(const float *grad, const float *x, long ldx, const void *weight, int dtype,
                                        const float *rstd, float *dx, float *dweight, long rows, long width,
                                        long block, int threads) {
    if (dtype == BFLOAT16)
        rms_norm_backward(grad, x, ldx, static_cast<const bf16 *>(weight), rstd, dx, dweight, rows, width,
                          block, threads);
    else
        rms_norm_backward(grad, x, ldx, static_cast<const float *>(weight), rstd, dx, dweight, rows, width,
                          block, threads);
}

// x (T, H, d) -> out, of the same shape and maybe the same place, with row strides; cos and sin (T, d / 2);
// `sign` -1 turns back. Pairs are neighbours, or with `halves` an element of the first half and one of the second.
extern "C" void ernie_rotate(const float *x, long ldx, const float *cos, const float *sin, float sign, int halves,
                             float *out, long ldo, long tokens, long heads, long width, int threads) {
    const long pairs = width / 2;
    for_rows(threads, tokens, heads * width, [&](long first, long count) {
        float *c = scratch<RotateSlot>(2 * width), *s = c + width;  // of a token, as its heads need them
        for (long t = first; t < first + count; t++) {
            for (long i = 0; i < (halves ? pairs : width); i++) {
                const long at = t * pairs + (halves ? i : i / 2);
                c[i] = cos[at];
                s[i] = (halves || i % 2 ? sign : -sign) * sin[at];
            }
            for (long h = 0; h < heads; h++) {
                const float *from = x + t * ldx + h * width;
                float *to = out + t * ldo + h * width;
                if (halves)
                    for_vectors(pairs, [&](long i, auto part) {
                        const vf low = part.get(from + i), high = part.get(from + pairs + i);
                        const vf ci = part.get(c + i), si = part.get(s + i);
                        part.put(to + i, low * ci - high * si);
                        part.put(to + pairs + i, high * ci + low * si);
                    });
                else
                    for_vectors(width, [&](long i, auto part) {
                        const vf v = part.get(from + i);
                        part.put(to + i, v * part.get(c + i) + swap_pairs(v) * part.get(s + i));
                    });
            }
        }
    });
}
ERNIE_RECORDABLE(rotate)

// out = x * sigmoid(1.702 x), n elements.
extern "C" void ernie_quick_gelu(const float *x, float *out, long n, int threads) {
    for_rows(threads, (n + GELU_ROW - 1) / GELU_ROW, GELU_ROW, [&](long first, long count) {
        const long begin = first * GELU_ROW, end = std::min(n, begin + count * GELU_ROW);
        for_vectors(end - begin, [&](long i, auto part) {
            const vf v = part.get(x + begin + i);
            part.put(out + begin + i, v * sigmoid(v * splat(QUICK)));
        });
    });
}

extern "C" void ernie_quick_gelu_backward(const float *grad, const float *x, float *dx, long n, int threads) {
    for_rows(threads, (n + GELU_ROW - 1) / GELU_ROW, GELU_ROW, [&](long first, long count) {
        const long begin = first * GELU_ROW, end = std::min(n, begin + count * GELU_ROW);
        for_vectors(end - begin, [&](long i, auto part) {
            const vf v = part.get(x + begin + i), s = sigmoid(v * splat(QUICK));
            const vf slope = s + v * splat(QUICK) * s * (splat(1.0f) - s);
            part.put(dx + begin + i, part.get(grad + begin + i) * slope);
        });
    });
}

// The sum of squares of n elements, added up in double.
extern "C" void ernie_sum_of_squares(const void *x, int dtype, long n, double *sum, int threads) {
    const long blocks = (n + TASK_FLOATS - 1) / TASK_FLOATS;
    std::vector<double> parts(blocks);
    const auto add = [&](const auto *from) {
        parallel_for(n <= SERIAL_FLOATS ? 1 : threads, blocks, [&](long b) {
            const long begin = b * TASK_FLOATS, count = std::min(TASK_FLOATS, n - begin);
            vf squares = {};
            for_vectors(count, [&](long i, auto part) {
                const vf v = part.get(from + begin + i);
                squares = fma(v, v, squares);
            });
            float lanes[VL];
            store(lanes, squares);
            for (float lane : lanes) parts[b] += lane;
        });
    };
    dtype == BFLOAT16 ? add(static_cast<const bf16 *>(x)) : add(static_cast<const float *>(x));
    *sum = 0;
    for (double part : parts) *sum += part;
}

// gate and up (T, I) with row strides; out (T, I).
extern "C" void ernie_swiglu(const float *gate, long ldg, const float *up, long ldu, float *out, long rows,
                             long width, int threads) {
    for_rows(threads, rows, width, [&](long first, long count) {
        for (long t = first; t < first + count; t++)
            for_vectors(width, [&](long i, auto part) {
                const vf g = part.get(gate + t * ldg + i);
                part.put(out + t * width + i, g * sigmoid(g) * part.get(up + t * ldu + i));
            });
    });
}
ERNIE_RECORDABLE(swiglu)

extern "C" void ernie_swiglu_backward(const float *grad, const float *gate, long ldg, const float *up, long ldu,
                                      float *dgate, float *dup, long rows, long width, int threads) {
    for_rows(threads, rows, width, [&](long first, long count) {
        for (long t = first; t < first + count; t++)
            for_vectors(width, [&](long i, auto part) {
                const vf dy = part.get(grad + t * width + i), g = part.get(gate + t * ldg + i);
                const vf s = sigmoid(g), silu = g * s;
                part.put(dup + t * width + i, dy * silu);
                const vf slope = s + silu * (splat(1.0f) - s);
                part.put(dgate + t * width + i, dy * part.get(up + t * ldu + i) * slope);
            });
    });
}

extern "C" void ernie_adamw(float *p, const void *grad, int grad_dtype, void *moment, void *square,
                            int moment_dtype, long count, const Update *update, int threads) {
    const auto with_grad = [&](auto *g) {
        if (moment_dtype == BFLOAT16)
            adamw(p, g, static_cast<bf16 *>(moment), static_cast<bf16 *>(square), count, *update, threads);
        else
            adamw(p, g, static_cast<float *>(moment), static_cast<float *>(square), count, *update, threads);
    };
    if (grad_dtype == BFLOAT16)
        with_grad(static_cast<const bf16 *>(grad));
    else
        with_grad(static_cast<const float *>(grad));
}

// moment int8, square uint8, scales (2, ceil(count / 256)): of the moments, then of the roots of the squares.
extern "C" void ernie_adamw_8bit(float *p, const void *grad, int grad_dtype, int8_t *moment, uint8_t *square,
                                 float *scales, long count, const Update *update, int threads) {
    if (grad_dtype == BFLOAT16)
        adamw_8bit(p, static_cast<const bf16 *>(grad), moment, square, scales, count, *update, threads);
    else
        adamw_8bit(p, static_cast<const float *>(grad), moment, square, scales, count, *update, threads);
}
