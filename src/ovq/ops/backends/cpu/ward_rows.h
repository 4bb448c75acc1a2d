/* Lower bounds of costs by products in float32, or rough ones of bfloat16: the rows of items. */
#pragma once

#include "ward_items.h"

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

/* What squared distances of two items are multiplied with; the product of the two might vanish. */
INLINE Vector weight_of(Vector count, Vector other, int is_sqrt) {
    const Vector weight = count * (other / (count + other));
    return is_sqrt ? square_root(weight) : weight;
}

/* Turns products x.y of an item with columns first..first+num-1 into lower bounds of their costs. */
static void estimate(const Ward *ward, float keep, float count, float square, int64_t first, int64_t num, float *row) {
    const Vector own = splat(count), length = splat(square);
    for (int64_t j = first; j < first + num; j += VL) {
        const Vector other = load(ward->count + j);
        const Vector distance = keep * (length + load(ward->square + j)) - 2.0f * load(row + j);
        store(row + j, weight_of(own, other, ward->is_sqrt) * distance);
    }
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
        best = lower_of(weight_of(own, other, ward->is_sqrt) * distance, best);
    }
    return lowest_lane(best);
}

/* Rows of `count` items from item `at` on with columns from `first` on, `num` of them, a block at a time while it lies
   in the first-level cache. */
static void estimate_rows(const Items &items, const Rows *columns, int64_t first, int64_t num, int64_t at,
                          int64_t count, const Left &left, float *rows) {
    const Ward *ward = items.ward;
    const int64_t n = ward->num_columns;
    for (int64_t j = 0; j < num; j += BLOCK) {
        const int64_t width = least(BLOCK, num - j);
        const Rows block = rows_from(columns, items.call, j);
        float *out = rows + first + j;
        multiply(items.call, &block, width, count, left, out, n);
        for (int64_t i = 0; i < count; i++)
            estimate(ward, keep_of(ward), ward->count[at + i], ward->square[at + i], first + j, width, rows + i * n);
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
    const Left left = {items.tokens->keys + first * key_ld(call), ward->scaled + first * value_ld(call),
                       ward->is_rough ? ward->words + first * row_words(call) : nullptr,
                       from_row(ward->steps, first), from_row(ward->steps, call->chunk_size + first)};
    if (!ward->is_wide) {
        estimate_rows(items, &items.dictionary->rows, 0, start, start + first, num, left, out);
        estimate_rows(items, items.tokens, start, width, start + first, num, left, out);
    }
    for (int64_t t = first; t < first + num; t++, out += n) {
        if (ward->is_wide) memset(out, 0, sizeof(float) * n);
        for (int64_t j = ward->first_merged; j < n; j++) out[j] = INFINITY;
        for (int64_t j = items.dictionary->num; j < start; j++) out[j] = INFINITY;
        for (int64_t j = start + call->chunk_size; j < ward->first_merged; j++) out[j] = INFINITY;
        out[start + t] = INFINITY;
        if (!is_weightless(ward, start + t)) set_candidate(ward, start + t, out, n);
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
    uint32_t words[HAS_ROUGH ? num * row_words(call) : 1];
    float steps[HAS_SHORTS ? 2 * num : 1];
    if (ward->is_rough) round_rows(call, num, keys, values, words, HAS_SHORTS ? steps : nullptr);
    const Left left = {keys, values, ward->is_rough ? words : nullptr, steps, steps + num};
    multiply_values(call, slots, n, num, left, scores, n);
    for (int64_t i = 0; i < num; i++) {
        const int64_t slot = ward->wanted[first + i];
        scores[i * n + slot] = -INFINITY;
        const float cost = lowest_value_cost(ward, slot, n, scores + i * n);
        ward->slot_growth[slot] = cost > 0 ? (float)(cost / ward->value_factor) * (1 - FLT_EPSILON) : 0;
        scores[i * n + slot] = 0;
    }
    add_products_of_keys(call, slots, n, num, left, scores, n);
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
        uint32_t words[HAS_ROUGH ? row_words(call) : 1];
        float steps[2];
        if (is_rough) round_rows(call, 1, key, scaled, words, HAS_SHORTS ? steps : nullptr);
        const Left left = {key, scaled, is_rough ? words : nullptr, steps, steps + 1};
        multiply(call, &items.dictionary->rows, start, 1, left, out, n);
        multiply(call, items.tokens, width, 1, left, out + start, n);
        multiply(call, &ward->merged, merged, 1, left, out + ward->first_merged, n);
        estimate(ward, is_rough ? ward->rough_keep : ward->keep, ward->count[i], ward->square[i], 0,
                 ward->first_merged + merged, out);
    }
    blank(ward, out);
    out[i] = INFINITY;
}

/* Bounds of all slots, and in `cost` those of each with the slots before it, by products of tiles; `scores` holds QUERIES
   rows of slots. */
static void slot_bounds(const Items &items, float *scores) {
    Ward *ward = items.ward;
    const Call *call = items.call;
    const int64_t num = items.dictionary->num, v = value_ld(call);
    for (int64_t first = 0; first < num; first += QUERIES) {
        const int64_t rows = least(QUERIES, num - first), n = padded(first + rows, NR);
        float scaled[rows * v];
        for (int64_t j = 0; j < rows * v; j++)
            scaled[j] = (float)ward->value_factor * items.dictionary->rows.values[first * v + j];
        const Left left = {items.key(first), scaled, nullptr, nullptr, nullptr};
        if (!ward->is_wide) multiply(call, &items.dictionary->rows, n, rows, left, scores, n);
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
