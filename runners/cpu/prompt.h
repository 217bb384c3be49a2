/* Attention of a prompt in bfloat16 by AVX512-BF16; kernels.c includes this file behind blocks.h. */

/* Attention of the last n tokens of one sequence, whose keys and values are all in the cache. First the keys and the
   values of each head are brought into panels: a panel of 32 keys, and one of 32 dimensions of all values. Then TALL
   queries of a head are an item. */
typedef struct {
    const Decode *d;
    char *keys, *values, *scratch; /* scratch: `each` bytes of a thread */
    int64_t context, padded, each, next, items, head, heads; /* prompt_avx2.h: `heads` key-value heads from `head` on */
    int32_t slot;
} Prompt;

static void prompt_panels(void *job) {
    Prompt *j = job;
    const Decode *d = j->d;
    const int64_t dim = d->head_dim, blocks = j->padded / PANEL;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < d->kv_heads * blocks) {
        const int64_t h = item / blocks, t = item % blocks * PANEL;
        const char *keys[PANEL], *values[PANEL];
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t at = MIN(t + i, j->context - 1), block = d->tables[at / d->block_size];
            const int64_t row = ((block * d->kv_heads + h) * d->block_size + at % d->block_size) * dim * 2;
            keys[i] = d->keys + row;
            values[i] = d->values + row;
        }
        fill_panel(keys, dim, j->keys + item * PANEL * dim * 2);
        for (int64_t c = 0; c < dim; c += 16) {
            char *to = j->values + ((h * (dim / PANEL) + c / PANEL) * j->padded + t) * PANEL * 2 + c % PANEL * 4;
            for (int64_t i = 0; i < PANEL; i += 2, to += PANEL * 4) {
                __m512i a = _mm512_setzero_si512(), b = a;
                if (t + i < j->context)
                    a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(values[i] + 2 * c)));
                if (t + i + 1 < j->context)
                    b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(values[i + 1] + 2 * c)));
                _mm512_store_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
            }
        }
    }
}

static void prompt_item(const Prompt *j, char *scratch, int64_t h, int64_t first_query) {
    const Decode *d = j->d;
    const int64_t dim = d->head_dim, group = d->heads / d->kv_heads, kv = h / group, padded = j->padded;
    const int64_t rows = MIN(TALL, d->n - first_query), before = j->context - d->n + first_query;
    const int64_t from = d->window ? MAX(before - d->window + 1, 0) / PANEL * PANEL : 0;
    const int64_t to = (before + rows + PANEL - 1) / PANEL * PANEL;
    const int64_t q_bytes = 2 * dim + 64, weight_bytes = 2 * padded + 64;
    float *scores = (float *)scratch, totals[TALL];
    char *weights = scratch + TALL * 4 * padded, *q = weights + TALL * weight_bytes;
    for (int64_t i = 0; i < TALL; i++) /* behind the last query, the last one again */
        memcpy(q + i * q_bytes, d->q + ((first_query + MIN(i, rows - 1)) * d->q_stride + h * dim) * 2, 2 * dim);
    for (int64_t t = from; t < to; t += PANEL) {
        __m512 acc[TALL][2];
        multiply_panel(acc, j->keys + (kv * padded + t) * dim * 2, q, q_bytes, dim / 2);
#pragma GCC unroll 12
        for (int i = 0; i < TALL; i++) {
            _mm512_store_ps(scores + i * padded + t, acc[i][0]);
            _mm512_store_ps(scores + i * padded + t + 16, acc[i][1]);
        }
    }
    for (int64_t i = 0; i < TALL; i++) {
        const int64_t last = before + MIN(i, rows - 1) + 1, first = d->window ? MAX(last - d->window, 0) : 0;
        float *row = scores + i * padded;
        const __m512 scale = _mm512_set1_ps(d->scale), none = _mm512_set1_ps(-__builtin_inff());
        __m512 most = none, sum = _mm512_setzero_ps();
        for (int64_t t = from; t < to; t += 16) {
            const __m512 v = _mm512_mask_mul_ps(none, lanes(first - t, last - t), _mm512_load_ps(row + t), scale);
            _mm512_store_ps(row + t, v);
            most = _mm512_max_ps(most, v);
        }
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (int64_t t = from; t < to; t += 16) {
            const __m512 e = _mm512_maskz_mov_ps(lanes(first - t, last - t), exp_avx512_bf16(
                _mm512_sub_ps(_mm512_load_ps(row + t), highest)));
            sum = _mm512_add_ps(sum, e);
            _mm256_storeu_si256((void *)(weights + i * weight_bytes + 2 * t), (__m256i)_mm512_cvtneps_pbh(e));
        }
        totals[i] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t c = 0; c < dim; c += PANEL) {
        __m512 acc[TALL][2];
        multiply_panel(acc, j->values + ((kv * (dim / PANEL) + c / PANEL) * padded + from) * PANEL * 2,
                       weights + 2 * from, weight_bytes, (to - from) / 2);
#pragma GCC unroll 12
        for (int i = 0; i < TALL; i++) {
            const __m512 total = _mm512_set1_ps(totals[i]);
            if (i < rows)
                _mm512_storeu_si512(d->out + (((first_query + i) * d->heads + h) * dim + c) * 2, (__m512i)
                    _mm512_cvtne2ps_pbh(_mm512_div_ps(acc[i][1], total), _mm512_div_ps(acc[i][0], total)));
        }
    }
}

static void prompt_items(void *job) {
    Prompt *j = job;
    char *scratch = j->scratch + __atomic_fetch_add(&j->slot, 1, __ATOMIC_RELAXED) * j->each;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items)
        prompt_item(j, scratch, item % j->d->heads, item / j->d->heads * TALL);
}
