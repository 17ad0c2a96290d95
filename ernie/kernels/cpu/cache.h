// Rows of the key/value cache: one head of one token, in the cache's format, and the way from and to float32.
//
//   float, bf16, f16   d values
//   int8_t             d integers, then the float32 scale that makes values of them: d + 4 bytes
#pragma once

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
