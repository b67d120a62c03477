/* Many input rows: a tile of TILE outputs is unpacked once and multiplied with all of them. */

/* Channels whose codes share a lane, at least. */
enum { PER_LANE = HAS_WORDS ? 2 : 4 };

/* A scale run of a tile of outputs. */
typedef struct {
    int32_t lanes[MAX_RUN / PER_LANE][TILE]; /* neighboring codes of an output in each lane */
    float scale[TILE];
    double fine_scale[TILE];
    int32_t zero[TILE];
    int32_t offset[TILE]; /* sum of the input's offset times v, see Shift */
    int shifted;          /* whether there are offsets */
} __attribute__((aligned(64))) Tile;

/* Unpacks `width` channels of a weight row from `start` on, as they lie in lanes, and zeros after
   them up to a whole chunk of channels. */
INLINE void load_row(uint8_t *codes, const Weight *w, const Unpacker *by, int64_t n, int64_t start,
                     int64_t width, const int words) {
    const uint8_t *row = w->codes + n * w->row_bytes;
    for (int64_t k = 0; k < width; k += CHUNK) {
        vi q[2] = {unpack(row + (start + k) * w->bits / 8, width - k, by)};
        if (FLIP && w->bits == 8) q[0] ^= all_ints((int32_t)0x80808080);
        if (words) unpack_words(q[0], q);
        memcpy(codes + (words ? 2 * k : k), q, words ? sizeof q : sizeof q[0]);
    }
    memset(codes + (words ? 2 * width : width), 0, 16);
}

/* Unpacks `width` channels from `start` on, which share scale g, of TILE outputs from n on. */
INLINE void load_tile(Tile *c, const Weight *w, const Unpacker *by, int64_t n, int64_t g,
                      int64_t start, int64_t width, const int16_t *offset, const int words) {
    int64_t outputs = least(w->rows - n, TILE);
    uint8_t codes[4][(MAX_RUN + CHUNK) * (words ? 2 : 1)] __attribute__((aligned(64)));
    const int32_t flip = w->bits == 8 ? FLIP : 0;
    c->shifted = offset != NULL;
    for (int64_t r = 0; r < TILE; r += 4) {
        for (int64_t i = 0; i < 4; i++) {
            int64_t scale_at = (n + r + i) * w->stride + g;
            if (r + i >= outputs) {
                c->scale[r + i] = c->fine_scale[r + i] = c->zero[r + i] = c->offset[r + i] = 0;
                memset(codes[i], 0, sizeof codes[i]);
                continue;
            }
            float scale = w->scale[scale_at], factor = w->factor ? w->factor[g] : 1;
            int32_t zero = w->zero[scale_at] - flip, sum = 0;
            c->scale[r + i] = scale * factor;
            c->fine_scale[r + i] = (double)scale * factor;
            c->zero[r + i] = zero;
            load_row(codes[i], w, by, n + r + i, start, width, words);
            for (int64_t k = 0; offset && k < width; k++)
                sum += offset[start + k] * ((FLIP ? (int8_t)codes[i][k] : codes[i][k]) - zero);
            c->offset[r + i] = sum;
        }
        for (int64_t k = 0; k * (words ? 2 : 4) < width; k += 4) {
            i4 v[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) memcpy(v + i, codes[i] + 4 * k, sizeof v[i]);
            transpose(v);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) memcpy(c->lanes[k + i] + r, v + i, sizeof v[i]);
        }
    }
}

/* Adds the products of lanes begin to end of `count` rows with PANEL outputs to `sum`. */
INLINE void multiply(vi sum[STRIPE][PANEL / LANES], const Tile *c, int64_t panel, int64_t begin,
                     int64_t end, const int8_t *steps, int64_t stride, const int words,
                     const int count) {
    for (int64_t k = begin; k < end; k++) {
        vi q[PANEL / LANES];
#pragma GCC unroll 8
        for (int i = 0; i < PANEL / LANES; i++) q[i] = load_ints(c->lanes[k] + panel + i * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            int32_t four;
            memcpy(&four, steps + m * stride + 4 * k, sizeof four);
            vi t = all_ints(four);
#pragma GCC unroll 8
            for (int i = 0; i < PANEL / LANES; i++)
                sum[m][i] = words ? dot_words(sum[m][i], q[i], t) : dot(sum[m][i], q[i], t);
        }
    }
}

/* Adds s (sum of t v) over a run to y[row + m, TILE], for m < count. y is float64 if `fine`, else
   float32. `steps` and `sums` are the steps and their sums over the run, in each of the rows.
   `piece` is the number of lanes whose products are added before `settle`. */
INLINE void stripe(const Tile *c, int64_t stride, int64_t piece, const int8_t *steps,
                   const int32_t *sums, const int32_t *times, void *y, int64_t row, const int words,
                   const int fine, const int count) {
    for (int64_t panel = 0; panel < TILE; panel += PANEL) {
        vi acc[STRIPE][PANEL / LANES] = {0};
        if (words || !HAS_PIECES)
            multiply(acc, c, panel, 0, stride / 4, steps, stride, words, count);
        for (int64_t k = 0; !words && HAS_PIECES && k < stride / 4; k += piece) {
            vi part[STRIPE][PANEL / LANES] = {0};
            multiply(part, c, panel, k, least(k + piece, stride / 4), steps, stride, 0, count);
#pragma GCC unroll 8
            for (int m = 0; m < count; m++)
#pragma GCC unroll 8
                for (int i = 0; i < PANEL / LANES; i++) acc[m][i] += settle(part[m][i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < PANEL / LANES; i++) {
            const int64_t n = panel + i * LANES;
            vi zero = load_ints(c->zero + n), offset = load_ints(c->offset + n);
            vf scale = load_floats(c->scale + n);
#pragma GCC unroll 8
            for (int m = 0; m < count; m++) {
                vi exact = acc[m][i] - zero * sums[m];
                if (c->shifted) exact += offset * (times ? times[m] : 1);
                if (!fine) {
                    float *at = (float *)y + (row + m) * TILE + n;
                    store_floats(at, load_floats(at) + __builtin_convertvector(exact, vf) * scale);
                    continue;
                }
                double *at = (double *)y + (row + m) * TILE + n;
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    half_ints half;
                    vd by, before;
                    memcpy(&half, (const char *)&exact + h * sizeof half, sizeof half);
                    memcpy(&by, c->fine_scale + n + h * LANES / 2, sizeof by);
                    memcpy(&before, at + h * LANES / 2, sizeof before);
                    before += __builtin_convertvector(half, vd) * by;
                    memcpy(at + h * LANES / 2, &before, sizeof before);
                }
            }
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
    shift->offset = malloc(in->width * sizeof(int16_t));
    if (in->by_row) shift->times = malloc(in->rows * sizeof(int32_t));
    if (!shift->offset || (in->by_row && !shift->times)) return 1;
    for (int64_t k = 0; k < in->width; k++)
        shift->offset[k] = in->by_row ? 1 : (int16_t)(128 - in->zero[k * in->by_channel]);
    for (int64_t row = 0; in->by_row && row < in->rows; row++)
        shift->times[row] = (int32_t)(128 - in->zero[row]);
    return 0;
}

/* Steps of an input by run, then row, then channel, which is the order in which a tile reads them,
   and their sums by run and row. */
typedef struct {
    int64_t rows, count; /* count of runs */
    ScaleRun *runs;
    int8_t *steps;
    int32_t *sums;
} Columns;

/* Writes the steps t of an input row into `s`, in bytes or 16-bit numbers. */
static void arrange_column(Columns *s, int64_t row, const int16_t *t, const int words) {
    for (int64_t i = 0; i < s->count; i++) {
        const ScaleRun *run = s->runs + i;
        const int16_t *from = t + run->start;
        int8_t *to = s->steps + run->at * s->rows + row * run->stride;
        int32_t sum = 0;
        memset(to + run->stride - 4, 0, 4);
        for (int64_t k = 0; k < run->width; k++) sum += from[k];
        if (words)
            memcpy(to, from, run->width * sizeof(int16_t));
        else
            for (int64_t k = 0; k < run->width; k++) to[k] = (int8_t)from[k];
        s->sums[i * s->rows + row] = sum;
    }
}

/* Does what `integer_rows` does, faster for many input rows. */
int integer_tiles(const Weight *w, const Input *in, void *y) {
    const Unpacker by = unpacker(w);
    const int words = HAS_WORDS && w->bits == 8, middle = in->bits == 8 && !words;
    const int fine = !in->half;
    const int64_t m = in->rows, size = fine ? sizeof(double) : sizeof(float);
    const int64_t piece = words ? MAX_RUN : span(w->bits, in->bits);
    Columns s = {.rows = m, .count = find_runs(w, words ? 2 : 4, 4, NULL)};
    s.runs = malloc(s.count * sizeof(ScaleRun));
    if (!s.runs) return 1;
    find_runs(w, words ? 2 : 4, 4, s.runs);
    s.steps = malloc(m * (s.runs[s.count - 1].at + s.runs[s.count - 1].stride));
    s.sums = malloc(s.count * m * sizeof(int32_t));
    Shift shift = {NULL, NULL};
    int failed = (middle && find_shift(in, &shift)) || !s.steps || !s.sums;
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
                quantize(in, row, middle, t);
                arrange_column(&s, row, t, words);
            }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t top = 0; top < m; top += BAND)
                for (int64_t n = 0; n < w->rows; n += TILE) {
                    if (failed) continue;
                    int64_t rows = least(m - top, BAND), outputs = least(w->rows - n, TILE);
                    memset(tile, 0, rows * TILE * size);
                    for (int64_t i = 0; i < s.count; i++) {
                        const ScaleRun *run = s.runs + i;
                        if (words)
                            load_tile(c, w, &by, n, run->group, run->start, run->width, NULL,
                                      HAS_WORDS);
                        else
                            load_tile(c, w, &by, n, run->group, run->start, run->width,
                                      shift.offset, 0);
                        for (int64_t row = top; row < top + rows; row += STRIPE) {
                            const int8_t *t = s.steps + run->at * m + row * run->stride;
                            const int32_t *sum = s.sums + i * m + row;
                            const int32_t *times = shift.times ? shift.times + row : NULL;
#define STRIPES(words, fine, count) \
    stripe(c, run->stride, piece, t, sum, times, tile, row - top, words, fine, count)
#define PRODUCT(count) \
    if (words && fine) \
        STRIPES(HAS_WORDS, 1, count); \
    else if (words) \
        STRIPES(HAS_WORDS, 0, count); \
    else if (fine) \
        STRIPES(0, 1, count); \
    else \
        STRIPES(0, 0, count)
                            SPECIALIZED(least(top + rows - row, STRIPE), STRIPE, PRODUCT)
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
    free(s.runs);
    free(s.steps);
    free(s.sums);
    free(shift.offset);
    free(shift.times);
    return failed;
}
