/* ops.rms_norm and its gradients. */
#include "cpu.h"

static void load_weight(float *b, const void *w, i64 cols, int once, float offset, int bf16) {
    load(b, w, 0, cols, bf16);
    for (i64 i = 0; once && i < cols; i++) b[i] = offset + b[i];
}

/* y = round(x * rstd) * w, or, rounding once, x * rstd * (offset + w); rstd = 1 / sqrt(mean(x^2) + eps), the mean by lanes */
void rms_norm(const void *x, const void *w, void *y, i64 rows, i64 cols, float eps, int once, float offset, int bf16) {
    int inner = bf16 && !once; /* whether what the weight multiplies is rounded */
#pragma omp parallel if (rows * cols > 32768)
    {
        float *a = buffer(cols), *b = buffer(cols);
        load_weight(b, w, cols, once, offset, bf16);
#pragma omp for
        for (i64 r = 0; r < rows; r++) {
            load(a, x, r * cols, cols, bf16);
            float rstd = 1.0f / sqrtf(dot_lanes(a, a, PAD16(cols)) / (float)cols + eps);
            float *o = a;
            for (i64 i = 0; i < cols; i++) o[i] = round_to(a[i] * rstd, inner) * b[i];
            store(y, r * cols, o, cols, bf16);
        }
        free(a), free(b);
    }
}

/* dx = rstd * (g - x * rstd^2 * mean(g * x)), g = dy * w, or dy * (offset + w); dw = sum over rows, ascending, of dy * x * rstd */
void rms_norm_backward(const void *dy, const void *x, const void *w, void *dx, float *dw, i64 rows, i64 cols, float eps,
                       int once, float offset, int bf16) {
    float *rstd = buffer(rows);
#pragma omp parallel if (rows * cols > 32768)
    {
        float *a = buffer(cols), *g = buffer(cols), *b = buffer(cols);
        load_weight(b, w, cols, once, offset, bf16);
#pragma omp for
        for (i64 r = 0; r < rows; r++) {
            load(a, x, r * cols, cols, bf16);
            load(g, dy, r * cols, cols, bf16);
            float s = 1.0f / sqrtf(dot_lanes(a, a, PAD16(cols)) / (float)cols + eps);
            rstd[r] = s;
            for (i64 i = 0; i < cols; i++) g[i] = g[i] * b[i];
            float c = dot_lanes(g, a, PAD16(cols)) / (float)cols * s * s;
            for (i64 i = 0; i < cols; i++) g[i] = s * (g[i] - a[i] * c);
            store(dx, r * cols, g, cols, bf16);
        }
#pragma omp for
        for (i64 block = 0; block < (cols + 63) / 64; block++) {
            i64 at = block * 64, n = cols - at < 64 ? cols - at : 64;
            double sum[64] = {0}; /* fp64: one chain over all tokens */
            for (i64 r = 0; r < rows; r++) {
                load(a, x, r * cols + at, n, bf16);
                load(g, dy, r * cols + at, n, bf16);
                for (i64 i = 0; i < n; i++) sum[i] += (double)(g[i] * (a[i] * rstd[r]));
            }
            for (i64 i = 0; i < n; i++) dw[at + i] = (float)sum[i];
        }
        free(a), free(g), free(b);
    }
    free(rstd);
}
