/* Per-token operations of layers, in one pass over memory: RMS norm, SwiGLU, and splitting channels into heads. */
#pragma once

#include "vector.h"
#include "workers.h"

/* Fewer floats than this are not worth a second thread. */
#define FEW 32768

/* Number of threads for work on `num_floats` floats. */
INLINE int64_t threads_for(int64_t num_threads, int64_t num_floats) { return num_floats > FEW ? num_threads : 1; }

INLINE float dot(const float *a, const float *b, int64_t n) {
    Vector sums = {};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) sums += load(a + i) * load(b + i);
    float sum = total(sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y = x w / rms(x); returns 1 / rms(x). */
INLINE float rms_norm(int64_t dim, float eps, const float *x, const float *weight, float *y) {
    const float rate = 1 / sqrtf(dot(x, x, dim) / dim + eps);
    for (int64_t i = 0; i < dim; i++) y[i] = x[i] * rate * weight[i];
    return rate;
}

/* `rms_norm` of `num` vectors of `dim` floats; `rates` keeps 1 / rms(x) for the backward. */
extern "C" void ovq_rms_norm(int64_t num_threads, int64_t num, int64_t dim, float eps, const float *x,
                             const float *weight, float *y, float *rates) {
    parallel_for(threads_for(num_threads, num * dim), num,
                 [=](int64_t t) { rates[t] = rms_norm(dim, eps, x + t * dim, weight, y + t * dim); });
}

/* `grad_weight` is [num_threads, dim], zero before: a partial sum per thread. */
extern "C" void ovq_rms_norm_backward(int64_t num_threads, int64_t num, int64_t dim, const float *x,
                                      const float *weight, const float *rates, const float *grad_y, float *grad_x,
                                      float *grad_weight) {
    parallel(num_threads, [=](Worker worker) {
        float *of_weight = grad_weight + worker.rank * dim;
        worker.share(num, [=](int64_t t) {
            const float *from = x + t * dim, *grad = grad_y + t * dim;
            float *to = grad_x + t * dim;
            const float rate = rates[t];
            Vector sums = {};
            int64_t i = 0;
            for (; i + VL <= dim; i += VL) sums += load(from + i) * load(grad + i) * load(weight + i);
            float sum = total(sums);
            for (; i < dim; i++) sum += from[i] * grad[i] * weight[i];
            const float along = sum * rate * rate / dim;
            for (i = 0; i < dim; i++) {
                to[i] = rate * (grad[i] * weight[i] - along * from[i]);
                of_weight[i] += grad[i] * from[i] * rate;
            }
        });
    });
}

/* 1 / (1 + exp(-x)) */
INLINE Vector sigmoid(Vector x) {
    const Vector e = exponential(x > 0.0f ? -x : x);
    return (x > 0.0f ? splat(1.0f) : e) / (1.0f + e);
}

/* Loads and stores of the last, incomplete vector. */
INLINE Vector load_some(const float *x, int64_t n) {
    float some[VL] = {};
    for (int64_t i = 0; i < n; i++) some[i] = x[i];
    return load(some);
}

INLINE void store_some(float *x, Vector y, int64_t n) {
    float some[VL];
    store(some, y);
    for (int64_t i = 0; i < n; i++) x[i] = some[i];
}

/* y = silu(gate) up. */
INLINE void swiglu(const float *gate, const float *up, int64_t dim, float *y) {
    int64_t i = 0;
    for (; i + VL <= dim; i += VL) {
        const Vector g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
    }
    if (i < dim) {
        const Vector g = load_some(gate + i, dim - i);
        store_some(y + i, g * sigmoid(g) * load_some(up + i, dim - i), dim - i);
    }
}

/* `swiglu` of x [num, 2 dim] = [gate | up] into y [num, dim]. */
extern "C" void ovq_swiglu(int64_t num_threads, int64_t num, int64_t dim, const float *x, float *y) {
    parallel_for(threads_for(num_threads, num * dim), num,
                 [=](int64_t t) { swiglu(x + t * 2 * dim, x + t * 2 * dim + dim, dim, y + t * dim); });
}

INLINE void swiglu_gradients(Vector g, Vector u, Vector grad, Vector *grad_g, Vector *grad_u) {
    const Vector s = sigmoid(g);
    *grad_u = grad * g * s;
    *grad_g = grad * u * s * (1.0f + g * (1.0f - s));
}

extern "C" void ovq_swiglu_backward(int64_t num_threads, int64_t num, int64_t dim, const float *x,
                                    const float *grad_y, float *grad_x) {
    parallel_for(threads_for(num_threads, num * dim), num, [=](int64_t t) {
        const float *gate = x + t * 2 * dim, *up = gate + dim, *grad = grad_y + t * dim;
        float *grad_gate = grad_x + t * 2 * dim, *grad_up = grad_gate + dim;
        Vector of_gate, of_up;
        int64_t i = 0;
        for (; i + VL <= dim; i += VL) {
            swiglu_gradients(load(gate + i), load(up + i), load(grad + i), &of_gate, &of_up);
            store(grad_gate + i, of_gate);
            store(grad_up + i, of_up);
        }
        if (const int64_t n = dim - i) {
            swiglu_gradients(load_some(gate + i, n), load_some(up + i, n), load_some(grad + i, n), &of_gate, &of_up);
            store_some(grad_gate + i, of_gate, n);
            store_some(grad_up + i, of_up, n);
        }
    });
}

/* Mirrored by mirrors.py: channels [rows, tokens, (q heads + 2 kv heads) dim] and what they are split into, all
   dense: q [rows, tokens, q heads, dim], k and v [rows, tokens, kv heads, dim]. Queries and keys are normalised to length 1,
   with factors `rates` [rows, tokens, q heads + kv heads], then rotated by the angles of their token (cos, sin [tokens, dim /
   2]; NULL for none). */
struct Heads {
    int64_t num_threads, num_rows, num_tokens, num_q_heads, num_kv_heads, dim;
    const float *channels, *cos, *sin;
    float *q, *k, *v, *rates;
    const float *grad_q, *grad_k, *grad_v;
    float *grad_channels;
};

/* x rotated by (cos, sin), pair by pair (i, i + half); y may be x. */
INLINE void rotate(const float *x, const float *cos, const float *sin, float sign, int64_t half, float *y) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        const Vector a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i) * sign;
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i], c = cos[i], s = sin[i] * sign;
        y[i] = a * c - b * s;
        y[half + i] = b * c + a * s;
    }
}

/* y = x scaled to length 1 and, where there are angles, rotated; returns the factor. y may be x. */
INLINE float unit_vector(const float *x, const float *cos, const float *sin, int64_t dim, float *y) {
    /* The epsilon only keeps the gradient of a zero vector finite. */
    const float rate = 1 / sqrtf(dot(x, x, dim) + 1e-12f);
    for (int64_t i = 0; i < dim; i++) y[i] = x[i] * rate;
    if (cos) rotate(y, cos, sin, 1, dim / 2, y);
    return rate;
}

extern "C" void ovq_heads(const Heads *call) {
    const int64_t num_q = call->num_q_heads, num_kv = call->num_kv_heads, dim = call->dim, half = dim / 2;
    const int64_t num_tokens = call->num_tokens, width = (num_q + 2 * num_kv) * dim;
    const int64_t num = call->num_rows * num_tokens;
    parallel_for(threads_for(call->num_threads, num * width), num, [=](int64_t t) {
        const float *x = call->channels + t * width;
        const int64_t place = t % num_tokens * half;
        for (int64_t h = 0; h < num_q + num_kv; h++, x += dim) {
            float *y = h < num_q ? call->q + (t * num_q + h) * dim : call->k + (t * num_kv + h - num_q) * dim;
            const float *cos = call->cos ? call->cos + place : nullptr, *sin = call->cos ? call->sin + place : nullptr;
            call->rates[t * (num_q + num_kv) + h] = unit_vector(x, cos, sin, dim, y);
        }
        memcpy(call->v + t * num_kv * dim, x, sizeof(float) * num_kv * dim);
    });
}

/* Rotations preserve dot products, so the gradient's component along the vector is removed before rotating back. */
extern "C" void ovq_heads_backward(const Heads *call) {
    const int64_t num_q = call->num_q_heads, num_kv = call->num_kv_heads, dim = call->dim, half = dim / 2;
    const int64_t num_tokens = call->num_tokens, width = (num_q + 2 * num_kv) * dim;
    const int64_t num = call->num_rows * num_tokens;
    parallel_for(threads_for(call->num_threads, num * width), num, [=](int64_t t) {
        float *to = call->grad_channels + t * width;
        const int64_t place = t % num_tokens * half;
        for (int64_t h = 0; h < num_q + num_kv; h++, to += dim) {
            const int64_t at = h < num_q ? (t * num_q + h) * dim : (t * num_kv + h - num_q) * dim;
            const float *y = (h < num_q ? call->q : call->k) + at;
            const float *grad = (h < num_q ? call->grad_q : call->grad_k) + at;
            const float along = dot(y, grad, dim), rate = call->rates[t * (num_q + num_kv) + h];
            for (int64_t i = 0; i < dim; i++) to[i] = rate * (grad[i] - along * y[i]);
            if (call->cos) rotate(to, call->cos + place, call->sin + place, -1, half, to);
        }
        memcpy(to, call->grad_v + t * num_kv * dim, sizeof(float) * num_kv * dim);
    });
}
