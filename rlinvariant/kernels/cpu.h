/* What the CPU kernels share: their orders of summation, exp and tanh. Each op has its kernels in a .c file of its own.
 *
 * Why C: PyTorch's CPU kernels pick vector bodies, scalar tails and thread splits by shape, and a vectorised exp() and
 * its scalar tail differ in the last bit. Here the order of every sum is in the source. The files are compiled
 * with -ffp-contract=off, so a compiler can neither fuse nor reorder: each line means one IEEE 754 result, on every compiler,
 * vector width and thread count. FMAs are written out. Threads share rows, never a sum.
 *
 * Orders of summation:
 *   lanes   16 fp32 accumulators; element i goes to lane i % 16, ascending; then lanes l and l+8, l+4, l+2, l+1 are added
 *   chain   one fp32 accumulator, ascending, fused multiply-add
 *   chain4  four chains, element i goes to chain i % 4; result (c0 + c1) + (c2 + c3)
 *
 * Tensors come as raw pointers; `bf16` says whether they hold bfloat16 or float. All arithmetic is fp32; a value is rounded
 * when it is stored. rlinvariant/kernels/cpu.py builds the library and declares the argument types.
 */
#ifndef RLINVARIANT_CPU_H
#define RLINVARIANT_CPU_H

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

/* ---- bf16 and buffers ------------------------------------------------------------------------------------------------ */

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

static inline float *buffer(i64 floats) { /* 64-byte aligned, zeroed up to a whole number of vectors */
    void *p = NULL;
    i64 bytes = PAD16(floats) * 4;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) abort();
    memset(p, 0, bytes);
    return p;
}

/* ---- sums, exp and tanh ---------------------------------------------------------------------------------------------- */

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

/* the largest a[i] that is a number, -inf if none is; in any order the same; n a multiple of 16 */
static inline float max_lanes(const float *a, i64 n) {
    v16 most = all16(-INFINITY);
    for (i64 i = 0; i < n; i += 16) {
        v16 x = at16(a + i);
        v16i larger = x > most;
        most = (v16)(((v16i)x & larger) | ((v16i)most & ~larger));
    }
    float m = -INFINITY;
    for (int l = 0; l < 16; l++) m = most[l] > m ? most[l] : m;
    return m;
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

#endif
