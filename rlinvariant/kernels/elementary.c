/* exp and tanh of cpu.h, element by element, for the tests. */
#include "cpu.h"

void exp_f32(const float *x, float *y, i64 n) {
    for (i64 i = 0; i < n; i++) y[i] = exp_(x[i]);
}

void tanh_f32(const float *x, float *y, i64 n) {
    for (i64 i = 0; i < n; i++) y[i] = tanh_(x[i]);
}
