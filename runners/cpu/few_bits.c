/* Products of rows of bfloat16 with a linear layer's weight of INT8 or INT4 values.

   Inputs are rounded to 16 bits, with a scale for each group of them, and products are summed exactly in 32 bits over a
   group. So results are nearer to the exact product than those of weights in bfloat16, and a row's result depends on no
   other row. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum { FP32_SCALES, BF16_SCALES, FP16_SCALES };

/* A weight in blocks of 16 outputs; compiled.py mirrors it, and grids.py makes it. */
typedef struct {
    /* For each block, and each 4 (INT8) or 8 (INT4) inputs: for each output, 32 bits that hold the unsigned values of
       inputs 0, 2, 1, 3, or of 0, 2, 4, 6, 1, 3, 5, 7. So a shift by 8 or 4 bits gives 16-bit pairs of neighbours. */
    const char *values;
    const char *scales;   /* [blocks, groups, 16] of scale_kind */
    const uint8_t *zeros; /* [blocks, groups, 16], or NULL for 8 (INT4) or 128 (INT8) everywhere */
    const char *bias;     /* [outputs] bfloat16, or NULL */
    int64_t inputs, padded, outputs, groups; /* padded: inputs, rounded up to a multiple of 32 */
    /* Inputs that share a scale of x, their number of groups, and how many of them share a scale of the weight. The sum
       of a group's products fits into 32 bits. */
    int64_t x_group, x_groups, per_scale;
    int32_t bits, scale_kind, level;
} FewBits;

INLINE int64_t ready_bytes(const FewBits *w) { return (2 * w->padded + 8 * w->x_groups + 63) / 64 * 64; }

#define LEVEL 1
#define NAME(x) x##_avx2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "few_bits_level.h"
#pragma GCC pop_options
#undef LEVEL
#undef NAME
#define LEVEL 2
#define NAME(x) x##_avx512
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "few_bits_level.h"
#pragma GCC pop_options
#undef LEVEL
#undef NAME

EXPORT int64_t hal_few_bits_ready_bytes(const void *weight) { return ready_bytes(weight); }

EXPORT void hal_few_bits_ready(const void *weight, const void *x, void *ready) {
    const FewBits *w = weight;
    (w->level == 1 ? ready_avx2 : ready_avx512)(w, x, ready);
}

EXPORT void hal_few_bits_range(const void *weight, const void *ready, int64_t rows, void *y, int64_t y_stride,
                               int64_t first, int64_t last) {
    const FewBits *w = weight;
    (w->level == 1 ? range_avx2 : range_avx512)(w, ready, rows, y, y_stride, first, last);
}

typedef struct {
    const FewBits *w;
    const char *x;
    char *ready, *y;
    int64_t rows, x_stride, next, panel, chunk, chunks;
} Job;

static void prepare(void *argument) {
    Job *job = argument;
    int64_t r;
    while ((r = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->rows)
        hal_few_bits_ready(job->w, job->x + r * job->x_stride * 2, job->ready + r * ready_bytes(job->w));
}

/* Threads take chunks as they become free, so a thread that loses its core does not hold up the others. */
static void multiply(void *argument) {
    Job *job = argument;
    const int64_t blocks = (job->w->outputs + 15) / 16, panels = (job->rows + job->panel - 1) / job->panel;
    int64_t item;
    while ((item = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < panels * job->chunks) {
        const int64_t r = item / job->chunks * job->panel, first = item % job->chunks * job->chunk;
        hal_few_bits_range(job->w, job->ready + r * ready_bytes(job->w), MIN(job->panel, job->rows - r),
                           job->y + r * job->w->outputs * 2, job->w->outputs, first, MIN(first + job->chunk, blocks));
    }
}

/* y = x W^T + bias. Returns 0, or 1 where there is no memory. */
EXPORT int hal_few_bits(const FewBits *w, const void *x, int64_t x_stride, void *y, int64_t rows, unsigned threads) {
    Job job = {.w = w, .x = x, .y = y, .rows = rows, .x_stride = x_stride};
    const int64_t blocks = (w->outputs + 15) / 16;
    job.ready = hal_scratch(rows * ready_bytes(w));
    if (!job.ready) return 1;
    if (w->padded * w->outputs * w->bits < 1 << 18) threads = 1;
    /* A panel of x stays in a core's cache while the weight passes by. */
    job.panel = MAX((1 << 19) / ready_bytes(w) / 8 * 8, 8);
    job.chunk = threads == 1 ? blocks : MAX(blocks / ((int64_t)threads * 8), 1);
    job.chunks = (blocks + job.chunk - 1) / job.chunk;
    if (rows >= 8 && threads > 1) hal_parallel(prepare, &job, threads, 0);
    else prepare(&job);
    job.next = 0;
    if (threads == 1) multiply(&job);
    else hal_parallel(multiply, &job, threads, 0);
    return 0;
}
#endif
