/* merge="nearest": the items of a chunk, and the search for the ones nearest to some of them.

   Items are columns: [slots | tokens | joined], each part padded to whole panels. What has joined is a new column, its
   mean; the columns of its parts are gone. A tile of items is multiplied with all columns, block by block, and nothing of
   that is kept but what may be nearest, which is decided in float64 (docs/method/math.md, section 5). */
#pragma once

#include "clusters.h"
#include "points.h"

/* Stands for a squared distance that is not finite, relative to the largest squared length (`NO_DISTANCE` of options.py). */
#define NO_DISTANCE 5.0
/* Rough products will do unless an item has more candidates than this on average. To tell so many apart takes as long as
   products in float32 take longer. */
#define MOST_CANDIDATES 32

struct Nearest {
    int64_t num_columns, first_token, first_joined, num_joined;
    int64_t num_due;      /* Merges that are still to be made. */
    int has_squares;      /* Whether `key_square` and `value_square` hold for the dictionary as it is. */
    int is_wide;          /* Whether float32 products mean nothing for this chunk. */
    int is_rough;         /* Whether its products are rough. */
    double value_factor;  /* f^2: what squared distances of values are multiplied with. */
    double size;          /* The largest squared length of an item that weighs something, or 1. */
    float longest;        /* The largest length. */
    int64_t first, second; /* The lowest items of those that others may go to; -1 if there are none. */
    double *key_square, *value_square; /* [M]: squared lengths of the means of slots. */
    /* [columns] */
    double *mass, *square; /* Count or weight; squared length. */
    float *start, *length; /* -|x|^2 / 2, or -inf where no other may go; |x|, or 0 there. */
    float *error;         /* How far an item in bytes is off, a length. */
    int32_t *index, *into, *home; /* As those of `Clusters`. */
    int32_t *target;      /* Where an item's edge leads, or -1 where it has none. */
    double *priority;     /* Edges of lowest priority are taken first; inf where there is none. */
    int32_t *edges;       /* Items that may have an edge, in order. */
    int64_t num_edges;
    int32_t *root;        /* Where an edge leads that is taken, else the item itself. */
    int32_t *mark;        /* Scratch. */
    int32_t *order;       /* The columns that are left, by their lowest items, where `needs_order`. */
    int64_t num_left;
    int needs_order;      /* Whether something weighs nothing, or products mean nothing. */
    int32_t *taken;       /* Items whose edges are taken, in order. */
    int64_t num_taken;
    double *ranked;       /* Scratch. */
    int32_t *searching;   /* Items that are to look for the nearest one. */
    int64_t num_searching;
    int32_t *num_near;    /* [tiles]: candidates that the first item of each tile has if products are rough. */
    double *mean;         /* [C, K + V]: of joined columns. */
    Rows joined;          /* [C]: the same in float32, for products. */
    int32_t *moved;       /* [M] */
};

static Nearest take_nearest(Arena *arena, const Call *call) {
    Nearest nearest = {};
    const int64_t size = padded(call->chunk_size, NR), slots = padded(call->capacity, NR);
    const int64_t n = nearest.num_columns = slots + 2 * size + VL;
    nearest.is_rough = HAS_ROUGH;
    nearest.key_square = TAKE(arena, double, slots);
    nearest.value_square = TAKE(arena, double, slots);
    nearest.mass = TAKE(arena, double, n);
    nearest.square = TAKE(arena, double, n);
    nearest.start = TAKE(arena, float, n);
    nearest.length = TAKE(arena, float, n);
    nearest.error = TAKE(arena, float, n);
    nearest.index = TAKE(arena, int32_t, n);
    nearest.into = TAKE(arena, int32_t, n);
    nearest.home = TAKE(arena, int32_t, n);
    nearest.target = TAKE(arena, int32_t, n);
    nearest.priority = TAKE(arena, double, n);
    nearest.edges = TAKE(arena, int32_t, n);
    nearest.mark = TAKE(arena, int32_t, n);
    nearest.root = TAKE(arena, int32_t, n);
    nearest.order = TAKE(arena, int32_t, n);
    nearest.taken = TAKE(arena, int32_t, n);
    nearest.ranked = TAKE(arena, double, n);
    nearest.searching = TAKE(arena, int32_t, n);
    nearest.num_near = TAKE(arena, int32_t, n / QUERIES + 1);
    nearest.mean = TAKE(arena, double, size * (call->k.dim + call->v.dim));
    nearest.joined = take_rows(arena, call, size, 0, 1);
    nearest.moved = TAKE(arena, int32_t, slots);
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

/* The squared distance of two items, in float64 from differences; inf where that is not finite. */
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

/* Whether others may search for an item. What weighs nothing is not there for them. */
INLINE int is_point(const Nearest *nearest, int64_t i) {
    return has_mass(nearest, i) && std::isfinite(nearest->square[i]);
}

/* What others need to know of a column once its mass and square are known. */
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

/* A column that is not there, or no longer. */
INLINE void clear_column(Nearest *nearest, int64_t i, int64_t into) {
    nearest->start[i] = -INFINITY;
    nearest->length[i] = nearest->error[i] = 0;
    nearest->into[i] = (int32_t)into;
    nearest->target[i] = -1;
}

/* List the columns that are left, and those of them that others may go to at any distance: what weighs nothing is none of
   these, unless nothing weighs anything. */
static void set_order(const Joining &all) {
    Nearest *nearest = all.nearest;
    const int64_t num_items = nearest->first_token + all.call->chunk_size;
    /* Of each lowest item, the column that it is in. */
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

/* An edge, of a squared length, inf where that is not finite. The shorter it is, and the less both items weigh, the earlier
   it is taken. */
static void set_edge(const Joining &all, int64_t i, int64_t target, double square) {
    Nearest *nearest = all.nearest;
    nearest->target[i] = (int32_t)target;
    nearest->priority[i] = INFINITY;
    if (target < 0) return;
    const double m = nearest->mass[i], total = m + nearest->mass[target], distance = square / nearest->size;
    const double weight = pow(m * (nearest->mass[target] / (total > 0 ? total : 1)), all.call->mass_power);
    const double priority = weight * (std::isfinite(distance) ? distance : NO_DISTANCE);
    nearest->priority[i] = priority < INFINITY ? priority : DBL_MAX;
}

/* The edge of an item that goes to the first that there is: it weighs nothing, and is at no distance from any other, or is
   further than anything from all others. */
static void set_first(const Joining &all, int64_t i) {
    const Nearest *nearest = all.nearest;
    set_edge(all, i, nearest->first == i ? nearest->second : nearest->first, has_mass(nearest, i) ? INFINITY : 0);
}

/* Whether a squared length is of a length that is extreme. */
INLINE int is_extreme_square(double square) { return !(square == 0 || (square >= 1e-30 && square <= 1e30)); }

/* What the next chunk needs to know of a slot that changed. */
static void set_squares(const Joining &all, int64_t i) {
    const Rows *rows = &all.dictionary->rows;
    const float *key = rows->keys + i * key_ld(all.call), *value = rows->values + i * value_ld(all.call);
    all.nearest->key_square[i] = exact_dot(key, key, all.call->k.dim);
    all.nearest->value_square[i] = exact_dot(value, value, all.call->v.dim);
}

/* Lay out the items of a chunk of which `due` are to be merged away, `num_merged` tokens being merged before it. */
static void prepare_nearest(const Joining &all, int64_t due, int64_t num_merged) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int64_t num = all.dictionary->num, size = call->chunk_size;
    nearest->first_token = padded(num, NR);
    nearest->first_joined = nearest->first_token + padded(size, NR);
    /* One vector more than is needed: rows a power of two apart would share few lines of the cache. */
    nearest->num_columns = nearest->first_joined + padded(due, NR) + VL;
    nearest->num_joined = 0;
    nearest->num_due = due;
    double keys[size], values[size], power = 0, total = 0;
    for (int64_t t = 0; t < size; t++) {
        const float *key = all.tokens->keys + t * key_ld(call), *value = all.tokens->values + t * value_ld(call);
        keys[t] = exact_dot(key, key, call->k.dim);
        values[t] = exact_dot(value, value, call->v.dim);
    }
    for (int64_t i = 0; !nearest->has_squares && i < num; i++) set_squares(all, i);
    nearest->has_squares = 1;
    /* The mean squared length of values, of items whose values are finite. */
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
    nearest->num_searching = nearest->num_edges = nearest->needs_order = 0;
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
        /* Slots search in turn. */
        const int64_t after = is_slot ? i - turn : 0;
        if (weighs && is_slot && (after < 0 ? after + num : after) >= size) continue;
        nearest->edges[nearest->num_edges++] = (int32_t)i;
        if (weighs) nearest->searching[nearest->num_searching++] = (int32_t)i;
    }
    nearest->longest = (float)sqrt(nearest->size);
    if (nearest->size == 0) nearest->size = 1;
    nearest->needs_order |= nearest->is_wide;
    if (!nearest->needs_order) return;
    set_order(all);
    for (int64_t i = 0; i < nearest->num_edges; i++)
        if (!has_mass(nearest, nearest->edges[i])) set_first(all, nearest->edges[i]);
}

/* The nearest of `num` > 0 candidates of an item, of equally near ones the first. */
static void settle(const Joining &all, int64_t i, int32_t *near, int64_t num) {
    const Nearest *nearest = all.nearest;
    const double tie = all.call->tie * nearest->size;
    /* In order of items, which is that of columns but for those that joined. */
    for (int64_t j = 1; j < num; j++) {
        const int32_t column = near[j];
        int64_t place = j;
        for (; place > 0 && nearest->index[near[place - 1]] > nearest->index[column]; place--)
            near[place] = near[place - 1];
        near[place] = column;
    }
    double best = INFINITY, distance[num];
    for (int64_t j = 0; j < num; j++) {
        distance[j] = distance_of(all, i, near[j]);
        /* Where items are repeated, the rest need not be looked at. */
        if (distance[j] <= tie && best > 2 * tie) num = j + 1;
        best = fmin(best, distance[j]);
    }
    int64_t j = 0;
    while (distance[j] > best + tie) j++;
    set_edge(all, i, near[j], distance[j]);
}

/* The search of an item among all others, in float64. */
static void search_all(const Joining &all, int64_t i) {
    const Nearest *nearest = all.nearest;
    int32_t near[nearest->num_left];
    int64_t num = 0;
    for (int64_t j = 0; std::isfinite(nearest->square[i]) && j < nearest->num_left; j++) {
        const int32_t column = nearest->order[j];
        if (column != i && is_point(nearest, column)) near[num++] = column;
    }
    if (num) settle(all, i, near, num);
    else set_first(all, i);
}

/* By how much a score, x.y - |y|^2 / 2, is off at most: so many times |y|, and so many times the error of y. */
struct Slack {
    float of_length, of_error;

    INLINE_MEMBER Vector at(const Nearest *nearest, int64_t j) const {
        const Vector slack = load(nearest->length + j) * of_length;
        return HAS_BYTES ? slack + load(nearest->error + j) * of_error : slack;
    }
};

INLINE Slack slack_of(const Joining &all, int64_t i, int is_rough) {
    const Call *call = all.call;
    const float length = all.nearest->length[i], error = all.nearest->error[i];
    const float of_sums = (float)(call->k.dim + call->v.dim + 32) * FLT_EPSILON * all.nearest->longest;
    if (!is_rough) return {of_sums, 0};
    if (HAS_BYTES) return {error * 1.001f + of_sums, (length + error) * 1.001f};
    return {ROUGHNESS * 1.001f * length + of_sums, 0};
}

/* What is known of the scores of an item with all columns. */
struct Peaks {
    Vector least;   /* The highest that scores are at least. */
    Vector *blocks; /* The highest that they may be, of each block. */
};

/* Scores of `num` items with the columns of `rows`, a block at a time while it lies in the first-level cache. Returns the
   number of blocks so far. */
static int64_t score_blocks(const Joining &all, const Rows *rows, int64_t first, int64_t width, const int32_t *items,
                            int64_t num, const Left &left, const Slack *slack, Peaks *peaks, int64_t block,
                            float *scores) {
    const Nearest *nearest = all.nearest;
    const int64_t n = nearest->num_columns;
    for (int64_t at = 0; at < width; at += BLOCK, block++) {
        const int64_t columns = least(BLOCK, width - at), begin = first + at;
        const Rows part = rows_from(rows, all.call, at);
        multiply(all.call, &part, columns, num, left, scores + begin, n);
        for (int64_t i = 0; i < num; i++) {
            float *row = scores + i * n;
            if (items[i] >= begin && items[i] < begin + columns) row[items[i]] = -INFINITY;
            Vector low = peaks[i].least, high = splat(-INFINITY);
            for (int64_t j = begin; j < begin + columns; j += VL) {
                const Vector score = load(row + j) + load(nearest->start + j);
                const Vector off = slack[i].at(nearest, j);
                low = higher_of(score - off, low);
                high = higher_of(score + off, high);
            }
            peaks[i].least = low;
            peaks[i].blocks[block] = high;
        }
    }
    return block;
}

/* The columns that may be nearest to an item, `near`; their number. */
static int64_t candidates_of(const Joining &all, const float *row, Slack slack, const Peaks &peaks, int32_t *near) {
    const Nearest *nearest = all.nearest;
    const float best = highest(peaks.least);
    if (best == -INFINITY) return 0;
    const Vector floor = splat(best - 2 * (float)(all.call->tie * nearest->size));
    const int64_t parts[4] = {0, nearest->first_token, nearest->first_joined,
                              nearest->first_joined + padded(nearest->num_joined, NR)};
    int64_t num = 0, block = 0;
    for (int part = 0; part < 3; part++)
        for (int64_t begin = parts[part]; begin < parts[part + 1]; begin += BLOCK, block++) {
            if (!lanes_at_least(peaks.blocks[block], floor)) continue;
            for (int64_t j = begin; j < least(begin + BLOCK, parts[part + 1]); j += VL) {
                const Vector score = load(row + j) + load(nearest->start + j);
                uint32_t lanes = lanes_at_least(score + slack.at(nearest, j), floor);
                for (; lanes; lanes &= lanes - 1) near[num++] = (int32_t)(j + __builtin_ctz(lanes));
            }
        }
    return num;
}

/* How many columns might be nearest to an item by rough products, about. */
static int32_t count_near(const Joining &all, int64_t i, const float *row, float best) {
    const Nearest *nearest = all.nearest;
    const Slack slack = slack_of(all, i, 1);
    const Vector floor = splat(best - slack.of_length * nearest->longest - slack.of_error * nearest->error[i]);
    int64_t num = 0;
    for (int64_t j = 0; j < nearest->first_joined; j += VL) {
        const Vector score = load(row + j) + load(nearest->start + j) + slack.at(nearest, j);
        num += __builtin_popcount(lanes_at_least(score, floor));
    }
    return (int32_t)num;
}

/* Items to the left of a product. */
static void set_left(const Joining &all, const int32_t *items, int64_t num, const Left &left) {
    const Call *call = all.call;
    const float factor = (float)all.nearest->value_factor;
    const int64_t k = key_ld(call), v = value_ld(call), size = left_words(call);
    for (int64_t i = 0; i < num; i++) {
        uint32_t *words = left.words ? left.words + i * size : nullptr;
#if HAS_BYTES
        if (words) {
            const Rows *rows = all.rows(items[i]);
            const int64_t place = all.place(items[i]);
            take_left(rows->bytes, size, place, words);
            left.key_steps[i] = rows->of_keys.size[place];
            left.value_steps[i] = factor * rows->of_values.size[place];
            continue;
        }
#endif
        float *key = left.keys + i * k, *value = left.values + i * v;
        memcpy(key, all.key(items[i]), sizeof(float) * k);
        for (int64_t j = 0; j < v; j++) value[j] = factor * all.value(items[i])[j];
        if (!words) continue;
        round_row(key, k, words);
        round_row(value, v, words + key_words(call));
    }
}

/* The searches first..first+num-1 of those that are due, at most QUERIES; `scores` holds as many rows of columns. */
static void search_tile(const Joining &all, int64_t first, int64_t num, float *scores) {
    Nearest *nearest = all.nearest;
    const Call *call = all.call;
    const int32_t *items = nearest->searching + first;
    if (nearest->is_wide) {
        for (int64_t i = 0; i < num; i++) search_all(all, items[i]);
        return;
    }
    const int64_t n = nearest->num_columns;
    float keys[num * key_ld(call)], values[num * value_ld(call)], steps[2 * num];
    uint32_t words[HAS_ROUGH ? num * left_words(call) : 1];
    Slack slack[num];
    Peaks peaks[num];
    Vector blocks[num * (n / BLOCK + 3)];
    for (int64_t i = 0; i < num; i++) {
        slack[i] = slack_of(all, items[i], nearest->is_rough);
        peaks[i] = {splat(-INFINITY), blocks + i * (n / BLOCK + 3)};
    }
    const Left left = {keys, values, nearest->is_rough ? words : nullptr, steps, steps + num};
    set_left(all, items, num, left);
    const int64_t width = nearest->first_joined - nearest->first_token;
    int64_t block = score_blocks(all, &all.dictionary->rows, 0, nearest->first_token, items, num, left, slack, peaks, 0,
                                 scores);
    block = score_blocks(all, all.tokens, nearest->first_token, width, items, num, left, slack, peaks, block, scores);
    score_blocks(all, &nearest->joined, nearest->first_joined, padded(nearest->num_joined, NR), items, num, left, slack,
                 peaks, block, scores);
    nearest->num_near[first / QUERIES] = count_near(all, items[0], scores, highest(peaks[0].least));
    int32_t near[n];
    for (int64_t i = 0; i < num; i++) {
        const int64_t candidates = candidates_of(all, scores + i * n, slack[i], peaks[i], near);
        if (candidates) settle(all, items[i], near, candidates);
        else set_first(all, items[i]);
    }
}
