// One SIMD vector of float32, as wide as the instruction set this file is compiled for.
//
// Written with the vector extensions that GCC and Clang share, so the same kernels become AVX-512, AVX2,
// SSE2 or NEON code; intrinsics stand only where the compilers need help. Nothing here depends on the
// number of threads, and -ffp-contract=off leaves `fma` as the only fused operation, so a result is a
// function of its inputs and the instruction set alone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

#define ERNIE_INLINE static inline __attribute__((always_inline))
#define ERNIE_MEMBER inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };  // codes passed by build.py

ERNIE_INLINE vf splat(float value) { return value - vf{}; }
ERNIE_INLINE vu splat_u(uint32_t value) { return value - vu{}; }
ERNIE_INLINE vu as_bits(vf v) { return (vu)v; }
ERNIE_INLINE vf as_float(vu v) { return (vf)v; }
ERNIE_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
ERNIE_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

ERNIE_INLINE vf swap_pairs(vf v) {  // 1 0 3 2 ...
#if defined(__AVX512F__)
    return _mm512_permute_ps(v, 0xb1);
#elif defined(__AVX2__)
    return _mm256_permute_ps(v, 0xb1);
#else
    vf swapped;
    for (int i = 0; i < VL; i++) swapped[i] = v[i ^ 1];
    return swapped;
#endif
}

ERNIE_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// --- memory ------------------------------------------------------------------------------------------

ERNIE_INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
ERNIE_INLINE vu load_raw(const void *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}
ERNIE_INLINE vh load_halves(const void *p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return v;
}
ERNIE_INLINE vu widen(vh h) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)h);  // GCC 12 makes five instructions of the conversion
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, vu);
#endif
}
ERNIE_INLINE vf load(const bf16 *p) { return as_float(widen(load_halves(p)) << 16); }
ERNIE_INLINE vf load(const f16 *p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)load_halves(p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)load_halves(p));
#else
    // Shifted into place the exponent is 112 too small; the product repairs it, subnormals included.
    const vu h = widen(load_halves(p));
    const vf magnitude = as_float((h & 0x7fff) << 13) * splat(0x1p112f);
    const vu special = (vu)(magnitude >= splat(65536.0f)) & 0x7f800000u;  // infinities and NaN
    return as_float(as_bits(magnitude) | special | (h & 0x8000) << 16);
#endif
}
ERNIE_INLINE vf load(const int8_t *p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
#else
    vf v;
    for (int i = 0; i < VL; i++) v[i] = p[i];
    return v;
#endif
}
ERNIE_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
ERNIE_INLINE void store_halves(bf16 *p, vu v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // each lane of 128 bits by itself
    const vh h = (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    const vh h = __builtin_convertvector(v, vh);
#endif
    memcpy(p, &h, sizeof h);
}
// Round to nearest, ties to even; a NaN stays one.
ERNIE_INLINE void store(bf16 *p, vf v) {
    const vu bits = as_bits(v);
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_halves(p, v == v ? rounded : splat_u(0x7fc0));
}
ERNIE_INLINE float load_one(const float *p) { return *p; }
ERNIE_INLINE float load_one(const bf16 *p) {
    const uint32_t bits = (uint32_t)p->bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
template <class T>
ERNIE_INLINE vf load_first(const T *p, long n) {  // the first n lanes, zeros behind them
    T padded[VL] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}
template <class T>
ERNIE_INLINE void store_first(T *p, vf v, long n) {
    T padded[VL];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}

// --- sums --------------------------------------------------------------------------------------------

ERNIE_INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float lanes[VL], total = 0;
    store(lanes, v);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    total = lanes[0];
    return total;
#endif
}
ERNIE_INLINE float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
#else
    float lanes[VL];
    store(lanes, v);
    for (int i = 1; i < VL; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
#endif
}
// The sums of four vectors at once: the end of every dot product, so it must not cost four reductions.
ERNIE_INLINE void sum4(vf a, vf b, vf c, vf d, float *out) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    __m512 abcd = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    abcd += _mm512_permute_ps(abcd, 0x4e);
    abcd += _mm512_permute_ps(abcd, 0xb1);
    const __m512i first_of_lane = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_lane, abcd)));
#elif defined(__AVX2__)
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// --- functions ---------------------------------------------------------------------------------------

// e^x within 2 ulp on [-87, 88]; smaller arguments give about 1e-38, larger ones about 1e38.
// Source: Cephes expf (reduction by ln 2 in two parts, degree 6 polynomial).
ERNIE_INLINE vf vexp(vf x) {
    x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
    const vf shifted = fma(x, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2**23: n in the low bits
    const vf n = shifted - splat(12582912.0f);
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}
ERNIE_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }
