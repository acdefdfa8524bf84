/* The log-probabilities of ops.token_logprobs, their gradients, and ops.sample. */
#include "cpu.h"

#define VOCAB_BLOCK 4096 /* logits are summed in blocks of this many, block sums in fp64 */

typedef struct { double sum, weighted; float max; } row_stats;

/* x = logits / temperature (a true division), -inf where the logit is below theta[row] (NULL: nowhere), its maximum, and over
 * fixed vocabulary blocks, each by lanes and then added in fp64, ascending: sum of e^(x - max) and, for the entropy, of
 * e^(x - max) (x - max). e gets the exponentials. */
static row_stats softmax_row(float *x, float *e, const void *logits, const float *theta, i64 row, i64 vocab, float temperature,
                             int bf16) {
    row_stats r = {0, 0, -INFINITY};
    load(x, logits, row * vocab, vocab, bf16);
    for (i64 i = 0; theta && i < vocab; i++) x[i] = x[i] < theta[row] ? -INFINITY : x[i];
    for (i64 i = vocab; i < PAD16(vocab); i++) x[i] = -INFINITY;
    int nan = 0;
    for (i64 i = 0; i < vocab; i++) {
        x[i] = x[i] / temperature;
        nan |= x[i] != x[i];
        r.max = x[i] > r.max ? x[i] : r.max;
    }
    if (nan) r.max = NAN; /* a NaN logit must not hide: every number of this row becomes NaN */
    for (i64 b = 0; b < vocab; b += VOCAB_BLOCK) {
        i64 n = vocab - b < VOCAB_BLOCK ? PAD16(vocab - b) : VOCAB_BLOCK;
        for (i64 i = b; i < b + n; i++) e[i] = exp_(x[i] - r.max);
        v16 s = {0}, w = {0};
        for (i64 i = b; i < b + n; i += 16) {
            v16 y = at16(e + i), d = at16(x + i) - all16(r.max);
            s = s + y;
            w = w + (v16)((v16i)(y * d) & (y != 0)); /* 0 * -inf counts as 0 */
        }
        r.sum += (double)tree(s);
        r.weighted += (double)tree(w);
    }
    return r;
}

static inline float logprob_of(const row_stats *r, float x) { return (float)((double)x - (double)r->max - log(r->sum)); }

/* logprobs[i] = log softmax(logits[i] / temperature[i])[ids[i]], over logits[i] >= theta[i]; entropy and stats (max, log sum in fp64) may be NULL */
void token_logprobs(const void *logits, const i64 *ids, const float *temperature, const float *theta, float *logprobs,
                    float *entropy, double *stats, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            row_stats r = softmax_row(x, e, logits, theta, i, vocab, temperature[i], bf16);
            if (logprobs) logprobs[i] = logprob_of(&r, x[ids[i]]);
            if (entropy) entropy[i] = (float)(log(r.sum) - r.weighted / r.sum);
            if (stats) stats[2 * i] = (double)r.max, stats[2 * i + 1] = log(r.sum);
        }
        free(x), free(e);
    }
}

/* d loss / d logits for gradients `glp` of the log-prob and `gent` (or NULL) of the entropy:
 * (glp (1[j = id] - p_j) - gent p_j (log p_j + entropy)) / temperature */
void token_logprobs_backward(const void *logits, const i64 *ids, const float *temperature, const float *theta,
                             const float *glp, const float *gent, void *dlogits, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            row_stats r = softmax_row(x, e, logits, theta, i, vocab, temperature[i], bf16);
            float inv = (float)(1.0 / r.sum), logz = (float)log(r.sum), t = temperature[i], a = glp[i];
            float h = (float)(log(r.sum) - r.weighted / r.sum), c = gent ? gent[i] : 0.0f;
            float own = e[ids[i]];
            double others = 0; /* 1 - p of the token as the sum of the others, without cancellation */
            e[ids[i]] = 0.0f;
            for (i64 b = 0; b < vocab; b += VOCAB_BLOCK)
                others += (double)sum_lanes(e + b, vocab - b < VOCAB_BLOCK ? PAD16(vocab - b) : VOCAB_BLOCK);
            e[ids[i]] = own;
            float target = a * (float)(others / r.sum);
            for (i64 j = 0; j < vocab; j++) {
                float p = e[j] * inv, lp = x[j] - r.max - logz;
                float ent = p == 0.0f ? 0.0f : c * p * (lp + h);
                if (j == ids[i]) e[j] = (target - ent) / t;
                else e[j] = (-(a * p) - ent) / t;
            }
            store(dlogits, i * vocab, e, vocab, bf16);
        }
        free(x), free(e);
    }
}

/* splitmix64 of (seed, position), twice mixed: 53 random bits in [0, 1) that no other request or step can shift */
static double uniform(uint64_t seed, uint64_t position) {
    uint64_t z = seed + 0x9e3779b97f4a7c15ull * (position + 1);
    for (int i = 0; i < 2; i++) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z = z ^ (z >> 31);
    }
    return (double)(z >> 11) * 0x1p-53;
}

/* One token per row by inverse CDF: the first whose running sum of e^(x - max) (fp64, ascending) passes u * sum.
 * temperature 0 takes the first maximum, and its log-prob at temperature 1. rank[i] counts larger logits. */
void sample(const void *logits, const float *temperature, const float *theta, const i64 *seeds, const i64 *positions,
            i64 *tokens, float *logprobs, i64 *rank, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            int greedy = temperature[i] == 0.0f;
            row_stats r = softmax_row(x, e, logits, theta, i, vocab, greedy ? 1.0f : temperature[i], bf16);
            i64 pick = 0, larger = 0;
            if (greedy) {
                while (pick < vocab - 1 && !(x[pick] == r.max)) pick++;
            } else {
                double total = 0, below = 0, u = uniform((uint64_t)seeds[i], (uint64_t)positions[i]);
                for (i64 j = 0; j < vocab; j++) total += (double)e[j];
                for (i64 j = 0; j < vocab; j++) {
                    if (e[j] > 0.0f) pick = j;
                    below += (double)e[j];
                    if (below > u * total) break;
                }
            }
            for (i64 j = 0; j < vocab; j++) larger += x[j] > x[pick];
            tokens[i] = pick, rank[i] = larger, logprobs[i] = logprob_of(&r, x[pick]);
        }
        free(x), free(e);
    }
}
