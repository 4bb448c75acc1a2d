/* The memory of a converted model (`ovq.convert`): heads keep their first tokens (sinks) and their last ones (window)
   exactly, and slots for all between. Reads new tokens and merges those that leave the windows, in place.

   One softmax goes over [sinks | slots | window]. A few new tokens are read one by one, from the stored rows; many are read
   in blocks that end where a chunk is merged, so that a block sees one dictionary. Layouts for products, and what merging by
   pairs remembers of slots, last for the whole call. */
#pragma once

#include "chunk.h"
#include "decode.h"

/* Up to this many new tokens are read one by one, unless a caller says otherwise. */
#define FEW_TOKENS 4
/* Token weights are from 2^-MOST_USE to 2^MOST_USE (`MOST_USE` of use.py). */
#define MOST_USE 8
/* Tokens that a window's layout holds beyond the window. */
#define SPARE_TOKENS 512

/* Distances between rows, heads and tokens; vectors are dense. */
struct Strides {
    int64_t row, head, token;
};

INLINE int64_t place_in(const Strides &at, int64_t row, int64_t head, int64_t token) {
    return row * at.row + head * at.head + token * at.token;
}

/* Heads of equal sizes. Mirrored by mirrors.py. */
struct HeadGroup {
    int64_t num_rows, num_kv_heads, group_size, chunk_size, capacity, num_exact, num_sinks, key_dim, value_dim;
    int64_t dtype, query_dtype, state_dtype, merges_pairs, num_parts;
    double tie, value_weight, mass_power;
    const int64_t *heads;       /* [h]: the key/value heads of k and v that these are. */
    const void *q, *k, *v;      /* q is NULL if no queries attend. */
    void *o;
    Strides q_at, k_at, v_at, o_at;
    void *pending_keys, *pending_values; /* [R, h, num_exact, ...] */
    void *key_sum, *value_sum;  /* [R, h, M, ...], keys in units of `key_unit`. */
    Bfloat16 *key_step, *value_step; /* [R, h, M]: scales of INT8 sums. */
    int64_t *count, *position_sum; /* [R, h, M] */
    float *key_unit;            /* [R, h], 0 until keys of some length merge. */
    const int64_t *filled, *num_merged; /* [R]: exact tokens before the call, and merged or dropped ones. */
    const int64_t *length;              /* [R]: new tokens. */
    const int64_t *schedule_start;  /* [R] */
    const int32_t *schedule;        /* Per row, slots in use before the call and after each merge. */
    const float *temperature, *bias; /* [H]: factor and offset of the scores of slots of several tokens; or NULL. */
    const float *token_use;     /* [R, h, K + V + 1]: linear predictor of log2 weights, see `expected_use`; or NULL. */
    float *weight;              /* [R, h, M]: total weights of slots, with `token_use`; else NULL. */
};

struct HeadScratch {
    Rows sinks, window;
    Dictionary dictionary;
    Rows tokens;
    Learner learner;
    Nearest nearest;
    Reader reader;
    float *queries, *keys, *values; /* [QUERIES, key_ld]; [C, ...], of tokens that leave the window. */
    float *key_sum, *value_sum;     /* [M, ...]: float32 copies of sums in narrow formats. */
    float *weights;                 /* [C]: their weights, if tokens have any. */
    float *log_count;               /* [M]: log counts, added to the scores of slots if tokens have weights. */
    int32_t *slots;
    int64_t room; /* Tokens that the window's layout holds. */
};

/* One head of a row in a call. */
struct HeadStream {
    const HeadGroup *group;
    Call call; /* The arguments of merging: one chunk of one head, float32. */
    Sums sums;
    HeadScratch own;
    char *memory; /* The allocation behind `own`, or NULL. */
    int64_t row, head;
    int64_t start, length, before; /* The first new token, their number, and the number of exact tokens before them. */
    int64_t filled, done, num_merges; /* Exact tokens, new tokens read, merges so far. */
    int64_t earlier_merges;           /* Merges earlier in the call. */
    const int32_t *schedule;
    int64_t origin, num_laid; /* Tokens of the window before its layout begins, and up to its end. */
    int has_exact, has_slots; /* Whether exact tokens, and slots, are laid out. */
};

/* Reads an exact token. They are numbered as if none was merged: first the recent ones, then the new ones. */
INLINE void read_exact(const HeadStream *s, int64_t token, int is_value, float factor, float *out, int64_t ld) {
    const HeadGroup *g = s->group;
    const int64_t dim = is_value ? g->value_dim : g->key_dim;
    const int64_t own = (s->row * g->num_kv_heads + s->head) * g->num_exact;
    const Strides at = is_value ? g->v_at : g->k_at;
    if (token < s->before)
        read_numbers(g->dtype, is_value ? g->pending_values : g->pending_keys, (own + token) * dim, dim, factor, out, ld);
    else
        read_numbers(g->dtype, is_value ? g->v : g->k,
                     place_in(at, s->row, g->heads[s->head], s->start + token - s->before), dim, factor, out, ld);
}

static Call learning_call(const HeadGroup *g) {
    Call call = {};
    call.num_rows = call.num_kv_heads = 1;
    call.chunk_size = call.width = g->chunk_size;
    call.capacity = g->capacity;
    call.dtype = FLOAT32;
    call.merges_pairs = g->merges_pairs;
    call.num_parts = g->num_parts;
    call.tie = g->tie;
    call.value_weight = g->value_weight;
    call.mass_power = g->mass_power;
    call.weight = g->weight;
    call.k = {nullptr, {0, g->key_dim, 0}, g->key_dim};
    call.v = {nullptr, {0, g->value_dim, 0}, g->value_dim};
    return call;
}

/* Exact tokens as rows that are only read. */
static Rows take_exact(Arena *arena, const Call *call, int64_t num) {
    Rows rows = {};
    rows.key_panels = TAKE(arena, float, num * call->k.dim);
    rows.values = TAKE(arena, float, num * value_ld(call));
    rows.bias = TAKE(arena, float, num);
    return rows;
}

static HeadScratch take_head(Arena *arena, const HeadGroup *g, const Call *call, int64_t num_new) {
    HeadScratch own = {};
    const int64_t window = g->num_exact - g->num_sinks, spare = least(num_new, SPARE_TOKENS);
    own.room = padded(window + spare + QUERIES, NR) + NR;
    own.sinks = take_exact(arena, call, padded(g->num_sinks, NR));
    own.window = take_exact(arena, call, own.room);
    own.dictionary = take_dictionary(arena, call, 0);
    own.dictionary.num = 0;
    own.tokens = take_rows(arena, call, call->width, 0, call->merges_pairs);
    if (g->token_use) {
        own.tokens.weights = TAKE(arena, float, padded(g->chunk_size, NR));
        own.weights = TAKE(arena, float, g->chunk_size);
        own.log_count = TAKE(arena, float, padded(g->capacity, NR));
    }
    own.learner = take_learner(arena, call);
    if (call->merges_pairs) own.nearest = take_nearest(arena, call);
    own.reader = take_reader(arena, call);
    const int64_t read = padded(g->num_sinks, NR) + padded(g->capacity, NR) + own.room;
    const int64_t columns = read > own.nearest.num_columns ? read : own.nearest.num_columns;
    own.reader.scores = TAKE(arena, float, QUERIES * columns);
    own.queries = TAKE(arena, float, QUERIES * key_ld(call));
    own.keys = TAKE(arena, float, g->chunk_size * g->key_dim);
    own.values = TAKE(arena, float, g->chunk_size * g->value_dim);
    own.slots = TAKE(arena, int32_t, g->chunk_size);
    if (g->state_dtype != FLOAT32) {
        own.key_sum = TAKE(arena, float, g->capacity * g->key_dim);
        own.value_sum = TAKE(arena, float, g->capacity * g->value_dim);
    }
    return own;
}

/* Lay out one exact token at place i. */
static void put_exact(HeadStream *s, Rows *rows, int64_t i, int64_t token) {
    const int64_t k = s->group->key_dim;
    float key[k];
    read_exact(s, token, 0, 1, key, k);
    put_column(rows->key_panels, k, i, key);
    read_exact(s, token, 1, 1, rows->values + i * value_ld(&s->call), value_ld(&s->call));
}

/* First token of the window now. Tokens are counted from the first of the window before the call. */
INLINE int64_t window_begin(const HeadStream *s) { return s->num_merges * s->group->chunk_size; }

/* Scores of slots use the number of their tokens, whatever these weighed when they were merged. */
static void take_counts(HeadStream *s) {
    for (int64_t i = 0; s->own.log_count && i < padded(s->group->capacity, NR); i++) {
        const int64_t count = i < s->group->capacity ? s->sums.count[i] : 0;
        s->own.log_count[i] = count ? logf((float)count) : -INFINITY;
    }
}

static void lay_out_slots(HeadStream *s) {
    if (s->has_slots || !s->group->capacity) return;
    load_dictionary(&s->own.dictionary, &s->call, &s->sums);
    s->own.dictionary.num = s->schedule[s->num_merges];
    s->has_slots = 1;
    take_counts(s);
}

/* Lay out the exact tokens, including the next `num`. */
static void lay_out(HeadStream *s, int64_t num) {
    const int64_t sinks = s->group->num_sinks, k = s->group->key_dim, v = value_ld(&s->call);
    HeadScratch *own = &s->own;
    if (!s->has_exact) {
        for (int64_t i = 0; i < padded(sinks, NR); i++) own->sinks.bias[i] = i < sinks ? 0 : -INFINITY;
        for (int64_t i = 0; i < least(sinks, s->filled); i++) put_exact(s, &own->sinks, i, i);
        s->has_exact = 1;
    }
    for (int64_t i = s->filled; i < least(sinks, s->filled + num); i++) put_exact(s, &own->sinks, i, i);
    const int64_t after = s->filled + num - sinks, end = window_begin(s) + (after > 0 ? after : 0);
    if (end - s->origin > own->room) {
        const int64_t shift = window_begin(s) / NR * NR - s->origin, left = padded(s->num_laid - s->origin - shift, NR);
        memmove(own->window.key_panels, own->window.key_panels + shift * k, sizeof(float) * left * k);
        memmove(own->window.values, own->window.values + shift * v, sizeof(float) * left * v);
        s->origin += shift;
    }
    for (; s->num_laid < end; s->num_laid++)
        put_exact(s, &own->window, s->num_laid - s->origin, sinks + s->num_laid);
}

/* Finishes the scores of slots, given as products with queries scaled to the unit of the keys. Slots of several tokens use
   the learned temperature and bias. */
INLINE void score_slots(const HeadStream *s, int64_t query_head, int64_t num, int64_t n, float *scores, int64_t ld) {
    const HeadGroup *g = s->group;
    const float *logs = s->own.log_count ? s->own.log_count : s->own.dictionary.rows.bias;
    const Vector temperature = splat(g->temperature ? g->temperature[query_head] : 1);
    const Vector bias = splat(g->bias ? g->bias[query_head] : 0);
    for (int64_t t = 0; t < num; t++, scores += ld)
        for (int64_t j = 0; j < n; j += VL) {
            const Vector log = load(logs + j), x = load(scores + j);
            store(scores + j, log > 0.0f ? x * temperature + log + bias : x + log);
        }
}

/* The outputs of the next `num` tokens for one query head. */
static void read_block(HeadStream *s, int64_t g, int64_t num) {
    const HeadGroup *group = s->group;
    const Call *call = &s->call;
    HeadScratch *own = &s->own;
    const int64_t query_head = group->heads[s->head] * group->group_size + g, ld = key_ld(call), width = value_ld(call);
    const int64_t sinks = padded(group->num_sinks, NR), slots = padded(own->dictionary.num, NR);
    const int64_t begin = window_begin(s) - s->origin, from = begin / NR * NR;
    const int64_t last = s->filled - group->num_sinks + window_begin(s) - s->origin; /* The place of the first query. */
    const int64_t end = last + num > begin ? last + num : begin, columns = padded(end - from, NR);
    const int64_t n = sinks + slots + columns;
    float *scores = own->reader.scores, sums[QUERIES], best;
    for (int64_t t = 0; t < num; t++)
        read_numbers(group->query_dtype, group->q, place_in(group->q_at, s->row, query_head, s->done + t), group->key_dim, 1,
                     own->queries + t * ld, ld);
    if (sinks) score(call, &own->sinks, sinks, own->queries, num, scores, n);
    Rows window = {};
    window.key_panels = own->window.key_panels + from * group->key_dim;
    window.values = own->window.values + from * width;
    window.bias = own->window.bias + from;
    score(call, &window, columns, own->queries, num, scores + sinks + slots, n);
    if (slots) {
        /* A power of 2, so that the product is exact. */
        const float unit = group->key_unit[s->row * group->num_kv_heads + s->head];
        for (int64_t j = 0; j < num * ld; j++) own->queries[j] *= unit;
        product(num, slots, group->key_dim, own->queries, ld, 1, own->dictionary.rows.key_panels, group->key_dim * NR,
                NR, nullptr, 0, scores + sinks, n);
        score_slots(s, query_head, num, slots, scores + sinks, n);
    }
    for (int64_t t = 0; t < num; t++) {
        float *row = scores + t * n, *recent = row + sinks + slots;
        for (int64_t j = s->filled + t + 1; j < group->num_sinks; j++) row[j] = -INFINITY;
        for (int64_t j = 0; j < begin - from; j++) recent[j] = -INFINITY;
        for (int64_t j = last + t + 1 > begin ? last + t + 1 - from : begin - from; j < columns; j++)
            recent[j] = -INFINITY;
        sums[t] = exponentials(row, n, &best);
    }
    memset(own->reader.out, 0, sizeof(float) * num * width);
    if (sinks) weigh(call, &own->sinks, sinks, scores, n, num, own->reader.out);
    if (slots) weigh(call, &own->dictionary.rows, slots, scores + sinks, n, num, own->reader.out);
    weigh(call, &window, columns, scores + sinks + slots, n, num, own->reader.out);
    for (int64_t t = 0; t < num; t++)
        write_numbers(group->query_dtype, group->o, place_in(group->o_at, s->row, query_head, s->done + t), group->value_dim,
                      1 / sums[t], own->reader.out + t * width);
}

/* The unit of key lengths: root mean square length of the keys in a full window, rounded to a power of 2; 0 for keys that are as
   good as zero, which would make an unusable unit for later ones. */
static float typical_length(const HeadStream *s) {
    const HeadGroup *g = s->group;
    const int64_t window = g->num_exact - g->num_sinks;
    double total = 0;
    float key[g->key_dim];
    for (int64_t i = 0; i < window; i++) {
        read_exact(s, g->num_sinks + window_begin(s) + i, 0, 1, key, g->key_dim);
        total += exact_dot(key, key, g->key_dim);
    }
    const float length = (float)sqrt(total / (double)window);
    return length >= 1e-15f ? exp2f(nearbyintf(log2f(length))) : 0; /* `ORDINARY` of options.py */
}

/* The weight of a token, a power of 2, predicted from its key, in units of `unit`, and its value. The predictor is summed in
   float64, so that PyTorch gets the same weight. */
static float expected_use(const HeadStream *s, const float *key, float unit, const float *value) {
    const HeadGroup *g = s->group;
    const float *use = g->token_use + (s->row * g->num_kv_heads + s->head) * (g->key_dim + g->value_dim + 1);
    double sum = unit * exact_dot(use, key, g->key_dim) + exact_dot(use + g->key_dim, value, g->value_dim);
    sum += use[g->key_dim + g->value_dim];
    return std::isfinite(sum) ? exp2f((float)fmin(fmax(nearbyint(sum), -MOST_USE), MOST_USE)) : 1;
}

/* Merge the oldest chunk of a full window into the slots. */
static void merge_oldest(HeadStream *s) {
    const HeadGroup *g = s->group;
    HeadScratch *own = &s->own;
    Call *call = &s->call;
    const int64_t size = g->chunk_size, first = g->num_sinks + window_begin(s);
    float *unit = g->key_unit + s->row * g->num_kv_heads + s->head;
    if (*unit == 0) *unit = typical_length(s);
    const float divisor = *unit > 0 ? *unit : 1;
    for (int64_t t = 0; t < size; t++) {
        read_exact(s, first + t, 0, 1 / divisor, own->keys + t * g->key_dim, g->key_dim);
        read_exact(s, first + t, 1, 1, own->values + t * g->value_dim, g->value_dim);
        if (g->token_use)
            own->weights[t] = expected_use(s, own->keys + t * g->key_dim, divisor, own->values + t * g->value_dim);
    }
    const Chunk chunk = {0, size, s->schedule[s->num_merges], s->schedule[s->num_merges + 1], 1};
    const int64_t num_merged = g->num_merged[s->row] + (s->earlier_merges + s->num_merges) * size;
    const Joining all = {call, &own->dictionary, &own->tokens, &s->sums, call->merges_pairs ? &own->nearest : nullptr};
    const Team alone = {0, 1, nullptr};
    lay_out_slots(s);
    run_chunk(all, &own->dictionary, &own->tokens, &chunk, 0, num_merged, nullptr, &alone, &own->learner,
              &own->reader);
    for (int64_t t = 0; t < size; t++) s->sums.position[own->slots[t]] += g->num_sinks + num_merged + t;
    take_counts(s);
}

/* Count `num` tokens as read, and merge if all exact places are full. */
static void advance(HeadStream *s, int64_t num) {
    const HeadGroup *g = s->group;
    s->filled += num;
    s->done += num;
    if (s->filled < g->num_exact) return;
    if (g->capacity) merge_oldest(s);
    s->filled -= g->chunk_size;
    s->num_merges++;
}

/* Store the exact tokens of places first..end-1: recent ones that stay move up, new ones follow. */
static void put_recent(const HeadStream *s, int64_t first, int64_t end) {
    const HeadGroup *g = s->group;
    const int64_t stream = s->row * g->num_kv_heads + s->head, size = g->dtype == FLOAT32 ? 4 : 2;
    for (int is_value = 0; is_value < 2; is_value++) {
        const int64_t dim = is_value ? g->value_dim : g->key_dim;
        const Strides at = is_value ? g->v_at : g->k_at;
        char *out = (char *)(is_value ? g->pending_values : g->pending_keys) + stream * g->num_exact * dim * size;
        const char *from = (const char *)(is_value ? g->v : g->k) + place_in(at, s->row, g->heads[s->head], s->start) * size;
        for (int64_t i = first; i < end; i++) {
            const int64_t token = i < g->num_sinks ? i : i + window_begin(s);
            const char *x = token < s->before ? out + token * dim * size : from + (token - s->before) * at.token * size;
            if (x != out + i * dim * size) memcpy(out + i * dim * size, x, (size_t)(dim * size));
        }
        /* The stored state must not depend on how a text is split. */
        if (s->num_merges) memset(out + end * dim * size, 0, (size_t)((g->num_exact - end) * dim * size));
    }
}

/* Calls `function` with typed pointers to the sums of keys and values from slot `first` on. */
template <typename Function> INLINE void with_sums(const HeadGroup *g, int64_t first, Function function) {
    const int64_t key = first * g->key_dim, value = first * g->value_dim;
    if (g->state_dtype == INT8) function((int8_t *)g->key_sum + key, (int8_t *)g->value_sum + value);
    else if (g->state_dtype == BFLOAT16) function((Bfloat16 *)g->key_sum + key, (Bfloat16 *)g->value_sum + value);
    else function((float *)g->key_sum + key, (float *)g->value_sum + value);
}

template <typename T> INLINE void widen(const T *x, const Bfloat16 *scale, int64_t num, int64_t dim, float *out) {
    for (int64_t i = 0; i < num; i++)
        for (int64_t j = 0; j < dim; j++)
            out[i * dim + j] = scale ? as_float(x[i * dim + j]) * as_float(scale[i]) : as_float(x[i * dim + j]);
}

template <typename T> INLINE void narrow(const float *x, int64_t num, int64_t dim, Bfloat16 *scale, T *out) {
    for (int64_t i = 0; i < num; i++) {
        if constexpr (std::is_same_v<T, int8_t>) {
            const float own = scale_of(x + i * dim, dim);
            put(scale + i, own);
            for (int64_t j = 0; j < dim; j++) out[i * dim + j] = (int8_t)quantized(x[i * dim + j], own);
        } else
            for (int64_t j = 0; j < dim; j++) put(out + i * dim + j, x[i * dim + j]);
    }
}

/* Convert narrow sums of a stream to float32, and back. */
static void load_sums(HeadStream *s) {
    const HeadGroup *g = s->group;
    const int64_t first = (s->row * g->num_kv_heads + s->head) * g->capacity;
    with_sums(g, first, [=](auto *keys, auto *values) {
        widen(keys, from_row(g->key_step, first), g->capacity, g->key_dim, s->own.key_sum);
        widen(values, from_row(g->value_step, first), g->capacity, g->value_dim, s->own.value_sum);
    });
    s->sums.key = s->own.key_sum;
    s->sums.value = s->own.value_sum;
}

static void store_sums(const HeadStream *s) {
    const HeadGroup *g = s->group;
    const int64_t first = (s->row * g->num_kv_heads + s->head) * g->capacity;
    with_sums(g, first, [=](auto *keys, auto *values) {
        narrow(s->own.key_sum, g->capacity, g->key_dim, from_row(g->key_step, first), keys);
        narrow(s->own.value_sum, g->capacity, g->value_dim, from_row(g->value_step, first), values);
    });
}

/* The outputs of the last exact token, from the stored rows. */
static void read_one(const HeadStream *s) {
    const HeadGroup *g = s->group;
    Decode shape = {};
    shape.group_size = g->group_size;
    shape.key_dim = g->key_dim;
    shape.value_dim = g->value_dim;
    const int64_t k = g->key_dim, v = g->value_dim, stream = s->row * g->num_kv_heads + s->head;
    const int64_t size = g->group_size, first = g->heads[s->head] * size;
    float queries[size * k], out[size * v];
    Softmax softmax[size];
    memset(out, 0, sizeof(out));
    for (int64_t i = 0; i < size; i++) {
        read_numbers(g->query_dtype, g->q, place_in(g->q_at, s->row, first + i, s->done), k, 1, queries + i * k, k);
        softmax[i] = {-INFINITY, 0, out + i * v};
    }
    with_type(g->dtype, g->pending_keys, stream * g->num_exact * k,
              [=, call = &shape, x = (const float *)queries, y = &softmax[0]](auto *keys) {
                  absorb(call, x, keys, (decltype(keys))g->pending_values + stream * g->num_exact * v, Mass{},
                         s->filled + 1, y);
              });
    const int64_t num = g->capacity ? s->schedule[0] : 0, slots = stream * g->capacity;
    if (num) {
        for (int64_t i = 0; i < size * k; i++) queries[i] *= g->key_unit[stream];
        const Mass mass = {s->sums.count, nullptr, s->sums.weight, from_row(g->key_step, slots),
                           from_row(g->value_step, slots), 0};
        with_sums(g, slots, [=, call = &shape, x = (const float *)queries, y = &softmax[0]](auto *keys, auto *values) {
            absorb(call, x, keys, values, mass, num, y, g->temperature ? g->temperature + first : nullptr,
                   g->bias ? g->bias + first : nullptr);
        });
    }
    for (int64_t i = 0; i < size; i++)
        write_numbers(g->query_dtype, g->o, place_in(g->o_at, s->row, first + i, s->done), v, 1 / softmax[i].total,
                      out + i * v);
}

/* Allocates a head's scratch for layouts and merging; returns 1 if out of memory. */
static int take_memory(HeadStream *s) {
    s->memory = allocate([=](Arena *arena) { s->own = take_head(arena, s->group, &s->call, s->length); });
    if (!s->memory) return 1;
    s->call.k.data = s->own.keys;
    s->call.v.data = s->own.values;
    s->call.slots = s->own.slots;
    s->call.token_weights = s->own.weights;
    return 0;
}

/* A head of a row reads `length` new tokens from `done` on, and stores them; returns 1 if out of memory. Updates `num_exact`,
   the number of exact tokens, and `num_merges`, the merges in this call. */
static int read_tokens_of(const HeadGroup *g, int64_t row, int64_t head, int64_t done, int64_t length,
                          int64_t *num_exact, int64_t *num_merges) {
    HeadStream s = {};
    const int64_t stream = row * g->num_kv_heads + head;
    s.group = g;
    s.call = learning_call(g);
    const int64_t slots = stream * g->capacity;
    s.sums = {(float *)g->key_sum + slots * g->key_dim, (float *)g->value_sum + slots * g->value_dim,
              g->count + slots, from_row(g->weight, slots), g->position_sum + slots, g->state_dtype};
    s.row = row;
    s.head = head;
    s.start = s.done = done;
    s.length = length;
    s.before = s.filled = *num_exact;
    s.schedule = g->schedule + g->schedule_start[row] + *num_merges;
    s.earlier_merges = *num_merges;
    const int is_one = length == 1, is_full = g->capacity && s.filled + length >= g->num_exact;
    /* One token is read from the stored rows. */
    if ((is_full || (g->q && !is_one)) && take_memory(&s)) return 1;
    const int is_narrow = s.memory && g->capacity && g->state_dtype != FLOAT32;
    if (is_narrow) load_sums(&s);
    if (g->q && is_one) {
        put_recent(&s, s.filled, s.filled + 1);
        s.before++;
        read_one(&s);
    }
    while (s.done < done + length) {
        const int64_t left = least(done + length - s.done, g->num_exact - s.filled);
        const int64_t num = g->q ? least(left, QUERIES) : left;
        if (g->q && !is_one) {
            lay_out_slots(&s);
            lay_out(&s, num);
            for (int64_t i = 0; i < g->group_size; i++) read_block(&s, i, num);
        }
        advance(&s, num);
    }
    put_recent(&s, s.num_merges ? least(s.before, g->num_sinks) : s.before, s.filled);
    if (is_narrow && s.num_merges) store_sums(&s);
    free(s.memory);
    *num_exact = s.filled;
    *num_merges += s.num_merges;
    return 0;
}

/* All new tokens of a head of a row; at most `few` are read one by one. */
static int read_stream(const HeadGroup *g, int64_t row, int64_t head, int64_t few) {
    int64_t num_exact = g->filled[row], num_merges = 0, is_out_of_memory = 0;
    const int64_t length = g->length[row], step = g->q && length <= few ? 1 : length;
    for (int64_t done = 0; done < length && !is_out_of_memory; done += step)
        is_out_of_memory = read_tokens_of(g, row, head, done, step, &num_exact, &num_merges);
    return (int)is_out_of_memory;
}

/* Returns 0, or 1 if out of memory. */
extern "C" int ovq_memory(const HeadGroup *groups, int64_t num, int64_t num_threads) {
    int64_t streams = 0, next = 0;
    int is_out_of_memory = 0;
    for (int64_t i = 0; i < num; i++) streams += groups[i].num_rows * groups[i].num_kv_heads;
    /* Heads differ in cost. */
    parallel(least(num_threads, streams), [&](Worker worker) {
        worker.take(streams, &next, [&](int64_t own) {
            const HeadGroup *g = groups;
            while (own >= g->num_rows * g->num_kv_heads) {
                own -= g->num_rows * g->num_kv_heads;
                g++;
            }
            if (read_stream(g, own / g->num_kv_heads, own % g->num_kv_heads, FEW_TOKENS))
                __atomic_store_n(&is_out_of_memory, 1, __ATOMIC_RELAXED);
        });
    });
    return is_out_of_memory;
}
