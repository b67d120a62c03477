/* AVX-512 with VNNI, VBMI and BF16: see native_types.h for what an instruction set defines. */

#include <immintrin.h>

#define LANES 16
#include "native_types.h"

enum {
    STRIPE = 4,     /* input rows that are multiplied with a tile at once */
    PANEL = 64,     /* outputs of a tile whose sums are kept in registers with those of a stripe */
    HAS_WORDS = 0,  /* whether 8-bit codes are multiplied as 16-bit numbers */
    HAS_PIECES = 0, /* whether sums of `dot` must be settled, see `span` */
    FLIP = 0,       /* 128 if products take 8-bit codes as signed numbers, else 0 */
};

/* ---- exact sums of products ---- */

/* Products that may be added before `settle`, for codes and steps of these bit widths. */
static inline int64_t span(int64_t weight_bits, int64_t input_bits) {
    (void)weight_bits, (void)input_bits;
    return MAX_RUN;
}

/* Adds the products of four neighboring unsigned and signed bytes to each lane. */
INLINE vi dot(vi sum, vi q, vi t) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, (__m512i)t);
}

INLINE vi dot_words(vi sum, vi q, vi t) { (void)q, (void)t; return sum; }

/* The sums of `dot` in int32. */
INLINE vi settle(vi sum) { return sum; }

/* The sum of all lanes of each of four vectors. */
INLINE i4 sum_lanes(vi a, vi b, vi c, vi d) {
    __m512i x = (__m512i)a, y = (__m512i)b, z = (__m512i)c, w = (__m512i)d;
    x = _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    z = _mm512_add_epi32(_mm512_unpacklo_epi32(z, w), _mm512_unpackhi_epi32(z, w));
    x = _mm512_add_epi32(_mm512_unpacklo_epi64(x, z), _mm512_unpackhi_epi64(x, z));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return (i4)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* ---- floats ---- */

INLINE vf fused(vf a, vf b, vf c) {
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf nearest(vf x) {
    return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The sum of 16 lanes, in the order that every instruction set has. */
INLINE float sum_floats(const vf *t) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)t[0]),
                             _mm512_extractf32x8_ps((__m512)t[0], 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* Looks up values of codes, of which there are at most 16 if `few`. */
INLINE vf look_up(vi codes, const float *levels, const int few) {
    if (few) return (vf)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(levels));
    return (vf)_mm512_i32gather_ps((__m512i)codes, levels, 4);
}

/* ---- codes are unpacked ---- */

/* A mask of the first `count` of 64 lanes. */
static inline __mmask64 first(int64_t count) {
    return count >= 64 ? ~0ull : ~0ull >> (64 - count);
}

/* Constants that unpack 64 codes of one bit width. */
typedef struct {
    __m512i bytes;   /* for each code, which byte goes to its lane */
    __m512i shifts;  /* for each code, where it begins in the 8 bytes of its group of 8 codes */
    __m512i mask;    /* the bits of a code */
    __mmask64 whole; /* the bytes of a chunk */
    int64_t bits;
} Unpacker;

static inline Unpacker unpacker(const Weight *w) {
    uint8_t bytes[64], shifts[64];
    for (int i = 0; i < 64; i++) {
        bytes[i] = i / 8 * w->bits + i % 8;
        shifts[i] = i % 8 * w->bits;
    }
    return (Unpacker){_mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts),
                      _mm512_set1_epi8((char)((1 << w->bits) - 1)), first(CHUNK / 8 * w->bits),
                      w->bits};
}

/* Unpacks up to CHUNK codes, of which the first begins at a byte. Those after `count` are
   undefined, but codes. */
INLINE vi unpack(const uint8_t *at, int64_t count, const Unpacker *by) {
    __mmask64 present = count >= CHUNK ? by->whole : first((count * by->bits + 7) / 8);
    __m512i stream = _mm512_maskz_loadu_epi8(present, at);
    __m512i lanes = _mm512_permutexvar_epi8(by->bytes, stream);
    return (vi)_mm512_and_si512(_mm512_multishift_epi64_epi8(by->shifts, lanes), by->mask);
}

/* Unpacks up to 2 * CHUNK codes of 4 bits: those at even places, and those at odd ones. */
INLINE void unpack_pairs(const uint8_t *at, int64_t count, const Unpacker *by, vi *q) {
    (void)by;
    __m512i half = _mm512_set1_epi8(15);
    __m512i pairs = count >= 2 * CHUNK ? _mm512_loadu_si512(at)
                                       : _mm512_maskz_loadu_epi8(first((count + 1) / 2), at);
    q[0] = (vi)_mm512_and_si512(pairs, half);
    q[1] = (vi)_mm512_and_si512(_mm512_srli_epi16(pairs, 4), half);
}

INLINE void unpack_words(vi bytes, vi *q) { q[0] = q[1] = bytes; }

/* ---- products in bf16 with 4-bit codes, whose values are looked up ---- */

typedef uint16_t rounded_input; /* how the input of `add_pairs` is stored */
typedef __m512i Table;

/* Where number `i` of 64 lies in the arranged input of `add_pairs`. */
static inline int64_t pair_place(int64_t i) { return i % 2 * 32 + i / 2; }
static inline rounded_input pair_input(uint16_t x) { return x; }

/* The look-up takes 5 bits of its index, so with a table of 32 entries whose halves are equal, a
   whole byte looks up its low code without being masked. */
INLINE Table table_of(const uint16_t *levels) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)levels));
}

/* Adds the products of 64 codes with `count` input rows to 16 lanes each. */
INLINE void add_pairs(vf sum[][WHOLE], const uint8_t *at, const Table *table,
                      const rounded_input *x, int64_t stride, const int count) {
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at));
    __m512bh even = (__m512bh)_mm512_permutexvar_epi16(both, *table);
    __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), *table);
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        const uint16_t *in = x + m * stride;
        __m512 part = (__m512)sum[m][0];
        part = _mm512_dpbf16_ps(part, (__m512bh)_mm512_loadu_si512(in), even);
        sum[m][0] = (vf)_mm512_dpbf16_ps(part, (__m512bh)_mm512_loadu_si512(in + 32), odd);
    }
}

/* The sum of the lanes that `add_pairs` added to. */
INLINE float sum_pairs(const vf *t) { return sum_floats(t); }
