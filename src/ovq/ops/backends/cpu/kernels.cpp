/* OVQ attention on a CPU: all chunks of all streams in one call, forward and backward; and the entry points of the kernels.

   A team of threads processes each stream (a key/value head of a row). With enough streams, a team is one thread, so that the
   dictionary stays in its core's cache. Compiled by compiler.py. */

#include "backward.h"
#include "chunk.h"
#include "convolution.h"
#include "decode.h"
#include "linear.h"
#include "memory.h"
#include "nearest.h"
#include "roof.h"
#include "step.h"
#include "tokens.h"
#include "window.h"

/* Teams of threads, which share the streams. */
struct Teams {
    int num_teams, size;
};

static Teams make_teams(const Call *call, int num_threads) {
    const int64_t streams = call->num_rows * call->num_kv_heads;
    /* Many streams even out. Few are shared evenly: the number of teams is the largest that divides both streams and
       threads. */
    const int64_t teams = streams < 4 * num_threads ? std::gcd(streams, (int64_t)num_threads) : num_threads;
    return {(int)teams, (int)(num_threads / teams)};
}

/* The memory of a team, and of each of its threads. */
struct Shared {
    Dictionary dictionary;
    Rows tokens;
    Learner learner;
    Nearest layout, *nearest; /* A copy per thread, and the one that all share; NULL with other merge rules. */
    Gradients gradients;
    Barrier *barrier;
};

struct Own {
    Reader reader;
    Share share;
};

static Shared take_shared(Arena *arena, const Call *call, int is_backward) {
    Shared shared = {};
    shared.dictionary = take_dictionary(arena, call, is_backward);
    shared.tokens = take_rows(arena, call, call->width, is_backward, !is_backward && call->merges_pairs);
    if (call->token_weights) shared.tokens.weights = TAKE(arena, float, call->width);
    shared.barrier = TAKE(arena, Barrier, 1);
    if (is_backward) shared.gradients = take_gradients(arena, call);
    else shared.learner = take_learner(arena, call);
    if (!is_backward && call->merges_pairs) {
        shared.nearest = TAKE(arena, Nearest, 1);
        shared.layout = take_nearest(arena, call);
    }
    return shared;
}

static Own take_own(Arena *arena, const Call *call, int is_backward) {
    Own own = {};
    if (is_backward) own.share = take_share(arena, call);
    else own.reader = take_reader(arena, call);
    return own;
}

static void forward_stream(const Call *call, int64_t row, int64_t head, const Team *team, Shared *shared, Own *own) {
    Dictionary *dictionary = &shared->dictionary;
    const Sums sums = sums_of(call, row, head);
    if (team->rank == 0) load_dictionary(dictionary, call, &sums);
    Nearest *nearest = shared->nearest;
    if (team->rank == 0 && nearest) *nearest = shared->layout;
    const Joining all = {call, dictionary, &shared->tokens, &sums, nearest};
    for (int64_t i = 0; i < num_chunks(call, row); i++) {
        const Chunk chunk = chunk_of(call, row, i);
        const float *fading = call->fading ? call->fading + chunk.index * call->num_kv_heads + head : nullptr;
        run_chunk(all, dictionary, &shared->tokens, &chunk, head, call->num_merged[row] + i * call->chunk_size, fading,
                  team, &shared->learner, &own->reader);
    }
}

static void backward_stream(const Call *call, int64_t row, int64_t head, const Team *team, Shared *shared, Own *own,
                            Share *const *shares) {
    Dictionary *dictionary = &shared->dictionary;
    Gradients *all = &shared->gradients;
    const Sums sums = sums_of(call, row, head);
    if (team->rank == 0) load_dictionary(dictionary, call, &sums);
    for (int64_t i = num_chunks(call, row) - 1; i >= 0; i--) {
        const Chunk chunk = chunk_of(call, row, i);
        if (team->rank == 0) {
            load_chunk(&shared->tokens, call, chunk.index, head, chunk.num);
            if (chunk.is_complete) {
                rewind_chunk(call, &chunk, row, head, &shared->tokens, dictionary, all);
            } else {
                memset(all->grad_k, 0, sizeof(float) * chunk.num * key_ld(call));
                memset(all->grad_v, 0, sizeof(float) * chunk.num * value_ld(call));
            }
            for (int64_t g = 0; g < call->group_size; g++) load_queries(call, &chunk, head, g, all);
        }
        memset(own->share.grad_q, 0, sizeof(float) * call->group_size * chunk.num * key_ld(call));
        if (own->share.rest) memset(own->share.rest, 0, sizeof(float) * call->group_size * chunk.num);
        sync(team);
        const int64_t slot_tiles = (chunk.before + SLOTS - 1) / SLOTS, token_tiles = (chunk.num + SLOTS - 1) / SLOTS;
        for (int is_rest = own->share.rest != nullptr; is_rest >= 0; is_rest--) {
            for (int64_t tile = team->rank; tile < slot_tiles + token_tiles; tile += team->size) {
                const int is_tokens = tile >= slot_tiles;
                const int64_t at = (is_tokens ? tile - slot_tiles : tile) * SLOTS;
                const int64_t num = is_tokens ? chunk.num : chunk.before;
                backward_rows(call, is_tokens ? &shared->tokens : &dictionary->rows, head, at, num, is_tokens, is_rest,
                              &chunk, all, &own->share);
                if (is_rest) continue;
                collect_rows(call, &dictionary->rows, &shared->tokens, &chunk, row, head, at, num, is_tokens, all,
                             &own->share);
            }
            sync(team);
            if (!is_rest) continue;
            if (team->rank == 0) take_rest(call, &chunk, all, shares, team->size);
            sync(team);
        }
        if (team->rank == 0) write_gradients(call, &chunk, row, head, all, shares, team->size);
        sync(team);
    }
}

/* Everything that a team of `size` takes from the arena. */
static void take_team(Arena *arena, const Call *call, int size, int is_backward, Shared *shared, Own *own) {
    *shared = take_shared(arena, call, is_backward);
    for (int i = 0; i < size; i++) own[i] = take_own(arena, call, is_backward);
}

static int run(const Call *call, int is_backward) {
    int is_out_of_memory = 0;
    char *memory = nullptr;
    size_t bytes = 0;
    parallel(call->num_threads, [&](Worker worker) {
        const Teams teams = make_teams(call, worker.num);
        const int rank = worker.rank / teams.num_teams;
        const int64_t team = worker.rank % teams.num_teams, streams = call->num_rows * call->num_kv_heads;
        Shared shared;
        Own own[teams.size];
        if (worker.rank == 0) {
            Arena arena = {};
            take_team(&arena, call, teams.size, is_backward, &shared, own);
            bytes = arena.used;
            memory = (char *)aligned_alloc(128, bytes * teams.num_teams);
            is_out_of_memory = !memory;
            if (memory) memset(memory, 0, bytes * teams.num_teams);
        }
        worker.wait();
        /* Threads left over by the teams have nothing to do. */
        if (memory && rank < teams.size) {
            Arena arena = {memory + bytes * team, 0};
            take_team(&arena, call, teams.size, is_backward, &shared, own);
            Share *shares[teams.size];
            for (int i = 0; i < teams.size; i++) shares[i] = &own[i].share;
            const Team members = {rank, teams.size, shared.barrier};
            for (int64_t s = team; s < streams; s += teams.num_teams) {
                const int64_t row = s / call->num_kv_heads, head = s % call->num_kv_heads;
                if (is_backward) backward_stream(call, row, head, &members, &shared, &own[rank], shares);
                else forward_stream(call, row, head, &members, &shared, &own[rank]);
                sync(&members);
            }
        }
    });
    free(memory);
    return is_out_of_memory;
}

/* Returns 0, or 1 if out of memory. */
extern "C" int ovq_forward(const Call *call) { return run(call, 0); }
extern "C" int ovq_backward(const Call *call) { return run(call, 1); }
extern "C" void ovq_convolution_forward(const Convolution *call) { convolve_all(call, 0); }
extern "C" void ovq_convolution_backward(const Convolution *call) { convolve_all(call, 1); }
extern "C" void ovq_decode(const Decode *call) { decode_all(call); }
