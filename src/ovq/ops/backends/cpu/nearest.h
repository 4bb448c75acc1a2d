/* merge="nearest": after a chunk, some slots and all tokens look for the item nearest to them, and the shortest of these
   edges are taken, in a few parts: what has joined looks again before the next (docs/math.md, section 5).

   Searches are in nearest_search.h and shared by a team of threads; what is here is done by one of them. */
#pragma once

#include "nearest_search.h"

/* Say how early each edge is taken: the shorter, and the less its items weigh, the earlier. */
static void set_priorities(const Joining &all) {
    Nearest *nearest = all.nearest;
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const int64_t i = nearest->order[j], target = nearest->target[i];
        nearest->priority[i] = INFINITY;
        if (target < 0) continue;
        const double m = nearest->mass[i], total = m + nearest->mass[target];
        const double weight = pow(m * (nearest->mass[target] / (total > 0 ? total : 1)), all.call->mass_power);
        const double distance = nearest->distance[i] / nearest->size;
        const double priority = weight * (std::isfinite(distance) ? distance : NO_DISTANCE);
        nearest->priority[i] = priority < INFINITY ? priority : DBL_MAX;
    }
}

/* Of each circle of edges, the one of its lowest item is not taken. Most are of two items, each other's nearest. */
static void open_circles(Nearest *nearest) {
    for (int64_t j = 0; j < nearest->num_left; j++) nearest->mark[nearest->order[j]] = -1;
    for (int64_t j = 0; j < nearest->num_left; j++) {
        int32_t i = nearest->order[j];
        for (; nearest->target[i] >= 0 && nearest->mark[i] < 0; i = nearest->target[i]) nearest->mark[i] = (int32_t)j;
        /* A circle, if this way has been here before. */
        if (nearest->target[i] < 0 || nearest->mark[i] != j) continue;
        int32_t lowest = i;
        for (int32_t other = nearest->target[i]; other != i; other = nearest->target[other])
            if (nearest->index[other] < nearest->index[lowest]) lowest = other;
        nearest->priority[lowest] = INFINITY;
        /* Later ways that lead here end here. */
        for (int32_t other = nearest->target[i]; other != i; other = nearest->target[other])
            nearest->mark[other] = INT32_MAX;
        nearest->mark[i] = INT32_MAX;
    }
}

/* Let `root` be the target of the `most` edges of lowest priority, or of all, of equal ones of the first; of others, the
   item itself. Returns how many they are. */
static int64_t take_edges(const Joining &all, int64_t most) {
    Nearest *nearest = all.nearest;
    int64_t num = 0;
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const double priority = nearest->priority[nearest->order[j]];
        if (priority < INFINITY) nearest->ranked[num++] = priority;
    }
    double last = INFINITY, tie = 0;
    int64_t left = num;
    if (most < num) {
        select_lowest(nearest->ranked, num, most - 1);
        last = nearest->ranked[most - 1];
        tie = all.call->tie * fmax(last, 1);
        left = num = most;
        for (int64_t j = 0; j < nearest->num_left; j++) left -= nearest->priority[nearest->order[j]] < last - tie;
    }
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const int32_t i = nearest->order[j];
        const double priority = nearest->priority[i];
        const int is_clear = priority < last - tie, is_tied = !is_clear && priority <= last + tie && left > 0;
        left -= is_tied;
        nearest->root[i] = priority < INFINITY && (is_clear || is_tied) ? nearest->target[i] : i;
    }
    return num;
}

/* mean [K + V] += share * the mean of item i. */
static void add_mean(const Joining &all, int64_t i, double share, double *mean) {
    const int64_t k = all.call->k.dim, v = all.call->v.dim;
    if (all.is_joined(i)) {
        for (int64_t j = 0; j < k + v; j++) mean[j] += share * all.mean(i)[j];
        return;
    }
    const float *key = all.key(i), *value = all.value(i);
    for (int64_t j = 0; j < k; j++) mean[j] += share * key[j];
    for (int64_t j = 0; j < v; j++) mean[k + j] += share * value[j];
}

/* Add item i to column m. */
static void join(const Joining &all, int64_t i, int64_t m) {
    Nearest *nearest = all.nearest;
    add_mean(all, i, nearest->mass[i], nearest->mean + (m - nearest->first_joined) * (all.call->k.dim + all.call->v.dim));
    nearest->mass[m] += nearest->mass[i];
    if (nearest->index[i] < nearest->index[m]) nearest->index[m] = nearest->index[i];
    clear_column(nearest, i, m);
}

/* The mean of what has joined in column m. */
static void end_column(const Joining &all, int64_t m) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int64_t k = call->k.dim, v = call->v.dim, place = m - nearest->first_joined;
    double *mean = nearest->mean + place * (k + v);
    float *key = nearest->joined.keys + place * key_ld(call), *value = nearest->joined.values + place * value_ld(call);
    const double mass = nearest->mass[m] > 0 ? nearest->mass[m] : 1;
    for (int64_t j = 0; j < k + v; j++) mean[j] /= mass;
    for (int64_t j = 0; j < k; j++) key[j] = (float)mean[j];
    for (int64_t j = 0; j < v; j++) value[j] = (float)mean[k + j];
    set_row(&nearest->joined, call, place, 0);
    nearest->square[m] = exact_square(mean, k) + nearest->value_factor * exact_square(mean + k, v);
    set_column(nearest, m);
}

/* Join what `root` leads to the same item. */
static void join_all(const Joining &all) {
    Nearest *nearest = all.nearest;
    const int64_t begin = nearest->num_joined;
    /* The column that an item's cluster gets, or -1. */
    for (int64_t j = 0; j < nearest->num_left; j++) nearest->mark[nearest->order[j]] = -1;
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const int32_t i = nearest->order[j];
        int32_t root = i;
        if (nearest->root[i] == i) continue;
        while (nearest->root[root] != root) root = nearest->root[root];
        if (nearest->mark[root] < 0) {
            const int64_t m = nearest->mark[root] = (int32_t)(nearest->first_joined + nearest->num_joined);
            memset(nearest->mean + nearest->num_joined++ * (all.call->k.dim + all.call->v.dim), 0,
                   sizeof(double) * (all.call->k.dim + all.call->v.dim));
            nearest->mass[m] = 0;
            nearest->index[m] = INT32_MAX;
            join(all, root, m);
        }
        join(all, i, nearest->mark[root]);
    }
    for (int64_t place = begin; place < nearest->num_joined; place++) end_column(all, nearest->first_joined + place);
}

INLINE Clusters clusters_of(const Nearest *nearest) {
    return {nearest->first_token, nearest->into, nearest->index, nearest->home, nearest->moved};
}

/* What has not joined keeps to what its target is in. */
static void follow_targets(const Joining &all) {
    Nearest *nearest = all.nearest;
    const Clusters clusters = clusters_of(nearest);
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const int32_t i = nearest->order[j], old = nearest->target[i];
        if (old < 0 || nearest->into[old] == old) continue;
        nearest->target[i] = (int32_t)cluster_of(clusters, old);
        if (has_mass(nearest, i)) nearest->distance[i] = distance_of(all, i, nearest->target[i]);
    }
}

/* Once items have searched: take the next part of the edges, the `part`-th one, half of what is due or, at last, all, and
   join what they connect. Then, if more is due, what has joined is to search again, or, where edges were too few for all
   parts, all that is left. */
static void take_part(const Joining &all, int64_t part) {
    Nearest *nearest = all.nearest;
    const int64_t due = nearest->num_due, is_last = part >= all.call->num_parts;
    const int64_t begin = is_last ? 0 : nearest->first_joined + nearest->num_joined;
    set_priorities(all);
    open_circles(nearest);
    nearest->num_due -= take_edges(all, is_last ? due : (due + 1) / 2);
    join_all(all);
    nearest->num_searching = 0;
    if (!nearest->num_due) return;
    set_order(all);
    follow_targets(all);
    for (int64_t j = 0; j < nearest->num_left; j++) {
        const int32_t i = nearest->order[j];
        if (i < begin) continue;
        if (has_mass(nearest, i)) nearest->searching[nearest->num_searching++] = i;
        else set_first(nearest, i);
    }
}

static void search_in_tiles(const Joining &all, float *scores) {
    for (int64_t i = 0; i < all.nearest->num_searching; i += QUERIES)
        search_tile(all, i, least(QUERIES, all.nearest->num_searching - i), scores);
}

/* Merge what was joined, and say where each token went. */
static void learn_by_edges(const Joining &all, Dictionary *dictionary, const Chunk *chunk, int64_t head, int is_due,
                           Learner *learner) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int64_t num = dictionary->num, size = call->chunk_size;
    int64_t num_moved = 0;
    if (is_due) num_moved = find_moves(clusters_of(nearest), num, size, learner);
    for (int64_t t = 0; !is_due && t < size; t++) learner->slot[t] = (int32_t)(num + t);
    move_all(call, dictionary, all.tokens, all.sums, nearest->moved, chunk, head, num_moved, learner);
    nearest->has_squares = 0;
}
