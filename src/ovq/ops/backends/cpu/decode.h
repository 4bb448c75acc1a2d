/* A decode step, one token per row, without gradients: a softmax over [tokens of the chunk | dictionary], read in place.

   A slot's mean is its sums over its count c, so that exp(q.D + log c) D_v = exp(q.S / c) S_v: neither the means nor the logs
   of counts are needed. The time is that of reading the sums from memory once. */
#pragma once

#include "numbers.h"
#include "workers.h"

/* Mirrored by mirrors.py. Tensors are dense but for the strides given. */
struct Decode {
    int64_t num_rows, num_kv_heads, group_size, chunk_size, capacity, key_dim, value_dim, num_threads, dtype;
    int64_t state_dtype;                 /* Format of the sums. */
    const void *q, *k, *v;               /* [R, H, K], [R, Hkv, K], [R, Hkv, V], vectors dense. */
    void *o;                             /* [R, H, V] */
    void *pending_keys, *pending_values; /* [R, Hkv, C, ...], which get the new token. */
    const float *scale;                  /* [H] */
    const void *key_sum, *value_sum;     /* [R, Hkv, M, ...] */
    const Bfloat16 *key_step, *value_step; /* [R, Hkv, M]: scales of INT8 sums. */
    const int64_t *count;                /* [R, Hkv, M] */
    const int64_t *num_seen;             /* [R]: tokens before this one. */
    const int64_t *first_read;           /* [R]: the first pending token that is read; NULL to read all. */
    int64_t q_row, q_head, k_row, k_head, v_row, v_head; /* Strides. */
    /* Weights of the new tokens [R, Hkv], of slots [R, Hkv, M], and of pending tokens [R, Hkv, C]; NULL without weights. */
    const float *token_weights, *weight;
    float *pending_weights;
    int64_t weighs_chunk; /* Whether scores of the own chunk's tokens include the log of their weights. */
};

/* Rows per block, which stay in the L1 cache for all queries of a group. */
#define READ_AT_ONCE 64
/* Vectors of outputs that are summed in registers. */
#define WIDE (64 / VL)
/* Fewer bytes than this are not worth waking other threads for. */
#define SHARED_BYTES (1 << 18)

/* Lane i of a shuffle of two vectors [items, width]: the first halves of all items, the second vector's last. */
template <int width> constexpr int half_at(int i) {
    constexpr int items = VL / width;
    const int item = i / (width / 2), lane = i % (width / 2);
    return item < items ? item * width + lane : VL + (item - items) * width + lane;
}

/* Adds the halves of each item. */
template <int width, int... i> INLINE Vector fold(Vector a, Vector b, std::integer_sequence<int, i...>) {
    return pick<half_at<width>(i)...>(a, b) + pick<half_at<width>(i) + width / 2 ...>(a, b);
}

/* Products of x [dim] with `num` rows from `first` on, each as VL / num partial sums; row end - 1 stands in for rows beyond
   it. */
template <int num, typename T>
INLINE Vector products(const float *x, int64_t dim, const T *rows, int64_t first, int64_t end) {
    if constexpr (num == 1) {
        const T *row = rows + least(first, end - 1) * dim;
        Vector sum = {};
        int64_t i = 0;
        for (; i + VL <= dim; i += VL) sum += load(x + i) * load_numbers(row + i);
        float rest = 0;
        for (; i < dim; i++) rest += x[i] * as_float(row[i]);
        sum[0] += rest;
        return sum;
    } else {
        return fold<2 * VL / num>(products<num / 2>(x, dim, rows, first, end),
                                  products<num / 2>(x, dim, rows, first + num / 2, end),
                                  std::make_integer_sequence<int, VL>());
    }
}

/* A query's online softmax so far, relative to its largest score. */
struct Softmax {
    float best, total;
    float *out; /* [V] */
};

/* Mass of rows: their `weight`, or their `count`, or 1 if both are NULL. Means are sums divided by the `divisor`, or by the
   mass if that is NULL; `are_means` says that keys and values are means themselves. Quantized ones have scales `key_step` and
   `value_step`. */
struct Mass {
    const int64_t *count;
    const float *weight, *divisor;
    const Bfloat16 *key_step, *value_step;
    int are_means;

    /* Whether sums are multiplied by more than exp(score). */
    INLINE_MEMBER int has_shares() const { return weight || divisor || value_step; }
};

/* Scales j..j+num-1, and 0 beyond. */
INLINE Vector some_scales(const Bfloat16 *scale, int64_t j, int64_t num) {
    float y[VL] = {};
    for (int64_t i = 0; i < num; i++) y[i] = as_float(scale[j + i]);
    return load(y);
}

/* Scores of the rows first..end-1, -inf for empty slots and beyond. exp(score) * masses is a row's term of the softmax
   denominator; exp(score) * shares, or exp(score) without `has_shares`, is the factor of its sums. The power of 2 in a weight
   is part of the score, as its log is by definition: a row of tiny weight may have a score so much higher than the others'
   that these would vanish beside it, and the largest weights may count for more than scores. */
template <typename T>
INLINE void score_rows(const float *query, int64_t dim, const T *keys, const Mass *mass, int64_t first, int64_t end,
                       float *scores, float *masses, float *shares) {
    const int64_t *count = mass->count;
    const float *weight = mass->weight;
    for (int64_t j = first; j < end; j += VL, scores += VL, masses += VL, shares += VL) {
        /* The usual size is a constant, so that loops are unrolled. */
        Vector x = dim == 64 ? products<VL>(query, 64, keys, j, end) : products<VL>(query, dim, keys, j, end);
        float c[VL] = {}, d[VL] = {};
        const int64_t num = least(VL, end - j);
        /* Whole vectors separately, so that compilers know the number of iterations. */
        if (num == VL)
            for (int64_t i = 0; i < VL; i++) c[i] = weight ? weight[j + i] : count ? (float)count[j + i] : 1;
        else
            for (int64_t i = 0; i < num; i++) c[i] = weight ? weight[j + i] : count ? (float)count[j + i] : 1;
        const Vector number = load(c);
        Vector of_value = splat(1);
        if (mass->key_step) {
            x *= num == VL ? load_numbers(mass->key_step + j) : some_scales(mass->key_step, j, num);
            of_value = num == VL ? load_numbers(mass->value_step + j) : some_scales(mass->value_step, j, num);
        }
        if (!weight && !mass->divisor) {
            store(scores, number > 0.0f ? x / number : splat(-INFINITY));
            store(masses, number);
            store(shares, of_value);
            continue;
        }
        for (int64_t i = 0; mass->divisor && i < num; i++) d[i] = mass->divisor[j + i];
        const Vector divisor = mass->are_means ? splat(1) : mass->divisor ? load(d) : number;
        Vector own = number, power = {};
        if (weight) own = significand(number, &power);
        store(scores, number > 0.0f ? x / divisor + power * LN_2 : splat(-INFINITY));
        store(masses, number > 0.0f ? own : Vector{});
        store(shares, number > 0.0f ? own / divisor * of_value : Vector{});
    }
}

/* out += weights [n] values [n, dim], in `num` vectors of columns. If registers allow it, odd rows have sums of their own,
   which need not wait for those of even rows. */
template <int num, typename T>
INLINE void add_vectors(const float *weights, int64_t n, const T *values, int64_t dim, float *out) {
    constexpr int sets = num > 4 ? 1 : 2;
    Vector sum[sets][num] = {};
    for (int i = 0; i < num; i++) sum[0][i] = load(out + i * VL);
    int64_t j = 0;
    for (; j + sets <= n; j += sets)
        for (int u = 0; u < sets; u++)
            for (int i = 0; i < num; i++)
                sum[u][i] += splat(weights[j + u]) * load_numbers(values + (j + u) * dim + i * VL);
    for (int i = 0; j < n && i < num; i++) sum[0][i] += splat(weights[j]) * load_numbers(values + j * dim + i * VL);
    for (int i = 0; i < num; i++) store(out + i * VL, sets == 1 ? sum[0][i] : sum[0][i] + sum[sets - 1][i]);
}

template <typename T> INLINE void add_values(const float *weights, int64_t n, const T *values, int64_t dim, float *out) {
    int64_t i = 0;
    for (; i + WIDE * VL <= dim; i += WIDE * VL) add_vectors<WIDE>(weights, n, values + i, dim, out + i);
    for (; i + VL <= dim; i += VL) add_vectors<1>(weights, n, values + i, dim, out + i);
    for (; i < dim; i++)
        for (int64_t j = 0; j < n; j++) out[i] += weights[j] * as_float(values[j * dim + i]);
}

/* Adds `num` rows to the softmax of each query of a group. Scores of slots of several tokens are multiplied by `temperature`
   [group] and increased by `bias` [group], unless NULL. */
template <typename T>
static void absorb(const Decode *call, const float *queries, const T *keys, const T *values, Mass mass, int64_t num,
                   Softmax *softmax, const float *temperature = nullptr, const float *bias = nullptr) {
    float scores[READ_AT_ONCE], masses[READ_AT_ONCE], shares[READ_AT_ONCE];
    const int64_t dim = call->value_dim;
    for (int64_t first = 0; first < num; first += READ_AT_ONCE) {
        const int64_t end = least(num, first + READ_AT_ONCE), n = padded(end - first, VL);
        for (int64_t g = 0; g < call->group_size; g++) {
            Softmax *own = softmax + g;
            score_rows(queries + g * call->key_dim, call->key_dim, keys, &mass, first, end, scores, masses, shares);
            for (int64_t j = 0; (temperature || bias) && j < n; j += VL) {
                const Vector x = load(scores + j);
                const Vector learned = x * (temperature ? temperature[g] : 1.0f) + (bias ? bias[g] : 0.0f);
                store(scores + j, load(masses + j) > 1.0f ? learned : x);
            }
            Vector high = splat(own->best), total = {};
            for (int64_t j = 0; j < n; j += VL) high = higher_of(load(scores + j), high);
            const float best = highest(high);
            if (best > own->best) {
                const float factor = expf(own->best - best);
                for (int64_t i = 0; i < dim; i++) own->out[i] *= factor;
                own->total *= factor;
                own->best = best;
            }
            /* Without a score above -inf there is nothing to be relative to. */
            const Vector shift = splat(best > -INFINITY ? best : 0);
            for (int64_t j = 0; j < n; j += VL) {
                const Vector x = exponential(load(scores + j) - shift);
                store(scores + j, mass.has_shares() ? x * load(shares + j) : x);
                total += x * load(masses + j);
            }
            own->total += ::total(total);
            add_values(scores, end - first, values + first * dim, dim, own->out);
        }
    }
}

/* Copies an input vector to its place in a pending buffer. */
INLINE void store_pending(int64_t size, const void *x, int64_t at, void *pending, int64_t place, int64_t dim) {
    memcpy((char *)pending + place * dim * size, (const char *)x + at * size, (size_t)(dim * size));
}

static void decode_stream(const Decode *call, int64_t row, int64_t head) {
    const int64_t k = call->key_dim, v = call->value_dim, group = call->group_size;
    const int64_t stream = row * call->num_kv_heads + head, first = stream * call->chunk_size;
    const int64_t place = call->num_seen[row] % call->chunk_size, size = call->dtype == FLOAT32 ? 4 : 2;
    store_pending(size, call->k, row * call->k_row + head * call->k_head, call->pending_keys, first + place, k);
    store_pending(size, call->v, row * call->v_row + head * call->v_head, call->pending_values, first + place, v);
    if (call->token_weights) call->pending_weights[first + place] = call->token_weights[stream];
    float queries[group * k], out[group * v];
    Softmax softmax[group];
    memset(out, 0, sizeof(out));
    for (int64_t g = 0; g < group; g++) {
        const int64_t query_head = head * group + g, at = row * call->q_row + query_head * call->q_head;
        read_numbers(call->dtype, call->q, at, k, call->scale[query_head], queries + g * k, k);
        softmax[g] = {-INFINITY, 0, out + g * v};
    }
    const int64_t begin = call->first_read ? call->first_read[row] : 0, from = first + begin;
    with_type(call->dtype, call->pending_keys, from * k, [=, x = (const float *)queries, y = &softmax[0]](auto *keys) {
        /* In parts, as a chunk may be larger than the stack. Keys and values of tokens are no sums. */
        const int64_t num = place + 1 - begin, most = call->weighs_chunk ? READ_AT_ONCE : num;
        float weights[READ_AT_ONCE];
        Mass mass = {};
        mass.weight = call->weighs_chunk ? weights : nullptr;
        mass.are_means = 1;
        for (int64_t i = 0; i < num; i += most) {
            const int64_t n = least(most, num - i);
            for (int64_t j = 0; call->weighs_chunk && j < n; j++)
                weights[j] = fmaxf(call->pending_weights[from + i + j], 1e-37f);
            absorb(call, x, keys + i * k, (decltype(keys))call->pending_values + (from + i) * v, mass, n, y);
        }
    });
    const int64_t slots = stream * call->capacity;
    /* With forgetting, narrow formats hold means. */
    const Mass mass = {call->count + slots,
                       from_row(call->weight, slots),
                       nullptr,
                       from_row(call->key_step, slots),
                       from_row(call->value_step, slots),
                       call->weighs_chunk && call->state_dtype != FLOAT32};
    with_format(call->state_dtype, call->key_sum, slots * k,
                [=, x = (const float *)queries, y = &softmax[0]](auto *keys) {
                    absorb(call, x, keys, (decltype(keys))call->value_sum + slots * v, mass, call->capacity, y);
                });
    const int64_t heads = call->num_kv_heads * group;
    for (int64_t g = 0; g < group; g++)
        write_numbers(call->dtype, call->o, (row * heads + head * group + g) * v, v, 1 / softmax[g].total, out + g * v);
}

static void decode_all(const Decode *call) {
    const int64_t streams = call->num_rows * call->num_kv_heads;
    const int64_t bytes = streams * (call->capacity + call->chunk_size) * (call->key_dim + call->value_dim) * 4;
    const int64_t threads = bytes < SHARED_BYTES ? 1 : least(call->num_threads, streams);
    parallel_for(threads, streams,
                 [=](int64_t s) { decode_stream(call, s / call->num_kv_heads, s % call->num_kv_heads); });
}
