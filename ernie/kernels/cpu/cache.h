// The key/value cache: its rows (one head of one token) in each format, how they are written, and the two
// ways in which attention meets them.
//
//   float, bf16, f16   d values
//   int8_t             d integers, then the float32 scale that makes values of them: d + 4 bytes
#pragma once

#include <algorithm>

#include "vec.h"

constexpr int INT8 = 3;  // beside enum Dtype

typedef uint8_t vb __attribute__((vector_size(VL)));

template <class T>
static constexpr long row_bytes(long width) {
    return width * sizeof(T) + (sizeof(T) == 1 ? sizeof(float) : 0);
}

// What the values of a row must be multiplied with to be what they stand for.
template <class T>
ERNIE_INLINE float row_scale(const char *row, long width) {
    float scale = 1;
    if (sizeof(T) == 1) memcpy(&scale, row + width, sizeof scale);
    return scale;
}

// Round to nearest, ties to even; too large becomes infinite, a NaN stays one.
ERNIE_INLINE void store(f16 *p, vf v) {
#if defined(__AVX512F__)
    const vh h = (vh)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    const vh h = (vh)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    // Adding a power of two whose last bit is the half's makes the addition round. Subnormal halves all have
    // the same last bit.
    const vu bits = as_bits(v), magnitude = bits & 0x7fffffffu, exponent = magnitude & 0x7f800000u;
    const vu least = splat_u(0x38800000u);  // 2**-14, the smallest normal half
    const vu adder = (exponent < least ? least : exponent) + (13u << 23);
    const vu units = as_bits(as_float(magnitude) + as_float(adder)) - adder;
    vu rounded = (exponent < least ? vu{} : (exponent - least) >> 13) + units;
    rounded = magnitude >= 0x477ff000u ? splat_u(0x7c00u) : rounded;  // rounds to 2**16 or more
    rounded = magnitude > 0x7f800000u ? splat_u(0x7e00u) : rounded;
    const vh h = __builtin_convertvector(rounded | (bits >> 16 & 0x8000u), vh);
#endif
    memcpy(p, &h, sizeof h);
}

static void narrow_to_int8(const float *from, long width, char *row) {
    vf most = {};
    const auto get = [&](long d) { return d + VL <= width ? load(from + d) : load_first(from + d, width - d); };
    for (long d = 0; d < width; d += VL) most = vmax(most, as_float(as_bits(get(d)) & 0x7fffffffu));
    const float scale = largest(most) / 127;
    const vf divisor = splat(scale == 0 ? 1.0f : scale);
    for (long d = 0; d < width; d += VL) {
        const vf shifted = get(d) / divisor + splat(12582912.0f);  // 1.5 * 2**23: integers in the low bits
        const vb integers = __builtin_convertvector(as_bits(shifted), vb);
        memcpy(row + d, &integers, width - d < VL ? width - d : VL);
    }
    memcpy(row + width, &scale, sizeof scale);
}

// A row of any width, rounded into the cache.
template <class T>
ERNIE_INLINE void narrow_row(const float *from, long width, char *row) {
    if constexpr (sizeof(T) == 1) {
        narrow_to_int8(from, width, row);
    } else {
        T *to = reinterpret_cast<T *>(row);
        long d = 0;
        for (; d + VL <= width; d += VL) store(to + d, load(from + d));
        if (d < width) store_first(to + d, load_first(from + d, width - d), width - d);
    }
}

// --- where keys and values come from -------------------------------------------------------------------

constexpr long SPLIT = 128;  // keys that are met at a time

// One call; attention.py packs it. All fields have 8 bytes.
struct Call {
    const float *q;  // (T, H, d) with row stride ldq
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

// One head of one sequence, read where it lies in the cache.
template <class T>
struct Cached {
    typedef T Element;
    static constexpr bool scaled = sizeof(T) == 1;
    const Call &call;
    const int32_t *table;
    long group, bytes = row_bytes<T>(call.width), ld = call.groups * bytes;

    const char *row(const char *cache, long key) const {
        const long slot = table[key / call.positions] * call.positions + key % call.positions;
        return cache + slot * ld + group * bytes;
    }
    // Four keys from a multiple of four on; those past `last` may be any.
    ERNIE_MEMBER void keys(long first, long last, const T *four[4]) const {
        const char *at = row(call.k, first);
        const bool together = call.positions % 4 == 0;
        for (long r = 0; r < 4; r++, at += ld)
            four[r] = reinterpret_cast<const T *>(together ? at : row(call.k, std::min(first + r, last)));
    }
    // Values that lie `stride` elements apart; `count` shrinks to those of one block.
    const T *values(long first, long &count, long &stride) const {
        count = std::min(count, call.positions - first % call.positions);
        stride = ld / sizeof(T);
        return reinterpret_cast<const T *>(row(call.v, first));
    }
    void scales(const char *cache, long first, long count, float *out) const {
        for (long j = 0; j < count; j++) out[j] = row_scale<T>(row(cache, first + j), call.width);
    }
    void key_scales(long first, long count, float *out) const { scales(call.k, first, count, out); }
    void value_scales(long first, long count, float *out) const { scales(call.v, first, count, out); }
    // Four rows into the second-level cache, as they lie in blocks of a multiple of four positions. Not inlined,
    // the compiler would take this for a function without effect.
    ERNIE_MEMBER void fetch(const char *cache, long first) const {
        const char *at = row(cache, first);
        for (int j = 0; j < 4; j++, at += ld)
            for (long byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }
};

// A split of it, made float32 for many queries.
template <class T>
struct Widened {
    typedef float Element;
    static constexpr bool scaled = sizeof(T) == 1;
    float *k, *v, *k_scales, *v_scales;
    long origin, width;
    static long floats(long width) { return 2 * SPLIT * (width + 1); }
    Widened(const Cached<T> &cached, long first, long count, float *memory)
        : k(memory), v(k + SPLIT * cached.call.width), k_scales(v + SPLIT * cached.call.width),
          v_scales(k_scales + SPLIT), origin(first), width(cached.call.width) {
        for (long j = 0; j < count; j++)
            for (const bool key : {true, false}) {
                const char *row = cached.row(key ? cached.call.k : cached.call.v, first + j);
                float *to = (key ? k : v) + j * width;
                for (long d = 0; d < width; d += VL) store(to + d, load(reinterpret_cast<const T *>(row) + d));
                (key ? k_scales : v_scales)[j] = row_scale<T>(row, width);
            }
    }
    ERNIE_MEMBER void keys(long first, long, const float *four[4]) const {
        for (long r = 0; r < 4; r++) four[r] = k + (first - origin + r) * width;
    }
    const float *values(long first, long &, long &stride) const {
        stride = width;
        return v + (first - origin) * width;
    }
    void key_scales(long, long count, float *out) const { memcpy(out, k_scales, count * sizeof(float)); }
    void value_scales(long, long count, float *out) const { memcpy(out, v_scales, count * sizeof(float)); }
};
