/* ops.scale_logits and its gradients. */
#include "cpu.h"

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
