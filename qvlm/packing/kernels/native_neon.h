/* ARM NEON with the dot products of Armv8.2, and with i8mm where the compiler's options allow it:
   see native_types.h for what an instruction set defines. */

#include <arm_neon.h>

#define LANES 4
#include "native_types.h"

enum {
    STRIPE = 4,     /* input rows that are multiplied with a tile at once */
    PANEL = 16,     /* outputs of a tile whose sums are kept in registers with those of a stripe */
    HAS_WORDS = 0,
    HAS_PIECES = 0,
#ifdef __ARM_FEATURE_MATMUL_INT8
    FLIP = 0,
#else
    FLIP = 128,
#endif
};

/* ---- exact sums of products ---- */

static inline int64_t span(int64_t weight_bits, int64_t input_bits) {
    (void)weight_bits, (void)input_bits;
    return MAX_RUN;
}

/* Without i8mm both operands are signed, so 8-bit codes q are given as q - FLIP. */
INLINE vi dot(vi sum, vi q, vi t) {
#ifdef __ARM_FEATURE_MATMUL_INT8
    return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)q, (int8x16_t)t);
#else
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)q, (int8x16_t)t);
#endif
}

INLINE vi dot_words(vi sum, vi q, vi t) { (void)q, (void)t; return sum; }
INLINE vi settle(vi sum) { return sum; }

INLINE i4 sum_lanes(vi a, vi b, vi c, vi d) {
    int32x4_t ab = vpaddq_s32((int32x4_t)a, (int32x4_t)b);
    return (i4)vpaddq_s32(ab, vpaddq_s32((int32x4_t)c, (int32x4_t)d));
}

/* ---- floats ---- */

INLINE vf fused(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE vf larger(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf smaller(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf nearest(vf x) { return (vf)vrndnq_f32((float32x4_t)x); }

INLINE float sum_floats(const vf *t) {
    vf a = (t[0] + t[2]) + (t[1] + t[3]);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

INLINE vf look_up(vi codes, const float *levels, const int few) {
    if (few) {
        uint8x16x4_t table = vld1q_u8_x4((const uint8_t *)levels);
        vi bytes = codes * 0x04040404 + 0x03020100;
        return (vf)vqtbl4q_u8(table, (uint8x16_t)bytes);
    }
    return (vf){levels[codes[0]], levels[codes[1]], levels[codes[2]], levels[codes[3]]};
}

/* ---- codes are unpacked ---- */

/* Constants that unpack codes of one bit width. */
typedef struct {
    uint8x16_t low, high; /* for each of 8 codes, the two bytes that hold it */
    int16x8_t drop;       /* for each of 8 codes, where it begins in its two bytes, negative */
    uint8x16_t mask;      /* the bits of a code */
    const uint8_t *end;   /* of the codes in memory */
    int64_t bits;
} Unpacker;

static inline Unpacker unpacker(const Weight *w) {
    uint8_t low[16], high[16];
    int16_t drop[8];
    for (int i = 0; i < 8; i++) {
        int64_t from = i * w->bits;
        low[2 * i] = (uint8_t)(from / 8);
        low[2 * i + 1] = (uint8_t)(from / 8 + 1);
        drop[i] = (int16_t)(-(from % 8));
    }
    for (int i = 0; i < 16; i++) high[i] = low[i] + 8;
    return (Unpacker){vld1q_u8(low), vld1q_u8(high), vld1q_s16(drop),
                      vdupq_n_u8((uint8_t)((1 << w->bits) - 1)),
                      w->codes + w->rows * w->row_bytes, w->bits};
}

INLINE vi unpack(const uint8_t *at, int64_t count, const Unpacker *by) {
    uint8_t copy[CHUNK] = {0};
    (void)count;
    if (at + CHUNK > by->end) { /* nothing is read behind the codes */
        memcpy(copy, at, least(CHUNK, by->end - at));
        at = copy;
    }
    if (by->bits == 8) return load_ints(at);
    uint8x16_t stream = vcombine_u8(vld1_u8(at), vld1_u8(at + by->bits));
    uint16x8_t a = vreinterpretq_u16_u8(vqtbl1q_u8(stream, by->low));
    uint16x8_t b = vreinterpretq_u16_u8(vqtbl1q_u8(stream, by->high));
    uint8x8_t first = vmovn_u16(vshlq_u16(a, by->drop));
    uint8x8_t second = vmovn_u16(vshlq_u16(b, by->drop));
    return (vi)vandq_u8(vcombine_u8(first, second), by->mask);
}

INLINE void unpack_pairs(const uint8_t *at, int64_t count, const Unpacker *by, vi *q) {
    uint8_t copy[CHUNK] = {0};
    (void)by;
    if (count < 2 * CHUNK) {
        memcpy(copy, at, (count + 1) / 2);
        at = copy;
    }
    uint8x16_t pairs = vld1q_u8(at);
    q[0] = (vi)vandq_u8(pairs, vdupq_n_u8(15));
    q[1] = (vi)vshrq_n_u8(pairs, 4);
}

INLINE void unpack_words(vi bytes, vi *q) { q[0] = q[1] = bytes; }

/* ---- products in bf16 with 4-bit codes, whose values are looked up ---- */

/* As with AVX2, float32 gives what AVX-512's bf16 instructions give. */
typedef float rounded_input;
typedef struct {
    uint8x16_t low, high; /* bytes of the 16 values */
} Table;

static inline int64_t pair_place(int64_t i) {
    int64_t odd = i % 2, at = i / 2, lane = at / 2;
    return odd * 32 + lane / 4 * 8 + (at % 2 ? 0 : 4) + lane % 4;
}
static inline rounded_input pair_input(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE Table table_of(const uint16_t *levels) {
    uint8x16x2_t bytes = vld2q_u8((const uint8_t *)levels);
    return (Table){bytes.val[0], bytes.val[1]};
}

INLINE void add_pairs(vf sum[][WHOLE], const uint8_t *at, const Table *table,
                      const rounded_input *x, int64_t stride, const int count) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        /* Even codes of the first 16 bytes, of the other 16 bytes, and then the odd codes. */
        uint8x16_t both = vld1q_u8(at + part % 2 * 16);
        uint8x16_t codes = part < 2 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
        uint8x16_t low = vqtbl1q_u8(table->low, codes), high = vqtbl1q_u8(table->high, codes);
#pragma GCC unroll 2
        for (int block = 0; block < 2; block++) {
            vu values = (vu)(block ? vzip2q_u8(low, high) : vzip1q_u8(low, high));
            vf second = (vf)(values & 0xffff0000u), first = (vf)(values << 16);
            int at_block = part % 2 * 2 + block;
#pragma GCC unroll 8
            for (int m = 0; m < count; m++) {
                const float *in = x + m * stride + part / 2 * 32 + at_block * 8;
                vf sums = fused(load_floats(in), second, sum[m][at_block]);
                sum[m][at_block] = fused(load_floats(in + 4), first, sums);
            }
        }
    }
}

INLINE float sum_pairs(const vf *t) { return sum_floats(t); }
