/* The CPU's kernels: products with a linear layer's weight, and attention over a paged cache.

   The loops for few rows and for decoding are in kernels_level.h, which is included once for each level of instructions;
   those for prompts are in blocks.h and prompt.h, and in blocks_avx2.h and prompt_avx2.h. Python calls the functions
   through ctypes (compiled.py). Threads are those of the OpenMP runtime that torch has loaded: its GOMP_parallel is passed in, so that
   there is one pool of threads and this file needs no runtime of its own. */
#include "kernels.h"

#define ABI 10 /* of the functions and structures below; compiled.py has the same number */

EXPORT int hal_abi(void) { return ABI; }

Parallel hal_parallel;
int (*hal_team_size)(void);

char *hal_scratch(size_t bytes) {
    static __thread char *memory;
    static __thread size_t held;
    if (bytes > held) {
        free(memory);
        memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
        held = memory ? bytes : 0;
    }
    return memory;
}

#if defined(__x86_64__)
#include <immintrin.h>

enum { FP32, BF16 }; /* values of a weight */

/* A linear layer's weight; compiled.py mirrors it. */
typedef struct {
    const char *w;    /* [outputs, row_bytes] */
    const char *bias; /* [outputs] in the model's dtype, or NULL */
    int64_t inputs, outputs, row_bytes;
    int32_t kind, level;
} Weight;

typedef struct {
    const Weight *weight;
    const char *x; /* [rows, inputs], rows of x_stride values */
    char *y;       /* [rows, outputs] */
    char *ready;   /* the rows in the form that the level's loops read */
    int64_t rows, x_stride, ready_bytes, chunk, next;
} Product;

typedef void (*Work)(void *);
static void run(Work work, void *job, unsigned threads) {
    if (threads == 1) work(job);
    else hal_parallel(work, job, threads, 0);
}

typedef struct { const Decode *d; char *scratch; int64_t each, next; int32_t slot; } DecodeJob;

INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float value_at(const char *p, int64_t i, int kind) {
    return kind == FP32 ? ((const float *)p)[i] : from_bf16(((const uint16_t *)p)[i]);
}

INLINE void put(char *p, int64_t i, float v, int kind) {
    if (kind == FP32) ((float *)p)[i] = v; else ((uint16_t *)p)[i] = to_bf16(v);
}

INLINE float rounded(float v, int kind) { return kind == FP32 ? v : from_bf16(to_bf16(v)); }

/* The loops of a level. */
#define LEVEL 1
#define NAME(x) x##_avx2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "kernels_level.h"
#pragma GCC pop_options
#undef LEVEL
#undef NAME
#define LEVEL 2
#define NAME(x) x##_avx512
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "kernels_level.h"
#pragma GCC pop_options
#undef LEVEL
#undef NAME
#define LEVEL 3
#define NAME(x) x##_avx512_bf16
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#include "kernels_level.h"
#include "blocks.h"
#include "prompt.h"
#pragma GCC pop_options
#undef LEVEL
#undef NAME

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "blocks_avx2.h"
#include "prompt_avx2.h"
#pragma GCC pop_options

static const Work PREPARE[] = {NULL, prepare_avx2, prepare_avx512, prepare_avx512_bf16};
static const Work MULTIPLY[] = {NULL, multiply_avx2, multiply_avx512, multiply_avx512_bf16};
typedef void (*Range)(const Product *, int64_t, int64_t);
static const Range RANGE[] = {NULL, range_avx2, range_avx512, range_avx512_bf16};
typedef void (*Item)(const Decode *, void *, int64_t);
static const Item ITEM[] = {NULL, item_avx2, item_avx512, item_avx512_bf16};
static const Work DECODE[] = {NULL, decode_avx2, decode_avx512, decode_avx512_bf16};

/* The highest level that this processor and its operating system can run. */
EXPORT int hal_level(void) {
    __builtin_cpu_init();
    /* Every processor with AVX2 and FMA has F16C, too, which not every compiler can ask for. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni")) return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

EXPORT void hal_threads(void *gomp_parallel, void *omp_get_num_threads) {
    hal_parallel = (Parallel)gomp_parallel;
    hal_team_size = (int (*)(void))omp_get_num_threads;
}

/* y = x W^T + bias. Returns 0, or 1 where there is no memory. */
EXPORT int hal_linear(const Weight *w, const void *x, int64_t x_stride, void *y, int64_t rows, unsigned threads) {
    Product p = {.weight = w, .x = x, .y = y, .rows = rows, .x_stride = x_stride};
    p.ready_bytes = (w->inputs + 63) / 64 * 64 * (w->kind == BF16 && w->level == 3 ? 2 : 4);
    p.ready = hal_scratch(rows * p.ready_bytes);
    if (!p.ready) return 1;
    /* Threads take chunks as they become free, so a thread that loses its core does not hold up the others. */
    int64_t bytes = w->row_bytes * w->outputs;
    p.chunk = bytes < (1 << 15) || threads == 1 ? w->outputs : (w->outputs / ((int64_t)threads * 8) + 15) / 8 * 8;
    if (rows >= 8 && threads > 1) { hal_parallel(PREPARE[w->level], &p, threads, 0); p.next = 0; }
    else { PREPARE[w->level](&p); p.next = 0; }
    if (p.chunk >= w->outputs) MULTIPLY[w->level](&p);
    else hal_parallel(MULTIPLY[w->level], &p, threads, 0);
    return 0;
}

#define SLICE 2048 /* rows at a time, which bounds the memory that copies of them take */
#define FP32_SLICE (1 << 20) /* values of rows in fp32 at a time, so that they stay in the cache that cores share */

/* y = x W^T + bias of many rows. The weight is bfloat16. With `gated` the outputs are a gate and up, and y is
   silu(gate) * up. Returns as hal_linear. */
EXPORT int hal_blocks(const Weight *w, const void *x, int64_t x_stride, void *y, int64_t rows, int gated,
                      unsigned threads) {
    const int avx2 = w->level < 3;
    const int64_t panel = avx2 ? PANEL_AVX2 : PANEL, tall = avx2 ? TALL_AVX2 : TALL, size = avx2 ? 4 : 2;
    const int64_t slice = avx2 ? MAX(FP32_SLICE / w->inputs, 64) / tall * tall : SLICE;
    for (; rows > slice; rows -= slice) {
        if (hal_blocks(w, x, x_stride, y, slice, gated, threads)) return 1;
        x = (const char *)x + 2 * slice * x_stride;
        y = (char *)y + 2 * slice * (gated ? w->outputs / 2 : w->outputs);
    }
    Blocks job = {.weight = w, .x = x, .y = y, .n = rows, .gated = gated};
    job.x_stride = job.x_bytes = 2 * x_stride;
    job.width = gated ? w->outputs / 2 : w->outputs;
    job.columns = gated ? panel / 2 : panel;
    job.each = (w->inputs + 31) / 32 * 32 * panel * size;
    const int64_t padded = (w->inputs * size + 63) / 64 * 64 + 64, panels = (job.width + job.columns - 1) / job.columns;
    /* Rows that are a multiple of 2 KiB apart compete for few sets of the cache. */
    const int copied = avx2 || w->inputs % 32 || job.x_stride % 2048 == 0 || rows < TALL;
    job.panels = hal_scratch(job.each * threads + (copied ? padded * MAX(rows, tall) : 0));
    if (!job.panels) return 1;
    if (copied) {
        job.rows = job.panels + job.each * threads;
        job.x_bytes = padded;
        run(avx2 ? blocks_rows_avx2 : blocks_rows, &job, threads);
        job.x = job.rows;
        job.next = 0;
    }
    const int64_t groups = panels < 4 * (int64_t)threads ? 4 * (int64_t)threads / panels : 1;
    job.group = ((rows + groups - 1) / groups + tall - 1) / tall * tall;
    job.items = panels * ((rows + job.group - 1) / job.group);
    run(avx2 ? blocks_items_avx2 : blocks_items, &job, threads);
    return 0;
}

int64_t hal_linear_ready_bytes(const void *weight) {
    const Weight *w = weight;
    int64_t as_it_is = w->kind == FP32 || w->level == 3, size = w->kind == FP32 ? 4 : 2;
    if (as_it_is && w->inputs * size % 64 == 0) return 0; /* nothing is padded */
    return (w->inputs + 63) / 64 * 64 * (as_it_is ? size : 4);
}

void hal_linear_ready(const void *weight, const void *x, void *ready) {
    Product p = {.weight = weight, .x = x, .ready = ready, .rows = 1};
    PREPARE[p.weight->level](&p);
}

void hal_linear_range(const void *weight, const void *ready, int64_t rows, void *y, int64_t first, int64_t last) {
    Product p = {.weight = weight, .ready = (char *)ready, .y = y, .rows = rows};
    p.ready_bytes = hal_linear_ready_bytes(weight);
    if (!p.ready_bytes) p.ready_bytes = p.weight->inputs * (p.weight->kind == FP32 ? 4 : 2);
    RANGE[p.weight->level](&p, first, last);
}

int64_t hal_decode_bytes(const Decode *d, int64_t longest) {
    return ((longest + 16 + d->head_dim) * (d->heads / d->kv_heads) * 4 + 63) / 64 * 64;
}

void hal_decode_item(const Decode *d, void *memory, int64_t item) { ITEM[d->level](d, memory, item); }

/* One query of each sequence attends to the sequence's cached keys. Returns as hal_linear. */
EXPORT int hal_decode(const Decode *d, unsigned threads) {
    int64_t longest = 0;
    for (int64_t i = 0; i < d->n; i++) if (d->lens[i] > longest) longest = d->lens[i];
    DecodeJob job = {.d = d};
    job.each = hal_decode_bytes(d, longest);
    job.scratch = hal_scratch(job.each * threads);
    if (!job.scratch) return 1;
    if (threads == 1 || longest * d->n * d->kv_heads < 64) { DECODE[d->level](&job); return 0; }
    hal_parallel(DECODE[d->level], &job, threads, 0);
    return 0;
}

/* d->n queries, the last tokens of one sequence of lens[0], attend to the sequence's cached keys. Values are bfloat16,
   and 32 divides head_dim. Returns as hal_linear. */
EXPORT int hal_prompt(const Decode *d, unsigned threads) {
    if (d->level < 3) return prompt_avx2(d, threads);
    Prompt job = {.d = d, .context = d->lens[0]};
    job.padded = (job.context + PANEL - 1) / PANEL * PANEL;
    job.each = TALL * (6 * job.padded + 2 * d->head_dim + 128); /* scores, weights and queries */
    job.items = d->heads * ((d->n + TALL - 1) / TALL);
    const int64_t panels = d->kv_heads * job.padded * d->head_dim * 2;
    job.keys = hal_scratch(2 * panels + job.each * threads);
    if (!job.keys) return 1;
    job.values = job.keys + panels;
    job.scratch = job.values + panels;
    run(prompt_panels, &job, threads);
    job.next = 0;
    run(prompt_items, &job, threads);
    return 0;
}
#else
EXPORT int hal_level(void) { return 0; }
#endif
