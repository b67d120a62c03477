/* Few input rows: the weight is read once, as it is stored. */

/* How codes and steps meet.

   PLAIN: a chunk of codes with as many bytes of steps. PAIRS: the low halves of a chunk of bytes
   hold the even channels of a block of two chunks and the high halves the odd ones, so its steps are
   those of its even channels and then those of its odd ones. WORDS: steps are 16-bit numbers, and
   codes are widened to such. */
enum { PLAIN, PAIRS, WORDS };

enum { RUNS = 4 }; /* runs of a weight row whose sums are found together */

/* Steps of an input, arranged as the product reads them: run by run, in blocks that zeros fill up.

   Steps of 8-bit inputs do not fit int8 and are split, t = 2 high + low, unless they are words. */
typedef struct {
    int64_t rows, mode, split;
    int64_t block; /* channels of a block, which has 1 vector of steps if PLAIN, else 2 */
    int64_t bytes; /* of a row of steps */
    int64_t count; /* of runs */
    int64_t piece; /* channels whose products are added before `settle`, whole blocks */
    int64_t whole; /* whether every run consists of whole blocks and is no longer than a piece */
    int64_t ahead; /* bytes of the codes of RUNS runs, about */
    ScaleRun *runs;
    int8_t *high, *low; /* [rows, bytes]; low is NULL if no step is split */
    int32_t *sums;      /* sum of t over each run, for each row: number run * pitch + row */
    int64_t pitch;      /* 1 for a single row, else the rows and ROWS more */
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
        s->sums[c * s->pitch + row] = sum;
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

/* Computes the products of codes and steps over run c, of `outputs` weight rows from row n on with
   `count` input rows from `row` on, of which one is 1: a vector each, `apart` vectors apart.
   `whole`: the run consists of whole blocks whose products fit `dot`. */
INLINE void multiply_run(const Weight *w, const Unpacker *by, int64_t n, const Steps *s, int64_t c,
                         int64_t row, vi *sum, const int apart, const int mode, const int split,
                         const int whole, const int outputs, const int count) {
    const int vectors = mode == PLAIN ? 1 : 2, size = sizeof(vi);
    const int64_t block = mode == PAIRS ? 2 * CHUNK : CHUNK;
    const int8_t *of_high = s->high + row * s->bytes;
    const int8_t *of_low = split ? s->low + row * s->bytes : NULL;
    const ScaleRun *run = s->runs + c;
    const uint8_t *at = w->codes + n * w->row_bytes + run->start * w->bits / 8;
    const int64_t piece = whole ? run->width : s->piece;
#pragma GCC unroll 8
    for (int i = 0; i < outputs * count; i++) sum[i * apart] = (vi){0};
    for (int64_t begin = 0; begin < run->width; begin += piece) {
        int64_t end = least(begin + piece, run->width);
        vi high[OUTPUTS * ROWS] = {0}, low[OUTPUTS * ROWS] = {0};
        for (int64_t k = begin; k < end; k += block) {
            int64_t left = whole ? block : run->width - k;
            int64_t from = run->at + k / block * vectors * size;
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
            sum[i * apart] += exact;
        }
    }
}

/* Requests codes that later calls read. The hardware's prefetcher does not follow several rows at a
   time, so codes are requested here in the order of memory. */
INLINE void request(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Computes y[row + m, n] for m < count. y is float64 if `fine`, else float32. */
INLINE void integer_block(const Weight *w, const Unpacker *by, int64_t n, const Steps *s,
                          int64_t row, void *y, const int mode, const int split, const int fine,
                          const int count) {
    f4 total = {0};
    d4 fine_total = {0};
    for (int64_t c = 0; c < s->count; c++) {
        vi sum[ROWS] = {0};
        request(w->codes + (n + 2) * w->row_bytes + s->runs[c].start * w->bits / 8,
                s->runs[c].width * w->bits / 8);
        multiply_run(w, by, n, s, c, row, sum, 1, mode, split, 0, 1, count);
        int64_t group = s->runs[c].group;
        float scale = w->scale[n * w->stride + group], factor = w->factor ? w->factor[group] : 1;
        int32_t z = w->zero[n * w->stride + group] - (w->bits == 8 ? FLIP : 0);
        i4 t = {0};
        memcpy(&t, s->sums + c * s->pitch + row, count * sizeof(int32_t));
        i4 exact = sum_lanes(sum[0], sum[1], sum[2], sum[3]) - z * t;
        if (fine)
            fine_total += __builtin_convertvector(exact, d4) * ((double)scale * (double)factor);
        else
            total += __builtin_convertvector(exact, f4) * (scale * factor);
    }
    for (int m = 0; m < count; m++) {
        if (fine)
            ((double *)y)[(row + m) * w->rows + n] = fine_total[m];
        else
            ((float *)y)[(row + m) * w->rows + n] = total[m];
    }
}

typedef uint8_t four_bytes __attribute__((vector_size(4), may_alias));

/* Adds s (sum of t q - z sum of t) over `count` runs from run c on, run by run, to outputs n to
   n + `outputs` - 1 of a single input row. */
INLINE void add_runs(const Weight *w, const Unpacker *by, int64_t n, const Steps *s, int64_t c,
                     f4 *total, d4 *fine_total, const int mode, const int split, const int fine,
                     const int whole, const int outputs, const int count) {
    const int64_t group = s->runs[c].group;
    const int neighbors = s->runs[c + count - 1].group == group + count - 1;
    const int32_t flip = w->bits == 8 ? FLIP : 0;
    i4 t = {0}, parts[OUTPUTS] = {0};
    f4 factor = {1, 1, 1, 1};
    d4 fine_parts[OUTPUTS] = {0};
    memcpy(&t, s->sums + c, count * sizeof(int32_t));
    for (int i = 0; w->factor && i < count; i++) factor[i] = w->factor[s->runs[c + i].group];
    vi sums[OUTPUTS * RUNS] = {0};
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        multiply_run(w, by, n, s, c + i, 0, sums + i, RUNS, mode, split, whole, outputs, 1);
#pragma GCC unroll 8
    for (int r = 0; r < outputs; r++) {
        const vi *sum = sums + r * RUNS;
        const float *scales = w->scale + (n + r) * w->stride + group;
        const uint8_t *zeros = w->zero + (n + r) * w->stride + group;
        four_bytes z = {0};
        f4 scale = {0};
        if (neighbors) {
            memcpy(&z, zeros, count);
            memcpy(&scale, scales, count * sizeof(float));
        } else {
            for (int i = 0; i < count; i++) {
                z[i] = zeros[s->runs[c + i].group - group];
                scale[i] = scales[s->runs[c + i].group - group];
            }
        }
        i4 exact = sum_lanes(sum[0], sum[1], sum[2], sum[3]);
        exact -= (__builtin_convertvector(z, i4) - flip) * t;
        if (fine)
            fine_parts[r] = __builtin_convertvector(exact, d4) *
                            (__builtin_convertvector(scale, d4) *
                             __builtin_convertvector(factor, d4));
        else
            parts[r] = (i4)(__builtin_convertvector(exact, f4) * (scale * factor));
    }
    if (!fine) transpose(parts);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        if (fine)
            *fine_total += (d4){fine_parts[0][i], fine_parts[1][i], fine_parts[2][i],
                                fine_parts[3][i]};
        else
            *total += (f4)parts[i];
    }
}

/* Computes outputs n to n + `outputs` - 1 of a single input row. The sums of RUNS runs are found
   together, because their scales are neighbors in memory. */
INLINE void single_row(const Weight *w, const Unpacker *by, int64_t n, const Steps *s, void *y,
                       const int mode, const int split, const int fine, const int whole,
                       const int outputs) {
    f4 total = {0};
    d4 fine_total = {0};
    int64_t c = 0;
    for (; c + RUNS <= s->count; c += RUNS) {
        const uint8_t *later = w->codes + (n + 2 * outputs) * w->row_bytes;
        request(later + outputs * (s->runs[c].start * w->bits / 8), outputs * s->ahead);
        add_runs(w, by, n, s, c, &total, &fine_total, mode, split, fine, whole, outputs, RUNS);
    }
    for (; c < s->count; c++)
        add_runs(w, by, n, s, c, &total, &fine_total, mode, split, fine, whole, outputs, 1);
    for (int r = 0; r < outputs; r++) {
        if (fine)
            ((double *)y)[n + r] = fine_total[r];
        else
            ((float *)y)[n + r] = total[r];
    }
}

/* Computes OUTPUTS outputs of every input row. */
INLINE void integer_outputs(const Weight *w, const Unpacker *by, int64_t n, const Steps *s, void *y,
                            const int mode, const int split, const int fine) {
    const int all = n + OUTPUTS <= w->rows;
    if (s->rows == 1 && all && s->whole) {
        single_row(w, by, n, s, y, mode, split, fine, 1, OUTPUTS);
        return;
    }
    if (s->rows == 1 && all) {
        single_row(w, by, n, s, y, mode, split, fine, 0, OUTPUTS);
        return;
    }
    for (int64_t r = n; r < least(n + OUTPUTS, w->rows); r++) {
        if (s->rows == 1) single_row(w, by, r, s, y, mode, split, fine, 0, 1);
        for (int64_t row = 0; s->rows > 1 && row < s->rows; row += ROWS) {
#define PRODUCT(count) integer_block(w, by, r, s, row, y, mode, split, fine, count)
            SPECIALIZED(least(s->rows - row, ROWS), ROWS, PRODUCT)
#undef PRODUCT
        }
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
    s.ahead = w->row_bytes * RUNS / s.count;
    s.whole = 1;
    for (int64_t c = 0; c < s.count; c++)
        s.whole &= s.runs[c].width % s.block == 0 && s.runs[c].width <= s.piece;
    s.bytes = s.runs[s.count - 1].at + s.runs[s.count - 1].stride;
    s.high = malloc(in->rows * s.bytes);
    s.low = s.split ? malloc(in->rows * s.bytes) : NULL;
    s.pitch = in->rows > 1 ? in->rows + ROWS : 1;
    s.sums = calloc(s.count * s.pitch, sizeof(int32_t));
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
