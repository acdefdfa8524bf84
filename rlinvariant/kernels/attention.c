/* ops.attention, packed and paged, and its gradients. */
#include "cpu.h"

#define QUERY_BLOCK 32 /* queries that share one conversion of K and V to fp32; no effect on bits */
#define HEADS 4        /* heads of a query, at most, that share a load of K and V; no effect on bits */

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

/* fp32 copies of keys or values from..n-1 as rows [n, dp]; dp is dim padded to 16 */
static void gather_rows(const keys *kv, const void *src, i64 seq, i64 start, i64 head, i64 from, i64 n, i64 dim, float *rows,
                        i64 dp, int bf16) {
    for (i64 j = from; j < n; j++) load(rows + j * dp, src, key_at(kv, seq, start, head, j), dim, bf16);
}

/* Exchange lanes whose number has bit S set in a with lanes that have it clear in b, S places apart */
#define CROSS(S, a, b)                                                                                                      \
    do {                                                                                                                    \
        v16 x_ = a, y_ = b;                                                                                                 \
        a = __builtin_shufflevector(x_, y_, FROM(S, 0), FROM(S, 1), FROM(S, 2), FROM(S, 3), FROM(S, 4), FROM(S, 5),         \
                                    FROM(S, 6), FROM(S, 7), FROM(S, 8), FROM(S, 9), FROM(S, 10), FROM(S, 11), FROM(S, 12),  \
                                    FROM(S, 13), FROM(S, 14), FROM(S, 15));                                                 \
        b = __builtin_shufflevector(x_, y_, S + FROM(S, 0), S + FROM(S, 1), S + FROM(S, 2), S + FROM(S, 3), S + FROM(S, 4), \
                                    S + FROM(S, 5), S + FROM(S, 6), S + FROM(S, 7), S + FROM(S, 8), S + FROM(S, 9),         \
                                    S + FROM(S, 10), S + FROM(S, 11), S + FROM(S, 12), S + FROM(S, 13), S + FROM(S, 14),    \
                                    S + FROM(S, 15));                                                                       \
    } while (0)
#define FROM(S, l) ((l) & (S) ? 16 + (l) - (S) : (l))

/* Transpose 16 vectors of 16 lanes */
static inline void transpose16(v16 r[16]) {
    for (int i = 0; i < 8; i++) CROSS(8, r[i], r[i + 8]);
    for (int i = 0; i < 16; i++)
        if (!(i & 4)) CROSS(4, r[i], r[i + 4]);
    for (int i = 0; i < 16; i++)
        if (!(i & 2)) CROSS(2, r[i], r[i + 2]);
    for (int i = 0; i < 16; i += 2) CROSS(1, r[i], r[i + 1]);
}

/* fp32 copies of keys or values from..n-1 as columns, in tiles of 16 keys: [n / 16, dim, 16]; rows holds [16, dp] */
static void gather_columns(const keys *kv, const void *src, i64 seq, i64 start, i64 head, i64 from, i64 n, i64 dim,
                           float *cols, float *rows, i64 dp, int bf16) {
    for (i64 j = from & ~(i64)15; j < n; j += 16) {
        for (i64 l = j < from ? from - j : 0; l < 16 && j + l < n; l++)
            load(rows + l * dp, src, key_at(kv, seq, start, head, j + l), dim, bf16);
        for (i64 d = 0; d < dim; d += 16) {
            v16 r[16];
            for (int l = 0; l < 16; l++) r[l] = at16(rows + l * dp + d);
            transpose16(r);
            for (int i = 0; i < 16 && d + i < dim; i++) memcpy(cols + j * dim + (d + i) * 16, &r[i], 64);
        }
    }
}

/* Call a function with a constant number of rows, so that the compiler keeps their sums in registers */
#define WITH_ROWS(rows, function, ...)             \
    switch (rows) {                                \
    case 1: function(1, __VA_ARGS__); break;       \
    case 2: function(2, __VA_ARGS__); break;       \
    case 3: function(3, __VA_ARGS__); break;       \
    default: function(HEADS, __VA_ARGS__);         \
    }

/* s[r][j] = sum over d (chain) of a[r][d] * column d of key j, for 64 keys at a time (four independent vectors) */
static inline __attribute__((always_inline)) void times_columns(const int rows, float *s, i64 np, const float *a,
                                                                i64 dp, const float *cols, i64 n, i64 dim) {
    i64 j = 0, tile = dim * 16;
    for (; j + 64 <= PAD16(n); j += 64) {
        v16 c[HEADS][4] = {{{0}}};
        const float *p = cols + j * dim;
        for (i64 d = 0; d < dim; d++, p += 16) {
            v16 k[4] = {at16(p), at16(p + tile), at16(p + 2 * tile), at16(p + 3 * tile)};
            for (int r = 0; r < rows; r++) {
                v16 x = all16(a[r * dp + d]);
                for (int i = 0; i < 4; i++) c[r][i] = fma16(x, k[i], c[r][i]);
            }
        }
        for (int r = 0; r < rows; r++) memcpy(s + r * np + j, c[r], 256);
    }
    for (; j < n; j += 16) {
        v16 c[HEADS] = {{0}};
        for (i64 d = 0; d < dim; d++)
            for (int r = 0; r < rows; r++) c[r] = fma16(all16(a[r * dp + d]), at16(cols + j * dim + d * 16), c[r]);
        for (int r = 0; r < rows; r++) memcpy(s + r * np + j, &c[r], 64);
    }
}

/* o[r][d] = sum over from <= j < n (chain4) of p[r][j] * rows[j][d] */
static inline __attribute__((always_inline)) void times_rows(const int rows, float *o, i64 dp, const float *p, i64 np,
                                                             const float *values, i64 from, i64 n) {
    for (i64 d = 0; d < dp; d += 16) {
        v16 c[HEADS][4] = {{{0}}};
        i64 j = from;
        for (; j % 4 && j < n; j++)
            for (int r = 0; r < rows; r++) c[r][j % 4] = fma16(all16(p[r * np + j]), at16(values + j * dp + d), c[r][j % 4]);
        for (; j + 4 <= n; j += 4)
            for (int k = 0; k < 4; k++) {
                v16 v = at16(values + (j + k) * dp + d);
                for (int r = 0; r < rows; r++) c[r][k] = fma16(all16(p[r * np + j + k]), v, c[r][k]);
            }
        for (; j < n; j++)
            for (int r = 0; r < rows; r++) c[r][j % 4] = fma16(all16(p[r * np + j]), at16(values + j * dp + d), c[r][j % 4]);
        for (int r = 0; r < rows; r++) {
            v16 sum = (c[r][0] + c[r][1]) + (c[r][2] + c[r][3]);
            memcpy(o + r * dp + d, &sum, 64);
        }
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
        float *cols = buffer(dim * np), *rows = buffer(longest * dp), *s = buffer(HEADS * np);
        float *qr = buffer(HEADS * dp), *o = buffer(HEADS * dp), *tile = buffer(16 * dp);
#pragma omp for schedule(dynamic)
        for (i64 t = 0; t < tasks; t++) {
            i64 b = 0;
            while (first[b + 1] <= t) b++;
            i64 head = (t - first[b]) % kv_heads, block = (t - first[b]) / kv_heads;
            i64 nq = cu_q[b + 1] - cu_q[b], q0 = block * QUERY_BLOCK, q1 = q0 + QUERY_BLOCK < nq ? q0 + QUERY_BLOCK : nq;
            i64 past = kv_len[b] - nq, seen = past + q1;
            i64 from = first_key(past + q0 + 1, window);
            gather_columns(&kv, k, b, cu_q[b], head, from, seen, dim, cols, tile, dp, bf16);
            gather_rows(&kv, v, b, cu_q[b], head, from, seen, dim, rows, dp, bf16);
            for (i64 i = q0; i < q1; i++)
                for (i64 g = 0; g < group; g += HEADS) {
                    i64 row = (cu_q[b] + i) * heads + head * group + g, n = past + i + 1;
                    i64 lo = first_key(n, window), base = lo & ~(i64)15; /* lane 0 of the first key's vector */
                    int some = group - g < HEADS ? group - g : HEADS;
                    for (int r = 0; r < some; r++) load(qr + r * dp, q, (row + r) * dim, dim, bf16);
                    WITH_ROWS(some, times_columns, s + base, np, qr, dp, cols + base * dim, n - base, dim);
                    float m[HEADS], sum[HEADS];
                    i64 end = PAD16(n) - base;
                    for (int r = 0; r < some; r++) {
                        float *w = s + r * np + base;
                        if (cap > 0.0f)
                            for (i64 j = 0; j < end; j++) w[j] = cap * tanh_(w[j] * scale / cap);
                        else
                            for (i64 j = 0; j < end; j++) w[j] = w[j] * scale;
                        for (i64 j = 0; j < lo - base; j++) w[j] = -INFINITY; /* no keys of this query: their exp is 0 */
                        for (i64 j = n - base; j < end; j++) w[j] = -INFINITY;
                        m[r] = max_lanes(w, end);
                        for (i64 j = 0; j < end; j++) w[j] = exp_(w[j] - m[r]);
                        sum[r] = sum_lanes(w, end);
                    }
                    WITH_ROWS(some, times_rows, o, dp, s, np, rows, lo, n);
                    for (int r = 0; r < some; r++) {
                        for (i64 d = 0; d < dim; d++) o[r * dp + d] = o[r * dp + d] / sum[r];
                        store(out, (row + r) * dim, o + r * dp, dim, bf16);
                        if (lse) lse[row + r] = (float)((double)m[r] + log((double)sum[r]));
                    }
                }
        }
        free(cols), free(rows), free(s), free(qr), free(o), free(tile);
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
        float *tile = buffer(16 * dp);
#pragma omp for schedule(dynamic)
        for (i64 t = 0; t < seqs * kv_heads; t++) {
            i64 b = t / kv_heads, head = t % kv_heads, start = cu[b], len = cu[b + 1] - start;
            gather_rows(&kv, k, b, start, head, 0, len, dim, kr, dp, bf16);
            gather_columns(&kv, k, b, start, head, 0, len, dim, kc, tile, dp, bf16);
            gather_columns(&kv, v, b, start, head, 0, len, dim, vc, tile, dp, bf16);
            memset(gk, 0, len * dp * 4), memset(gv, 0, len * dp * 4);
            for (i64 h = head * group; h < (head + 1) * group; h++)
                for (i64 i = 0; i < len; i++) {
                    i64 row = (start + i) * heads + h, n = i + 1, lo = first_key(n, window), base = lo & ~(i64)15;
                    load(g, dout, row * dim, dim, bf16);
                    load(o, out, row * dim, dim, bf16);
                    float delta = dot_lanes(g, o, dp);
                    load(qr, q, row * dim, dim, bf16);
                    times_columns(1, p + base, np, qr, dp, kc + base * dim, n - base, dim);
                    times_columns(1, ds + base, np, g, dp, vc + base * dim, n - base, dim);
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
                    times_rows(1, o, dp, ds, np, kr, lo, n);
                    store(dq, row * dim, o, dim, bf16);
                    memset(o + dim, 0, (dp - dim) * 4);
                }
            for (i64 j = 0; j < len; j++) {
                i64 at = (start + j) * kv_heads * dim + head * dim;
                store(dk, at, gk + j * dp, dim, bf16);
                store(dv, at, gv + j * dp, dim, bf16);
            }
        }
        free(kc), free(vc), free(kr), free(p), free(ds), free(gk), free(gv), free(qr), free(g), free(o), free(tile);
    }
}
