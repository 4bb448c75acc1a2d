/* The read: one softmax over [dictionary | chunk so far] for a tile of queries. */
#pragma once

#include "dictionary.h"

/* Slots per product with values, which stay in the L1 cache meanwhile. */
#define VALUES 128

struct Reader {
    float *queries;  /* [QUERIES, key_ld] */
    uint32_t *words; /* [QUERIES, key_words]: queries, or keys to route, rounded. */
    float *scores;   /* [QUERIES, slots and tokens, and joined items where pairs are merged] */
    float *out;      /* [QUERIES, value_ld] */
    /* Scratch of routing and searches. It grows with the number of slots, which the stack of a thread does not. */
    int32_t *near;   /* [columns + 1]: candidates. */
    double *exact;   /* [columns + 1]: their products or distances in float64. */
    Vector *blocks;  /* [QUERIES, num_blocks of the columns], where pairs are merged: bounds of scores. */
};

/* Columns of a block of products of items. */
#define COLUMN_BLOCK 128

/* Blocks of `num` columns, in three parts that each may end with an incomplete one. */
INLINE int64_t num_blocks(int64_t num) { return num / COLUMN_BLOCK + 3; }

static Reader take_reader(Arena *arena, const Call *call) {
    Reader reader;
    reader.queries = TAKE(arena, float, QUERIES * key_ld(call));
    reader.words = HAS_PAIRS ? TAKE(arena, uint32_t, QUERIES * key_words(call)) : nullptr;
    const int64_t joined = call->merges_pairs ? padded(call->width, NR) + VL : 0;
    const int64_t columns = padded(call->capacity, NR) + padded(call->width, NR) + joined;
    reader.scores = TAKE(arena, float, QUERIES * columns);
    reader.out = TAKE(arena, float, QUERIES * value_ld(call));
    take_each(arena, columns + 1, &reader.near, &reader.exact);
    reader.blocks = TAKE(arena, Vector, call->merges_pairs ? QUERIES * num_blocks(columns) : 0);
    return reader;
}

/* scores [num, n] of queries [num, key_ld] with the first n rows. */
INLINE void score(const Call *call, const Rows *rows, int64_t n, const float *queries, int64_t num, float *scores,
                  int64_t ld) {
    const int64_t dim = call->k.dim;
    product(num, n, dim, queries, key_ld(call), 1, rows->key_panels, dim * NR, NR, rows->bias, 0, scores, ld);
}

/* Causal mask: -inf for tokens after the query's own. `first` is the position of the first query. */
INLINE void mask_future(float *scores, int64_t ld, int64_t num, int64_t n, int64_t first) {
    for (int64_t t = 0; t < num; t++)
        for (int64_t j = first + t + 1; j < n; j++) scores[t * ld + j] = -INFINITY;
}

/* The largest of n scores. */
INLINE float highest_of(const float *scores, int64_t n) {
    Vector high = splat(-INFINITY), more = high;
    for (int64_t j = 0; j < n; j += 2 * VL) {
        high = higher_of(load(scores + j), high);
        more = higher_of(load(scores + j + VL), more);
    }
    return highest(higher_of(high, more));
}

/* Replaces n scores by exponentials relative to their largest, `best`; returns their sum. */
static float exponentials(float *scores, int64_t n, float *best) {
    *best = highest_of(scores, n);
    const Vector shift = bits_of(*best, scores, n);
    Vector sum = {}, more = {};
    for (int64_t j = 0; j < n; j += 2 * VL) {
        const Vector x = exponential(load(scores + j), shift), y = exponential(load(scores + j + VL), shift);
        store(scores + j, x);
        store(scores + j + VL, y);
        sum += x;
        more += y;
    }
    return total(sum + more);
}

/* out [num, value_ld] += probabilities [num, n] values [n, value_ld]. */
static void weigh(const Call *call, const Rows *rows, int64_t n, const float *probs, int64_t ld, int64_t num,
                  float *out) {
    const int64_t width = value_ld(call);
    for (int64_t j = 0; j < n; j += VALUES)
        product(num, width, least(VALUES, n - j), probs + j, ld, 1, rows->values + j * width, NR, width, out, width,
                out, width);
}

#if HAS_PAIRS
/* `score` of queries in bfloat16 words; their products are multiplied by `scale`. */
INLINE void score_pairs(const Call *call, const Rows *rows, int64_t n, const uint32_t *queries, int64_t num,
                        float scale, float *scores, int64_t ld) {
    pairs_product(num, n, key_words(call), queries, key_words(call), 1, rows->words, row_words(call) * NR, NR,
                  nullptr, Finish{rows->bias, scale}, scores, ld);
}

/* `exponentials`, rounded to bfloat16 words of neighbours in the first half of their place. */
static float exponential_pairs(float *scores, int64_t n, float *best) {
    *best = highest_of(scores, n);
    const Vector shift = bits_of(*best, scores, n);
    uint32_t *words = (uint32_t *)scores;
    Vector sum = {}, more = {};
    for (int64_t j = 0; j < n; j += 2 * VL, words += VL) {
        const Vector x = rough_exponential(load(scores + j), shift);
        const Vector y = rough_exponential(load(scores + j + VL), shift);
        put_neighbours(words, x, y);
        sum += x;
        more += y;
    }
    return total(sum + more);
}

/* `weigh` with probabilities in bfloat16 words. AMX tiles hold all queries, and so read values once. */
static void weigh_pairs(const Call *call, const Rows *rows, int64_t n, const uint32_t *probs, int64_t ld, int64_t num,
                        float *out) {
    const int64_t width = value_ld(call), most = HAS_TILES ? n / 2 : VALUES;
    for (int64_t j = 0; j < n / 2; j += most)
        pairs_product(num, width, least(most, n / 2 - j), probs + j, ld, 1, rows->value_pairs + j * width, NR,
                      width, out, Finish{}, out, width);
}
#endif

/* Adds the non-finite values, which `load_chunk` has set to 0, to each query that sees them. */
static void add_non_finite(const Call *call, const Chunk *chunk, int64_t head, int64_t first, int64_t num, float *out) {
    const int64_t width = value_ld(call);
    float value[width], seen[width];
    memset(seen, 0, sizeof(seen));
    for (int64_t t = 0; t < first + num; t++) {
        read_tokens(call, &call->v, chunk->index, head, t, 1, 1, value, width);
        for (int64_t j = 0; j < width; j++)
            if (!std::isfinite(value[j])) seen[j] += value[j];
        for (int64_t j = 0; t >= first && j < width; j++) out[(t - first) * width + j] += seen[j];
    }
}

/* Prefetch, for query t of a tile, a query of the next tile, and a key and a value of the next chunk. Memory answers slowly,
   so only a few are requested at a time; beyond the end this does nothing. */
INLINE void fetch_next(const Call *call, const Chunk *chunk, int64_t query_head, int64_t first, int64_t t) {
    const int64_t next = first + QUERIES + t, head = query_head / call->group_size;
    const int is_over = next >= call->width;
    fetch_token(call, &call->q, chunk->index + is_over, is_over ? t : next, query_head);
    if (query_head % call->group_size) return;
    fetch_token(call, &call->k, chunk->index + 1, first + t, head);
    fetch_token(call, &call->v, chunk->index + 1, first + t, head);
}

/* The outputs of the queries first..first+num-1 of a chunk, for one query head. */
static void read_tile(const Call *call, const Dictionary *dictionary, const Rows *tokens, const Chunk *chunk,
                      int64_t query_head, int64_t first, int64_t num, Reader *reader) {
    const int64_t slots = padded(dictionary->num, NR), own = padded(first + num, NR), n = slots + own;
    const int64_t width = value_ld(call);
    const float scale = call->scale[query_head];
    float *scores = reader->scores, sums[QUERIES];
    const int is_in_pairs = HAS_PAIRS && tokens->value_pairs;
    if (is_in_pairs) {
#if HAS_PAIRS
        for (int64_t t = 0; t < num; t++)
            arrange_row((const uint16_t *)call->q.data + offset(&call->q, chunk->index, first + t, query_head),
                        call->k.dim, reader->words + t * key_words(call));
        score_pairs(call, &dictionary->rows, slots, reader->words, num, scale, scores, n);
        score_pairs(call, tokens, own, reader->words, num, scale, scores + slots, n);
#endif
    } else {
        read_tokens(call, &call->q, chunk->index, query_head, first, num, scale, reader->queries, key_ld(call));
        score(call, &dictionary->rows, slots, reader->queries, num, scores, n);
        score(call, tokens, own, reader->queries, num, scores + slots, n);
    }
    mask_future(scores + slots, n, num, own, first);
    for (int64_t t = 0; t < num; t++) {
        float best;
        fetch_next(call, chunk, query_head, first, t);
#if HAS_PAIRS
        if (is_in_pairs) sums[t] = exponential_pairs(scores + t * n, n, &best);
        else
#endif
            sums[t] = exponentials(scores + t * n, n, &best);
        const int64_t place = chunk->index * call->width + first + t;
        call->lse[place * call->num_kv_heads * call->group_size + query_head] = best + logf(sums[t]);
    }
    memset(reader->out, 0, sizeof(float) * num * width);
    if (is_in_pairs) {
#if HAS_PAIRS
        const uint32_t *probs = (const uint32_t *)scores;
        weigh_pairs(call, &dictionary->rows, slots, probs, n, num, reader->out);
        weigh_pairs(call, tokens, own, probs + slots / 2, n, num, reader->out);
#endif
    } else {
        weigh(call, &dictionary->rows, slots, scores, n, num, reader->out);
        weigh(call, tokens, own, scores + slots, n, num, reader->out);
    }
    if (!*tokens->is_finite) add_non_finite(call, chunk, query_head / call->group_size, first, num, reader->out);
    for (int64_t t = 0; t < num; t++)
        write_token(call, &call->o, chunk->index, first + t, query_head, 1 / sums[t], reader->out + t * width);
}
