/* The end of ops.moe_experts: a row's slots, added up. */
#include "cpu.h"

/* out[r] = round(sum over slots j, ascending, of y[r][j] * weights[r][j]) */
void moe_combine(const void *y, const float *weights, void *out, i64 rows, i64 k, i64 width, int bf16) {
#pragma omp parallel if (rows * k * width > 16384)
    {
        float *sum = buffer(width), *part = buffer(width);
#pragma omp for
        for (i64 r = 0; r < rows; r++) {
            for (i64 j = 0; j < k; j++) {
                load(j ? part : sum, y, (r * k + j) * width, width, bf16);
                float w = weights[r * k + j];
                if (j)
                    for (i64 i = 0; i < width; i++) sum[i] = sum[i] + part[i] * w;
                else
                    for (i64 i = 0; i < width; i++) sum[i] = sum[i] * w;
            }
            store(out, r * width, sum, width, bf16);
        }
        free(sum), free(part);
    }
}
