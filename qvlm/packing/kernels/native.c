/* Products with packed weights on a CPU. native_library.py compiles this file for the instruction
   set of the machine, calls it and says what each product is for; base.py defines steps t and v,
   codes q and zero points z.

   A weight row is a stream of codes of `bits` bits, lowest bit first (see formats.py), so 8 codes
   take `bits` bytes whatever their width, and a chunk of codes is unpacked at once. Channels are
   visited in scale runs: at most MAX_RUN neighboring channels that share all scales. The sum over a
   run is exact in int32. It is converted, scaled and added, each rounded apart, run by run: in
   float32 for inputs in bf16, and in float64 for inputs in float32, whose output is float64 too. So
   every instruction set, any number of threads and any number of rows give the same bits.

   The products are written once, with the vector types of GCC and Clang. native_avx512.h,
   native_avx2.h and native_neon.h hold what differs between instruction sets.

   A parallel loop runs on the threads of the OpenMP library that PyTorch has loaded. Names: `m`
   counts rows of inputs, `n` counts rows of the weight, which are outputs, and `k` counts channels.
   `INLINE` functions are called with constants, and each call is compiled for its own. */

#if defined(__AVX512VBMI__)
#include "native_avx512.h"
#elif defined(__AVX2__)
#include "native_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "native_neon.h"
#else
#error "there are no products for this instruction set"
#endif

#include "native_inputs.h"

#include "native_rows.h"

#include "native_tiles.h"

#include "native_floats.h"

#include "native_attention.h"

#include "native_layer.h"

/* Transforms each of `rows` blocks of `size` numbers, a power of two, in place: the Walsh-Hadamard
   transform in natural order, not scaled. A number passes log2(size) additions or subtractions,
   whose order is that of its definition, so every machine gives the same bits. */
#define HADAMARD(name, type) \
    void name(type *x, int64_t rows, int64_t size) { \
        _Pragma("omp parallel for schedule(static) if (rows * size > SMALL / 8)") \
        for (int64_t row = 0; row < rows; row++) \
            for (int64_t half = 1; half < size; half *= 2) \
                for (type *a = x + row * size; a < x + (row + 1) * size; a += 2 * half) \
                    for (int64_t i = 0; i < half; i++) { \
                        type sum = a[i] + a[i + half], difference = a[i] - a[i + half]; \
                        a[i] = sum; \
                        a[i + half] = difference; \
                    } \
    }
HADAMARD(hadamard_floats, float)
HADAMARD(hadamard_doubles, double)
