// CPU kernels of a decoder-only transformer for steps of few tokens: fp32 arithmetic over fp32 or bf16 weights.
//
// What they promise: the result of a row depends on that row alone, bit for bit, not on how many rows share the step.
// Every sum runs in one fixed order (inputs ascending, one accumulator a result), whatever the blocking.
//
// Weights kept in bf16 halve the bytes of a step. Widening a bf16 number to fp32 is exact (it is its upper half), so a
// checkpoint that was stored in bf16 gives the very numbers of its fp32 copy.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "hidden_rows.h"
#include "products.h"
#include "team.h"
#include "vectors.h"

namespace draftline {

// Field for field as draftline/native/library.py has them.
struct Layer {
    Weight qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *q_norm, *k_norm;  // null: none
};

struct Step {
    int64_t tokens, hidden, intermediate, heads, kv_heads, head_dim, num_layers, num_taps, num_threads;
    int64_t num_positions;  // of a slot
    const Layer* layers;
    float* const* caches;     // [layers]
    const int64_t* tap_of;    // [layers]: place among the taps, or -1
    const int64_t* positions;  // [tokens]
    const int64_t* slots;
    const int64_t* num_keys;
    const float* cosines;  // [positions, head_dim]
    const float* sines;
    float* x;     // [tokens, hidden]: embeddings, becomes the last layer's output
    float* taps;  // [tokens, num_taps, hidden]
    float* normed;    // [tokens, hidden]
    float* qkv;       // [tokens, (heads + 2 kv_heads) * head_dim]
    float* attended;  // [tokens, heads * head_dim]
    float* gated;     // [tokens, intermediate]
    float* scores;    // see Attention
    int64_t scores_stride;
    float eps, scale;
};

// Rotates queries in place, and moves keys, rotated, and values into the cache.
void rotate_and_append(const Step& s, const Layer& layer, float* cache, int64_t token) {
    const int64_t size = s.head_dim;
    const float *cosines = s.cosines + s.positions[token] * size, *sines = s.sines + s.positions[token] * size;
    float* row = s.qkv + token * (s.heads + 2 * s.kv_heads) * size;
    for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
        const float* norm = h < s.heads ? layer.q_norm : layer.k_norm;
        if (norm) rms_norm(row + h * size, norm, size, s.eps, row + h * size);
        rotate(row + h * size, cosines, sines, size);
    }
    for (int64_t h = 0; h < 2 * s.kv_heads; h++) {
        const int64_t at = (s.slots[token] * 2 * s.kv_heads + h) * s.num_positions + s.positions[token];
        std::memcpy(cache + at * size, row + (s.heads + h) * size, size * sizeof(float));
    }
}

void run_layer(Team& team, const Step& s, int64_t index) {
    const Layer& layer = s.layers[index];
    float* cache = s.caches[index];
    const int64_t hidden = s.hidden, q_size = s.heads * s.head_dim, qkv_size = q_size + 2 * s.kv_heads * s.head_dim;
    const auto norm = [&](const float* weight) {
        team.share(s.tokens, [&](int64_t n) {
            rms_norm(s.x + n * hidden, weight, hidden, s.eps, s.normed + n * hidden);
        });
    };
    norm(layer.attention_norm);
    multiply_all(team, {s.normed, hidden, s.qkv, qkv_size, hidden, qkv_size, STORE}, layer.qkv, s.tokens);
    team.share(s.tokens, [&](int64_t n) { rotate_and_append(s, layer, cache, n); });
    attend(team,
           {s.qkv, qkv_size, cache, s.num_positions, s.slots, s.num_keys, s.attended, s.heads, s.kv_heads, s.head_dim,
            s.scale, s.scores, s.scores_stride},
           s.tokens);
    multiply_all(team, {s.attended, q_size, s.x, hidden, q_size, hidden, ADD}, layer.output, s.tokens);
    norm(layer.mlp_norm);
    const int64_t inner = s.intermediate;
    multiply_all(team, {s.normed, hidden, s.gated, inner, hidden, inner, GATE}, layer.gate_up, s.tokens);
    multiply_all(team, {s.gated, inner, s.x, hidden, inner, hidden, ADD}, layer.down, s.tokens);
    const int64_t tap = s.tap_of[index];
    if (tap >= 0)
        team.share(s.tokens, [&](int64_t n) {
            std::memcpy(s.taps + (n * s.num_taps + tap) * hidden, s.x + n * hidden, hidden * sizeof(float));
        });
}

// Index of the largest of a row, the first of equals, and the log of the sum of the exponentials.
void score_row(const float* logits, int64_t size, int64_t* best, float* log_normaliser) {
    const int64_t whole = size / LANES * LANES;
    Floats highest = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES) highest = max(highest, load<Floats>(logits + i));
    float top = -INFINITY;
    for (int64_t i = 0; i < LANES; i++) top = std::max(top, highest[i]);
    for (int64_t i = whole; i < size; i++) top = std::max(top, logits[i]);
    // A row of NaN has no largest; the last index keeps it inside the vocabulary.
    int64_t at = 0;
    while (at < size - 1 && logits[at] != top) at++;
    // Sums of vectors in double are slow and 16 lanes of fp32 are exact enough: each lane adds size / 16 terms.
    Floats total{};
    for (int64_t i = 0; i < whole; i += LANES) total += exponential(load<Floats>(logits + i) - top);
    double all = sum(total);
    for (int64_t i = whole; i < size; i++) all += std::exp(logits[i] - top);
    *best = at;
    *log_normaliser = top + static_cast<float>(std::log(all));
}

}  // namespace draftline

using namespace draftline;

extern "C" {

int64_t panel_outputs() { return PANEL; }

// Lays out [outputs, inputs] for the products; `packed` has room for whole panels. bf16 takes the upper halves.
void pack(const float* weight, int64_t outputs, int64_t inputs, int64_t is_bf16, void* packed) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t j = 0; j < PANEL; j++) {
            const int64_t output = panel * PANEL + j;
            // In bf16 the low and the high half of the panel alternate.
            const int64_t place = is_bf16 ? 2 * (j % LANES) + j / LANES : j;
            for (int64_t i = 0; i < inputs; i++) {
                const float value = output < outputs ? weight[output * inputs + i] : 0.0f;
                const int64_t at = (panel * inputs + i) * PANEL + place;
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                if (is_bf16)
                    static_cast<uint16_t*>(packed)[at] = static_cast<uint16_t>(bits >> 16);
                else
                    static_cast<float*>(packed)[at] = value;
            }
        }
}

// y [rows, outputs] = x [rows, inputs] W^T.
void multiply(const float* x, int64_t x_stride, int64_t rows, const void* packed, int64_t is_bf16, int64_t outputs,
              int64_t inputs, float* y, int64_t num_threads) {
    run(num_threads, [&](Team& team) {
        multiply_all(team, {x, x_stride, y, outputs, inputs, outputs, STORE}, {packed, is_bf16}, rows);
    });
}

// All layers of a step; keys and values go into the caches, outputs of tapped layers into the taps.
void run_layers(const Step* step) {
    run(step->num_threads, [&](Team& team) {
        for (int64_t layer = 0; layer < step->num_layers; layer++) run_layer(team, *step, layer);
    });
}

// For every row of [rows, size] logits its argmax and log-sum-exp.
void score(const float* logits, int64_t rows, int64_t size, int64_t* best, float* log_normaliser, int64_t num_threads) {
    run(num_threads, [&](Team& team) {
        team.share(rows, [&](int64_t n) { score_row(logits + n * size, size, best + n, log_normaliser + n); });
    });
}

// [rows, size + 4] bytes, codes and an fp32 scale, to [rows, size].
void decode_e4m3(const uint8_t* bytes, int64_t rows, int64_t size, float* out) {
    for (int64_t n = 0; n < rows; n++) decode_e4m3_row(bytes + n * (size + 4), size, out + n * size);
}

// Rows of `row_bytes` bytes to [rows, size]; row n takes the factors of n modulo `num_factors`.
void decode_rotated(const uint8_t* bytes, int64_t rows, int64_t row_bytes, int64_t size, int64_t bits,
                    const float* factors, int64_t num_factors, float* out) {
    for (int64_t n = 0; n < rows; n++) {
        const float* factor = factors + n % num_factors * size;
        if (bits == 4)
            decode_rotated_row<4>(bytes + n * row_bytes, size, factor, out + n * size);
        else
            decode_rotated_row<8>(bytes + n * row_bytes, size, factor, out + n * size);
    }
}

}  // extern "C"
