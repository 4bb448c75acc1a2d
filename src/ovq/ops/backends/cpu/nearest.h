/* merge="nearest" (docs/method/math.md, section 5): after a chunk, some slots and all tokens search for their nearest item.
   Their edges are taken in a few parts, lowest priority first; joined items search again before the next part.

   A team of threads shares the searches (nearest_search.h); one of the threads does what is in this file. */
#pragma once

#include "nearest_search.h"

/* Marks of items on a cycle of edges, and of the lowest item of each cycle, whose edge is dropped. */
#define ON_CYCLE INT32_MAX
#define LOWEST_OF_CYCLE (INT32_MAX - 1)

/* Each cycle of edges drops the edge of its lowest item. Most cycles are two items, each other's nearest. */
static void open_cycles(Nearest *nearest) {
    for (int64_t j = 0; j < nearest->num_edges; j++) nearest->mark[nearest->edges[j]] = -1;
    for (int64_t j = 0; j < nearest->num_edges; j++) {
        int32_t i = nearest->edges[j];
        for (; nearest->target[i] >= 0 && nearest->mark[i] < 0; i = nearest->target[i]) nearest->mark[i] = (int32_t)j;
        /* A cycle, if this walk has been here before. Later walks that lead here end here. */
        if (nearest->target[i] < 0 || nearest->mark[i] != j) continue;
        int32_t lowest = i;
        do {
            if (nearest->index[i] < nearest->index[lowest]) lowest = i;
            nearest->mark[i] = ON_CYCLE;
            i = nearest->target[i];
        } while (nearest->mark[i] != ON_CYCLE);
        nearest->mark[lowest] = LOWEST_OF_CYCLE;
    }
}

/* Take the `most` edges of lowest priority, or all if there are fewer; ties to the first. Returns their number. */
static int64_t take_edges(const Joining &all, int64_t most) {
    Nearest *nearest = all.nearest;
    int64_t num = 0;
    for (int64_t j = 0; j < nearest->num_edges; j++) {
        const int32_t i = nearest->edges[j];
        nearest->root[i] = i;
        if (nearest->target[i] < 0 || nearest->mark[i] == LOWEST_OF_CYCLE) continue;
        nearest->taken[num] = i;
        nearest->ranked[num++] = nearest->priority[i];
    }
    double last = INFINITY, tie = 0;
    int64_t left = num;
    if (most < num) {
        std::nth_element(nearest->ranked, nearest->ranked + most - 1, nearest->ranked + num);
        last = nearest->ranked[most - 1];
        tie = all.call->tie * fmax(last, 1);
        left = most;
        for (int64_t j = 0; j < num; j++) left -= nearest->ranked[j] < last - tie;
    }
    nearest->num_taken = 0;
    for (int64_t j = 0; j < num; j++) {
        const int32_t i = nearest->taken[j];
        const double priority = nearest->priority[i];
        const int is_clear = priority < last - tie, is_tied = !is_clear && priority <= last + tie && left > 0;
        left -= is_tied;
        if (!is_clear && !is_tied) continue;
        nearest->root[i] = nearest->target[i];
        nearest->taken[nearest->num_taken++] = i;
    }
    return nearest->num_taken;
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

/* Finish joined column m: its mean, its float32 row, its squared length. */
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
    set_column(all, m);
}

/* Join items whose taken edges lead to the same root: each tree becomes a new column. */
static void join_all(const Joining &all) {
    Nearest *nearest = all.nearest;
    const int64_t begin = nearest->num_joined, dim = all.call->k.dim + all.call->v.dim;
    for (int64_t j = 0; j < nearest->num_taken; j++) {
        const int32_t i = nearest->taken[j];
        int32_t root = i;
        while (nearest->root[root] != root) root = nearest->root[root];
        if (nearest->into[root] == root) {
            const int64_t m = nearest->first_joined + nearest->num_joined;
            memset(nearest->mean + nearest->num_joined++ * dim, 0, sizeof(double) * dim);
            nearest->mass[m] = 0;
            nearest->index[m] = INT32_MAX;
            join(all, root, m);
        }
        join(all, i, nearest->into[root]);
    }
    for (int64_t place = begin; place < nearest->num_joined; place++) end_column(all, nearest->first_joined + place);
}

INLINE Clusters clusters_of(const Nearest *nearest) {
    return {nearest->first_token, nearest->into, nearest->index, nearest->home, nearest->moved};
}

/* Edges of items that have not joined now lead to the columns that hold their targets. */
static void follow_targets(const Joining &all) {
    Nearest *nearest = all.nearest;
    const Clusters clusters = clusters_of(nearest);
    int64_t num = 0;
    for (int64_t j = 0; j < nearest->num_edges; j++) {
        const int32_t i = nearest->edges[j], old = nearest->target[i];
        if (nearest->into[i] != i) continue;
        nearest->edges[num++] = i;
        if (old < 0 || nearest->into[old] == old) continue;
        const int64_t target = cluster_of(clusters, old);
        set_edge(all, i, target, has_mass(nearest, i) ? distance_of(all, i, target) : 0);
    }
    nearest->num_edges = num;
}

/* Columns joined from `first` on get edges, in order of items, and are to search. */
static void add_joined(Nearest *nearest, int64_t first) {
    int32_t *joined = nearest->searching, *end = joined, *edges = nearest->edges, *all = nearest->mark;
    for (int64_t i = first; i < nearest->first_joined + nearest->num_joined; i++) *end++ = (int32_t)i;
    const auto is_lower = [=](int32_t i, int32_t j) { return nearest->index[i] < nearest->index[j]; };
    std::sort(joined, end, is_lower);
    /* Not std::inplace_merge, which allocates: a C driver does not link what that needs. */
    int32_t *last = std::merge(joined, end, edges, edges + nearest->num_edges, all, is_lower);
    nearest->num_searching = end - joined;
    nearest->num_edges = std::copy(all, last, edges) - edges;
}

/* Choose between approximate and float32 products from here on, by how many candidates approximate ones leave. */
static void choose_products(const Joining &all) {
    Nearest *nearest = all.nearest;
    int64_t num = 0, tiles = 0;
    for (; tiles * QUERIES < nearest->num_searching; tiles++) num += nearest->num_near[tiles];
    nearest->is_rough = num <= tiles * MOST_CANDIDATES;
    if (nearest->is_rough) return;
    keep_panels(&all.dictionary->rows, all.call, nearest->first_token);
    keep_panels(all.tokens, all.call, nearest->first_joined - nearest->first_token);
    keep_panels(&nearest->joined, all.call, 0);
}

/* Once items have searched: take the `part`-th part of the edges, half of the merges due or, in the last part, all of them,
   and join what they connect. If merges are still due, the joined items search again; after the last part, when edges were
   too few, all remaining items do. */
static void take_part(const Joining &all, int64_t part) {
    Nearest *nearest = all.nearest;
    const int64_t due = nearest->num_due, is_last = part >= all.call->num_parts;
    const int64_t first = nearest->first_joined + nearest->num_joined;
    if (HAS_ROUGH && part == 1 && !nearest->is_wide) choose_products(all);
    open_cycles(nearest);
    nearest->num_due -= take_edges(all, is_last ? due : (due + 1) / 2);
    join_all(all);
    nearest->num_searching = nearest->num_again = 0;
    if (!nearest->num_due) return;
    if (nearest->needs_order || is_last) set_order(all);
    if (is_last) {
        nearest->num_edges = nearest->num_searching = nearest->num_left;
        memcpy(nearest->edges, nearest->order, sizeof(int32_t) * nearest->num_left);
        memcpy(nearest->searching, nearest->order, sizeof(int32_t) * nearest->num_left);
    } else {
        follow_targets(all);
        add_joined(nearest, first);
    }
    /* Items without mass need not search. */
    int64_t num = 0;
    for (int64_t j = 0; j < nearest->num_searching; j++) {
        const int32_t i = nearest->searching[j];
        if (has_mass(nearest, i)) nearest->searching[num++] = i;
        else set_first(all, i);
    }
    nearest->num_searching = num;
}

/* Merge the joined items into slots, and write the slot of each token. */
static void learn_by_edges(const Joining &all, Dictionary *dictionary, const Chunk *chunk, int64_t head, int is_due,
                           Learner *learner) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int64_t num = dictionary->num, size = call->chunk_size;
    int64_t num_moved = 0;
    if (is_due) num_moved = find_moves(clusters_of(nearest), num, size, learner);
    for (int64_t t = 0; !is_due && t < size; t++) learner->slot[t] = (int32_t)(num + t);
    move_slots(call, all.sums, nearest->moved, chunk, head, num_moved, learner);
    add_tokens(call, dictionary, all.tokens, all.sums, chunk, head, learner);
    update_slots(dictionary, call, all.sums, learner->near, num_moved, learner->is_done);
    for (int64_t t = 0; t < size; t++) note_change(all, learner->slot[t]);
    for (int64_t i = 0; i < num_moved; i++) note_change(all, learner->near[i]);
    for (int64_t j = 0; HAS_BYTES && is_due && !nearest->needs_order && j < nearest->num_edges; j++) {
        const int32_t i = nearest->edges[j];
        if (i < num && nearest->into[i] == i) note_search(nearest, i);
    }
}

/* Load the values of a non-finite chunk again, as `load_chunk` zeroed some: sums and distances use them all. */
static void reload(const Joining &all, Rows *tokens, const Chunk *chunk, int64_t head) {
    load_values(tokens, all.call, chunk->index, head, chunk->num);
    clear_weightless(tokens, all.call, chunk->num);
}
