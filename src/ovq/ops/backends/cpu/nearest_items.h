/* merge="nearest": the items of a chunk, and their data before they search.

   Items are columns: [slots | tokens | joined], each part padded to whole panels. Items that join become a new column, their
   mean, and their own columns are cleared.

   A slot that has searched before need not be compared with slots that have not changed since. The distance to each of these,
   except its partner (the slot that it found), has a known lower bound. If the nearest of all others is closer, it is the
   nearest of all. */
#pragma once

#include "clusters.h"
#include "points.h"

/* Stands in for a non-finite squared distance, relative to the largest squared length (`NO_DISTANCE` of options.py). */
#define NO_DISTANCE 5.0
/* Columns that items are compared with: `rows` begin at column `first`, a multiple of NR. */
struct Columns {
    const Rows *rows;
    int64_t first, num;
    const float *start, *length, *error; /* As in `Nearest`, by column. */
};

struct Nearest {
    int64_t num_columns, first_token, first_joined, num_joined;
    int64_t num_due;      /* Merges still to be made. */
    int has_squares;      /* Whether `key_square` and `value_square` are up to date. */
    int is_wide;          /* Whether float32 products are useless for this chunk: extreme lengths or non-finite values. */
    int is_rough;         /* Whether products are approximate. */
    double value_factor;  /* f^2: the factor of squared distances of values. */
    double size;          /* The largest squared length of an item with mass, or 1. */
    float longest;        /* The largest length. */
    int64_t first, second; /* The two lowest items that others may join at any distance; -1 if missing. */
    double *key_square, *value_square; /* [M]: squared lengths of the means of slots. */
    /* [columns] */
    double *mass, *square; /* Count or weight; squared length. */
    float *start, *length; /* -|x|^2 / 2, the search offset, or -inf where no other may join; |x|, or 0 there. */
    float *error;         /* Length of the rounding error of an int8 item. */
    int32_t *index, *into, *home; /* As in `Clusters`. */
    int32_t *target;      /* Target of an item's edge, or -1 if it has none. */
    double *priority;     /* Priority of the edge, lowest taken first; inf without an edge. */
    int32_t *edges;       /* Items that may have an edge, in order. */
    int64_t num_edges;
    int32_t *root;        /* Target of a taken edge, else the item itself. */
    int32_t *mark;        /* Scratch. */
    int32_t *order;       /* The remaining columns, by their lowest items, where `needs_order`. */
    int64_t num_left;
    int needs_order;      /* Whether items without mass exist, or the chunk `is_wide`. */
    int32_t *taken;       /* Items whose edges are taken, in order. */
    int64_t num_taken;
    double *ranked;       /* Scratch. */
    int32_t *searching;   /* Items that are to search for their nearest. */
    int64_t num_searching;
    int32_t *num_near;    /* [tiles]: candidates of each tile's first item by approximate products. */
    double *mean;         /* [C, K + V]: means of joined columns. */
    Rows joined;          /* [C]: the same in float32, for products. */
    int32_t *moved;       /* [M] */
    /* Earlier searches of slots bound the distances to slots unchanged since. `now` counts chunks that merge. */
    int32_t now, *changed, *searched; /* [M]: when a slot last changed, and when it last searched since then, or -1. */
    int32_t *partner;     /* [M]: the slot that it found then, or -1. */
    double *beyond;       /* [M]: lower bound of the squared distances to all others ... */
    double *factor;       /* [M]: ... with this `value_factor`. */
    int64_t num_again;    /* The first so many of `searching` are compared with changed slots only, not all slots. */
    int64_t num_recent;   /* Number of changed slots, padded. These replace the slots: */
    int32_t *recent, *recent_place; /* [M]: the changed slots; and the place of each slot among them, or -1. */
    Rows recent_rows;     /* [M]: int8 rows only. */
    float *recent_start, *recent_length, *recent_error; /* [M] */
};

static Nearest take_nearest(Arena *arena, const Call *call) {
    Nearest nearest = {};
    const int64_t size = padded(call->width, NR), slots = padded(call->capacity, NR);
    const int64_t n = nearest.num_columns = slots + 2 * size + VL;
    nearest.is_rough = HAS_ROUGH;
    take_each(arena, slots, &nearest.key_square, &nearest.value_square);
    take_each(arena, n, &nearest.mass, &nearest.square, &nearest.start, &nearest.length, &nearest.error);
    take_each(arena, n, &nearest.index, &nearest.into, &nearest.home, &nearest.target, &nearest.priority);
    take_each(arena, n, &nearest.edges, &nearest.mark, &nearest.root, &nearest.order, &nearest.taken);
    take_each(arena, n, &nearest.ranked, &nearest.searching);
    nearest.num_near = TAKE(arena, int32_t, n / QUERIES + 1);
    nearest.mean = TAKE(arena, double, size * (call->k.dim + call->v.dim));
    nearest.joined = take_rows(arena, call, size, 0, 1);
    nearest.joined.reads_keys = 0;
    take_each(arena, slots, &nearest.moved, &nearest.changed, &nearest.searched, &nearest.partner);
    take_each(arena, slots, &nearest.beyond, &nearest.factor, &nearest.recent, &nearest.recent_place);
    take_each(arena, slots, &nearest.recent_start, &nearest.recent_length, &nearest.recent_error);
    nearest.recent_rows.bytes = TAKE(arena, uint32_t, slots * item_bytes(call));
    nearest.recent_rows.of_keys = take_scales(arena, slots);
    nearest.recent_rows.of_values = take_scales(arena, slots);
    return nearest;
}

/* A chunk whose items are to be joined. */
struct Joining {
    const Call *call;
    const Dictionary *dictionary;
    const Rows *tokens;
    const Sums *sums;
    Nearest *nearest;

    int is_joined(int64_t i) const { return i >= nearest->first_joined; }
    int64_t place(int64_t i) const {
        return i - (is_joined(i) ? nearest->first_joined : i >= nearest->first_token ? nearest->first_token : 0);
    }
    const Rows *rows(int64_t i) const {
        return is_joined(i) ? &nearest->joined : i >= nearest->first_token ? tokens : &dictionary->rows;
    }
    const float *key(int64_t i) const { return rows(i)->keys + place(i) * key_ld(call); }
    const float *value(int64_t i) const { return rows(i)->values + place(i) * value_ld(call); }
    const double *mean(int64_t i) const { return nearest->mean + place(i) * (call->k.dim + call->v.dim); }
};

/* Squared distance of two items, in float64 from differences; inf if not finite. */
static double distance_of(const Joining &all, int64_t a, int64_t b) {
    const int64_t k = all.call->k.dim, v = all.call->v.dim;
    const double factor = all.nearest->value_factor;
    const auto of = [=](auto *key, auto *value, auto *other_key, auto *other_value) {
        return squared_distance(key, other_key, k) + factor * squared_distance(value, other_value, v);
    };
    if (all.is_joined(a)) {
        const int64_t c = a;
        a = b;
        b = c;
    }
    double square;
    if (all.is_joined(a)) square = of(all.mean(a), all.mean(a) + k, all.mean(b), all.mean(b) + k);
    else if (all.is_joined(b)) square = of(all.key(a), all.value(a), all.mean(b), all.mean(b) + k);
    else square = of(all.key(a), all.value(a), all.key(b), all.value(b));
    return std::isfinite(square) ? square : INFINITY;
}

INLINE int has_mass(const Nearest *nearest, int64_t i) { return nearest->mass[i] > 0; }

/* Whether searches may find an item: it has mass and a finite length. */
INLINE int is_point(const Nearest *nearest, int64_t i) {
    return has_mass(nearest, i) && std::isfinite(nearest->square[i]);
}

/* Derived per-column values: search offset, length and quantization error. */
INLINE void set_column(const Joining &all, int64_t i) {
    Nearest *nearest = all.nearest;
    nearest->start[i] = is_point(nearest, i) ? (float)(nearest->square[i] / -2) : -INFINITY;
    nearest->length[i] = is_point(nearest, i) ? sqrtf((float)nearest->square[i]) * (1 + FLT_EPSILON) : 0;
    nearest->error[i] = 0;
    if (HAS_BYTES) {
        const Rows *rows = all.rows(i);
        const float of_key = rows->of_keys.error[all.place(i)], of_value = rows->of_values.error[all.place(i)];
        nearest->error[i] = sqrtf(of_key * of_key + (float)nearest->value_factor * of_value * of_value);
    }
    nearest->into[i] = nearest->root[i] = (int32_t)i;
    nearest->target[i] = -1;
}

/* Clear a column that is unused, or was joined into column `into`. */
INLINE void clear_column(Nearest *nearest, int64_t i, int64_t into) {
    nearest->start[i] = -INFINITY;
    nearest->length[i] = nearest->error[i] = 0;
    nearest->into[i] = (int32_t)into;
    nearest->target[i] = -1;
}

/* List the remaining columns, and the first two that others may join at any distance: with mass, unless no item has any. */
static void set_order(const Joining &all) {
    Nearest *nearest = all.nearest;
    const int64_t num_items = nearest->first_token + all.call->chunk_size;
    /* The column that holds each lowest item. */
    for (int64_t i = 0; i < num_items; i++) nearest->mark[i] = -1;
    for (int64_t i = 0; i < nearest->first_joined + nearest->num_joined; i++)
        if (nearest->into[i] == i) nearest->mark[nearest->index[i]] = (int32_t)i;
    int64_t num = 0, of_mass[2] = {-1, -1};
    for (int64_t i = 0; i < num_items; i++) {
        const int32_t column = nearest->mark[i];
        if (column < 0) continue;
        nearest->order[num++] = column;
        if (!has_mass(nearest, column) || of_mass[1] >= 0) continue;
        of_mass[of_mass[0] >= 0] = column;
    }
    nearest->num_left = num;
    const int is_any = of_mass[0] >= 0;
    nearest->first = is_any ? of_mass[0] : nearest->order[0];
    nearest->second = is_any ? of_mass[1] : num > 1 ? nearest->order[1] : -1;
}

/* x^power, cached: most masses are small integers, so few different powers are asked for. */
static double power_of(double x, double power) {
    static thread_local struct {
        double power, known[256], result[256];
    } powers;
    if (!(x > 0)) return pow(x, power);
    if (powers.power != power) {
        memset(&powers, 0, sizeof(powers));
        powers.power = power;
    }
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint64_t place = bits * 0x9e3779b97f4a7c15 >> 56;
    if (powers.known[place] != x) {
        powers.known[place] = x;
        powers.result[place] = pow(x, power);
    }
    return powers.result[place];
}

/* Sets the edge of item i, of a squared length (inf if not finite). Its priority is lower, and it is taken earlier, the
   shorter it is and the less mass both items have. */
static void set_edge(const Joining &all, int64_t i, int64_t target, double square) {
    Nearest *nearest = all.nearest;
    nearest->target[i] = (int32_t)target;
    nearest->priority[i] = INFINITY;
    if (target < 0) return;
    const double m = nearest->mass[i], total = m + nearest->mass[target], distance = square / nearest->size;
    const double weight = power_of(m * (nearest->mass[target] / (total > 0 ? total : 1)), all.call->mass_power);
    const double priority = weight * (std::isfinite(distance) ? distance : NO_DISTANCE);
    nearest->priority[i] = priority < INFINITY ? priority : DBL_MAX;
}

/* Sets the edge to the first other item: i has no mass (distance 0), or is at no finite distance from any other (inf). */
static void set_first(const Joining &all, int64_t i) {
    const Nearest *nearest = all.nearest;
    set_edge(all, i, nearest->first == i ? nearest->second : nearest->first, has_mass(nearest, i) ? INFINITY : 0);
}

/* `is_extreme` of the length, from its square. */
INLINE int is_extreme_square(double square) { return !(square == 0 || (square >= 1e-30 && square <= 1e30)); }

/* Updates what the next chunk needs of a changed slot; its earlier search no longer counts. */
static void note_change(const Joining &all, int64_t i) {
    Nearest *nearest = all.nearest;
    const Rows *rows = &all.dictionary->rows;
    const float *key = rows->keys + i * key_ld(all.call), *value = rows->values + i * value_ld(all.call);
    nearest->key_square[i] = exact_dot(key, key, all.call->k.dim);
    nearest->value_square[i] = exact_dot(value, value, all.call->v.dim);
    nearest->changed[i] = nearest->now;
    nearest->searched[i] = -1;
}

/* Remembers the search of slot i, which has not joined. */
static void note_search(Nearest *nearest, int64_t i) {
    const int32_t target = nearest->target[i];
    nearest->searched[i] = nearest->now;
    nearest->partner[i] = nearest->into[target] == target ? nearest->home[target] : -1;
    nearest->factor[i] = nearest->value_factor;
}

/* Lay out the slots that changed since the oldest search among those that search again. */
static void set_recent(const Joining &all) {
    Nearest *nearest = all.nearest;
    int32_t oldest = nearest->now;
    for (int64_t j = 0; j < nearest->num_again; j++) {
        const int32_t searched = nearest->searched[nearest->searching[j]];
        if (searched < oldest) oldest = searched;
    }
    int64_t num = 0;
    for (int64_t i = 0; i < all.dictionary->num; i++) {
        nearest->recent_place[i] = nearest->changed[i] >= oldest ? (int32_t)num : -1;
        if (nearest->changed[i] >= oldest) nearest->recent[num++] = (int32_t)i;
    }
    nearest->num_recent = padded(num, NR);
    const Rows *from = &all.dictionary->rows, *to = &nearest->recent_rows;
    const int64_t size = left_words(all.call);
    for (int64_t j = 0; j < nearest->num_recent; j++) {
        const int64_t i = j < num ? nearest->recent[j] : 0;
        uint32_t words[size];
        take_words(from->bytes, size, i, words);
        put_words(to->bytes, size, j, words);
        copy_scale(from->of_keys, i, to->of_keys, j);
        copy_scale(from->of_values, i, to->of_values, j);
        nearest->recent_start[j] = j < num ? nearest->start[i] : -INFINITY;
        nearest->recent_length[j] = nearest->length[i];
        nearest->recent_error[j] = nearest->error[i];
    }
}

/* Lay out the items of a chunk with `due` merges to make; the row has merged `num_merged` tokens before it. */
static void prepare_nearest(const Joining &all, int64_t due, int64_t num_merged) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int64_t num = all.dictionary->num, size = call->chunk_size;
    nearest->first_token = padded(num, NR);
    nearest->first_joined = nearest->first_token + padded(size, NR);
    /* One vector more than needed: rows a power of two apart would compete for few lines of the cache. */
    nearest->num_columns = nearest->first_joined + padded(due, NR) + VL;
    nearest->num_joined = 0;
    nearest->num_due = due;
    double keys[size], values[size], power = 0, total = 0;
    for (int64_t t = 0; t < size; t++) {
        const float *key = all.tokens->keys + t * key_ld(call), *value = all.tokens->values + t * value_ld(call);
        keys[t] = exact_dot(key, key, call->k.dim);
        values[t] = exact_dot(value, value, call->v.dim);
    }
    for (int64_t i = 0; !nearest->has_squares && i < num; i++) note_change(all, i);
    nearest->has_squares = 1;
    nearest->now++;
    /* The mean squared length of values, over items with finite values. */
    for (int64_t i = 0; i < num + size; i++) {
        const double square = i < num ? nearest->value_square[i] : values[i - num];
        const double mass = i < num ? mass_of(all.sums, i) : token_mass(all.tokens, i - num);
        if (!std::isfinite(square)) continue;
        power += mass * square;
        total += mass;
    }
    power /= total > 0 ? total : 1;
    const double factor = nearest->value_factor = power > 0 ? call->value_weight * call->value_weight / power : 0;
    const int64_t turn = num ? num_merged % num : 0;
    nearest->is_wide = !*all.tokens->is_finite;
    nearest->num_searching = nearest->num_again = nearest->num_edges = nearest->needs_order = 0;
    nearest->size = 0;
    for (int64_t i = 0; i < nearest->num_columns; i++) {
        const int64_t t = i - nearest->first_token;
        const int is_slot = i < num, is_token = t >= 0 && t < size;
        if (!is_slot && !is_token) {
            clear_column(nearest, i, -1);
            continue;
        }
        const double key = is_slot ? nearest->key_square[i] : keys[t];
        const double value = is_slot ? nearest->value_square[i] : values[t];
        nearest->mass[i] = is_slot ? mass_of(all.sums, i) : token_mass(all.tokens, t);
        nearest->square[i] = key + factor * value;
        nearest->index[i] = (int32_t)i;
        set_column(all, i);
        nearest->is_wide |= is_extreme_square(key) || is_extreme_square(value) || is_extreme_square(factor * value);
        const int weighs = has_mass(nearest, i);
        nearest->needs_order |= !weighs;
        if (is_point(nearest, i)) nearest->size = fmax(nearest->size, nearest->square[i]);
        /* Slots search in turn, as many as a chunk has tokens. */
        const int64_t after = is_slot ? i - turn : 0;
        if (weighs && is_slot && (after < 0 ? after + num : after) >= size) continue;
        nearest->edges[nearest->num_edges++] = (int32_t)i;
        if (!weighs) continue;
        int32_t *place = nearest->searching + nearest->num_searching++;
        if (is_slot && nearest->searched[i] >= 0) {
            int32_t *first = nearest->searching + nearest->num_again++;
            *place = *first;
            place = first;
        }
        *place = (int32_t)i;
    }
    nearest->longest = (float)sqrt(nearest->size);
    if (nearest->size == 0) nearest->size = 1;
    nearest->needs_order |= nearest->is_wide;
    if (!HAS_BYTES || !nearest->is_rough || nearest->needs_order) nearest->num_again = 0;
    if (nearest->num_again) set_recent(all);
    if (!nearest->needs_order) return;
    set_order(all);
    for (int64_t i = 0; i < nearest->num_edges; i++)
        if (!has_mass(nearest, nearest->edges[i])) set_first(all, nearest->edges[i]);
}
