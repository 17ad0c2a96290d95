// Rows of x as the products over blocks read them: normed if asked, padded to whole groups, and rounded to
// 8 bits where the weight is of integers (definition: `rounded_rows` of ernie/kernels/reference.py).
#pragma once

#include <cmath>

#include "blocks.h"
#include "threads.h"

struct Norm {  // an RMS norm; no weight: none
    const void *weight;
    int dtype;
    float eps;
};

struct Rows {
    const uint8_t *data;
    long stride;  // bytes
    const uint8_t *row(long i) const { return data + i * stride; }
};

// The columns of a group from column k on, normed; zeros behind the last.
template <class W>
static void load_group(const float *x, const W *weight, float rstd, long k, long width, float *out) {
    const long count = width - k < GROUP ? width - k : GROUP, whole = count / VL * VL;
    for (long i = 0; i < whole; i += VL) {
        const vf v = load(x + k + i);
        store(out + i, weight ? v * splat(rstd) * load(weight + k + i) : v);
    }
    for (long i = whole; i < GROUP; i++)
        out[i] = i >= count ? 0.0f : weight ? x[k + i] * rstd * load_one(weight + k + i) : x[k + i];
}

ERNIE_INLINE vi nearest(vf v) {  // ties to even; |v| < 2**22
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32(v);
#else
    return __builtin_convertvector(v + splat(12582912.0f) - splat(12582912.0f), vi);
#endif
}

// Columns become codes in the order in which blocks.h multiplies them. `special` becomes NaN by an
// infinity or a NaN.
#if defined(__AVX2__)
typedef __m256i Bytes;  // 32 codes
ERNIE_INLINE __m256i halves_of(const float *x, vf factor) {  // 16 columns, as 16 bits
#if defined(__AVX512F__)
    return _mm512_cvtepi32_epi16((__m512i)nearest(load(x) * factor));
#else
    const __m256i pairs =
        _mm256_packs_epi32((__m256i)nearest(load(x) * factor), (__m256i)nearest(load(x + VL) * factor));
    return _mm256_permute4x64_epi64(pairs, 0xd8);
#endif
}
ERNIE_INLINE Bytes bytes_of(const float *x, vf factor) {
    const __m256i packed = _mm256_packs_epi16(halves_of(x, factor), halves_of(x + 16, factor));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
// Each lane: the sums of its first two and of its last two bytes, then of all lanes together.
ERNIE_INLINE int32_t sums_of_pairs(Bytes codes) {
    const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
    __m128i all = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    all = _mm_add_epi16(all, _mm_shuffle_epi32(all, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi16(all, _mm_shuffle_epi32(all, 0xb1)));
}
ERNIE_INLINE int32_t low_half(int32_t pair) { return (int16_t)pair; }
ERNIE_INLINE int32_t high_half(int32_t pair) { return pair >> 16; }
#endif

static float scale_group(const float *x, vf &factor, vf &special) {
    vf most = {};
    for (long i = 0; i < GROUP; i += VL) {
        const vf v = load(x + i);
        most = vmax(most, vmax(v, -v));
        special = fma(v, vf{}, special);
    }
    const float top = largest(most);
    factor = splat(top ? 127 / top : 127.0f);
    return top / 127;
}

#if defined(__AVX2__)
// Codes in their order; the sums begin where they end for weights that are `zero` too much.
template <class Row>
static void round_to_bytes(const float *x, int zero, Row &out, vf &special) {
    vf factor;
    out.scale = scale_group(x, factor, special);
    const Bytes codes = bytes_of(x, factor);
    _mm256_storeu_si256((Bytes *)out.codes, codes);
    const int32_t sums = sums_of_pairs(codes);
    out.start = -zero * (low_half(sums) + high_half(sums));
}
#if defined(__AVX512VNNI__)
static void round_for_int8(const float *x, RoundedFor8 &out, vf &special) { round_to_bytes(x, 128, out, special); }
#else
static void round_for_int8(const float *x, RoundedFor8 &out, vf &special) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));  // columns 0, 2, 1, 3
    vf factor;
    out.scale = scale_group(x, factor, special);
    for (int i = 0; i < GROUP; i += 16)
        _mm256_storeu_si256((__m256i *)(out.codes + i), _mm256_shuffle_epi8(halves_of(x + i, factor), order));
}
#endif
static void round_for_int6(const float *x, RoundedFor6 &out, vf &special) { round_to_bytes(x, 32, out, special); }
static void round_for_int4(const float *x, RoundedFor4 &out, vf &special) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));  // the even columns first
    vf factor;
    out.scale = scale_group(x, factor, special);
    const Bytes codes = _mm256_shuffle_epi8(bytes_of(x, factor), order);
    _mm256_storeu_si256((Bytes *)out.codes, codes);
    const int32_t sums = sums_of_pairs(codes), low = -8 * low_half(sums), high = -8 * high_half(sums);
#if defined(__AVX512VNNI__)
    out.start = low + high;
#else
    out.start = (int32_t)((uint32_t)(low & 0xffff) | (uint32_t)high << 16);
#endif
}
#else
static void round_in_order(const float *x, const int (&place)[8], int zero, RoundedFor8 &out, vf &special) {
    vf factor;
    out.scale = scale_group(x, factor, special);
    int32_t codes[GROUP];
    for (long i = 0; i < GROUP; i += VL) {
        const vi integers = nearest(load(x + i) * factor);
        memcpy(codes + i, &integers, sizeof integers);
    }
    out.start = 0;
    for (long i = 0; i < GROUP; i++) {
        out.codes[i / 8 * 8 + place[i % 8]] = codes[i];
        out.start -= zero * codes[i];
    }
}
static void round_for_int8(const float *x, RoundedFor8 &out, vf &special) {
    round_in_order(x, {0, 2, 1, 3, 4, 6, 5, 7}, 0, out, special);
}
static void round_for_int6(const float *x, RoundedFor6 &out, vf &special) {
    round_in_order(x, {0, 2, 1, 3, 4, 6, 5, 7}, 32, out, special);
}
static void round_for_int4(const float *x, RoundedFor4 &out, vf &special) {
    round_in_order(x, {0, 2, 4, 6, 1, 3, 5, 7}, 8, out, special);
}
#endif

static float inverse_rms(const float *x, long width, float eps) {
    vf squares = {};
    const long whole = width / VL * VL;
    for (long i = 0; i < whole; i += VL) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (long i = whole; i < width; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / width + eps);
}

template <class Group, class W, class Round>
static void round_row(const float *x, const W *norm, float rstd, long width, Group *out, const Round &round) {
    alignas(64) float group[GROUP];
    vf special = {};
    for (long k = 0; k < width; k += GROUP) {
        load_group(x, norm, rstd, k, width, group);
        round(group, out[k / GROUP], special);
    }
    const float all = sum(special);
    if (all != all)  // NaN
        for (long k = 0; k < width; k += GROUP) out[k / GROUP].scale = all;
}

template <class W>
static void prepare_row(const float *x, const W *norm, float eps, const Weight &w, uint8_t *out) {
    const float rstd = norm ? inverse_rms(x, w.width, eps) : 1.0f;
    if (w.format == FORMAT_INT8)
        round_row(x, norm, rstd, w.width, reinterpret_cast<RoundedFor8 *>(out), round_for_int8);
    else if (w.format == FORMAT_INT6)
        round_row(x, norm, rstd, w.width, reinterpret_cast<RoundedFor6 *>(out), round_for_int6);
    else if (w.format == FORMAT_INT4)
        round_row(x, norm, rstd, w.width, reinterpret_cast<RoundedFor4 *>(out), round_for_int4);
    else
        for (long k = 0; k < w.width; k += GROUP)
            load_group(x, norm, rstd, k, w.width, reinterpret_cast<float *>(out) + k);
}

constexpr long SERIAL_COLUMNS = 16 * 1024;  // fewer are prepared before a second thread has begun

// `count` rows for the products with w, kept in the scratch memory of this thread and `Slot`.
template <class Slot>
static Rows prepare(const float *x, long ldx, long count, const Norm &norm, const Weight &w, int threads) {
    if (!w.rounds() && !norm.weight && w.width % GROUP == 0)
        return {reinterpret_cast<const uint8_t *>(x), ldx * (long)sizeof(float)};
    const long stride = row_bytes(w);
    uint8_t *out = reinterpret_cast<uint8_t *>(scratch<Slot>(count * stride / sizeof(float)));
    parallel_for(count * w.width < SERIAL_COLUMNS ? 1 : threads, count, [&](long i) {
        if (norm.weight && norm.dtype == BFLOAT16)
            prepare_row(x + i * ldx, static_cast<const bf16 *>(norm.weight), norm.eps, w, out + i * stride);
        else
            prepare_row(x + i * ldx, static_cast<const float *>(norm.weight), norm.eps, w, out + i * stride);
    });
    return {out, stride};
}
