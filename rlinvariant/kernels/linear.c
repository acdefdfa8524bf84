/* ops.linear where no vendor's product is row invariant. */
#include "cpu.h"

static inline v16 load16(const void *p, i64 at, int bf16) { /* sixteen values as fp32 */
    if (!bf16) return at16((const float *)p + at);
    typedef uint16_t h16 __attribute__((vector_size(32)));
    typedef uint32_t u16v __attribute__((vector_size(64)));
    h16 h;
    memcpy(&h, (const uint16_t *)p + at, 32);
    return (v16)(__builtin_convertvector(h, u16v) << 16);
}

/* mr x 4 outputs: x fp32 rows of kp (padded with zeros), w rows n..n+3 in their own dtype; tail holds their last k % 16 */
static inline __attribute__((always_inline)) void linear_tile(const float *x, i64 kp, const void *w, i64 k, const float *tail,
                                                              int mr, float *y, int bf16) {
    v16 c[6][4] = {{{0}}};
    i64 whole = k & ~(i64)15;
    for (i64 i = 0; i < kp; i += 16) {
        v16 b[4];
        for (int n = 0; n < 4; n++) b[n] = i < whole ? load16(w, n * k + i, bf16) : at16(tail + n * 16);
        for (int m = 0; m < mr; m++) {
            v16 a = at16(x + m * kp + i);
            for (int n = 0; n < 4; n++) c[m][n] = fma16(a, b[n], c[m][n]);
        }
    }
    for (int m = 0; m < mr; m++)
        for (int n = 0; n < 4; n++) y[m * 4 + n] = tree(c[m][n]);
}

#define LINEAR_ROWS 96 /* rows of x converted at a time; no effect on bits */

/* y[m][n] = round(sum over k (lanes) of x[m][k] w[n][k] + bias[n]): the same order wherever a row or a column stands */
void linear(const void *x, const void *w, const void *bias, void *y, i64 rows, i64 cols, i64 k, int bf16) {
    i64 kp = PAD16(k), mblocks = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS, nblocks = (cols + 63) / 64;
#pragma omp parallel if (rows * cols * k > 65536)
    {
        float *a = buffer(LINEAR_ROWS * kp), *b = buffer(64), *out = buffer(LINEAR_ROWS * 64), *tail = buffer(64), *pad = buffer(4 * kp);
        i64 have = -1;
#pragma omp for
        for (i64 t = 0; t < mblocks * nblocks; t++) {
            i64 m0 = t / nblocks * LINEAR_ROWS, n0 = t % nblocks * 64;
            i64 nm = rows - m0 < LINEAR_ROWS ? rows - m0 : LINEAR_ROWS, nn = cols - n0 < 64 ? cols - n0 : 64;
            if (have != m0)
                for (i64 m = 0; m < nm; m++) load(a + m * kp, x, (m0 + m) * k, k, bf16);
            have = m0;
            if (bias) load(b, bias, n0, nn, bf16);
            for (i64 n = 0; n < nn; n += 4) {
                const char *rows4 = (const char *)w + (n0 + n) * k * (bf16 ? 2 : 4);
                i64 real = nn - n < 4 ? nn - n : 4;
                for (i64 j = 0; j < real; j++) load(tail + j * 16, rows4, j * k + (k & ~(i64)15), k & 15, bf16);
                if (real < 4) { /* the last columns: copied beside zeros, so that no load leaves the weight */
                    for (i64 j = 0; j < real; j++)
                        memcpy((char *)pad + j * k * (bf16 ? 2 : 4), rows4 + j * k * (bf16 ? 2 : 4), k * (bf16 ? 2 : 4));
                    rows4 = (const char *)pad;
                }
                for (i64 m = 0; m < nm;) {
                    float r[24];
                    int mr = nm - m >= 6 ? 6 : 1;
                    if (bf16) mr == 6 ? linear_tile(a + m * kp, kp, rows4, k, tail, 6, r, 1) : linear_tile(a + m * kp, kp, rows4, k, tail, 1, r, 1);
                    else mr == 6 ? linear_tile(a + m * kp, kp, rows4, k, tail, 6, r, 0) : linear_tile(a + m * kp, kp, rows4, k, tail, 1, r, 0);
                    for (int i = 0; i < mr; i++)
                        for (i64 j = 0; j < real; j++) out[(m + i) * 64 + n + j] = r[i * 4 + j] + (bias ? b[n + j] : 0.0f);
                    m += mr;
                }
            }
            for (i64 m = 0; m < nm; m++) store(y, (m0 + m) * cols + n0, out + m * 64, nn, bf16);
        }
        free(a), free(b), free(out), free(tail), free(pad);
    }
}
