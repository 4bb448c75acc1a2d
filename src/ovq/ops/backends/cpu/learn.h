/* Routing: the slot of each key of a complete chunk; and the merge.

   Scores are float32 products; slots within their rounding error of the best are compared again in float64, so that every
   backend assigns alike (docs/method/math.md). */
#pragma once

#include <algorithm>

#include "merged_slots.h"
#include "read.h"

/* Priorities of keys that open slots last: non-finite ones, which have no cosine, and after them those of weight 0. */
#define NO_COSINE 2.0
#define NO_WEIGHT 3.0

struct Learner {
    int32_t *slot;     /* [width]: the slot each key goes to. */
    double *priority;  /* [width]: best cosine of each key; the lowest open slots. */
    double *ranked;    /* [width]: scratch. */
    uint8_t *opens;    /* [width] */
    uint8_t *is_done;  /* [M]: scratch, zero between uses. */
    int32_t *near;     /* [M]: scratch. */
};

static Learner take_learner(Arena *arena, const Call *call) {
    Learner learner;
    take_each(arena, call->width, &learner.slot, &learner.priority, &learner.ranked, &learner.opens);
    take_each(arena, padded(call->capacity, NR), &learner.is_done, &learner.near);
    return learner;
}

/* Writes the columns whose score is at least `floor` to `near`; returns their number. n is a multiple of NR. */
static int64_t columns_from(const float *scores, int64_t n, float floor, int32_t *near) {
    const Vector least_score = splat(floor);
    int64_t num = 0;
    for (int64_t j = 0; j < n; j += 2 * VL) {
        uint32_t lanes = lanes_at_least(load(scores + j), least_score);
        lanes |= lanes_at_least(load(scores + j + VL), least_score) << VL;
        for (; lanes; lanes &= lanes - 1) near[num++] = (int32_t)(j + __builtin_ctz(lanes));
    }
    return num;
}

/* Returns the largest of n scores; `of_products` gets the largest of their products with `factors`. */
static float highest_with(const float *scores, const float *factors, int64_t n, float *of_products) {
    Vector best = splat(-INFINITY), product = best;
    for (int64_t j = 0; j < n; j += VL) {
        const Vector score = load(scores + j);
        best = higher_of(score, best);
        product = higher_of(score * load(factors + j), product);
    }
    *of_products = highest(product);
    return highest(best);
}

/* Upper bound of the error of a score of `score_keys`, relative to the product of the lengths. */
INLINE double score_error(const Call *call) {
    const double of_sums = (double)call->k.dim * FLT_EPSILON;
    if (!HAS_PAIRS) return of_sums / 2;
    /* Two roundings to bfloat16, or one where keys are bfloat16. */
    return of_sums + (call->dtype == BFLOAT16 ? ROUGHNESS / 2 + FLT_EPSILON : ROUGHNESS);
}

/* Scores [num, n] of at most QUERIES keys [num, key_ld] with all slots. They are approximate where bfloat16 is multiplied,
   and only select the slots to compare again. */
static void score_keys(const Call *call, const Dictionary *dictionary, const float *keys, int64_t num, Reader *reader) {
    const int64_t n = padded(dictionary->num, NR), ld = key_ld(call);
#if HAS_PAIRS
    const int64_t size = key_words(call);
    for (int64_t t = 0; t < num; t++) round_row(keys + t * ld, ld, reader->words + t * size);
    pairs_product(num, n, size, reader->words, size, 1, dictionary->rows.words, row_words(call) * NR, NR, nullptr,
                  Finish{dictionary->is_open, 1}, reader->scores, n);
#else
    product(num, n, call->k.dim, keys, ld, 1, dictionary->rows.key_panels, call->k.dim * NR, NR, dictionary->is_open,
            0, reader->scores, n);
#endif
}

/* The longest mean of a dictionary, and whether any length is extreme. */
struct Lengths {
    double longest;
    int has_extremes;
};

static Lengths lengths_of(const Dictionary *dictionary) {
    Lengths lengths = {0, 0};
    for (int64_t i = 0; i < dictionary->num; i++) {
        lengths.longest = fmax(lengths.longest, dictionary->norm[i]);
        lengths.has_extremes |= is_extreme(dictionary->norm[i]);
    }
    return lengths;
}

/* Whether slot i attracts keys: it is in use and has mass. */
INLINE int is_open(const Dictionary *dictionary, int64_t i) { return dictionary->is_open[i] == 0; }

INLINE double length_of(const Call *call, const float *key) { return sqrt(exact_dot(key, key, call->k.dim)); }

/* `nearest` for extreme lengths, where float32 scores are useless: float64 throughout; 0 for a non-finite key. */
static int32_t nearest_of_all(const Call *call, const Dictionary *dictionary, const float *key, double tie) {
    double best = -INFINITY;
    for (int64_t i = 0; i < dictionary->num; i++) {
        if (!is_open(dictionary, i)) continue;
        const double score = exact_dot(key, dictionary->rows.keys + i * key_ld(call), call->k.dim);
        if (std::isnan(score)) return 0;
        best = fmax(best, score);
    }
    if (!std::isfinite(best)) return 0;
    for (int64_t i = 0; i < dictionary->num; i++)
        if (is_open(dictionary, i) &&
            exact_dot(key, dictionary->rows.keys + i * key_ld(call), call->k.dim) >= best - tie)
            return (int32_t)i;
    return 0;
}

/* The slot with the largest dot product, ties to the lowest index; `best` is the highest score, `own` the length of the
   key. */
static int32_t nearest(const Call *call, const Dictionary *dictionary, const float *key, double own,
                       const float *scores, float best, int64_t n, const Lengths *lengths, const Reader *reader) {
    int32_t *near = reader->near;
    double exact = -INFINITY, *dots = reader->exact;
    const double length = own * lengths->longest;
    /* Twice, as both sides of a comparison have the error. */
    const double tolerance = 2 * (score_error(call) + call->tie) * length;
    const int64_t num = columns_from(scores, n, best - (float)tolerance * 1.001f, near);
    if (num == 1) return near[0];
    for (int64_t i = 0; i < num; i++) {
        dots[i] = exact_dot(key, dictionary->rows.keys + near[i] * key_ld(call), call->k.dim);
        exact = fmax(exact, dots[i]);
    }
    for (int64_t i = 0; i < num; i++)
        if (dots[i] >= exact - call->tie * length) return near[i];
    return 0;
}

/* Best cosine, in float64, of a key with the `num` slots in `near`, or with the first `num` if it is NULL. */
static double exact_cosine(const Call *call, const Dictionary *dictionary, const float *key, const int32_t *near,
                           int64_t num) {
    const double length = fmax(length_of(call, key), TINY);
    double best = -INFINITY;
    for (int64_t i = 0; i < num; i++) {
        const int64_t slot = near ? near[i] : i;
        if (!is_open(dictionary, slot)) continue;
        const double dot = exact_dot(key, dictionary->rows.keys + slot * key_ld(call), call->k.dim);
        const double cosine = dot / length / fmax(dictionary->norm[slot], TINY);
        if (!std::isfinite(cosine)) return NO_COSINE;
        best = fmax(best, cosine);
    }
    return best > -INFINITY ? best : NO_COSINE;
}

/* Routes the keys first..first+num-1 of a chunk: the nearest slot of each and, if keys are to open slots, its best cosine. */
static void route_tile(const Call *call, const Dictionary *dictionary, const Rows *tokens, int64_t first, int64_t num,
                       int has_openers, const Lengths *lengths, Learner *learner, Reader *reader) {
    const int64_t n = padded(dictionary->num, NR), ld = key_ld(call);
    const float *keys = tokens->keys + first * ld;
    score_keys(call, dictionary, keys, num, reader);
    for (int64_t t = 0; t < num; t++) {
        const float *key = keys + t * ld, *own = reader->scores + t * n;
        const double length = length_of(call, key);
        int32_t *slot = learner->slot + first + t;
        double *priority = learner->priority + first + t;
        if (lengths->has_extremes || is_extreme(length)) {
            *slot = nearest_of_all(call, dictionary, key, call->tie * length * lengths->longest);
            if (has_openers) *priority = exact_cosine(call, dictionary, key, nullptr, dictionary->num);
            continue;
        }
        float best, best_product = 0;
        if (has_openers) best = highest_with(own, dictionary->inverse, n, &best_product);
        else best = highest_of(own, n);
        /* No slot attracts keys. */
        const int is_alone = best == -INFINITY;
        *slot = is_alone ? 0 : nearest(call, dictionary, key, length, own, best, n, lengths, reader);
        if (has_openers) *priority = is_alone ? NO_COSINE : best_product / (float)fmax(length, TINY);
    }
}

/* The `num`-th lowest priority of a chunk. */
static double boundary(const Call *call, Learner *learner, int64_t num) {
    memcpy(learner->ranked, learner->priority, sizeof(double) * call->chunk_size);
    std::nth_element(learner->ranked, learner->ranked + num - 1, learner->ranked + call->chunk_size);
    return learner->ranked[num - 1];
}

/* Recomputes the best cosines of some keys of a chunk, at most QUERIES, in float64. */
static void settle_cosines(const Call *call, const Dictionary *dictionary, const Rows *tokens, const int32_t *some,
                           int64_t num, double tolerance, Learner *learner, Reader *reader) {
    const int64_t n = padded(dictionary->num, NR), ld = key_ld(call);
    for (int64_t i = 0; i < num; i++)
        memcpy(reader->queries + i * ld, tokens->keys + some[i] * ld, sizeof(float) * ld);
    score_keys(call, dictionary, reader->queries, num, reader);
    for (int64_t i = 0; i < num; i++) {
        const float *key = reader->queries + i * ld;
        float *scores = reader->scores + i * n;
        for (int64_t j = 0; j < n; j += VL) store(scores + j, load(scores + j) * load(dictionary->inverse + j));
        const double floor = highest_of(scores, n) - tolerance * fmax(length_of(call, key), TINY);
        const int64_t candidates = columns_from(scores, n, (float)floor, reader->near);
        learner->priority[some[i]] = exact_cosine(call, dictionary, key, reader->near, candidates);
    }
}

/* Recomputes the cosines in float64 on which the choice of the `num` most novel keys depends. */
static void settle_novelty(const Call *call, const Dictionary *dictionary, const Rows *tokens, int64_t num,
                           int has_extremes, Learner *learner, Reader *reader) {
    const double last = boundary(call, learner, num);
    /* Cosines are at most 1, and have a few more roundings than a dot product. */
    const double tolerance = 2 * (score_error(call) + (double)(call->k.dim + 16) * FLT_EPSILON + call->tie);
    double next = INFINITY;
    for (int64_t t = num; t < call->chunk_size; t++) next = fmin(next, learner->ranked[t]);
    if (next - last > tolerance) return;
    int32_t some[QUERIES];
    int64_t count = 0;
    for (int64_t t = 0; t < call->chunk_size; t++) {
        const double priority = learner->priority[t];
        /* Cosines of extreme lengths were float64 from the start, and keys without a cosine need none. */
        if (!(fabs(priority - last) <= 2 * tolerance) || has_extremes || priority >= NO_COSINE ||
            is_extreme(length_of(call, tokens->keys + t * key_ld(call))))
            continue;
        some[count++] = (int32_t)t;
        if (count < QUERIES) continue;
        settle_cosines(call, dictionary, tokens, some, count, tolerance, learner, reader);
        count = 0;
    }
    settle_cosines(call, dictionary, tokens, some, count, tolerance, learner, reader);
}

/* Mark the `num` keys of lowest priority, ties to the earliest. */
static void choose_openers(const Call *call, int64_t num, Learner *learner) {
    const double last = boundary(call, learner, num);
    int64_t left = num;
    for (int64_t t = 0; t < call->chunk_size; t++) left -= learner->priority[t] < last - call->tie;
    for (int64_t t = 0; t < call->chunk_size; t++) {
        const double x = learner->priority[t];
        const int is_tied = fabs(x - last) <= call->tie && left > 0;
        learner->opens[t] = x < last - call->tie || is_tied;
        left -= is_tied;
    }
}

/* Add the tokens of a chunk to the sums of their slots, and write the slot of each. */
static void add_tokens(const Call *call, Dictionary *dictionary, const Rows *tokens, const Sums *sums, const Chunk *chunk,
                       int64_t head, const Learner *learner) {
    const int64_t size = call->chunk_size;
    for (int64_t t = 0; t < size; t++) add_token(sums, call, learner->slot[t], tokens, t, 1);
    dictionary->num = chunk->after;
    update_slots(dictionary, call, sums, learner->slot, size, learner->is_done);
    int32_t *out = call->slots + (chunk->index * call->width) * call->num_kv_heads + head;
    for (int64_t t = 0; t < size; t++) out[t * call->num_kv_heads] = learner->slot[t];
}

/* Once a chunk's keys are routed: open slots, merge the other tokens, and write the slot of each. */
static void learn(const Call *call, Dictionary *dictionary, Rows *tokens, const Sums *sums, const Chunk *chunk,
                  int64_t head, Learner *learner, Reader *reader) {
    const int64_t size = call->chunk_size;
    const int is_fresh = !chunk->before;
    /* The key that opens slot 0: the first of a weight above 0, if there is one. */
    int64_t opener = 0;
    while (opener < size && is_weightless(tokens, opener)) opener++;
    opener %= size;
    /* Sums include non-finite values. */
    if (!*tokens->is_finite) load_values(tokens, call, chunk->index, head, size);
    if (is_fresh) {
        /* The others are compared with the slot that it opens, rounded as in the dictionary. */
        const float *key = tokens->keys + opener * key_ld(call), *value = tokens->values + opener * value_ld(call);
        float of_key[key_ld(call)], of_value[value_ld(call)];
        const float weight = tokens->weights ? tokens->weights[opener] : 1;
        weighted_row(weight, key, key_ld(call), of_key);
        weighted_row(weight, value, value_ld(call), of_value);
        set_slot(dictionary, call, 0, of_key, of_value, 1, weight);
        dictionary->num = 1;
        const Lengths lengths = lengths_of(dictionary);
        for (int64_t t = 0; t < size; t += QUERIES)
            route_tile(call, dictionary, tokens, t, least(QUERIES, size - t), 1, &lengths, learner, reader);
    }
    const int64_t existing = dictionary->num, opening = chunk->after - existing;
    memset(learner->opens, 0, (size_t)size);
    if (opening > 0) {
        for (int64_t t = 0; t < size; t++)
            if (is_weightless(tokens, t)) learner->priority[t] = NO_WEIGHT;
        if (is_fresh) learner->priority[opener] = INFINITY;
        const Lengths lengths = lengths_of(dictionary);
        settle_novelty(call, dictionary, tokens, opening, lengths.has_extremes, learner, reader);
        choose_openers(call, opening, learner);
        int32_t slot = (int32_t)existing;
        for (int64_t t = 0; t < size; t++)
            if (learner->opens[t]) learner->slot[t] = slot++;
    }
    if (is_fresh) {
        learner->slot[opener] = 0;
        learner->opens[opener] = 1;
    }
    if (call->merged_slot) {
        const Merged merged = merged_of(call, chunk->index, head);
        const int64_t place =
            note_slots(call, sums, learner->slot, size, chunk->before, &merged, 0, learner->is_done);
        end_notes(call, &merged, place, learner->is_done);
    }
    if (!*tokens->is_finite) clear_weightless(tokens, call, size);
    add_tokens(call, dictionary, tokens, sums, chunk, head, learner);
}
