// Sixteen 32-bit lanes, one for each output row of a block of weights, in as many vectors as they need.
//
// The kernels over blocks are written once in these; what differs between instruction sets is here.
#pragma once

#include "vec.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

constexpr int LANES = 16, PARTS = LANES / VL;

struct Words {
    vi v[PARTS];
};
struct Floats {
    vf v[PARTS];
};
typedef int16_t vs __attribute__((vector_size(VL * 4)));
typedef uint16_t vus __attribute__((vector_size(VL * 4)));

template <class Lanes, class Op>
ERNIE_INLINE Lanes each(const Op &op) {
    Lanes out;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) out.v[p] = op(p);
    return out;
}

// Vector by vector: GCC copies larger things through the stack.
ERNIE_INLINE Words load_words(const uint8_t *memory) {
    return each<Words>([&](int p) { return (vi)load_raw(memory + p * sizeof(vi)); });
}
ERNIE_INLINE Floats load_floats(const float *memory) {
    return each<Floats>([&](int p) { return load(memory + p * VL); });
}
ERNIE_INLINE void store(float *memory, const Floats &floats) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(memory + p * VL, floats.v[p]);
}
// Two bfloat16 lie in each lane: one column and the next.
ERNIE_INLINE Floats even_columns(const Words &both) {
    return each<Floats>([&](int p) { return (vf)(both.v[p] << 16); });
}
ERNIE_INLINE Floats odd_columns(const Words &both) {
    return each<Floats>([&](int p) { return (vf)(both.v[p] & (int32_t)0xffff0000); });
}
ERNIE_INLINE vi splat_word(const void *memory) {  // four bytes in every lane
    int32_t word;
    memcpy(&word, memory, 4);
    return word - vi{};
}
ERNIE_INLINE Words words(int32_t value) {
    return each<Words>([&](int) { return value - vi{}; });
}
ERNIE_INLINE Floats operator+(const Floats &a, const Floats &b) {
    return each<Floats>([&](int p) { return a.v[p] + b.v[p]; });
}
ERNIE_INLINE Floats operator*(const Floats &a, const Floats &b) {
    return each<Floats>([&](int p) { return a.v[p] * b.v[p]; });
}
// sums += lanes * factor, the lanes being integers.
ERNIE_INLINE void add_scaled(Floats &sums, const Words &lanes, vf factor) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
        sums.v[p] = fma(__builtin_convertvector(lanes.v[p], vf), factor, sums.v[p]);
}

// Keeps the compiler from putting off what it has to do for v: GCC would run out of registers.
template <class Vector>
ERNIE_INLINE Vector in_order(Vector v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

// --- products of small integers --------------------------------------------------------------------------

// Each lane: a.low * b.low + a.high * b.high, over signed halves of 16 bits.
ERNIE_INLINE vi multiply_halves(vi a, vi b) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
#if defined(__AVX512VNNI__)
// Each lane: sum + four unsigned bytes times four signed ones.
ERNIE_INLINE vi add_dot4(vi sum, vi bytes, vi signed_bytes) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)signed_bytes);
}
#elif defined(__AVX2__)
// Each half lane: two unsigned bytes times two signed ones.
ERNIE_INLINE vi multiply_bytes(vi bytes, vi signed_bytes) {
#if defined(__AVX512BW__)
    return (vi)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)signed_bytes);
#else
    return (vi)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)signed_bytes);
#endif
}
#endif
ERNIE_INLINE vi add_halves(vi a, vi b) { return (vi)((vs)a + (vs)b); }

// Sixteen integers of 8 bits.
ERNIE_INLINE Words load_integers(const uint8_t *integers) {
    return each<Words>([&](int p) {
        const uint8_t *from = integers + p * VL;
#if defined(__AVX512F__)
        return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
        return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
        typedef int8_t bytes __attribute__((vector_size(VL)));
        bytes b;
        memcpy(&b, from, VL);
        return __builtin_convertvector(b, vi);
#endif
    });
}
// Sixteen scales of 8 bits, as `multiply_halves` takes them to scale both halves, or only the low one.
ERNIE_INLINE Words load_scales(const uint8_t *scales, bool both_halves) {
    const Words wide = load_integers(scales);
    return each<Words>([&](int p) {
        return both_halves ? (wide.v[p] & 0xffff) | wide.v[p] << 16 : wide.v[p] & 0xffff;
    });
}
