/* The short convolution: every channel mixes its last few tokens. One pass forward, one backward. */
#pragma once

#include <cstdint>
#include <cstring>

#include "workers.h"

/* Mirrored by `_Convolution` in convolution.py. Tensors are dense; `taps` are [num_taps, channels], the last one that
   of the token itself; `past` are [rows, num_taps - 1, channels], the tokens before the first, or NULL for zeros;
   `offset` says how many tokens of its own sequence come before each token of a row, or is NULL for all of them. */
struct Convolution {
    int64_t num_rows, num_tokens, num_channels, num_taps, num_threads;
    const float *x, *past, *taps;
    const int64_t *offset;
    float *y;
    const float *grad_y;
    float *grad_x, *grad_past; /* `grad_past` is NULL where `past` is. */
    float *grad_taps;          /* [rows, num_taps, channels]: that of each row by itself, zero before. */
};

/* Channels that a thread works on at a time: a few rows of them stay in its first-level cache. */
#define CHANNELS 256

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

static void convolve(const Convolution *call, int64_t row, int64_t first, int64_t num) {
    const int64_t last_tap = call->num_taps - 1;
    for (int64_t t = 0; t < call->num_tokens; t++) {
        float *y = call->y + (row * call->num_tokens + t) * call->num_channels + first;
        memset(y, 0, sizeof(float) * num);
        for (int64_t back = last_tap; back >= 0; back--) {
            const float *x = is_seen(call, t, back) ? token_at(call, row, t - back) : nullptr;
            if (!x) continue;
            const float *tap = call->taps + (last_tap - back) * call->num_channels + first;
            for (int64_t d = 0; d < num; d++) y[d] += tap[d] * x[first + d];
        }
    }
}

static void convolve_backward(const Convolution *call, int64_t row, int64_t first, int64_t num) {
    const int64_t last_tap = call->num_taps - 1, width = call->num_channels;
    const int64_t begin = call->grad_past ? -last_tap : 0;
    for (int64_t t = begin; t < call->num_tokens; t++) {
        float *grad_x = t < 0 ? call->grad_past + (row * last_tap + last_tap + t) * width
                              : call->grad_x + (row * call->num_tokens + t) * width;
        grad_x += first;
        memset(grad_x, 0, sizeof(float) * num);
        const float *x = token_at(call, row, t) + first;
        /* Every later token that has this one in sight. */
        for (int64_t back = t < 0 ? -t : 0; back <= last_tap && t + back < call->num_tokens; back++) {
            if (!is_seen(call, t + back, back)) continue;
            const float *grad_y = call->grad_y + (row * call->num_tokens + t + back) * width + first;
            const float *tap = call->taps + (last_tap - back) * width + first;
            float *grad_tap = call->grad_taps + (row * call->num_taps + last_tap - back) * width + first;
            for (int64_t d = 0; d < num; d++) {
                grad_x[d] += tap[d] * grad_y[d];
                grad_tap[d] += x[d] * grad_y[d];
            }
        }
    }
}

static void convolve_all(const Convolution *call, int is_backward) {
    const int64_t num_parts = (call->num_channels + CHANNELS - 1) / CHANNELS;
    parallel_for(call->num_threads, call->num_rows * num_parts, [=](int64_t part) {
        const int64_t row = part / num_parts, first = part % num_parts * CHANNELS;
        const int64_t num = first + CHANNELS < call->num_channels ? CHANNELS : call->num_channels - first;
        if (is_backward) convolve_backward(call, row, first, num);
        else convolve(call, row, first, num);
    });
}
