/* What a chunk merged away, where pairs are merged: noted by the forward, put back by the backward. */
#pragma once

#include "dictionary.h"

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
