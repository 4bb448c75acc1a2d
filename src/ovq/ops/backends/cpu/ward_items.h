/* The items of the rules that merge pairs: what is known of each, and what merging two of them costs exactly.

   Items are columns: [slots | tokens | merged], each part padded to whole panels. A merge makes a new column, the k-th
   one of a chunk column `first_merged + k`. A *row* holds lower bounds of an item's costs with every column. An item's
   *bound* is a lower bound of its costs with all others, except that those of slots leave out pairs with tokens and
   with slots that changed later, and by "ward-sqrt" those of all items leave out pairs with what was merged later: the
   bounds of these cover them. */
#pragma once

#include "clusters.h"
#include "points.h"

/* Rows beyond those of the tokens: of slots whose costs are needed, at least. */
#define SPARE_ROWS 64
/* Pairs of an item that are tried by their estimates before the row is computed anew. */
#define TRIES 12

struct Ward {
    int64_t num_columns, first_token, first_merged, num_rows, num_merged;
    int has_bounds, has_squares; /* Whether what is kept of slots holds for the dictionary as it is. */
    int is_sqrt;         /* Whether the rule is "ward-sqrt". */
    int is_weighted;     /* Whether tokens have weights. */
    int is_wide;         /* Whether float32 products mean nothing for this chunk. */
    double value_factor; /* g^2 = w^2 / s_v: what squared distances of values are multiplied with. */
    double tie;
    double free_mass;    /* Items of no more cost nothing. */
    double unit;         /* What exact costs are divided by: 1, or what makes extreme ones fit into floats. */
    float keep, rough_keep; /* 1 - the relative rounding error of an estimate, by either kind of product. */
    int is_rough;        /* Whether rough products will do for this chunk. */
    uint32_t *words;     /* [C, row_words]: the tokens, values scaled. */
    float *steps;        /* [2, C]: how long the steps of their keys and of their values are; NULL where these are not whole. */
    float now;           /* Counts the times at which slots changed or their bounds were computed anew. */
    float *slot_time;    /* [M]: the last such time of the slot. Its bound covers pairs with slots of no later time. */
    float *slot_bound;   /* [M]: the bound of each slot as of the value factor `slot_factor`. */
    double *slot_factor; /* [M] */
    float *slot_growth;  /* [M]: what it grows by at least with the value factor. */
    double *key_square, *value_square; /* [M]: squared lengths of the means of slots. */
    float *rows;         /* [num_rows, columns] */
    int32_t *row, *seen; /* [columns]: the item's row or -1; [num_rows]: merges the row knows of. */
    int32_t *spare;      /* [num_rows]: rows that nobody uses. */
    int64_t num_spare;
    float expected;      /* Where the dearest merge of this chunk may lie. */
    float level, last_level; /* The dearest merge of the last chunk, and of the one before. */
    int32_t *wanted;     /* [M]: slots whose bounds are computed anew for this chunk; in the end, those merged away. */
    int64_t num_wanted;
    double *mass;        /* [columns]: count or weight. */
    /* [columns]; `count` is the same in float32, and `square` |key|^2 + g^2 |value|^2. What weighs nothing costs nothing to
       merge: it has a bound of 0, and those of others leave out pairs with it, as if it were infinitely far. */
    float *bound, *count, *square;
    float *value_length; /* [columns]: g^2 |value|^2. */
    int32_t *index, *into, *partner; /* [columns]: lowest member; column it was merged into; nearest, or -1. */
    double *cost;        /* [columns]: of the pair with the partner. */
    int32_t *candidate;  /* [columns]: nearest by the estimates of the item's first row, or -1. */
    float *rest;         /* [columns]: what all other pairs of the item cost, at least. */
    int32_t *pair;       /* [C, 2]: columns of each merge. */
    float *height;       /* [C]: its cost. */
    double *mean;        /* [C, K + V]: of merged columns. */
    Rows merged;         /* [C]: the same in float32, for products. */
    float *scaled;       /* [C, value_ld]: g^2 times the values of the tokens. */
    int32_t *tried;      /* [columns] */
    double *tried_cost;  /* [columns] */
    int32_t *home;       /* [columns]: slot of each column that is left. */
};

static Ward take_ward(Arena *arena, const Call *call) {
    Ward ward = {};
    ward.is_sqrt = call->is_sqrt;
    ward.is_weighted = call->weight != nullptr;
    const int64_t size = padded(call->chunk_size, NR), slots = padded(call->capacity, NR);
    ward.num_columns = slots + 2 * size + VL;
    ward.num_rows = 2 * size + SPARE_ROWS;
    const int64_t n = ward.num_columns;
    ward.slot_time = TAKE(arena, float, slots);
    ward.slot_bound = TAKE(arena, float, slots);
    ward.slot_factor = TAKE(arena, double, slots);
    ward.slot_growth = TAKE(arena, float, slots);
    ward.key_square = TAKE(arena, double, slots);
    ward.value_square = TAKE(arena, double, slots);
    ward.rows = TAKE(arena, float, ward.num_rows * n);
    ward.row = TAKE(arena, int32_t, n);
    ward.seen = TAKE(arena, int32_t, ward.num_rows);
    ward.spare = TAKE(arena, int32_t, ward.num_rows);
    ward.wanted = TAKE(arena, int32_t, slots);
    ward.bound = TAKE(arena, float, n);
    ward.mass = TAKE(arena, double, n);
    ward.count = TAKE(arena, float, n);
    ward.square = TAKE(arena, float, n);
    ward.value_length = TAKE(arena, float, n);
    ward.index = TAKE(arena, int32_t, n);
    ward.into = TAKE(arena, int32_t, n);
    ward.partner = TAKE(arena, int32_t, n);
    ward.cost = TAKE(arena, double, n);
    ward.candidate = TAKE(arena, int32_t, n);
    ward.rest = TAKE(arena, float, n);
    ward.pair = TAKE(arena, int32_t, 2 * size);
    ward.height = TAKE(arena, float, size);
    ward.mean = TAKE(arena, double, size * (call->k.dim + call->v.dim));
    ward.merged = take_rows(arena, call, size, 0, 1);
    ward.scaled = TAKE(arena, float, size * value_ld(call));
    ward.words = HAS_ROUGH ? TAKE(arena, uint32_t, call->chunk_size * row_words(call)) : nullptr;
    ward.steps = HAS_SHORTS ? TAKE(arena, float, 2 * call->chunk_size) : nullptr;
    ward.tried = TAKE(arena, int32_t, n);
    ward.tried_cost = TAKE(arena, double, n);
    ward.home = TAKE(arena, int32_t, n);
    return ward;
}

/* Whether it costs nothing to merge an item with any other, and no product is needed to know it: it weighs nothing, or so
   little that however far another is, the cost is within rounding of zero. */
INLINE int is_weightless(const Ward *ward, int64_t i) { return ward->mass[i] <= ward->free_mass && !ward->is_wide; }

/* The next float below, and above, a double. */
INLINE float below(double x) {
    const float y = (float)x;
    return y > x ? nextafterf(y, -INFINITY) : y;
}

INLINE float above(double x) {
    const float y = (float)x;
    return y < x ? nextafterf(y, INFINITY) : y;
}

/* The items of a chunk: where the means of a column are. */
struct Items {
    const Call *call;
    const Dictionary *dictionary;
    const Rows *tokens;
    const Sums *sums;
    Ward *ward;

    const float *key(int64_t i) const {
        return i < ward->first_token ? dictionary->rows.keys + i * key_ld(call)
                                     : tokens->keys + (i - ward->first_token) * key_ld(call);
    }
    const float *value(int64_t i) const {
        return i < ward->first_token ? dictionary->rows.values + i * value_ld(call)
                                     : tokens->values + (i - ward->first_token) * value_ld(call);
    }
    const double *mean(int64_t i) const {
        return ward->mean + (i - ward->first_merged) * (call->k.dim + call->v.dim);
    }
    int is_merged(int64_t i) const { return i >= ward->first_merged; }
};

static double squared_distance_of(const Items &items, int64_t a, int64_t b) {
    const int64_t k = items.call->k.dim, v = items.call->v.dim;
    const double factor = items.ward->value_factor;
    if (!items.is_merged(a) && !items.is_merged(b))
        return squared_distance(items.key(a), items.key(b), k) +
               factor * squared_distance(items.value(a), items.value(b), v);
    if (items.is_merged(a) && items.is_merged(b))
        return squared_distance(items.mean(a), items.mean(b), k) +
               factor * squared_distance(items.mean(a) + k, items.mean(b) + k, v);
    if (items.is_merged(b)) {
        const int64_t c = a;
        a = b;
        b = c;
    }
    return squared_distance(items.mean(a), items.key(b), k) +
           factor * squared_distance(items.mean(a) + k, items.value(b), v);
}

/* What merging two items costs, in float64; nothing within rounding of zero. */
static double exact_cost(const Items &items, int64_t a, int64_t b) {
    if (is_weightless(items.ward, a) || is_weightless(items.ward, b)) return 0;
    const double m = items.ward->mass[a], n = items.ward->mass[b], half = m + n > 0 ? m * n / (m + n) : 0;
    const double weight = items.call->is_sqrt ? sqrt(half) : half;
    const double cost = weight * squared_distance_of(items, a, b) / items.ward->unit;
    if (!std::isfinite(cost)) return INFINITY;
    return cost <= items.ward->tie ? 0 : cost;
}
