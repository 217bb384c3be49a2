/* The loops of one level of instructions: 1 is AVX2 and FMA; 2 is AVX-512 (F, BW, VL, DQ, VNNI); 3 has its BF16, too.
   A vector holds LANES fp32 numbers. kernels.c includes this file once for each level. */
#if LEVEL == 1
#define LANES 8
#define ROWS 3 /* of x that a tile of four outputs computes: as many as there are registers for */
#define VF __m256
#define VI __m256i
#define V(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define CAST_PS _mm256_castsi256_ps
#define LOW(w) _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))
#define HIGH(w) _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)))
#else
#define LANES 16
#define ROWS 4
#define VF __m512
#define VI __m512i
#define V(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512(p)
#define CAST_PS _mm512_castsi512_ps
#define LOW(w) _mm512_castsi512_ps(_mm512_slli_epi32(w, 16))
#define HIGH(w) _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)))
#endif
#define STEP (LANES * 4) /* bytes of a weight that a step of the loops reads */
#define WHOLE_BF16 (LEVEL == 3) /* bf16 is multiplied as it is; otherwise as fp32, the even values and the odd ones */

/* Of each of four vectors, the sum over its lanes. */
INLINE __m128 NAME(sum4)(VF a, VF b, VF c, VF d) {
#if LEVEL == 1
    VF p = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    VF q = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    VF s = _mm256_add_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
    VF p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    VF q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    VF s = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#endif
}

/* Bring rows of x into the form that the loops read, padded with zeros. */
static void NAME(prepare)(void *job) {
    Product *p = job;
    const Weight *w = p->weight;
    int64_t k = w->inputs, padded = (k + 63) / 64 * 64, r;
    while ((r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->rows) {
        char *to = p->ready + r * p->ready_bytes;
        int size = w->kind == FP32 ? 4 : 2;
        const char *x = p->x + r * p->x_stride * size;
        if (w->kind == FP32 || WHOLE_BF16) {
            memcpy(to, x, k * size);
            memset(to + k * size, 0, (padded - k) * size);
            continue;
        }
        float *f = (float *)to;
        int64_t whole = k / (2 * LANES) * (2 * LANES);
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            VI v = LOAD(x + i * 2);
            V(storeu_ps)(f + i, LOW(v));
            V(storeu_ps)(f + i + LANES, HIGH(v));
        }
        for (int64_t i = whole; i < padded; i += 2 * LANES) for (int l = 0; l < LANES; l++) for (int h = 0; h < 2; h++)
            f[i + h * LANES + l] = i + 2 * l + h < k ? value_at(x, i + 2 * l + h, BF16) : 0;
    }
}

/* One step: STEP bytes of four outputs' weights times `rows` rows of x. */
INLINE void NAME(step)(VF acc[4][ROWS], VF more[4], const char *const w[4], int64_t at, const char *x, int64_t x_row,
                       const int rows, const int kind, const int alone) {
#pragma GCC unroll 4
    for (int o = 0; o < 4; o++) {
        if (kind == BF16 && !WHOLE_BF16) {
            VI v = LOAD(w[o] + at);
            VF low = LOW(v), high = HIGH(v);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const float *f = (const float *)(x + r * x_row + 2 * at);
                acc[o][r] = V(fmadd_ps)(low, V(loadu_ps)(f), acc[o][r]);
                if (alone) more[o] = V(fmadd_ps)(high, V(loadu_ps)(f + LANES), more[o]);
                else acc[o][r] = V(fmadd_ps)(high, V(loadu_ps)(f + LANES), acc[o][r]);
            }
#if WHOLE_BF16
        } else if (kind == BF16) {
            __m512bh v = (__m512bh)LOAD(w[o] + at);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                acc[o][r] = _mm512_dpbf16_ps(acc[o][r], v, (__m512bh)LOAD(x + r * x_row + at));
#endif
        } else {
            VF v = V(loadu_ps)((const float *)(w[o] + at));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                acc[o][r] = V(fmadd_ps)(v, V(loadu_ps)((const float *)(x + r * x_row + at)), acc[o][r]);
        }
    }
}

/* The four sums of a row, plus the bias, as outputs. bfloat16 is rounded to the nearest, ties to even. */
INLINE void NAME(store)(const Product *p, __m128 sums, int64_t o, int64_t r, int kind) {
    const Weight *w = p->weight;
    int64_t at = r * w->outputs + o;
    if (o + 4 > w->outputs) {
        float f[4];
        _mm_storeu_ps(f, sums);
        for (int64_t i = 0; i < w->outputs - o; i++)
            put(p->y, at + i, f[i] + (w->bias ? value_at(w->bias, o + i, kind) : 0), kind);
    } else if (kind == FP32) {
        if (w->bias) sums = _mm_add_ps(sums, _mm_loadu_ps((const float *)w->bias + o));
        _mm_storeu_ps((float *)p->y + at, sums);
    } else {
        if (w->bias) sums = _mm_add_ps(sums, _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(
            _mm_loadl_epi64((const __m128i *)(w->bias + 2 * o))), 16)));
        __m128i bits = _mm_castps_si128(sums), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
        __m128i up = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
        up = _mm_blendv_epi8(up, _mm_set1_epi32(0x7fc0), _mm_castps_si128(_mm_cmpunord_ps(sums, sums)));
        _mm_storel_epi64((__m128i *)(p->y + 2 * at), _mm_packus_epi32(up, up));
    }
}

/* Four outputs, from `o` on, of `rows` rows of x, from `r` on. A row that is `alone` in the product has more sums at a
   time; otherwise every row has the same order of sums. */
INLINE void NAME(dense)(const Product *p, int64_t o, int64_t r, const int rows, const int kind, const int alone) {
    const Weight *w = p->weight;
    const char *from[4], *x = p->ready + r * p->ready_bytes;
    VF acc[4][ROWS], more[4];
    int64_t bytes = w->inputs * (kind == FP32 ? 4 : 2), whole = bytes / STEP * STEP;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        from[i] = w->w + MIN(o + i, w->outputs - 1) * w->row_bytes;
        more[i] = V(setzero_ps)();
#pragma GCC unroll 4
        for (int j = 0; j < rows; j++) acc[i][j] = V(setzero_ps)();
    }
    /* The rows of the next tile lie one behind the other. To fetch them in this order is up to 1.4 times faster than
       to fetch the four rows side by side, as the loop reads them. */
    const char *next = from[0] + (w->row_bytes < 4096 ? 8 : 4) * w->row_bytes;
    for (int64_t at = 0; at < whole; at += STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < STEP / 16; i++) _mm_prefetch(next + 4 * at + 64 * i, _MM_HINT_T0);
        NAME(step)(acc, more, from, at, x, p->ready_bytes, rows, kind, alone);
    }
    if (whole < bytes) { /* the loops must not read behind a row: what is there may be NaN, or no memory */
        char last[4][STEP] = {{0}};
        const char *rest[4];
        for (int i = 0; i < 4; i++) {
            memcpy(last[i], from[i] + whole, bytes - whole);
            rest[i] = last[i] - whole;
        }
        NAME(step)(acc, more, rest, whole, x, p->ready_bytes, rows, kind, alone);
    }
    if (alone)
        for (int i = 0; i < 4; i++) acc[i][0] = V(add_ps)(acc[i][0], more[i]);
#pragma GCC unroll 4
    for (int j = 0; j < rows; j++)
        NAME(store)(p, NAME(sum4)(acc[0][j], acc[1][j], acc[2][j], acc[3][j]), o, r + j, kind);
}

/* Every row's outputs from `o` on, four of them: the weight comes from memory once, then from the core's cache. */
INLINE void NAME(tile)(const Product *p, int64_t o, const int kind) {
    if (p->rows == 1) { NAME(dense)(p, o, 0, 1, kind, 1); return; }
    int64_t r = 0;
    for (; r + ROWS <= p->rows; r += ROWS) NAME(dense)(p, o, r, ROWS, kind, 0);
    if (ROWS > 3 && p->rows - r == 3) NAME(dense)(p, o, r, 3, kind, 0);
    else if (p->rows - r == 2) NAME(dense)(p, o, r, 2, kind, 0);
    else if (p->rows - r == 1) NAME(dense)(p, o, r, 1, kind, 0);
}

/* Outputs `first` to `last` - 1. */
static void NAME(range)(const Product *p, int64_t first, int64_t last) {
    for (int64_t o = first; o < last; o += 4) {
        if (p->weight->kind == FP32) NAME(tile)(p, o, FP32);
        else NAME(tile)(p, o, BF16);
    }
}

static void NAME(multiply)(void *job) {
    Product *p = job;
    int64_t start, outputs = p->weight->outputs;
    while ((start = __atomic_fetch_add(&p->next, p->chunk, __ATOMIC_RELAXED)) < outputs)
        NAME(range)(p, start, MIN(start + p->chunk, outputs));
}

/* 2 * LANES values as fp32: of bfloat16 the even ones and the odd ones, of fp32 the first half and the second one. */
INLINE void NAME(two)(const char *from, int64_t at, const int kind, VF *a, VF *b) {
    if (kind == BF16) {
        VI v = LOAD(from + 2 * at);
        *a = LOW(v);
        *b = HIGH(v);
    } else {
        *a = V(loadu_ps)((const float *)from + at);
        *b = V(loadu_ps)((const float *)from + at + LANES);
    }
}

/* Where `two` has the value that lies at i. */
INLINE int64_t NAME(place)(int64_t i, const int kind) {
    int64_t in = i % (2 * LANES);
    return kind == BF16 ? i - in + in % 2 * LANES + in / 2 : i;
}

/* e^x for x of at most 0. The polynomial is Cephes' expf. NaN stays. */
INLINE VF NAME(exp)(VF x) {
    x = V(max_ps)(V(set1_ps)(-87.0f), x);
    VI n = V(cvtps_epi32)(V(mul_ps)(x, V(set1_ps)(1.44269504f)));
    VF f = V(cvtepi32_ps)(n), y = V(set1_ps)(1.9875691500e-4f);
    x = V(fmadd_ps)(f, V(set1_ps)(-0.693359375f), x);
    x = V(fmadd_ps)(f, V(set1_ps)(2.12194440e-4f), x);
    const float c[5] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) y = V(fmadd_ps)(y, x, V(set1_ps)(c[i]));
    y = V(fmadd_ps)(y, V(mul_ps)(x, x), V(add_ps)(x, V(set1_ps)(1.0f)));
    return V(mul_ps)(y, CAST_PS(V(slli_epi32)(V(add_epi32)(n, V(set1_epi32)(127)), 23)));
}

/* The rotary embedding of value i of a head, rounded where PyTorch's operations round. */
INLINE float NAME(rotated)(const char *head, const char *cos, const char *sin, int64_t i, int64_t dim, const int kind) {
    int64_t other = i < dim / 2 ? i + dim / 2 : i - dim / 2;
    float y = rounded(value_at(head, i, kind) * value_at(cos, i, kind), kind);
    return rounded(y + value_at(head, other, kind) * value_at(sin, i, kind), kind);
}

/* The query heads of one sequence that share the key-value head h. */
INLINE void NAME(attend)(const Decode *d, float *scratch, int64_t s, int64_t h, const int kind) {
    int64_t size = kind == FP32 ? 4 : 2, dim = d->head_dim, group = d->heads / d->kv_heads, len = d->lens[s];
    int64_t first = d->window && len > d->window ? len - d->window : 0, keys = len - first, row = (keys + 15) / 16 * 16;
    const char *q = d->q + s * d->q_stride * size, *cos = d->cos + s * dim * size, *sin = d->sin + s * dim * size;
    const int32_t *table = d->tables + s * d->table_stride;
    float *queries = scratch, *scores = scratch + group * dim;
    if (len <= 0) { /* padding */
        memset(d->out + (s * d->heads + h * group) * dim * size, 0, group * dim * size);
        return;
    }
#define AT(cache, t) (cache + (((table[(t) / d->block_size] * d->kv_heads + h) * d->block_size + (t) % d->block_size) * \
                               dim) * size)
    if (d->cos) {
        const char *k = q + (d->heads + h) * dim * size, *v = q + (d->heads + d->kv_heads + h) * dim * size;
        int64_t in = d->slots[s] % d->block_size, base = ((d->slots[s] / d->block_size) * d->kv_heads + h) * d->block_size;
        char *key = d->keys + base * dim * size, *value = d->values + base * dim * size;
        if (!in && base >= d->kv_heads * d->block_size) { /* other code masks the values of free slots, and NaN passes */
            memset(key, 0, d->block_size * dim * size);
            memset(value, 0, d->block_size * dim * size);
        }
        for (int64_t i = 0; i < dim; i++) put(key + in * dim * size, i, NAME(rotated)(k, cos, sin, i, dim, kind), kind);
        memcpy(value + in * dim * size, v, dim * size);
    }
    for (int64_t g = 0; g < group; g++) {
        const char *head = q + (h * group + g) * dim * size;
        for (int64_t i = 0; i < dim; i++)
            queries[g * dim + NAME(place)(i, kind)] = d->scale * (
                d->cos ? NAME(rotated)(head, cos, sin, i, dim, kind) : value_at(head, i, kind));
    }
    for (int64_t t = first; t < len; t++) {
        const char *key = AT(d->keys, t);
        for (int64_t g = 0; g < group; g += 4) { /* four heads at a time; the last of them may be the same */
            VF acc[4] = {V(setzero_ps)(), V(setzero_ps)(), V(setzero_ps)(), V(setzero_ps)()};
            float found[4];
            for (int64_t at = 0; at < dim; at += 2 * LANES) {
                VF a, b;
                NAME(two)(key, at, kind, &a, &b);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const float *head = queries + MIN(g + i, group - 1) * dim + at;
                    acc[i] = V(fmadd_ps)(a, V(loadu_ps)(head), acc[i]);
                    acc[i] = V(fmadd_ps)(b, V(loadu_ps)(head + LANES), acc[i]);
                }
            }
            _mm_storeu_ps(found, NAME(sum4)(acc[0], acc[1], acc[2], acc[3]));
            for (int i = 0; i < 4 && g + i < group; i++) scores[(g + i) * row + t - first] = found[i];
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *of = scores + g * row, most = of[0], all[LANES], total = 0;
        for (int64_t t = 1; t < keys; t++) most = of[t] > most ? of[t] : most;
        for (int64_t t = keys; t < row; t++) of[t] = -1e30f;
        VF sum = V(setzero_ps)();
        for (int64_t t = 0; t < row; t += LANES) {
            VF e = NAME(exp)(V(sub_ps)(V(loadu_ps)(of + t), V(set1_ps)(most)));
            V(storeu_ps)(of + t, e);
            if (t + LANES <= keys) sum = V(add_ps)(sum, e);
            else for (int64_t i = t; i < keys; i++) total += of[i];
        }
        V(storeu_ps)(all, sum);
        for (int i = 0; i < LANES; i++) total += all[i];
        for (int64_t t = 0; t < keys; t++) of[t] /= total;
    }
    for (int64_t g = 0; g < group; g += 4)
        for (int64_t at = 0; at < dim; at += 2 * LANES) {
            VF acc[4][2];
            float found[2 * LANES];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[i][0] = acc[i][1] = V(setzero_ps)();
            for (int64_t t = first; t < len; t++) {
                VF a, b;
                NAME(two)(AT(d->values, t), at, kind, &a, &b);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    VF weight = V(set1_ps)(scores[MIN(g + i, group - 1) * row + t - first]);
                    acc[i][0] = V(fmadd_ps)(weight, a, acc[i][0]);
                    acc[i][1] = V(fmadd_ps)(weight, b, acc[i][1]);
                }
            }
            for (int i = 0; i < 4 && g + i < group; i++) {
                V(storeu_ps)(found, acc[i][0]);
                V(storeu_ps)(found + LANES, acc[i][1]);
                char *out = d->out + ((s * d->heads + h * group + g + i) * dim + at) * size;
                for (int64_t l = 0; l < 2 * LANES; l++) put(out, l, found[NAME(place)(l, kind)], kind);
            }
        }
#undef AT
}

static void NAME(item)(const Decode *d, void *memory, int64_t item) {
    if (d->kind == FP32) NAME(attend)(d, memory, item / d->kv_heads, item % d->kv_heads, FP32);
    else NAME(attend)(d, memory, item / d->kv_heads, item % d->kv_heads, BF16);
}

static void NAME(decode)(void *job) {
    DecodeJob *j = job;
    char *memory = j->scratch + __atomic_fetch_add(&j->slot, 1, __ATOMIC_RELAXED) * j->each;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->d->n * j->d->kv_heads)
        NAME(item)(j->d, memory, item);
}

#undef LANES
#undef ROWS
#undef VF
#undef VI
#undef V
#undef LOAD
#undef CAST_PS
#undef LOW
#undef HIGH
#undef STEP
#undef WHOLE_BF16
