/* A whole packed layer in one call: a layer of a hundred channels would wait for its steps apart. */

/* What a layer makes of its input and of its sums. `_Layer` of native_library.py has the same fields
   in the same order. */
typedef struct {
    const Weight *weight;
    const int32_t *order;      /* as in Input */
    const float *scale, *zero; /* as in Input, of all rows; NULL: each row has the grid of its range */
    int64_t by_channel, bits;  /* as in Input */
    int64_t integer;           /* whether steps and codes are multiplied, or what they stand for */
    int64_t in_steps;          /* not `integer`: as for quantized_input */
    int64_t scaled;            /* whether sums are multiplied with the scale of their row */
    float ratio;               /* of a row's range, as token_grids takes it */
} Layer;

/* Types of inputs and outputs. FINE: the input is in float32 and the output in float64. */
enum { SINGLE, HALF, FINE };
/* What may be wrong. */
enum { NO_MEMORY = 1, NOT_FINITE = 2 };

/* Whether all numbers are finite: not all bits of their exponents are set. */
static int is_finite(const Input *in) {
    const int64_t count = in->rows * in->width;
    const uint16_t *half = in->x;
    int infinite = 0;
    _Pragma("omp parallel for schedule(static) reduction(| : infinite) if (count > SMALL)")
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        if (in->half)
            bits = (uint32_t)half[i] << 16;
        else
            memcpy(&bits, (const char *)in->x + i * sizeof bits, sizeof bits);
        infinite |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !infinite;
}

/* Writes outputs of a type: sums of `in`, times scales, plus `bias` [outputs] or NULL. `single`: sums
   are in float32, else in float64, and so are products and sums here. */
static void finish(const Input *in, int64_t outputs, int64_t scaled, const float *bias, int single,
                   const void *sums, int64_t type, void *y) {
    _Pragma("omp parallel for schedule(static) if (in->rows * outputs > SMALL / 8)")
    for (int64_t row = 0; row < in->rows; row++) {
        const float scale = scaled ? in->scale[row * in->by_row] : 1;
        const int64_t from = row * outputs;
        const float *floats = (const float *)sums + from;
        const double *doubles = (const double *)sums + from;
        for (int64_t n = 0; single && n < outputs; n++) {
            float total = bias ? floats[n] * scale + bias[n] : floats[n] * scale;
            if (type == HALF)
                ((uint16_t *)y)[from + n] = to_bf16(total);
            else
                ((float *)y)[from + n] = total;
        }
        for (int64_t n = 0; !single && n < outputs; n++) {
            double total = bias ? doubles[n] * scale + bias[n] : doubles[n] * scale;
            if (type == FINE)
                ((double *)y)[from + n] = total;
            else
                ((float *)y)[from + n] = (float)total;
        }
    }
}

/* Multiplies what the steps of an input stand for with what the codes of a weight do, in float32:
   y [in->rows, rows]. Both are rounded to bf16 if that is the type and codes are in pairs. Returns 0,
   or NO_MEMORY. */
static int float_layer(const Weight *w, const Input *in, int64_t in_steps, float *y) {
    const int64_t count = in->rows * in->width;
    const int paired = in->half && w->bits == 4 && w->group % 64 == 0 && w->width % 64 == 0;
    float *x = malloc(count * (sizeof(float) + (paired ? sizeof(uint16_t) : 0)));
    if (!x) return NO_MEMORY;
    int failed = quantized_input(in, in_steps, x);
    if (!failed && paired) {
        uint16_t *half = (uint16_t *)(x + count);
        for (int64_t i = 0; i < count; i++) half[i] = to_bf16(x[i]);
        failed = rounded_rows(w, in->rows, half, y);
    } else if (!failed) {
        float_rows(w, in->rows, x, y);
    }
    free(x);
    return failed;
}

/* Computes the output of a layer for an input of a type, y [rows, outputs] of that type, rounded
   once. `few`: by integer_rows, else by integer_tiles. `sums` is room for [rows, outputs] sums: y if
   those are of its type, and NULL for room of its own. Returns 0, NO_MEMORY, or NOT_FINITE if the
   input is not. */
int linear(const Layer *layer, const void *x, int64_t rows, int64_t type, int64_t few,
           const float *bias, void *sums, void *y) {
    const Weight *w = layer->weight;
    Input in = {.x = x, .rows = rows, .width = w->width, .half = type == HALF,
                .order = layer->order, .scale = layer->scale, .zero = layer->zero,
                .by_channel = layer->by_channel, .bits = layer->bits};
    if (!is_finite(&in)) return NOT_FINITE;
    const int single = type == HALF || !layer->integer;
    const int64_t room = sums ? 0 : rows * w->rows * (single ? sizeof(float) : sizeof(double));
    const int64_t grids = in.scale ? 0 : 2 * rows * sizeof(float);
    char *own = malloc(room + grids + 1);
    if (!own) return NO_MEMORY;
    if (!sums) sums = own;
    if (!in.scale) {
        float *grid = (float *)(own + room);
        token_grids(&in, layer->ratio, grid, grid + rows);
        in.scale = grid;
        in.zero = grid + rows;
        in.by_row = 1;
    }
    const int failed = !layer->integer ? float_layer(w, &in, layer->in_steps, sums)
                       : few           ? integer_rows(w, &in, sums)
                                       : integer_tiles(w, &in, sums);
    if (!failed) finish(&in, w->rows, layer->scaled, bias, single, sums, type, y);
    free(own);
    return failed;
}
