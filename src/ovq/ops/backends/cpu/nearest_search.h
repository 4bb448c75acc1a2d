/* merge="nearest": the searches for nearest items.

   A tile of items is multiplied with all columns, block by block. Only columns that may be nearest are kept, and float64
   decides among them (docs/method/math.md, section 5). */
#pragma once

#include "nearest_items.h"

/* Approximate products are used up to this average number of candidates per item: to settle so many in float64 costs the time
   that they save over float32. */
#define MOST_CANDIDATES 32

/* Sets the edge of item i to the exact nearest of `num` > 0 candidates, which are in `near` of the reader (ties: lowest
   index); returns the squared distance. */
static double settle(const Joining &all, int64_t i, int64_t num, const Reader *reader) {
    const Nearest *nearest = all.nearest;
    int32_t *near = reader->near;
    const double tie = all.call->tie * nearest->size;
    /* Sort by item, which is the order of columns except for joined ones. */
    std::sort(near, near + num, [=](int32_t a, int32_t b) { return nearest->index[a] < nearest->index[b]; });
    double best = INFINITY, *distance = reader->exact;
    for (int64_t j = 0; j < num; j++) {
        distance[j] = distance_of(all, i, near[j]);
        /* For a duplicate of the item, the other candidates need no look. */
        if (distance[j] <= tie && best > 2 * tie) num = j + 1;
        best = fmin(best, distance[j]);
    }
    int64_t j = 0;
    while (distance[j] > best + tie) j++;
    set_edge(all, i, near[j], distance[j]);
    return distance[j];
}

/* Search of an item among all others, in float64. */
static void search_all(const Joining &all, int64_t i, const Reader *reader) {
    const Nearest *nearest = all.nearest;
    int64_t num = 0;
    for (int64_t j = 0; std::isfinite(nearest->square[i]) && j < nearest->num_left; j++) {
        const int32_t column = nearest->order[j];
        if (column != i && is_point(nearest, column)) reader->near[num++] = column;
    }
    if (num) settle(all, i, num, reader);
    else set_first(all, i);
}

/* Upper bound of the error of a score x.y - |y|^2 / 2: a multiple of |y| plus a multiple of the rounding error of y. */
struct Slack {
    float of_length, of_error;

    INLINE_MEMBER Vector at(const Columns &columns, int64_t j) const {
        const Vector slack = load(columns.length + j) * of_length;
        return HAS_BYTES ? slack + load(columns.error + j) * of_error : slack;
    }

    /* Of any column with at most this length and rounding error. */
    INLINE_MEMBER float most(float length, float error) const {
        return (length * of_length + error * of_error) * (1 + 4 * FLT_EPSILON);
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

/* The search of an item, with bounds of its scores. */
struct Search {
    int32_t item, column; /* Its own column, or -1 if it is not among them. */
    Slack slack;
    Vector least;         /* Lower bound of the highest score, per lane. */
    Vector *blocks;       /* Upper bound of the scores of each block, per lane. */
};

/* Calls function(columns, begin, end, number) for each block of columns in turn. */
template <typename Function> INLINE void for_blocks(const Columns *parts, Function function) {
    int64_t block = 0;
    for (int part = 0; part < 3; part++) {
        const Columns &columns = parts[part];
        for (int64_t at = 0; at < columns.num; at += COLUMN_BLOCK)
            function(columns, columns.first + at, columns.first + least(columns.num, at + COLUMN_BLOCK), block++);
    }
}

/* Scores of `num` items and their bounds, one block at a time while it is in the L1 cache. */
static void score_blocks(const Joining &all, const Columns *parts, Search *searches, int64_t num, const Left &left,
                         float *scores) {
    const int64_t n = all.nearest->num_columns;
    for_blocks(parts, [=, &all, &left](const Columns &columns, int64_t begin, int64_t end, int64_t block) {
        const Rows part = rows_from(columns.rows, all.call, begin - columns.first);
        const float longest = highest_of(columns.length + begin, end - begin);
        const float roughest = highest_of(columns.error + begin, end - begin);
        multiply(all.call, &part, end - begin, num, left, scores + begin, n);
        for (int64_t i = 0; i < num; i++) {
            Search *search = searches + i;
            float *row = scores + i * n;
            const float slack = search->slack.most(longest, roughest);
            if (search->column >= begin && search->column < end) row[search->column] = -INFINITY;
            Vector best = splat(-INFINITY), more = best;
            for (int64_t j = begin; j < end; j += 2 * VL) {
                best = higher_of(load(row + j) + load(columns.start + j), best);
                more = higher_of(load(row + j + VL) + load(columns.start + j + VL), more);
            }
            best = higher_of(best, more);
            search->least = higher_of(best - slack, search->least);
            search->blocks[block] = best + slack;
        }
    });
}

/* Upper bounds of the scores of columns j..j+VL-1. */
INLINE Vector highest_at(const Columns &columns, const float *row, const Slack &slack, int64_t j) {
    return load(row + j) + load(columns.start + j) + slack.at(columns, j);
}

/* Writes the columns that may be nearest to an item to `near`; returns their number. */
static int64_t candidates_of(const Joining &all, const Columns *parts, const float *row, const Search &search,
                             int32_t *near) {
    const float best = highest(search.least);
    if (best == -INFINITY) return 0;
    const Vector floor = splat(best - 2 * (float)(all.call->tie * all.nearest->size));
    int64_t num = 0;
    for_blocks(parts, [&](const Columns &columns, int64_t begin, int64_t end, int64_t block) {
        if (!lanes_at_least(search.blocks[block], floor)) return;
        for (int64_t j = begin; j < end; j += VL) {
            uint32_t lanes = lanes_at_least(highest_at(columns, row, search.slack, j), floor);
            for (; lanes; lanes &= lanes - 1) near[num++] = (int32_t)(j + __builtin_ctz(lanes));
        }
    });
    return num;
}

/* Upper bound of all scores except that of one column. */
static float highest_but(const Columns *parts, float *row, const Search &search, int64_t column) {
    Vector high = splat(-INFINITY);
    for_blocks(parts, [&](const Columns &columns, int64_t begin, int64_t end, int64_t block) {
        if (column < begin || column >= end) {
            high = higher_of(search.blocks[block], high);
            return;
        }
        row[column] = -INFINITY;
        for (int64_t j = begin; j < end; j += VL) high = higher_of(highest_at(columns, row, search.slack, j), high);
    });
    return highest(high);
}

/* About how many candidates an item would have by approximate products. */
static int32_t count_near(const Joining &all, const Columns *parts, const float *row, const Search &search) {
    const Nearest *nearest = all.nearest;
    const Slack slack = slack_of(all, search.item, 1);
    const Vector floor =
        splat(highest(search.least) - slack.of_length * nearest->longest - slack.of_error * nearest->error[search.item]);
    int64_t num = 0;
    for_blocks(parts, [&](const Columns &columns, int64_t begin, int64_t end, int64_t) {
        for (int64_t j = begin; j < end; j += VL)
            num += __builtin_popcount(lanes_at_least(highest_at(columns, row, slack, j), floor));
    });
    return (int32_t)num;
}

/* Lay out items as the left factor of a product. */
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
            left.key_scales[i] = rows->of_keys.size[place];
            left.value_scales[i] = factor * rows->of_values.size[place];
            continue;
        }
#endif
        float *value = left.values + i * v;
        for (int64_t j = 0; j < v; j += VL) store(value + j, load(all.value(items[i]) + j) * factor);
        if (!words) {
            memcpy(left.keys + i * k, all.key(items[i]), sizeof(float) * k);
            continue;
        }
        round_row(all.key(items[i]), k, words);
        round_row(value, v, words + key_words(call));
    }
}

/* Searches for the nearest of `num` items, at most QUERIES: among all columns or, if `is_again`, with changed slots in place
   of all slots. Items that these do not decide are left in `items`; returns their number. */
static int64_t search_items(const Joining &all, int32_t *items, int64_t num, int is_again, const Reader *reader,
                            int32_t *num_near) {
    Nearest *nearest = all.nearest;
    float *scores = reader->scores;
    int32_t *near = reader->near;
    const Call *call = all.call;
    const int64_t n = nearest->num_columns, width = nearest->first_joined - nearest->first_token;
    Columns parts[3] = {
        {&all.dictionary->rows, 0, nearest->first_token, nearest->start, nearest->length, nearest->error},
        {all.tokens, nearest->first_token, width, nearest->start, nearest->length, nearest->error},
        {&nearest->joined, nearest->first_joined, padded(nearest->num_joined, NR), nearest->start, nearest->length,
         nearest->error}};
    if (is_again)
        parts[0] = {&nearest->recent_rows,  0, nearest->num_recent, nearest->recent_start, nearest->recent_length,
                    nearest->recent_error};
    float keys[num * key_ld(call)], values[num * value_ld(call)], scales[2 * num];
    uint32_t words[HAS_ROUGH ? num * left_words(call) : 1];
    const Left left = {keys, values, nearest->is_rough ? words : nullptr, scales, scales + num};
    set_left(all, items, num, left);
    Search searches[num];
    for (int64_t i = 0; i < num; i++)
        searches[i] = {items[i], is_again ? nearest->recent_place[items[i]] : items[i],
                       slack_of(all, items[i], nearest->is_rough), splat(-INFINITY),
                       reader->blocks + i * num_blocks(n)};
    score_blocks(all, parts, searches, num, left, scores);
    *num_near = count_near(all, parts, scores, searches[0]);
    const double tie = call->tie * nearest->size;
    int64_t num_left = 0;
    for (int64_t i = 0; i < num; i++) {
        const int32_t item = items[i];
        float *row = scores + i * n;
        int64_t candidates = candidates_of(all, parts, row, searches[i], near);
        const int32_t partner = is_again ? nearest->partner[item] : -1;
        const int is_apart = partner >= 0 && nearest->recent_place[partner] < 0;
        if (is_again) {
            for (int64_t j = 0; j < candidates; j++)
                if (near[j] < parts[0].num) near[j] = nearest->recent[near[j]];
            if (is_apart) near[candidates++] = partner;
        }
        if (!candidates) {
            set_first(all, item);
            continue;
        }
        const double distance = settle(all, item, candidates, reader);
        if (!HAS_BYTES || item >= nearest->first_token) continue;
        const int32_t target = nearest->target[item];
        const int64_t column = is_again && target < nearest->first_token ? nearest->recent_place[target] : target;
        double beyond = nearest->square[item] - 2.0 * highest_but(parts, row, searches[i], column);
        if (is_again) {
            const double factor = nearest->factor[item], now = nearest->value_factor;
            const double before = nearest->beyond[item] * (now < factor ? now / factor : 1);
            if (distance + 2 * tie > before) {
                items[num_left++] = item;
                continue;
            }
            beyond = fmin(beyond, is_apart && target != partner ? fmin(before, distance - tie) : before);
        }
        nearest->beyond[item] = beyond;
    }
    return num_left;
}

/* Searches first..first+num-1 of `searching`, at most QUERIES. */
static void search_tile(const Joining &all, int64_t first, int64_t num, const Reader *reader) {
    Nearest *nearest = all.nearest;
    int32_t items[QUERIES], *num_near = nearest->num_near + first / QUERIES;
    memcpy(items, nearest->searching + first, sizeof(int32_t) * num);
    for (int64_t i = 0; nearest->is_wide && i < num; i++) search_all(all, items[i], reader);
    if (nearest->is_wide) return;
    const int64_t again = nearest->num_again > first ? least(num, nearest->num_again - first) : 0;
    const int64_t left = again ? search_items(all, items, again, 1, reader, num_near) : 0;
    memmove(items + left, items + again, sizeof(int32_t) * (num - again));
    if (left + num > again) search_items(all, items, left + num - again, 0, reader, num_near);
}
