/* Clusters of a chunk's slots and tokens: each cluster gets a slot, and the contents of its slots and tokens move there. */
#pragma once

#include "learn.h"

/* Columns are [slots | tokens | joined]; those of tokens begin at `first_token`. */
struct Clusters {
    int64_t first_token;
    int32_t *into;  /* [columns]: the column that each was merged into; roots point to themselves. */
    int32_t *index; /* [columns]: lowest slot or token of each. */
    int32_t *home;  /* [columns]: the slot of each remaining column. */
    int32_t *moved; /* [M]: scratch. */
};

INLINE int64_t cluster_of(const Clusters &clusters, int64_t i) {
    while (clusters.into[i] != i) i = clusters.into[i];
    return i;
}

/* Assign a slot to each cluster: its lowest slot, or else a free one, in order of first tokens. */
static void find_homes(const Clusters &clusters, int64_t num, int64_t size) {
    const int64_t start = clusters.first_token;
    int64_t free = 0;
    for (int64_t i = 0; i < num; i++) {
        const int64_t cluster = cluster_of(clusters, i);
        if (clusters.index[cluster] == i) clusters.home[cluster] = (int32_t)i;
    }
    for (int64_t t = 0; t < size; t++) {
        const int64_t cluster = cluster_of(clusters, start + t);
        if (clusters.index[cluster] != start + t) continue;
        while (free < num && clusters.index[cluster_of(clusters, free)] == free) free++;
        clusters.home[cluster] = (int32_t)free++;
    }
}

/* Find each token's slot, the slots that move (`moved`), and where they go (`near` of the learner). Returns how many move. */
static int64_t find_moves(const Clusters &clusters, int64_t num, int64_t size, Learner *learner) {
    int64_t num_moved = 0;
    find_homes(clusters, num, size);
    for (int64_t i = 0; i < num; i++) {
        const int64_t cluster = cluster_of(clusters, i);
        if (clusters.index[cluster] == i) continue;
        clusters.moved[num_moved] = (int32_t)i;
        learner->near[num_moved++] = clusters.home[cluster];
    }
    for (int64_t t = 0; t < size; t++)
        learner->slot[t] = clusters.home[cluster_of(clusters, clusters.first_token + t)];
    return num_moved;
}

/* Save what the backward needs, and merge the moved slots into their targets. */
static void move_slots(const Call *call, const Sums *sums, const int32_t *moved, const Chunk *chunk, int64_t head,
                       int64_t num_moved, Learner *learner) {
    if (call->merged_slot) {
        const Merged merged = merged_of(call, chunk->index, head);
        for (int64_t i = 0; i < num_moved; i++) {
            note_slot(call, sums, moved[i], learner->near[i], &merged, i);
            learner->is_done[moved[i]] = 1;
        }
        int64_t place = num_moved;
        if (sums->weight) {
            place = note_slots(call, sums, learner->slot, call->chunk_size, chunk->before, &merged, place,
                               learner->is_done);
            place = note_slots(call, sums, learner->near, num_moved, chunk->before, &merged, place, learner->is_done);
        }
        end_notes(call, &merged, place, learner->is_done);
    }
    for (int64_t i = 0; i < num_moved; i++) {
        add_slot(call, sums, moved[i], sums, learner->near[i], 1);
        clear_slot(call, sums, moved[i]);
    }
}
