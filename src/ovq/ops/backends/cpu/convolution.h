/* The short convolution: every channel mixes its last few tokens. One pass forward, one backward. */
#pragma once

#include <cstdint>
#include <cstring>
#include <numeric>

#include "vector.h"
#include "workers.h"

/* Mirrored by mirrors.py. Tensors are dense; `taps` are [num_taps, channels], the last one for the
   token itself; `past` are [rows, num_taps - 1, channels], the tokens before the first, or NULL for zeros; `offset` is the
   number of tokens of the same sequence before each token of a row, or NULL if that is all of them. */
struct Convolution {
    int64_t num_rows, num_tokens, num_channels, num_taps, num_threads;
    const float *x, *past, *taps;
    const int64_t *offset;
    float *y;
    const float *grad_y;
    float *grad_x, *grad_past; /* `grad_past` is NULL where `past` is. */
    float *grad_taps;          /* [rows, num_taps, channels]: one gradient per row, zero before. */
};

/* Tokens per block of the backward, during which the gradients of the taps stay in registers. */
#define TOKENS_TOGETHER 8

/* Whether a token sees the one `back` before it. */
static int is_seen(const Convolution *call, int64_t token, int64_t back) {
    return !call->offset || back <= call->offset[token];
}

/* The vector at `token` of a row, which may lie in the past; NULL for a zero one. */
static const float *token_at(const Convolution *call, int64_t row, int64_t token) {
    if (token >= 0) return call->x + (row * call->num_tokens + token) * call->num_channels;
    if (!call->past) return nullptr;
    const int64_t num_past = call->num_taps - 1;
    return call->past + (row * num_past + num_past + token) * call->num_channels;
}

/* One token, all channels. `taps` is the number of taps, or 0 if it is not known at compile time. */
template <int64_t taps> static void convolve(const Convolution *call, int64_t row, int64_t t) {
    const int64_t last_tap = call->num_taps - 1, width = call->num_channels;
    float *y = call->y + (row * call->num_tokens + t) * width;
    int64_t d = 0;
    if (taps && t >= last_tap && !call->offset) {
        const float *x = token_at(call, row, t - last_tap);
        for (; d + VL <= width; d += VL) {
            Vector sum = {};
            for (int64_t i = 0; i < taps; i++) sum += load(call->taps + i * width + d) * load(x + i * width + d);
            store(y + d, sum);
        }
    }
    memset(y + d, 0, sizeof(float) * (width - d));
    for (int64_t back = last_tap; back >= 0 && d < width; back--) {
        const float *x = is_seen(call, t, back) ? token_at(call, row, t - back) : nullptr;
        if (!x) continue;
        const float *tap = call->taps + (last_tap - back) * width;
        for (int64_t c = d; c < width; c++) y[c] += tap[c] * x[c];
    }
}

/* The gradients of token t, channels first..end-1. */
static void convolve_backward(const Convolution *call, int64_t row, int64_t t, int64_t first, int64_t end) {
    const int64_t last_tap = call->num_taps - 1, width = call->num_channels;
    float *grad_x = t < 0 ? call->grad_past + (row * last_tap + last_tap + t) * width
                          : call->grad_x + (row * call->num_tokens + t) * width;
    memset(grad_x + first, 0, sizeof(float) * (end - first));
    const float *x = token_at(call, row, t);
    /* Every token that sees this one. */
    for (int64_t back = t < 0 ? -t : 0; back <= last_tap && t + back < call->num_tokens; back++) {
        if (!is_seen(call, t + back, back)) continue;
        const float *grad_y = call->grad_y + (row * call->num_tokens + t + back) * width;
        const float *tap = call->taps + (last_tap - back) * width;
        float *grad_tap = call->grad_taps + (row * call->num_taps + last_tap - back) * width;
        for (int64_t d = first; d < end; d++) {
            grad_x[d] += tap[d] * grad_y[d];
            grad_tap[d] += x[d] * grad_y[d];
        }
    }
}

/* `convolve_backward` for several tokens, from t on, each seen by as many tokens as there are taps. Everything is added in
   the same order. */
template <int64_t taps>
static void convolve_backward_together(const Convolution *call, int64_t row, int64_t t, int64_t first, int64_t end) {
    const int64_t width = call->num_channels, place = (row * call->num_tokens + t) * width;
    float *grad_taps = call->grad_taps + row * taps * width;
    int64_t d = first;
    for (; d + VL <= end; d += VL) {
        Vector tap[taps], grad_tap[taps], grad_y[TOKENS_TOGETHER + taps - 1];
        for (int64_t i = 0; i < taps; i++) {
            tap[i] = load(call->taps + i * width + d);
            grad_tap[i] = load(grad_taps + i * width + d);
        }
        for (int64_t i = 0; i < TOKENS_TOGETHER + taps - 1; i++) grad_y[i] = load(call->grad_y + place + i * width + d);
        for (int64_t i = 0; i < TOKENS_TOGETHER; i++) {
            const Vector x = load(call->x + place + i * width + d);
            Vector sum = {};
            for (int64_t back = 0; back < taps; back++) {
                sum += tap[taps - 1 - back] * grad_y[i + back];
                grad_tap[taps - 1 - back] += x * grad_y[i + back];
            }
            store(call->grad_x + place + i * width + d, sum);
        }
        for (int64_t i = 0; i < taps; i++) store(grad_taps + i * width + d, grad_tap[i]);
    }
    for (int64_t i = 0; i < TOKENS_TOGETHER && d < end; i++) convolve_backward(call, row, t + i, d, end);
}

template <int64_t taps> static void convolve_all(const Convolution *call, int is_backward) {
    const int64_t num_tokens = call->num_tokens, width = call->num_channels;
    if (!is_backward) {
        parallel_for(call->num_threads, call->num_rows * num_tokens,
                     [=](int64_t i) { convolve<taps>(call, i / num_tokens, i % num_tokens); });
        return;
    }
    /* Tokens run in order, as all add to the gradients of the taps. Channels are split, into whole cache lines, only where
       rows do not divide evenly among threads: memory is read fastest from one end to the other. */
    const int64_t threads = call->num_threads > 1 ? call->num_threads : 1;
    const int64_t num_parts = threads / std::gcd(call->num_rows, threads);
    const int64_t part_width = padded((width + num_parts - 1) / num_parts, 16);
    parallel_for(threads, call->num_rows * num_parts, [=](int64_t part) {
        const int64_t row = part / num_parts, first = part % num_parts * part_width;
        const int64_t end = least(first + part_width, width);
        if (first >= end) return;
        for (int64_t t = call->grad_past ? 1 - call->num_taps : 0; t < num_tokens; t++) {
            if constexpr (taps > 0)
                for (; t >= 0 && t + TOKENS_TOGETHER + taps - 1 <= num_tokens && !call->offset; t += TOKENS_TOGETHER)
                    convolve_backward_together<taps>(call, row, t, first, end);
            convolve_backward(call, row, t, first, end);
        }
    });
}

/* The usual numbers of taps are known at compile time. */
static void convolve_all(const Convolution *call, int is_backward) {
    if (call->num_taps == 4) return convolve_all<4>(call, is_backward);
    if (call->num_taps == 3) return convolve_all<3>(call, is_backward);
    convolve_all<0>(call, is_backward);
}
