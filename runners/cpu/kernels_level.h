/* The loops of one level of instructions: 1 is AVX2 and FMA; 2 is AVX-512 (F, BW, VL, DQ, VNNI); 3 has its BF16, too.
   A vector holds LANES fp32 numbers. kernels.c includes this file once for each level. */
#if LEVEL == 1
#define LANES 8
#define ROWS 3 /* of x that a tile of four outputs computes: as many as there are registers for */
#define VF __m256
#define VI __m256i
#define V(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define ZERO _mm256_setzero_si256()
#define CAST_PS _mm256_castsi256_ps
#define LOW(w) _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))
#define HIGH(w) _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)))
#define DOT256(acc, a, b) _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
#define DOT DOT256
#else
#define LANES 16
#define ROWS 4
#define VF __m512
#define VI __m512i
#define V(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512(p)
#define ZERO _mm512_setzero_si512()
#define CAST_PS _mm512_castsi512_ps
#define LOW(w) _mm512_castsi512_ps(_mm512_slli_epi32(w, 16))
#define HIGH(w) _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)))
#define DOT256(acc, a, b) _mm256_dpwssd_epi32(acc, a, b)
#define DOT(acc, a, b) _mm512_dpwssd_epi32(acc, a, b)
#endif
#define STEP (LANES * 4) /* bytes of a weight that a step of the loops reads */
#define WHOLE_BF16 (LEVEL == 3) /* bf16 is multiplied as it is; otherwise as fp32, the even values and the odd ones */

/* Of each of four vectors, the sum over its lanes. */
INLINE __m128 NAME(sum4_256)(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 p = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 q = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 s = _mm256_add_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

INLINE __m128 NAME(sum4)(VF a, VF b, VF c, VF d) {
#if LEVEL == 1
    return NAME(sum4_256)(a, b, c, d);
#else
    VF p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    VF q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    VF s = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#endif
}

/* A row of x in 16 bits: a group has a scale, and values lie in the order in which the loops unpack the weight's. */
static void NAME(quantize)(Product *p, int64_t r) {
    const Weight *w = p->weight;
    int64_t each = p->x_group;
    int halves = w->group == 32;
    int16_t *to = (int16_t *)(p->ready + r * p->ready_bytes);
    const char *x = p->x + r * p->x_stride * 2;
    for (int64_t g = 0; g < p->x_groups; g++) {
        float v[64], most = 0, bad = 0;
        int64_t first = g * each, end = MIN(first + each, w->inputs);
#pragma omp simd reduction(max : most) reduction(+ : bad)
        for (int64_t i = first; i < end; i++) {
            float f = value_at(x, i, BF16), a = f < 0 ? -f : f;
            most = a > most ? a : most;
            bad += f * 0.0f; /* NaN, for NaN and infinity */
        }
        float back = most > 0 ? 32767.0f / most : 0;
        p->x_scales[r * p->x_groups + g] = most / 32767.0f + bad;
        for (int64_t at = first; at < end; at += 64) {
            int16_t q[64];
            for (int i = 0; i < 64; i++) v[i] = at + i < end ? value_at(x, at + i, BF16) * back : 0;
            for (int i = 0; i < 64; i += 8)
                _mm_storeu_si128((__m128i *)(q + i), _mm_packs_epi32(_mm_cvtps_epi32(_mm_loadu_ps(v + i)),
                                                                    _mm_cvtps_epi32(_mm_loadu_ps(v + i + 4))));
            if (w->kind == INT4) {
                for (int j = 0; j < 4; j++) for (int i = 0; i < 16; i++) to[at + j * 16 + i] = q[4 * i + j];
            } else if (halves) {
                for (int t = 0; t < 4; t++) {
                    memcpy(to + at + t * 16, q + 8 * t, 16);
                    memcpy(to + at + t * 16 + 8, q + 32 + 8 * t, 16);
                }
            } else memcpy(to + at, q, 128);
            if (w->kind == INT4 && p->rows == 1) for (int i = 0; i < 64; i += 32) {
                int32_t sum = 0;
                for (int k = 0; k < 32; k++) sum += q[i + k];
                int32_t *into = p->x_sums + (halves ? (at + i) / 32 : g);
                *into = (halves || (at == first && i == 0) ? 0 : *into) + sum;
            }
        }
    }
}

/* Bring rows of x into the form that the loops read, padded with zeros. */
static void NAME(prepare)(void *job) {
    Product *p = job;
    const Weight *w = p->weight;
    int64_t k = w->inputs, padded = (k + 63) / 64 * 64, r;
    while ((r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->rows) {
        char *to = p->ready + r * p->ready_bytes;
        if (w->kind >= INT8) { NAME(quantize)(p, r); continue; }
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

/* 64 values of a weight on a grid in 16 bits. 64 values of 4 bits are 32 bytes: the four values in each 16 bits go to four
   vectors. */
INLINE void NAME(unpack)(__m256i v[4], const char *from, const int kind) {
    const __m256i low = _mm256_set1_epi16(15);
    if (kind == INT4) {
        __m256i packed = _mm256_loadu_si256((const __m256i *)from);
        v[0] = _mm256_and_si256(packed, low);
        v[1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
        v[2] = _mm256_and_si256(_mm256_srli_epi16(packed, 8), low);
        v[3] = _mm256_srli_epi16(packed, 12);
    } else {
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) v[t] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 16 * t)));
    }
}

/* The scales of a group, for each lane. With `halves` a group has 32 inputs, and the halves of 256 bits belong to two. */
INLINE __m256 NAME(scale)(const float *scales, int64_t g, int64_t group, const int halves) {
    if (!halves) return _mm256_set1_ps(scales[group ? g : 0]);
    return _mm256_insertf128_ps(_mm256_set1_ps(scales[2 * g]), _mm_set1_ps(scales[2 * g + 1]), 1);
}

/* What an output's zero points take from the sum of a group, in a lane of the group. */
INLINE __m256i NAME(offset)(const Product *p, const uint8_t *zeros, int64_t g, const int halves) {
    const int32_t *sums = p->x_sums + (halves ? 2 * g : g);
    if (halves) zeros = zeros ? zeros + 2 * g : NULL;
    else zeros = zeros ? zeros + (p->weight->group ? g : 0) : NULL;
    __m128i low = _mm_cvtsi32_si128(-(zeros ? zeros[0] : 8) * sums[0]);
    if (!halves) return _mm256_zextsi128_si256(low);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_cvtsi32_si128(-(zeros ? zeros[1] : 8) * sums[1]), 1);
}

/* Four outputs of one row of x. */
INLINE void NAME(grid_row)(const Product *p, int64_t o, int64_t r, const int kind, const int halves) {
    const Weight *w = p->weight;
    const char *from[4];
    const float *scales[4];
    const uint8_t *zeros[4];
    __m256 found[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int64_t at = MIN(o + i, w->outputs - 1);
        from[i] = w->w + at * w->row_bytes;
        scales[i] = w->scales + at * w->groups;
        zeros[i] = w->zeros ? w->zeros + at * w->groups : NULL;
        found[i] = _mm256_setzero_ps();
    }
    for (int64_t g = 0; g < p->x_groups; g++) {
        __m256i acc[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            acc[i] = kind == INT4 ? NAME(offset)(p, zeros[i], g, halves) : _mm256_setzero_si256();
        for (int64_t at = g * p->x_group, end = MIN(at + p->x_group, w->inputs); at < end; at += 64) {
            const __m256i *x = (const __m256i *)(p->ready + r * p->ready_bytes + 2 * at);
            int64_t bytes = kind == INT4 ? at / 2 : at;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m256i v[4];
                NAME(unpack)(v, from[i] + bytes, kind);
                _mm_prefetch(from[i] + 4 * w->row_bytes + bytes, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) acc[i] = DOT256(acc[i], v[t], _mm256_loadu_si256(x + t));
            }
        }
        __m256 of_x = _mm256_set1_ps(p->x_scales[r * p->x_groups + g]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            found[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), _mm256_mul_ps(
                NAME(scale)(scales[i], g, w->group, halves), of_x), found[i]);
    }
    NAME(store)(p, NAME(sum4_256)(found[0], found[1], found[2], found[3]), o, r, BF16);
}

/* Four outputs of several rows of x. `wide` has the four weights in 16 bits, unpacked once for all rows. */
INLINE void NAME(grid_rows)(const Product *p, const int16_t *wide, int64_t o, int64_t r, const int rows, const int halves) {
    const Weight *w = p->weight;
    int64_t padded = p->ready_bytes / 2;
    const int16_t *x = (const int16_t *)(p->ready + r * p->ready_bytes);
    VF found[4][ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int j = 0; j < rows; j++) found[i][j] = V(setzero_ps)();
    for (int64_t g = 0; g < p->x_groups; g++) {
        VI acc[4][ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int j = 0; j < rows; j++) acc[i][j] = ZERO;
        int64_t end = MIN((g + 1) * p->x_group, padded);
        for (int64_t at = g * p->x_group; at < end; at += 2 * LANES)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                VI v = LOAD(wide + i * padded + at);
#pragma GCC unroll 4
                for (int j = 0; j < rows; j++) acc[i][j] = DOT(acc[i][j], v, LOAD(x + j * padded + at));
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const float *scales = w->scales + MIN(o + i, w->outputs - 1) * w->groups;
#if LEVEL == 1
            VF scale = NAME(scale)(scales, g, w->group, halves);
#else
            VF scale = _mm512_broadcast_f32x8(NAME(scale)(scales, g, w->group, halves));
#endif
#pragma GCC unroll 4
            for (int j = 0; j < rows; j++)
                found[i][j] = V(fmadd_ps)(V(cvtepi32_ps)(acc[i][j]), V(mul_ps)(
                    scale, V(set1_ps)(p->x_scales[(r + j) * p->x_groups + g])), found[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < rows; j++)
        NAME(store)(p, NAME(sum4)(found[0][j], found[1][j], found[2][j], found[3][j]), o, r + j, BF16);
}

/* Four outputs' weights in 16 bits, less their zero points. */
static __attribute__((noinline)) void NAME(widen)(const Weight *w, int16_t *wide, int64_t o, int64_t padded) {
    int halves = w->group == 32;
    for (int i = 0; i < 4; i++) {
        int64_t row = MIN(o + i, w->outputs - 1);
        const char *from = w->w + row * w->row_bytes;
        const uint8_t *zeros = w->zeros ? w->zeros + row * w->groups : NULL;
        for (int64_t at = 0; at < padded; at += 64) {
            __m256i v[4], zero = _mm256_setzero_si256();
            int64_t g = w->group ? at / w->group : 0;
            if (w->kind == INT4) {
                NAME(unpack)(v, from + at / 2, INT4);
                zero = _mm256_set1_epi16(zeros ? zeros[g] : 8);
                if (halves && zeros) zero = _mm256_inserti128_si256(zero, _mm_set1_epi16(zeros[g + 1]), 1);
            } else NAME(unpack)(v, from + at, INT8);
            for (int t = 0; t < 4; t++)
                _mm256_storeu_si256((__m256i *)(wide + i * padded + at + 16 * t), _mm256_sub_epi16(v[t], zero));
        }
    }
}

/* Every row's outputs from `o` on, four of them: the weight comes from memory once, then from the core's cache. */
INLINE void NAME(tile)(const Product *p, int16_t *wide, int64_t o, const int kind, const int halves) {
    if (kind >= INT8 && p->rows == 1) { NAME(grid_row)(p, o, 0, kind, halves); return; }
    if (kind >= INT8) NAME(widen)(p->weight, wide, o, p->ready_bytes / 2);
    if (kind < INT8 && p->rows == 1) { NAME(dense)(p, o, 0, 1, kind, 1); return; }
    int64_t r = 0;
#define AT_ONCE(n) (kind >= INT8 ? NAME(grid_rows)(p, wide, o, r, n, halves) : NAME(dense)(p, o, r, n, kind, 0))
    for (; r + ROWS <= p->rows; r += ROWS) AT_ONCE(ROWS);
    if (ROWS > 3 && p->rows - r == 3) AT_ONCE(3);
    else if (p->rows - r == 2) AT_ONCE(2);
    else if (p->rows - r == 1) AT_ONCE(1);
#undef AT_ONCE
}

/* Outputs `first` to `last` - 1. */
static void NAME(range)(const Product *p, int64_t first, int64_t last) {
    const Weight *w = p->weight;
    int16_t wide[w->kind >= INT8 && p->rows > 1 ? 2 * p->ready_bytes : 1] __attribute__((aligned(64)));
    for (int64_t o = first; o < last; o += 4) {
        if (w->kind == FP32) NAME(tile)(p, wide, o, FP32, 0);
        else if (w->kind == BF16) NAME(tile)(p, wide, o, BF16, 0);
        else if (w->kind == INT8 && w->group != 32) NAME(tile)(p, wide, o, INT8, 0);
        else if (w->kind == INT8) NAME(tile)(p, wide, o, INT8, 1);
        else if (w->group != 32) NAME(tile)(p, wide, o, INT4, 0);
        else NAME(tile)(p, wide, o, INT4, 1);
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
#undef ZERO
#undef CAST_PS
#undef LOW
#undef HIGH
#undef DOT
#undef DOT256
#undef STEP
#undef WHOLE_BF16
