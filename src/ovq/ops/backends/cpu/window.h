/* Softmax attention over a sliding window, block by block of queries: forward and backward, O(tokens * window). */
#pragma once

#include "call.h"
#include "tokens.h"

/* Queries per block. Their windows overlap, so that few keys are loaded in vain. */
#define TOGETHER 64

/* A float tensor with dense vectors, and its strides of rows, tokens and heads. */
struct Strided {
    float *data;
    int64_t row, token, head;
};

/* Mirrored by mirrors.py. q [rows, tokens, heads, dim] attends to k and v [rows, tokens before + tokens, kv
   heads, ...]: token t to the keys from t - window + 1, or from `first` [rows, tokens] if later, to t. `lse` [rows, heads,
   tokens] is kept for the backward, whose `grad_k` and `grad_v` [rows, kv heads, keys, padded to whole vectors] are zero
   before. */
struct Window {
    int64_t num_threads, num_rows, num_tokens, num_keys, num_heads, num_kv_heads, key_dim, value_dim, window;
    const float *scale;   /* [heads] */
    const int64_t *first; /* Or NULL. */
    Strided q, k, v, o;
    float *lse;
    Strided grad_o, grad_q;
    float *grad_k, *grad_v;
    double *grad_scale; /* [rows, heads] */
};

/* Scratch of a thread, for one block of queries. */
struct WindowScratch {
    float *key_columns, *keys, *value_columns, *values, *queries, *scores, *grads, *outs, *grad_outs, *inner;
};

INLINE float *vector_at(Strided x, int64_t row, int64_t token, int64_t head) {
    return x.data + row * x.row + token * x.token + head * x.head;
}

/* The first key that a query sees, never earlier than that of the query before. */
INLINE int64_t first_key(const Window *call, int64_t row, int64_t token) {
    const int64_t last = call->num_keys - call->num_tokens + token, from = last - call->window + 1;
    const int64_t own = call->first ? call->first[row * call->num_tokens + token] : 0;
    return from > own ? from : own;
}

static int64_t most_keys(const Window *call) {
    return padded(least(call->num_keys, call->window + TOGETHER - 1), NR);
}

static WindowScratch take_scratch(Arena *arena, const Window *call) {
    const int64_t n = most_keys(call), lk = padded(call->key_dim, NR), lv = padded(call->value_dim, NR);
    WindowScratch own;
    take_each(arena, n * lk, &own.key_columns, &own.keys);
    take_each(arena, n * lv, &own.value_columns, &own.values);
    own.queries = TAKE(arena, float, TOGETHER * lk);
    take_each(arena, TOGETHER * n, &own.scores, &own.grads);
    own.outs = TAKE(arena, float, TOGETHER * (lk > lv ? lk : lv));
    own.grad_outs = TAKE(arena, float, TOGETHER * lv);
    own.inner = TAKE(arena, float, TOGETHER);
    return own;
}

/* Copies vectors [num, dim] into panels of columns and into rows of `ld` floats, each unless NULL. */
static void load_vectors(Strided x, int64_t row, int64_t head, int64_t from, int64_t num, int64_t dim, float *columns,
                         float *rows, int64_t ld) {
    for (int64_t j = 0; j < num; j++) {
        const float *vector = vector_at(x, row, from + j, head);
        if (columns) put_column(columns, dim, j, vector);
        if (rows) memcpy(rows + j * ld, vector, sizeof(float) * dim);
    }
}

/* Scores of a block of queries (rows of `queries`, scaled here) with `num` keys from key `from` on, -inf outside of
   the windows. */
static void window_scores(const Window *call, int64_t row, int64_t head, int64_t token, int64_t num_queries,
                          int64_t from, int64_t num, WindowScratch *own) {
    const int64_t dim = call->key_dim, ld = padded(dim, NR), n = padded(num, NR);
    const float scale = call->scale[head];
    for (int64_t i = 0; i < num_queries; i++) {
        const float *q = vector_at(call->q, row, token + i, head);
        for (int64_t d = 0; d < dim; d++) own->queries[i * ld + d] = q[d] * scale;
    }
    product(num_queries, n, dim, own->queries, ld, 1, own->key_columns, dim * NR, NR, nullptr, 0, own->scores, n);
    for (int64_t i = 0; i < num_queries; i++) {
        float *scores = own->scores + i * n;
        const int64_t begin = first_key(call, row, token + i) - from;
        const int64_t end = call->num_keys - call->num_tokens + token + i + 1 - from;
        for (int64_t j = 0; j < begin; j++) scores[j] = -INFINITY;
        for (int64_t j = end; j < n; j++) scores[j] = -INFINITY;
    }
}

static void window_forward(const Window *call, int64_t row, int64_t kv_head, int64_t token, WindowScratch *own) {
    const int64_t group = call->num_heads / call->num_kv_heads, num_past = call->num_keys - call->num_tokens;
    const int64_t num_queries = least(TOGETHER, call->num_tokens - token);
    const int64_t from = first_key(call, row, token), num = num_past + token + num_queries - from;
    const int64_t n = padded(num, NR), ld = padded(call->value_dim, NR);
    load_vectors(call->k, row, kv_head, from, num, call->key_dim, own->key_columns, nullptr, 0);
    load_vectors(call->v, row, kv_head, from, num, call->value_dim, nullptr, own->values, ld);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        window_scores(call, row, head, token, num_queries, from, num, own);
        for (int64_t i = 0; i < num_queries; i++) {
            float *scores = own->scores + i * n;
            Vector best = splat(-INFINITY), sums = {};
            for (int64_t j = 0; j < n; j += VL) best = higher_of(best, load(scores + j));
            const float shift = highest(best);
            for (int64_t j = 0; j < n; j += VL) {
                const Vector p = exponential(load(scores + j) - shift);
                store(scores + j, p);
                sums += p;
            }
            const float sum = total(sums);
            own->inner[i] = 1 / sum;
            call->lse[(row * call->num_heads + head) * call->num_tokens + token + i] = shift + logf(sum);
        }
        product(num_queries, padded(call->value_dim, VL), num, own->scores, n, 1, own->values, NR, ld, nullptr, 0,
                own->outs, ld);
        for (int64_t i = 0; i < num_queries; i++) {
            float *o = vector_at(call->o, row, token + i, head);
            for (int64_t d = 0; d < call->value_dim; d++) o[d] = own->outs[i * ld + d] * own->inner[i];
        }
    }
}

/* Attention of the only token of a call, as in decoding; keys and values are read in place. */
static void window_read_one(const Window *call, int64_t row, int64_t head, float *scores) {
    const int64_t kv_head = head / (call->num_heads / call->num_kv_heads);
    const int64_t from = first_key(call, row, 0), num = call->num_keys - from;
    const float *q = vector_at(call->q, row, 0, head);
    float *o = vector_at(call->o, row, 0, head), best = -INFINITY, sum = 0;
    for (int64_t j = 0; j < num; j++) {
        scores[j] = dot(q, vector_at(call->k, row, from + j, kv_head), call->key_dim) * call->scale[head];
        best = scores[j] > best ? scores[j] : best;
    }
    memset(o, 0, sizeof(float) * call->value_dim);
    for (int64_t j = 0; j < num; j++) {
        const float p = expf(scores[j] - best), *v = vector_at(call->v, row, from + j, kv_head);
        for (int64_t d = 0; d < call->value_dim; d++) o[d] += p * v[d];
        sum += p;
    }
    for (int64_t d = 0; d < call->value_dim; d++) o[d] /= sum;
    call->lse[row * call->num_heads + head] = best + logf(sum);
}

static void window_backward(const Window *call, int64_t row, int64_t kv_head, int64_t token, WindowScratch *own) {
    const int64_t group = call->num_heads / call->num_kv_heads, num_past = call->num_keys - call->num_tokens;
    const int64_t num_queries = least(TOGETHER, call->num_tokens - token);
    const int64_t from = first_key(call, row, token), num = num_past + token + num_queries - from;
    const int64_t n = padded(num, NR);
    const int64_t key_dim = call->key_dim, value_dim = call->value_dim;
    const int64_t lk = padded(key_dim, NR), lv = padded(value_dim, NR);
    const int64_t wide_key = padded(key_dim, VL), wide_value = padded(value_dim, VL);
    load_vectors(call->k, row, kv_head, from, num, key_dim, own->key_columns, own->keys, lk);
    load_vectors(call->v, row, kv_head, from, num, value_dim, own->value_columns, nullptr, 0);
    const int64_t at = (row * call->num_kv_heads + kv_head) * call->num_keys + from;
    float *grad_k = call->grad_k + at * wide_key, *grad_v = call->grad_v + at * wide_value;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        window_scores(call, row, head, token, num_queries, from, num, own);
        load_vectors(call->grad_o, row, head, token, num_queries, value_dim, nullptr, own->grad_outs, lv);
        const float *lse = call->lse + (row * call->num_heads + head) * call->num_tokens + token;
        for (int64_t i = 0; i < num_queries; i++) {
            float *scores = own->scores + i * n;
            const float *o = vector_at(call->o, row, token + i, head), *grad = own->grad_outs + i * lv;
            float inner = 0;
            for (int64_t d = 0; d < value_dim; d++) inner += o[d] * grad[d];
            own->inner[i] = inner;
            /* Rounding may put a score a little above the log-sum-exp. */
            for (int64_t j = 0; j < n; j += VL)
                store(scores + j, exponential(lower_of(load(scores + j) - lse[i], Vector{})));
        }
        /* dS = P (dP - sum(P dP)), and sum(P dP) = sum(o do). */
        product(num_queries, n, value_dim, own->grad_outs, lv, 1, own->value_columns, value_dim * NR, NR, nullptr, 0,
                own->grads, n);
        for (int64_t i = 0; i < num_queries; i++)
            for (int64_t j = i * n; j < (i + 1) * n; j += VL)
                store(own->grads + j, load(own->scores + j) * (load(own->grads + j) - own->inner[i]));
        product(num, wide_value, num_queries, own->scores, 1, n, own->grad_outs, NR, lv, grad_v, wide_value, grad_v,
                wide_value);
        product(num, wide_key, num_queries, own->grads, 1, n, own->queries, NR, lk, grad_k, wide_key, grad_k,
                wide_key);
        product(num_queries, wide_key, num, own->grads, n, 1, own->keys, NR, lk, nullptr, 0, own->outs, lk);
        double of_scale = 0;
        for (int64_t i = 0; i < num_queries; i++) {
            const float *q = vector_at(call->q, row, token + i, head), *grad = own->outs + i * lk;
            float *grad_q = vector_at(call->grad_q, row, token + i, head);
            float sum = 0;
            for (int64_t d = 0; d < key_dim; d++) {
                sum += grad[d] * q[d];
                grad_q[d] = grad[d] * call->scale[head];
            }
            of_scale += sum;
        }
        call->grad_scale[row * call->num_heads + head] += of_scale;
    }
}

/* Returns 0, or 1 if out of memory. */
static int run_window(const Window *call, int is_backward) {
    const int64_t streams = call->num_rows * call->num_kv_heads, blocks = (call->num_tokens + TOGETHER - 1) / TOGETHER;
    /* In the backward, the blocks of a head run one after the other, as they add to the same keys. */
    const int64_t tasks = is_backward ? streams : streams * blocks;
    int is_out_of_memory = 0;
    parallel(call->num_tokens > 1 ? call->num_threads : 1, [&](Worker worker) {
        WindowScratch own;
        char *memory = allocate([&](Arena *arena) { own = take_scratch(arena, call); });
        if (!memory) __atomic_store_n(&is_out_of_memory, 1, __ATOMIC_RELAXED);
        worker.share(memory ? tasks : 0, [&](int64_t task) {
            const int64_t stream = is_backward ? task : task / blocks, group = call->num_heads / call->num_kv_heads;
            const int64_t row = stream / call->num_kv_heads, head = stream % call->num_kv_heads;
            if (!is_backward && call->num_tokens == 1)
                for (int64_t g = 0; g < group; g++) window_read_one(call, row, head * group + g, own.scores);
            else if (!is_backward) window_forward(call, row, head, task % blocks * TOGETHER, &own);
            else
                for (int64_t block = 0; block < blocks; block++)
                    window_backward(call, row, head, block * TOGETHER, &own);
        });
        free(memory);
    });
    return is_out_of_memory;
}

extern "C" int ovq_window_forward(const Window *call) { return run_window(call, 0); }
extern "C" int ovq_window_backward(const Window *call) { return run_window(call, 1); }
/* Lanes of a vector, to which `grad_k` and `grad_v` are padded. */
extern "C" int ovq_lanes(void) { return VL; }
