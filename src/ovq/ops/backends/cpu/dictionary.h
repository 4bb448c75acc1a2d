/* One stream's dictionary, and one chunk of its tokens, laid out for products. */
#pragma once

#include "call.h"
#include "bytes.h"

/* Rows that queries attend to: the slots of a dictionary, or the tokens of a chunk. */
struct Rows {
    float *keys;          /* [M, key_ld] */
    float *values;        /* [M, value_ld] */
    float *key_panels;    /* Keys as columns, [M / NR, K, NR], or NULL. */
    float *value_panels;  /* Values likewise, [M / NR, V, NR]: the backward's, or where pairs are merged, else NULL. */
    int32_t *is_exact;    /* [1]: whether panels that only exact products read are kept; NULL if they always are. */
    int reads_keys;       /* Whether queries or routing read `key_panels`. */
    float *bias;          /* [M]: log of the count or weight, -inf for unused rows. */
    int32_t *is_finite;   /* [1]: for a chunk, whether all values, and with token weights all keys, were finite; values that
                             were not are stored as 0. */
    float *weights;       /* [M]: for a chunk, the weights of tokens; NULL for 1. */
    uint32_t *words;      /* Rounded keys, and values if pairs are merged, as columns, [M / NR, row_words, NR], or NULL. */
    uint32_t *bytes;      /* The same in int8, if searches use it, [M / NR, item_bytes, NR]; or NULL. */
    Scales of_keys, of_values; /* Quantization of `bytes`; else NULL. */
    uint32_t *value_pairs; /* bfloat16 values in row pairs, [M / 2, value_ld], for the forward; else NULL. */
    uint32_t *value_words; /* Backward of bfloat16: values as columns, [M / NR, value_words, NR], and keys in row pairs, */
    uint32_t *key_pairs;   /* [M / 2, key_ld]; else NULL. */
};

struct Dictionary {
    Rows rows;
    float *is_open;  /* [M]: 0 for a slot in use with weight above 0, else -inf. */
    double *norm;    /* [M]: length of the mean key. */
    float *inverse;  /* [M]: 1 / length; 1 for a slot that is not in use. */
    int64_t num;     /* Slots in use; each thread of a team has its own copy. */
};

/* Lengths are clamped to this before a division, here and in the reference. */
#define TINY 1e-30
/* Lower bound of the weight of a token of the own chunk in its score, where that includes weights. */
#define TOKEN_WEIGHT 1e-37f
/* Products of rounded means and weights that are smaller are 0 (`LEAST_SUM` of narrow.py). */
#define LEAST_SUM 0x1p-138f

/* Whether a length is extreme for float32 products, or not finite; zero is neither (`ORDINARY` of options.py). */
INLINE int is_extreme(double length) { return !(length == 0 || (length >= 1e-15 && length <= 1e15)); }

INLINE int64_t key_ld(const Call *call) { return padded(call->k.dim, VL); }
INLINE int64_t value_ld(const Call *call) { return padded(call->v.dim, VL); }
INLINE int64_t key_words(const Call *call) { return num_words(call->k.dim); }
INLINE int64_t value_words(const Call *call) { return num_words(call->v.dim); }
INLINE int64_t row_words(const Call *call) {
    return key_words(call) + (call->merges_pairs && !HAS_BYTES ? value_words(call) : 0);
}
#if HAS_BYTES
INLINE int64_t item_bytes(const Call *call) { return byte_words(call->k.dim) + byte_words(call->v.dim); }
#else
INLINE int64_t item_bytes(const Call *) { return 0; }
#endif

static Scales take_scales(Arena *arena, int64_t num) {
    return {TAKE(arena, float, num), TAKE(arena, float, num), TAKE(arena, int32_t, num)};
}

static Rows take_rows(Arena *arena, const Call *call, int64_t num, int is_backward, int is_routed) {
    const int is_in_pairs = HAS_PAIRS && call->dtype == BFLOAT16, merges_pairs = call->merges_pairs && !is_backward;
    const int has_value_panels = merges_pairs || (is_backward && !is_in_pairs);
    Rows rows;
    num = padded(num, NR);
    rows.keys = TAKE(arena, float, num * key_ld(call));
    rows.values = TAKE(arena, float, num * value_ld(call));
    rows.key_panels = is_in_pairs && !merges_pairs ? nullptr : TAKE(arena, float, num * call->k.dim);
    rows.value_panels = has_value_panels ? TAKE(arena, float, num * call->v.dim) : nullptr;
    rows.is_exact = HAS_ROUGH && merges_pairs ? TAKE(arena, int32_t, 1) : nullptr;
    rows.reads_keys = !is_in_pairs;
    rows.bias = TAKE(arena, float, num);
    rows.is_finite = TAKE(arena, int32_t, 1);
    rows.weights = nullptr;
    const int has_bytes = HAS_BYTES && merges_pairs, has_words = is_in_pairs || (HAS_PAIRS && is_routed && !has_bytes);
    rows.words = has_words ? TAKE(arena, uint32_t, num * row_words(call)) : nullptr;
    rows.bytes = has_bytes ? TAKE(arena, uint32_t, num * item_bytes(call)) : nullptr;
    rows.of_keys = has_bytes ? take_scales(arena, num) : Scales{};
    rows.of_values = has_bytes ? take_scales(arena, num) : Scales{};
    rows.value_pairs = is_in_pairs && !is_backward ? TAKE(arena, uint32_t, num / 2 * value_ld(call)) : nullptr;
    rows.value_words = is_in_pairs && is_backward ? TAKE(arena, uint32_t, num * value_words(call)) : nullptr;
    rows.key_pairs = is_in_pairs && is_backward ? TAKE(arena, uint32_t, num / 2 * key_ld(call)) : nullptr;
    return rows;
}

/* x + n, or NULL if x is NULL. */
template <typename T> INLINE T *from_row(T *x, int64_t n) { return x ? x + n : nullptr; }

INLINE Scales scales_from(const Scales &scales, int64_t i) {
    return {from_row(scales.size, i), from_row(scales.error, i), from_row(scales.begin, i)};
}

/* The rows from i on, i a multiple of NR. */
INLINE Rows rows_from(const Rows *rows, const Call *call, int64_t i) {
    return {from_row(rows->keys, i * key_ld(call)),
            from_row(rows->values, i * value_ld(call)),
            from_row(rows->key_panels, i * call->k.dim),
            from_row(rows->value_panels, i * call->v.dim),
            rows->is_exact,
            rows->reads_keys,
            from_row(rows->bias, i),
            rows->is_finite,
            from_row(rows->weights, i),
            from_row(rows->words, i * row_words(call)),
            from_row(rows->bytes, i * item_bytes(call)),
            scales_from(rows->of_keys, i),
            scales_from(rows->of_values, i),
            from_row(rows->value_pairs, i / 2 * value_ld(call)),
            from_row(rows->value_words, i * value_words(call)),
            from_row(rows->key_pairs, i / 2 * key_ld(call))};
}

static Dictionary take_dictionary(Arena *arena, const Call *call, int is_backward) {
    Dictionary dictionary;
    const int64_t num = padded(call->capacity, NR);
    dictionary.rows = take_rows(arena, call, num, is_backward, !is_backward);
    take_each(arena, num, &dictionary.is_open, &dictionary.norm, &dictionary.inverse);
    return dictionary;
}

/* From here on, keep the panels that only exact products read; fills in those of the first `num` rows. */
static void keep_panels(const Rows *rows, const Call *call, int64_t num) {
    if (*rows->is_exact) return;
    *rows->is_exact = 1;
    for (int64_t i = 0; i < num; i++) {
        if (!rows->reads_keys) put_column(rows->key_panels, call->k.dim, i, rows->keys + i * key_ld(call));
        put_column(rows->value_panels, call->v.dim, i, rows->values + i * value_ld(call));
    }
}

/* Set all layouts of row i from its key and value in `keys` and `values`. */
static void set_row(Rows *rows, const Call *call, int64_t i, float bias) {
    const float *key = rows->keys + i * key_ld(call), *value = rows->values + i * value_ld(call);
    const int is_exact = !rows->is_exact || *rows->is_exact;
    if (rows->key_panels && (is_exact || rows->reads_keys)) put_column(rows->key_panels, call->k.dim, i, key);
    if (rows->value_panels && is_exact) put_column(rows->value_panels, call->v.dim, i, value);
    if (rows->words) {
        uint32_t words[row_words(call)];
        round_row(key, key_ld(call), words);
        if (row_words(call) > key_words(call)) round_row(value, value_ld(call), words + key_words(call));
        put_words(rows->words, row_words(call), i, words);
    }
#if HAS_BYTES
    if (rows->bytes) {
        uint32_t bytes[item_bytes(call)];
        round_to_bytes(key, key_ld(call), bytes, rows->of_keys, i);
        round_to_bytes(value, value_ld(call), bytes + byte_words(call->k.dim), rows->of_values, i);
        put_words(rows->bytes, item_bytes(call), i, bytes);
    }
#endif
    if (rows->key_pairs) {
        uint32_t words[value_words(call)];
        round_row(value, value_ld(call), words);
        put_words(rows->value_words, value_words(call), i, words);
        put_pair(rows->key_pairs, key_ld(call), i, key);
    }
    if (rows->value_pairs) put_pair(rows->value_pairs, value_ld(call), i, value);
    rows->bias[i] = bias;
}

/* A row that nothing attends to; finite, as it is multiplied by zero probabilities. */
static void clear_row(Rows *rows, const Call *call, int64_t i) {
    memset(rows->keys + i * key_ld(call), 0, sizeof(float) * key_ld(call));
    memset(rows->values + i * value_ld(call), 0, sizeof(float) * value_ld(call));
    set_row(rows, call, i, -INFINITY);
}

/* Set slot i from its sums, count and mass. A slot without mass is in use, but attracts nothing. */
static void set_slot(Dictionary *dictionary, const Call *call, int64_t i, const float *key_sum, const float *value_sum,
                     int64_t count, float mass) {
    if (!count) {
        clear_row(&dictionary->rows, call, i);
        dictionary->is_open[i] = -INFINITY;
        dictionary->norm[i] = 0;
        dictionary->inverse[i] = 1;
        return;
    }
    float *key = dictionary->rows.keys + i * key_ld(call), *value = dictionary->rows.values + i * value_ld(call);
    const float divisor = mass > 0 ? mass : 1;
    for (int64_t j = 0; j < key_ld(call); j++) key[j] = j < call->k.dim ? key_sum[j] / divisor : 0;
    for (int64_t j = 0; j < value_ld(call); j++) value[j] = j < call->v.dim ? value_sum[j] / divisor : 0;
    set_row(&dictionary->rows, call, i, mass > 0 ? logf(mass) : -INFINITY);
    dictionary->is_open[i] = mass > 0 ? 0 : -INFINITY;
    dictionary->norm[i] = sqrt(exact_dot(key, key, call->k.dim));
    dictionary->inverse[i] = (float)(1 / fmax(dictionary->norm[i], TINY));
}

/* The sums of a stream, in the tensors of the call. */
struct Sums {
    float *key, *value;
    int64_t *count;
    float *weight;     /* NULL if it equals the count. */
    int64_t *position; /* Sums of positions, where these are kept; else NULL. */
    int64_t format;    /* Storage format: sums here are float32, rounded to what this format can hold. */
};

INLINE float mass_of(const Sums *sums, int64_t i) { return sums->weight ? sums->weight[i] : (float)sums->count[i]; }

INLINE Sums sums_of(const Call *call, int64_t row, int64_t head) {
    const int64_t first = (row * call->num_kv_heads + head) * call->capacity;
    return {call->key_sum + first * call->k.dim, call->value_sum + first * call->v.dim, call->count + first,
            from_row(call->weight, first), nullptr, call->state_dtype};
}

static void update_slot(Dictionary *dictionary, const Call *call, int64_t i, const Sums *sums) {
    set_slot(dictionary, call, i, sums->key + i * call->k.dim, sums->value + i * call->v.dim, sums->count[i],
             mass_of(sums, i));
}

/* INT8 scale of `dim` sums, as `narrowed` of narrow.py computes it; NaN if a sum is not finite. */
static float scale_of(const float *sums, int64_t dim) {
    float most = 0;
    int is_finite = 1;
    for (int64_t i = 0; i < dim; i++) {
        most = fmaxf(most, fabsf(sums[i]));
        is_finite &= std::isfinite(sums[i]) != 0;
    }
    Bfloat16 scale;
    put(&scale, most / 127);
    if (!is_finite) return NAN;
    return as_float(scale) < FLT_MIN ? 0 : as_float(scale);
}

/* A sum quantized by its scale. */
INLINE float quantized(float sum, float scale) { return scale > 0 ? nearbyintf(sum / scale) : 0; }

/* Round sums, divided by `divisor`, to what their format can hold, and multiply them by `factor`; `rounded_` of narrow.py. */
static void round_sums(float *sums, int64_t dim, int64_t format, float divisor, float factor) {
    for (int64_t i = 0; i < dim; i++) sums[i] /= divisor;
    const float scale = format == INT8 ? scale_of(sums, dim) : 0;
    for (int64_t i = 0; i < dim; i++) {
        Bfloat16 rounded;
        put(&rounded, sums[i]);
        const float sum = (format == INT8 ? quantized(sums[i], scale) * scale : as_float(rounded)) * factor;
        sums[i] = fabsf(sum) < LEAST_SUM ? 0 : sum;
    }
}

/* Round the sums of slot i if they are narrow: with forgetting, its means, in the sums of a slot of weight `faded`. */
static void round_slot(const Call *call, const Sums *sums, int64_t i, float faded) {
    if (sums->format == FLOAT32) return;
    const float weight = call->weighs_chunk ? sums->weight[i] : 1, factor = call->weighs_chunk ? faded : 1;
    const float divisor = weight > 0 ? weight : 1;
    round_sums(sums->key + i * call->k.dim, call->k.dim, sums->format, divisor, factor);
    round_sums(sums->value + i * call->v.dim, call->v.dim, sums->format, divisor, factor);
}

/* Multiply sums and weight of a slot by a factor. Narrow sums are those of the same rounded mean then. */
INLINE void scale_sums(const Call *call, const Sums *sums, int64_t i, float factor) {
    const float faded = sums->weight[i] * factor;
    const int is_wide = sums->format == FLOAT32;
    round_slot(call, sums, i, faded);
    for (int64_t j = 0; is_wide && j < call->k.dim; j++) sums->key[i * call->k.dim + j] *= factor;
    for (int64_t j = 0; is_wide && j < call->v.dim; j++) sums->value[i * call->v.dim + j] *= factor;
    sums->weight[i] = faded;
}

/* Fade all slots by a factor, as `faded` of fading.py does. */
static void fade_slots(Dictionary *dictionary, const Call *call, const Sums *sums, float factor) {
    for (int64_t i = 0; i < dictionary->num; i++) {
        scale_sums(call, sums, i, factor);
        update_slot(dictionary, call, i, sums);
    }
}

/* Drop slot i if it weighs too little, or raise it to the least weight, as `ended` of fading.py does. */
static void bound_slot(Dictionary *dictionary, const Call *call, const Sums *sums, int64_t i) {
    const float weight = sums->weight[i], least = (float)call->least_weight;
    if (!(weight > 0 && weight < least)) return;
    scale_sums(call, sums, i, call->merges_pairs ? 0 : 1 / weight * least);
    update_slot(dictionary, call, i, sums);
}

static void load_dictionary(Dictionary *dictionary, const Call *call, const Sums *sums) {
    for (int64_t i = 0; i < call->capacity; i++) update_slot(dictionary, call, i, sums);
    for (int64_t i = call->capacity; i < padded(call->capacity, NR); i++)
        set_slot(dictionary, call, i, nullptr, nullptr, 0, 0);
}

INLINE void add_sums(const Call *call, float *key_sum, float *value_sum, const float *keys, const float *values,
                     int sign) {
    for (int64_t j = 0; j < call->k.dim; j++) key_sum[j] += sign * keys[j];
    for (int64_t j = 0; j < call->v.dim; j++) value_sum[j] += sign * values[j];
}

/* out [n] = weight x. Not inlined, so that no compiler fuses this product with a following sum into one rounding: sums equal
   those of the other backends to the last bit. */
static __attribute__((noinline)) void weighted_row(float weight, const float *x, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j++) out[j] = weight * x[j];
}

/* Whether token t of a chunk has weight 0, and so leaves no trace. */
INLINE int is_weightless(const Rows *tokens, int64_t t) { return tokens->weights && !(tokens->weights[t] > 0); }

/* Zeroes non-finite numbers in tokens of weight 0 before they are merged: 0 times NaN is NaN. */
static void clear_weightless(Rows *tokens, const Call *call, int64_t num) {
    for (int64_t t = 0; t < num; t++) {
        if (!is_weightless(tokens, t)) continue;
        float *key = tokens->keys + t * key_ld(call), *value = tokens->values + t * value_ld(call);
        for (int64_t j = 0; j < key_ld(call); j++)
            if (!std::isfinite(key[j])) key[j] = 0;
        for (int64_t j = 0; j < value_ld(call); j++)
            if (!std::isfinite(value[j])) value[j] = 0;
    }
}

/* Add token t of a chunk to the sums of slot i, or take it back. */
static void add_token(const Sums *sums, const Call *call, int64_t i, const Rows *tokens, int64_t t, int sign) {
    const float *key = tokens->keys + t * key_ld(call), *value = tokens->values + t * value_ld(call);
    float of_key[key_ld(call)], of_value[value_ld(call)];
    if (sums->weight) {
        weighted_row(tokens->weights[t], key, key_ld(call), of_key);
        weighted_row(tokens->weights[t], value, value_ld(call), of_value);
        key = of_key;
        value = of_value;
        sums->weight[i] += sign * tokens->weights[t];
    }
    add_sums(call, sums->key + i * call->k.dim, sums->value + i * call->v.dim, key, value, sign);
    sums->count[i] += sign;
}

/* Update the slots of a chunk's tokens from their sums, each once. */
static void update_slots(Dictionary *dictionary, const Call *call, const Sums *sums, const int32_t *slots, int64_t num,
                         uint8_t *is_done) {
    int64_t end = 0;
    for (int64_t t = 0; t < num; t++) {
        is_done[slots[t]] = 1;
        if (slots[t] >= end) end = slots[t] + 1;
    }
    /* In order, as neighbours share cache lines of a panel. */
    for (int64_t i = 0; i < end; i++) {
        if (is_done[i]) {
            round_slot(call, sums, i, mass_of(sums, i));
            update_slot(dictionary, call, i, sums);
        }
        is_done[i] = 0;
    }
}

static void load_values(Rows *tokens, const Call *call, int64_t chunk, int64_t head, int64_t num) {
    read_tokens(call, &call->v, chunk, head, 0, num, 1, tokens->values, value_ld(call));
}

/* Loads the `num` tokens of a chunk. Non-finite values are left out of products: zero times NaN is NaN, and would reach the
   queries before it. */
static void load_chunk(Rows *tokens, const Call *call, int64_t chunk, int64_t head, int64_t num) {
    const int64_t numbers = num * value_ld(call);
    read_tokens(call, &call->k, chunk, head, 0, num, 1, tokens->keys, key_ld(call));
    load_values(tokens, call, chunk, head, num);
    for (int64_t t = 0; tokens->weights && t < num; t++)
        tokens->weights[t] = call->token_weights[(chunk * call->width + t) * call->num_kv_heads + head];
    *tokens->is_finite = are_finite(tokens->values, numbers);
    for (int64_t i = 0; !*tokens->is_finite && i < numbers; i++)
        if (!std::isfinite(tokens->values[i])) tokens->values[i] = 0;
    if (tokens->weights && !are_finite(tokens->keys, num * key_ld(call))) *tokens->is_finite = 0;
    for (int64_t t = 0; t < num; t++)
        set_row(tokens, call, t, call->weighs_chunk ? logf(fmaxf(tokens->weights[t], TOKEN_WEIGHT)) : 0);
    for (int64_t t = num; t < padded(num, NR); t++) clear_row(tokens, call, t);
}

/* The i-th chunk of a row, and the number of slots before and after it. */
struct Chunk {
    int64_t index, num, before, after;
    int is_complete;
};

INLINE int64_t num_chunks(const Call *call, int64_t row) {
    return (call->length[row] + call->width - 1) / call->width;
}

INLINE Chunk chunk_of(const Call *call, int64_t row, int64_t i) {
    const int32_t *schedule = call->schedule + call->schedule_start[row];
    Chunk chunk;
    chunk.index = call->first_chunk[row] + i;
    chunk.num = least(call->width, call->length[row] - i * call->width);
    chunk.is_complete = call->length[row] >= (i + 1) * call->chunk_size;
    chunk.before = schedule[i];
    chunk.after = chunk.is_complete ? schedule[i + 1] : chunk.before;
    return chunk;
}
