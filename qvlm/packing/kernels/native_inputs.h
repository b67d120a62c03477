/* Inputs are quantized to steps. */

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

/* Loads up to LANES numbers of an input row from channel k of the weight on, as float32. */
INLINE vf load_input(const Input *in, int64_t row, int64_t k) {
    const float *x = (const float *)in->x + row * in->width;
    const uint16_t *half = (const uint16_t *)in->x + row * in->width;
    int64_t count = least(in->width - k, LANES);
    if (!in->half && !in->order) return load_first(x + k, count);
    lane_halves halves = {0};
    if (!in->order) {
        memcpy(&halves, half + k, count == LANES ? sizeof halves : count * sizeof(uint16_t));
        return from_bf16(halves);
    }
    const int32_t *order = in->order + k;
    if (in->half) {
        for (int64_t i = 0; i < count; i++) halves[i] = half[order[i]];
        return from_bf16(halves);
    }
    float found[LANES] = {0};
    for (int64_t i = 0; i < count; i++) found[i] = x[order[i]];
    return load_floats(found);
}

/* Writes the steps t = q - z of an input row, or q - 128 if `from_middle`. They are rounded as
   `UniformQuantizer` of Python does, to the bit. */
static void quantize(const Input *in, int64_t row, int from_middle, int16_t *t) {
    const float *scale = in->scale + row * in->by_row, *zero = in->zero + row * in->by_row;
    const vf top = all_floats((float)((1 << in->bits) - 1)), middle = all_floats(128);
    for (int64_t k = 0; k < in->width; k += LANES) {
        int64_t count = least(in->width - k, LANES);
        vf s = all_floats(*scale), z = all_floats(*zero);
        if (in->by_channel) {
            s = load_first(scale + k, count);
            z = load_first(zero + k, count);
        }
        vf steps = nearest(load_input(in, row, k) / s);
        steps = smaller(larger(steps, 0 - z), top - z);
        if (from_middle) steps += z - middle;
        vi whole = __builtin_convertvector(steps, vi);
        lane_shorts narrow = __builtin_convertvector(whole, lane_shorts);
        memcpy(t + k, &narrow, count == LANES ? sizeof narrow : count * sizeof(int16_t));
    }
}

/* Writes the quantized input to y [rows, width]: steps times scales, or steps alone if `in_steps`.
   Returns 0, or 1 if there is not enough memory. */
int quantized_input(const Input *in, int64_t in_steps, float *y) {
    const float one = 1;
    const int64_t by_row = in_steps ? 0 : in->by_row, by_channel = in_steps ? 0 : in->by_channel;
    int failed = 0;
    _Pragma("omp parallel if (in->rows * in->width > SMALL)")
    {
        int16_t *t = malloc(in->width * sizeof(int16_t));
        if (!t) {
            _Pragma("omp atomic write")
            failed = 1;
        }
        _Pragma("omp barrier")
        _Pragma("omp for schedule(static)")
        for (int64_t row = 0; row < in->rows; row++) {
            if (failed) continue;
            const float *scale = (in_steps ? &one : in->scale) + row * by_row;
            float *to = y + row * in->width;
            quantize(in, row, 0, t);
            for (int64_t k = 0; k < in->width; k++) to[k] = (float)t[k] * scale[k * by_channel];
        }
        free(t);
    }
    return failed;
}

/* Writes scale and zero point of each input row, whose range is its smallest and its largest number
   times `ratio`, as `affine_grid` of Python does, to the bit. */
void token_grids(const Input *in, float ratio, float *scale, float *zero) {
    const float levels = (float)((1 << in->bits) - 1), largest = (float)(FLT_MAX * (1 - 1e-6));
    _Pragma("omp parallel for schedule(static) if (in->rows * in->width > SMALL)")
    for (int64_t row = 0; row < in->rows; row++) {
        vf lowest = {0}, highest = {0}; /* every range contains zero */
        for (int64_t k = 0; k < in->width; k += LANES) {
            vf x = load_input(in, row, k);
            lowest = smaller(lowest, x);
            highest = larger(highest, x);
        }
        float lo = 0, hi = 0;
        for (int64_t i = 0; i < LANES; i++) {
            if (lowest[i] < lo) lo = lowest[i];
            if (highest[i] > hi) hi = highest[i];
        }
        lo *= ratio;
        hi *= ratio;
        float step = hi / levels - lo / levels;
        if (step < FLT_MIN) step = FLT_MIN;
        float z = nearest(all_floats(-lo / step))[0];
        z = z > levels ? levels : z;
        float longest = z > levels - z ? z : levels - z, most = 1 / longest * largest;
        scale[row] = step < most ? step : most;
        zero[row] = z;
    }
}
