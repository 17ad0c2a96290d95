// Products of weights in blocks (see weight.h) with a few rows.
//
// A result is summed in an order that depends on neither the rows beside it nor the threads.
#pragma once

#include <type_traits>

#include "coded.h"

// A row of x, rounded to 8 bits, GROUP columns of it, in the order in which the products read them.
template <class Code>
struct Rounded {
    Code codes[GROUP];
    int32_t start;  // where the sums begin: what weights without sign make too much
    float scale;
};
#if defined(__AVX512VNNI__)
typedef Rounded<int8_t> RoundedFor8, RoundedFor6, RoundedFor4;
#elif defined(__AVX2__)
typedef Rounded<int16_t> RoundedFor8;
typedef Rounded<int8_t> RoundedFor6, RoundedFor4;
#else
typedef Rounded<int16_t> RoundedFor8, RoundedFor6, RoundedFor4;
#endif

static long row_bytes(const Weight &w) {
    const long groups = w.groups();
    if (w.format == FORMAT_INT8) return groups * sizeof(RoundedFor8);
    if (w.has_groups()) return groups * sizeof(RoundedFor4);  // RoundedFor6 alike
    return groups * GROUP * sizeof(float);
}

// --- one block times M rows ------------------------------------------------------------------------------

template <int M>
static void multiply_int8(const uint8_t *block, long bytes, const uint8_t *x, long stride, long groups, Floats *out,
                          const uint8_t *after) {
    const Ahead ahead(block + bytes, after, 1);
    const uint8_t *w = block + LANES * 4;
    Floats sums[M] = {};
    for (long g = 0; g < groups; g++, x += sizeof(RoundedFor8)) {
        const auto row = [&](int m) { return reinterpret_cast<const RoundedFor8 *>(x + m * stride); };
        const uint8_t *next = ahead.of(w);
        Words acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
#if defined(__AVX512VNNI__)
            acc[m] = words(row(m)->start);
#else
            acc[m] = Words{};
#endif
        }
#pragma GCC unroll 4
        for (int u = 0; u < 8; u++, w += UNIT) {
            __builtin_prefetch(next + u * UNIT);
            const Words unit = load_words(w);
#if defined(__AVX512VNNI__)
            const vi bytes = unit.v[0] ^ (int32_t)0x80808080;
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                acc[m].v[0] = add_dot4(acc[m].v[0], bytes, splat_word(row(m)->codes + u * 4));
#else
            const Words even = each<Words>([&](int p) { return (vi)((vs)unit.v[p] << 8 >> 8); });
            const Words odd = each<Words>([&](int p) { return (vi)((vs)unit.v[p] >> 8); });
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const vi x02 = splat_word(row(m)->codes + u * 4), x13 = splat_word(row(m)->codes + u * 4 + 2);
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) {
                    acc[m].v[p] += multiply_halves(even.v[p], x02);
                    acc[m].v[p] += multiply_halves(odd.v[p], x13);
                }
            }
#endif
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) add_scaled(sums[m], acc[m], splat(row(m)->scale));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) out[m] = sums[m] * load_floats(reinterpret_cast<const float *>(block));
}

template <int M>
static void multiply_int6(const uint8_t *block, long bytes, const uint8_t *x, long stride, long groups, Floats *out,
                          const uint8_t *after) {
    const Ahead ahead(block + bytes, after, 1);
    const uint8_t *w = block + LANES * 4, *scales = nullptr;
    Floats sums[M] = {};
    for (long g = 0; g < groups; g++, x += sizeof(RoundedFor6), scales += LANES) {
        if (g % (UNIT / LANES) == 0) scales = w, w += UNIT;
        const auto row = [&](int m) { return reinterpret_cast<const RoundedFor6 *>(x + m * stride); };
        const uint8_t *next = ahead.of(w);
        Words acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] = words(row(m)->start);
        // Integers of 0 to 63, of four columns from k on and of the four behind them, times the codes of these.
        const auto add = [&](const Words &first, const Words &second, int k) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const auto *codes = row(m)->codes + k;
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) {
                    vi &sum = acc[m].v[p];
                    const vi a = first.v[p], b = second.v[p];
#if defined(__AVX512VNNI__)
                    sum = add_dot4(add_dot4(sum, a, splat_word(codes)), b, splat_word(codes + 4));
#elif defined(__AVX2__)
                    // Four columns stay within 4 * 63 * 127, in 16 bits.
                    const vi halves = add_halves(multiply_bytes(a, splat_word(codes)),
                                                 multiply_bytes(b, splat_word(codes + 4)));
                    sum = in_order(sum + multiply_halves(halves, vi{} + 0x00010001));
#else
                    sum += multiply_halves(a & 0x00ff00ff, splat_word(codes));
                    sum += multiply_halves((vi)((vus)a >> 8), splat_word(codes + 2));
                    sum += multiply_halves(b & 0x00ff00ff, splat_word(codes + 4));
                    sum += multiply_halves((vi)((vus)b >> 8), splat_word(codes + 6));
#endif
                }
            }
        };
#pragma GCC unroll 2
        for (int k = 0; k < GROUP; k += 16, w += 3 * UNIT) {
            Words unit[3], integers[4];
#pragma GCC unroll 3
            for (int n = 0; n < 3; n++) {
                __builtin_prefetch(next + (k / 16 * 3 + n) * UNIT);
                unit[n] = load_words(w + n * UNIT);
                integers[n] = each<Words>([&](int p) { return unit[n].v[p] & 0x3f3f3f3f; });
            }
            integers[3] = each<Words>([&](int p) {
                const vi a = (vi)((vus)unit[0].v[p] >> 2), b = (vi)((vus)unit[1].v[p] >> 4);
                return (a & 0x30303030) | (b & 0x0c0c0c0c) | ((vi)((vus)unit[2].v[p] >> 6) & 0x03030303);
            });
            add(integers[0], integers[1], k), add(integers[2], integers[3], k + 8);
        }
        const Words scale = load_integers(scales);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)  // within 32 * 32 * 127 * 127 of zero: exact as floats
            add_scaled(sums[m], each<Words>([&](int p) { return acc[m].v[p] * scale.v[p]; }), splat(row(m)->scale));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) out[m] = sums[m] * load_floats(reinterpret_cast<const float *>(block));
}

template <int M>
static void multiply_int4(const uint8_t *block, long bytes, const uint8_t *x, long stride, long groups, Floats *out,
                          const uint8_t *after) {
    const Ahead ahead(block + bytes, after, 1);
    const uint8_t *w = block + LANES * 4, *scales = nullptr;
    Floats sums[M] = {};
    for (long g = 0; g < groups; g++, x += sizeof(RoundedFor4), scales += LANES) {
        if (g % (UNIT / LANES) == 0) scales = w, w += UNIT;
        const auto row = [&](int m) { return reinterpret_cast<const RoundedFor4 *>(x + m * stride); };
        const uint8_t *next = ahead.of(w);
        Words acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] = words(row(m)->start);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++, w += UNIT) {
            __builtin_prefetch(next + u * UNIT);
            const Words unit = load_words(w);
            // Some of the nibbles, four to a lane (or two), times the codes of their columns.
            const auto add = [&](int shift, int mask, int code) __attribute__((always_inline)) {
                const Words w = each<Words>([&](int p) { return (vi)((vus)unit.v[p] >> shift) & mask; });
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const vi xm = splat_word(row(m)->codes + u * 8 + code);
#pragma GCC unroll 4
                    for (int p = 0; p < PARTS; p++)
#if defined(__AVX512VNNI__)
                        acc[m].v[p] = add_dot4(acc[m].v[p], w.v[p], xm);
#elif defined(__AVX2__)
                        // Sums of 16 columns stay within 16 * 8 * 127 of zero, in 16 bits.
                        acc[m].v[p] = in_order(add_halves(acc[m].v[p], multiply_bytes(w.v[p], xm)));
#else
                        acc[m].v[p] += multiply_halves(w.v[p], xm);
#endif
                }
            };
#if defined(__AVX2__)
            add(0, 0x0f0f0f0f, 0), add(4, 0x0f0f0f0f, 4);
#else
            add(0, 0x000f000f, 0), add(4, 0x000f000f, 2), add(8, 0x000f000f, 4), add(12, 0x000f000f, 6);
#endif
        }
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
        const Words scale = load_scales(scales, true);
#else
        const Words scale = load_scales(scales, false);  // sums of 32 columns are within 16 bits
#endif
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
            add_scaled(sums[m], each<Words>([&](int p) { return multiply_halves(acc[m].v[p], scale.v[p]); }),
                       splat(row(m)->scale));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) out[m] = sums[m] * load_floats(reinterpret_cast<const float *>(block));
}

// N blocks, `bytes` apart, at once: one alone would wait for its own sums where there are few rows.
template <class W, int M, int N>
static void multiply_float(const uint8_t *block, long bytes, const uint8_t *x, long stride, long groups, Floats *out,
                           const uint8_t *after) {
    const float *column = reinterpret_cast<const float *>(x), *end = column + groups * GROUP;
    const long ldx = stride / (long)sizeof(float);
    Floats sums[N][M] = {};
    const auto add = [&](const Floats (&w)[N]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vf xm = splat(column[m * ldx]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) sums[n][m].v[p] = in_order(fma(w[n].v[p], xm, sums[n][m].v[p]));
        }
        column++;
    };
    const Ahead ahead(block + bytes, after, N);
    for (const uint8_t *w = block; column < end; w += UNIT) {
        Floats even[N], odd[N];
        const uint8_t *next = ahead.of(w);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const uint8_t *unit = w + n * bytes;
            __builtin_prefetch(next + n * bytes);
            if (sizeof(W) == 4)
                even[n] = load_floats(reinterpret_cast<const float *>(unit));
            else
                even[n] = even_columns(load_words(unit)), odd[n] = odd_columns(load_words(unit));
        }
        add(even);
        if (sizeof(W) == 2) add(odd);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) out[n * MOST_ROWS + m] = sums[n][m];
}

// --- some blocks times M rows: out[block * MOST_ROWS + row] -----------------------------------------------

constexpr int MOST_BLOCKS = 4;
typedef void (*Tile)(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                     Floats *out, const uint8_t *after);

// run(n, count, after) for blocks [n, n + count), two at once where the registers hold their sums, and what is read
// after them.
template <int M, int MOST, class Run>
ERNIE_INLINE void at_once(const uint8_t *block, long blocks, long bytes, const uint8_t *after, const Run &run) {
    constexpr int N = M <= 2 ? MOST : 1;
    const auto next = [&](long n) { return n < blocks ? block + n * bytes : after; };
    long n = 0;
    for (; n + N <= blocks; n += N) run(n, std::integral_constant<int, N>{}, next(n + N));
    for (; n < blocks; n++) run(n, std::integral_constant<int, 1>{}, next(n + 1));
}

template <class W, int M>
static void tile_float(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                       Floats *out, const uint8_t *after) {
    at_once<M, 2>(block, blocks, bytes, after, [&](long n, auto count, const uint8_t *next) {
        multiply_float<W, M, count>(block + n * bytes, bytes, x, stride, groups, out + n * MOST_ROWS, next);
    });
}
template <int M>
static void tile_coded(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                       Floats *out, const uint8_t *after) {
    at_once<M, 2>(block, blocks, bytes, after, [&](long n, auto count, const uint8_t *next) {
        multiply_coded<M, count>(block + n * bytes, bytes, x, stride, groups, out + n * MOST_ROWS, next);
    });
    for (long n = 0; n < blocks; n++) add_escapes(block + n * bytes, x, stride, M, out + n * MOST_ROWS);
}
template <int M>
static void tile_int8(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                      Floats *out, const uint8_t *after) {
    at_once<M, 1>(block, blocks, bytes, after, [&](long n, auto, const uint8_t *next) {
        multiply_int8<M>(block + n * bytes, bytes, x, stride, groups, out + n * MOST_ROWS, next);
    });
}
template <int M>
static void tile_int6(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                      Floats *out, const uint8_t *after) {
    at_once<M, 1>(block, blocks, bytes, after, [&](long n, auto, const uint8_t *next) {
        multiply_int6<M>(block + n * bytes, bytes, x, stride, groups, out + n * MOST_ROWS, next);
    });
}
template <int M>
static void tile_int4(const uint8_t *block, long blocks, long bytes, const uint8_t *x, long stride, long groups,
                      Floats *out, const uint8_t *after) {
    at_once<M, 1>(block, blocks, bytes, after, [&](long n, auto, const uint8_t *next) {
        multiply_int4<M>(block + n * bytes, bytes, x, stride, groups, out + n * MOST_ROWS, next);
    });
}

// Rows of one tile: as many as the registers hold.
static long most_rows(const Weight &w) {
    if (VL == 16) return 8;
    return w.format == FORMAT_FLOAT32 ? 6 : 4;
}

template <int M>
static Tile tile_of(const Weight &w) {
    switch (w.format) {
        case FORMAT_FLOAT32: return tile_float<float, M>;
        case FORMAT_BFLOAT16: return tile_float<bf16, M>;
        case FORMAT_CODED: return tile_coded<M>;
        case FORMAT_INT8: return tile_int8<M>;
        case FORMAT_INT6: return tile_int6<M>;
        default: return tile_int4<M>;
    }
}
static Tile tile_of(const Weight &w, long rows) {
    switch (rows) {
        case 1: return tile_of<1>(w);
        case 2: return tile_of<2>(w);
        case 3: return tile_of<3>(w);
        case 4: return tile_of<4>(w);
        case 5: return tile_of<5>(w);
        case 6: return tile_of<6>(w);
        case 7: return tile_of<7>(w);
        default: return tile_of<8>(w);
    }
}
