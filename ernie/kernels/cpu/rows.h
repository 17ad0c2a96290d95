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

// The 64 columns of a group from column k on, normed; zeros behind the last.
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

// Where column i of 8 stands among the codes.
constexpr int IN_ORDER[8] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int PAIRS_OF_INT8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
constexpr int EVEN_THEN_ODD[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int PAIRS_OF_INT4[8] = {0, 2, 4, 6, 1, 3, 5, 7};

template <class Code>
static void round_group(const float *x, const int (&place)[8], Rounded<Code> &out, int32_t (&codes)[GROUP]) {
    vf most = {}, special = {};
    for (long i = 0; i < GROUP; i += VL) {
        const vf v = load(x + i);
        most = vmax(most, vmax(v, -v));
        special = fma(v, vf{}, special);  // an infinity or a NaN makes the whole group NaN
    }
    const float top = largest(most);
    const vf factor = splat(top ? 127 / top : 127.0f);
    for (long i = 0; i < GROUP; i += VL) {
        const vi integers = nearest(load(x + i) * factor);
        memcpy(codes + i, &integers, sizeof integers);
    }
    for (long i = 0; i < GROUP; i += 8)
        for (int j = 0; j < 8; j++) out.codes[i + place[j]] = codes[i + j];
    out.scale = top / 127 + sum(special);
}

static int32_t total(const int32_t *codes, long count) {
    int32_t sum = 0;
    for (long i = 0; i < count; i++) sum += codes[i];
    return sum;
}

static void round_for_int8(const float *x, RoundedFor8 &out) {
    alignas(64) int32_t codes[GROUP];
#if defined(__AVX512VNNI__)
    round_group(x, IN_ORDER, out, codes);
    out.start[0] = -128 * total(codes, GROUP);
#else
    round_group(x, PAIRS_OF_INT8, out, codes);
#endif
}

static void round_for_int4(const float *x, RoundedFor4 &out) {
    alignas(64) int32_t codes[GROUP];
#if defined(__AVX2__)
    round_group(x, EVEN_THEN_ODD, out, codes);
#else
    round_group(x, PAIRS_OF_INT4, out, codes);
#endif
    for (int half = 0; half < 2; half++) {
        const int32_t *from = codes + half * 32;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
        int32_t sums[8];  // columns 0 to 3 of every 8 meet in the low half of a lane, 4 to 7 in the high one
        for (int j = 0; j < 8; j++) sums[j] = from[j] + from[j + 8] + from[j + 16] + from[j + 24];
        const int32_t low = -8 * total(sums, 4), high = -8 * total(sums + 4, 4);
        out.start[half] = (int32_t)((uint32_t)(low & 0xffff) | (uint32_t)high << 16);
#else
        out.start[half] = -8 * total(from, 32);
#endif
    }
}

static float inverse_rms(const float *x, long width, float eps) {
    vf squares = {};
    const long whole = width / VL * VL;
    for (long i = 0; i < whole; i += VL) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (long i = whole; i < width; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / width + eps);
}

template <class W>
static void prepare_row(const float *x, const W *norm, float eps, const Weight &w, uint8_t *out) {
    const float rstd = norm ? inverse_rms(x, w.width, eps) : 1.0f;
    for (long k = 0; k < w.width; k += GROUP) {
        alignas(64) float group[GROUP];
        float *to = w.rounds() ? group : reinterpret_cast<float *>(out) + k;
        load_group(x, norm, rstd, k, w.width, to);
        if (w.format == FORMAT_INT8) round_for_int8(group, reinterpret_cast<RoundedFor8 *>(out)[k / GROUP]);
        if (w.format == FORMAT_INT4) round_for_int4(group, reinterpret_cast<RoundedFor4 *>(out)[k / GROUP]);
    }
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
