/* Products with packed weights on a CPU with AVX-512, VNNI, VBMI and BF16. See native.py.

   A weight row is a stream of codes of `bits` bits, lowest bit first, so that any 8 codes are
   `bits` bytes: codes are unpacked 64 at a time, whatever their width. Channels are visited in
   cells: runs that share a scale, of at most CELL channels. What is summed within a cell is exact
   in int32; cells are scaled and added in float32, in order.

   Threads are those of the OpenMP library that PyTorch has loaded. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Calls f(count), each count compiled for itself: its accumulators are then registers. */
#define SPECIALIZED(count, f) \
    switch (count) { \
    case 1: f(1); break; \
    case 2: f(2); break; \
    case 3: f(3); break; \
    default: f(4); break; \
    }

enum { CHUNK = 64, CELL = 512, ROWS = 4, TILE = 64, STRIPE = 4, BAND = 768 };
/* Products below which one thread is done before another has begun. */
enum { SMALL = 1 << 20 };

typedef struct {
    const uint8_t *codes;          /* [rows, row_bytes] */
    int64_t rows, width, row_bytes;
    int64_t bits, group;           /* group: channels that share a scale */
    const float *scale;            /* uniform: [rows or 1, groups] */
    const uint8_t *zero;           /* the same */
    int64_t stride;                /* from a row's scales to the next row's; 0 if rows share them */
    const float *factor;           /* [groups]: scales of the input, or NULL for ones */
    const float *levels;           /* NormalFloat: the values of codes, or NULL */
    const uint8_t *constant_codes; /* [rows * groups], or NULL if `constants` is not quantized */
    const float *constant_levels;  /* [256] */
    const float *constants;        /* one for `constant_block` of the codes, or [rows * groups] */
    float mean;
    int64_t constant_block;
} Weight;

int supported(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline __mmask64 first(int64_t count) {
    return count >= 64 ? ~0ull : ~0ull >> (64 - count);
}

/* How 64 codes come out of their bytes. */
typedef struct {
    __m512i bytes, shifts, mask;
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

/* Up to 64 codes from the start of a byte; those after `count` are not defined. */
static inline __m512i unpack(const uint8_t *at, int64_t count, int64_t bits, const Unpacker *by) {
    __mmask64 present = count >= CHUNK ? by->whole : first((count * bits + 7) / 8);
    __m512i stream = _mm512_maskz_loadu_epi8(present, at);
    __m512i lanes = _mm512_permutexvar_epi8(by->bytes, stream);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(by->shifts, lanes), by->mask);
}

/* ---- few rows: the weight is read once, as it is stored ---- */

/* Sums of t q and of t z: their difference is that of t v. */
typedef struct {
    __m512i codes, zeros;
} Sums;

static inline void add(Sums *sums, __m512i q, __m512i z, __m512i t) {
    sums->codes = _mm512_dpbusd_epi32(sums->codes, q, t);
    sums->zeros = _mm512_dpbusd_epi32(sums->zeros, z, t);
}

/* y[m, n] = sum over cells of s (sum of t v), t = 2 high + low, for m < count. */
static inline __attribute__((always_inline)) void integer_row(
    const Weight *w, const Unpacker *by, int64_t n, const int8_t *high, const int8_t *low,
    float *y, const int count) {
    const float *scale = w->scale + n * w->stride;
    const uint8_t *zero = w->zero + n * w->stride;
    __m512 total[ROWS];
    for (int m = 0; m < count; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        __m512i z = _mm512_set1_epi8((char)zero[g]);
        for (int64_t cell = start; cell < end; cell += CELL) {
            int64_t stop = least(cell + CELL, end);
            Sums of_high[ROWS], of_low[ROWS];
            for (int m = 0; m < count; m++)
                of_high[m] = of_low[m] = (Sums){_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int64_t k = cell; k < stop; k += CHUNK) {
                const uint8_t *at = w->codes + n * w->row_bytes + k * w->bits / 8;
                __m512i q = unpack(at, stop - k, w->bits, by);
                __mmask64 valid = first(stop - k);
                for (int m = 0; m < count; m++) {
                    int64_t from = m * w->width + k;
                    add(&of_high[m], q, z, _mm512_maskz_loadu_epi8(valid, high + from));
                    if (low) add(&of_low[m], q, z, _mm512_maskz_loadu_epi8(valid, low + from));
                }
            }
            for (int m = 0; m < count; m++) {
                __m512i exact = _mm512_sub_epi32(of_high[m].codes, of_high[m].zeros);
                if (low) {
                    exact = _mm512_slli_epi32(exact, 1);
                    __m512i rest = _mm512_sub_epi32(of_low[m].codes, of_low[m].zeros);
                    exact = _mm512_add_epi32(exact, rest);
                }
                __m512 s = _mm512_set1_ps(w->factor ? scale[g] * w->factor[g] : scale[g]);
                total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), s, total[m]);
            }
        }
    }
    for (int m = 0; m < count; m++) y[m * w->rows + n] = _mm512_reduce_add_ps(total[m]);
}

/* y [m, rows] from t = 2 high + low (or high alone, if low is NULL), each [m, width]. */
void integer_rows(const Weight *w, int64_t m, const int8_t *high, const int8_t *low, float *y) {
    const Unpacker by = unpacker(w->bits);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n++) {
        for (int64_t row = 0; row < m; row += ROWS) {
            const int8_t *h = high + row * w->width, *l = low ? low + row * w->width : NULL;
            float *out = y + row * w->rows;
#define PRODUCT(count) integer_row(w, &by, n, h, l, out, count)
            SPECIALIZED(least(m - row, ROWS), PRODUCT)
#undef PRODUCT
        }
    }
}

/* ---- the float weight, chunk by chunk ---- */

static inline float constant(const Weight *w, int64_t index) {
    if (!w->constant_codes) return w->constants[index];
    float level = w->constant_levels[w->constant_codes[index]];
    return level * w->constants[index / w->constant_block] + w->mean;
}

/* w_hat of up to 64 channels from k on, which share scale g: the values of a simulated layer. */
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
        __m512 c = _mm512_set1_ps(constant(w, n * groups + g));
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

/* The float weight of rows top to bottom, [bottom - top, width] float32. */
void dequantize(const Weight *w, int64_t top, int64_t bottom, float *y) {
    const Unpacker by = unpacker(w->bits);
#pragma omp parallel for schedule(static) if ((bottom - top) * w->width > SMALL)
    for (int64_t n = top; n < bottom; n++)
        for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
            int64_t end = least(start + w->group, w->width);
            for (int64_t k = start; k < end; k += CHUNK) {
                __m512 v[4];
                values(w, &by, n, g, k, end - k, v);
                for (int i = 0; i < 4; i++) {
                    int64_t left = end - k - 16 * i;
                    if (left > 0)
                        _mm512_mask_storeu_ps(y + (n - top) * w->width + k + 16 * i,
                                              (__mmask16)first(least(left, 16)), v[i]);
                }
            }
        }
}

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

/* y [m, rows] from float inputs [m, width]. */
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

/* ---- the same in bf16, for codes of up to 4 bits: their values are looked up ---- */

static inline uint16_t to_bf16(float x) {
    return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(x)), 0);
}

static inline __attribute__((always_inline)) void rounded_row(
    const Weight *w, const Unpacker *by, const uint16_t *levels, int64_t n, const uint16_t *x,
    float *y, const int count) {
    int64_t groups = (w->width + w->group - 1) / w->group;
    __m512 total[ROWS];
    for (int m = 0; m < count; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        /* Of a uniform weight, level 15 is zero: q - z is found 15 - z further on than q. */
        int64_t shift = w->levels ? 0 : 15 - w->zero[n * w->stride + g];
        float s = w->levels ? constant(w, n * groups + g) : w->scale[n * w->stride + g];
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

/* y [m, rows] from bf16 inputs [m, width]; NormalFloat levels are rounded to bf16 too. */
void rounded_rows(const Weight *w, int64_t m, const uint16_t *x, float *y) {
    const Unpacker by = unpacker(w->bits);
    uint16_t levels[64] = {0};
    for (int i = 0; i < 31; i++)
        if (!w->levels)
            levels[i] = to_bf16(i - 15);
        else if (i < 1 << w->bits)
            levels[i] = to_bf16(w->levels[i]);
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

/* ---- many rows: tiles of TILE outputs, unpacked once, times stripes of STRIPE inputs ---- */

/* A cell of a tile: four neighbouring codes of each output lie in one lane. */
typedef struct {
    __m512i lanes[CELL / 4][TILE / 16];
    float scale[TILE] __attribute__((aligned(64)));
    int32_t zero[TILE], offset[TILE];
    int shifted; /* whether any offset is not zero */
} Cell;

static void load_cell(Cell *c, const Weight *w, const Unpacker *by, int64_t n, int64_t g,
                      int64_t start, int64_t width, const int16_t *offset) {
    int64_t outputs = least(w->rows - n, TILE);
    uint8_t codes[CELL] __attribute__((aligned(64)));
    int32_t(*lanes)[TILE] = (int32_t(*)[TILE])c->lanes;
    c->shifted = offset != NULL;
    for (int64_t r = 0; r < TILE; r++) {
        c->scale[r] = c->zero[r] = c->offset[r] = 0;
        if (r >= outputs) {
            for (int64_t k = 0; k < width; k += 4) lanes[k / 4][r] = 0;
            continue;
        }
        c->scale[r] = w->scale[(n + r) * w->stride + g] * (w->factor ? w->factor[g] : 1);
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

/* y[m, TILE] += s (sum of t v) over a cell, for m < count; `steps` are the cell's. */
static inline __attribute__((always_inline)) void stripe(
    const Cell *c, int64_t stride, const int8_t *steps, const int32_t *sums, const int32_t *times,
    float *y, const int count) {
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
            float *at = y + m * TILE + 16 * i;
            __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, _mm512_load_ps(at));
            _mm512_store_ps(at, sum);
        }
    }
}

/* A run of channels: where it starts, how many, and which scale is theirs. */
typedef struct {
    int64_t start, width, group;
    int64_t stride; /* width up to a multiple of 4 */
    int64_t at;     /* bytes that a row of steps takes before it */
} Run;

/* The cells of a weight in order; how many. `runs` may be NULL. */
static int64_t cells_of(const Weight *w, Run *runs) {
    int64_t count = 0, at = 0;
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        for (int64_t cell = start; cell < end; cell += CELL, count++) {
            int64_t width = least(CELL, end - cell), stride = (width + 3) / 4 * 4;
            if (runs) runs[count] = (Run){cell, width, g, stride, at};
            at += stride;
        }
    }
    return count;
}

/* y [m, rows] from t = steps + times offset: `steps` int8 [m, width]; `offset` [width] or NULL for
   zeros, `times` [m] or NULL for ones. Returns 0, or 1 without memory. */
int integer_tiles(const Weight *w, int64_t m, const int8_t *steps, const int16_t *offset,
                  const int32_t *times, float *y) {
    const Unpacker by = unpacker(w->bits);
    int64_t cells = cells_of(w, NULL);
    Run *runs = malloc(cells * sizeof(Run));
    if (!runs) return 1;
    cells_of(w, runs);
    int64_t bytes = runs[cells - 1].at + runs[cells - 1].stride;
    /* Steps by cell, then row, then channel: what a tile reads one after the other. */
    int8_t *ordered = calloc(m, bytes);
    int32_t *sums = malloc(cells * m * sizeof(int32_t));
    int failed = !ordered || !sums;
    if (!failed) {
#pragma omp parallel if (m * w->rows * w->width > SMALL)
        {
            Cell *c = aligned_alloc(64, sizeof(Cell));
            float *tile = aligned_alloc(64, least(m, BAND) * TILE * sizeof(float));
            if (!c || !tile) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++)
                for (int64_t i = 0; i < cells; i++) {
                    const int8_t *from = steps + row * w->width + runs[i].start;
                    int8_t *to = ordered + runs[i].at * m + row * runs[i].stride;
                    int32_t sum = 0;
                    for (int64_t k = 0; k < runs[i].width; k++) sum += to[k] = from[k];
                    sums[i * m + row] = sum;
                }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t top = 0; top < m; top += BAND)
                for (int64_t n = 0; n < w->rows; n += TILE) {
                    if (failed) continue;
                    int64_t rows = least(m - top, BAND), outputs = least(w->rows - n, TILE);
                    memset(tile, 0, rows * TILE * sizeof(float));
                    for (int64_t i = 0; i < cells; i++) {
                        const Run *run = runs + i;
                        load_cell(c, w, &by, n, run->group, run->start, run->width, offset);
                        for (int64_t row = top; row < top + rows; row += STRIPE) {
                            const int8_t *t = ordered + run->at * m + row * run->stride;
                            const int32_t *sum = sums + i * m + row;
                            const int32_t *multiply = times ? times + row : NULL;
                            float *out = tile + (row - top) * TILE;
#define PRODUCT(count) stripe(c, run->stride, t, sum, multiply, out, count)
                            SPECIALIZED(least(top + rows - row, STRIPE), PRODUCT)
#undef PRODUCT
                        }
                    }
                    for (int64_t row = 0; row < rows; row++)
                        memcpy(y + (top + row) * w->rows + n, tile + row * TILE,
                               outputs * sizeof(float));
                }
            free(c);
            free(tile);
        }
    }
    free(runs);
    free(ordered);
    free(sums);
    return failed;
}
