/* Attention of one query of each head to all keys, as while an answer is decoded.

   Keys and values of a head are read once for all heads that share them. Scores, their softmax and
   the sums of values are in float32, in an order that every machine has; only the output is rounded
   to the type of the inputs. */

enum { MAX_HEAD = 512 }; /* channels of a head at most; a multiple of 16 */

/* Queries, keys and values. `_Attention` of native_library.py has the same fields in the same order.
   Channels of a head are neighbors; `key_step` and `value_step` count the numbers from one sequence,
   head and position to the next one. */
typedef struct {
    const void *query, *key, *value; /* bf16 if `half`, else float32; query: [batch, heads, width] */
    const uint8_t *mask;             /* [batch, keys]: 0 where a key is left out; or NULL */
    void *output;                    /* [batch, heads, width] */
    int64_t half, batch, key_heads, keys, width;
    int64_t shared;                  /* heads that share keys and values */
    int64_t key_step[3], value_step[3];
    float scale;                     /* of scores */
} Attention;

/* LANES numbers from number i on. */
INLINE vf load_numbers(const void *at, int64_t i, const int half) {
    if (!half) return load_floats((const float *)at + i);
    lane_halves halves;
    memcpy(&halves, (const uint16_t *)at + i, sizeof halves);
    return from_bf16(halves);
}

/* e^x for x <= 0, and 0 where that is no normal number: 2^n e^r, with the Taylor series of e^r, whose
   remainder is below 6e-9 for |r| <= log(2) / 2. */
INLINE vf exponential(vf x) {
    const float high = 0.693359375f, low = -2.12194440e-4f; /* log(2), of which n * high is exact */
    vf safe = larger(x, all_floats(-87)), n = nearest(safe * all_floats(1.44269504f));
    vf r = safe - n * high - n * low, e = all_floats(1 / 5040.f);
    const float inverse[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) e = fused(e, r, all_floats(inverse[i]));
    vi bits = (vi)e + (__builtin_convertvector(n, vi) << 23);
    return (vf)(bits & (vi)(x >= all_floats(-87)));
}

/* Writes the scores of `count` queries [count, width] to `scores` [count, room]. */
INLINE void score(const Attention *a, const void *keys, const float *query, float *scores,
                  int64_t room, const int count, const int half) {
    for (int64_t t = 0; t < a->keys; t++) {
        vf sum[ROWS][WHOLE] = {0};
        for (int64_t d = 0; d < a->width; d += 16)
            for (int i = 0; i < WHOLE; i++) {
                vf key = load_numbers(keys, t * a->key_step[2] + d + i * LANES, half);
                for (int m = 0; m < count; m++)
                    sum[m][i] = fused(load_floats(query + m * a->width + d + i * LANES), key,
                                      sum[m][i]);
            }
        for (int m = 0; m < count; m++) scores[m * room + t] = sum_floats(sum[m]) * a->scale;
    }
}

/* Turns the scores of one query into shares, not divided by their sum, and returns that sum. It is 0
   if every key is left out, and no number if a score is none. */
INLINE float soften(const Attention *a, const uint8_t *mask, float *scores, int64_t room) {
    float top = -FLT_MAX;
    int undefined = 0;
    for (int64_t t = 0; t < room; t++) {
        if (t >= a->keys || (mask && !mask[t])) scores[t] = -__builtin_inff();
        if (scores[t] > top) top = scores[t];
        undefined |= scores[t] != scores[t];
    }
    vf sum[WHOLE] = {0};
    for (int64_t t = 0; t < room; t += LANES) {
        vf share = exponential(load_floats(scores + t) - top);
        store_floats(scores + t, share);
        sum[t / LANES % WHOLE] += share;
    }
    return undefined ? __builtin_nanf("") : sum_floats(sum);
}

/* Writes `vectors` * LANES channels of the output of `count` queries, from channel d on. */
INLINE void add_values(const Attention *a, const void *values, const float *scores, int64_t room,
                       const float *total, int64_t d, void *output, const int vectors,
                       const int count, const int half) {
    vf sum[ROWS][4] = {0};
    for (int64_t t = 0; t < a->keys; t++)
        for (int i = 0; i < vectors; i++) {
            vf value = load_numbers(values, t * a->value_step[2] + d + i * LANES, half);
            for (int m = 0; m < count; m++)
                sum[m][i] = fused(all_floats(scores[m * room + t]), value, sum[m][i]);
        }
    for (int m = 0; m < count; m++)
        for (int i = 0; i < vectors; i++) {
            vf y = sum[m][i] / (total[m] == 0 ? 1 : total[m]);
            int64_t to = m * a->width + d + i * LANES;
            if (!half) {
                store_floats((float *)output + to, y);
                continue;
            }
            lane_halves rounded = round_bf16(y);
            memcpy((uint16_t *)output + to, &rounded, sizeof rounded);
        }
}

/* Computes `count` heads that share the keys of `key_head`, from head `first` of these on. */
INLINE void attend_heads(const Attention *a, int64_t sequence, int64_t key_head, int64_t first,
                         float *scores, int64_t room, const int count, const int half) {
    int64_t size = half ? sizeof(uint16_t) : sizeof(float), head = key_head * a->shared + first;
    int64_t at = (sequence * a->key_heads * a->shared + head) * a->width;
    const char *keys = (const char *)a->key +
                       (sequence * a->key_step[0] + key_head * a->key_step[1]) * size;
    const char *values = (const char *)a->value +
                         (sequence * a->value_step[0] + key_head * a->value_step[1]) * size;
    const uint8_t *mask = a->mask ? a->mask + sequence * a->keys : NULL;
    char *output = (char *)a->output + at * size;
    float query[ROWS * MAX_HEAD], total[ROWS];
    for (int64_t i = 0; i < count * a->width; i += LANES)
        store_floats(query + i, load_numbers(a->query, at + i, half));
    score(a, keys, query, scores, room, count, half);
    for (int m = 0; m < count; m++) total[m] = soften(a, mask, scores + m * room, room);
    int64_t d = 0;
    for (; d + 4 * LANES <= a->width; d += 4 * LANES)
        add_values(a, values, scores, room, total, d, output, 4, count, half);
    for (; d < a->width; d += LANES)
        add_values(a, values, scores, room, total, d, output, 1, count, half);
}

/* Writes the output of all heads of all sequences. Returns 1 if there is not enough memory. */
int attend(const Attention *a) {
    int64_t room = (a->keys + 15) / 16 * 16, heads = a->batch * a->key_heads, failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed) \
    if (heads * a->shared * a->keys * a->width > SMALL / 16)
    for (int64_t index = 0; index < heads; index++) {
        int64_t sequence = index / a->key_heads, key_head = index % a->key_heads;
        float *scores = malloc(ROWS * room * sizeof(float));
        if (!scores) {
            failed = 1;
            continue;
        }
        for (int64_t first = 0; first < a->shared; first += ROWS) {
#define HEADS(count) \
    if (a->half) \
        attend_heads(a, sequence, key_head, first, scores, room, count, 1); \
    else \
        attend_heads(a, sequence, key_head, first, scores, room, count, 0)
            SPECIALIZED(least(a->shared - first, ROWS), ROWS, HEADS)
#undef HEADS
        }
        free(scores);
    }
    return (int)failed;
}
