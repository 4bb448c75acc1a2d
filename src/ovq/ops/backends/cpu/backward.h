/* The backward of one chunk: rewinds the dictionary, then processes it in tiles of slots.

   Probabilities are computed again from the log-sum-exp of each query (docs/method/math.md). A tile of slots stays in the
   cache while all queries of the chunk pass over it; gradients of queries add up over the tiles. */
#pragma once

#include "merged_slots.h"
#include "read.h"

/* Shared by the threads of a team. */
struct Gradients {
    float *queries;  /* [G * width, key_ld]: scale * q. */
    float *grad_o;   /* [G * width, value_ld] */
    uint32_t *query_words;  /* [G * width, key_words]: queries without the scale, where pairs are multiplied. */
    uint32_t *grad_o_words; /* [G * width, value_words] */
    /* Queries with the scale, and grad_o, in pairs of queries, [G * pairs, ...], where pairs are multiplied. */
    uint32_t *query_pairs, *grad_o_pairs;
    float *lse;      /* [G * width] */
    float *inner;    /* [G * width]: sum of P dP, which is that of o grad_o. */
    float *grad_k;   /* [width, key_ld]: of the chunk's tokens, both as parts of slots and as rows of their own. */
    float *grad_v;   /* [width, value_ld] */
    uint8_t *is_done; /* [M]: scratch, zero between uses. */
    int32_t *slot;   /* [width]: where the chunk's tokens went. */
};

/* Private to each thread. */
struct Share {
    float *grad_q;   /* [G * width, key_ld]: its share of the gradient of scale * q. */
    float *grad_k;   /* [SLOTS, key_ld] */
    float *grad_v;   /* [SLOTS, value_ld] */
    float *probs;    /* [READERS, SLOTS] */
    float *grads;    /* [READERS, SLOTS]: gradient of the probabilities, then of the scores. */
    float *sums;     /* [SLOTS]: gradients of scores summed over the queries, if weights have gradients; else NULL. */
    float *rest;     /* [G * width]: likewise over its rows, in 16 bits: not 0, as o is rounded; else NULL. */
    uint32_t *prob_pairs, *grad_pairs; /* `probs` and `grads` in pairs of queries, [READERS / 2, SLOTS], where these are
                                          multiplied. */
};

INLINE int64_t num_pairs(int64_t num) { return (num + 1) / 2; }

static Gradients take_gradients(Arena *arena, const Call *call) {
    const int64_t queries = call->group_size * call->width;
    Gradients all;
    all.queries = TAKE(arena, float, queries * key_ld(call));
    all.grad_o = TAKE(arena, float, queries * value_ld(call));
    all.query_words = HAS_PAIRS ? TAKE(arena, uint32_t, queries * key_words(call)) : nullptr;
    all.grad_o_words = HAS_PAIRS ? TAKE(arena, uint32_t, queries * value_words(call)) : nullptr;
    const int64_t pairs = HAS_PAIRS ? call->group_size * num_pairs(call->width) : 0;
    all.query_pairs = TAKE(arena, uint32_t, pairs * key_ld(call));
    all.grad_o_pairs = TAKE(arena, uint32_t, pairs * value_ld(call));
    take_each(arena, queries, &all.lse, &all.inner);
    all.grad_k = TAKE(arena, float, call->width * key_ld(call));
    all.grad_v = TAKE(arena, float, call->width * value_ld(call));
    all.is_done = TAKE(arena, uint8_t, padded(call->capacity, NR));
    all.slot = TAKE(arena, int32_t, call->width);
    return all;
}

static Share take_share(Arena *arena, const Call *call) {
    Share share;
    share.grad_q = TAKE(arena, float, call->group_size * call->width * key_ld(call));
    share.grad_k = TAKE(arena, float, SLOTS * key_ld(call));
    share.grad_v = TAKE(arena, float, SLOTS * value_ld(call));
    take_each(arena, READERS * SLOTS, &share.probs, &share.grads);
    share.sums = call->grad_weights ? TAKE(arena, float, SLOTS) : nullptr;
    const int has_rest = call->grad_weights && call->dtype != FLOAT32;
    share.rest = has_rest ? TAKE(arena, float, call->group_size * call->width) : nullptr;
    take_each(arena, HAS_PAIRS ? READERS / 2 * SLOTS : 0, &share.prob_pairs, &share.grad_pairs);
    return share;
}

/* Gradients of a stream's sums. */
INLINE Sums deposits_of(const Call *call, int64_t row, int64_t head) {
    const int64_t first = (row * call->num_kv_heads + head) * call->capacity;
    return {call->key_deposit + first * call->k.dim, call->value_deposit + first * call->v.dim, nullptr,
            from_row(call->weight_deposit, first), nullptr, FLOAT32};
}

/* Load the queries of a chunk and the gradients of their outputs, for query head g of the group. */
static void load_queries(const Call *call, const Chunk *chunk, int64_t head, int64_t g, Gradients *all) {
    const int64_t query_head = head * call->group_size + g, num_heads = call->num_kv_heads * call->group_size;
    const int64_t start = g * chunk->num, width = value_ld(call);
    float *queries = all->queries + start * key_ld(call), *grad_o = all->grad_o + start * width;
    const float scale = call->scale[query_head];
    const int is_in_pairs = HAS_PAIRS && call->dtype == BFLOAT16;
    read_tokens(call, &call->q, chunk->index, query_head, 0, chunk->num, is_in_pairs ? 1 : scale, queries, key_ld(call));
    read_tokens(call, &call->grad_o, chunk->index, query_head, 0, chunk->num, 1, grad_o, width);
    if (is_in_pairs) {
        const int64_t pair = g * num_pairs(chunk->num);
        for (int64_t t = 0; t < chunk->num; t++) {
            round_row(queries + t * key_ld(call), key_ld(call), all->query_words + (start + t) * key_words(call));
            round_row(grad_o + t * width, width, all->grad_o_words + (start + t) * value_words(call));
        }
        for (int64_t i = 0; i < chunk->num * key_ld(call); i++) queries[i] *= scale;
        put_rows(all->query_pairs + pair * key_ld(call), chunk->num, key_ld(call), queries);
        put_rows(all->grad_o_pairs + pair * width, chunk->num, width, grad_o);
    }
    for (int64_t t = 0; t < chunk->num; t++) {
        float o[width];
        read_tokens(call, &call->o, chunk->index, query_head, t, 1, 1, o, width);
        all->inner[start + t] = (float)exact_dot(o, grad_o + t * width, width);
        all->lse[start + t] = call->lse[(chunk->index * call->width + t) * num_heads + query_head];
    }
}

/* Restore the slots that the forward saved. Each part of a merged sum gets the gradient of that sum. */
static void part_slots(const Call *call, const Chunk *chunk, int64_t head, const Sums *sums, const Sums *deposits,
                       Dictionary *dictionary) {
    const Merged merged = merged_of(call, chunk->index, head);
    for (int64_t i = 0; i < call->num_noted && merged.slot[i] >= 0; i++) {
        const int64_t b = merged.slot[i], a = merged.into[i];
        if (!sums->weight) {
            add_slot(call, &merged.before, i, sums, a, -1);
            update_slot(dictionary, call, a, sums);
        }
        copy_slot(call, &merged.before, i, sums, b);
        update_slot(dictionary, call, b, sums);
        if (a != b) copy_slot(call, deposits, a, deposits, b);
    }
}

/* The gradients of the weight, the key and the value of token t; on entry, `grad_k` and `grad_v` are those of its slot's
   sums, and `of_weight` is that of the slot's weight. */
static void weigh_gradients(const Call *call, const Chunk *chunk, int64_t head, int64_t t, const Rows *tokens,
                            float of_weight, float *grad_k, float *grad_v) {
    const int64_t k = call->k.dim, v = call->v.dim, place = chunk->index * call->width + t;
    if (call->grad_weights) {
        const double of_key = exact_dot(grad_k, tokens->keys + t * key_ld(call), k);
        const double of_value = exact_dot(grad_v, tokens->values + t * value_ld(call), v);
        call->grad_weights[place * call->num_kv_heads + head] = (float)(of_key + of_value + of_weight);
    }
    weighted_row(tokens->weights[t], grad_k, k, grad_k);
    weighted_row(tokens->weights[t], grad_v, v, grad_v);
}

/* Give the chunk's tokens the gradient of the sums they were added to, and subtract them from the sums. */
static void rewind_chunk(const Call *call, const Chunk *chunk, int64_t row, int64_t head, const Rows *tokens,
                         Dictionary *dictionary, Gradients *all) {
    const Sums sums = sums_of(call, row, head), deposits = deposits_of(call, row, head);
    for (int64_t t = 0; t < chunk->num; t++) {
        const int64_t place = chunk->index * call->width + t;
        const int32_t slot = all->slot[t] = call->slots[place * call->num_kv_heads + head];
        float *grad_k = all->grad_k + t * key_ld(call), *grad_v = all->grad_v + t * value_ld(call);
        memcpy(grad_k, deposits.key + slot * call->k.dim, sizeof(float) * call->k.dim);
        memcpy(grad_v, deposits.value + slot * call->v.dim, sizeof(float) * call->v.dim);
        if (sums.weight)
            weigh_gradients(call, chunk, head, t, tokens, deposits.weight[slot], grad_k, grad_v);
        add_token(&sums, call, slot, tokens, t, -1);
    }
    for (int64_t t = 0; t < chunk->num; t++) {
        const int64_t slot = all->slot[t];
        if (sums.count[slot]) continue;
        /* The chunk opened this slot: clear it, and the rounding errors left in its sums. */
        clear_slot(call, &sums, slot);
        clear_slot(call, &deposits, slot);
    }
    update_slots(dictionary, call, &sums, all->slot, chunk->num, all->is_done);
    if (call->merged_slot) part_slots(call, chunk, head, &sums, &deposits, dictionary);
}

/* sums [n] += the gradients of the scores of `num` queries. */
static void add_gradients(const float *grads, int64_t num, int64_t n, float *sums) {
    for (int64_t t = 0; t < num; t++)
        for (int64_t j = 0; j < n; j += VL) store(sums + j, load(sums + j) + load(grads + t * SLOTS + j));
}

/* rest [num] += sums of the gradients of scores, from scores and gradients of probabilities [num, n]. */
static void add_rest(int64_t num, int64_t n, int is_in_pairs, const float *lse, const float *inner, const Share *share,
                     float *rest) {
    for (int64_t t = 0; t < num; t++) {
        float *scores = share->probs + t * SLOTS;
        const Vector shift = bits_of(lse[t], scores, n), own = splat(inner[t]);
        Vector sum = {};
        for (int64_t j = 0; j < n; j += VL) {
            const Vector score = load(scores + j);
            const Vector prob = is_in_pairs ? rough_exponential(score, shift) : exponential(score, shift);
            sum += prob * (load(share->grads + t * SLOTS + j) - own);
        }
        rest[t] += total(sum);
    }
}

/* One tile of queries with one tile of slots or tokens. `start` is the place of the queries among all of the chunk, `first`
   their position in it. `rows` are the tile's n rows, from position `place` on; for slots, which all queries see, place <
   0. With `is_rest`, only adds to `share->rest`. */
static void backward_tile(const Call *call, const Rows *rows, int64_t n, int64_t place, int64_t start, int64_t first,
                          int64_t num, int is_rest, const Gradients *all, Share *share) {
    const int64_t key_width = key_ld(call), value_width = value_ld(call);
    const float *queries = all->queries + start * key_width, *grad_o = all->grad_o + start * value_width;
    float *probs = share->probs, *grads = share->grads, *grad_q = share->grad_q + start * key_width;
    score(call, rows, n, queries, num, probs, SLOTS);
    if (place >= 0) mask_future(probs, SLOTS, num, n, first - place);
    product(num, n, call->v.dim, grad_o, value_width, 1, rows->value_panels, call->v.dim * NR, NR, nullptr, 0, grads, SLOTS);
    if (is_rest) {
        add_rest(num, n, 0, all->lse + start, all->inner + start, share, share->rest + start);
        return;
    }
    for (int64_t t = 0; t < num; t++) {
        const Vector shift = bits_of(all->lse[start + t], probs + t * SLOTS, n), inner = splat(all->inner[start + t]);
        for (int64_t j = t * SLOTS; j < t * SLOTS + n; j += VL) {
            const Vector prob = exponential(load(probs + j), shift);
            store(probs + j, prob);
            store(grads + j, prob * (load(grads + j) - inner));
        }
    }
    if (share->sums) add_gradients(grads, num, n, share->sums);
    product(n, value_width, num, probs, 1, SLOTS, grad_o, NR, value_width, share->grad_v, value_width, share->grad_v,
            value_width);
    product(n, key_width, num, grads, 1, SLOTS, queries, NR, key_width, share->grad_k, key_width, share->grad_k,
            key_width);
    product(num, key_width, n, grads, SLOTS, 1, rows->keys, NR, key_width, grad_q, key_width, grad_q, key_width);
}

#if HAS_PAIRS
/* From scores and gradients of probabilities [num, n]: probabilities and gradients of scores in bfloat16 query pairs, and the
   latter also as words of neighbours, in the first half of their place. */
static void differentiate_pairs(int64_t num, int64_t n, const float *lse, const float *inner, Share *share) {
    for (int64_t t = 0; t < num; t += 2) {
        const int is_pair = t + 1 < num;
        float *scores = share->probs + t * SLOTS, *grads = share->grads + t * SLOTS;
        Vector shifts[2] = {};
        for (int u = 0; u < 1 + is_pair; u++) shifts[u] = bits_of(lse[t + u], scores + u * SLOTS, n);
        for (int64_t j = 0; j < n; j += 2 * VL) {
            Vector prob[2][2] = {}, grad[2][2] = {};
            for (int u = 0; u < 1 + is_pair; u++) {
                for (int v = 0; v < 2; v++) {
                    const int64_t at = u * SLOTS + j + v * VL;
                    prob[u][v] = rough_exponential(load(scores + at), shifts[u]);
                    grad[u][v] = prob[u][v] * (load(grads + at) - inner[t + u]);
                }
                put_neighbours((uint32_t *)grads + u * SLOTS + j / 2, grad[u][0], grad[u][1]);
            }
            for (int v = 0; share->sums && v < 2; v++) {
                float *sums = share->sums + j + v * VL;
                store(sums, load(sums) + (grad[0][v] + grad[1][v]));
            }
            for (int v = 0; v < 2; v++) {
                const Words probs = words_from(prob[0][v], prob[1][v]), both = words_from(grad[0][v], grad[1][v]);
                memcpy(share->prob_pairs + t / 2 * SLOTS + j + v * VL, &probs, sizeof(probs));
                memcpy(share->grad_pairs + t / 2 * SLOTS + j + v * VL, &both, sizeof(both));
            }
        }
    }
}

/* `backward_tile` for bfloat16; `pair` is the place of the first two queries among the pairs of the chunk. */
static void backward_tile_pairs(const Call *call, const Rows *rows, int64_t n, int64_t place, int64_t start,
                                int64_t pair, int64_t first, int64_t num, float scale, int is_rest,
                                const Gradients *all, Share *share) {
    const int64_t key_width = key_ld(call), value_width = value_ld(call), pairs = num_pairs(num);
    const int64_t num_key_words = key_words(call), num_value_words = value_words(call);
    score_pairs(call, rows, n, all->query_words + start * num_key_words, num, scale, share->probs, SLOTS);
    if (place >= 0) mask_future(share->probs, SLOTS, num, n, first - place);
    pairs_product(num, n, num_value_words, all->grad_o_words + start * num_value_words, num_value_words, 1,
                  rows->value_words, num_value_words * NR, NR, nullptr, Finish{}, share->grads, SLOTS);
    if (is_rest) {
        add_rest(num, n, 1, all->lse + start, all->inner + start, share, share->rest + start);
        return;
    }
    differentiate_pairs(num, n, all->lse + start, all->inner + start, share);
    pairs_product(n, value_width, pairs, share->prob_pairs, 1, SLOTS, all->grad_o_pairs + pair * value_width, NR,
                  value_width, share->grad_v, Finish{}, share->grad_v, value_width);
    pairs_product(n, key_width, pairs, share->grad_pairs, 1, SLOTS, all->query_pairs + pair * key_width, NR, key_width,
                  share->grad_k, Finish{}, share->grad_k, key_width);
    float *grad_q = share->grad_q + start * key_width;
    pairs_product(num, key_width, n / 2, (const uint32_t *)share->grads, SLOTS, 1, rows->key_pairs, NR, key_width,
                  grad_q, Finish{}, grad_q, key_width);
}
#endif

/* Gradients from all queries of a chunk and SLOTS slots, or tokens, from `at` on; with `is_rest`, their `share->rest`. */
static void backward_rows(const Call *call, const Rows *rows, int64_t head, int64_t at, int64_t num_rows,
                          int is_tokens, int is_rest, const Chunk *chunk, const Gradients *all, Share *share) {
    const Rows tile = rows_from(rows, call, at);
    const int64_t n = padded(least(SLOTS, num_rows - at), NR);
    memset(share->grad_k, 0, sizeof(float) * n * key_ld(call));
    memset(share->grad_v, 0, sizeof(float) * n * value_ld(call));
    if (share->sums) memset(share->sums, 0, sizeof(float) * n);
    const int64_t place = is_tokens ? at : -1;
    for (int64_t g = 0; g < call->group_size; g++)
        for (int64_t t = is_tokens ? at : 0; t < chunk->num; t += READERS) {
            const int64_t start = g * chunk->num + t, num = least(READERS, chunk->num - t);
#if HAS_PAIRS
            if (tile.key_pairs) {
                const float scale = call->scale[head * call->group_size + g];
                backward_tile_pairs(call, &tile, n, place, start, g * num_pairs(chunk->num) + t / 2, t, num, scale,
                                    is_rest, all, share);
                continue;
            }
#endif
            backward_tile(call, &tile, n, place, start, t, num, is_rest, all, share);
        }
}

/* out [dim] += factor * x [dim]. */
INLINE void deposit(float *out, const float *x, float factor, int64_t dim) {
    for (int64_t j = 0; j < dim; j++) out[j] += factor * x[j];
}

/* Add a tile's gradients to those of the sums of `slots`, or of the chunk's own tokens. */
static void collect_rows(const Call *call, const Rows *slots, const Rows *tokens, const Chunk *chunk, int64_t row,
                         int64_t head, int64_t at, int64_t num_rows, int is_tokens, Gradients *all,
                         const Share *share) {
    const Sums sums = sums_of(call, row, head), deposits = deposits_of(call, row, head);
    for (int64_t i = at; i < least(at + SLOTS, num_rows); i++) {
        const float *grad_k = share->grad_k + (i - at) * key_ld(call);
        const float *grad_v = share->grad_v + (i - at) * value_ld(call);
        if (is_tokens) {
            deposit(all->grad_k + i * key_ld(call), grad_k, 1, call->k.dim);
            deposit(all->grad_v + i * value_ld(call), grad_v, 1, call->v.dim);
            if (call->weighs_chunk && share->sums && tokens->weights[i] >= TOKEN_WEIGHT)
                call->grad_weights[(chunk->index * call->width + i) * call->num_kv_heads + head] +=
                    share->sums[i - at] / tokens->weights[i];
        } else {
            const float mass = mass_of(&sums, i), factor = fminf(1 / mass, FLT_MAX);
            /* No query attends to a slot without mass. */
            if (!(mass > 0)) continue;
            deposit(deposits.key + i * call->k.dim, grad_k, factor, call->k.dim);
            deposit(deposits.value + i * call->v.dim, grad_v, factor, call->v.dim);
            if (!share->sums) continue;
            /* The weight enters the score, and divides the sums. */
            const double of_means = exact_dot(grad_k, slots->keys + i * key_ld(call), call->k.dim) +
                                    exact_dot(grad_v, slots->values + i * value_ld(call), call->v.dim);
            deposits.weight[i] += (float)((share->sums[i - at] - of_means) / mass);
        }
    }
}

/* Correct `inner`, so that the gradients of the scores of each query add up to 0. Their rest is small, but in the gradients of
   gates, which are sums over many queries, it would add up. */
static void take_rest(const Call *call, const Chunk *chunk, const Gradients *all, Share *const *shares, int num_shares) {
    for (int i = 0; i < num_shares; i++) deposit(all->inner, shares[i]->rest, 1, call->group_size * chunk->num);
}

/* Write the gradients of the chunk's tokens, and add its part of the scale's, once all tiles are done. */
static void write_gradients(const Call *call, const Chunk *chunk, int64_t row, int64_t head, const Gradients *all,
                            Share *const *shares, int num_shares) {
    const int64_t dim = call->k.dim, ld = key_ld(call), num_heads = call->num_kv_heads * call->group_size;
    for (int64_t g = 0; g < call->group_size; g++) {
        const int64_t query_head = head * call->group_size + g;
        double sum = 0;
        for (int64_t t = 0; t < chunk->num; t++) {
            float *grad_q = shares[0]->grad_q + (g * chunk->num + t) * ld;
            for (int i = 1; i < num_shares; i++) deposit(grad_q, shares[i]->grad_q + (g * chunk->num + t) * ld, 1, dim);
            float query[ld];
            read_tokens(call, &call->q, chunk->index, query_head, t, 1, 1, query, ld);
            sum += exact_dot(grad_q, query, dim);
            write_token(call, &call->grad_q, chunk->index, t, query_head, call->scale[query_head], grad_q);
        }
        call->grad_scale[row * num_heads + query_head] += sum;
    }
    for (int64_t t = 0; t < chunk->num; t++) {
        write_token(call, &call->grad_k, chunk->index, t, head, 1, all->grad_k + t * ld);
        write_token(call, &call->grad_v, chunk->index, t, head, 1, all->grad_v + t * value_ld(call));
    }
}
