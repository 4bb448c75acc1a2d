/* Layers for a few tokens at a time, as in decoding: products that read each weight once, and the operations between them. */
#pragma once

#include "call.h"
#include "decode.h"
#include "matrix.h"
#include "memory.h"
#include "tokens.h"

/* Up to this many tokens of all rows are few; many are multiplied TOKEN_BLOCK at a time. */
#define FEW_ROWS 32
#define TOKEN_BLOCK 64

/* y [num, ldy] = x [num, dim] times the transpose of a matrix [num_out, dim], plus `added` if there is any. The workers
   share the rows of the matrix, ABREAST at a time, and do not wait for each other. */
static void multiply(Worker worker, int64_t num, int64_t dim, int64_t num_out, const float *x, const Matrix *matrix,
                     const float *added, float *y, int64_t ldy) {
    worker.part((num_out + ABREAST - 1) / ABREAST, [=](int64_t begin, int64_t end) {
        multiply_part(matrix, begin * ABREAST, least(num_out, end * ABREAST), num, dim, x, added, y, ldy);
    });
}

/* Ends with a barrier, as `multiply_gated` and `add_mlp` do. */
static void normalise(Worker worker, int64_t num, int64_t dim, float eps, const float *x, const float *weight, float *y) {
    worker.share(num, [=](int64_t t) { rms_norm(dim, eps, x + t * dim, weight, y + t * dim); });
    worker.wait();
}

/* y [num, inner] = silu(gate x) up x of x [num, dim]. A thread computes the same rows of both products and of y. `halves` has
   num 2 inner floats. */
static void multiply_gated(Worker worker, int64_t num, int64_t dim, int64_t inner, const float *x, const Matrix *gate,
                           const Matrix *up, float *halves, float *y) {
    worker.part((inner + ABREAST - 1) / ABREAST, [=](int64_t begin, int64_t end) {
        const int64_t first = begin * ABREAST, last = least(inner, end * ABREAST);
        multiply_part(gate, first, last, num, dim, x, nullptr, halves, 2 * inner);
        multiply_part(up, first, last, num, dim, x, nullptr, halves + inner, 2 * inner);
        for (int64_t t = 0; t < num; t++) {
            const float *own = halves + t * 2 * inner + first;
            swiglu(own, own + inner, last - first, y + t * inner + first);
        }
    });
    worker.wait();
}

extern "C" void ovq_linear(int64_t num_threads, int64_t num, int64_t dim, int64_t num_out, const float *x,
                           const float *weight, float *y) {
    const Matrix matrix = {weight, nullptr, nullptr, FLOAT32};
    parallel(threads_for(num_threads, num_out * dim),
             [=, &matrix](Worker worker) { multiply(worker, num, dim, num_out, x, &matrix, nullptr, y, num_out); });
}

/* y [num, num_out] = matrix norm(x) of tokens x [num, dim]. `norm` is the weight of an RMS norm, with num dim floats of
   `scratch`, or NULL for x itself. Workers share the tokens if there are many, else the rows of the matrix. */
extern "C" void ovq_matrix_product(int64_t num_threads, int64_t num, int64_t dim, int64_t num_out, float eps,
                                   const float *x, const float *norm, const Matrix *matrix, float *scratch, float *y) {
    parallel(threads_for(num_threads, num_out * dim), [=](Worker worker) {
        if (norm) normalise(worker, num, dim, eps, x, norm, scratch);
        const float *from = norm ? scratch : x;
        if (num <= FEW_ROWS) return multiply(worker, num, dim, num_out, from, matrix, nullptr, y, num_out);
        worker.share((num + TOKEN_BLOCK - 1) / TOKEN_BLOCK, [=](int64_t i) {
            const int64_t t = i * TOKEN_BLOCK;
            multiply(Worker{0, 1}, least(TOKEN_BLOCK, num - t), dim, num_out, from + t * dim, matrix, nullptr,
                     y + t * num_out, num_out);
        });
    });
}

/* The short convolution of one token x [num] of `num` channels: y from x and the inputs before it, `past` [num, taps - 1];
   `last` gets the inputs before the next token. `weight` is [num, taps]; y may be x. */
INLINE void convolve_token(int64_t num, int64_t num_taps, const float *x, const float *past, const float *weight,
                           float *y, float *last) {
    const int64_t num_past = num_taps - 1;
    for (int64_t d = 0; d < num; d++, past += num_past, last += num_past, weight += num_taps) {
        const float own = x[d];
        float sum = weight[num_past] * own;
        for (int64_t i = num_past - 1; i >= 0; i--) sum += weight[i] * past[i];
        memcpy(last, past + 1, sizeof(float) * (num_past - 1));
        last[num_past - 1] = own;
        y[d] = sum;
    }
}

extern "C" void ovq_convolution_step(int64_t num_rows, int64_t num_channels, int64_t num_taps, const float *x,
                                     const float *past, const float *weight, float *y, float *last) {
    for (int64_t t = 0; t < num_rows; t++) {
        const int64_t at = t * num_channels, kept = at * (num_taps - 1);
        convolve_token(num_channels, num_taps, x + at, past + kept, weight, y + at, last + kept);
    }
}

/* Mirrored by mirrors.py: a layer of attention and MLP, for one token of each row; in a converted model, for
   `num_tokens` of each. Tensors are dense but for the strides given. The kernel sets q, k, v, o, their strides, the scale and
   the token weights of `memory`. */
struct Layer {
    int64_t width, inner, num_taps, angle_row, num_tokens;
    double mixer_eps, mlp_eps, head_eps;
    Matrix q, k, v, o, gate, up, down;
    Matrix output_gate;          /* [H V, width]. */
    const float *output_norm;    /* [V] of the RMS norm of gated outputs, with `head_eps`; NULL without an output gate. */
    const float *mixer_norm, *mlp_norm;
    const float *beta;           /* [H], temperatures of heads with q and k of length 1; NULL without this normalisation. */
    const float *q_norm, *k_norm; /* [K] of RMS norms of heads, or NULL. */
    const float *merge_gate;     /* [Hkv, width], or NULL. */
    /* The forget gate's weight [Hkv, width] and bias [Hkv], or NULL; the sum of log_forget over the pending tokens, without
       and with the new one, [R, Hkv]; and the lower bound of a token's log_forget. */
    const float *forget_gate, *forget_bias;
    const double *forgotten;
    double *forgotten_now;
    double least_log;
    const float *cos, *sin;     /* [K / 2] angles of a token, `angle_row` apart, or NULL. */
    const float *taps, *past;   /* Convolution: [channels, taps], [R, channels, taps - 1]; NULL without one. */
    float *last;
    /* Exact tokens to copy in front of the new one: [R, Hkv, num_before, ...], vectors dense; or NULL. */
    const float *keys_before, *values_before;
    int64_t num_before, key_row, key_head, value_row, value_head;
    Decode memory;
    /* Heads of a converted model; only the sizes in `memory` are used then. Queries are multiplied by `score_scale`. Keys are
       multiplied, and queries divided, by `key_factors` [Hkv, K], unless NULL. */
    int64_t num_groups;
    const HeadGroup *groups;
    double score_scale;
    const float *key_factors;
};

/* What `ovq_layers_step` returns. Mirrored in layer.py. */
enum { DONE, INVALID_WEIGHT, OUT_OF_MEMORY };

/* Intermediate results of a layer, all [R tokens, ...] but the scale [H]. */
struct Buffers {
    float *normed, *channels, *gates, *read, *mixed, *of_mlp, *weights, *scale;
    uint16_t *narrow; /* Keys and values in 2 bytes, if memories store them so. */
};

static Buffers take_buffers(Arena *arena, const Layer *layer) {
    const Decode *memory = &layer->memory;
    const int64_t rows = memory->num_rows * layer->num_tokens, num_heads = memory->num_kv_heads * memory->group_size;
    Buffers buffers;
    buffers.normed = TAKE(arena, float, rows * layer->width);
    buffers.channels = TAKE(arena, float, rows * (num_heads + 2 * memory->num_kv_heads) * memory->key_dim);
    buffers.gates = TAKE(arena, float, layer->output_norm ? rows * num_heads * memory->value_dim : 0);
    buffers.read = TAKE(arena, float, rows * num_heads * memory->value_dim);
    buffers.mixed = TAKE(arena, float, rows * layer->width);
    buffers.of_mlp = TAKE(arena, float, rows * (layer->width + 3 * layer->inner));
    buffers.weights = TAKE(arena, float, rows * memory->num_kv_heads);
    buffers.scale = TAKE(arena, float, num_heads);
    buffers.narrow = TAKE(arena, uint16_t, rows * 2 * memory->num_kv_heads * memory->key_dim);
    return buffers;
}

/* Bytes of scratch that layers need in each lane; they use it one after the other. */
extern "C" int ovq_layers_scratch(int64_t num_layers, const Layer *layers) {
    size_t most = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        Arena arena = {};
        take_buffers(&arena, layers + i);
        most = arena.used > most ? arena.used : most;
    }
    return (int)most;
}

/* Convolves, normalises and rotates `num` heads of the token of a row from `head` on; values are only convolved. `norm` is
   the weight of an RMS norm, or NULL. */
static void make_heads(const Layer *layer, int64_t row, int64_t head, int64_t num, int is_value, const float *norm,
                       float *channels) {
    const int64_t dim = layer->memory.key_dim, taps = layer->num_taps;
    const int64_t num_channels = layer->memory.num_kv_heads * (layer->memory.group_size + 2) * dim, at = head * dim;
    const float *cos = layer->cos ? layer->cos + row * layer->angle_row : nullptr;
    const float *sin = layer->cos ? layer->sin + row * layer->angle_row : nullptr;
    float *x = channels + row * num_channels + at;
    if (layer->taps) {
        const int64_t kept = (row * num_channels + at) * (taps - 1);
        convolve_token(num * dim, taps, x, layer->past + kept, layer->taps + at * taps, x, layer->last + kept);
    }
    for (int64_t i = 0; !is_value && i < num; i++, x += dim) {
        if (norm) rms_norm(dim, layer->head_eps, x, norm, x);
        if (layer->beta) unit_vector(x, cos, sin, dim, x);
        else if (cos) rotate(x, cos, sin, 1, dim / 2, x);
    }
}

/* Makes the queries, the key and the value of a key/value head of a row, in place among the channels. */
static void make_stream(const Layer *layer, int64_t row, int64_t head, float *channels) {
    const int64_t group = layer->memory.group_size, num_kv = layer->memory.num_kv_heads, first = num_kv * group;
    make_heads(layer, row, head * group, group, 0, layer->q_norm, channels);
    make_heads(layer, row, first + head, 1, 0, layer->k_norm, channels);
    make_heads(layer, row, first + num_kv + head, 1, 1, nullptr, channels);
}

/* The weight of the token of a row in a head, from the gates (docs/method/math.md, sections 8 and 10). */
static float token_weight(const Layer *layer, const float *x, int64_t stream, int64_t head) {
    float weight = 1;
    if (layer->merge_gate) {
        const float y = long_dot(x, layer->merge_gate + head * layer->width, layer->width);
        weight = y > 0 ? 1 + y : 1 + expm1f(y);
    }
    if (layer->forget_gate) {
        const float y = long_dot(x, layer->forget_gate + head * layer->width, layer->width) + layer->forget_bias[head];
        const float log_sigmoid = fminf(y, 0) - log1pf(expf(-fabsf(y)));
        const double sum = layer->forgotten[stream] + fmax(log_sigmoid, layer->least_log);
        layer->forgotten_now[stream] = sum;
        weight *= (float)exp(-sum);
    }
    return weight;
}

/* Copies vectors [num, dim] of a head to the beginning of its part of a dense tensor. */
static void copy_before(const float *from, int64_t num, int64_t dim, void *to, int64_t place) {
    memcpy((float *)to + place * dim, from, sizeof(float) * num * dim);
}

/* One key/value head of a row, from channels to attention outputs. */
static void read_stream(const Layer *layer, const Decode *memory, int64_t row, int64_t head, Buffers buffers,
                        int *outcome) {
    const int64_t stream = row * memory->num_kv_heads + head;
    make_stream(layer, row, head, buffers.channels);
    if (layer->merge_gate || layer->forget_gate) {
        const float weight = token_weight(layer, buffers.normed + row * layer->width, stream, head);
        buffers.weights[stream] = weight;
        if (!(weight >= 0 && weight < INFINITY)) __atomic_store_n(outcome, INVALID_WEIGHT, __ATOMIC_RELAXED);
    }
    if (layer->keys_before) {
        const int64_t place = stream * memory->chunk_size, num = layer->num_before;
        copy_before(layer->keys_before + row * layer->key_row + head * layer->key_head, num, memory->key_dim,
                    memory->pending_keys, place);
        copy_before(layer->values_before + row * layer->value_row + head * layer->value_head, num, memory->value_dim,
                    memory->pending_values, place);
    }
    decode_stream(memory, row, head);
    const int64_t dim = memory->value_dim, first = stream * memory->group_size;
    for (int64_t i = first; layer->output_norm && i < first + memory->group_size; i++) {
        float *o = buffers.read + i * dim;
        rms_norm(dim, layer->head_eps, o, layer->output_norm, o);
        swiglu(buffers.gates + i * dim, o, dim, o);
    }
}

/* `read_stream` for head `place` of a group, in a converted model; returns 1 if out of memory. */
static int read_group(const Layer *layer, const HeadGroup *group, int64_t row, int64_t place, Buffers buffers) {
    const int64_t dim = layer->memory.key_dim, num_kv = layer->memory.num_kv_heads, size = layer->memory.group_size;
    const int64_t num_heads = num_kv * size, num_channels = (num_heads + 2 * num_kv) * dim, head = group->heads[place];
    const int64_t num_tokens = layer->num_tokens, num_narrow = 2 * num_kv * dim;
    const float *factors = layer->key_factors ? layer->key_factors + head * dim : nullptr;
    const int is_narrow = group->dtype != FLOAT32;
    for (int64_t t = row * num_tokens; t < (row + 1) * num_tokens; t++) {
        float *queries = buffers.channels + t * num_channels + head * size * dim;
        float *key = buffers.channels + t * num_channels + (num_heads + head) * dim, *value = key + num_kv * dim;
        make_stream(layer, t, head, buffers.channels);
        for (int64_t i = 0; i < size * dim; i++) {
            queries[i] *= (float)layer->score_scale;
            if (factors) queries[i] /= factors[i % dim];
        }
        for (int64_t i = 0; factors && i < dim; i++) key[i] *= factors[i];
        if (!is_narrow) continue;
        write_numbers(group->dtype, buffers.narrow + t * num_narrow, head * dim, dim, 1, key);
        write_numbers(group->dtype, buffers.narrow + t * num_narrow, (num_kv + head) * dim, dim, 1, value);
    }
    HeadGroup own = *group;
    own.query_dtype = FLOAT32;
    own.q = buffers.channels, own.o = buffers.read;
    own.q_at = {num_tokens * num_channels, dim, num_channels};
    own.o_at = {num_tokens * num_heads * dim, dim, num_heads * dim};
    own.k = buffers.channels + num_heads * dim, own.v = buffers.channels + (num_heads + num_kv) * dim;
    own.k_at = own.v_at = own.q_at;
    if (is_narrow) {
        own.k = buffers.narrow, own.v = buffers.narrow + num_kv * dim;
        own.k_at = own.v_at = {num_tokens * num_narrow, dim, num_narrow};
    }
    /* Few are read one by one, so that a token's output is the same, bit by bit, however many come with it. */
    return read_stream(&own, row, place, FEW_ROWS);
}

/* y = x + down(silu(gate z) up z), z = norm(x), for a few tokens x [num, width]: the second half of a layer. `scratch` has
   num (width + 3 inner) floats. */
static void add_mlp(Worker worker, const Layer *layer, int64_t num, const float *x, float *scratch, float *y) {
    const int64_t dim = layer->width, inner = layer->inner;
    float *normed = scratch, *halves = normed + num * dim, *gated = halves + num * 2 * inner;
    normalise(worker, num, dim, layer->mlp_eps, x, layer->mlp_norm, normed);
    multiply_gated(worker, num, dim, inner, normed, &layer->gate, &layer->up, halves, gated);
    multiply(worker, num, inner, dim, gated, &layer->down, x, y, dim);
    worker.wait();
}

/* Queries, keys and values of the tokens from `first` on, `num` of them: the first half of a layer up to its memory. */
static void make_channels(Worker worker, const Layer *layer, const Buffers &buffers, int64_t first, int64_t num,
                          const float *x) {
    const Decode *memory = &layer->memory;
    const int64_t width = layer->width, num_kv = memory->num_kv_heads * memory->key_dim;
    const int64_t num_q = num_kv * memory->group_size, num_channels = num_q + 2 * num_kv;
    float *normed = buffers.normed + first * width, *channels = buffers.channels + first * num_channels;
    normalise(worker, num, width, layer->mixer_eps, x + first * width, layer->mixer_norm, normed);
    multiply(worker, num, width, num_q, normed, &layer->q, nullptr, channels, num_channels);
    multiply(worker, num, width, num_kv, normed, &layer->k, nullptr, channels + num_q, num_channels);
    multiply(worker, num, width, num_kv, normed, &layer->v, nullptr, channels + num_q + num_kv, num_channels);
    if (!layer->output_norm) return;
    const int64_t num_read = memory->num_kv_heads * memory->group_size * memory->value_dim;
    multiply(worker, num, width, num_read, normed, &layer->output_gate, nullptr, buffers.gates + first * num_read, num_read);
}

/* The rest of the layer after its memory, x in place. */
static void finish_layer(Worker worker, const Layer *layer, const Buffers &buffers, int64_t first, int64_t num,
                         float *x) {
    const int64_t width = layer->width, num_read = layer->memory.num_kv_heads * layer->memory.group_size *
                                                   layer->memory.value_dim;
    float *own = x + first * width, *mixed = buffers.mixed + first * width;
    multiply(worker, num, num_read, width, buffers.read + first * num_read, &layer->o, own, mixed, width);
    worker.wait();
    add_mlp(worker, layer, num, mixed, buffers.of_mlp + first * (width + 3 * layer->inner), own);
}

/* Counters of the next tasks of a layer, shared by all workers, zero before. */
struct Next {
    int64_t channels, stream, rest;
};

/* A layer that workers run, for tokens x [R tokens, width] in place. Workers share the tokens if there are many, and the
   weights if there are few. */
struct Run {
    const Layer *layer;
    Buffers buffers;
    float *x;
    Next *next;
    int *outcome;

    int64_t num_tokens() const { return layer->memory.num_rows * layer->num_tokens; }
    bool is_many() const { return num_tokens() > FEW_ROWS; }

    /* Runs half(worker, first token, number of tokens) over all tokens. */
    template <typename Half> void halve(Worker worker, int64_t *next_block, const Half &half) const {
        const int64_t num = num_tokens();
        if (!is_many()) return half(worker, 0, num);
        worker.take((num + TOKEN_BLOCK - 1) / TOKEN_BLOCK, next_block,
                    [&](int64_t i) { half(Worker{0, 1}, i * TOKEN_BLOCK, least(TOKEN_BLOCK, num - i * TOKEN_BLOCK)); });
    }

    void make(Worker worker) const {
        const int64_t num_heads = layer->memory.num_kv_heads * layer->memory.group_size;
        for (int64_t h = 0; worker.rank == 0 && layer->beta && h < num_heads; h++)
            buffers.scale[h] = layer->beta[h] * (float)sqrt((double)layer->memory.key_dim);
        halve(worker, &next->channels, [&](Worker who, int64_t first, int64_t num) {
            make_channels(who, layer, buffers, first, num, x);
        });
    }

    void read(Worker worker) const {
        Decode memory = layer->memory;
        const int64_t dim = memory.key_dim, num_kv = memory.num_kv_heads, num_heads = num_kv * memory.group_size;
        if (layer->num_groups) {
            /* Heads differ in cost. */
            return worker.take(memory.num_rows * num_kv, &next->stream, [&](int64_t stream) {
                int64_t place = stream % num_kv;
                const HeadGroup *group = layer->groups;
                for (; place >= group->num_kv_heads; group++) place -= group->num_kv_heads;
                if (read_group(layer, group, stream / num_kv, place, buffers))
                    __atomic_store_n(outcome, OUT_OF_MEMORY, __ATOMIC_RELAXED);
            });
        }
        memory.q = buffers.channels;
        memory.k = buffers.channels + num_heads * dim;
        memory.v = buffers.channels + (num_heads + num_kv) * dim;
        memory.q_row = memory.k_row = memory.v_row = (num_heads + 2 * num_kv) * dim;
        memory.q_head = memory.k_head = memory.v_head = dim;
        memory.o = buffers.read;
        memory.scale = buffers.scale;
        memory.token_weights = layer->merge_gate || layer->forget_gate ? buffers.weights : nullptr;
        worker.share(num_tokens() * num_kv, [&](int64_t stream) {
            read_stream(layer, &memory, stream / num_kv, stream % num_kv, buffers, outcome);
        });
    }

    void finish(Worker worker) const {
        halve(worker, &next->rest, [&](Worker who, int64_t first, int64_t num) {
            finish_layer(who, layer, buffers, first, num, x);
        });
    }
};

/* Runs the tokens of each row through layers of one width, x [R tokens, width] in place. With two lanes, [2, layers] and [2,
   R tokens, width], the second lane runs the tokens that follow through the same layers, a layer behind: this balances the
   load if the number of workers does not divide that of heads. Returns DONE; INVALID_WEIGHT if a token gets a weight that no memory
   can hold, which makes the result useless; or OUT_OF_MEMORY. */
extern "C" int ovq_layers_step(int64_t num_threads, int64_t num_layers, int64_t num_lanes, const Layer *layers,
                               char *scratch, float *x) {
    int outcome = DONE;
    Next next[num_lanes * num_layers];
    memset(next, 0, sizeof(next));
    const int64_t size = ovq_layers_scratch(num_lanes * num_layers, layers);
    parallel(threads_for(num_threads, layers->inner * layers->width), [&](Worker worker) {
        for (int64_t i = 0; i < num_layers + num_lanes - 1; i++) {
            Run runs[2];
            int num = 0;
            for (int64_t lane = 0; lane < num_lanes; lane++) {
                if (i < lane || i - lane >= num_layers) continue;
                const int64_t at = lane * num_layers + i - lane;
                Arena arena = {scratch + lane * size, 0};
                float *own = x + lane * layers->memory.num_rows * layers->num_tokens * layers->width;
                runs[num++] = {layers + at, take_buffers(&arena, layers + at), own, next + at, &outcome};
            }
            for (int j = 0; j < num; j++) runs[j].make(worker);
            worker.wait();
            for (int j = 0; j < num; j++) runs[j].read(worker);
            worker.wait();
            for (int j = 0; j < num; j++) runs[j].finish(worker);
            /* With few tokens, the layer has ended with a barrier. */
            if (runs[0].is_many()) worker.wait();
        }
    });
    return outcome;
}
