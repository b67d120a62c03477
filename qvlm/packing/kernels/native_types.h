/* What all products share: the packed weight, its scale runs, and vectors of any width.

   A header of an instruction set is included first. It defines LANES, the number of 32-bit lanes of
   its vectors, and the operations that GCC's vector types do not have. */

#include <float.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Calls f with a constant count from 1 to `most`, which is 3 or 4, so that its accumulators are kept
   in registers. */
#define SPECIALIZED(count, most, f) \
    switch (count) { \
    case 1: f(1); break; \
    case 2: f(2); break; \
    case 3: f(3); break; \
    default: f(most); break; \
    }

typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), may_alias));
typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef double vd __attribute__((vector_size(4 * LANES), may_alias));
typedef uint8_t lane_bytes __attribute__((vector_size(LANES), may_alias));
typedef int16_t lane_shorts __attribute__((vector_size(2 * LANES), may_alias));
typedef uint16_t lane_halves __attribute__((vector_size(2 * LANES), may_alias));
typedef int32_t half_ints __attribute__((vector_size(2 * LANES), may_alias));
/* Four numbers, one for each of OUTPUTS outputs or ROWS rows. */
typedef int32_t i4 __attribute__((vector_size(16), may_alias));
typedef float f4 __attribute__((vector_size(16), may_alias));
typedef double d4 __attribute__((vector_size(32), may_alias));

enum {
    CHUNK = 4 * LANES,   /* codes that are unpacked at once, a byte each */
    WHOLE = 16 / LANES,  /* vectors of 16 lanes, which float sums have on every machine */
    MAX_RUN = 512,       /* channels of a scale run at most */
    ROWS = 4,            /* input rows that share a pass over the weight */
    OUTPUTS = 4,         /* weight rows that share a pass over one input row */
    TILE = 64,           /* outputs of a tile, whose weight is unpacked once for many input rows */
    BAND = 768,          /* input rows whose outputs of a tile are kept together */
};
/* Multiplications below which a second thread costs more time than it saves. */
enum { SMALL = 1 << 20 };

/* A packed weight. `_Weight` of native_library.py has the same fields in the same order. */
typedef struct {
    const uint8_t *codes;         /* [rows, row_bytes] */
    int64_t rows, width;          /* outputs and input channels */
    int64_t row_bytes;
    int64_t bits;                 /* of a code, 2 to 8 */
    int64_t group;                /* neighboring channels that share a scale or an absmax */
    const float *scale;           /* uniform weight: [rows or 1, groups] */
    const uint8_t *zero;          /* uniform weight: zero points, of the same shape */
    int64_t stride;               /* scales from one row to the next; 0 if all rows share them */
    const float *factor;          /* [groups]: input scale of each group, or NULL for ones */
    const float *levels;          /* NormalFloat: value of each code, [2^bits]; or NULL */
    const uint8_t *absmax_codes;  /* NormalFloat: [rows * groups], or NULL if absmax is float32 */
    const float *absmax_levels;   /* value of each absmax code, [256] */
    const float *nested_absmax;   /* one per `nested_block` codes; or absmax, [rows * groups] */
    float mean;                   /* of the absmax values, subtracted before they were quantized */
    int64_t nested_block;         /* absmax codes that share a nested absmax */
} Weight;

/* The smaller of two numbers. */
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Vectors from and to memory of any alignment. */
INLINE vi load_ints(const void *at) { vi v; memcpy(&v, at, sizeof v); return v; }
INLINE vf load_floats(const void *at) { vf v; memcpy(&v, at, sizeof v); return v; }
INLINE void store_floats(void *at, vf v) { memcpy(at, &v, sizeof v); }

/* A vector whose lanes are all the same. */
INLINE vi all_ints(int32_t x) { return (vi){0} + x; }
INLINE vf all_floats(float x) { return (vf){0} + x; }

/* The first `count` numbers, and zeros after them. */
INLINE vf load_first(const float *at, int64_t count) {
    if (count >= LANES) return load_floats(at);
    vf v = {0};
    memcpy(&v, at, count * sizeof(float));
    return v;
}

/* The float32 numbers of LANES bf16 numbers. */
INLINE vf from_bf16(lane_halves x) {
    return (vf)(__builtin_convertvector(x, vu) << 16);
}

/* The nearest bf16 numbers, halves to even. */
INLINE lane_halves round_bf16(vf x) {
    vu bits = (vu)x;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, lane_halves);
}

/* Byte number i * LANES + lane of a vector, in each lane. */
INLINE vi widen(vi bytes, int i) {
    lane_bytes part;
    memcpy(&part, (const char *)&bytes + i * LANES, sizeof part);
    return __builtin_convertvector(part, vi);
}

/* Transposes four vectors of four lanes. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i4){__VA_ARGS__})
#endif
INLINE void transpose(i4 v[4]) {
    i4 a = SHUFFLE(v[0], v[1], 0, 4, 1, 5), b = SHUFFLE(v[0], v[1], 2, 6, 3, 7);
    i4 c = SHUFFLE(v[2], v[3], 0, 4, 1, 5), d = SHUFFLE(v[2], v[3], 2, 6, 3, 7);
    v[0] = SHUFFLE(a, c, 0, 1, 4, 5);
    v[1] = SHUFFLE(a, c, 2, 3, 6, 7);
    v[2] = SHUFFLE(b, d, 0, 1, 4, 5);
    v[3] = SHUFFLE(b, d, 2, 3, 6, 7);
}

/* The nearest bf16 number, halves to even. */
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Neighboring channels that share all scales. */
typedef struct {
    int64_t start, width; /* channels */
    int64_t group;        /* index of their scale */
    int64_t stride;       /* bytes of a row of their steps, a whole number of blocks */
    int64_t at;           /* where their steps begin in a row of steps */
} ScaleRun;

/* Writes the scale runs of a weight to `runs`, unless that is NULL, and returns their number. Steps
   of `block` channels take `bytes` bytes, and a run is stored in whole blocks. */
static int64_t find_runs(const Weight *w, int64_t block, int64_t bytes, ScaleRun *runs) {
    int64_t count = 0, at = 0;
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        for (int64_t k = start; k < end; k += MAX_RUN, count++) {
            int64_t width = least(MAX_RUN, end - k);
            int64_t stride = (width + block - 1) / block * bytes;
            if (runs) runs[count] = (ScaleRun){k, width, g, stride, at};
            at += stride;
        }
    }
    return count;
}
