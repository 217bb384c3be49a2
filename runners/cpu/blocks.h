/* Products of many rows in bfloat16 by AVX512-BF16; kernels.c includes this file.

   Products are of up to 12 rows with a panel: 32 outputs, or 32 keys, or 32 dimensions of the values, in the order in
   which the loop reads them. */
#define PANEL 32
#define TALL 12 /* rows that are multiplied at once: 24 vectors of sums */

/* 16 vectors of 16 values of 32 bits, transposed. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        __m512i c = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd), d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* For each pair of values of a row: the pair of each of 32 rows. 32 divides `count`, the values of a row. */
static void fill_panel(const char *const rows[PANEL], int64_t count, char *to) {
    for (int64_t k = 0; k < count; k += 32, to += 16 * PANEL * 4) {
        for (int half = 0; half < PANEL; half += 16) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(rows[half + i] + 2 * k);
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * PANEL * 4 + half * 4, v[i]);
        }
    }
}

/* The products of TALL rows of x, `stride` bytes apart, with a panel. */
INLINE void multiply_panel(__m512 acc[TALL][2], const char *panel, const char *from, int64_t stride, int64_t pairs) {
    const char *x[3] = {from, from + 4 * stride, from + 8 * stride};
#pragma GCC unroll 12
    for (int i = 0; i < TALL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh a = (__m512bh)_mm512_load_si512(panel + k * PANEL * 4);
        const __m512bh b = (__m512bh)_mm512_load_si512(panel + k * PANEL * 4 + 64);
#pragma GCC unroll 12
        for (int i = 0; i < TALL; i++) {
            const __m512bh v = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x[i / 4] + i % 4 * stride + 4 * k));
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, v);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], b, v);
        }
    }
}

/* A product with a linear layer's weight. Threads take panels of its outputs as they become free, and bring each into
   order once for all rows of a group: with 512 rows this takes about a hundredth of the time. */
typedef struct {
    const Weight *weight;
    const char *x; /* [n], x_bytes from row to row: inputs that 32 divides */
    char *y, *rows, *panels; /* panels: `each` bytes of a thread */
    int64_t n, x_bytes, x_stride, width, columns, each, group, items, next; /* columns: of y that a panel gives */
    int32_t slot, gated;
} Blocks;

/* Copies of the rows, padded with zeros. Rows from `n` on are the last one. */
static void blocks_rows(void *job) {
    Blocks *j = job;
    const int64_t bytes = j->weight->inputs * 2;
    int64_t i;
    while ((i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < MAX(j->n, TALL)) {
        char *to = j->rows + i * j->x_bytes;
        memcpy(to, j->x + MIN(i, j->n - 1) * j->x_stride, bytes);
        memset(to + bytes, 0, j->x_bytes - bytes);
    }
}

static void blocks_panel(const Blocks *j, int64_t column, char *panel) {
    const Weight *w = j->weight;
    const int64_t whole = w->inputs / 32 * 32, rest = (w->inputs - whole) * 2;
    const char *rows[PANEL];
    char last[PANEL][64] = {{0}};
    for (int64_t i = 0; i < PANEL; i++) {
        const int64_t at = MIN(column + i % j->columns, j->width - 1) + i / j->columns * j->width;
        rows[i] = w->w + at * w->row_bytes;
        if (rest) memcpy(last[i], rows[i] + whole * 2, rest);
    }
    fill_panel(rows, whole, panel);
    for (int64_t i = 0; i < PANEL; i++) rows[i] = last[i];
    if (rest) fill_panel(rows, 32, panel + whole * PANEL * 2);
}

/* The lanes from `first` to `last` - 1. */
INLINE __mmask16 lanes(int64_t first, int64_t last) {
    const uint32_t below = last >= 16 ? 0xffff : last <= 0 ? 0 : (1u << last) - 1;
    return (__mmask16)(first <= 0 ? below : first >= 16 ? 0 : below & ~((1u << first) - 1));
}

INLINE __m512 wide(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

INLINE __m512 blocks_bias(const Weight *w, int64_t at, int64_t count) {
    if (!w->bias) return _mm512_setzero_ps();
    return wide(_mm256_maskz_loadu_epi16(lanes(0, count), w->bias + 2 * at));
}

/* silu(gate) * up, rounded where PyTorch's operations round. */
INLINE __m256i blocks_gated(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1.0f), g = wide((__m256i)_mm512_cvtneps_pbh(gate));
    const __m512 e = exp_avx512_bf16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));
    const __m512 over = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ), one, e);
    const __m512 silu = _mm512_mul_ps(g, _mm512_div_ps(over, _mm512_add_ps(one, e)));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(wide((__m256i)_mm512_cvtneps_pbh(silu)),
                                                     wide((__m256i)_mm512_cvtneps_pbh(up))));
}

INLINE void blocks_tile(const Blocks *j, const char *panel, int64_t row, int64_t column, const __m512 bias[2]) {
    __m512 acc[TALL][2];
    multiply_panel(acc, panel, j->x + row * j->x_bytes, j->x_bytes, (j->weight->inputs + 31) / 32 * 16);
    const int64_t left = j->width - column;
#pragma GCC unroll 12
    for (int i = 0; i < TALL; i++) {
        const __m512 a = _mm512_add_ps(acc[i][0], bias[0]), b = _mm512_add_ps(acc[i][1], bias[1]);
        char *y = j->y + ((row + i) * j->width + column) * 2;
        if (row + i >= j->n) continue;
        if (j->gated)
            _mm256_mask_storeu_epi16(y, lanes(0, left), blocks_gated(a, b));
        else
            _mm512_mask_storeu_epi16(y, left >= 32 ? ~0u : (1u << left) - 1, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

static void blocks_items(void *job) {
    Blocks *j = job;
    const Weight *w = j->weight;
    char *panel = j->panels + __atomic_fetch_add(&j->slot, 1, __ATOMIC_RELAXED) * j->each;
    const int64_t count = (j->width + j->columns - 1) / j->columns;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items) {
        const int64_t column = item % count * j->columns, end = MIN(item / count * j->group + j->group, j->n);
        const int64_t second = j->gated ? j->width + column : column + 16, limit = j->gated ? 2 * j->width : j->width;
        const __m512 bias[2] = {blocks_bias(w, column, j->width - column), blocks_bias(w, second, limit - second)};
        blocks_panel(j, column, panel);
        /* The last tile begins earlier where rows are left over: two threads may write the same bits to a row. */
        for (int64_t row = item / count * j->group; row < end; row += TALL)
            blocks_tile(j, panel, MIN(row, MAX(j->n - TALL, 0)), column, bias);
    }
}
