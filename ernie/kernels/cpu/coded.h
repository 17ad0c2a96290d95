// Weights of bfloat16 in 12 bits, without loss, and their products with a few rows.
//
// The high byte of a bfloat16 (its sign and seven bits of the exponent) takes few values in the weights of a
// network: sixteen of them cover a factor of 4**7 of magnitudes of both signs. A block keeps the low bytes
// as they are, and of the high bytes four bits each: the place in the block's own table of 16. Zero
// is always there. A weight whose high byte is not stands as zero, and is an escape: a list behind all blocks
// keeps its place and value, and its product is added after the others.
//
//   block   [table of 16, escapes, where they are] [[low bytes, columns 0-3] [4-7] [codes]] ...
//
// A unit of low bytes holds 16 rows times four columns, four rows to 16 bytes: columns 0 and 1 of each
// row, then 2 and 3. So `unpack` with the high bytes makes words of two columns for four rows, in every width of
// vectors. A unit of codes has those of the first unit in the low halves of its bytes, in the same order.
#pragma once

#include "weight.h"

struct Escape {
    uint32_t place;  // column * LANES + row of the block
    float value;
};

struct CodedHeader {
    uint8_t table[16];
    int64_t count, offset;  // of the block's escapes: where they begin, in bytes from the block
    uint8_t unused[32];
    const Escape *escapes() const {
        return reinterpret_cast<const Escape *>(reinterpret_cast<const uint8_t *>(this) + offset);
    }
};
static_assert(sizeof(CodedHeader) == UNIT, "a header is a unit");

// The high bytes of four columns: of the codes in the low halves of bytes, or in the high ones.
ERNIE_INLINE vi high_bytes(vi codes, bool second, const uint8_t *table) {
#if defined(__AVX512BW__)
    const __m512i places = (__m512i)((second ? codes >> 4 : codes) & 0x0f0f0f0f);
    return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), places);
#elif defined(__AVX2__)
    const __m256i places = (__m256i)((second ? codes >> 4 : codes) & 0x0f0f0f0f);
    return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), places);
#else
    uint8_t bytes[sizeof codes];
    memcpy(bytes, &codes, sizeof bytes);
    for (uint8_t &byte : bytes) byte = table[second ? byte >> 4 : byte & 15];
    memcpy(&codes, bytes, sizeof bytes);
    return codes;
#endif
}
// Words of two columns: of the first eight or the last eight bytes of every 16.
ERNIE_INLINE vi join_bytes(vi low, vi high, bool last) {
#if defined(__AVX512BW__)
    return last ? (vi)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high)
                : (vi)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
    return last ? (vi)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high)
                : (vi)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
#elif defined(__SSE2__)
    return last ? (vi)_mm_unpackhi_epi8((__m128i)low, (__m128i)high)
                : (vi)_mm_unpacklo_epi8((__m128i)low, (__m128i)high);
#else
    uint8_t lows[16], highs[16], out[16];
    memcpy(lows, &low, 16), memcpy(highs, &high, 16);
    for (int i = 0; i < 8; i++) out[2 * i] = lows[8 * last + i], out[2 * i + 1] = highs[8 * last + i];
    memcpy(&low, out, 16);
    return low;
#endif
}

static inline const CodedHeader &header_of(const uint8_t *block) {
    return *reinterpret_cast<const CodedHeader *>(block);
}

// use(column, words) for columns 0 and 1, then 2 and 3, of the first or of the second four of three units.
template <class Use>
ERNIE_INLINE void decode(const uint8_t *units, bool second, const uint8_t *table, const Use &use) {
    const Words low = load_words(units + second * UNIT), codes = load_words(units + 2 * UNIT);
    const Words high = each<Words>([&](int p) { return high_bytes(codes.v[p], second, table); });
    use(0, each<Words>([&](int p) { return join_bytes(low.v[p], high.v[p], false); }));
    use(2, each<Words>([&](int p) { return join_bytes(low.v[p], high.v[p], true); }));
}

// N blocks, `bytes` apart, at once, without the escapes: out[block * MOST_ROWS + row]
template <int M, int N>
static void multiply_coded(const uint8_t *block, long bytes, const uint8_t *x, long stride, long groups, Floats *out,
                           const uint8_t *after) {
    const float *column = reinterpret_cast<const float *>(x), *end = column + groups * GROUP;
    const long ldx = stride / (long)sizeof(float);
    Floats sums[N][M] = {};
    const Ahead ahead(block + bytes, after, N);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) __builtin_prefetch(header_of(block + n * bytes).escapes());
    for (const uint8_t *w = block + UNIT; column < end; w += 3 * UNIT) {
        const uint8_t *next = ahead.of(w);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 3
            for (int u = 0; u < 3; u++) __builtin_prefetch(next + n * bytes + u * UNIT);
#pragma GCC unroll 2
        for (int second = 0; second < 2; second++, column += 4)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                const auto add = [&](int c, const Floats &floats) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int m = 0; m < M; m++) {
                        const vf xm = splat(column[m * ldx + c]);
#pragma GCC unroll 4
                        for (int p = 0; p < PARTS; p++)
                            sums[n][m].v[p] = in_order(fma(floats.v[p], xm, sums[n][m].v[p]));
                    }
                };
                const auto add_both = [&](int c, const Words &both) __attribute__((always_inline)) {
                    add(c, even_columns(both)), add(c + 1, odd_columns(both));
                };
                decode(w + n * bytes, second, block + n * bytes, add_both);
            }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) out[n * MOST_ROWS + m] = sums[n][m];
}

// The products of a block's escapes with M rows join the others.
static void add_escapes(const uint8_t *block, const uint8_t *x, long stride, long rows, Floats *out) {
    const CodedHeader &header = header_of(block);
    if (!header.count) return;
    const Escape *escapes = header.escapes();
    for (long m = 0; m < rows; m++) {
        const float *column = reinterpret_cast<const float *>(x + m * stride);
        float sums[LANES];
        store(sums, out[m]);
        for (long i = 0; i < header.count; i++)
            sums[escapes[i].place % LANES] += escapes[i].value * column[escapes[i].place / LANES];
        out[m] = load_floats(sums);
    }
}
