/* The read: one softmax over [dictionary | chunk so far] for a tile of queries. */
#pragma once

#include "dictionary.h"

/* Slots whose values a product goes through while they lie in the first-level cache. */
#define VALUES 128

struct Reader {
    float *queries;  /* [QUERIES, key_ld] */
    float *scores;   /* [QUERIES, slots and tokens] */
    float *out;      /* [QUERIES, value_ld] */
    int32_t *near;   /* [M]: scratch of routing. */
};

static Reader take_reader(Arena *arena, const Call *call) {
    Reader reader;
    reader.queries = TAKE(arena, float, QUERIES * key_ld(call));
    reader.scores = TAKE(arena, float, QUERIES * (padded(call->capacity, NR) + padded(call->width, NR)));
    reader.out = TAKE(arena, float, QUERIES * value_ld(call));
    reader.near = TAKE(arena, int32_t, padded(call->capacity, NR));
    return reader;
}

/* scores [num, n] of queries [num, key_ld] with the first n rows. */
INLINE void score(const Call *call, const Rows *rows, int64_t n, const float *queries, int64_t num, float *scores,
                  int64_t ld) {
    const int64_t dim = call->k.dim;
    product(num, n, dim, queries, key_ld(call), 1, rows->key_panels, dim * NR, NR, rows->bias, 0, scores, ld);
}

/* Tokens after the query's own, `first` being the position of the first query, take no part. */
INLINE void mask_future(float *scores, int64_t ld, int64_t num, int64_t n, int64_t first) {
    for (int64_t t = 0; t < num; t++)
        for (int64_t j = first + t + 1; j < n; j++) scores[t * ld + j] = -INFINITY;
}

/* Turns n scores into exponentials relative to their largest, `best`; their sum. */
static float exponentials(float *scores, int64_t n, float *best) {
    Vector high = splat(-INFINITY), sum = {};
    for (int64_t j = 0; j < n; j += VL) {
        const Vector x = load(scores + j);
        high = x > high ? x : high;
    }
    *best = highest(high);
    const Vector shift = splat(*best);
    for (int64_t j = 0; j < n; j += VL) {
        const Vector x = exponential(load(scores + j) - shift);
        store(scores + j, x);
        sum += x;
    }
    return total(sum);
}

/* out [num, value_ld] += probabilities [num, n] values [n, value_ld]. */
static void weigh(const Call *call, const Rows *rows, int64_t n, const float *probs, int64_t ld, int64_t num,
                  float *out) {
    const int64_t width = value_ld(call);
    for (int64_t j = 0; j < n; j += VALUES)
        product(num, width, least(VALUES, n - j), probs + j, ld, 1, rows->values + j * width, NR, width, out, width,
                out, width);
}

/* Values that are not finite are not among those of the tokens (`load_chunk`): each query that sees one gets it here. */
static void add_spoilt(const Call *call, const Chunk *chunk, int64_t head, int64_t first, int64_t num, float *out) {
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

/* The outputs of the queries first..first+num-1 of a chunk, for one query head. */
static void read_tile(const Call *call, const Dictionary *dictionary, const Rows *tokens, const Chunk *chunk,
                      int64_t query_head, int64_t first, int64_t num, Reader *reader) {
    const int64_t slots = padded(dictionary->num, NR), own = padded(first + num, NR), n = slots + own;
    const int64_t width = value_ld(call);
    float *scores = reader->scores;
    read_tokens(call, &call->q, chunk->index, query_head, first, num, call->scale[query_head], reader->queries,
                key_ld(call));
    score(call, &dictionary->rows, slots, reader->queries, num, scores, n);
    score(call, tokens, own, reader->queries, num, scores + slots, n);
    mask_future(scores + slots, n, num, own, first);
    float sums[QUERIES];
    for (int64_t t = 0; t < num; t++) {
        float best;
        sums[t] = exponentials(scores + t * n, n, &best);
        const int64_t place = chunk->index * call->width + first + t;
        call->lse[place * call->num_kv_heads * call->group_size + query_head] = best + logf(sums[t]);
    }
    memset(reader->out, 0, sizeof(float) * num * width);
    weigh(call, &dictionary->rows, slots, scores, n, num, reader->out);
    weigh(call, tokens, own, scores + slots, n, num, reader->out);
    if (!*tokens->is_finite) add_spoilt(call, chunk, query_head / call->group_size, first, num, reader->out);
    for (int64_t t = 0; t < num; t++)
        write_token(call, &call->o, chunk->index, first + t, query_head, 1 / sums[t], reader->out + t * width);
}
