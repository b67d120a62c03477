/* AVX2 with FMA, and with VNNI where the compiler's options allow it (AVX-VNNI, or AVX-512 VNNI on
   vectors of 256 bits): see native_types.h for what an instruction set defines. */

#include <immintrin.h>

#define LANES 8
#include "native_types.h"

#if defined(__AVXVNNI__)
#define DOT _mm256_dpbusd_avx_epi32
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DOT _mm256_dpbusd_epi32
#endif

enum {
    STRIPE = 3, /* with 4, the 16 registers do not suffice */
    PANEL = 16,
    FLIP = 0,
#ifdef DOT
    HAS_WORDS = 0,
    HAS_PIECES = 0,
#else
    HAS_WORDS = 1,
    HAS_PIECES = 1,
#endif
};

/* ---- exact sums of products ---- */

#ifdef DOT

static inline int64_t span(int64_t weight_bits, int64_t input_bits) {
    (void)weight_bits, (void)input_bits;
    return MAX_RUN;
}
INLINE vi dot(vi sum, vi q, vi t) { return (vi)DOT((__m256i)sum, (__m256i)q, (__m256i)t); }
INLINE vi settle(vi sum) { return sum; }

#else

/* Sums of two products are added in 16 bits, which hold this many of them. Steps of inputs of 8 bits
   are halved or counted from the middle, so that they lie in -128 .. 127. */
static inline int64_t span(int64_t weight_bits, int64_t input_bits) {
    int64_t code = (1 << weight_bits) - 1, step = input_bits == 8 ? 128 : (1 << input_bits) - 1;
    return 32767 / (2 * code * step);
}
/* Adds the sums of two products to 16 lanes of 16 bits. */
INLINE vi dot(vi sum, vi q, vi t) {
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)q, (__m256i)t));
}
INLINE vi settle(vi sum) {
    return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
}

#endif

/* Adds the products of two neighboring 16-bit numbers to each lane. */
INLINE vi dot_words(vi sum, vi q, vi t) {
    return sum + (vi)_mm256_madd_epi16((__m256i)q, (__m256i)t);
}

INLINE i4 sum_lanes(vi a, vi b, vi c, vi d) {
    __m256i x = (__m256i)a, y = (__m256i)b, z = (__m256i)c, w = (__m256i)d;
    x = _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
    z = _mm256_add_epi32(_mm256_unpacklo_epi32(z, w), _mm256_unpackhi_epi32(z, w));
    x = _mm256_add_epi32(_mm256_unpacklo_epi64(x, z), _mm256_unpackhi_epi64(x, z));
    return (i4)_mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

/* ---- floats ---- */

INLINE vf fused(vf a, vf b, vf c) {
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf nearest(vf x) {
    return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE float sum_floats(const vf *t) {
    __m256 a = (__m256)(t[0] + t[1]);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

INLINE vf look_up(vi codes, const float *levels, const int few) {
    __m256i at = (__m256i)codes;
    if (!few) return (vf)_mm256_i32gather_ps(levels, at, 4);
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), at);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), at);
    return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}

/* ---- codes are unpacked ---- */

/* Constants that unpack codes of one bit width. */
typedef struct {
    __m256i windows;    /* for each of 8 codes, the two bytes that hold it */
    __m256i lift;       /* factors that move each code to the top of its two bytes */
    __m128i drop;       /* shift that moves it down again */
    const uint8_t *end; /* of the codes in memory */
    int64_t bits;
} Unpacker;

static inline Unpacker unpacker(const Weight *w) {
    uint8_t windows[32];
    uint16_t lift[16];
    for (int i = 0; i < 16; i++) {
        int64_t from = i % 8 * w->bits;
        windows[2 * i] = (uint8_t)(from / 8);
        windows[2 * i + 1] = (uint8_t)(from / 8 + 1);
        lift[i] = (uint16_t)(1 << (16 - w->bits - from % 8));
    }
    return (Unpacker){_mm256_loadu_si256((const __m256i *)windows),
                      _mm256_loadu_si256((const __m256i *)lift),
                      _mm_cvtsi64_si128(16 - w->bits), w->codes + w->rows * w->row_bytes, w->bits};
}

/* Unpacks 16 codes into 16-bit numbers. */
INLINE __m256i unpack16(const uint8_t *at, const Unpacker *by) {
    __m128i low = _mm_loadl_epi64((const __m128i *)at);
    __m128i high = _mm_loadl_epi64((const __m128i *)(at + by->bits));
    __m256i words = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), by->windows);
    return _mm256_srl_epi16(_mm256_mullo_epi16(words, by->lift), by->drop);
}

INLINE vi unpack(const uint8_t *at, int64_t count, const Unpacker *by) {
    uint8_t copy[CHUNK] = {0};
    if (at + CHUNK > by->end) { /* nothing is read behind the codes */
        memcpy(copy, at, least(CHUNK, by->end - at));
        at = copy;
    }
    (void)count;
    if (by->bits == 8) return load_ints(at);
    if (by->bits == 4) {
        __m128i pairs = _mm_loadu_si128((const __m128i *)at), half = _mm_set1_epi8(15);
        __m128i even = _mm_and_si128(pairs, half);
        __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), half);
        return (vi)_mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    }
    __m256i bytes = _mm256_packus_epi16(unpack16(at, by), unpack16(at + 2 * by->bits, by));
    return (vi)_mm256_permute4x64_epi64(bytes, 0xd8);
}

INLINE void unpack_pairs(const uint8_t *at, int64_t count, const Unpacker *by, vi *q) {
    uint8_t copy[CHUNK] = {0};
    (void)by;
    if (count < 2 * CHUNK) {
        memcpy(copy, at, (count + 1) / 2);
        at = copy;
    }
    __m256i pairs = _mm256_loadu_si256((const __m256i *)at), half = _mm256_set1_epi8(15);
    q[0] = (vi)_mm256_and_si256(pairs, half);
    q[1] = (vi)_mm256_and_si256(_mm256_srli_epi16(pairs, 4), half);
}

/* Widens bytes to 16 bits. */
INLINE void unpack_words(vi bytes, vi *q) {
    q[0] = (vi)_mm256_cvtepu8_epi16(_mm256_castsi256_si128((__m256i)bytes));
    q[1] = (vi)_mm256_cvtepu8_epi16(_mm256_extracti128_si256((__m256i)bytes, 1));
}

/* ---- products in bf16 with 4-bit codes, whose values are looked up ---- */

/* A product of two bf16 numbers fits float32. So float32 gives what the bf16 instructions of
   AVX-512 give, in their order: in each lane first the number at an odd place, then the one before.
   Values are looked up byte by byte and interleaved, which leaves lanes 0 to 3 and 8 to 11 in one
   vector, and the others in another. */
typedef float rounded_input;
typedef struct {
    __m256i low, high; /* bytes of the 16 values, twice */
} Table;

static inline int64_t pair_place(int64_t i) {
    int64_t odd = i % 2, at = i / 2, lane = at / 2;
    int64_t block = lane / 4 % 2, place = lane / 8 * 4 + lane % 4;
    return odd * 32 + block * 16 + (at % 2 ? 0 : 8) + place;
}
static inline rounded_input pair_input(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE Table table_of(const uint16_t *levels) {
    __m256i all = _mm256_loadu_si256((const __m256i *)levels);
    __m256i low = _mm256_packus_epi16(_mm256_and_si256(all, _mm256_set1_epi16(255)),
                                      _mm256_srli_epi16(all, 8));
    /* The lanes of `low` hold low and high bytes of 8 values each. */
    low = _mm256_permute4x64_epi64(low, 0xd8);
    return (Table){_mm256_permute2x128_si256(low, low, 0x00),
                   _mm256_permute2x128_si256(low, low, 0x11)};
}

INLINE void add_pairs(vf sum[][WHOLE], const uint8_t *at, const Table *table,
                      const rounded_input *x, int64_t stride, const int count) {
    __m256i both = _mm256_loadu_si256((const __m256i *)at), half = _mm256_set1_epi8(15);
    __m256i top = _mm256_set1_epi32((int)0xffff0000);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        __m256i codes = _mm256_and_si256(odd ? _mm256_srli_epi16(both, 4) : both, half);
        __m256i low = _mm256_shuffle_epi8(table->low, codes);
        __m256i high = _mm256_shuffle_epi8(table->high, codes);
#pragma GCC unroll 2
        for (int block = 0; block < 2; block++) {
            __m256i values = block ? _mm256_unpackhi_epi8(low, high)
                                   : _mm256_unpacklo_epi8(low, high);
            vf second = (vf)_mm256_and_si256(values, top);
            vf first = (vf)_mm256_slli_epi32(values, 16);
#pragma GCC unroll 8
            for (int m = 0; m < count; m++) {
                const float *in = x + m * stride + odd * 32 + block * 16;
                vf part = fused(load_floats(in), second, sum[m][block]);
                sum[m][block] = fused(load_floats(in + 8), first, part);
            }
        }
    }
}

INLINE float sum_pairs(const vf *t) {
    __m256 a = (__m256)t[0], b = (__m256)t[1];
    vf whole[2] = {(vf)_mm256_permute2f128_ps(a, b, 0x20), (vf)_mm256_permute2f128_ps(a, b, 0x31)};
    return sum_floats(whole);
}
