/* The sum over the ranks of one host for compiled code. It works in the memory and by the protocol of shared_group.py, so
   some ranks may sum here and others in Python, and all get the same bits. Only the usual case is here. Where a rank
   does not come soon, or has another fingerprint, Python goes on: it waits, and names the fault. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define ABI 2 /* native_sums.py has the same number */
#define LOOKS 256 /* at a counter, about 0.2 microseconds, before the core is offered to others */

EXPORT int hal_sums_abi(void) { return ABI; }

#if defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* native_sums.py mirrors it. Arrays have an entry for each rank; places and lines have them twice, for two turns. */
typedef struct {
    int64_t line[5]; /* as Fingerprint.pack: step, digest, collectives, operation, bytes */
    int64_t operation, rank, size, most; /* most: bytes of an x */
    char *const *places, *const *lines;
    uint32_t *const *counters;
    uint32_t count, spin; /* collectives of the group; microseconds */
} Sums;

static int came(const uint32_t *counter, uint32_t count, uint32_t spin) {
    struct timespec now;
    int64_t end = 0;
    for (;;) {
        for (int i = 0; i < LOOKS; i++)
            if ((int32_t)(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - count) >= 0) return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
        const int64_t at = now.tv_sec * 1000000 + now.tv_nsec / 1000;
        if (!end) end = at + spin;
        if (at >= end) return 0;
        sched_yield();
    }
}

static float from_bf16(uint16_t v) {
    const uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t to_bf16(float f) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* x[i] of all ranks in the order of their coordinates, rounded once. */
static void add(char *const *places, int64_t size, void *x, int64_t n, int bf16) {
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t left = n - i < 64 ? n - i : 64;
        float total[64];
        for (int64_t rank = 0; rank < size; rank++) {
            const uint16_t *narrow = (const uint16_t *)places[rank] + i;
            const float *wide = (const float *)places[rank] + i;
            for (int64_t k = 0; k < left; k++) {
                const float v = bf16 ? from_bf16(narrow[k]) : wide[k];
                total[k] = rank ? total[k] + v : v;
            }
        }
        for (int64_t k = 0; k < left; k++)
            if (bf16) ((uint16_t *)x)[i + k] = to_bf16(total[k]); else ((float *)x)[i + k] = total[k];
    }
}

/* x, n values of bfloat16 or float, becomes the sum. Returns 0, or 1 where Python must go on: x has been shown to the
   other ranks, unless it is too large. */
EXPORT int32_t hal_sum(void *state, void *x, int64_t n, int32_t bf16) {
    Sums *s = state;
    const int64_t bytes = n * (bf16 ? 2 : 4), turn = s->count & 1;
    char *const *places = s->places + turn * s->size, *const *lines = s->lines + turn * s->size;
    if (bytes > s->most) return 1;
    s->line[2]++;
    s->line[3] = s->operation;
    s->line[4] = bytes;
    s->count++;
    memcpy(places[s->rank], x, bytes);
    memcpy(lines[s->rank], s->line, sizeof s->line);
    __atomic_store_n(s->counters[s->rank], s->count, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, s->counters[s->rank], FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    for (int64_t rank = 0; rank < s->size; rank++) {
        if (rank == s->rank) continue;
        if (!came(s->counters[rank], s->count, s->spin) || memcmp(lines[rank], s->line, sizeof s->line)) return 1;
    }
    if (bf16) add(places, s->size, x, n, 1); else add(places, s->size, x, n, 0);
    return 0;
}
#endif
