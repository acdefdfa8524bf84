/* ops.rope, forward and backward. */
#include "cpu.h"

/* x [tokens, heads, dim]; cos and sin fp32 [tokens, half]; columns (i, i + half) turn by the angle of column i,
 * columns from 2 * half on are copied; sign = -1 turns back, which is the backward */
void rope(const void *x, const float *cs, const float *sn, void *y, i64 tokens, i64 heads, i64 dim, i64 half, float sign,
          int bf16) {
#pragma omp parallel if (tokens * heads * dim > 32768)
    {
        float *a = buffer(dim), *o = buffer(dim);
#pragma omp for
        for (i64 t = 0; t < tokens; t++)
            for (i64 h = 0; h < heads; h++) {
                i64 at = (t * heads + h) * dim;
                load(a, x, at, dim, bf16);
                for (i64 i = 0; i < half; i++) {
                    float c = cs[t * half + i], s = sign * sn[t * half + i];
                    o[i] = __builtin_fmaf(a[i], c, -(a[i + half] * s));
                    o[i + half] = __builtin_fmaf(a[i + half], c, a[i] * s);
                }
                memcpy(o + 2 * half, a + 2 * half, (dim - 2 * half) * 4);
                store(y, at, o, dim, bf16);
            }
        free(a), free(o);
    }
}
