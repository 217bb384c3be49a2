/* What the files of the CPU's kernels share. */
#ifndef HAL_KERNELS_H
#define HAL_KERNELS_H
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Calls a function with an argument in some threads; GOMP_parallel of the OpenMP runtime that torch has loaded. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
extern Parallel hal_parallel;

/* Memory of the calling thread that grows and stays; NULL where there is none. */
char *hal_scratch(size_t bytes);

extern int (*hal_team_size)(void); /* omp_get_num_threads of the same runtime */

/* A step of decoding sequences; compiled.py mirrors it. */
typedef struct {
    const char *q;       /* of each sequence: q, then k and v where they are not in the cache yet; heads of head_dim */
    char *out;           /* [n, heads, head_dim] */
    char *keys, *values; /* [blocks, kv_heads, block_size, head_dim] */
    const int32_t *tables, *lens; /* [n, table_stride], [n] */
    const int32_t *slots; /* [n], where keys and values are written; block 0 belongs to no sequence */
    const char *cos, *sin; /* [n, head_dim] in the model's dtype; NULL: q is rotated, and the key and value are written */
    int64_t n, heads, kv_heads, head_dim, block_size, table_stride, q_stride, window; /* window 0: none */
    float scale;
    int32_t kind, level;
} Decode;

/* Parts of the kernels for callers that have threads of their own (tape.c). Of a linear layer's product: the bytes that
   a row of x takes in the form that the loops read, its making (which is left out where it returns 0: then the loops
   read x itself), and outputs `first` to `last` - 1 of `rows` rows; `first` is a multiple of 4. */
int64_t hal_linear_ready_bytes(const void *weight);
void hal_linear_ready(const void *weight, const void *x, void *ready);
void hal_linear_range(const void *weight, const void *ready, int64_t rows, void *y, int64_t first, int64_t last);

/* The same of a weight of few bits; x is bfloat16, `first` and `last` count blocks of 16 outputs, and rows of y have
   y_stride values. */
int64_t hal_few_bits_ready_bytes(const void *weight);
void hal_few_bits_ready(const void *weight, const void *x, void *ready);
void hal_few_bits_range(const void *weight, const void *ready, int64_t rows, void *y, int64_t y_stride, int64_t first,
                        int64_t last);

/* Of attention: the bytes that a thread needs for up to `longest` keys, and one of n * kv_heads items. */
int64_t hal_decode_bytes(const Decode *d, int64_t longest);
void hal_decode_item(const Decode *d, void *memory, int64_t item);

INLINE float from_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
#endif
