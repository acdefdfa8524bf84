/* CPU kernels with a written order of summation.
 *
 * Why C: PyTorch's CPU kernels pick vector bodies, scalar tails and thread splits by shape, and a vectorised exp() and
 * its scalar tail differ in the last bit. Here the order of every sum is in the source. The file is compiled with
 * -ffp-contract=off, so a compiler can neither fuse nor reorder: each line means one IEEE 754 result, on every compiler,
 * vector width and thread count. FMAs are written out. Threads share rows, never a sum.
 *
 * Orders used below:
 *   lanes   16 fp32 accumulators; element i goes to lane i % 16, ascending; then lanes l and l+8, l+4, l+2, l+1 are added
 *   chain   one fp32 accumulator, ascending, fused multiply-add
 *   chain4  four chains, element i goes to chain i % 4; result (c0 + c1) + (c2 + c3)
 *
 * Tensors come as raw pointers; `bf16` says whether they hold bfloat16 or float. All arithmetic is fp32; a value is rounded
 * when it is stored. rlinvariant/kernels/cpu.py builds this file and declares the argument types.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

#define PAD16(n) (((n) + 15) & ~(i64)15)
#define VOCAB_BLOCK 4096 /* logits are summed in blocks of this many, block sums in fp64 */
#define QUERY_BLOCK 32   /* queries that share one conversion of K and V to fp32; no effect on bits */

/* ---- bf16 and buffers ------------------------------------------------------------------------------------------ */

static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline uint16_t to_bf16(float f) { /* round to nearest even, as torch does */
    uint32_t u = as_uint(f), r = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)r;
}

static inline float round_to(float f, int bf16) { return bf16 ? as_float((uint32_t)to_bf16(f) << 16) : f; }

static inline void load(float *dst, const void *src, i64 at, i64 n, int bf16) {
    if (bf16) {
        const uint16_t *s = (const uint16_t *)src + at;
        for (i64 i = 0; i < n; i++) dst[i] = as_float((uint32_t)s[i] << 16);
    } else {
        memcpy(dst, (const float *)src + at, n * 4);
    }
}

static inline void store(void *dst, i64 at, const float *src, i64 n, int bf16) {
    if (bf16) {
        uint16_t *d = (uint16_t *)dst + at;
        for (i64 i = 0; i < n; i++) d[i] = to_bf16(src[i]);
    } else {
        memcpy((float *)dst + at, src, n * 4);
    }
}

static float *buffer(i64 floats) { /* 64-byte aligned, zeroed up to a whole number of vectors */
    void *p = NULL;
    i64 bytes = PAD16(floats) * 4;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) abort();
    memset(p, 0, bytes);
    return p;
}

/* ---- sums, exp and tanh ---------------------------------------------------------------------------------------- */

static inline v16 at16(const float *p) { v16 v; memcpy(&v, p, 64); return v; }

static inline v16 fma16(v16 a, v16 b, v16 c) { /* one fused multiply-add per lane; three spellings of the same bits */
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union { v16 v; __m256 h[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.h[i] = _mm256_fmadd_ps(x.h[i], y.h[i], z.h[i]);
    return z.v;
#else
    for (int l = 0; l < 16; l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#endif
}

static inline v16 all16(float x) { return x - (v16){0}; }

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

static inline float tree(v16 a) { /* lanes l and l + 8, then l + 4, l + 2, l + 1 */
    v8 b = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
    v4 c = __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* sum a[i] * b[i] by lanes; both padded with zeros to a multiple of 16 */
static inline float dot_lanes(const float *a, const float *b, i64 n) {
    v16 acc = {0};
    for (i64 i = 0; i < n; i += 16) acc = fma16(at16(a + i), at16(b + i), acc);
    return tree(acc);
}

static inline float sum_lanes(const float *a, i64 n) {
    v16 acc = {0};
    for (i64 i = 0; i < n; i += 16) acc = acc + at16(a + i);
    return tree(acc);
}

/* e^x: Cody-Waite reduction and a degree-6 polynomial (max error 1 ulp); 0 below -86.6, inf above 88.7, NaN kept.
 * The same operations for a scalar and for each lane of a vector, hence the same bits. */
static inline float exp_(float x) {
    float c = x < -86.6f ? -86.6f : x;
    c = c > 88.7f ? 88.7f : c;
    float z = __builtin_fmaf(c, 1.44269504f, 12582912.0f); /* round c / ln 2 to an integer, kept in the low bits */
    float n = z - 12582912.0f;
    float r = __builtin_fmaf(n, -0.693145752f, c);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float p = 1.3814535e-3f;
    p = __builtin_fmaf(p, r, 8.368703e-3f);
    p = __builtin_fmaf(p, r, 4.166839e-2f);
    p = __builtin_fmaf(p, r, 1.6666521e-1f);
    p = __builtin_fmaf(p, r, 4.9999994e-1f);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    float y = p * as_float((as_uint(z) - 0x4b400000u + 126u) << 23) * 2.0f; /* 2^n in two steps: n may be 128 */
    y = x < -86.6f ? 0.0f : y;
    return x > 88.7f ? INFINITY : y;
}

void exp_f32(const float *x, float *y, i64 n) { /* for the tests */
    for (i64 i = 0; i < n; i++) y[i] = exp_(x[i]);
}

/* tanh x: odd polynomial below 0.625 (fitted; relative error 5e-9), 1 - 2 / (e^2|x| + 1) above; NaN kept */
static inline float tanh_(float x) {
    float z = x * x, a = as_float(as_uint(x) & 0x7fffffffu);
    float p = -5.7049855e-3f;
    p = __builtin_fmaf(p, z, 2.0639086e-2f);
    p = __builtin_fmaf(p, z, -5.3739715e-2f);
    p = __builtin_fmaf(p, z, 1.3331442e-1f);
    p = __builtin_fmaf(p, z, -3.3333281e-1f);
    float y = a < 0.625f ? __builtin_fmaf(a * z, p, a) : 1.0f - 2.0f / (exp_(a + a) + 1.0f);
    return as_float(as_uint(y) | (as_uint(x) & 0x80000000u));
}

void tanh_f32(const float *x, float *y, i64 n) { /* for the tests */
    for (i64 i = 0; i < n; i++) y[i] = tanh_(x[i]);
}

/* ---- linear ---------------------------------------------------------------------------------------------------- */

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

/* ---- rms_norm -------------------------------------------------------------------------------------------------- */

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

/* ---- rope ------------------------------------------------------------------------------------------------------ */

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

/* ---- swiglu ---------------------------------------------------------------------------------------------------- */

/* Both activations are g / (1 + e^-u): SiLU with u = g, and GELU's tanh form with u = 2 sqrt(2 / pi) (g + 0.044715 g^3),
 * since 1 + tanh(u / 2) = 2 / (1 + e^-u). Beyond 16 the quotient is g or 0, and g^3 must not overflow. */
static inline float gelu_u(float g, float *slope) {
    float c = g < -16.0f ? -16.0f : g;
    c = c > 16.0f ? 16.0f : c;
    float square = c * c;
    *slope = __builtin_fmaf(square, 0.21406445f, 1.5957691f);
    return c * __builtin_fmaf(square, 0.071354814f, 1.5957691f);
}

/* y = round(activation(gate)) * up, element by element */
void swiglu(const void *gate, const void *up, void *y, i64 n, int gelu, int bf16) {
#pragma omp parallel for if (n > 16384)
    for (i64 block = 0; block < (n + 1023) / 1024; block++) {
        i64 at = block * 1024, m = n - at < 1024 ? n - at : 1024;
        float g[1024], u[1024];
        load(g, gate, at, m, bf16);
        load(u, up, at, m, bf16);
        float unused;
        if (gelu)
            for (i64 i = 0; i < m; i++) u[i] = round_to(g[i] / (1.0f + exp_(-gelu_u(g[i], &unused))), bf16) * u[i];
        else
            for (i64 i = 0; i < m; i++) u[i] = round_to(g[i] / (1.0f + exp_(-g[i])), bf16) * u[i];
        store(y, at, u, m, bf16);
    }
}

void swiglu_backward(const void *dy, const void *gate, const void *up, void *dgate, void *dup, i64 n, int gelu,
                     int bf16) {
#pragma omp parallel for if (n > 16384)
    for (i64 block = 0; block < (n + 1023) / 1024; block++) {
        i64 at = block * 1024, m = n - at < 1024 ? n - at : 1024;
        float d[1024], g[1024], u[1024];
        load(d, dy, at, m, bf16);
        load(g, gate, at, m, bf16);
        load(u, up, at, m, bf16);
        for (i64 i = 0; i < m; i++) {
            float slope = 1.0f, at_gate = gelu ? gelu_u(g[i], &slope) : g[i];
            float sig = 1.0f / (1.0f + exp_(-at_gate)), act = g[i] * sig;
            float dg = d[i] * u[i] * (sig + act * (1.0f - sig) * slope);
            u[i] = d[i] * round_to(act, bf16);
            g[i] = dg;
        }
        store(dgate, at, g, m, bf16);
        store(dup, at, u, m, bf16);
    }
}

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* Where key j of a sequence and head is. Packed: row start + j of a [tokens, heads, dim] tensor. Paged: row j % page of the
 * block that `table` names. Strides count elements. */
typedef struct {
    const void *k, *v;
    const int32_t *table; /* NULL when packed; else [sequences, table_width] */
    i64 table_width, page, block_stride, row_stride, head_stride;
} keys;

static inline i64 key_at(const keys *kv, i64 seq, i64 start, i64 head, i64 j) {
    i64 row = kv->table ? kv->table[seq * kv->table_width + j / kv->page] * kv->block_stride + (j % kv->page) * kv->row_stride
                        : (start + j) * kv->row_stride;
    return row + head * kv->head_stride;
}

/* The first key that a query at position n - 1 attends to */
static inline i64 first_key(i64 n, i64 window) { return window && n > window ? n - window : 0; }

/* fp32 copies of keys and values from..n-1: rows [n, dp] and/or columns [dim, np]; dp and np are padded to 16 */
static void gather(const keys *kv, const void *src, i64 seq, i64 start, i64 head, i64 from, i64 n, i64 dim, float *rows,
                   i64 dp, float *cols, i64 np, float *tmp, int bf16) {
    for (i64 j = from; j < n; j++) {
        float *row = rows ? rows + j * dp : tmp;
        load(row, src, key_at(kv, seq, start, head, j), dim, bf16);
        if (cols)
            for (i64 d = 0; d < dim; d++) cols[d * np + j] = row[d];
    }
}

/* s[j] = sum over d (chain) of a[d] * cols[d][j], for 64 keys at a time (four independent vectors) */
static inline void times_columns(float *s, const float *a, const float *cols, i64 np, i64 n, i64 dim) {
    i64 j = 0;
    for (; j + 64 <= PAD16(n); j += 64) {
        v16 c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
        for (i64 d = 0; d < dim; d++) {
            v16 x = all16(a[d]);
            const float *p = cols + d * np + j;
            c0 = fma16(x, at16(p), c0), c1 = fma16(x, at16(p + 16), c1);
            c2 = fma16(x, at16(p + 32), c2), c3 = fma16(x, at16(p + 48), c3);
        }
        memcpy(s + j, &c0, 64), memcpy(s + j + 16, &c1, 64), memcpy(s + j + 32, &c2, 64), memcpy(s + j + 48, &c3, 64);
    }
    for (; j < n; j += 16) {
        v16 c = {0};
        for (i64 d = 0; d < dim; d++) c = fma16(all16(a[d]), at16(cols + d * np + j), c);
        memcpy(s + j, &c, 64);
    }
}

/* o[d] = sum over from <= j < n (chain4) of p[j] * rows[j][d] */
static inline void times_rows(float *o, const float *p, const float *rows, i64 dp, i64 from, i64 n) {
    for (i64 d = 0; d < dp; d += 16) {
        v16 c[4] = {{0}, {0}, {0}, {0}};
        i64 j = from;
        for (; j % 4 && j < n; j++) c[j % 4] = fma16(all16(p[j]), at16(rows + j * dp + d), c[j % 4]);
        for (; j + 4 <= n; j += 4)
            for (int k = 0; k < 4; k++) c[k] = fma16(all16(p[j + k]), at16(rows + (j + k) * dp + d), c[k]);
        for (; j < n; j++) c[j % 4] = fma16(all16(p[j]), at16(rows + j * dp + d), c[j % 4]);
        v16 r = (c[0] + c[1]) + (c[2] + c[3]);
        memcpy(o + d, &r, 64);
    }
}

/* Causal softmax(scale * q k^T) v, one query row at a time: scores over dim by chain, maximum, exp, sum by lanes over
 * absolute key positions, values by chain4 over keys, one division. A row uses its own sequence's keys 0..position and
 * nothing else, so neither chunking, paging, packing nor the batch can reach it. With a window (0: none) it uses the last
 * `window` of them: the sums keep the lanes and chains of absolute positions, and earlier pages are not read. With a cap
 * (0: none) a score s becomes cap * tanh(s / cap).
 * q, out [tokens, heads, dim]; query i of sequence b is at row cu_q[b] + i and position kv_len[b] - (queries of b) + i.
 * lse [tokens, heads] fp32 (max + log sum, of scaled scores), or NULL. */
void attention(const void *q, const void *k, const void *v, void *out, float *lse, const int32_t *cu_q,
               const int32_t *kv_len, const int32_t *table, i64 table_width, i64 page, i64 block_stride, i64 row_stride,
               i64 head_stride, i64 seqs, i64 heads, i64 kv_heads, i64 dim, i64 window, float scale, float cap, int bf16) {
    keys kv = {k, v, table, table_width, page, block_stride, row_stride, head_stride};
    i64 group = heads / kv_heads, dp = PAD16(dim), tasks = 0, longest = 0, work = 0;
    i64 *first = malloc((seqs + 1) * sizeof(i64));
    for (i64 b = 0; b < seqs; b++) {
        first[b] = tasks;
        i64 nq = cu_q[b + 1] - cu_q[b];
        tasks += (nq + QUERY_BLOCK - 1) / QUERY_BLOCK * kv_heads;
        longest = kv_len[b] > longest ? kv_len[b] : longest;
        work += nq * kv_len[b] * heads * dim;
    }
    first[seqs] = tasks;
    i64 np = PAD16(longest) + 64;
#pragma omp parallel if (work > 65536)
    {
        float *cols = buffer(dim * np), *rows = buffer(longest * dp), *s = buffer(np), *qr = buffer(dp), *o = buffer(dp);
#pragma omp for schedule(dynamic)
        for (i64 t = 0; t < tasks; t++) {
            i64 b = 0;
            while (first[b + 1] <= t) b++;
            i64 head = (t - first[b]) % kv_heads, block = (t - first[b]) / kv_heads;
            i64 nq = cu_q[b + 1] - cu_q[b], q0 = block * QUERY_BLOCK, q1 = q0 + QUERY_BLOCK < nq ? q0 + QUERY_BLOCK : nq;
            i64 past = kv_len[b] - nq, seen = past + q1;
            i64 from = first_key(past + q0 + 1, window);
            gather(&kv, k, b, cu_q[b], head, from, seen, dim, NULL, dp, cols, np, o, bf16);
            gather(&kv, v, b, cu_q[b], head, from, seen, dim, rows, dp, NULL, np, o, bf16);
            for (i64 i = q0; i < q1; i++)
                for (i64 g = 0; g < group; g++) {
                    i64 row = (cu_q[b] + i) * heads + head * group + g, n = past + i + 1;
                    i64 lo = first_key(n, window), base = lo & ~(i64)15; /* lane 0 of the first key's vector */
                    load(qr, q, row * dim, dim, bf16);
                    times_columns(s + base, qr, cols + base, np, n - base, dim);
                    float m = -INFINITY;
                    for (i64 j = lo; cap > 0.0f && j < n; j++) s[j] = cap * tanh_(s[j] * scale / cap);
                    for (i64 j = lo; j < n; j++) s[j] = cap > 0.0f ? s[j] : s[j] * scale, m = s[j] > m ? s[j] : m;
                    for (i64 j = lo; j < n; j++) s[j] = exp_(s[j] - m);
                    for (i64 j = base; j < lo; j++) s[j] = 0.0f;
                    for (i64 j = n; j < PAD16(n); j++) s[j] = 0.0f;
                    float sum = sum_lanes(s + base, PAD16(n) - base);
                    times_rows(o, s, rows, dp, lo, n);
                    for (i64 d = 0; d < dim; d++) o[d] = o[d] / sum;
                    store(out, row * dim, o, dim, bf16);
                    if (lse) lse[row] = (float)((double)m + log((double)sum));
                }
        }
        free(cols), free(rows), free(s), free(qr), free(o);
    }
    free(first);
}

/* Gradients of packed attention. One task owns a sequence and a key head, so dk and dv are summed by one thread, queries
 * and then heads of the group ascending: deterministic for any number of threads. */
void attention_backward(const void *dout, const void *q, const void *k, const void *v, const void *out, const float *lse,
                        void *dq, void *dk, void *dv, const int32_t *cu, i64 seqs, i64 heads, i64 kv_heads, i64 dim,
                        i64 window, float scale, float cap, int bf16) {
    keys kv = {k, v, NULL, 0, 0, 0, kv_heads * dim, dim};
    i64 group = heads / kv_heads, dp = PAD16(dim), longest = 0;
    for (i64 b = 0; b < seqs; b++) longest = cu[b + 1] - cu[b] > longest ? cu[b + 1] - cu[b] : longest;
    i64 np = PAD16(longest) + 64;
#pragma omp parallel
    {
        float *kc = buffer(dim * np), *vc = buffer(dim * np), *kr = buffer(longest * dp), *p = buffer(np), *ds = buffer(np);
        float *gk = buffer(longest * dp), *gv = buffer(longest * dp), *qr = buffer(dp), *g = buffer(dp), *o = buffer(dp);
#pragma omp for schedule(dynamic)
        for (i64 t = 0; t < seqs * kv_heads; t++) {
            i64 b = t / kv_heads, head = t % kv_heads, start = cu[b], len = cu[b + 1] - start;
            gather(&kv, k, b, start, head, 0, len, dim, kr, dp, kc, np, o, bf16);
            gather(&kv, v, b, start, head, 0, len, dim, NULL, dp, vc, np, o, bf16);
            memset(gk, 0, len * dp * 4), memset(gv, 0, len * dp * 4);
            for (i64 h = head * group; h < (head + 1) * group; h++)
                for (i64 i = 0; i < len; i++) {
                    i64 row = (start + i) * heads + h, n = i + 1, lo = first_key(n, window), base = lo & ~(i64)15;
                    load(g, dout, row * dim, dim, bf16);
                    load(o, out, row * dim, dim, bf16);
                    float delta = dot_lanes(g, o, dp);
                    load(qr, q, row * dim, dim, bf16);
                    times_columns(p + base, qr, kc + base, np, n - base, dim);
                    times_columns(ds + base, g, vc + base, np, n - base, dim);
                    float l = lse[row];
                    if (cap > 0.0f)
                        for (i64 j = lo; j < n; j++) {
                            float t = tanh_(p[j] * scale / cap);
                            p[j] = exp_(cap * t - l);
                            ds[j] = p[j] * (ds[j] - delta) * __builtin_fmaf(-t, t, 1.0f) * scale;
                        }
                    else
                        for (i64 j = lo; j < n; j++) p[j] = exp_(p[j] * scale - l), ds[j] = p[j] * (ds[j] - delta) * scale;
                    for (i64 j = lo; j < n; j++) {
                        v16 a = all16(ds[j]), c = all16(p[j]);
                        for (i64 d = 0; d < dp; d += 16) {
                            v16 x = fma16(a, at16(qr + d), at16(gk + j * dp + d)), y = fma16(c, at16(g + d), at16(gv + j * dp + d));
                            memcpy(gk + j * dp + d, &x, 64), memcpy(gv + j * dp + d, &y, 64);
                        }
                    }
                    times_rows(o, ds, kr, dp, lo, n);
                    store(dq, row * dim, o, dim, bf16);
                    memset(o + dim, 0, (dp - dim) * 4);
                }
            for (i64 j = 0; j < len; j++) {
                i64 at = (start + j) * kv_heads * dim + head * dim;
                store(dk, at, gk + j * dp, dim, bf16);
                store(dv, at, gv + j * dp, dim, bf16);
            }
        }
        free(kc), free(vc), free(kr), free(p), free(ds), free(gk), free(gv), free(qr), free(g), free(o);
    }
}

/* ---- scale_logits ---------------------------------------------------------------------------------------------- */

/* y = round(x * scale); with a cap (0: none), round(round(tanh(round(y / cap))) * cap) of it */
void scale_logits(const void *x, void *y, i64 n, float scale, float cap, int bf16) {
#pragma omp parallel for if (n > 16384)
    for (i64 block = 0; block < (n + 1023) / 1024; block++) {
        i64 at = block * 1024, m = n - at < 1024 ? n - at : 1024;
        float a[1024];
        load(a, x, at, m, bf16);
        for (i64 i = 0; i < m; i++) a[i] = a[i] * scale;
        if (cap > 0.0f)
            for (i64 i = 0; i < m; i++) a[i] = round_to(tanh_(round_to(round_to(a[i], bf16) / cap, bf16)), bf16) * cap;
        store(y, at, a, m, bf16);
    }
}

/* dx = dy * scale; with a cap, dy * scale * (1 - tanh^2), the tanh not rounded */
void scale_logits_backward(const void *dy, const void *x, void *dx, i64 n, float scale, float cap, int bf16) {
#pragma omp parallel for if (n > 16384)
    for (i64 block = 0; block < (n + 1023) / 1024; block++) {
        i64 at = block * 1024, m = n - at < 1024 ? n - at : 1024;
        float a[1024], g[1024];
        load(a, x, at, m, bf16);
        load(g, dy, at, m, bf16);
        for (i64 i = 0; i < m; i++) g[i] = g[i] * scale;
        for (i64 i = 0; cap > 0.0f && i < m; i++) {
            float t = tanh_(round_to(round_to(a[i] * scale, bf16) / cap, bf16));
            g[i] = g[i] * __builtin_fmaf(-t, t, 1.0f);
        }
        store(dx, at, g, m, bf16);
    }
}

/* ---- log-probabilities and sampling ---------------------------------------------------------------------------- */

typedef struct { double sum, weighted; float max; } row_stats;

/* x = logits / temperature (a true division), its maximum, and over fixed vocabulary blocks, each by lanes and then added
 * in fp64, ascending: sum of e^(x - max) and, for the entropy, of e^(x - max) (x - max). e gets the exponentials. */
static row_stats softmax_row(float *x, float *e, const void *logits, i64 at, i64 vocab, float temperature, int bf16) {
    row_stats r = {0, 0, -INFINITY};
    load(x, logits, at, vocab, bf16);
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

/* logprobs[i] = log softmax(logits[i] / temperature[i])[ids[i]]; entropy and stats (max, log sum in fp64) may be NULL */
void token_logprobs(const void *logits, const i64 *ids, const float *temperature, float *logprobs, float *entropy,
                    double *stats, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            row_stats r = softmax_row(x, e, logits, i * vocab, vocab, temperature[i], bf16);
            if (logprobs) logprobs[i] = logprob_of(&r, x[ids[i]]);
            if (entropy) entropy[i] = (float)(log(r.sum) - r.weighted / r.sum);
            if (stats) stats[2 * i] = (double)r.max, stats[2 * i + 1] = log(r.sum);
        }
        free(x), free(e);
    }
}

/* d loss / d logits for gradients `glp` of the log-prob and `gent` (or NULL) of the entropy:
 * (glp (1[j = id] - p_j) - gent p_j (log p_j + entropy)) / temperature */
void token_logprobs_backward(const void *logits, const i64 *ids, const float *temperature, const float *glp,
                             const float *gent, void *dlogits, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            row_stats r = softmax_row(x, e, logits, i * vocab, vocab, temperature[i], bf16);
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
void sample(const void *logits, const float *temperature, const i64 *seeds, const i64 *positions, i64 *tokens,
            float *logprobs, i64 *rank, i64 rows, i64 vocab, int bf16) {
#pragma omp parallel if (rows * vocab > 8192)
    {
        float *x = buffer(vocab), *e = buffer(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            int greedy = temperature[i] == 0.0f;
            row_stats r = softmax_row(x, e, logits, i * vocab, vocab, greedy ? 1.0f : temperature[i], bf16);
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
