/* ops.threshold: the smallest logit of each row that top-k, top-p and min-p keep. Counts and integer sums alone: no order. */
#include "cpu.h"

/* mass[i] = floor(2^40 e^((x[i] - top) / temperature)) by multiplications and additions alone, each rounded: Triton and
 * PyTorch give the same integers. 2^g = 2^n p(f), n the nearest integer to g, p a minimax polynomial of degree 6. */
static void masses(i64 *mass, const float *x, i64 n, float top, float scale) {
    for (i64 i = 0; i < n; i++) {
        float g = (x[i] - top) * scale;
        g = g > -44.0f ? g : -44.0f;
        float z = g + 12582912.0f; /* the integer is in the low bits */
        float f = g - (z - 12582912.0f);
        float p = 1.5353362e-4f;
        p = p * f + 1.3398875e-3f;
        p = p * f + 9.618437e-3f;
        p = p * f + 5.5503324e-2f;
        p = p * f + 2.4022648e-1f;
        p = p * f + 6.931472e-1f;
        p = p * f + 1.0f;
        mass[i] = (i64)(p * as_float((as_uint(z) - 0x4b400000u + 167u) << 23)); /* times 2^(n + 40), which is exact */
    }
}

/* keys rise with the logit; x + 0 makes one of the two zeros. bf16 logits differ in the upper 16 bits alone */
static inline uint32_t key_of(float x) {
    uint32_t u = as_uint(x + 0.0f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static inline float logit_of(uint32_t key, int bf16) {
    uint32_t k = bf16 && !(key & 0x80000000u) ? key | 0xffffu : key;
    return as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k);
}

/* The largest key such that the tokens from it up, none below `from`, are `need` or more: their masses (NULL: their number).
 * A histogram of eight bits of the key at a time, from the top; 16 bits of bf16, 32 of fp32. */
static uint32_t largest(const uint32_t *key, const i64 *mass, i64 n, i64 need, uint32_t from, int bf16) {
    uint32_t found = 0, known = 0;
    for (int shift = 24; shift >= (bf16 ? 16 : 0); shift -= 8) {
        i64 bin[256] = {0};
        for (i64 i = 0; i < n; i++)
            if (((key[i] ^ found) & known) == 0 && key[i] >= from) bin[key[i] >> shift & 255] += mass ? mass[i] : 1;
        uint32_t b = 255;
        while (b > 0 && bin[b] < need) need -= bin[b--];
        found |= b << shift, known |= 255u << shift;
    }
    return found;
}

static float row_threshold(const float *x, uint32_t *key, i64 *mass, i64 n, float temperature, i64 top_k, float top_p,
                           float min_p, int bf16) {
    int by_k = top_k > 0 && top_k < n, by_p = top_p < 1.0f, by_min = min_p > 0.0f;
    float top = -INFINITY, scale = 1.44269504f / temperature; /* not finite at 0, and next to it */
    int nan = 0;
    for (i64 i = 0; i < n; i++) {
        nan |= x[i] != x[i];
        top = x[i] > top ? x[i] : top;
    }
    if (nan || scale - scale != 0.0f || top - top != 0.0f || !(by_k || by_p || by_min)) return -INFINITY;
    uint32_t from = 0;
    for (i64 i = 0; i < n; i++) key[i] = key_of(x[i]);
    if (by_p || by_min) masses(mass, x, n, top, scale);
    if (by_min) {
        i64 least = (i64)ceil((double)min_p * 0x1p40);
        from = key_of(top);
        for (i64 i = 0; i < n; i++)
            if (mass[i] >= least && key[i] < from) from = key[i];
    }
    if (by_k) {
        uint32_t k = largest(key, NULL, n, top_k, 0, bf16);
        from = k > from ? k : from;
    }
    if (by_p) {
        i64 total = 0;
        for (i64 i = 0; i < n; i++) total += key[i] >= from ? mass[i] : 0;
        i64 need = (i64)ceil((double)top_p * (double)total);
        uint32_t p = largest(key, mass, n, need > 1 ? need : 1, from, bf16);
        from = p > from ? p : from;
    }
    return logit_of(from, bf16);
}

void threshold(const void *logits, const float *temperature, const i64 *top_k, const float *top_p, const float *min_p,
               float *theta, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab);
        uint32_t *key = (uint32_t *)buffer(vocab);
        i64 *mass = (i64 *)buffer(2 * vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            load(x, logits, i * vocab, vocab, bf16);
            theta[i] = row_threshold(x, key, mass, vocab, temperature[i], top_k[i], top_p[i], min_p[i], bf16);
        }
        free(x), free(key), free(mass);
    }
}
