/* The loops over a weight of INT8 or INT4 values at one level of instructions; few_bits.c includes this file for each.

   A vector of the weight belongs to the 16 outputs of a block, an output in each lane of 32 bits. So sums need no steps
   across lanes, scales are loaded as vectors, and a block is read from its begin to its end. */
#if LEVEL == 1
#define HALF 2 /* vectors for 16 outputs */
#define ROWS 4 /* of x that are multiplied at once: as many as there are registers for */
#define VF __m256
#define VI __m256i
#define V(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define AND(a, b) _mm256_and_si256(a, b)
#define DOT(acc, w, x) _mm256_add_epi32(acc, _mm256_madd_epi16(w, _mm256_set1_epi32(x)))
#define CHAINS(rows) 1
#define HALVES(p) _mm_loadu_si128((const __m128i *)(p)) /* 16-bit numbers of a vector's lanes */
#define IN_ORDER __asm__ volatile("" ::: "memory") /* GCC would load inputs early, into more registers than there are */
#define BYTES(p) _mm_loadl_epi64((const __m128i *)(p))
#else
#define HALF 1
#define ROWS 8
#define VF __m512
#define VI __m512i
#define V(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512(p)
#define AND(a, b) _mm512_and_si512(a, b)
#define DOT(acc, w, x) _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x))
#define CHAINS(rows) ((rows) == 1 ? 4 : (rows) < 4 ? 2 : 1) /* sums of a row side by side: DOT takes 4 or 5 cycles */
#define HALVES(p) _mm256_loadu_si256((const __m256i *)(p))
#define IN_ORDER
#define BYTES(p) _mm_loadu_si128((const __m128i *)(p))
#endif
#define LANES (16 / HALF)
#define AHEAD 2048 /* bytes that are asked for before they are read */

/* The scales of 16 outputs, or of the half of them that a vector holds. */
INLINE VF NAME(scales)(const char *p, int kind) {
    if (kind == FP32_SCALES) return V(loadu_ps)((const float *)p);
    if (kind == FP16_SCALES) return V(cvtph_ps)(HALVES(p));
    return (VF)V(slli_epi32)(V(cvtepu16_epi32)(HALVES(p)), 16);
}

/* 16 outputs of `rows` rows of x. Each row's sums have one order, whatever `rows` is. */
INLINE void NAME(block)(const FewBits *w, const char *x, int64_t x_bytes, char *y, int64_t y_stride, int64_t b,
                        const int rows, const int bits) {
    const int in_vector = bits == 4 ? 8 : 4, scale_bytes = w->scale_kind == FP32_SCALES ? 4 : 2;
    const char *at = w->values + b * 2 * w->padded * bits;
    const char *scales = w->scales + b * w->groups * 16 * scale_bytes;
    const uint8_t *zeros = w->zeros ? w->zeros + b * w->groups * 16 : NULL;
    const int64_t x_group = w->x_group, x_groups = w->x_groups, per_scale = w->per_scale;
    VF found[ROWS][HALF];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < HALF; h++) found[r][h] = V(setzero_ps)();
    for (int64_t g = 0; g < x_groups; g++) {
        const int64_t of_weight = g / per_scale, first = g * x_group, end = MIN(first + x_group, w->padded);
        const char *x_scales = x + 2 * w->padded + 4 * g, *starts = x_scales + 4 * x_groups;
        VI acc[ROWS][HALF], more[4][ROWS][HALF];
#pragma GCC unroll 4
        for (int p = 1; p < CHAINS(rows); p++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int h = 0; h < HALF; h++) more[p][r][h] = V(set1_epi32)(0);
#pragma GCC unroll 2
        for (int h = 0; h < HALF; h++) {
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) acc[r][h] = V(set1_epi32)(*(const int32_t *)(starts + r * x_bytes));
            if (zeros) {
                const VI zero = V(cvtepu8_epi32)(BYTES(zeros + of_weight * 16 + h * LANES));
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) acc[r][h] = V(mullo_epi32)(zero, acc[r][h]);
            }
        }
        const char *x_at = x + 2 * first;
        for (int64_t i = first; i < end; i += in_vector, at += 64, x_at += 2 * in_vector) {
            _mm_prefetch(at + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int p = 0; p < in_vector / 2; p++) { /* pairs of inputs */
                VI pair[HALF];
#pragma GCC unroll 2
                for (int h = 0; h < HALF; h++) {
                    const VI v = LOAD(at + h * 4 * LANES);
                    if (bits == 4) pair[h] = AND(p ? V(srli_epi16)(v, 4 * p) : v, V(set1_epi16)(15));
                    else pair[h] = p ? V(srli_epi16)(v, 8) : AND(v, V(set1_epi16)(255));
                }
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const int32_t values = *(const int32_t *)(x_at + r * x_bytes + 4 * p);
                    VI *const sums = p % CHAINS(rows) ? more[p % CHAINS(rows)][r] : acc[r];
#pragma GCC unroll 2
                    for (int h = 0; h < HALF; h++) sums[h] = DOT(sums[h], pair[h], values);
                }
                if (rows == ROWS) IN_ORDER;
            }
        }
#pragma GCC unroll 4
        for (int p = 1; p < CHAINS(rows); p++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int h = 0; h < HALF; h++) acc[r][h] = V(add_epi32)(acc[r][h], more[p][r][h]);
#pragma GCC unroll 2
        for (int h = 0; h < HALF; h++) {
            const VF scale = NAME(scales)(scales + (of_weight * 16 + h * LANES) * scale_bytes, w->scale_kind);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                found[r][h] = V(fmadd_ps)(V(cvtepi32_ps)(acc[r][h]), V(mul_ps)(
                    scale, V(set1_ps)(*(const float *)(x_scales + r * x_bytes))), found[r][h]);
        }
    }
    float bias[16] = {0};
    const int64_t o = b * 16, count = MIN(16, w->outputs - o);
    if (w->bias) for (int i = 0; i < count; i++) bias[i] = from_bf16(((const uint16_t *)w->bias)[o + i]);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        uint16_t out[16];
#pragma GCC unroll 2
        for (int h = 0; h < HALF; h++) {
            const VF f = V(add_ps)(found[r][h], V(loadu_ps)(bias + h * LANES));
            const VI v = (VI)f, odd = AND(V(srli_epi32)(v, 16), V(set1_epi32)(1));
            VI up = V(srli_epi32)(V(add_epi32)(V(add_epi32)(v, V(set1_epi32)(0x7fff)), odd), 16);
#if LEVEL == 1
            up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), (VI)_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
            _mm_storeu_si128((__m128i *)(out + h * LANES), _mm256_castsi256_si128(packed));
#else
            up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(up));
#endif
        }
        memcpy(y + (r * y_stride + o) * 2, out, count == 16 ? 32 : count * 2);
    }
}

/* The blocks from `first` to before `last` of some rows of x, which `ready` made. */
static void NAME(range)(const FewBits *w, const char *x, int64_t rows, char *y, int64_t y_stride, int64_t first,
                        int64_t last) {
    const int64_t x_bytes = ready_bytes(w);
    for (int64_t b = first; b < last; b++) {
        int64_t r = 0;
#define AT_ONCE(n) (w->bits == 4 ? NAME(block)(w, x + r * x_bytes, x_bytes, y + r * y_stride * 2, y_stride, b, n, 4) \
                                 : NAME(block)(w, x + r * x_bytes, x_bytes, y + r * y_stride * 2, y_stride, b, n, 8))
        for (; r + ROWS <= rows; r += ROWS) AT_ONCE(ROWS);
        if (ROWS > 4 && rows - r >= 4) { AT_ONCE(4); r += 4; }
        if (rows - r == 3) AT_ONCE(3);
        else if (rows - r == 2) AT_ONCE(2);
        else if (rows - r == 1) AT_ONCE(1);
#undef AT_ONCE
    }
}

/* A row of x, bfloat16, in 16 bits. Each group has a scale, and the integer that its sum of products starts with: what
   the zero points take from it, or, where each output has zero points of its own, the factor of them. */
static void NAME(ready)(const FewBits *w, const char *x, char *to) {
    int16_t *q = (int16_t *)to;
    float *scales = (float *)(to + 2 * w->padded);
    int32_t *starts = (int32_t *)(scales + w->x_groups);
    const uint16_t *from = (const uint16_t *)x;
    for (int64_t g = 0; g < w->x_groups; g++) {
        const int64_t first = g * w->x_group, end = MIN(first + w->x_group, w->padded);
        const int64_t whole = MIN(end, first + MAX(w->inputs - first, 0) / LANES * LANES);
        float v[1024 + 16], most[16] = {0};
        VF high = V(setzero_ps)();
        VI sum = V(set1_epi32)(0);
        int64_t i = first;
        for (; i < whole; i += LANES) {
            const VF f = (VF)V(slli_epi32)(V(cvtepu16_epi32)(HALVES(from + i)), 16);
            /* the bits of a number without its sign have the order of the numbers, with infinity and NaN above all */
            high = (VF)V(max_epi32)((VI)high, AND((VI)f, V(set1_epi32)(0x7fffffff)));
            V(storeu_ps)(v + i - first, f);
        }
        V(storeu_ps)(most, high);
        float largest = 0, bad = 0;
        for (; i < end; i++) {
            const float f = i < w->inputs ? from_bf16(from[i]) : 0;
            v[i - first] = f;
            largest = MAX(largest, f < 0 ? -f : f);
            bad += f * 0.0f;
        }
        for (int l = 0; l < LANES; l++) {
            largest = MAX(largest, most[l]);
            bad += most[l] * 0.0f; /* NaN, for infinity and NaN */
        }
        const float back = largest > 1e-30f ? 32767.0f / largest : 0;
        for (i = first; i < end; i += LANES) {
            const VI n = V(cvtps_epi32)(V(mul_ps)(V(loadu_ps)(v + i - first), V(set1_ps)(back)));
            sum = V(add_epi32)(sum, n);
#if LEVEL == 1
            _mm_storeu_si128((__m128i *)(q + i), _mm256_castsi256_si128(
                _mm256_permute4x64_epi64(_mm256_packs_epi32(n, n), 0x08)));
#else
            _mm256_storeu_si256((__m256i *)(q + i), _mm512_cvtsepi32_epi16(n));
#endif
        }
        int32_t each[16], total = 0;
        V(storeu_ps)((float *)each, (VF)sum);
        for (int l = 0; l < LANES; l++) total += each[l];
        scales[g] = largest / 32767.0f + bad;
        starts[g] = -total * (w->zeros ? 1 : w->bits == 4 ? 8 : 128);
    }
}

#undef HALF
#undef ROWS
#undef VF
#undef VI
#undef V
#undef LOAD
#undef AND
#undef DOT
#undef HALVES
#undef IN_ORDER
#undef CHAINS
#undef BYTES
#undef LANES
#undef AHEAD
