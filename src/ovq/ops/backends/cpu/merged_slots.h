/* What a chunk changes and the backward cannot recompute: saved by the forward, restored by the backward.

   Where pairs are merged, these are the slots merged into others. Where tokens have weights, they are all slots that the
   chunk changed: subtracting a weighted token leaves the rounding error of a float32 sum, which can exceed all that a slot of
   little weight holds. */
#pragma once

#include "dictionary.h"

/* Slots as they were before the chunk. */
struct Merged {
    int32_t *slot, *into; /* [num_noted]: the slot, and the one it was merged into, or itself; -1 after the last. */
    float *key, *value;   /* [num_noted, K], [num_noted, V]: sums. */
    int64_t *count;       /* [num_noted] */
    float *weight;        /* [num_noted], or NULL. */
};

INLINE Merged merged_of(const Call *call, int64_t chunk, int64_t head) {
    const int64_t first = (chunk * call->num_kv_heads + head) * call->num_noted;
    return {call->merged_slot + first, call->merged_into + first, call->merged_key + first * call->k.dim,
            call->merged_value + first * call->v.dim, call->merged_count + first, from_row(call->merged_weight, first)};
}

static void note_slot(const Call *call, const Sums *sums, int64_t slot, int64_t into, const Merged *merged,
                      int64_t place) {
    merged->slot[place] = (int32_t)slot;
    merged->into[place] = (int32_t)into;
    memcpy(merged->key + place * call->k.dim, sums->key + slot * call->k.dim, sizeof(float) * call->k.dim);
    memcpy(merged->value + place * call->v.dim, sums->value + slot * call->v.dim, sizeof(float) * call->v.dim);
    merged->count[place] = sums->count[slot];
    if (sums->weight) merged->weight[place] = sums->weight[slot];
}

/* Saves those of n slots that are among the first `num`, each once; `is_noted` marks saved ones. Returns the next place. */
static int64_t note_slots(const Call *call, const Sums *sums, const int32_t *slots, int64_t n, int64_t num,
                          const Merged *merged, int64_t place, uint8_t *is_noted) {
    for (int64_t i = 0; i < n; i++) {
        if (slots[i] >= num || is_noted[slots[i]]) continue;
        is_noted[slots[i]] = 1;
        note_slot(call, sums, slots[i], slots[i], merged, place++);
    }
    return place;
}

/* Ends the list of a chunk's saved slots, and resets `is_noted` to zero. */
static void end_notes(const Call *call, const Merged *merged, int64_t place, uint8_t *is_noted) {
    for (int64_t i = 0; i < place; i++) is_noted[merged->slot[i]] = 0;
    if (place < call->num_noted) merged->slot[place] = -1;
}

/* Merge slot b into slot a, leaving it empty. */
static void merge_slot(const Call *call, const Sums *sums, int64_t b, int64_t a) {
    float *key = sums->key + b * call->k.dim, *value = sums->value + b * call->v.dim;
    add_sums(call, sums->key + a * call->k.dim, sums->value + a * call->v.dim, key, value, 1);
    sums->count[a] += sums->count[b];
    memset(key, 0, sizeof(float) * call->k.dim);
    memset(value, 0, sizeof(float) * call->v.dim);
    sums->count[b] = 0;
    if (sums->position) {
        sums->position[a] += sums->position[b];
        sums->position[b] = 0;
    }
    if (!sums->weight) return;
    sums->weight[a] += sums->weight[b];
    sums->weight[b] = 0;
}
