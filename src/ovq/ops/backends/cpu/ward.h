/* merge="ward" and "ward-sqrt": after a chunk, slots and tokens are merged pair by pair, the cheapest first, until they
   fit.

   The order is exactly that of the reference. What makes it fast is that few costs are ever computed exactly. An item
   has a *bound* that none of its costs is below; the item of the lowest bound is looked at, and only if the bound is
   still an estimate are its costs refined, in float64 and as few as will do. By "ward", merging the cheapest pair
   brings no item nearer to any other (its costs are *reducible*), so bounds outlive merges, and those of slots the
   chunk itself. By "ward-sqrt" a merged item may be nearer to others than both of its parts were. The bounds of others
   outlive that as well: a merged item has a bound of its own, of its costs with all that is there, and theirs need not
   cover it.

   Items and exact costs are in ward_items.h, bounds in ward_rows.h, the order of merging in ward_merge.h. */
#pragma once

#include "ward_merge.h"

/* What the next chunk needs to know of a slot that changed. */
static void set_squares(const Items &items, int64_t i) {
    const Rows *rows = &items.dictionary->rows;
    const float *key = rows->keys + i * key_ld(items.call), *value = rows->values + i * value_ld(items.call);
    items.ward->key_square[i] = exact_dot(key, key, items.call->k.dim);
    items.ward->value_square[i] = exact_dot(value, value, items.call->v.dim);
}

/* Once all slots weigh `factor` times as much: what is known of them, brought up to date. Their costs are that many times
   as high, but for the rounding of weights, and of means, which moves each by a few roundings of its length. */
static void fade_ward(const Items &items, float factor) {
    Ward *ward = items.ward;
    const int64_t num = items.dictionary->num;
    double keys = 0, values = 0;
    for (int64_t i = 0; i < num; i++) {
        set_squares(items, i);
        keys = fmax(keys, ward->key_square[i]);
        values = fmax(values, ward->value_square[i]);
    }
    if (!ward->has_bounds) return;
    const double share = ward->is_sqrt ? sqrt(factor) : factor, slack = 32 * FLT_EPSILON;
    for (int64_t i = 0; i < num; i++) {
        const double mass = mass_of(items.sums, i), weight = slack * (ward->is_sqrt ? sqrt(mass) : mass);
        const double bound = ward->slot_bound[i] * share, growth = ward->slot_growth[i] * share;
        /* Infinite for a slot that is alone, and still so. */
        const double rounded = bound * (bound > 0 ? 1 - slack : 1 + slack);
        ward->slot_bound[i] = below(rounded - weight * (keys + ward->slot_factor[i] * values));
        ward->slot_growth[i] = fmaxf(below(growth * (1 - slack) - weight * values), 0);
    }
}

/* What the `due`-th lightest slot weighs, below 1 only where slots have faded. What it costs to merge lighter ones is off by
   as small a part of what products are off by. Exact costs, whose place this takes meanwhile, are not known yet. */
static double light_mass(Ward *ward, int64_t num, int64_t due) {
    if (!num) return 1;
    memcpy(ward->cost, ward->mass, sizeof(double) * num);
    select_lowest(ward->cost, num, least(due, num) - 1);
    const double mass = ward->cost[least(due, num) - 1];
    for (int64_t i = 0; i < num; i++) ward->cost[i] = INFINITY;
    return mass;
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
    ward->rough_keep = ward->keep - roughness_of(call);
    /* The mean squared length of values, of items whose values are finite. */
    double key_square[size], value_square[size], power = 0, total_mass = 0;
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
        const double mass = i < num ? mass_of(sums, i) : token_mass(items.tokens, i - num);
        if (!std::isfinite(square)) continue;
        power += mass * square;
        total_mass += mass;
    }
    power /= total_mass > 0 ? total_mass : 1;
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
        ward->is_wide |= is_extreme_mass(i < num ? mass_of(sums, i) : token_mass(items.tokens, i - num),
                                         (int)call->weighs_chunk);
    }
    ward->unit = ward->is_wide && longest > 0 ? longest : 1;
    ward->tie = call->tie * longest / ward->unit;
    /* No two items are further apart than twice the longest. */
    ward->free_mass = call->weighs_chunk ? call->tie * (1 - 1e-6) / 4 : 0;
    if (call->is_sqrt) ward->free_mass *= ward->free_mass;
    for (int64_t j = 0; j < n; j++) {
        const int64_t t = j - ward->first_token;
        const int is_slot = j < num, is_token = t >= 0 && t < size;
        const double square = is_slot ? ward->key_square[j] + factor * ward->value_square[j]
                            : is_token ? key_square[t] + factor * value_square[t] : INFINITY;
        ward->mass[j] = is_slot ? mass_of(sums, j) : is_token ? token_mass(items.tokens, t) : 1;
        /* To the bounds of others, what weighs nothing is not there. */
        const int is_seen = !is_weightless(ward, j);
        ward->square[j] = is_seen ? (float)square : INFINITY;
        ward->value_length[j] = is_slot && is_seen ? (float)(factor * ward->value_square[j]) : INFINITY;
        ward->count[j] = is_seen ? (float)ward->mass[j] : 1;
        ward->bound[j] = !is_seen ? 0 : is_token ? -INFINITY : INFINITY;
        ward->candidate[j] = -1;
        ward->cost[j] = INFINITY;
        ward->index[j] = (int32_t)j;
        ward->into[j] = is_slot || is_token ? (int32_t)j : -1;
        ward->row[j] = is_token ? (int32_t)t : -1;
        ward->partner[j] = -1;
    }
    memset(ward->seen, 0, sizeof(int32_t) * ward->num_rows);
    for (int64_t j = 0; j < size * value_ld(call); j++) ward->scaled[j] = (float)factor * items.tokens->values[j];
    const int is_anew = !ward->has_bounds || ward->is_wide;
    if (is_anew) {
        slot_bounds(items, scores);
        ward->level = first_level(ward, num, due);
        ward->last_level = 0;
    }
    ward->has_bounds = !ward->is_wide;
    ward->now++;
    for (int64_t i = 0; i < num; i++) {
        ward->cost[i] = INFINITY;
        if (is_weightless(ward, i)) continue;
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
    ward->level = 0;
    /* Rough products will do if they are off by less than a tenth of what decides. */
    double total_square = 0;
    for (int64_t t = 0; t < size; t++) total_square += key_square[t] + factor * value_square[t];
    const double off = 2 * roughness_of(call) * total_square * fmin(1, light_mass(ward, num, due));
    ward->is_rough = HAS_ROUGH && !ward->is_wide && off <= 0.1 * size * ward->expected;
    if (ward->is_rough) round_rows(call, size, items.tokens->keys, ward->scaled, ward->words, ward->steps);
    ward->num_wanted = 0;
    for (int64_t i = 0; i < num && !is_anew; i++)
        if (ward->bound[i] <= ward->expected && !is_weightless(ward, i)) ward->wanted[ward->num_wanted++] = (int32_t)i;
    ward->num_spare = 0;
    for (int64_t r = ward->num_rows - 1; r >= padded(size, NR); r--)
        ward->spare[ward->num_spare++] = (int32_t)r;
}

/* What is left of a chunk's items. */
static Clusters clusters_of(const Ward *ward) {
    return {ward->first_token, ward->into, ward->index, ward->home, ward->wanted};
}

/* Once the rows of the tokens are there: merge what there is no room for, and say where each token went.
   `scores` holds QUERIES rows. */
static void learn_by_likelihood(const Call *call, Dictionary *dictionary, Rows *tokens, const Sums *sums,
                                const Chunk *chunk, int64_t head, Ward *ward, Learner *learner, float *scores) {
    const int64_t size = call->chunk_size, num = dictionary->num, due = num + size - chunk->after;
    const Items items = {call, dictionary, tokens, sums, ward};
    int64_t num_moved = 0;
    if (!*tokens->is_finite) {
        /* The sums get all values, and so do costs. */
        load_values(tokens, call, chunk->index, head, size);
        clear_weightless(tokens, call, size);
        if (due) prepare_ward(items, due, scores);
        for (int64_t t = 0; due && t < size; t += QUERIES) token_rows(items, t, least(QUERIES, size - t));
    }
    if (!due) {
        ward->has_bounds = ward->has_squares = 0;
        for (int64_t t = 0; t < size; t++) learner->slot[t] = (int32_t)(num + t);
    } else {
        merge_cheapest(items, due, scores);
        num_moved = find_moves(clusters_of(ward), num, size, learner);
        ward->now++;
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
    move_all(call, dictionary, tokens, sums, ward->wanted, chunk, head, num_moved, learner);
    for (int64_t t = 0; due && t < size; t++) set_squares(items, learner->slot[t]);
    for (int64_t i = 0; i < num_moved; i++) set_squares(items, learner->near[i]);
}
