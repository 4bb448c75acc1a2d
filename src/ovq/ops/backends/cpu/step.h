/* A few tokens at a time, as when decoding: products that read each weight once, and what layers do between them. */
#pragma once

#include "call.h"
#include "decode.h"
#include "tokens.h"

/* The sum of products of long vectors, by sums that do not wait for each other. */
INLINE float long_dot(const float *a, const float *b, int64_t dim) {
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * VL <= dim; i += 4 * VL)
        for (int j = 0; j < 4; j++) sums[j] += load(a + i + j * VL) * load(b + i + j * VL);
    for (; i + VL <= dim; i += VL) sums[0] += load(a + i) * load(b + i);
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

/* y [num, num_out] = x [num, dim] times the transpose of weight [num_out, dim], plus `added` if there is any. The
   workers share the rows of the weight; each reads its part once and from front to back, which memory does
   fastest: four rows at a time took twice as long. All wait for all at the end, as in the following. */
static void multiply(Worker worker, int64_t num, int64_t dim, int64_t num_out, const float *x, const float *weight,
                     const float *added, float *y) {
    worker.share(num_out, [=](int64_t r) {
        for (int64_t t = 0; t < num; t++) {
            const float sum = long_dot(x + t * dim, weight + r * dim, dim);
            y[t * num_out + r] = added ? added[t * num_out + r] + sum : sum;
        }
    });
    worker.wait();
}

static void normalise(Worker worker, int64_t num, int64_t dim, float eps, const float *x, const float *weight, float *y) {
    worker.share(num, [=](int64_t t) { rms_norm(dim, eps, x + t * dim, weight, y + t * dim); });
    worker.wait();
}

/* Products of x [num, dim] with rows of weight [2 inner, dim], those `half` inner from the first on, into halves [num, 2
   inner]. A thread gets the same rows of each half, and of what follows, and does not wait. */
static void multiply_half(Worker worker, int64_t half, int64_t num, int64_t dim, int64_t inner, const float *x,
                          const float *weight, float *halves) {
    worker.share((inner + VL - 1) / VL, [=](int64_t vector) {
        const int64_t first = vector * VL;
        for (int64_t r = half * inner + first; r < half * inner + least(inner, first + VL); r++)
            for (int64_t t = 0; t < num; t++)
                halves[t * 2 * inner + r] = long_dot(x + t * dim, weight + r * dim, dim);
    });
}

/* y [num, inner] = swiglu(x times the transpose of weight [2 inner, dim]). */
static void multiply_gated(Worker worker, int64_t num, int64_t dim, int64_t inner, const float *x,
                           const float *weight, float *halves, float *y) {
    multiply_half(worker, 0, num, dim, inner, x, weight, halves);
    multiply_half(worker, 1, num, dim, inner, x, weight, halves);
    worker.share((inner + VL - 1) / VL, [=](int64_t vector) {
        const int64_t first = vector * VL;
        for (int64_t t = 0; t < num; t++) {
            const float *gate = halves + t * 2 * inner + first;
            swiglu(gate, gate + inner, least(VL, inner - first), y + t * inner + first);
        }
    });
    worker.wait();
}

extern "C" void ovq_linear(int64_t num_threads, int64_t num, int64_t dim, int64_t num_out, const float *x,
                           const float *weight, float *y) {
    parallel(threads_for(num_threads, num_out * dim),
             [=](Worker worker) { multiply(worker, num, dim, num_out, x, weight, nullptr, y); });
}

/* y = x + down(swiglu(gate_up(norm(x)))) for a few tokens x [num, dim]: the second half of a layer. `scratch` has
   num (dim + 3 inner) floats. */
static void add_mlp(Worker worker, int64_t num, int64_t dim, int64_t inner, float eps, const float *x,
                    const float *norm, const float *gate_up, const float *down, float *scratch, float *y) {
    float *normed = scratch, *halves = normed + num * dim, *gated = halves + num * 2 * inner;
    normalise(worker, num, dim, eps, x, norm, normed);
    multiply_gated(worker, num, dim, inner, normed, gate_up, halves, gated);
    multiply(worker, num, inner, dim, gated, down, x, y);
}

/* The short convolution of one token x [num] of `num` channels: y from x and `past` [num, taps - 1], the inputs before
   it, of which `last` are those after it. `weight` is [num, taps]; y may be x. */
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

/* Mirrored by `_Layer` in layer.py: a layer of attention and MLP, for one token of each row. Tensors are dense but for
   the strides given. Of `memory`, the kernel makes q, k, v, o, their strides, the scale and the weights of tokens. */
struct Layer {
    int64_t width, inner, num_taps;
    double mixer_eps, mlp_eps;
    const float *mixer_norm, *qkv, *beta, *o, *mlp_norm, *gate_up, *down; /* Weights. */
    const float *gate;          /* [Hkv, width] of the merge gate, or NULL. */
    /* Of the forget gate, [Hkv, width] and [Hkv], or NULL; what the pending tokens have forgotten before and with the new
       one, [R, Hkv], and the least that a token may forget. */
    const float *forget_gate, *forget_bias;
    const double *forgotten;
    double *forgotten_now;
    double least_log;
    const float *cos, *sin;     /* [K / 2] angles of the token, or NULL. */
    const float *taps, *past;   /* Of the convolution: [channels, taps], [R, channels, taps - 1]; NULL without one. */
    float *last;
    /* Exact tokens that are to be copied in front of the new one: [R, Hkv, num_before, ...], vectors dense; or NULL. */
    const float *keys_before, *values_before;
    int64_t num_before, key_row, key_head, value_row, value_head;
    Decode memory;
};

/* What a layer makes, all [R, ...] but the scale [H]. */
struct Made {
    float *normed, *channels, *read, *mixed, *of_mlp, *weights, *scale;
};

static Made take_made(Arena *arena, const Layer *layer) {
    const Decode *memory = &layer->memory;
    const int64_t rows = memory->num_rows, num_heads = memory->num_kv_heads * memory->group_size;
    Made made;
    made.normed = TAKE(arena, float, rows * layer->width);
    made.channels = TAKE(arena, float, rows * (num_heads + 2 * memory->num_kv_heads) * memory->key_dim);
    made.read = TAKE(arena, float, rows * num_heads * memory->value_dim);
    made.mixed = TAKE(arena, float, rows * layer->width);
    made.of_mlp = TAKE(arena, float, rows * (layer->width + 3 * layer->inner));
    made.weights = TAKE(arena, float, rows * memory->num_kv_heads);
    made.scale = TAKE(arena, float, num_heads);
    return made;
}

/* Bytes of scratch that layers take, one after the other. */
extern "C" int ovq_layers_scratch(int64_t num_layers, const Layer *layers) {
    size_t most = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        Arena arena = {};
        take_made(&arena, layers + i);
        most = arena.used > most ? arena.used : most;
    }
    return (int)most;
}

/* Convolves and normalises `num` heads of the token of a row from `head` on; heads of values are not normalised. */
static void make_heads(const Layer *layer, int64_t row, int64_t head, int64_t num, int is_normalised, float *channels) {
    const int64_t dim = layer->memory.key_dim, taps = layer->num_taps;
    const int64_t num_channels = layer->memory.num_kv_heads * (layer->memory.group_size + 2) * dim, at = head * dim;
    float *x = channels + row * num_channels + at;
    if (layer->taps) {
        const int64_t kept = (row * num_channels + at) * (taps - 1);
        convolve_token(num * dim, taps, x, layer->past + kept, layer->taps + at * taps, x, layer->last + kept);
    }
    for (int64_t i = 0; is_normalised && i < num; i++)
        unit_vector(x + i * dim, layer->cos, layer->sin, dim, x + i * dim);
}

/* What the token of a row counts for in a head: what the gates say (docs/method/math.md, sections 8 and 10). */
static float token_weight(const Layer *layer, const float *x, int64_t stream, int64_t head) {
    float weight = 1;
    if (layer->gate) {
        const float y = long_dot(x, layer->gate + head * layer->width, layer->width);
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

/* One key/value head of a row, from channels to what its queries read. */
static void read_stream(const Layer *layer, const Decode *memory, int64_t row, int64_t head, Made made,
                        int *is_spoilt) {
    const int64_t group = memory->group_size, num_kv = memory->num_kv_heads, first = num_kv * group;
    const int64_t stream = row * num_kv + head;
    make_heads(layer, row, head * group, group, 1, made.channels);
    make_heads(layer, row, first + head, 1, 1, made.channels);
    make_heads(layer, row, first + num_kv + head, 1, 0, made.channels);
    if (layer->gate || layer->forget_gate) {
        const float weight = token_weight(layer, made.normed + row * layer->width, stream, head);
        made.weights[stream] = weight;
        if (!(weight >= 0 && weight < INFINITY)) __atomic_store_n(is_spoilt, 1, __ATOMIC_RELAXED);
    }
    if (layer->keys_before) {
        const int64_t place = stream * memory->chunk_size, num = layer->num_before;
        copy_before(layer->keys_before + row * layer->key_row + head * layer->key_head, num, memory->key_dim,
                    memory->pending_keys, place);
        copy_before(layer->values_before + row * layer->value_row + head * layer->value_head, num, memory->value_dim,
                    memory->pending_values, place);
    }
    decode_stream(memory, row, head);
}

/* A worker's share of a layer, x [R, width] in place. */
static void step_layer(Worker worker, const Layer *layer, char *scratch, float *x, int *is_spoilt) {
    Arena arena = {scratch, 0};
    const Made made = take_made(&arena, layer);
    Decode memory = layer->memory;
    const int64_t rows = memory.num_rows, width = layer->width, dim = memory.key_dim;
    const int64_t num_kv = memory.num_kv_heads, num_heads = num_kv * memory.group_size;
    const int64_t num_channels = (num_heads + 2 * num_kv) * dim;
    memory.q = made.channels, memory.k = made.channels + num_heads * dim;
    memory.v = made.channels + (num_heads + num_kv) * dim;
    memory.q_row = memory.k_row = memory.v_row = num_channels;
    memory.q_head = memory.k_head = memory.v_head = dim;
    memory.o = made.read;
    memory.scale = made.scale;
    memory.token_weights = layer->gate || layer->forget_gate ? made.weights : nullptr;
    normalise(worker, rows, width, layer->mixer_eps, x, layer->mixer_norm, made.normed);
    for (int64_t h = 0; worker.rank == 0 && h < num_heads; h++) made.scale[h] = layer->beta[h] * (float)sqrt((double)dim);
    multiply(worker, rows, width, num_channels, made.normed, layer->qkv, nullptr, made.channels);
    worker.share(rows * num_kv, [&](int64_t stream) {
        read_stream(layer, &memory, stream / num_kv, stream % num_kv, made, is_spoilt);
    });
    worker.wait();
    multiply(worker, rows, num_heads * memory.value_dim, width, made.read, layer->o, x, made.mixed);
    add_mlp(worker, rows, width, layer->inner, layer->mlp_eps, made.mixed, layer->mlp_norm, layer->gate_up, layer->down,
            made.of_mlp, x);
}

/* One token of each row through layers of one width, x [R, width] in place. Returns 0, or 1 if the weight of a token is
   none that a memory can hold, in which case nothing of the result is of use. */
extern "C" int ovq_layers_step(int64_t num_threads, int64_t num_layers, const Layer *layers, char *scratch, float *x) {
    int is_spoilt = 0;
    parallel(threads_for(num_threads, layers->inner * layers->width), [&](Worker worker) {
        for (int64_t i = 0; i < num_layers; i++) step_layer(worker, layers + i, scratch, x, &is_spoilt);
    });
    return is_spoilt;
}
