/* Products with packed weights on a CPU with AVX-512 VNNI, VBMI and BF16. native_library.py calls
   them and says what each is for; base.py defines steps t and v, codes q and zero points z.

   A weight row is a stream of codes of `bits` bits, lowest bit first (see formats.py), so 8 codes
   take `bits` bytes whatever their width, and 64 codes are unpacked at once. Channels are visited
   in scale runs: at most MAX_RUN neighboring channels that share all scales. The sum over a run is
   exact in int32. Sums of runs are scaled and added in order, in float32 for inputs in bf16 and in
   float64 for inputs in float32, whose output is float64 too.

   A parallel loop runs on the threads of the OpenMP library that PyTorch has loaded. Names: `m`
   counts rows of inputs, `n` counts rows of the weight, which are outputs, and `k` counts channels.
   `always_inline` functions are called with constants, and each call is compiled for its own. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Calls f with a constant count from 1 to 4, so that its accumulators are kept in registers. */
#define SPECIALIZED(count, f) \
    switch (count) { \
    case 1: f(1); break; \
    case 2: f(2); break; \
    case 3: f(3); break; \
    default: f(4); break; \
    }

enum {
    CHUNK = 64,    /* codes that are unpacked at once */
    MAX_RUN = 512, /* channels of a scale run at most */
    ROWS = 4,      /* input rows that share a pass over the weight */
    OUTPUTS = 4,   /* weight rows that share a pass over one input row */
    TILE = 64,     /* outputs of a tile, whose weight is unpacked once for many input rows */
    STRIPE = 4,    /* input rows that are multiplied with a tile at once */
    BAND = 768,    /* input rows whose outputs of a tile are kept together */
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

/* Whether this CPU has all instructions that are used here. */
int supported(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

/* The smaller of two numbers. */
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
} Unpacker;

static inline Unpacker unpacker(int64_t bits) {
    uint8_t bytes[64], shifts[64];
    for (int i = 0; i < 64; i++) {
        bytes[i] = i / 8 * bits + i % 8;
        shifts[i] = i % 8 * bits;
    }
    return (Unpacker){_mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts),
                      _mm512_set1_epi8((char)((1 << bits) - 1)), first(CHUNK / 8 * bits)};
}

/* Unpacks up to 64 codes, of which the first begins at a byte. Those after `count` are
   undefined. */
static inline __m512i unpack(const uint8_t *at, int64_t count, int64_t bits, const Unpacker *by) {
    __mmask64 present = count >= CHUNK ? by->whole : first((count * bits + 7) / 8);
    __m512i stream = _mm512_maskz_loadu_epi8(present, at);
    __m512i lanes = _mm512_permutexvar_epi8(by->bytes, stream);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(by->shifts, lanes), by->mask);
}

/* Neighboring channels that share all scales. */
typedef struct {
    int64_t start, width; /* channels */
    int64_t group;        /* index of their scale */
    int64_t stride;       /* bytes of a row of their steps: the width, rounded up to a block */
    int64_t at;           /* where their steps begin in a row of steps */
} ScaleRun;

/* Writes the scale runs of a weight to `runs`, unless that is NULL, and returns their number. Steps
   of a run are stored in whole blocks of `block` bytes. */
static int64_t find_runs(const Weight *w, int64_t block, ScaleRun *runs) {
    int64_t count = 0, at = 0;
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        for (int64_t k = start; k < end; k += MAX_RUN, count++) {
            int64_t width = least(MAX_RUN, end - k), stride = (width + block - 1) / block * block;
            if (runs) runs[count] = (ScaleRun){k, width, g, stride, at};
            at += stride;
        }
    }
    return count;
}

/* ---- inputs are quantized ---- */

/* An input with its grid. `_Input` of native_library.py has the same fields in the same order. */
typedef struct {
    const void *x;             /* [rows, width] float32, or bf16 if `half` */
    int64_t rows, width, half;
    const int32_t *order;      /* [width]: channel of x for each channel of the weight; or NULL */
    const float *scale, *zero; /* one number, or one per row, or one per channel of the weight */
    int64_t by_row;            /* 1 if scale and zero differ by row, else 0 */
    int64_t by_channel;        /* 1 if scale and zero differ by channel, else 0 */
    int64_t bits;              /* of a code, 2 to 8 */
} Input;

/* Whether the steps q - z of an input may not fit int8. */
static inline int wide(const Input *in) { return in->bits == 8; }

/* Loads 16 numbers of an input row from channel k of the weight on, as float32. */
static inline __m512 load16(const Input *in, int64_t row, int64_t k, __mmask16 valid) {
    const float *x = (const float *)in->x + row * in->width;
    const uint16_t *half = (const uint16_t *)in->x + row * in->width;
    if (in->order) {
        float found[16] __attribute__((aligned(64)));
        uint32_t *bits = (uint32_t *)found;
        int64_t count = least(in->width - k, 16);
        const int32_t *order = in->order + k;
        for (int64_t i = 0; i < count; i++)
            if (in->half)
                bits[i] = (uint32_t)half[order[i]] << 16;
            else
                found[i] = x[order[i]];
        return _mm512_maskz_load_ps(valid, found);
    }
    if (!in->half) return _mm512_maskz_loadu_ps(valid, x + k);
    __m256i some = _mm256_maskz_loadu_epi16(valid, half + k);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
}

/* Writes the steps t = q - z of an input row, or q - 128 if `from_middle`. They are rounded as
   `UniformQuantizer` of Python does, to the bit. */
static void quantize(const Input *in, int64_t row, int from_middle, int16_t *t) {
    const float *scale = in->scale + row * in->by_row, *zero = in->zero + row * in->by_row;
    const __m512 top = _mm512_set1_ps((float)((1 << in->bits) - 1));
    for (int64_t k = 0; k < in->width; k += 16) {
        __mmask16 valid = (__mmask16)first(least(in->width - k, 16));
        __m512 s = _mm512_set1_ps(*scale), z = _mm512_set1_ps(*zero);
        if (in->by_channel) {
            s = _mm512_maskz_loadu_ps(valid, scale + k);
            z = _mm512_maskz_loadu_ps(valid, zero + k);
        }
        __m512 steps = _mm512_maskz_div_ps(valid, load16(in, row, k, valid), s);
        steps = _mm512_roundscale_ps(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        steps = _mm512_max_ps(steps, _mm512_sub_ps(_mm512_setzero_ps(), z));
        steps = _mm512_min_ps(steps, _mm512_sub_ps(top, z));
        if (from_middle) steps = _mm512_add_ps(steps, _mm512_sub_ps(z, _mm512_set1_ps(128)));
        __m256i narrow = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(steps));
        _mm256_mask_storeu_epi16(t + k, valid, narrow);
    }
}

/* ---- few input rows: the weight is read once, as it is stored ---- */

/* Steps of an input, arranged as the product reads them: run by run, in blocks that zeros fill up.

   Steps of 8-bit inputs do not fit int8 and are split, t = 2 high + low; others are `high` alone. A
   block has the channels that are unpacked at once. That is a CHUNK, or two of them for 4-bit
   codes: the low halves of 64 bytes hold the even channels of the block and the high halves the
   odd ones, so its steps are those of its even channels and then those of its odd ones. */
typedef struct {
    int64_t rows, block;
    int64_t bytes; /* of a row of steps */
    int64_t count; /* of runs */
    ScaleRun *runs;
    int8_t *high, *low; /* [rows, bytes]; low is NULL if no step is split */
    int32_t *sums;      /* [rows, count, 16]: sum of t over each run, in 16 partial sums */
} Steps;

/* Writes the steps t of an input row into `s`. */
static void arrange(Steps *s, int64_t row, const int16_t *t, int is_wide) {
    for (int64_t c = 0; c < s->count; c++) {
        const ScaleRun *run = s->runs + c;
        int8_t *high = s->high + row * s->bytes + run->at;
        int8_t *low = is_wide ? s->low + row * s->bytes + run->at : NULL;
        memset(high, 0, run->stride);
        if (low) memset(low, 0, run->stride);
        for (int64_t k = 0; k < run->width; k++) {
            int64_t to = k, in_block = k % s->block;
            if (s->block > CHUNK) to = k - in_block + in_block % 2 * CHUNK + in_block / 2;
            int16_t step = t[run->start + k];
            high[to] = (int8_t)(is_wide ? step >> 1 : step);
            if (low) low[to] = step & 1;
        }
        __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
        for (int64_t k = 0; k < run->stride; k += CHUNK)
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(high + k));
        if (low) {
            sum = _mm512_slli_epi32(sum, 1);
            for (int64_t k = 0; k < run->stride; k += CHUNK)
                sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(low + k));
        }
        _mm512_storeu_si512(s->sums + (row * s->count + c) * 16, sum);
    }
}

/* Computes y[row + m, n + r] = sum over runs of s (sum of t q - z sum of t), for m < count and
   r < outputs. y is float64 if `fine`, else float32. */
static inline __attribute__((always_inline)) void integer_block(
    const Weight *w, const Unpacker *by, int64_t n, const Steps *steps, int64_t row, void *y,
    const int64_t block, const int is_wide, const int fine, const int outputs, const int count) {
    const __m512i half = _mm512_set1_epi8(15);
    const int8_t *of_high = steps->high + row * steps->bytes;
    const int8_t *of_low = is_wide ? steps->low + row * steps->bytes : NULL;
    const int32_t *sums = steps->sums + row * steps->count * 16;
    __m512 total[OUTPUTS][ROWS];
    double fine_total[OUTPUTS][ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            total[r][m] = _mm512_setzero_ps();
            fine_total[r][m] = 0;
        }
    for (int64_t c = 0; c < steps->count; c++) {
        const ScaleRun *run = steps->runs + c;
        const uint8_t *at = w->codes + n * w->row_bytes + run->start * w->bits / 8;
        /* The hardware prefetcher does not follow several rows at a time, so the codes that the
           next call but one reads are requested here. */
        const uint8_t *ahead = w->codes + (n + 2 * outputs) * w->row_bytes;
        ahead += outputs * (run->start * w->bits / 8);
        for (int64_t i = 0; i < outputs * run->width * w->bits / 8; i += 64)
            _mm_prefetch((const char *)ahead + i, _MM_HINT_T1);
        __m512i high[OUTPUTS][ROWS], low[OUTPUTS][ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
            for (int m = 0; m < count; m++) high[r][m] = low[r][m] = _mm512_setzero_si512();
        for (int64_t k = 0; k < run->width; k += block) {
            int64_t left = run->width - k, from = run->at + k;
#pragma GCC unroll 8
            for (int r = 0; r < outputs; r++) {
                const uint8_t *here = at + r * w->row_bytes + k * w->bits / 8;
                __m512i q[2];
                if (block > CHUNK) {
                    __m512i pairs = left >= block
                                        ? _mm512_loadu_si512(here)
                                        : _mm512_maskz_loadu_epi8(first((left + 1) / 2), here);
                    q[0] = _mm512_and_si512(pairs, half);
                    q[1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), half);
                } else {
                    q[0] = unpack(here, left, w->bits, by);
                }
#pragma GCC unroll 8
                for (int m = 0; m < count; m++)
#pragma GCC unroll 8
                    for (int i = 0; i < block / CHUNK; i++) {
                        int64_t place = m * steps->bytes + from + i * CHUNK;
                        high[r][m] = _mm512_dpbusd_epi32(high[r][m], q[i],
                                                         _mm512_loadu_si512(of_high + place));
                        if (is_wide)
                            low[r][m] = _mm512_dpbusd_epi32(low[r][m], q[i],
                                                            _mm512_loadu_si512(of_low + place));
                    }
            }
        }
        float factor = w->factor ? w->factor[run->group] : 1;
#pragma GCC unroll 8
        for (int r = 0; r < outputs; r++) {
            int64_t at_scale = (n + r) * w->stride + run->group;
            __m512i z = _mm512_set1_epi32(w->zero[at_scale]);
            __m512 s = _mm512_set1_ps(w->scale[at_scale] * factor);
#pragma GCC unroll 8
            for (int m = 0; m < count; m++) {
                __m512i sum = _mm512_loadu_si512(sums + (m * steps->count + c) * 16);
                __m512i exact = high[r][m];
                if (is_wide) exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 1), low[r][m]);
                exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(z, sum));
                if (fine)
                    fine_total[r][m] +=
                        _mm512_reduce_add_epi32(exact) * ((double)w->scale[at_scale] * factor);
                else
                    total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), s, total[r][m]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            int64_t to = (row + m) * w->rows + n + r;
            if (fine)
                ((double *)y)[to] = fine_total[r][m];
            else
                ((float *)y)[to] = _mm512_reduce_add_ps(total[r][m]);
        }
}

/* Computes OUTPUTS outputs of every input row, at once if there is a single input row. */
static inline __attribute__((always_inline)) void integer_outputs(
    const Weight *w, const Unpacker *by, int64_t n, const Steps *steps, void *y,
    const int64_t block, const int is_wide, const int fine) {
    if (steps->rows == 1 && n + OUTPUTS <= w->rows) {
        integer_block(w, by, n, steps, 0, y, block, is_wide, fine, OUTPUTS, 1);
        return;
    }
    for (int64_t r = n; r < least(n + OUTPUTS, w->rows); r++)
        for (int64_t row = 0; row < steps->rows; row += ROWS) {
#define PRODUCT(count) integer_block(w, by, r, steps, row, y, block, is_wide, fine, 1, count)
            SPECIALIZED(least(steps->rows - row, ROWS), PRODUCT)
#undef PRODUCT
        }
}

/* Multiplies an input with a uniform weight whose steps are summed as integers: y [in->rows, rows],
   float64 for inputs in float32, else float32. Returns 0, or 1 if there is not enough memory. */
int integer_rows(const Weight *w, const Input *in, void *y) {
    const Unpacker by = unpacker(w->bits);
    int whole = w->group >= w->width || w->group % (2 * CHUNK) == 0;
    Steps s = {.rows = in->rows, .block = w->bits == 4 && whole ? 2 * CHUNK : CHUNK};
    s.count = find_runs(w, s.block, NULL);
    s.runs = malloc(s.count * sizeof(ScaleRun));
    if (!s.runs) return 1;
    find_runs(w, s.block, s.runs);
    s.bytes = s.runs[s.count - 1].at + s.runs[s.count - 1].stride;
    s.high = malloc(in->rows * s.bytes);
    s.low = wide(in) ? malloc(in->rows * s.bytes) : NULL;
    s.sums = malloc(in->rows * s.count * 16 * sizeof(int32_t));
    int16_t *t = malloc(in->width * sizeof(int16_t));
    const int fine = !in->half;
    int failed = !s.high || (wide(in) && !s.low) || !s.sums || !t;
    if (!failed) {
        for (int64_t row = 0; row < in->rows; row++) {
            quantize(in, row, 0, t);
            arrange(&s, row, t, wide(in));
        }
#pragma omp parallel for schedule(static) if (in->rows * w->rows * w->width > SMALL)
        for (int64_t n = 0; n < w->rows; n += OUTPUTS) {
#define OUTPUT(block, is_wide) \
    if (fine) \
        integer_outputs(w, &by, n, &s, y, block, is_wide, 1); \
    else \
        integer_outputs(w, &by, n, &s, y, block, is_wide, 0);
            if (s.block > CHUNK && s.low) {
                OUTPUT(2 * CHUNK, 1)
            } else if (s.block > CHUNK) {
                OUTPUT(2 * CHUNK, 0)
            } else if (s.low) {
                OUTPUT(CHUNK, 1)
            } else {
                OUTPUT(CHUNK, 0)
            }
#undef OUTPUT
        }
    }
    free(s.runs);
    free(s.high);
    free(s.low);
    free(s.sums);
    free(t);
    return failed;
}

/* ---- the weight is dequantized chunk by chunk ---- */

/* The absmax of a NormalFloat block. */
static inline float absmax(const Weight *w, int64_t index) {
    if (!w->absmax_codes) return w->nested_absmax[index];
    float level = w->absmax_levels[w->absmax_codes[index]];
    return level * w->nested_absmax[index / w->nested_block] + w->mean;
}

/* Dequantizes up to 64 channels of row n from channel k on, which share scale g. The values are
   those of the simulated layer, to the bit. */
static inline void values(const Weight *w, const Unpacker *by, int64_t n, int64_t g, int64_t k,
                          int64_t count, __m512 out[4]) {
    const uint8_t *at = w->codes + n * w->row_bytes + k * w->bits / 8;
    __m512i q = unpack(at, count, w->bits, by);
    __m512i part[4] = {_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(q, 0)),
                       _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(q, 1)),
                       _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(q, 2)),
                       _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(q, 3))};
    if (w->levels) {
        int64_t groups = (w->width + w->group - 1) / w->group;
        __m512 c = _mm512_set1_ps(absmax(w, n * groups + g));
        __m512 few = _mm512_maskz_loadu_ps((__mmask16)first(least(1 << w->bits, 16)), w->levels);
        for (int i = 0; i < 4; i++) {
            __m512 level = w->bits <= 4 ? _mm512_permutexvar_ps(part[i], few)
                                        : _mm512_i32gather_ps(part[i], w->levels, 4);
            out[i] = _mm512_mul_ps(level, c);
        }
        return;
    }
    __m512i z = _mm512_set1_epi32(w->zero[n * w->stride + g]);
    __m512 s = _mm512_set1_ps(w->scale[n * w->stride + g]);
    for (int i = 0; i < 4; i++)
        out[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(part[i], z)), s);
}

/* Dequantizes the weight rows from top to bottom: y [bottom - top, width], bf16 if `half`, else
   float32. */
void dequantize(const Weight *w, int64_t top, int64_t bottom, int64_t half, void *y) {
    const Unpacker by = unpacker(w->bits);
#pragma omp parallel for schedule(static) if ((bottom - top) * w->width > SMALL)
    for (int64_t n = top; n < bottom; n++)
        for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
            int64_t end = least(start + w->group, w->width);
            for (int64_t k = start; k < end; k += CHUNK) {
                __m512 v[4];
                values(w, &by, n, g, k, end - k, v);
                for (int i = 0; i < 4 && k + 16 * i < end; i++) {
                    __mmask16 valid = (__mmask16)first(least(end - k - 16 * i, 16));
                    int64_t to = (n - top) * w->width + k + 16 * i;
                    if (half)
                        _mm256_mask_storeu_epi16((uint16_t *)y + to, valid,
                                                 (__m256i)_mm512_cvtneps_pbh(v[i]));
                    else
                        _mm512_mask_storeu_ps((float *)y + to, valid, v[i]);
                }
            }
        }
}

/* Computes output n of `count` input rows. */
static inline __attribute__((always_inline)) void float_row(
    const Weight *w, const Unpacker *by, int64_t n, const float *x, float *y, const int count) {
    __m512 total[ROWS];
    for (int m = 0; m < count; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        for (int64_t k = start; k < end; k += CHUNK) {
            __m512 v[4];
            values(w, by, n, g, k, end - k, v);
            for (int i = 0; i < 4; i++) {
                int64_t left = end - k - 16 * i;
                if (left <= 0) break;
                __mmask16 valid = (__mmask16)first(least(left, 16));
                for (int m = 0; m < count; m++) {
                    __m512 in = _mm512_maskz_loadu_ps(valid, x + m * w->width + k + 16 * i);
                    total[m] = _mm512_fmadd_ps(in, v[i], total[m]);
                }
            }
        }
    }
    for (int m = 0; m < count; m++) y[m * w->rows + n] = _mm512_reduce_add_ps(total[m]);
}

/* Multiplies a float32 input x [m, width] with the dequantized weight: y [m, rows]. */
void float_rows(const Weight *w, int64_t m, const float *x, float *y) {
    const Unpacker by = unpacker(w->bits);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n++) {
        for (int64_t row = 0; row < m; row += ROWS) {
            const float *in = x + row * w->width;
            float *out = y + row * w->rows;
#define PRODUCT(count) float_row(w, &by, n, in, out, count)
            SPECIALIZED(least(m - row, ROWS), PRODUCT)
#undef PRODUCT
        }
    }
}

/* ---- the same in bf16, for codes of up to 4 bits, whose values are looked up ---- */

static inline uint16_t to_bf16(float x) {
    return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(x)), 0);
}

/* Computes output n of `count` input rows; `levels` are those of `bf16_levels`. */
static inline __attribute__((always_inline)) void rounded_row(
    const Weight *w, const Unpacker *by, const uint16_t *levels, int64_t n, const uint16_t *x,
    float *y, const int count) {
    int64_t groups = (w->width + w->group - 1) / w->group;
    __m512 total[ROWS];
    for (int m = 0; m < count; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        /* Level 15 of a uniform weight is zero, so q - z is level q + (15 - z). */
        int64_t shift = w->levels ? 0 : 15 - w->zero[n * w->stride + g];
        float s = w->levels ? absmax(w, n * groups + g) : w->scale[n * w->stride + g];
        __m512i values = _mm512_loadu_si512(levels + shift);
        __m512 sum[ROWS];
        for (int m = 0; m < count; m++) sum[m] = _mm512_setzero_ps();
        for (int64_t k = start; k < end; k += CHUNK) {
            int64_t left = end - k;
            __m512i q = unpack(w->codes + n * w->row_bytes + k * w->bits / 8, left, w->bits, by);
            __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(q));
            __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(q, 1));
            __m512bh v[2] = {(__m512bh)_mm512_permutexvar_epi16(low, values),
                             (__m512bh)_mm512_permutexvar_epi16(high, values)};
            __mmask64 valid = first(left);
            for (int m = 0; m < count; m++) {
                const uint16_t *in = x + m * w->width + k;
                __m512i a = _mm512_maskz_loadu_epi16((__mmask32)valid, in);
                __m512i b = _mm512_maskz_loadu_epi16((__mmask32)(valid >> 32), in + 32);
                sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)a, v[0]);
                sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)b, v[1]);
            }
        }
        for (int m = 0; m < count; m++)
            total[m] = _mm512_fmadd_ps(sum[m], _mm512_set1_ps(s), total[m]);
    }
    for (int m = 0; m < count; m++) y[m * w->rows + n] = _mm512_reduce_add_ps(total[m]);
}

/* Writes the values that codes are looked up in, [64]: NormalFloat's levels, or -15 to 15. */
static void bf16_levels(const Weight *w, uint16_t *levels) {
    memset(levels, 0, 64 * sizeof(uint16_t));
    for (int i = 0; i < 31; i++)
        if (!w->levels)
            levels[i] = to_bf16(i - 15);
        else if (i < 1 << w->bits)
            levels[i] = to_bf16(w->levels[i]);
}

/* Multiplies a bf16 input x [m, width] with the weight: y [m, rows]. NormalFloat levels are rounded
   to bf16, and scales are not. */
void rounded_rows(const Weight *w, int64_t m, const uint16_t *x, float *y) {
    const Unpacker by = unpacker(w->bits);
    uint16_t levels[64];
    bf16_levels(w, levels);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n++) {
        for (int64_t row = 0; row < m; row += ROWS) {
            const uint16_t *in = x + row * w->width;
            float *out = y + row * w->rows;
#define PRODUCT(count) rounded_row(w, &by, levels, n, in, out, count)
            SPECIALIZED(least(m - row, ROWS), PRODUCT)
#undef PRODUCT
        }
    }
}

/* Computes `outputs` outputs from n on of `count` input rows, for 4-bit codes in groups of whole
   chunks. A byte holds two codes. The look-up takes 5 bits of its index, so with a table of 32
   entries whose halves are equal, a whole byte looks up its low code without being masked. */
static inline __attribute__((always_inline)) void paired_block(
    const Weight *w, const uint16_t *levels, int64_t n, int64_t m, const uint16_t *x, float *y,
    const int outputs, const int count) {
    int64_t groups = w->width / w->group + (w->width % w->group > 0);
    __m512 total[OUTPUTS][ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) total[r][i] = _mm512_setzero_ps();
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        const uint8_t *ahead = w->codes + (n + 2 * outputs) * w->row_bytes + outputs * start / 2;
        for (int64_t i = 0; i < outputs * (end - start) / 2; i += 64)
            _mm_prefetch((const char *)ahead + i, _MM_HINT_T1);
        __m512i table[OUTPUTS];
        __m512 s[OUTPUTS], sum[OUTPUTS][ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < outputs; r++) {
            /* Level 15 of a uniform weight is zero, so q - z is level q + (15 - z). */
            int64_t at = (n + r) * w->stride + g, shift = w->levels ? 0 : 15 - w->zero[at];
            __m256i some = _mm256_loadu_si256((const __m256i *)(levels + shift));
            table[r] = _mm512_broadcast_i64x4(some);
            s[r] = _mm512_set1_ps(w->levels ? absmax(w, (n + r) * groups + g) : w->scale[at]);
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) sum[r][i] = _mm512_setzero_ps();
        }
        for (int64_t k = start; k < end; k += CHUNK)
#pragma GCC unroll 8
            for (int r = 0; r < outputs; r++) {
                const uint8_t *here = w->codes + (n + r) * w->row_bytes + k / 2;
                __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)here));
                __m512bh even = (__m512bh)_mm512_permutexvar_epi16(both, table[r]);
                __m512i high = _mm512_srli_epi16(both, 4);
                __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(high, table[r]);
#pragma GCC unroll 8
                for (int i = 0; i < count; i++) {
                    const uint16_t *in = x + (m + i) * w->width + k;
                    __m512bh a = (__m512bh)_mm512_loadu_si512(in);
                    __m512bh b = (__m512bh)_mm512_loadu_si512(in + CHUNK / 2);
                    sum[r][i] = _mm512_dpbf16_ps(sum[r][i], a, even);
                    sum[r][i] = _mm512_dpbf16_ps(sum[r][i], b, odd);
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
            for (int i = 0; i < count; i++)
                total[r][i] = _mm512_fmadd_ps(sum[r][i], s[r], total[r][i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            y[(m + i) * w->rows + n + r] = _mm512_reduce_add_ps(total[r][i]);
}

/* Does what `rounded_rows` does for 4-bit codes in groups of whole chunks. Each CHUNK of an input
   row has its even channels first and then its odd ones. */
void paired_rows(const Weight *w, int64_t m, const uint16_t *x, float *y) {
    uint16_t levels[64];
    bf16_levels(w, levels);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n += OUTPUTS) {
        if (m == 1 && n + OUTPUTS <= w->rows) {
            paired_block(w, levels, n, 0, x, y, OUTPUTS, 1);
            continue;
        }
        for (int64_t r = n; r < least(n + OUTPUTS, w->rows); r++)
            for (int64_t row = 0; row < m; row += ROWS) {
#define PRODUCT(count) paired_block(w, levels, r, row, x, y, 1, count)
                SPECIALIZED(least(m - row, ROWS), PRODUCT)
#undef PRODUCT
            }
    }
}

/* ---- many input rows: a tile of TILE outputs is unpacked once and multiplied with all ---- */

/* A scale run of a tile of outputs. */
typedef struct {
    __m512i lanes[MAX_RUN / 4][TILE / 16]; /* four neighboring codes of an output in each lane */
    float scale[TILE] __attribute__((aligned(64)));
    double fine_scale[TILE] __attribute__((aligned(64)));
    int32_t zero[TILE];
    int32_t offset[TILE]; /* sum of the input's offset times v, see Shift */
    int shifted;          /* whether there are offsets */
} Tile;

/* Unpacks `width` channels from `start` on, which share scale g, of TILE outputs from n on. */
static void load_tile(Tile *c, const Weight *w, const Unpacker *by, int64_t n, int64_t g,
                      int64_t start, int64_t width, const int16_t *offset) {
    int64_t outputs = least(w->rows - n, TILE);
    uint8_t codes[MAX_RUN] __attribute__((aligned(64)));
    int32_t(*lanes)[TILE] = (int32_t(*)[TILE])c->lanes;
    c->shifted = offset != NULL;
    for (int64_t r = 0; r < TILE; r++) {
        c->scale[r] = c->fine_scale[r] = c->zero[r] = c->offset[r] = 0;
        if (r >= outputs) {
            for (int64_t k = 0; k < width; k += 4) lanes[k / 4][r] = 0;
            continue;
        }
        float scale = w->scale[(n + r) * w->stride + g], factor = w->factor ? w->factor[g] : 1;
        c->scale[r] = scale * factor;
        c->fine_scale[r] = (double)scale * factor;
        c->zero[r] = w->zero[(n + r) * w->stride + g];
        const uint8_t *row = w->codes + (n + r) * w->row_bytes;
        for (int64_t k = 0; k < width; k += CHUNK) {
            __m512i q = unpack(row + (start + k) * w->bits / 8, width - k, w->bits, by);
            _mm512_store_si512(codes + k, _mm512_maskz_mov_epi8(first(width - k), q));
        }
        for (int64_t k = 0; k < width; k += 4) lanes[k / 4][r] = *(int32_t *)(codes + k);
        if (offset) {
            int32_t sum = 0;
            for (int64_t k = 0; k < width; k++) sum += offset[start + k] * (codes[k] - c->zero[r]);
            c->offset[r] = sum;
        }
    }
}

/* Adds s (sum of t v) over a run to y[row + m, TILE], for m < count. y is float64 if `fine`, else
   float32. `steps` and `sums` are the steps and their sums over the run, in each of the rows. */
static inline __attribute__((always_inline)) void stripe(
    const Tile *c, int64_t stride, const int8_t *steps, const int32_t *sums, const int32_t *times,
    void *y, int64_t row, const int fine, const int count) {
    __m512i acc[STRIPE][TILE / 16];
#pragma GCC unroll 8
    for (int m = 0; m < count; m++)
#pragma GCC unroll 8
        for (int i = 0; i < TILE / 16; i++) acc[m][i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < stride / 4; k++)
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            __m512i t = _mm512_set1_epi32(*(const int32_t *)(steps + m * stride + 4 * k));
#pragma GCC unroll 8
            for (int i = 0; i < TILE / 16; i++)
                acc[m][i] = _mm512_dpbusd_epi32(acc[m][i], c->lanes[k][i], t);
        }
#pragma GCC unroll 8
    for (int i = 0; i < TILE / 16; i++) {
        __m512i zero = _mm512_load_si512(c->zero + 16 * i);
        __m512i offset = _mm512_load_si512(c->offset + 16 * i);
        __m512 scale = _mm512_load_ps(c->scale + 16 * i);
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            __m512i less = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[m]));
            __m512i exact = _mm512_sub_epi32(acc[m][i], less);
            if (c->shifted) {
                __m512i often = _mm512_set1_epi32(times ? times[m] : 1);
                exact = _mm512_add_epi32(exact, _mm512_mullo_epi32(offset, often));
            }
            if (fine) {
                double *at = (double *)y + (row + m) * TILE + 16 * i;
                const double *by = c->fine_scale + 16 * i;
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    __m512d part = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(exact, h));
                    __m512d before = _mm512_load_pd(at + 8 * h);
                    part = _mm512_fmadd_pd(part, _mm512_load_pd(by + 8 * h), before);
                    _mm512_store_pd(at + 8 * h, part);
                }
                continue;
            }
            float *at = (float *)y + (row + m) * TILE + 16 * i;
            __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, _mm512_load_ps(at));
            _mm512_store_ps(at, sum);
        }
    }
}

/* The difference between q - z and q - 128 of an 8-bit input, 128 - z, as the product of `offset`
   [width] and `times` [rows]. */
typedef struct {
    int16_t *offset; /* NULL for zeros */
    int32_t *times;  /* NULL for ones */
} Shift;

/* Finds the shift of an input. Returns 0, or 1 if there is not enough memory. */
static int find_shift(const Input *in, Shift *shift) {
    *shift = (Shift){NULL, NULL};
    if (!wide(in)) return 0;
    shift->offset = malloc(in->width * sizeof(int16_t));
    if (in->by_row) shift->times = malloc(in->rows * sizeof(int32_t));
    if (!shift->offset || (in->by_row && !shift->times)) return 1;
    for (int64_t k = 0; k < in->width; k++)
        shift->offset[k] = in->by_row ? 1 : (int16_t)(128 - in->zero[k * in->by_channel]);
    for (int64_t row = 0; in->by_row && row < in->rows; row++)
        shift->times[row] = (int32_t)(128 - in->zero[row]);
    return 0;
}

/* Does what `integer_rows` does, faster for many input rows. */
int integer_tiles(const Weight *w, const Input *in, void *y) {
    const Unpacker by = unpacker(w->bits);
    int64_t m = in->rows, count = find_runs(w, 4, NULL);
    ScaleRun *runs = malloc(count * sizeof(ScaleRun));
    if (!runs) return 1;
    find_runs(w, 4, runs);
    int64_t bytes = runs[count - 1].at + runs[count - 1].stride;
    /* Steps by run, then row, then channel, which is the order in which a tile reads them. */
    int8_t *ordered = malloc(m * bytes);
    int32_t *sums = malloc(count * m * sizeof(int32_t));
    const int fine = !in->half;
    const int64_t size = fine ? sizeof(double) : sizeof(float);
    Shift shift;
    int failed = find_shift(in, &shift) || !ordered || !sums;
    if (!failed) {
#pragma omp parallel if (m * w->rows * w->width > SMALL)
        {
            Tile *c = aligned_alloc(64, sizeof(Tile));
            void *tile = aligned_alloc(64, least(m, BAND) * TILE * size);
            int16_t *t = malloc(in->width * sizeof(int16_t));
            if (!c || !tile || !t) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) {
                if (failed) continue;
                quantize(in, row, wide(in), t);
                for (int64_t i = 0; i < count; i++) {
                    const int16_t *from = t + runs[i].start;
                    int8_t *to = ordered + runs[i].at * m + row * runs[i].stride;
                    int32_t sum = 0;
                    for (int64_t k = 0; k < runs[i].width; k++) {
                        to[k] = (int8_t)from[k];
                        sum += from[k];
                    }
                    for (int64_t k = runs[i].width; k < runs[i].stride; k++) to[k] = 0;
                    sums[i * m + row] = sum;
                }
            }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t top = 0; top < m; top += BAND)
                for (int64_t n = 0; n < w->rows; n += TILE) {
                    if (failed) continue;
                    int64_t rows = least(m - top, BAND), outputs = least(w->rows - n, TILE);
                    memset(tile, 0, rows * TILE * size);
                    for (int64_t i = 0; i < count; i++) {
                        const ScaleRun *run = runs + i;
                        load_tile(c, w, &by, n, run->group, run->start, run->width,
                                  shift.offset);
                        for (int64_t row = top; row < top + rows; row += STRIPE) {
                            const int8_t *steps = ordered + run->at * m + row * run->stride;
                            const int32_t *sum = sums + i * m + row;
                            const int32_t *times = shift.times ? shift.times + row : NULL;
#define PRODUCT(count) \
    if (fine) \
        stripe(c, run->stride, steps, sum, times, tile, row - top, 1, count); \
    else \
        stripe(c, run->stride, steps, sum, times, tile, row - top, 0, count)
                            SPECIALIZED(least(top + rows - row, STRIPE), PRODUCT)
#undef PRODUCT
                        }
                    }
                    for (int64_t row = 0; row < rows; row++)
                        memcpy((char *)y + ((top + row) * w->rows + n) * size,
                               (char *)tile + row * TILE * size, outputs * size);
                }
            free(c);
            free(tile);
            free(t);
        }
    }
    free(runs);
    free(ordered);
    free(sums);
    free(shift.offset);
    free(shift.times);
    return failed;
}
