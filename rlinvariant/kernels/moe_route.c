/* ops.moe_route. */
#include "cpu.h"

/* Of each row of logits the k largest, by (logit falling, index rising), and their softmax weights. NaN is chosen last. */
void moe_route(const void *logits, float *weights, i64 *ids, i64 rows, i64 experts, i64 k, int renormalise, int bf16) {
#pragma omp parallel if (rows * experts > 16384)
    {
        float *x = buffer(experts), *p = buffer(experts);
        char *taken = malloc(experts);
#pragma omp for
        for (i64 r = 0; r < rows; r++) {
            load(x, logits, r * experts, experts, bf16);
            memset(taken, 0, experts);
            for (i64 j = 0; j < k; j++) {
                i64 best = -1;
                for (i64 e = 0; e < experts; e++)
                    if (!taken[e] && (best < 0 || x[e] > x[best] || (x[best] != x[best] && x[e] == x[e]))) best = e;
                taken[best] = 1;
                ids[r * k + j] = best;
            }
            float most = x[ids[r * k]], sum = 0.0f;
            for (i64 e = 0; e < experts; e++) sum += p[e] = exp_(x[e] - most);
            float *w = weights + r * k, kept = 0.0f;
            for (i64 j = 0; j < k; j++) kept += w[j] = p[ids[r * k + j]] / sum;
            if (renormalise)
                for (i64 j = 0; j < k; j++) w[j] /= kept;
        }
        free(x), free(p), free(taken);
    }
}
