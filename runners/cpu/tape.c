/* All operations of a decode step by one call, in one parallel region.

   Python notes each operation of the model once (tape.py). An operation consists of items that any thread can compute,
   and threads take them as they become free. Between two operations threads wait for each other at a barrier, where
   they spin for a short time and then sleep, so that other processes get the core of a thread that waits long.

   The sum over ranks is a function that the communicator has given (hal/contracts/communicator.py: NativeSums). Where
   there is none, or it does not finish, the run returns to Python, which later starts it again behind the sum. */
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma") /* before the intrinsics; the lowest level has both */
#include <immintrin.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SPINS 30000 /* looks, about 50 microseconds, before a waiting thread sleeps */
#define LOOKS 256 /* between two pauses: a virtual machine may lose its core to a loop of pauses for 10 microseconds */
#define COLUMNS 512 /* values of a row that make an item of an elementwise operation */
#define LEAST 8 /* outputs of a product that make an item */

enum { EMBED, ROTARY, NORM, GATED, COPY, LINEAR, FEW_BITS, ATTEND, CALL };

/* One operation on the rows of a step; tape.py mirrors it. Strides count values. */
typedef struct {
    int32_t code, bf16, wide_weight, parts; /* wide_weight: NORM's is fp32; parts: vectors of a row that NORM norms */
    const void *x, *also, *weight; /* also: NORM's residual, or NULL; of CALL the function's state, and the function */
    void *y, *sum; /* sum: NORM's x + residual, or NULL */
    int64_t width, x_stride, y_stride; /* width: of a row of y, or of a vector of NORM; outputs of a product */
    float eps;
    int32_t table_rows; /* of EMBED and ROTARY */
    const Decode *decode;
} Operation;

/* What changes from step to step; tape.py mirrors it. */
typedef struct {
    const int32_t *ids, *positions, *lens, *slots, *tables;
    int64_t n, table_stride;
} Step;

typedef struct { /* of one operation in one step */
    int64_t ready, next, ready_bytes; /* rows of a product's input that were taken, and items or outputs */
    int64_t left; /* of CALL: Python must go on */
    char pad[32];
} Progress;

typedef struct {
    const Operation *operations;
    int64_t first, count, ready_room, attend_room;
    char *ready, *attend;
    Progress *progress;
    const Step *step;
    int32_t entered, arrived, phase, sleepers, failed;
} Tape;

static void barrier(Tape *t, int32_t team) {
    if (team == 1) return;
    int32_t phase = __atomic_load_n(&t->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&t->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->phase, phase + 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
        if (__atomic_load_n(&t->sleepers, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &t->phase, FUTEX_WAKE_PRIVATE, team, NULL, NULL, 0);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&t->phase, __ATOMIC_ACQUIRE) != phase) return;
        if (i % LOOKS == LOOKS - 1) _mm_pause();
    }
#if defined(__linux__)
    __atomic_add_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&t->phase, __ATOMIC_SEQ_CST) == phase)
        syscall(SYS_futex, &t->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
    __atomic_sub_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
#else
    while (__atomic_load_n(&t->phase, __ATOMIC_ACQUIRE) == phase) _mm_pause();
#endif
}

/* Eight values from i on, of which `left` exist; others are 0. */
INLINE __m256 load(const void *p, int64_t i, int64_t left, int bf16) {
    if (left < 8) {
        float f[8] = {0};
        for (int64_t k = 0; k < left; k++)
            f[k] = bf16 ? from_bf16(((const uint16_t *)p)[i + k]) : ((const float *)p)[i + k];
        return _mm256_loadu_ps(f);
    }
    if (!bf16) return _mm256_loadu_ps((const float *)p + i);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(
        _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i))), 16));
}

INLINE __m128i to_16(__m256 v) { /* bfloat16, to the nearest, ties to even */
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}

INLINE __m256 rounded(__m256 v, int bf16) {
    return bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(to_16(v)), 16)) : v;
}

INLINE void store(void *p, int64_t i, int64_t left, __m256 v, int bf16) {
    if (left < 8) {
        float f[8];
        uint16_t h[8];
        _mm256_storeu_ps(f, v);
        _mm_storeu_si128((__m128i *)h, to_16(v));
        for (int64_t k = 0; k < left; k++)
            if (bf16) ((uint16_t *)p)[i + k] = h[k]; else ((float *)p)[i + k] = f[k];
    } else if (bf16) _mm_storeu_si128((__m128i *)((uint16_t *)p + i), to_16(v));
    else _mm256_storeu_ps((float *)p + i, v);
}

/* Rounded where PyTorch's operations round: the sum, the normed value, and its product with the weight. */
INLINE void norm(const Operation *o, int64_t row, const int bf16) {
    const int64_t size = bf16 ? 2 : 4, width = o->width;
    for (int64_t part = 0; part < o->parts; part++) {
        const char *x = (const char *)o->x + (row * o->x_stride + part * width) * size;
        const char *also = o->also ? (const char *)o->also + row * width * size : NULL;
        char *y = (char *)o->y + (row * o->y_stride + part * width) * size;
        __m256 squares = _mm256_setzero_ps();
        for (int64_t i = 0; i < width; i += 8) {
            __m256 v = load(x, i, width - i, bf16);
            if (also) {
                v = rounded(_mm256_add_ps(v, load(also, i, width - i, bf16)), bf16);
                store((char *)o->sum + row * width * size, i, width - i, v, bf16);
            }
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        float f[8], total = 0;
        _mm256_storeu_ps(f, squares);
        for (int i = 0; i < 8; i++) total += f[i];
        const __m256 scale = _mm256_set1_ps(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(total / (float)width + o->eps))));
        const char *from = also ? (const char *)o->sum + row * width * size : x;
        for (int64_t i = 0; i < width; i += 8) {
            __m256 v = _mm256_mul_ps(load(from, i, width - i, bf16), scale);
            if (!o->wide_weight) v = rounded(v, bf16);
            store(y, i, width - i, _mm256_mul_ps(v, load(o->weight, i, width - i, bf16 && !o->wide_weight)), bf16);
        }
    }
}

/* 1 / (1 + e^-x); the exponential's polynomial is Cephes' expf. */
INLINE __m256 sigmoid(__m256 x) {
    __m256 t = _mm256_sub_ps(_mm256_setzero_ps(), x);
    t = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), t));
    __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(t, _mm256_set1_ps(1.44269504f)));
    __m256 f = _mm256_cvtepi32_ps(n), y = _mm256_set1_ps(1.9875691500e-4f);
    t = _mm256_fmadd_ps(f, _mm256_set1_ps(-0.693359375f), t);
    t = _mm256_fmadd_ps(f, _mm256_set1_ps(2.12194440e-4f), t);
    const float c[5] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (int i = 0; i < 5; i++) y = _mm256_fmadd_ps(y, t, _mm256_set1_ps(c[i]));
    y = _mm256_fmadd_ps(y, _mm256_mul_ps(t, t), _mm256_add_ps(t, _mm256_set1_ps(1.0f)));
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
    return _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_add_ps(_mm256_set1_ps(1.0f), y));
}

/* silu(gate) * up of some columns. NaN stays, as the product with the gate is NaN. */
INLINE void gated(const Operation *o, int64_t row, int64_t first, const int bf16) {
    const int64_t size = bf16 ? 2 : 4, width = o->width;
    const char *gate = (const char *)o->x + row * o->x_stride * size, *up = gate + width * size;
    char *y = (char *)o->y + row * width * size;
    for (int64_t i = first, end = MIN(first + COLUMNS, width); i < end; i += 8) {
        __m256 g = load(gate, i, width - i, bf16), v = rounded(_mm256_mul_ps(g, sigmoid(g)), bf16);
        store(y, i, width - i, _mm256_mul_ps(v, load(up, i, width - i, bf16)), bf16);
    }
}

/* A row of the table is the cosines of the half's angles and their sines. y: the cosines twice; sum: the sines, first
   negated. */
static void rotary(const Operation *o, int64_t row, int64_t position) {
    const int64_t half = o->width / 2, at = row * o->width;
    const float *cos = (const float *)o->weight + position * o->width, *sin = cos + half;
    for (int64_t i = 0; i < half; i += 8) {
        const int64_t left = half - i;
        const __m256 c = load(cos, i, left, 0), s = load(sin, i, left, 0);
        store(o->y, at + i, left, c, o->bf16);
        store(o->y, at + half + i, left, c, o->bf16);
        store(o->sum, at + i, left, _mm256_sub_ps(_mm256_setzero_ps(), s), o->bf16);
        store(o->sum, at + half + i, left, s, o->bf16);
    }
}

static void item(Tape *t, const Operation *o, int64_t i, int64_t me) {
    const int64_t size = o->bf16 ? 2 : 4;
    const Step *step = t->step;
    if (o->code == EMBED) {
        const int64_t id = step->ids[i];
        if ((uint64_t)id < (uint64_t)o->table_rows)
            memcpy((char *)o->y + i * o->width * size, (const char *)o->weight + id * o->x_stride * size, o->width * size);
        else __atomic_store_n(&t->failed, 1, __ATOMIC_RELAXED);
    } else if (o->code == ROTARY) {
        const int64_t position = step->positions[i];
        if ((uint64_t)position < (uint64_t)o->table_rows) rotary(o, i, position);
        else __atomic_store_n(&t->failed, 1, __ATOMIC_RELAXED);
    } else if (o->code == NORM) {
        if (o->bf16) norm(o, i, 1); else norm(o, i, 0);
    } else if (o->code == GATED) {
        const int64_t each = (o->width + COLUMNS - 1) / COLUMNS;
        if (o->bf16) gated(o, i / each, i % each * COLUMNS, 1); else gated(o, i / each, i % each * COLUMNS, 0);
    } else if (o->code == COPY) {
        memcpy((char *)o->y + i * o->y_stride * size, (const char *)o->x + i * o->x_stride * size, o->width * size);
    } else {
        Decode d = *o->decode;
        d.n = step->n;
        d.lens = step->lens;
        d.slots = step->slots;
        d.tables = step->tables;
        d.table_stride = step->table_stride;
        hal_decode_item(&d, t->attend + me * t->attend_room, i);
    }
}

/* A product: the input in the form that the loops read, then outputs in chunks that get smaller, so that all threads
   are done at about the same time. */
static void linear(Tape *t, const Operation *o, Progress *p, int32_t team) {
    const int64_t n = t->step->n, row_bytes = p->ready_bytes;
    const char *ready = o->x;
    if (row_bytes) {
        int64_t row;
        while ((row = __atomic_fetch_add(&p->ready, 1, __ATOMIC_RELAXED)) < n)
            (o->code == LINEAR ? hal_linear_ready : hal_few_bits_ready)(
                o->weight, (const char *)o->x + row * o->x_stride * (o->bf16 ? 2 : 4), t->ready + row * row_bytes);
        ready = t->ready;
        barrier(t, team);
    }
    const int64_t least = o->code == LINEAR ? LEAST : 16;
    int64_t first = __atomic_load_n(&p->next, __ATOMIC_RELAXED);
    while (first < o->width) {
        const int64_t share = (o->width - first) / (2 * team) / least * least;
        const int64_t last = team == 1 ? o->width : MIN(first + (share > least ? share : least), o->width);
        if (!__atomic_compare_exchange_n(&p->next, &first, last, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
        if (o->code == LINEAR) hal_linear_range(o->weight, ready, n, o->y, first, last);
        else hal_few_bits_range(o->weight, ready, n, o->y, o->width, first / 16, (last + 15) / 16);
        first = __atomic_load_n(&p->next, __ATOMIC_RELAXED);
    }
}

static int64_t items(const Operation *o, int64_t n) {
    if (o->code == GATED) return n * ((o->width + COLUMNS - 1) / COLUMNS);
    return o->code == ATTEND ? n * o->decode->kv_heads : n;
}

/* Whether Python must do or finish it, or the step has failed. */
static int64_t left(const Tape *t, const Operation *o) {
    int32_t (*function)(void *, void *, int64_t, int32_t);
    memcpy(&function, &o->weight, sizeof function);
    return t->failed || !function || function((void *)o->also, o->y, t->step->n * o->width, o->bf16);
}

static void work(void *argument) {
    Tape *t = argument;
    const int32_t team = hal_team_size(), me = __atomic_fetch_add(&t->entered, 1, __ATOMIC_RELAXED);
    for (int64_t at = t->first; at < t->count; at++) {
        const Operation *o = t->operations + at;
        Progress *p = t->progress + at;
        if (o->code == CALL) {
            if (!__atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) p->left = left(t, o);
        } else if (o->code == LINEAR || o->code == FEW_BITS) linear(t, o, p, team);
        else {
            const int64_t count = items(o, t->step->n);
            int64_t i;
            while ((i = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < count) item(t, o, i, me);
        }
        barrier(t, team);
        if (p->left) return;
    }
}

/* The first of the largest of n values; -1 where there is NaN or the largest is infinite. */
EXPORT int64_t hal_greedy(const void *row, int64_t n, int bf16) {
    __m256 most = _mm256_set1_ps(-__builtin_inff()), bad = _mm256_setzero_ps();
    const int64_t whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        const __m256 v = load(row, i, 8, bf16);
        most = _mm256_max_ps(most, v);
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    float lanes[8], best = -__builtin_inff();
    int broken = _mm256_movemask_ps(bad);
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++) best = lanes[i] > best ? lanes[i] : best;
    for (int64_t i = whole; i < n; i++) {
        const float f = bf16 ? from_bf16(((const uint16_t *)row)[i]) : ((const float *)row)[i];
        best = f > best ? f : best;
        broken |= f != f;
    }
    if (broken || !__builtin_isfinite(best)) return -1;
    for (int64_t i = 0; i < whole; i += 8) {
        const int found = _mm256_movemask_ps(_mm256_cmp_ps(load(row, i, 8, bf16), _mm256_set1_ps(best), _CMP_EQ_OQ));
        if (found) return i + __builtin_ctz(found);
    }
    for (int64_t i = whole; i < n; i++)
        if ((bf16 ? from_bf16(((const uint16_t *)row)[i]) : ((const float *)row)[i]) == best) return i;
    return -1;
}

/* A tape of `count` operations, which must outlive it, for up to `rows` sequences; NULL where there is no memory. */
EXPORT void *hal_tape(const Operation *operations, int64_t count, int64_t rows) {
    Tape *t = calloc(1, sizeof(Tape));
    if (!t) return NULL;
    t->operations = operations;
    t->count = count;
    t->progress = aligned_alloc(64, count * sizeof(Progress));
    for (int64_t i = 0; t->progress && i < count; i++) {
        const Operation *o = operations + i;
        t->progress[i].ready_bytes = o->code == LINEAR ? hal_linear_ready_bytes(o->weight) :
            o->code == FEW_BITS ? hal_few_bits_ready_bytes(o->weight) : 0;
        if (rows * t->progress[i].ready_bytes > t->ready_room) t->ready_room = rows * t->progress[i].ready_bytes;
    }
    if (t->ready_room) t->ready = aligned_alloc(64, (t->ready_room + 63) / 64 * 64);
    if (t->progress && (t->ready || !t->ready_room)) return t;
    free(t->progress);
    free(t->ready);
    free(t);
    return NULL;
}

EXPORT void hal_tape_free(void *tape) {
    Tape *t = tape;
    free(t->progress);
    free(t->ready);
    free(t);
}

/* Run a step from operation `first` on. Returns the number of operations, or that of the CALL where Python must go on;
   -1 where there is no memory; -2 where a token or a position lies outside of its table. */
EXPORT int64_t hal_tape_run(void *tape, const Step *step, int64_t first, unsigned threads) {
    Tape *t = tape;
    int64_t longest = 0;
    for (int64_t i = 0; i < step->n; i++) if (step->lens[i] > longest) longest = step->lens[i];
    if (!first) t->attend_room = 0;
    for (int64_t i = 0; !first && i < t->count; i++) {
        const Operation *o = t->operations + i;
        t->progress[i].ready = t->progress[i].next = t->progress[i].left = 0;
        if (o->code != ATTEND) continue;
        const int64_t room = hal_decode_bytes(o->decode, longest);
        if (room > t->attend_room) t->attend_room = room;
    }
    t->attend = hal_scratch(t->attend_room * threads);
    if (!t->attend && t->attend_room) return -1;
    t->step = step;
    t->first = first;
    t->entered = t->arrived = t->failed = 0;
    hal_parallel(work, t, threads, 0);
    if (t->failed) return -2;
    for (int64_t i = first; i < t->count; i++) if (t->progress[i].left) return i;
    return t->count;
}
#endif
