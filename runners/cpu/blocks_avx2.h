/* As blocks.h, for a processor with AVX2 and FMA and no arithmetic in bfloat16; kernels.c includes this file behind it.
   Products are of up to 6 rows in fp32 with a panel: 16 outputs in fp32, in the order in which the loop reads them. */
#define PANEL_AVX2 16
#define TALL_AVX2 6 /* 12 vectors of sums, of 16 registers */

#define UPPER _mm256_set1_epi32((int)0xffff0000)

/* For each value of a row: that of each of 16 rows. 16 divides `count`, the values of a row. */
static void fill_panel_avx2(const char *const rows[PANEL_AVX2], int64_t count, float *to) {
    for (int64_t k = 0; k < count; k += 16, to += 16 * PANEL_AVX2) {
        for (int half = 0; half < PANEL_AVX2; half += 8) {
            __m256i v[8], t[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) v[i] = _mm256_loadu_si256((const void *)(rows[half + i] + 2 * k));
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
                t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
                v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
                v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
                v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) { /* inputs 2 * i and 2 * i + 1 */
                const __m256i pair = i < 4 ? _mm256_permute2x128_si256(v[i], v[4 + i], 0x20)
                                           : _mm256_permute2x128_si256(v[i - 4], v[i], 0x31);
                float *at = to + 2 * i * PANEL_AVX2 + half;
                _mm256_store_si256((void *)at, _mm256_slli_epi32(pair, 16));
                _mm256_store_si256((void *)(at + PANEL_AVX2), _mm256_and_si256(pair, UPPER));
            }
        }
    }
}

static void blocks_panel_avx2(const Blocks *j, int64_t column, float *panel) {
    const Weight *w = j->weight;
    const int64_t whole = w->inputs / 16 * 16, rest = (w->inputs - whole) * 2;
    const char *rows[PANEL_AVX2];
    char last[PANEL_AVX2][32] = {{0}};
    for (int64_t i = 0; i < PANEL_AVX2; i++) {
        const int64_t at = MIN(column + i % j->columns, j->width - 1) + i / j->columns * j->width;
        rows[i] = w->w + at * w->row_bytes;
        if (rest) memcpy(last[i], rows[i] + whole * 2, rest);
    }
    fill_panel_avx2(rows, whole, panel);
    for (int64_t i = 0; i < PANEL_AVX2; i++) rows[i] = last[i];
    if (rest) fill_panel_avx2(rows, 16, panel + whole * PANEL_AVX2);
}

/* The rows in fp32, padded with zeros. Rows from `n` on are the last one. */
static void blocks_rows_avx2(void *job) {
    Blocks *j = job;
    const int64_t inputs = j->weight->inputs, whole = inputs / 8 * 8;
    int64_t i;
    while ((i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < MAX(j->n, TALL_AVX2)) {
        float *to = (float *)(j->rows + i * j->x_bytes);
        const uint16_t *x = (const uint16_t *)(j->x + MIN(i, j->n - 1) * j->x_stride);
        for (int64_t k = 0; k < whole; k += 8)
            _mm256_storeu_si256((void *)(to + k), _mm256_slli_epi32(_mm256_cvtepu16_epi32(
                _mm_loadu_si128((const void *)(x + k))), 16));
        for (int64_t k = whole; k < j->x_bytes / 4; k++) to[k] = k < inputs ? from_bf16(x[k]) : 0;
    }
}

INLINE __m256i blocks_rounded_avx2(__m256 f) { /* 8 numbers in bfloat16, in the upper halves of the lanes */
    const __m256i bits = (__m256i)f, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = (__m256i)_mm256_cmp_ps(f, f, _CMP_UNORD_Q);
    return _mm256_and_si256(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), UPPER);
}

/* `count` of 8 numbers, from `blocks_rounded_avx2`. */
INLINE void blocks_put_avx2(char *y, __m256i v, int64_t count) {
    v = _mm256_srli_epi32(v, 16);
    const __m128i out = _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08));
    if (count >= 8) _mm_storeu_si128((void *)y, out);
    else if (count > 0) memcpy(y, &out, 2 * count);
}

/* silu(gate) * up, rounded where PyTorch's operations round. */
INLINE __m256i blocks_gated_avx2(__m256 gate, __m256 up) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps(), g = (__m256)blocks_rounded_avx2(gate);
    const __m256 e = exp_avx2(_mm256_min_ps(g, _mm256_sub_ps(zero, g)));
    const __m256 over = _mm256_blendv_ps(one, e, _mm256_cmp_ps(g, zero, _CMP_LT_OQ));
    const __m256 silu = _mm256_mul_ps(g, _mm256_div_ps(over, _mm256_add_ps(one, e)));
    return blocks_rounded_avx2(_mm256_mul_ps((__m256)blocks_rounded_avx2(silu), (__m256)blocks_rounded_avx2(up)));
}

/* The products of 6 rows of x, `stride` values apart, with a panel of `count` inputs. */
INLINE void multiply_panel_avx2(__m256 acc[TALL_AVX2][2], const float *panel, const float *from, int64_t stride,
                                int64_t count) {
    const float *x[2] = {from, from + 3 * stride};
#pragma GCC unroll 6
    for (int i = 0; i < TALL_AVX2; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k++) {
        const __m256 a = _mm256_load_ps(panel + k * PANEL_AVX2), b = _mm256_load_ps(panel + k * PANEL_AVX2 + 8);
#pragma GCC unroll 6
        for (int i = 0; i < TALL_AVX2; i++) {
            const __m256 value = _mm256_broadcast_ss(x[i / 3] + i % 3 * stride + k);
            acc[i][0] = _mm256_fmadd_ps(a, value, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(b, value, acc[i][1]);
        }
    }
}

static void blocks_tile_avx2(const Blocks *j, const float *panel, int64_t row, int64_t column, const float *bias) {
    const int64_t left = j->width - column;
    __m256 acc[TALL_AVX2][2];
    multiply_panel_avx2(acc, panel, (const float *)(j->x + row * j->x_bytes), j->x_bytes / 4, j->weight->inputs);
#pragma GCC unroll 6
    for (int i = 0; i < TALL_AVX2; i++) {
        const __m256 a = _mm256_add_ps(acc[i][0], _mm256_loadu_ps(bias));
        const __m256 b = _mm256_add_ps(acc[i][1], _mm256_loadu_ps(bias + 8));
        char *y = j->y + ((row + i) * j->width + column) * 2;
        if (row + i >= j->n) continue;
        if (j->gated) { blocks_put_avx2(y, blocks_gated_avx2(a, b), left); continue; }
        blocks_put_avx2(y, blocks_rounded_avx2(a), left);
        blocks_put_avx2(y + 16, blocks_rounded_avx2(b), left - 8);
    }
}

static void blocks_items_avx2(void *job) {
    Blocks *j = job;
    const Weight *w = j->weight;
    float *panel = (float *)(j->panels + __atomic_fetch_add(&j->slot, 1, __ATOMIC_RELAXED) * j->each);
    const int64_t count = (j->width + j->columns - 1) / j->columns;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items) {
        const int64_t column = item % count * j->columns, end = MIN(item / count * j->group + j->group, j->n);
        float bias[PANEL_AVX2] = {0};
        for (int64_t i = 0; w->bias && i < PANEL_AVX2; i++)
            if (column + i % j->columns < j->width)
                bias[i] = value_at(w->bias, column + i % j->columns + i / j->columns * j->width, BF16);
        blocks_panel_avx2(j, column, panel);
        /* The last tile begins earlier where rows are left over: two threads may write the same bits to a row. */
        for (int64_t row = item / count * j->group; row < end; row += TALL_AVX2)
            blocks_tile_avx2(j, panel, MIN(row, MAX(j->n - TALL_AVX2, 0)), column, bias);
    }
}
