/* One chunk of a stream: its queries attend, if there are any, and a complete chunk is merged. A team of threads shares the
   work, or one thread does it alone. */
#pragma once

#include "learn.h"
#include "nearest.h"
#include "read.h"

INLINE int64_t num_tiles(int64_t num) { return (num + QUERIES - 1) / QUERIES; }

/* Searches of a chunk's items for their nearest; the team shares the tiles. */
static void search_together(const Joining &all, const Team *team, const Reader *reader) {
    const int64_t num = all.nearest->num_searching;
    for (int64_t tile = team->rank; tile < num_tiles(num); tile += team->size)
        search_tile(all, tile * QUERIES, least(QUERIES, num - tile * QUERIES), reader);
}

/* Join items along their edges, part by part. Items of a finite chunk have searched before; those of others search here. */
static void join_together(const Joining &all, Dictionary *dictionary, Rows *tokens, const Chunk *chunk, int64_t head,
                          int64_t due, int64_t num_merged, const Team *team, Learner *learner, const Reader *reader) {
    if (team->rank == 0 && !*tokens->is_finite) {
        const Team alone = {0, 1, nullptr};
        reload(all, tokens, chunk, head);
        if (due) prepare_nearest(all, due, num_merged);
        if (due) search_together(all, &alone, reader);
    }
    for (int64_t part = 1, is_over = !due; !is_over; part++) {
        if (team->rank == 0) take_part(all, part);
        sync(team);
        /* Rank 0 changes `num_due` only after the sync below, when all have seen it. */
        is_over = !all.nearest->num_due;
        if (!is_over) search_together(all, team, reader);
        sync(team);
    }
    if (team->rank == 0) learn_by_edges(all, dictionary, chunk, head, due > 0, learner);
}

/* Attention of a chunk's queries, if the call has any, and the merge of the chunk if it is complete. `all` refers to the same
   dictionary and tokens; its `nearest` is NULL unless pairs are merged. The row has merged `num_merged` tokens before.
   `fading` is the factor on all slots if the chunk is complete, or NULL. */
static void run_chunk(const Joining &all, Dictionary *dictionary, Rows *tokens, const Chunk *chunk, int64_t head,
                      int64_t num_merged, const float *fading, const Team *team, Learner *learner, Reader *reader) {
    const Call *call = all.call;
    Nearest *nearest = all.nearest;
    const int is_first = team->rank == 0;
    dictionary->num = chunk->before;
    if (!chunk->is_complete) fading = nullptr;
    if (is_first && fading) {
        fade_slots(dictionary, call, all.sums, *fading);
        if (nearest) nearest->has_squares = 0;
    }
    const int64_t due = nearest && chunk->is_complete ? chunk->before + chunk->num - chunk->after : 0;
    if (is_first) {
        load_chunk(tokens, call, chunk->index, head, chunk->num);
        if (due && *tokens->is_finite) prepare_nearest(all, due, num_merged);
    }
    sync(team);
    const int64_t blocks = num_tiles(chunk->num), reads = blocks * call->group_size;
    const int64_t routes = !nearest && chunk->is_complete && chunk->before ? blocks : 0;
    const int64_t searches = due && *tokens->is_finite ? nearest->num_searching : 0;
    const Lengths lengths = routes ? lengths_of(dictionary) : Lengths{};
    for (int64_t tile = team->rank; tile < reads + routes + num_tiles(searches); tile += team->size) {
        const int64_t first = tile % blocks * QUERIES, num = least(QUERIES, chunk->num - first);
        const int64_t search = (tile - reads) * QUERIES;
        if (tile < reads)
            read_tile(call, dictionary, tokens, chunk, head * call->group_size + tile / blocks, first, num, reader);
        else if (nearest)
            search_tile(all, search, least(QUERIES, searches - search), reader);
        else
            route_tile(call, dictionary, tokens, first, num, chunk->after > chunk->before, &lengths, learner, reader);
    }
    sync(team);
    if (!chunk->is_complete) return;
    if (nearest)
        join_together(all, dictionary, tokens, chunk, head, due, num_merged, team, learner, reader);
    else if (is_first)
        learn(call, dictionary, tokens, all.sums, chunk, head, learner, reader);
    for (int64_t slot = 0; is_first && fading && slot < dictionary->num; slot++)
        bound_slot(dictionary, call, all.sums, slot);
}
