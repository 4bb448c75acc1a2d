/* merge="ward": after a chunk, slots and tokens are merged pair by pair, the cheapest first, until they fit.

   The order is exactly that of the reference. What makes it fast is that few costs are ever computed exactly. An item
   has a *bound* that none of its costs is below; the item of the lowest bound is looked at, and only if the bound is
   still an estimate are its costs refined, in float64 and as few as will do. Merging the cheapest pair brings no item
   nearer to any other (Ward's costs are *reducible*), so bounds outlive merges, and those of slots the chunk itself.

   Items are columns: [slots | tokens | merged], each part padded to whole panels. A merge makes a new column, the k-th
   one of a chunk column `first_merged + k`. A *row* holds lower bounds of an item's costs with every column. */
#pragma once

#include "learn.h"

/* Rows beyond those of the tokens: of slots whose costs are needed, at least. */
#define SPARE_ROWS 64
/* Columns of a block of products. */
#define BLOCK 128
/* Pairs of an item that are tried by their estimates before the row is computed anew. */
#define TRIES 24

struct Ward {
    int64_t num_columns, first_token, first_merged, num_rows, num_merged;
    int has_bounds, has_squares; /* Whether what is kept of slots holds for the dictionary as it is. */
    int is_wide;         /* Whether float32 products mean nothing for this chunk. */
    double value_factor; /* g^2 = w^2 / s_v: what squared distances of values are multiplied with. */
    double tie;
    double unit;         /* What exact costs are divided by: 1, or what makes extreme ones fit into floats. */
    float keep, rough_keep; /* 1 - the relative rounding error of an estimate, by either kind of product. */
    int is_rough;        /* Whether rough products will do for this chunk. */
    uint32_t *words;     /* [C, row_words]: the tokens, values scaled. */
    float now;           /* Counts the times at which slots changed or their bounds were computed anew. */
    float *slot_time;    /* [M]: when that last was so of the slot; its bound covers what is no younger. */
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
    int32_t *wanted;     /* [M]: slots whose bounds are computed anew for this chunk. */
    int64_t num_wanted;
    float *bound, *count, *square; /* [columns]; `square` is |key|^2 + g^2 |value|^2. */
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
    ward.merged = take_rows(arena, call, size, 0);
    ward.scaled = TAKE(arena, float, size * value_ld(call));
    ward.words = HAS_PAIRS ? TAKE(arena, uint32_t, call->chunk_size * row_words(call)) : nullptr;
    ward.tried = TAKE(arena, int32_t, n);
    ward.tried_cost = TAKE(arena, double, n);
    ward.home = TAKE(arena, int32_t, n);
    return ward;
}

/* The next float below, and above, a double. */
INLINE float below(double x) {
    const float y = (float)x;
    return y > x ? nextafterf(y, -INFINITY) : y;
}

INLINE float above(double x) {
    const float y = (float)x;
    return y < x ? nextafterf(y, INFINITY) : y;
}

typedef double EightDoubles __attribute__((vector_size(64), aligned(8), may_alias));

INLINE EightWide eight(const float *x) { return __builtin_convertvector(*(const Eight *)x, EightWide); }
INLINE EightWide eight(const double *x) { return *(const EightDoubles *)x; }

template <typename A, typename B>
static double squared_distance(const A *a, const B *b, int64_t n) {
    EightWide sums = {}, more = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const EightWide x = eight(a + i) - eight(b + i), y = eight(a + i + 8) - eight(b + i + 8);
        sums += x * x;
        more += y * y;
    }
    sums += more;
    double sum = 0;
    for (int j = 0; j < 8; j++) sum += sums[j];
    for (; i < n; i++) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sum;
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
    const double m = items.ward->count[a], n = items.ward->count[b];
    const double cost = m * n / (m + n) * squared_distance_of(items, a, b) / items.ward->unit;
    if (!std::isfinite(cost)) return INFINITY;
    return cost <= items.ward->tie ? 0 : cost;
}

/* The column of the lowest of n numbers, the first of equal ones, and the lowest of the others; n a multiple of VL. */
static int64_t lowest(const float *x, int64_t n, float *next) {
    /* Two runs at once, so that one need not wait for the other. */
    Vector best[2], second[2];
    IntVector place[2], at = {};
    for (int r = 0; r < 2; r++) best[r] = second[r] = splat(INFINITY), place[r] = at;
    for (int64_t j = 0; j < n; j += 2 * VL, at += 2 * VL)
        for (int r = 0; r < 2; r++) {
            const Vector y = j + r * VL < n ? load(x + j + r * VL) : splat(INFINITY);
            const IntVector is_lower = y < best[r];
            second[r] = lower_of(second[r], is_lower ? best[r] : y);
            best[r] = is_lower ? y : best[r];
            place[r] = is_lower ? at + r * VL : place[r];
        }
    const float floor = lowest_lane(lower_of(best[0], best[1]));
    int64_t column = n;
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < VL; i++)
            if (best[r][i] == floor && place[r][i] + i < column) column = place[r][i] + i;
    const int64_t run = column / VL % 2, lane = column % VL;
    best[run][lane] = second[run][lane];
    *next = lowest_lane(lower_of(best[0], best[1]));
    return column;
}

INLINE float lowest_value(const float *x, int64_t n) {
    Vector best = splat(INFINITY);
    for (int64_t j = 0; j < n; j += VL) best = lower_of(load(x + j), best);
    return lowest_lane(best);
}

/* Turns products x.y of an item with columns first..first+num-1 into lower bounds of their costs. */
static void estimate(const Ward *ward, float keep, float count, float square, int64_t first, int64_t num, float *row) {
    const Vector own = splat(count), length = splat(square);
    for (int64_t j = first; j < first + num; j += VL) {
        const Vector other = load(ward->count + j);
        const Vector distance = keep * (length + load(ward->square + j)) - 2.0f * load(row + j);
        store(row + j, own * other / (own + other) * distance);
    }
}

/* Words of `num` items, their values scaled. */
static void round_rows(const Call *call, int64_t num, const float *keys, const float *values, uint32_t *words) {
    for (int64_t i = 0; i < num; i++, words += row_words(call)) {
        round_row(keys + i * key_ld(call), key_ld(call), words);
        round_row(values + i * value_ld(call), value_ld(call), words + key_words(call));
    }
}

/* The part of a row that products with `columns`, `num` of them from column `first` on, give. */
static void multiply_values(const Call *call, const Rows *columns, int64_t num, int64_t count, const float *values,
                            float *out, int64_t ld) {
    product(count, num, call->v.dim, values, value_ld(call), 1, columns->value_panels, call->v.dim * NR, NR, nullptr, 0,
            out, ld);
}

static void add_products_of_keys(const Call *call, const Rows *columns, int64_t num, int64_t count, const float *keys,
                                 float *out, int64_t ld) {
    product(count, num, call->k.dim, keys, key_ld(call), 1, columns->key_panels, call->k.dim * NR, NR, out, ld, out,
            ld);
}

static void multiply(const Call *call, const Rows *columns, int64_t num, int64_t count, const float *keys,
                     const float *values, float *out, int64_t ld) {
    multiply_values(call, columns, num, count, values, out, ld);
    add_products_of_keys(call, columns, num, count, keys, out, ld);
}

/* The same by rough products: of values, of keys on top of them, and of both. */
static void multiply_values_roughly(const Call *call, const Rows *columns, int64_t num, int64_t count,
                                    const uint32_t *words, float *out, int64_t ld) {
#if HAS_PAIRS
    const int64_t own = row_words(call), keys = key_words(call);
    pairs_product(count, num, own - keys, words + keys, own, columns->words + keys * NR, own * NR, nullptr, out, ld);
#endif
}

static void add_keys_roughly(const Call *call, const Rows *columns, int64_t num, int64_t count, const uint32_t *words,
                             float *out, int64_t ld) {
#if HAS_PAIRS
    const int64_t own = row_words(call);
    pairs_product(count, num, key_words(call), words, own, columns->words, own * NR, out, out, ld);
#endif
}

static void multiply_roughly(const Call *call, const Rows *columns, int64_t num, int64_t count, const uint32_t *words,
                             float *out, int64_t ld) {
#if HAS_PAIRS
    const int64_t own = row_words(call);
    pairs_product(count, num, own, words, own, columns->words, own * NR, nullptr, out, ld);
#endif
}

INLINE float keep_of(const Ward *ward) { return ward->is_rough ? ward->rough_keep : ward->keep; }

/* The lowest cost, from below, of the values alone, given products of values; columns without a slot have an infinite
   length. */
static float lowest_value_cost(const Ward *ward, int64_t i, int64_t num, const float *products) {
    const float keep = keep_of(ward);
    const Vector own = splat(ward->count[i]), length = splat(ward->value_length[i]);
    Vector best = splat(INFINITY);
    for (int64_t j = 0; j < num; j += VL) {
        const Vector other = load(ward->count + j);
        const Vector distance = keep * (length + load(ward->value_length + j)) - 2.0f * load(products + j);
        const Vector cost = own * other / (own + other) * distance;
        best = cost < best ? cost : best;
    }
    return -highest(-best);
}

/* Rows of `count` items of count 1 with columns from `first` on, `num` of them, a block at a time while it lies in the
   first-level cache. */
static void estimate_rows(const Items &items, const Rows *columns, int64_t first, int64_t num, int64_t count,
                          const float *keys, const float *values, const uint32_t *words, const float *squares,
                          float *rows) {
    const Ward *ward = items.ward;
    const int64_t n = ward->num_columns;
    for (int64_t j = 0; j < num; j += BLOCK) {
        const int64_t width = least(BLOCK, num - j);
        const Rows block = rows_from(columns, items.call, j);
        float *out = rows + first + j;
        if (ward->is_rough) multiply_roughly(items.call, &block, width, count, words, out, n);
        else multiply(items.call, &block, width, count, keys, values, out, n);
        for (int64_t i = 0; i < count; i++) estimate(ward, keep_of(ward), 1, squares[i], first + j, width, rows + i * n);
    }
}

/* Columns that are not there, or no longer. */
INLINE void blank(const Ward *ward, float *row) {
    for (int64_t j = 0; j < ward->num_columns; j++)
        if (ward->into[j] != j) row[j] = INFINITY;
}

/* Note the lowest of n estimates of an item. */
INLINE void set_candidate(Ward *ward, int64_t i, const float *row, int64_t n) {
    const int64_t j = lowest(row, n, ward->rest + i);
    ward->candidate[i] = (int32_t)j;
    if (row[j] > ward->bound[i]) ward->bound[i] = row[j];
}

/* Rows of the tokens first..first+num-1. */
static void token_rows(const Items &items, int64_t first, int64_t num) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t n = ward->num_columns, start = ward->first_token, width = ward->first_merged - start;
    float *out = ward->rows + first * n;
    const float *keys = items.tokens->keys + first * key_ld(call), *values = ward->scaled + first * value_ld(call);
    if (!ward->is_wide) {
        const uint32_t *words = ward->words + first * row_words(call);
        const float *squares = ward->square + start + first;
        estimate_rows(items, &items.dictionary->rows, 0, start, num, keys, values, words, squares, out);
        estimate_rows(items, items.tokens, start, width, num, keys, values, words, squares, out);
    }
    for (int64_t t = first; t < first + num; t++, out += n) {
        if (ward->is_wide) memset(out, 0, sizeof(float) * n);
        for (int64_t j = ward->first_merged; j < n; j++) out[j] = INFINITY;
        for (int64_t j = items.dictionary->num; j < start; j++) out[j] = INFINITY;
        for (int64_t j = start + call->chunk_size; j < ward->first_merged; j++) out[j] = INFINITY;
        out[start + t] = INFINITY;
        set_candidate(ward, start + t, out, n);
    }
}

/* Bounds of the slots first..first+num-1 of those wanted, and how they grow; `scores` holds QUERIES rows of slots.
   Pairs with tokens are among those of the tokens. */
static void bound_slots(const Items &items, int64_t first, int64_t num, float *scores) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const Rows *slots = &items.dictionary->rows;
    const int64_t n = ward->first_token, k = key_ld(call), v = value_ld(call);
    float keys[num * k], values[num * v];
    for (int64_t i = 0; i < num; i++) {
        const int64_t slot = ward->wanted[first + i];
        memcpy(keys + i * k, items.key(slot), sizeof(float) * k);
        for (int64_t j = 0; j < v; j++) values[i * v + j] = (float)ward->value_factor * items.value(slot)[j];
    }
    uint32_t words[HAS_PAIRS ? num * row_words(call) : 1];
    if (ward->is_rough) {
        round_rows(call, num, keys, values, words);
        multiply_values_roughly(call, slots, n, num, words, scores, n);
    } else {
        multiply_values(call, slots, n, num, values, scores, n);
    }
    for (int64_t i = 0; i < num; i++) {
        const int64_t slot = ward->wanted[first + i];
        scores[i * n + slot] = -INFINITY;
        const float cost = lowest_value_cost(ward, slot, n, scores + i * n);
        ward->slot_growth[slot] = cost > 0 ? (float)(cost / ward->value_factor) * (1 - FLT_EPSILON) : 0;
        scores[i * n + slot] = 0;
    }
    if (ward->is_rough) add_keys_roughly(call, slots, n, num, words, scores, n);
    else add_products_of_keys(call, slots, n, num, keys, scores, n);
    for (int64_t i = 0; i < num; i++) {
        const int64_t slot = ward->wanted[first + i];
        float *row = scores + i * n;
        estimate(ward, keep_of(ward), ward->count[slot], ward->square[slot], 0, n, row);
        row[slot] = INFINITY;
        ward->slot_time[slot] = ward->now;
        /* From here on the bound covers pairs with younger slots, too, and may be lower. */
        ward->bound[slot] = -INFINITY;
        set_candidate(ward, slot, row, n);
    }
}

/* A row of an item computed anew. */
static void fresh_row(const Items &items, int64_t i, int is_rough, float *out) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t start = ward->first_token, width = ward->first_merged - start, n = ward->num_columns;
    if (ward->is_wide) {
        memset(out, 0, sizeof(float) * n);
    } else {
        const int is_merged = items.is_merged(i);
        const int64_t m = i - ward->first_merged, v = value_ld(call);
        const float *key = is_merged ? ward->merged.keys + m * key_ld(call) : items.key(i);
        const float *value = is_merged ? ward->merged.values + m * v : items.value(i);
        float scaled[v];
        for (int64_t j = 0; j < v; j++) scaled[j] = (float)ward->value_factor * value[j];
        const int64_t merged = padded(ward->num_merged, NR);
        if (is_rough) {
            uint32_t words[HAS_PAIRS ? row_words(call) : 1];
            round_rows(call, 1, key, scaled, words);
            multiply_roughly(call, &items.dictionary->rows, start, 1, words, out, n);
            multiply_roughly(call, items.tokens, width, 1, words, out + start, n);
            multiply_roughly(call, &ward->merged, merged, 1, words, out + ward->first_merged, n);
        } else {
            multiply(call, &items.dictionary->rows, start, 1, key, scaled, out, n);
            multiply(call, items.tokens, width, 1, key, scaled, out + start, n);
            multiply(call, &ward->merged, merged, 1, key, scaled, out + ward->first_merged, n);
        }
        estimate(ward, is_rough ? ward->rough_keep : ward->keep, ward->count[i], ward->square[i], 0,
                 ward->first_merged + merged, out);
    }
    blank(ward, out);
    out[i] = INFINITY;
}

/* Bounds of all slots, and in `cost` of each with those before it, by products of tiles; `scores` holds QUERIES rows of slots. */
static void slot_bounds(const Items &items, float *scores) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t num = items.dictionary->num, v = value_ld(call);
    for (int64_t first = 0; first < num; first += QUERIES) {
        const int64_t rows = least(QUERIES, num - first), n = padded(first + rows, NR);
        float scaled[rows * v];
        for (int64_t j = 0; j < rows * v; j++)
            scaled[j] = (float)ward->value_factor * items.dictionary->rows.values[first * v + j];
        if (!ward->is_wide) multiply(call, &items.dictionary->rows, n, rows, items.key(first), scaled, scores, n);
        for (int64_t i = first; i < first + rows; i++) {
            float *row = scores + (i - first) * n;
            if (ward->is_wide) memset(row, 0, sizeof(float) * n);
            else estimate(ward, ward->keep, ward->count[i], ward->square[i], 0, n, row);
            for (int64_t j = i; j < n; j++) row[j] = INFINITY;
            ward->cost[i] = ward->slot_bound[i] = lowest_value(row, n);
            for (int64_t j = 0; j < i; j++) ward->slot_bound[j] = fminf(ward->slot_bound[j], row[j]);
            ward->slot_factor[i] = ward->value_factor;
            ward->slot_growth[i] = ward->slot_time[i] = 0;
        }
    }
    ward->now = 0;
}

/* Where the dearest of `due` merges may lie, for a dictionary that nothing was merged in yet. */
static float first_level(Ward *ward, int64_t num, int64_t due) {
    if (num) select_lowest(ward->cost, num, least(due, num) - 1);
    return num ? (float)ward->cost[least(due, num) - 1] : 0;
}

/* Let a row know of the merges since it was last looked at. */
static float *current_row(Ward *ward, int64_t i) {
    const int32_t r = ward->row[i];
    float *row = ward->rows + r * ward->num_columns;
    const float own = ward->count[i];
    /* What is far off needs no more than that it is no nearer than its parts were. */
    const float far = 1.5f * ward->expected;
    for (int64_t m = ward->seen[r]; m < ward->num_merged; m++) {
        const int32_t a = ward->pair[2 * m], b = ward->pair[2 * m + 1];
        const float x = row[a], y = row[b], least_cost = x < y ? x : y;
        row[a] = row[b] = INFINITY;
        row[ward->first_merged + m] = least_cost;
        if (!(least_cost < far)) continue;
        const float p = ward->count[a] + own, q = ward->count[b] + own, h = ward->height[m];
        const float bound = (p * x + q * y - own * h) / (p + q - own) - 5e-7f * (fabsf(x) + fabsf(y) + h);
        /* Not a number where one of them is infinite. */
        if (bound > least_cost) row[ward->first_merged + m] = bound;
    }
    row[i] = INFINITY;
    ward->seen[r] = (int32_t)ward->num_merged;
    return row;
}

INLINE int32_t take_spare(Ward *ward) { return ward->num_spare ? ward->spare[--ward->num_spare] : -1; }

/* Whether the pair (a, b) of items comes before (c, d), each by their lowest members. */
INLINE int comes_before(const Ward *ward, int64_t a, int64_t b, int64_t c, int64_t d) {
    const int32_t x = ward->index[a], y = ward->index[b], p = ward->index[c], q = ward->index[d];
    const int32_t first = x < y ? x : y, other = p < q ? p : q;
    if (first != other) return first < other;
    return (x < y ? y : x) < (p < q ? q : p);
}

INLINE void set_partner(Ward *ward, int64_t i, int64_t partner, double cost, double best) {
    ward->partner[i] = (int32_t)partner;
    ward->cost[i] = cost;
    ward->bound[i] = below(best);
}

INLINE int is_exact(const Ward *ward, int64_t i) {
    const int32_t p = ward->partner[i];
    return p >= 0 && ward->into[p] == p;
}

/* Whether all pairs of an item but that with its candidate j cost more than `cost`. */
INLINE int is_nearest(const Ward *ward, int64_t i, int64_t j, double cost) {
    return ward->candidate[i] == j && above(cost + ward->tie) < ward->rest[i];
}

/* Find the nearest of an item exactly. `scratch` is a row. */
static void refine(const Items &items, int64_t i, float *scratch) {
    Ward *ward = items.ward;
    const int64_t n = ward->num_columns, candidate = ward->candidate[i];
    if (candidate >= 0 && ward->into[candidate] == candidate) {
        const double cost = exact_cost(items, i, candidate);
        if (is_nearest(ward, i, candidate, cost)) {
            set_partner(ward, i, candidate, cost, cost);
            if (!is_exact(ward, candidate) && is_nearest(ward, candidate, i, cost))
                set_partner(ward, candidate, i, cost, cost);
            return;
        }
    }
    int is_fresh = 0, is_sharp = 0;
    float *row;
    if (ward->row[i] >= 0) {
        row = current_row(ward, i);
    } else {
        const int32_t r = take_spare(ward);
        row = r >= 0 ? ward->rows + r * n : scratch;
        is_sharp = !ward->is_rough;
        fresh_row(items, i, ward->is_rough, row);
        is_fresh = 1;
        ward->row[i] = r;
        if (r >= 0) ward->seen[r] = (int32_t)ward->num_merged;
    }
    /* Repeats: the first item at no distance will do. */
    const float tie = above(ward->tie);
    float next;
    int64_t first = lowest(row, n, &next);
    for (int64_t j = 0; row[first] <= tie && j < n; j++) {
        if (row[j] > tie) continue;
        const double cost = exact_cost(items, i, j);
        row[j] = below(cost);
        if (cost == 0) {
            set_partner(ward, i, j, 0, 0);
            return;
        }
        if (j == first) first = lowest(row, n, &next);
    }
    int64_t num = 0;
    double best = INFINITY;
    for (int64_t j = first; row[j] != INFINITY && row[j] <= above(best + ward->tie);) {
        if (num == TRIES && !is_sharp && !ward->is_wide) {
            /* The estimates are too loose to go on with. */
            fresh_row(items, i, ward->is_rough && !is_fresh, row);
            is_sharp = !ward->is_rough || is_fresh;
            is_fresh = 1;
            num = 0;
            best = INFINITY;
            j = lowest(row, n, &next);
            continue;
        }
        const double cost = exact_cost(items, i, j);
        row[j] = INFINITY;
        ward->tried[num] = (int32_t)j;
        ward->tried_cost[num++] = cost;
        best = fmin(best, cost);
        if (next > above(best + ward->tie)) break;
        j = lowest(row, n, &next);
    }
    int64_t nearest = -1;
    double cost = INFINITY;
    for (int64_t t = 0; t < num; t++) {
        const int32_t j = ward->tried[t];
        row[j] = below(ward->tried_cost[t]);
        if (!(ward->tried_cost[t] <= best + ward->tie)) continue;
        if (nearest >= 0 && !comes_before(ward, i, j, i, nearest)) continue;
        nearest = j;
        cost = ward->tried_cost[t];
    }
    set_partner(ward, i, nearest, cost, best);
}

/* out [K + V] = share * the mean of item i, on top of what is there or not. */
static void add_mean(const Items &items, int64_t i, double share, int is_more, double *out) {
    const int64_t k = items.call->k.dim, v = items.call->v.dim;
    if (items.is_merged(i)) {
        const double *mean = items.mean(i);
        for (int64_t j = 0; j < k + v; j++) out[j] = share * mean[j] + (is_more ? out[j] : 0);
        return;
    }
    const float *key = items.key(i), *value = items.value(i);
    for (int64_t j = 0; j < k; j++) out[j] = share * key[j] + (is_more ? out[j] : 0);
    for (int64_t j = 0; j < v; j++) out[k + j] = share * value[j] + (is_more ? out[k + j] : 0);
}

INLINE double exact_square(const double *x, int64_t n) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
    return sum;
}

/* Lower bounds of costs with an item merged of two, whose parts, of counts x and y, cost h together and `first` and
   `second` with others of counts c (Lance and Williams). */
INLINE Vector merged_bounds(Vector first, Vector second, Vector x, Vector y, Vector c, Vector h) {
    const Vector bound = ((x + c) * first + (y + c) * second - c * h) / (x + y + c);
    const Vector size = (first < 0.0f ? -first : first) + (second < 0.0f ? -second : second) + h;
    const Vector rounded = bound - 5e-7f * size;
    /* Infinite ones give NaN. */
    return rounded == rounded && first < INFINITY ? rounded : splat(INFINITY);
}

/* Turn the row of item `with` into that of the item that it and `other`, of which slots alone are and which has no
   row, are merged into. Costs of slots are at least the bound of either, and no pair left costs less than `floor`. What has a row
   knows its cost with a slot, which is looked up where it may matter. */
static void guess_row(const Ward *ward, int64_t with, int64_t other, float floor, float height, float *row) {
    const int64_t n = ward->num_columns;
    const int is_slot = other < ward->first_token;
    const Vector x = splat(ward->count[with]), y = splat(ward->count[other]), h = splat(height);
    const Vector own = splat(ward->bound[other]), least_cost = splat(floor);
    const Vector time = splat(is_slot ? ward->slot_time[other] : INFINITY);
    for (int64_t j = 0; j < n; j += VL) {
        const Vector c = load(ward->count + j), first = load(row + j), its = load(ward->bound + j);
        Vector second = is_slot ? its : higher_of(its, own);
        if (j < ward->first_token) {
            const Vector since = load(ward->slot_time + j);
            second = since > time ? its : since < time ? own : higher_of(its, own);
        }
        second = higher_of(second, least_cost);
        Vector bound = merged_bounds(first, second, x, y, c, h);
        if (is_slot && j >= ward->first_token && is_any(bound <= splat(ward->expected))) {
            for (int64_t l = 0; l < VL; l++)
                if (bound[l] <= ward->expected && ward->row[j + l] >= 0)
                    second[l] = fmaxf(second[l], ward->rows[ward->row[j + l] * n + other]);
            bound = merged_bounds(first, second, x, y, c, h);
        }
        store(row + j, bound);
    }
}

/* The mean, count and row of a new column that a and b are merged into. */
static void merge_pair(const Items &items, int64_t a, int64_t b, double cost) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t k = call->k.dim, v = call->v.dim, m = ward->first_merged + ward->num_merged;
    const int64_t at = ward->num_merged, n = ward->num_columns;
    const double p = ward->count[a], q = ward->count[b];
    double *mean = ward->mean + at * (k + v);
    float *key = ward->merged.keys + at * key_ld(call), *value = ward->merged.values + at * value_ld(call);
    add_mean(items, a, p / (p + q), 0, mean);
    add_mean(items, b, q / (p + q), 1, mean);
    for (int64_t j = 0; j < k; j++) key[j] = (float)mean[j];
    for (int64_t j = 0; j < v; j++) value[j] = (float)mean[k + j];
    const double key_square = exact_square(mean, k), value_square = exact_square(mean + k, v);
    set_row(&ward->merged, call, at, 0);
    ward->count[m] = (float)(p + q);
    ward->square[m] = (float)(key_square + ward->value_factor * value_square);
    ward->index[m] = ward->index[a] < ward->index[b] ? ward->index[a] : ward->index[b];
    ward->partner[m] = ward->candidate[m] = -1;
    ward->cost[m] = INFINITY;
    ward->into[m] = (int32_t)m;
    ward->row[m] = -1;
    /* Costs with the new item from those with its parts, which are known from below (Lance and Williams). Where one
       part has no row, its costs are at least its bound, or that of the other item, and the cost of this merge. */
    const int32_t row_a = ward->row[a], row_b = ward->row[b];

    ward->bound[m] = below(cost);
    if (row_a >= 0 || row_b >= 0) {
        const int is_two = row_a >= 0 && row_b >= 0;
        const int64_t with = row_a >= 0 ? a : b, other = with == a ? b : a;
        float *row = current_row(ward, with);
        row[other] = INFINITY;
        if (is_two) {
            const float *more = current_row(ward, other);
            const Vector x = splat(ward->count[with]), y = splat(ward->count[other]), h = splat(above(cost));
            for (int64_t j = 0; j < n; j += VL)
                store(row + j, merged_bounds(load(row + j), load(more + j), x, y, load(ward->count + j), h));
        } else {
            guess_row(ward, with, other, below(cost), above(cost), row);
        }
        row[a] = row[b] = row[m] = INFINITY;
        set_candidate(ward, m, row, n);
        ward->row[m] = ward->row[with];
        ward->row[with] = -1;
        if (is_two) {
            ward->spare[ward->num_spare++] = ward->row[other];
            ward->row[other] = -1;
        }
        ward->seen[ward->row[m]] = (int32_t)ward->num_merged + 1;
    }
    ward->pair[2 * at] = (int32_t)a;
    ward->pair[2 * at + 1] = (int32_t)b;
    ward->height[at] = above(cost);
    /* Repeats of either are repeats of the new item. */
    if (cost == 0)
        for (int64_t j = 0; j < n; j++)
            if (ward->cost[j] == 0 && (ward->partner[j] == a || ward->partner[j] == b)) ward->partner[j] = (int32_t)m;
    ward->into[a] = ward->into[b] = (int32_t)m;
    ward->bound[a] = ward->bound[b] = INFINITY;
    ward->num_merged++;
}

/* Gather in `tried` the items that a pair of cost `most` or less may be of; 0 if one of them had to be refined. */
static int settle(const Items &items, float most, int64_t *num, float *scratch) {
    Ward *ward = items.ward;
    for (int64_t j = 0; j < ward->num_columns; j += VL) {
        if (!is_any(load(ward->bound + j) <= splat(most))) continue;
        for (int64_t l = j; l < j + VL; l++) {
            if (!(ward->bound[l] <= most)) continue;
            if (!is_exact(ward, l)) {
                refine(items, l, scratch);
                return 0;
            }
            ward->tried[(*num)++] = (int32_t)l;
        }
    }
    return 1;
}

/* Merge the cheapest pair until `due` have been merged. */
static void merge_cheapest(const Items &items, int64_t due, float *scratch) {
    Ward *ward = items.ward;
    const int64_t n = ward->num_columns;
    while (due > 0) {
        float next;
        const int64_t i = lowest(ward->bound, n, &next);
        if (ward->bound[i] == INFINITY) {
            /* Nothing that can be compared is left: the first two items. */
            int64_t a = -1, b = -1;
            for (int64_t j = 0; j < n; j++) {
                if (ward->into[j] != j) continue;
                if (a < 0 || ward->index[j] < ward->index[a]) b = a, a = j;
                else if (b < 0 || ward->index[j] < ward->index[b]) b = j;
            }
            merge_pair(items, a, b, INFINITY);
            due--;
            continue;
        }
        if (!is_exact(ward, i)) {
            refine(items, i, scratch);
            continue;
        }
        /* The cheapest pair, unless others may cost as little; floats do not tell. Of equal ones, the first. */
        int64_t num = 0, cheapest = i;
        double best = ward->cost[i];
        if (next <= above(best + ward->tie)) {
            if (!settle(items, above(best + ward->tie), &num, scratch)) continue;
            for (int64_t l = 0; l < num; l++) best = fmin(best, ward->cost[ward->tried[l]]);
            cheapest = -1;
        }
        for (int64_t l = 0; l < num; l++) {
            const int32_t j = ward->tried[l];
            if (ward->cost[j] > best + ward->tie) continue;
            if (cheapest < 0 || comes_before(ward, j, ward->partner[j], cheapest, ward->partner[cheapest]))
                cheapest = j;
        }
        int64_t a = cheapest, b = ward->partner[cheapest];
        if (ward->index[b] < ward->index[a]) {
            const int64_t c = a;
            a = b;
            b = c;
        }
        const double cost = ward->cost[cheapest];
        ward->level = above(cost);
        merge_pair(items, a, b, cost);
        due--;
    }
}

/* What the next chunk needs to know of a slot that changed. */
static void set_squares(const Items &items, int64_t i) {
    const Rows *rows = &items.dictionary->rows;
    const float *key = rows->keys + i * key_ld(items.call), *value = rows->values + i * value_ld(items.call);
    items.ward->key_square[i] = exact_dot(key, key, items.call->k.dim);
    items.ward->value_square[i] = exact_dot(value, value, items.call->v.dim);
}

/* Lay out the items of a chunk; `scores` holds QUERIES rows of slots. */
static void prepare_ward(const Items &items, int64_t due, float *scores) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t num = items.dictionary->num, size = call->chunk_size, k = call->k.dim, v = call->v.dim;
    const Sums *sums = items.sums;
    ward->first_token = padded(num, NR);
    ward->first_merged = ward->first_token + padded(size, NR);
    /* One vector more than is needed: rows a power of two apart would share few lines of the cache. */
    const int64_t n = ward->num_columns = ward->first_merged + padded(due, NR) + VL;
    ward->num_merged = 0;
    ward->keep = 1 - (float)(k + v + 16) * FLT_EPSILON;
    ward->rough_keep = ward->keep - ROUGHNESS;
    /* The mean squared length of values, of items whose values are finite. */
    double key_square[size], value_square[size], power = 0, total_count = 0;
    for (int64_t t = 0; t < size; t++) {
        const float *key = items.tokens->keys + t * key_ld(call), *value = items.tokens->values + t * value_ld(call);
        key_square[t] = exact_dot(key, key, k);
        value_square[t] = exact_dot(value, value, v);
    }
    if (!ward->has_squares)
        for (int64_t i = 0; i < num; i++) set_squares(items, i);
    ward->has_squares = 1;
    for (int64_t i = 0; i < num + size; i++) {
        const double square = i < num ? ward->value_square[i] : value_square[i - num];
        const double count = i < num ? (double)sums->count[i] : 1;
        if (!std::isfinite(square)) continue;
        power += count * square;
        total_count += count;
    }
    power /= fmax(total_count, 1);
    const double factor = ward->value_factor = power > 0 && std::isfinite(power)
                                                   ? call->value_weight * call->value_weight / power : 0;
    double longest = 0;
    ward->is_wide = !*items.tokens->is_finite;
    for (int64_t i = 0; i < num + size; i++) {
        const double keys = i < num ? ward->key_square[i] : key_square[i - num];
        const double values = i < num ? ward->value_square[i] : value_square[i - num];
        const double square = keys + factor * values;
        if (std::isfinite(square)) longest = fmax(longest, square);
        ward->is_wide |= is_extreme(sqrt(keys)) || is_extreme(sqrt(values)) || is_extreme(sqrt(factor * values));
    }
    ward->unit = ward->is_wide && longest > 0 ? longest : 1;
    ward->tie = call->tie * longest / ward->unit;
    for (int64_t j = 0; j < n; j++) {
        const int64_t t = j - ward->first_token;
        const int is_slot = j < num, is_token = t >= 0 && t < size;
        const double square = is_slot ? ward->key_square[j] + factor * ward->value_square[j]
                            : is_token ? key_square[t] + factor * value_square[t] : INFINITY;
        ward->square[j] = (float)square;
        ward->value_length[j] = is_slot ? (float)(factor * ward->value_square[j]) : INFINITY;
        ward->count[j] = is_slot ? (float)sums->count[j] : 1;
        ward->bound[j] = is_token ? -INFINITY : INFINITY;
        ward->candidate[j] = -1;
        ward->cost[j] = INFINITY;
        ward->index[j] = (int32_t)j;
        ward->into[j] = is_slot || is_token ? (int32_t)j : -1;
        ward->row[j] = is_token ? (int32_t)t : -1;
        ward->partner[j] = -1;
    }
    memset(ward->seen, 0, sizeof(int32_t) * ward->num_rows);
    for (int64_t j = 0; j < size * value_ld(call); j++) ward->scaled[j] = (float)factor * items.tokens->values[j];
    if (!ward->has_bounds || ward->is_wide) {
        slot_bounds(items, scores);
        ward->level = first_level(ward, num, due);
        ward->last_level = 0;
    }
    ward->has_bounds = !ward->is_wide;
    ward->now++;
    for (int64_t i = 0; i < num; i++) {
        ward->cost[i] = INFINITY;
        const double since = ward->slot_factor[i];
        const float bound = ward->slot_bound[i], growth = (float)((factor - since) * ward->slot_growth[i]);
        /* Where the factor fell, costs are at least its share of what they were. */
        ward->bound[i] = factor >= since ? bound + growth : bound < 0 ? bound : bound * (float)(factor / since);
        if (factor != since) ward->bound[i] -= 4 * FLT_EPSILON * (fabsf(bound) + fabsf(growth));
    }
    /* As much above the last chunk's dearest merge as that was above the one before. */
    const float growth = ward->last_level > 0 ? ward->level / ward->last_level : 1;
    ward->expected = ward->level * fminf(fmaxf(growth, 1), 1.1f);
    ward->last_level = ward->level;
    /* Rough products will do if they are off by less than a tenth of what decides. */
    double total_square = 0;
    for (int64_t t = 0; t < size; t++) total_square += key_square[t] + factor * value_square[t];
    ward->is_rough = HAS_PAIRS && !ward->is_wide && 2 * ROUGHNESS * total_square <= 0.1 * size * ward->expected;
    if (ward->is_rough) round_rows(call, size, items.tokens->keys, ward->scaled, ward->words);
    ward->num_wanted = 0;
    for (int64_t i = 0; i < num && !ward->is_wide; i++)
        if (ward->bound[i] <= ward->expected) ward->wanted[ward->num_wanted++] = (int32_t)i;
    ward->num_spare = 0;
    for (int64_t r = ward->num_rows - 1; r >= padded(size, NR); r--)
        ward->spare[ward->num_spare++] = (int32_t)r;
}

/* Slots that a chunk merged into others, with what was in them: what the backward needs to part them again. */
struct Merged {
    int32_t *slot, *into; /* [C]; -1 after the last. */
    float *key, *value;   /* [C, K], [C, V]: sums. */
    int64_t *count;       /* [C] */
};

INLINE Merged merged_of(const Call *call, int64_t chunk, int64_t head) {
    const int64_t first = (chunk * call->num_kv_heads + head) * call->chunk_size;
    return {call->merged_slot + first, call->merged_into + first, call->merged_key + first * call->k.dim,
            call->merged_value + first * call->v.dim, call->merged_count + first};
}

INLINE void add_sums(const Call *call, float *key_sum, float *value_sum, const float *keys, const float *values,
                     int sign) {
    for (int64_t j = 0; j < call->k.dim; j++) key_sum[j] += sign * keys[j];
    for (int64_t j = 0; j < call->v.dim; j++) value_sum[j] += sign * values[j];
}

/* Merge slot b into slot a, leaving it empty, and note what it was if the backward will want it. */
static void merge_slot(const Call *call, const Sums *sums, int64_t b, int64_t a, const Merged *merged, int64_t place) {
    float *key = sums->key + b * call->k.dim, *value = sums->value + b * call->v.dim;
    if (call->merged_slot) {
        merged->slot[place] = (int32_t)b;
        merged->into[place] = (int32_t)a;
        memcpy(merged->key + place * call->k.dim, key, sizeof(float) * call->k.dim);
        memcpy(merged->value + place * call->v.dim, value, sizeof(float) * call->v.dim);
        merged->count[place] = sums->count[b];
    }
    add_sums(call, sums->key + a * call->k.dim, sums->value + a * call->v.dim, key, value, 1);
    sums->count[a] += sums->count[b];
    memset(key, 0, sizeof(float) * call->k.dim);
    memset(value, 0, sizeof(float) * call->v.dim);
    sums->count[b] = 0;
}

INLINE int64_t cluster_of(const Ward *ward, int64_t i) {
    while (ward->into[i] != i) i = ward->into[i];
    return i;
}

/* Say which slot each cluster gets: that of its lowest slot, or else a free one, in order of their first tokens. */
static void find_homes(const Items &items) {
    Ward *ward = items.ward;
    const int64_t num = items.dictionary->num, start = ward->first_token;
    int64_t free = 0;
    for (int64_t i = 0; i < num; i++) {
        const int64_t cluster = cluster_of(ward, i);
        if (ward->index[cluster] == i) ward->home[cluster] = (int32_t)i;
    }
    for (int64_t t = 0; t < items.call->chunk_size; t++) {
        const int64_t cluster = cluster_of(ward, start + t);
        if (ward->index[cluster] != start + t) continue;
        while (free < num && ward->index[cluster_of(ward, free)] == free) free++;
        ward->home[cluster] = (int32_t)free++;
    }
}

/* Once the rows of the tokens are there: merge what there is no room for, and say where each token went.
   `scores` holds QUERIES rows. */
static void learn_by_likelihood(const Call *call, Dictionary *dictionary, Rows *tokens, const Sums *sums,
                                const Chunk *chunk, int64_t head, Ward *ward, Learner *learner, float *scores) {
    const int64_t size = call->chunk_size, num = dictionary->num, due = num + size - chunk->after;
    const Items items = {call, dictionary, tokens, sums, ward};
    const Merged merged = call->merged_slot ? merged_of(call, chunk->index, head) : Merged{};
    int64_t place = 0;
    if (!*tokens->is_finite) {
        /* The sums get all values, and so do costs. */
        load_values(tokens, call, chunk->index, head, size);
        if (due) prepare_ward(items, due, scores);
        for (int64_t t = 0; due && t < size; t += QUERIES) token_rows(items, t, least(QUERIES, size - t));
    }
    if (!due) {
        ward->has_bounds = ward->has_squares = 0;
        for (int64_t t = 0; t < size; t++) learner->slot[t] = (int32_t)(num + t);
    } else {
        merge_cheapest(items, due, scores);
        find_homes(items);
        ward->now++;
        for (int64_t i = 0; i < num; i++) {
            const int32_t home = ward->home[cluster_of(ward, i)];
            if (ward->index[cluster_of(ward, i)] == i) continue;
            merge_slot(call, sums, i, home, &merged, place++);
            learner->near[place - 1] = home;
        }
        for (int64_t t = 0; t < size; t++)
            learner->slot[t] = ward->home[cluster_of(ward, ward->first_token + t)];
        for (int64_t j = 0; j < ward->first_merged + ward->num_merged; j++) {
            if (ward->into[j] != j) continue;
            const int32_t home = ward->home[j];
            ward->slot_bound[home] = ward->bound[j];
            ward->slot_factor[home] = ward->value_factor;
            /* A new item has a bound of its own with all others, so that old growth holds for old pairs. */
            if (j < ward->first_token) continue;
            ward->slot_growth[home] = 0;
            ward->slot_time[home] = ward->now;
        }
    }
    if (call->merged_slot && place < size) merged.slot[place] = -1;
    for (int64_t t = 0; t < size; t++) add_token(sums, call, learner->slot[t], tokens, t, 1);
    dictionary->num = chunk->after;
    update_slots(dictionary, call, sums, learner->slot, size, learner->is_done);
    update_slots(dictionary, call, sums, learner->near, place, learner->is_done);
    for (int64_t t = 0; due && t < size; t++) set_squares(items, learner->slot[t]);
    for (int64_t i = 0; i < place; i++) set_squares(items, learner->near[i]);
    int32_t *out = call->slots + (chunk->index * call->width) * call->num_kv_heads + head;
    for (int64_t t = 0; t < size; t++) out[t * call->num_kv_heads] = learner->slot[t];
}
