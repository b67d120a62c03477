/* Calls the products of native.c on operands in a file, for machines that are emulated.

   native.c is included, so that one command compiles both. The file holds 64-bit integers, the
   fields of Case in order, and then the arrays in the order in which `read_array` is called. */

#include <stdio.h>

#include "native.c"

typedef struct {
    int64_t bits, out, width, row_bytes, group, groups;
    int64_t normal_float, rows, half, by_row, by_channel, input_bits;
} Case;

static void *read_array(FILE *file, int64_t bytes) {
    char *at = malloc(bytes + 64); /* nothing may be read behind it: the emulator has no guard */
    if (fread(at, 1, bytes, file) != (size_t)bytes) exit(3);
    return at;
}

static void write_array(FILE *file, const void *at, int64_t bytes) {
    if (fwrite(at, 1, bytes, file) != (size_t)bytes) exit(4);
}

int main(int count, char **names) {
    if (count != 3) return 2;
    FILE *from = fopen(names[1], "rb"), *to = fopen(names[2], "wb");
    if (!from || !to) return 2;
    Case c;
    while (fread(&c, sizeof c, 1, from) == 1) {
        Weight w = {.rows = c.out, .width = c.width, .row_bytes = c.row_bytes, .bits = c.bits,
                    .group = c.group, .stride = c.groups, .nested_block = 1};
        w.codes = read_array(from, c.out * c.row_bytes);
        const float *scale = read_array(from, c.out * c.groups * 4);
        w.zero = read_array(from, c.out * c.groups);
        const float *levels = read_array(from, (1 << c.bits) * 4);
        Input in = {.rows = c.rows, .width = c.width, .half = c.half, .by_row = c.by_row,
                    .by_channel = c.by_channel, .bits = c.input_bits};
        in.x = read_array(from, c.rows * c.width * (c.half ? 2 : 4));
        int64_t grid = c.by_row ? c.rows : c.by_channel ? c.width : 1;
        in.scale = read_array(from, grid * 4);
        in.zero = read_array(from, grid * 4);
        if (c.normal_float)
            w.levels = levels, w.nested_absmax = scale;
        else
            w.scale = scale;
        int64_t outputs = c.rows * c.out, size = c.half ? 4 : 8;
        void *y = malloc(outputs * 8 + 48 * 4);
        if (!c.normal_float) {
            if (integer_rows(&w, &in, y)) return 5;
            write_array(to, y, outputs * size);
            if (integer_tiles(&w, &in, y)) return 5;
            write_array(to, y, outputs * size);
        }
        if (!c.half) {
            float_rows(&w, c.rows, in.x, y);
            write_array(to, y, outputs * 4);
        } else if (c.bits == 4 && c.group % 64 == 0 && c.width % 64 == 0) {
            if (rounded_rows(&w, c.rows, in.x, y)) return 5;
            write_array(to, y, outputs * 4);
        }
        /* Three heads that share keys, which are the values too: positions of 16 channels. */
        const int64_t positions = c.rows * c.width / 16;
        Attention a = {.query = in.x, .key = in.x, .value = in.x, .output = y, .half = c.half,
                       .batch = 1, .key_heads = 1, .keys = positions, .width = 16, .shared = 3,
                       .key_step = {0, 0, 16}, .value_step = {0, 0, 16}, .scale = 0.01f};
        if (positions >= 3) {
            if (attend(&a)) return 5;
            write_array(to, y, 48 * (c.half ? 2 : 4));
        }
        void *dequantized = malloc(c.out * c.width * 4);
        dequantize(&w, 0, c.out, c.half, dequantized);
        write_array(to, dequantized, c.out * c.width * (c.half ? 2 : 4));
    }
    return fclose(to) != 0;
}
