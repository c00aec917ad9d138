// Products of few rows with a large weight, which is read once, in the order in which it lies in memory.
//
// Layout of a packed weight [outputs, inputs]: panels of PANEL outputs; in each, input by input, PANEL numbers side by
// side. In bf16 a pair of neighbours holds outputs j and j + LANES of the panel, so that one load and two cheap
// operations give two vectors.
#pragma once

#include "team.h"
#include "vectors.h"

namespace draftline {

inline void widen(const uint16_t* w, Floats& low, Floats& high) {
    const Bits pairs = load<Bits>(w);
    low = (Floats)(pairs << 16);
    high = (Floats)(pairs & 0xffff0000u);
}

inline void widen(const float* w, Floats& low, Floats& high) {
    low = load<Floats>(w);
    high = load<Floats>(w + LANES);
}

// What becomes of the products of a panel.
enum Epilogue : int64_t {
    STORE = 0,
    ADD = 1,   // to what the output holds
    GATE = 2,  // silu(low half) * high half: half as many outputs
};

struct Product {
    const float* x;  // [rows, x_stride]
    int64_t x_stride;
    float* y;  // [rows, y_stride]
    int64_t y_stride;
    int64_t inputs;
    int64_t outputs;  // columns of y
    Epilogue epilogue;
};

inline void finish(const Product& p, float* y, int64_t columns, Floats low, Floats high) {
    if (p.epilogue == GATE) low = low / (1.0f + exponential(-max(low, splat(-87.0f)))) * high;
    const int64_t whole = p.epilogue == GATE ? LANES : PANEL;
    float spare[PANEL];
    float* to = columns == whole ? y : spare;
    if (to == spare) std::memcpy(spare, y, columns * sizeof(float));
    if (p.epilogue == ADD) {
        low += load<Floats>(to);
        high += load<Floats>(to + LANES);
    }
    store(to, low);
    if (p.epilogue != GATE) store(to + LANES, high);
    if (to == spare) std::memcpy(y, spare, columns * sizeof(float));
}

// Inputs whose weights are asked for ahead of their use. With few rows the processor does it better by itself.
constexpr int64_t AHEAD = 32;

template <int ROWS, class Weight>
void multiply_rows(const Product& p, const Weight* panel, int64_t row, int64_t column, int64_t columns) {
    const float* x = p.x + row * p.x_stride;
    Floats low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = Floats{};
    for (int64_t i = 0; i < p.inputs; i++) {
        Floats w_low, w_high;
        if constexpr (ROWS > 2) __builtin_prefetch(panel + (i + AHEAD) * PANEL);
        widen(panel + i * PANEL, w_low, w_high);
        for (int r = 0; r < ROWS; r++) {
            const float value = x[r * p.x_stride + i];
            low[r] += w_low * value;
            high[r] += w_high * value;
        }
    }
    for (int r = 0; r < ROWS; r++) finish(p, p.y + (row + r) * p.y_stride + column, columns, low[r], high[r]);
}

template <class Weight, int ROWS = MAX_ROWS>
void multiply_block(const Product& p, const Weight* panel, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    if (rows == ROWS)
        multiply_rows<ROWS, Weight>(p, panel, row, column, columns);
    else if constexpr (ROWS > 1)
        multiply_block<Weight, ROWS - 1>(p, panel, row, rows, column, columns);
}

template <class Weight>
void multiply_packed(Team& team, const Product& p, const Weight* packed, int64_t rows) {
    const int64_t width = p.epilogue == GATE ? LANES : PANEL;
    const int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    team.share((p.outputs + width - 1) / width, [&](int64_t panel) {
        const int64_t column = panel * width, columns = std::min(width, p.outputs - column);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = rows * b / blocks, last = rows * (b + 1) / blocks;
            multiply_block(p, packed + panel * p.inputs * PANEL, first, last - first, column, columns);
        }
    });
}

struct Weight {
    const void* packed;
    int64_t is_bf16;
};

void multiply_all(Team& team, const Product& p, const Weight& weight, int64_t rows) {
    if (weight.is_bf16)
        multiply_packed(team, p, static_cast<const uint16_t*>(weight.packed), rows);
    else
        multiply_packed(team, p, static_cast<const float*>(weight.packed), rows);
}

}  // namespace draftline
