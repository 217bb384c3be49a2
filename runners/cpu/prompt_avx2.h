/* As prompt.h, for a processor with AVX2 and FMA and no arithmetic in bfloat16: keys, values and weights are in fp32.
   kernels.c includes this file behind blocks_avx2.h. */
#define PROMPT_PANELS (1 << 23) /* bytes of panels: of so many heads at a time, but at least of one */

static void prompt_panels_avx2(void *job) {
    Prompt *j = job;
    const Decode *d = j->d;
    const int64_t dim = d->head_dim, blocks = j->padded / PANEL_AVX2;
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->heads * blocks) {
        const int64_t head = item / blocks, h = j->head + head, t = item % blocks * PANEL_AVX2;
        float *to = (float *)j->values + head * j->padded * dim + t * PANEL_AVX2;
        const char *keys[PANEL_AVX2];
        for (int64_t i = 0; i < PANEL_AVX2; i++) {
            const int64_t at = MIN(t + i, j->context - 1), block = d->tables[at / d->block_size];
            const int64_t row = ((block * d->kv_heads + h) * d->block_size + at % d->block_size) * dim * 2;
            keys[i] = d->keys + row;
            for (int64_t c = 0; c < dim; c += 8) {
                const __m256i v = t + i < j->context ? _mm256_slli_epi32(_mm256_cvtepu16_epi32(
                    _mm_loadu_si128((const void *)(d->values + row + 2 * c))), 16) : _mm256_setzero_si256();
                _mm256_store_si256((void *)(to + c / PANEL_AVX2 * PANEL_AVX2 * j->padded + i * PANEL_AVX2 +
                                            c % PANEL_AVX2), v);
            }
        }
        fill_panel_avx2(keys, dim, (float *)j->keys + (head * j->padded + t) * dim);
    }
}

static void prompt_item_avx2(const Prompt *j, float *scores, int64_t h, int64_t first_query) {
    const Decode *d = j->d;
    const int64_t dim = d->head_dim, padded = j->padded, stride = padded + PANEL_AVX2;
    const int64_t kv = h / (d->heads / d->kv_heads) - j->head;
    const int64_t rows = MIN(TALL_AVX2, d->n - first_query), before = j->context - d->n + first_query;
    const int64_t from = d->window ? MAX(before - d->window + 1, 0) / PANEL_AVX2 * PANEL_AVX2 : 0;
    const int64_t to = (before + rows + PANEL_AVX2 - 1) / PANEL_AVX2 * PANEL_AVX2;
    const __m256 none = _mm256_set1_ps(-__builtin_inff());
    float *q = scores + TALL_AVX2 * stride, totals[TALL_AVX2];
    for (int64_t i = 0; i < TALL_AVX2; i++) { /* behind the last query, the last one again */
        const uint16_t *x = (const uint16_t *)d->q + (first_query + MIN(i, rows - 1)) * d->q_stride + h * dim;
        for (int64_t k = 0; k < dim; k++) q[i * dim + k] = d->scale * from_bf16(x[k]);
    }
    for (int64_t t = from; t < to; t += PANEL_AVX2) {
        __m256 acc[TALL_AVX2][2];
        multiply_panel_avx2(acc, (float *)j->keys + (kv * padded + t) * dim, q, dim, dim);
#pragma GCC unroll 6
        for (int i = 0; i < TALL_AVX2; i++) {
            _mm256_storeu_ps(scores + i * stride + t, acc[i][0]);
            _mm256_storeu_ps(scores + i * stride + t + 8, acc[i][1]);
        }
    }
    for (int64_t i = 0; i < TALL_AVX2; i++) {
        const int64_t last = before + MIN(i, rows - 1) + 1, first = d->window ? MAX(last - d->window, 0) : 0;
        float *row = scores + i * stride, all[8], highest = -__builtin_inff();
        __m256 most = none, sum = _mm256_setzero_ps();
        for (int64_t t = from; t < first; t++) row[t] = -__builtin_inff();
        for (int64_t t = last; t < to; t++) row[t] = -__builtin_inff();
        for (int64_t t = from; t < to; t += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(row + t));
        _mm256_storeu_ps(all, most);
        for (int l = 0; l < 8; l++) highest = MAX(highest, all[l]);
        for (int64_t t = from; t < to; t += 8) {
            const __m256 v = _mm256_loadu_ps(row + t), there = _mm256_cmp_ps(v, none, _CMP_NEQ_UQ);
            const __m256 e = _mm256_and_ps(there, exp_avx2(_mm256_sub_ps(v, _mm256_set1_ps(highest))));
            sum = _mm256_add_ps(sum, e);
            _mm256_storeu_ps(row + t, e);
        }
        _mm256_storeu_ps(all, sum);
        totals[i] = 0;
        for (int l = 0; l < 8; l++) totals[i] += all[l];
    }
    for (int64_t c = 0; c < dim; c += PANEL_AVX2) {
        __m256 acc[TALL_AVX2][2];
        multiply_panel_avx2(acc, (float *)j->values + kv * padded * dim + c * padded + from * PANEL_AVX2, scores + from,
                            stride, to - from);
#pragma GCC unroll 6
        for (int i = 0; i < TALL_AVX2; i++) {
            char *out = d->out + (((first_query + i) * d->heads + h) * dim + c) * 2;
            if (i >= rows) continue;
            blocks_put_avx2(out, blocks_rounded_avx2(_mm256_div_ps(acc[i][0], _mm256_set1_ps(totals[i]))), 8);
            blocks_put_avx2(out + 16, blocks_rounded_avx2(_mm256_div_ps(acc[i][1], _mm256_set1_ps(totals[i]))), 8);
        }
    }
}

static void prompt_items_avx2(void *job) {
    Prompt *j = job;
    const int64_t group = j->d->heads / j->d->kv_heads, heads = j->heads * group;
    float *scores = (float *)(j->scratch + __atomic_fetch_add(&j->slot, 1, __ATOMIC_RELAXED) * j->each);
    int64_t item;
    while ((item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items)
        prompt_item_avx2(j, scores, j->head * group + item % heads, item / heads * TALL_AVX2);
}

static int prompt_avx2(const Decode *d, unsigned threads) {
    Prompt job = {.d = d, .context = d->lens[0]};
    job.padded = (job.context + PANEL_AVX2 - 1) / PANEL_AVX2 * PANEL_AVX2;
    job.each = 4 * TALL_AVX2 * (job.padded + PANEL_AVX2 + d->head_dim);
    const int64_t panels = job.padded * d->head_dim * 4, heads = MIN(MAX(PROMPT_PANELS / (2 * panels), 1), d->kv_heads);
    job.keys = hal_scratch(2 * heads * panels + job.each * threads);
    if (!job.keys) return 1;
    job.values = job.keys + heads * panels;
    job.scratch = job.values + heads * panels;
    for (; job.head < d->kv_heads; job.head += heads) {
        job.heads = MIN(heads, d->kv_heads - job.head);
        job.items = job.heads * (d->heads / d->kv_heads) * ((d->n + TALL_AVX2 - 1) / TALL_AVX2);
        job.next = 0;
        run(prompt_panels_avx2, &job, threads);
        job.next = job.slot = 0;
        run(prompt_items_avx2, &job, threads);
    }
    return 0;
}
