/* The weight is dequantized chunk by chunk, and multiplied in floating point.

   Sums have 16 lanes on every machine, and lane i adds every 16th channel of a group from i on, so
   that they are the same numbers on every machine. */

/* The absmax of a NormalFloat block. */
static inline float absmax(const Weight *w, int64_t index) {
    if (!w->absmax_codes) return w->nested_absmax[index];
    float level = w->absmax_levels[w->absmax_codes[index]];
    return level * w->nested_absmax[index / w->nested_block] + w->mean;
}

/* A weight's levels, filled up to the number that `look_up` reads. */
static const float *padded_levels(const Weight *w, float *few) {
    if (!w->levels || w->bits >= 4) return w->levels;
    memset(few, 0, 16 * sizeof(float));
    memcpy(few, w->levels, sizeof(float) << w->bits);
    return few;
}

/* Dequantizes up to CHUNK channels of row n from channel k on, which share scale g. The values are
   those of the simulated layer, to the bit. */
INLINE void values(const Weight *w, const Unpacker *by, const float *levels, int64_t n, int64_t g,
                   int64_t k, int64_t count, vf out[4]) {
    vi q = unpack(w->codes + n * w->row_bytes + k * w->bits / 8, count, by);
    if (levels) {
        int64_t groups = (w->width + w->group - 1) / w->group;
        vf c = all_floats(absmax(w, n * groups + g));
        for (int i = 0; i < 4; i++)
            out[i] = (w->bits <= 4 ? look_up(widen(q, i), levels, 1)
                                   : look_up(widen(q, i), levels, 0)) *
                     c;
        return;
    }
    vi z = all_ints(w->zero[n * w->stride + g]);
    vf s = all_floats(w->scale[n * w->stride + g]);
    for (int i = 0; i < 4; i++) out[i] = __builtin_convertvector(widen(q, i) - z, vf) * s;
}

/* Dequantizes the weight rows from top to bottom: y [bottom - top, width], bf16 if `half`, else
   float32. */
void dequantize(const Weight *w, int64_t top, int64_t bottom, int64_t half, void *y) {
    const Unpacker by = unpacker(w);
    float few[16];
    const float *levels = padded_levels(w, few);
#pragma omp parallel for schedule(static) if ((bottom - top) * w->width > SMALL)
    for (int64_t n = top; n < bottom; n++)
        for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
            int64_t end = least(start + w->group, w->width);
            for (int64_t k = start; k < end; k += CHUNK) {
                vf v[4];
                values(w, &by, levels, n, g, k, end - k, v);
                int64_t to = (n - top) * w->width + k, count = least(end - k, CHUNK);
                if (!half) {
                    if (count == CHUNK)
                        memcpy((float *)y + to, v, sizeof v);
                    else
                        memcpy((float *)y + to, v, count * sizeof(float));
                    continue;
                }
                lane_halves rounded[4];
                for (int i = 0; i < 4; i++) rounded[i] = round_bf16(v[i]);
                if (count == CHUNK)
                    memcpy((uint16_t *)y + to, rounded, sizeof rounded);
                else
                    memcpy((uint16_t *)y + to, rounded, count * sizeof(uint16_t));
            }
        }
}

/* Computes output n of `count` input rows. */
INLINE void float_row(const Weight *w, const Unpacker *by, const float *levels, int64_t n,
                      const float *x, float *y, const int count) {
    vf total[ROWS][WHOLE] = {0};
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        for (int64_t k = start; k < end; k += CHUNK) {
            vf v[4];
            values(w, by, levels, n, g, k, end - k, v);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                int64_t left = end - k - LANES * i;
                if (left <= 0) break;
                for (int m = 0; m < count; m++) {
                    vf in = load_first(x + m * w->width + k + LANES * i, left);
                    total[m][i % WHOLE] = fused(in, v[i], total[m][i % WHOLE]);
                }
            }
        }
    }
    for (int m = 0; m < count; m++) y[m * w->rows + n] = sum_floats(total[m]);
}

/* Multiplies a float32 input x [m, width] with the dequantized weight: y [m, rows]. */
void float_rows(const Weight *w, int64_t m, const float *x, float *y) {
    const Unpacker by = unpacker(w);
    float few[16];
    const float *levels = padded_levels(w, few);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n++) {
        for (int64_t row = 0; row < m; row += ROWS) {
            const float *in = x + row * w->width;
            float *out = y + row * w->rows;
#define PRODUCT(count) float_row(w, &by, levels, n, in, out, count)
            SPECIALIZED(least(m - row, ROWS), ROWS, PRODUCT)
#undef PRODUCT
        }
    }
}

/* ---- the same in bf16, for 4-bit codes, whose values are looked up ---- */

/* Writes the values that codes are looked up in, [32]: NormalFloat's levels, or -15 to 15. */
static void bf16_levels(const Weight *w, uint16_t *levels) {
    memset(levels, 0, 32 * sizeof(uint16_t));
    for (int i = 0; i < 31; i++)
        if (!w->levels)
            levels[i] = to_bf16((float)(i - 15));
        else if (i < 16)
            levels[i] = to_bf16(w->levels[i]);
}

/* Computes `outputs` outputs from n on of `count` input rows from row m on. */
INLINE void paired_block(const Weight *w, const uint16_t *levels, int64_t n, int64_t m,
                         const rounded_input *x, float *y, const int outputs, const int count) {
    int64_t groups = w->width / w->group + (w->width % w->group > 0);
    vf total[OUTPUTS][ROWS][WHOLE] = {0};
    for (int64_t g = 0, start = 0; start < w->width; g++, start += w->group) {
        int64_t end = least(start + w->group, w->width);
        const uint8_t *ahead = w->codes + (n + 2 * outputs) * w->row_bytes + outputs * start / 2;
        for (int64_t i = 0; i < outputs * (end - start) / 2; i += 64)
            __builtin_prefetch(ahead + i, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < outputs; r++) {
            /* Level 15 of a uniform weight is zero, so q - z is level q + (15 - z). */
            int64_t at = (n + r) * w->stride + g, shift = w->levels ? 0 : 15 - w->zero[at];
            const Table table = table_of(levels + shift);
            vf s = all_floats(w->levels ? absmax(w, (n + r) * groups + g) : w->scale[at]);
            vf sum[ROWS][WHOLE] = {0};
            const uint8_t *codes = w->codes + (n + r) * w->row_bytes;
            for (int64_t k = start; k < end; k += 64)
                add_pairs(sum, codes + k / 2, &table, x + m * w->width + k, w->width, count);
#pragma GCC unroll 8
            for (int i = 0; i < count; i++)
#pragma GCC unroll 8
                for (int j = 0; j < WHOLE; j++)
                    total[r][i][j] = fused(sum[i][j], s, total[r][i][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) y[(m + i) * w->rows + n + r] = sum_pairs(total[r][i]);
}

/* Multiplies a bf16 input x [m, width] with a weight of 4-bit codes in groups of whole 64 channels:
   y [m, rows]. NormalFloat levels are rounded to bf16, and scales are not. Returns 0, or 1 if there
   is not enough memory. */
int rounded_rows(const Weight *w, int64_t m, const uint16_t *x, float *y) {
    uint16_t levels[32];
    bf16_levels(w, levels);
    rounded_input *in = malloc(m * w->width * sizeof(rounded_input));
    if (!in) return 1;
    for (int64_t k = 0; k < m * w->width; k += 64)
        for (int64_t i = 0; i < 64; i++) in[k + pair_place(i)] = pair_input(x[k + i]);
#pragma omp parallel for schedule(static) if (m * w->rows * w->width > SMALL)
    for (int64_t n = 0; n < w->rows; n += OUTPUTS) {
        if (m == 1 && n + OUTPUTS <= w->rows) {
            paired_block(w, levels, n, 0, in, y, OUTPUTS, 1);
            continue;
        }
        for (int64_t r = n; r < least(n + OUTPUTS, w->rows); r++)
            for (int64_t row = 0; row < m; row += ROWS) {
#define PRODUCT(count) paired_block(w, levels, r, row, in, y, 1, count)
                SPECIALIZED(least(m - row, ROWS), ROWS, PRODUCT)
#undef PRODUCT
            }
    }
    free(in);
    return 0;
}
