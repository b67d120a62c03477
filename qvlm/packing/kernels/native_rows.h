/* Few input rows: the weight is read once, as it is stored. */

/* How codes and steps meet.

   PLAIN: a chunk of codes with as many bytes of steps. PAIRS: the low halves of a chunk of bytes
   hold the even channels of a block of two chunks and the high halves the odd ones, so its steps are
   those of its even channels and then those of its odd ones. WORDS: steps are 16-bit numbers, and
   codes are widened to such. */
enum { PLAIN, PAIRS, WORDS };

/* Steps of an input, arranged as the product reads them: run by run, in blocks that zeros fill up.

   Steps of 8-bit inputs do not fit int8 and are split, t = 2 high + low, unless they are words. */
typedef struct {
    int64_t rows, mode, split;
    int64_t block; /* channels of a block, which has 1 vector of steps if PLAIN, else 2 */
    int64_t bytes; /* of a row of steps */
    int64_t count; /* of runs */
    int64_t piece; /* channels whose products are added before `settle`, whole blocks */
    ScaleRun *runs;
    int8_t *high, *low; /* [rows, bytes]; low is NULL if no step is split */
    int32_t *sums;      /* [count, rows + ROWS]: sum of t over each run */
} Steps;

/* Writes the steps t of an input row into `s`. */
static void arrange(Steps *s, int64_t row, const int16_t *t) {
    int16_t padded[MAX_RUN + 2 * CHUNK];
    for (int64_t c = 0; c < s->count; c++) {
        const ScaleRun *run = s->runs + c;
        int64_t filled = (run->width + s->block - 1) / s->block * s->block;
        int8_t *high = s->high + row * s->bytes + run->at;
        int8_t *low = s->split ? s->low + row * s->bytes + run->at : NULL;
        memcpy(padded, t + run->start, run->width * sizeof(int16_t));
        memset(padded + run->width, 0, (filled - run->width) * sizeof(int16_t));
        int32_t sum = 0;
        for (int64_t k = 0; k < filled; k++) sum += padded[k];
        s->sums[c * (s->rows + ROWS) + row] = sum;
        if (s->mode == WORDS) {
            memcpy(high, padded, filled * sizeof(int16_t));
            continue;
        }
        for (int64_t k = 0; k < filled; k += s->block) {
            int16_t *in = padded + k, ordered[2 * CHUNK];
            if (s->mode == PAIRS) {
                for (int i = 0; i < CHUNK; i++) {
                    ordered[i] = in[2 * i];
                    ordered[CHUNK + i] = in[2 * i + 1];
                }
                in = ordered;
            }
            for (int64_t i = 0; i < s->block; i++) high[k + i] = (int8_t)(low ? in[i] >> 1 : in[i]);
            for (int64_t i = 0; low && i < s->block; i++) low[k + i] = in[i] & 1;
        }
    }
}

/* Adds s (sum of t q - z sum of t) over run c to four outputs of one row, or to one output of
   `count` rows. */
INLINE void add_run(const Weight *w, int64_t n, const Steps *s, int64_t c, int64_t row, i4 sum,
                    f4 *total, d4 *fine_total, const int fine, const int outputs, const int count) {
    const int32_t *of_t = s->sums + c * (s->rows + ROWS) + row;
    int64_t group = s->runs[c].group;
    float factor = w->factor ? w->factor[group] : 1;
    const float *scale = w->scale + n * w->stride + group;
    const uint8_t *zero = w->zero + n * w->stride + group;
    int64_t next = outputs > 1 ? w->stride : 0;
    const int32_t flip = w->bits == 8 ? FLIP : 0;
    i4 z = {zero[0] - flip, zero[next] - flip, zero[2 * next] - flip, zero[3 * next] - flip};
    f4 by = {scale[0], scale[next], scale[2 * next], scale[3 * next]};
    i4 t = (i4){0} + of_t[0];
    if (count > 1) memcpy(&t, of_t, sizeof t);
    i4 exact = sum - z * t;
    if (fine)
        *fine_total += __builtin_convertvector(exact, d4) *
                       (__builtin_convertvector(by, d4) * (double)factor);
    else
        *total += __builtin_convertvector(exact, f4) * (by * factor);
}

/* Computes y[row + m, n + r] for m < count and r < outputs, of which one is 1. y is float64 if
   `fine`, else float32. */
INLINE void integer_block(const Weight *w, const Unpacker *by, int64_t n, const Steps *s,
                          int64_t row, void *y, const int mode, const int split, const int fine,
                          const int outputs, const int count) {
    const int vectors = mode == PLAIN ? 1 : 2, size = sizeof(vi);
    const int64_t block = mode == PAIRS ? 2 * CHUNK : CHUNK;
    const int8_t *of_high = s->high + row * s->bytes;
    const int8_t *of_low = split ? s->low + row * s->bytes : NULL;
    f4 total = {0};
    d4 fine_total = {0};
    for (int64_t c = 0; c < s->count; c++) {
        const ScaleRun *run = s->runs + c;
        const uint8_t *at = w->codes + n * w->row_bytes + run->start * w->bits / 8;
        /* The hardware prefetcher does not follow several rows at a time, so the codes that the
           next call but one reads are requested here. */
        const uint8_t *ahead = w->codes + (n + 2 * outputs) * w->row_bytes;
        ahead += outputs * (run->start * w->bits / 8);
        for (int64_t i = 0; i < outputs * run->width * w->bits / 8; i += 64)
            __builtin_prefetch(ahead + i, 0, 2);
        vi sum[OUTPUTS * ROWS] = {0};
        for (int64_t begin = 0; begin < run->width; begin += s->piece) {
            int64_t end = least(begin + s->piece, run->width);
            vi high[OUTPUTS * ROWS] = {0}, low[OUTPUTS * ROWS] = {0};
            for (int64_t k = begin; k < end; k += block) {
                int64_t left = run->width - k, from = run->at + k / block * vectors * size;
#pragma GCC unroll 8
                for (int r = 0; r < outputs; r++) {
                    const uint8_t *here = at + r * w->row_bytes + k * w->bits / 8;
                    vi q[2];
                    if (mode == PAIRS) {
                        unpack_pairs(here, left, by, q);
                    } else {
                        q[0] = unpack(here, left, by);
                        if (mode == WORDS) unpack_words(q[0], q);
                        if (FLIP && w->bits == 8) q[0] ^= all_ints((int32_t)0x80808080);
                    }
#pragma GCC unroll 8
                    for (int m = 0; m < count; m++)
#pragma GCC unroll 8
                        for (int i = 0; i < vectors; i++) {
                            int64_t place = m * s->bytes + from + i * size;
                            vi t = load_ints(of_high + place);
                            high[r + m] = mode == WORDS ? dot_words(high[r + m], q[i], t)
                                                        : dot(high[r + m], q[i], t);
                            if (split) low[r + m] = dot(low[r + m], q[i], load_ints(of_low + place));
                        }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < outputs * count; i++) {
                vi exact = mode == WORDS ? high[i] : settle(high[i]);
                if (split) exact = 2 * exact + settle(low[i]);
                sum[i] += exact;
            }
        }
        i4 sums = sum_lanes(sum[0], sum[1], sum[2], sum[3]);
        add_run(w, n, s, c, row, sums, &total, &fine_total, fine, outputs, count);
    }
#pragma GCC unroll 8
    for (int i = 0; i < outputs * count; i++) {
        int64_t to = outputs > 1 ? row * w->rows + n + i : (row + i) * w->rows + n;
        if (fine)
            ((double *)y)[to] = fine_total[i];
        else
            ((float *)y)[to] = total[i];
    }
}

/* Computes OUTPUTS outputs of every input row, at once if there is a single input row. */
INLINE void integer_outputs(const Weight *w, const Unpacker *by, int64_t n, const Steps *s, void *y,
                            const int mode, const int split, const int fine) {
    if (s->rows == 1 && n + OUTPUTS <= w->rows) {
        integer_block(w, by, n, s, 0, y, mode, split, fine, OUTPUTS, 1);
        return;
    }
    for (int64_t r = n; r < least(n + OUTPUTS, w->rows); r++)
        for (int64_t row = 0; row < s->rows; row += ROWS) {
#define PRODUCT(count) integer_block(w, by, r, s, row, y, mode, split, fine, 1, count)
            SPECIALIZED(least(s->rows - row, ROWS), ROWS, PRODUCT)
#undef PRODUCT
        }
}

/* The same with constants for the bools. */
#define OUTPUT(mode, split) \
    if (fine) \
        integer_outputs(w, &by, n, &s, y, mode, split, 1); \
    else \
        integer_outputs(w, &by, n, &s, y, mode, split, 0);

/* Multiplies an input with a uniform weight whose steps are summed as integers: y [in->rows, rows],
   float64 for inputs in float32, else float32. Returns 0, or 1 if there is not enough memory. */
int integer_rows(const Weight *w, const Input *in, void *y) {
    const Unpacker by = unpacker(w);
    int whole = w->group >= w->width || w->group % (2 * CHUNK) == 0;
    Steps s = {.rows = in->rows, .mode = PLAIN, .block = CHUNK};
    if (w->bits == 4 && whole) s.mode = PAIRS, s.block = 2 * CHUNK;
    if (w->bits == 8 && HAS_WORDS) s.mode = WORDS;
    s.split = in->bits == 8 && s.mode != WORDS;
    s.piece = MAX_RUN;
    if (s.mode != WORDS)
        s.piece = least(MAX_RUN, span(w->bits, in->bits) * CHUNK / s.block * s.block);
    int64_t bytes = s.mode == PLAIN ? CHUNK : 2 * CHUNK;
    s.count = find_runs(w, s.block, bytes, NULL);
    s.runs = malloc(s.count * sizeof(ScaleRun));
    if (!s.runs) return 1;
    find_runs(w, s.block, bytes, s.runs);
    s.bytes = s.runs[s.count - 1].at + s.runs[s.count - 1].stride;
    s.high = malloc(in->rows * s.bytes);
    s.low = s.split ? malloc(in->rows * s.bytes) : NULL;
    s.sums = calloc(s.count * (in->rows + ROWS), sizeof(int32_t));
    int16_t *t = malloc(in->width * sizeof(int16_t));
    const int fine = !in->half;
    int failed = !s.high || (s.split && !s.low) || !s.sums || !t;
    if (!failed) {
        for (int64_t row = 0; row < in->rows; row++) {
            quantize(in, row, 0, t);
            arrange(&s, row, t);
        }
#pragma omp parallel for schedule(static) if (in->rows * w->rows * w->width > SMALL)
        for (int64_t n = 0; n < w->rows; n += OUTPUTS) {
            if (s.mode == WORDS) {
                OUTPUT(HAS_WORDS ? WORDS : PLAIN, 0)
            } else if (s.mode == PAIRS && s.split) {
                OUTPUT(PAIRS, 1)
            } else if (s.mode == PAIRS) {
                OUTPUT(PAIRS, 0)
            } else if (s.split) {
                OUTPUT(PLAIN, 1)
            } else {
                OUTPUT(PLAIN, 0)
            }
        }
    }
    free(s.runs);
    free(s.high);
    free(s.low);
    free(s.sums);
    free(t);
    return failed;
}
