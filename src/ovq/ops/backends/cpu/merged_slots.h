/* What a chunk changes and the backward cannot recompute: saved by the forward, restored by the backward.

   Where pairs are merged, these are the slots merged into others. Where tokens have weights, they are all slots that the
   chunk changed: subtracting a weighted token leaves the rounding error of a float32 sum, which can exceed all that a slot of
   little weight holds. */
#pragma once

#include "dictionary.h"

struct Merged {
    int32_t *slot, *into; /* [num_noted]: the slot, and the one it was merged into, or itself; -1 after the last. */
    Sums before;          /* [num_noted]: the slots before the chunk. */
};

INLINE Merged merged_of(const Call *call, int64_t chunk, int64_t head) {
    const int64_t first = (chunk * call->num_kv_heads + head) * call->num_noted;
    const Sums before = {call->merged_key + first * call->k.dim, call->merged_value + first * call->v.dim,
                         call->merged_count + first, from_row(call->merged_weight, first), nullptr, FLOAT32};
    return {call->merged_slot + first, call->merged_into + first, before};
}

/* Copies slot i of `from` to slot j of `to`. */
static void copy_slot(const Call *call, const Sums *from, int64_t i, const Sums *to, int64_t j) {
    const int64_t k = call->k.dim, v = call->v.dim;
    memcpy(to->key + j * k, from->key + i * k, sizeof(float) * k);
    memcpy(to->value + j * v, from->value + i * v, sizeof(float) * v);
    if (from->count) to->count[j] = from->count[i];
    if (from->weight) to->weight[j] = from->weight[i];
}

/* Adds slot i of `from` to slot j of `to`, or takes it back. */
static void add_slot(const Call *call, const Sums *from, int64_t i, const Sums *to, int64_t j, int sign) {
    const int64_t k = call->k.dim, v = call->v.dim;
    add_sums(call, to->key + j * k, to->value + j * v, from->key + i * k, from->value + i * v, sign);
    to->count[j] += sign * from->count[i];
    if (from->position) to->position[j] += sign * from->position[i];
    if (from->weight) to->weight[j] += sign * from->weight[i];
}

static void clear_slot(const Call *call, const Sums *sums, int64_t i) {
    memset(sums->key + i * call->k.dim, 0, sizeof(float) * call->k.dim);
    memset(sums->value + i * call->v.dim, 0, sizeof(float) * call->v.dim);
    if (sums->count) sums->count[i] = 0;
    if (sums->position) sums->position[i] = 0;
    if (sums->weight) sums->weight[i] = 0;
}

static void note_slot(const Call *call, const Sums *sums, int64_t slot, int64_t into, const Merged *merged,
                      int64_t place) {
    merged->slot[place] = (int32_t)slot;
    merged->into[place] = (int32_t)into;
    copy_slot(call, sums, slot, &merged->before, place);
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
