/* Merging the cheapest pairs, one after the other, with as few exact costs as will do. */
#pragma once

#include "ward_rows.h"

/* By "ward-sqrt", what two parts cost with a third item, which is no less than what they cost together, is multiplied
   with this, at least, once they are merged: sqrt(3) / 2, for three items of equal counts and distances. */
#define NEARER 0.866f

/* A lower bound of costs with an item merged of two, whose parts, of counts x and y, cost h together and `first` and
   `second` with others of counts c (Lance and Williams; by "ward-sqrt" from the same for squared distances). */
template <typename Number>
INLINE Number merged_bound(Number first, Number second, Number x, Number y, Number c, Number h, int is_sqrt) {
    const Number all = x + y + c, size = (first < 0.0f ? -first : first) + (second < 0.0f ? -second : second) + h;
    Number bound;
    if (is_sqrt)
        bound = (square_root(x * (x + c)) * first + square_root(y * (y + c)) * second -
                 square_root(c * (x * y / (x + y))) * h) / square_root((x + y) * all);
    else
        bound = ((x + c) * first + (y + c) * second - c * h) / all;
    return bound - 5e-7f * size;
}

/* The same for a vector of others, some of them infinitely far, for which that gives NaN. */
INLINE Vector merged_bounds(Vector first, Vector second, Vector x, Vector y, Vector c, Vector h, int is_sqrt) {
    const Vector bound = merged_bound(first, second, x, y, c, h, is_sqrt);
    return bound == bound && first < INFINITY ? bound : splat(INFINITY);
}

/* Whether costs with what a and b are merged into do not follow from those with the two. */
INLINE int is_unsure(const Ward *ward, int64_t a, int64_t b) {
    return ward->is_weighted && (ward->is_wide || is_weightless(ward, a) || is_weightless(ward, b));
}

/* Let a row know of the merges since it was last looked at. */
static float *current_row(Ward *ward, int64_t i) {
    const int32_t r = ward->row[i];
    float *row = ward->rows + r * ward->num_columns;
    const float own = ward->count[i];
    /* Of what is far off it is enough to know that it is no nearer than its parts were, or not much. */
    const float far = 1.5f * ward->expected;
    for (int64_t m = ward->seen[r]; m < ward->num_merged; m++) {
        const int32_t a = ward->pair[2 * m], b = ward->pair[2 * m + 1];
        const float x = row[a], y = row[b], least_cost = (ward->is_sqrt ? NEARER : 1) * (x < y ? x : y);
        row[a] = row[b] = INFINITY;
        row[ward->first_merged + m] = least_cost;
        if (!(least_cost < far) || is_unsure(ward, a, b)) continue;
        const float bound =
            merged_bound(x, y, ward->count[a], ward->count[b], own, ward->height[m], ward->is_sqrt);
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

/* Find the nearest of an item exactly by its row; 0 if that takes more than `most` exact costs. */
static int search_row(const Items &items, int64_t i, float *row, int64_t most) {
    Ward *ward = items.ward;
    const int64_t n = ward->num_columns;
    const float tie = above(ward->tie);
    float next;
    int64_t first = lowest(row, n, &next), num = 0;
    /* Repeats: the first item at no distance will do. What costs nothing for its weight is no repeat: the lowest. */
    int64_t free = -1;
    for (int64_t j = 0; row[first] <= tie && j < n; j++) {
        if (row[j] > tie) continue;
        if (num++ == most) return 0;
        const double cost = exact_cost(items, i, j);
        row[j] = below(cost);
        if (cost == 0 && (free < 0 || comes_before(ward, i, j, i, free))) free = j;
        if (cost == 0 && !ward->is_weighted) break;
        if (cost > 0 && j == first) first = lowest(row, n, &next);
    }
    if (free >= 0) {
        set_partner(ward, i, free, 0, 0);
        return 1;
    }
    num = 0;
    double best = INFINITY;
    for (int64_t j = first; row[j] != INFINITY && row[j] <= above(best + ward->tie); j = lowest(row, n, &next)) {
        if (num == most) return 0;
        const double cost = exact_cost(items, i, j);
        row[j] = INFINITY;
        ward->tried[num] = (int32_t)j;
        ward->tried_cost[num++] = cost;
        best = fmin(best, cost);
        if (next > above(best + ward->tie)) break;
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
    return 1;
}

/* The first item that is left, but for item i. */
static int64_t lowest_other(const Ward *ward, int64_t i) {
    int64_t other = -1;
    for (int64_t j = 0; j < ward->num_columns; j++)
        if (ward->into[j] == j && j != i && (other < 0 || ward->index[j] < ward->index[other])) other = j;
    return other;
}

/* Find the nearest of an item exactly. `scratch` is a row. */
static void refine(const Items &items, int64_t i, float *scratch) {
    Ward *ward = items.ward;
    const int64_t n = ward->num_columns, candidate = ward->candidate[i];
    if (is_weightless(ward, i)) {
        set_partner(ward, i, lowest_other(ward, i), 0, 0);
        return;
    }
    if (candidate >= 0 && ward->into[candidate] == candidate) {
        const double cost = exact_cost(items, i, candidate);
        if (is_nearest(ward, i, candidate, cost)) {
            set_partner(ward, i, candidate, cost, cost);
            if (!is_exact(ward, candidate) && is_nearest(ward, candidate, i, cost))
                set_partner(ward, candidate, i, cost, cost);
            return;
        }
    }
    float *row = scratch;
    /* Estimates that are too loose to go on with are computed anew: roughly, if that will do, else in float32. */
    int num_fresh = 0;
    if (ward->row[i] >= 0) {
        row = current_row(ward, i);
    } else {
        const int32_t r = ward->row[i] = take_spare(ward);
        if (r >= 0) row = ward->rows + r * n;
        if (r >= 0) ward->seen[r] = (int32_t)ward->num_merged;
        fresh_row(items, i, ward->is_rough, row);
        num_fresh = 1;
    }
    for (;; num_fresh++) {
        const int is_sharp = ward->is_wide || num_fresh > ward->is_rough;
        if (search_row(items, i, row, is_sharp ? n : TRIES)) return;
        fresh_row(items, i, ward->is_rough && !num_fresh, row);
    }
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

/* Turn the row of item `with` into that of what it and `other` are merged into, at cost `height`, not less than
   `floor`. `other` has no row; it is a slot, or slots merged. No pair that is left costs less than `floor`. Two slots
   cost at least the bound of the one that changed last. Where it is not known which item of a pair is the younger one,
   the lower bound of the two will do, and by "ward" the higher one. Items with rows know their costs with a slot, which
   are looked up where they may matter. */
static void guess_row(const Ward *ward, int64_t with, int64_t other, float floor, float height, float *row) {
    const int64_t n = ward->num_columns;
    const int is_slot = other < ward->first_token;
    const Vector x = splat(ward->count[with]), y = splat(ward->count[other]), h = splat(height);
    const Vector own = splat(ward->bound[other]), least_cost = splat(floor);
    const Vector time = splat(is_slot ? ward->slot_time[other] : INFINITY);
    for (int64_t j = 0; j < n; j += VL) {
        const Vector c = load(ward->count + j), first = load(row + j), its = load(ward->bound + j);
        const Vector either = ward->is_sqrt ? lower_of(its, own) : higher_of(its, own);
        Vector second = is_slot ? its : either;
        if (j < ward->first_token) {
            const Vector since = load(ward->slot_time + j);
            second = since > time ? its : since < time ? own : either;
        }
        second = higher_of(second, least_cost);
        Vector bound = merged_bounds(first, second, x, y, c, h, ward->is_sqrt);
        if (is_slot && j >= ward->first_token && is_any(bound <= splat(ward->expected))) {
            for (int64_t l = 0; l < VL; l++)
                if (bound[l] <= ward->expected && ward->row[j + l] >= 0)
                    second[l] = fmaxf(second[l], ward->rows[ward->row[j + l] * n + other]);
            bound = merged_bounds(first, second, x, y, c, h, ward->is_sqrt);
        }
        store(row + j, bound);
    }
}

INLINE void release_row(Ward *ward, int64_t i) {
    if (ward->row[i] >= 0) ward->spare[ward->num_spare++] = ward->row[i];
    ward->row[i] = -1;
}

/* An item of less than so many times the mass of another moves the mean of the two by less than ties. */
#define NEGLIGIBLE 1e-14

/* Merge item b into item a, the lower one: into a new column, with its mean, mass and row. */
static void merge_pair(const Items &items, int64_t a, int64_t b, double cost) {
    Ward *ward = items.ward;
    if (is_weightless(ward, b) && ward->mass[b] <= NEGLIGIBLE * ward->mass[a]) {
        /* Item a stays as it is. */
        ward->mass[a] += ward->mass[b];
        release_row(ward, b);
        ward->into[b] = (int32_t)a;
        ward->bound[b] = INFINITY;
        return;
    }
    const Call *call = items.call;
    const int64_t k = call->k.dim, v = call->v.dim, m = ward->first_merged + ward->num_merged;
    const int64_t at = ward->num_merged, n = ward->num_columns;
    const double p = ward->mass[a], q = ward->mass[b], share = p + q > 0 ? q / (p + q) : 0;
    double *mean = ward->mean + at * (k + v);
    float *key = ward->merged.keys + at * key_ld(call), *value = ward->merged.values + at * value_ld(call);
    add_mean(items, a, p + q > 0 ? p / (p + q) : 1, 0, mean);
    add_mean(items, b, share, 1, mean);
    for (int64_t j = 0; j < k; j++) key[j] = (float)mean[j];
    for (int64_t j = 0; j < v; j++) value[j] = (float)mean[k + j];
    const double key_square = exact_square(mean, k), value_square = exact_square(mean + k, v);
    set_row(&ward->merged, call, at, 0);
    ward->mass[m] = p + q;
    ward->count[m] = (float)(p + q);
    ward->square[m] = (float)(key_square + ward->value_factor * value_square);
    ward->index[m] = ward->index[a] < ward->index[b] ? ward->index[a] : ward->index[b];
    ward->partner[m] = ward->candidate[m] = -1;
    ward->cost[m] = INFINITY;
    ward->into[m] = (int32_t)m;
    ward->row[m] = -1;
    /* Costs with the new item from those with its parts, which are known from below (Lance and Williams). */
    const int32_t row_a = ward->row[a], row_b = ward->row[b];
    /* What counts as 0 may be as much as a tie; and of items that cost so little, the first pair need not be the cheapest. */
    const float height = above(fmax(cost, ward->tie)), floor = below(ward->is_weighted ? cost - ward->tie : cost);
    ward->bound[m] = (ward->is_sqrt ? NEARER : 1) * floor;
    if (is_weightless(ward, m)) {
        ward->bound[m] = 0;
        ward->square[m] = INFINITY;
        ward->count[m] = 1;
    }
    if (is_unsure(ward, a, b)) {
        release_row(ward, a);
        release_row(ward, b);
    } else if (row_a >= 0 || row_b >= 0) {
        const int is_two = row_a >= 0 && row_b >= 0;
        const int64_t with = row_a >= 0 ? a : b, other = with == a ? b : a;
        float *row = current_row(ward, with);
        row[other] = INFINITY;
        if (is_two) {
            const float *more = current_row(ward, other);
            const Vector x = splat(ward->count[with]), y = splat(ward->count[other]), h = splat(height);
            for (int64_t j = 0; j < n; j += VL)
                store(row + j, merged_bounds(load(row + j), load(more + j), x, y, load(ward->count + j), h,
                                             ward->is_sqrt));
        } else {
            guess_row(ward, with, other, floor, height, row);
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
    ward->height[at] = height;
    /* Repeats of either are repeats of the new item. */
    for (int64_t j = 0; cost == 0 && j < n; j++) {
        if (ward->cost[j] != 0 || (ward->partner[j] != a && ward->partner[j] != b)) continue;
        if (!ward->is_weighted || exact_cost(items, j, m) == 0) ward->partner[j] = (int32_t)m;
    }
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
        ward->level = fmaxf(ward->level, above(cost));
        merge_pair(items, a, b, cost);
        due--;
    }
}
