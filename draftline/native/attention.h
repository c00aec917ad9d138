// Attention of every token over a range of cached positions, and what goes before it: norms, rotary embedding.
#pragma once

#include <cmath>
#include "team.h"
#include "vectors.h"

namespace draftline {

// Root-mean-square norm of one row; `out` may be `x`.
void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
    const int64_t whole = size / LANES * LANES;
    Floats squares{};
    for (int64_t i = 0; i < whole; i += LANES) squares += load<Floats>(x + i) * load<Floats>(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < size; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

// Half-split rotary embedding of one head, with signed sines.
void rotate(float* head, const float* cosines, const float* sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] + b * sines[i];
        head[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

struct Attention {
    const float* q;  // [tokens, q_stride]: heads side by side
    int64_t q_stride;
    const float* cache;  // [slots, 2 * kv_heads, num_positions, head_dim]: keys, then values
    int64_t num_positions;
    const int64_t* slots;     // [tokens]
    const int64_t* num_keys;  // [tokens]: positions of the slot that a token sees
    float* out;  // [tokens, heads * head_dim]
    int64_t heads, kv_heads, head_dim;
    float scale;
    float* scores;  // [threads, MAX_HEADS, scores_stride]
    int64_t scores_stride;  // whole vectors that hold the longest row
};

constexpr int MAX_HEADS = 4;  // query heads that read keys and values together

#if defined(__GNUC__) && !defined(__clang__)
// Lane by lane: from a where the lane's bit HALF is clear, from b where it is set, each plus the lane across that bit.
template <int HALF>
inline Floats fold(Floats a, Floats b) {
    Ints straight, crossed;
    for (int i = 0; i < LANES; i++) {
        const int source = i & HALF ? static_cast<int>(LANES) : 0;
        straight[i] = source + i;
        crossed[i] = source + (i ^ HALF);
    }
    return __builtin_shuffle(a, b, straight) + __builtin_shuffle(a, b, crossed);
}

template <int HALF>
inline void fold_all(Floats* v) {
    for (int j = 0; j < HALF; j++) v[j] = fold<HALF>(v[j], v[j + HALF]);
    if constexpr (HALF > 1) fold_all<HALF / 2>(v);
}

// Lane j of the result is the sum of v[j]; overwrites v.
inline Floats sums(Floats* v) {
    fold_all<LANES / 2>(v);
    return v[0];
}
#else
inline Floats sums(Floats* v) {
    Floats result;
    for (int j = 0; j < LANES; j++) result[j] = sum(v[j]);
    return result;
}
#endif

// VECTORS of a head are known when compiling, or 0 if not.
template <int VECTORS>
void score_keys(const float* q, const float* keys, int64_t count, int64_t head_dim, float scale,
                float* scores) {
    const int64_t vectors = VECTORS ? VECTORS : head_dim / LANES;
    for (int64_t first = 0; first < count; first += LANES) {
        Floats dots[LANES];
        for (int64_t j = 0; j < LANES; j++) {
            // Past the end the last key stands in; what comes of it is dropped.
            const float* key = keys + std::min(first + j, count - 1) * head_dim;
            Floats dot{};
            for (int64_t v = 0; v < vectors; v++) dot += load<Floats>(q + v * LANES) * load<Floats>(key + v * LANES);
            dots[j] = dot;
        }
        store(scores + first, sums(dots) * scale);
    }
}

// Scores to unnormalised weights, zero past the end; returns their sum.
float soften(float* scores, int64_t count) {
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    std::fill(scores + count, scores + padded, -INFINITY);
    Floats highest = load<Floats>(scores);
    for (int64_t i = LANES; i < padded; i += LANES) highest = max(highest, load<Floats>(scores + i));
    float best = highest[0];
    for (int64_t i = 1; i < LANES; i++) best = std::max(best, highest[i]);
    for (int64_t i = 0; i < padded; i += LANES) store(scores + i, exponential(load<Floats>(scores + i) - best));
    std::fill(scores + count, scores + padded, 0.0f);
    Floats total{};
    for (int64_t i = 0; i < padded; i += LANES) total += load<Floats>(scores + i);
    return sum(total);
}

template <int HEADS, int VECTORS>
void mix_values(const float* weights, int64_t weights_stride, const float* values, int64_t stride, int64_t count,
                const float* totals, float* out, int64_t out_stride) {
    Floats mixed[HEADS][VECTORS];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS; v++) mixed[h][v] = Floats{};
    for (int64_t t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++) {
            const Floats value = load<Floats>(values + t * stride + v * LANES);
            for (int h = 0; h < HEADS; h++) mixed[h][v] += value * weights[h * weights_stride + t];
        }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS; v++) store(out + h * out_stride + v * LANES, mixed[h][v] / totals[h]);
}

template <int HEADS>
void attend_heads(const Attention& a, int64_t token, int64_t kv_head, int64_t head) {
    const int64_t size = a.head_dim, count = a.num_keys[token];
    const float* keys = a.cache + (a.slots[token] * 2 * a.kv_heads + kv_head) * a.num_positions * size;
    const float* values = keys + a.kv_heads * a.num_positions * size;
    float* scores = a.scores + omp_get_thread_num() * MAX_HEADS * a.scores_stride;
    float totals[HEADS];
    for (int h = 0; h < HEADS; h++) {
        const float* q = a.q + token * a.q_stride + (head + h) * size;
        float* row = scores + h * a.scores_stride;
        const auto score = size == 4 * LANES ? score_keys<4> : size == 8 * LANES ? score_keys<8> : score_keys<0>;
        score(q, keys, count, size, a.scale, row);
        totals[h] = soften(row, count);
    }
    float* out = a.out + (token * a.heads + head) * size;
    if (size % (4 * LANES) == 0)
        for (int64_t i = 0; i < size; i += 4 * LANES)
            mix_values<HEADS, 4>(scores, a.scores_stride, values + i, size, count, totals, out + i, size);
    else
        for (int64_t i = 0; i < size; i += LANES)
            mix_values<HEADS, 1>(scores, a.scores_stride, values + i, size, count, totals, out + i, size);
}

// Query heads [head, head + heads) of one key head, at most MAX_HEADS at a time.
template <int HEADS = MAX_HEADS>
void attend_group(const Attention& a, int64_t token, int64_t kv_head, int64_t head, int64_t heads) {
    for (; heads >= HEADS; heads -= HEADS, head += HEADS) attend_heads<HEADS>(a, token, kv_head, head);
    if constexpr (HEADS > 1)
        if (heads) attend_group<HEADS - 1>(a, token, kv_head, head, heads);
}

void attend(Team& team, const Attention& a, int64_t tokens) {
    const int64_t group = a.heads / a.kv_heads;
    // Tokens of one request follow each other and read the same keys, which stay in the cache of a core.
    team.share(tokens * a.kv_heads, [&](int64_t i) {
        const int64_t kv_head = i / tokens;
        attend_group(a, i % tokens, kv_head, kv_head * group, group);
    });
}

}  // namespace draftline
