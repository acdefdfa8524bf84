/* ops.swiglu and its gradients. */
#include "cpu.h"

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
