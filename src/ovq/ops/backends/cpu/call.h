/* Arguments of a call (mirrored by `_Arguments` in kernels.py), the threads it runs on, and its memory. */
#pragma once

#include <sched.h>

#include <cstdlib>

#include "numbers.h"
#include "product.h"

/* Queries, or keys, per tile; and queries and slots per tile of the backward. */
#define QUERIES 32
#define READERS 256
#define SLOTS 64

/* Tensors of tokens are [num_chunks, width, heads, dim], dim dense. */
struct Tokens {
    void *data;
    int64_t stride[3];
    int64_t dim;
};

struct Call {
    int64_t num_rows, num_kv_heads, group_size, chunk_size, width, capacity, num_threads;
    int64_t dtype;
    int64_t state_dtype;      /* Format that sums are rounded to when tokens are merged into them. */
    int64_t merges_pairs;     /* Whether pairs are merged (merge="nearest"). */
    int64_t num_parts;        /* For "nearest": number of parts in which edges are taken. */
    int64_t weighs_chunk;     /* Whether scores of the own chunk's tokens include the log of their weights. */
    double tie, value_weight;
    double mass_power;        /* For "nearest": exponent of the masses in the priority of an edge. */
    double least_weight;      /* Slots that fade below it are dropped by "nearest", else kept at this weight. */
    Tokens q, k, v, o;
    float *lse;         /* [num_chunks, width, H]: log-sum-exp of the scores of each query. */
    const float *scale; /* [H] */
    float *key_sum, *value_sum;       /* [R, Hkv, M, K], [R, Hkv, M, V] */
    int64_t *count;                   /* [R, Hkv, M] */
    /* Weights of tokens, [num_chunks, width, Hkv], and of slots, [R, Hkv, M]; NULL if tokens have none. */
    const float *token_weights;
    float *weight;
    /* With forgetting, the factor on all slots before each chunk, [num_chunks, Hkv]; else NULL. */
    const float *fading;
    int32_t *slots;                   /* [num_chunks, width, Hkv] */
    const int64_t *first_chunk, *length; /* [R]: each row's first chunk and number of tokens. */
    const int64_t *schedule_start;    /* [R]: where the row begins in `schedule`. */
    const int64_t *num_merged;        /* [R]: tokens merged before the call. */
    const int32_t *schedule;          /* Per row, slots before each complete chunk and after the last. */
    /* Slots that chunks changed (merged_slots.h): [num_chunks, Hkv, num_noted], sums with [..., K] and [..., V]; or NULL. */
    int64_t num_noted;
    int32_t *merged_slot, *merged_into;
    float *merged_key, *merged_value;
    int64_t *merged_count;
    float *merged_weight;
    /* For the backward. */
    Tokens grad_o, grad_q, grad_k, grad_v;
    float *key_deposit, *value_deposit, *weight_deposit; /* Gradient of the current sums and weights. */
    float *grad_weights;                /* [num_chunks, width, Hkv]; NULL if no weights have gradients. */
    double *grad_scale;                 /* [R, H] */
};

/* A barrier of a few threads that are all running. */
struct Barrier {
    int waiting, round;
};

static void wait_for_all(Barrier *barrier, int size) {
    if (size == 1) return;
    const int round = __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&barrier->waiting, 1, __ATOMIC_ACQ_REL) == size) {
        barrier->waiting = 0;
        __atomic_store_n(&barrier->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t spins = 0; __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE) == round; spins++)
        if (spins > 4096) sched_yield();
}

/* A team of threads that work on a stream together, as seen by one of them. */
struct Team {
    int rank, size;
    Barrier *barrier;
};

INLINE void sync(const Team *team) { wait_for_all(team->barrier, team->size); }

/* Memory handed out in aligned pieces. With `base` NULL, only adds up how much is needed. */
struct Arena {
    char *base;
    size_t used;
};

static void *take_bytes(Arena *arena, size_t bytes) {
    void *piece = arena->base ? arena->base + arena->used : nullptr;
    arena->used += (bytes + 127) / 128 * 128;
    return piece;
}

#define TAKE(arena, type, num) ((type *)take_bytes(arena, sizeof(type) * (size_t)(num)))

/* Lets each pointer point to a piece of `num` of its type, in this order. */
template <typename... Types> static void take_each(Arena *arena, int64_t num, Types **...pointers) {
    ((*pointers = TAKE(arena, Types, num)), ...);
}

/* Calls take(arena) twice: to add up how much it takes, then to take it from zeroed memory. Returns the memory, which the
   caller frees, or NULL if there is none. */
template <typename Take> static char *allocate(const Take &take) {
    Arena arena = {};
    take(&arena);
    char *memory = (char *)aligned_alloc(128, arena.used);
    if (!memory) return nullptr;
    memset(memory, 0, arena.used);
    arena = {memory, 0};
    take(&arena);
    return memory;
}

INLINE int64_t offset(const Tokens *x, int64_t chunk, int64_t token, int64_t head) {
    return chunk * x->stride[0] + token * x->stride[1] + head * x->stride[2];
}

/* Prefetch a token. */
INLINE void fetch_token(const Call *call, const Tokens *x, int64_t chunk, int64_t token, int64_t head) {
    const int64_t size = call->dtype == FLOAT32 ? 4 : 2;
    const char *data = (const char *)x->data + offset(x, chunk, token, head) * size;
    for (int64_t i = 0; i < x->dim * size; i += 64) __builtin_prefetch(data + i);
}

/* `factor` times the tokens first..first+num-1 of a head, as rows of `ld` floats, zero beyond the vector. */
static void read_tokens(const Call *call, const Tokens *x, int64_t chunk, int64_t head, int64_t first, int64_t num,
                        float factor, float *out, int64_t ld) {
    for (int64_t t = 0; t < num; t++, out += ld)
        read_numbers(call->dtype, x->data, offset(x, chunk, first + t, head), x->dim, factor, out, ld);
}

/* Writes factor * one vector to its place. */
static void write_token(const Call *call, const Tokens *x, int64_t chunk, int64_t token, int64_t head, float factor,
                        const float *from) {
    write_numbers(call->dtype, x->data, offset(x, chunk, token, head), x->dim, factor, from);
}
