// Rows of the hidden-state cache back to fp32: 8-bit floats, and 4- or 8-bit integers after a Hadamard rotation.
//
// Bit for bit what draftline/cache/codecs.py makes of them with torch. Each call uses one thread: readers have several.
#pragma once

#include "vectors.h"

namespace draftline {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr int64_t GROUP = 64;
constexpr int64_t GROUP_VECTORS = GROUP / LANES;

// The numbers of e4m3fn codes (4 bits of exponent, 3 of mantissa, no infinities).
inline Floats e4m3_values(Bytes codes) {
    const Bits wide = __builtin_convertvector(codes, Bits);
    const Bits magnitude = (wide & 0x7f) << 20;
    const Floats normal = (Floats)(magnitude + (120u << 23));
    const Floats subnormal = (Floats)(magnitude + (121u << 23)) - 0.015625f;
    const Bits value = (Bits)(magnitude < (1u << 23) ? subnormal : normal);
    const Bits number = (wide & 0x7f) == 0x7f ? value | 0x7fc00000u : value;
    return (Floats)(number | ((wide & 0x80) << 24));
}

inline void decode_e4m3_row(const uint8_t* row, int64_t size, float* out) {
    float scale;
    std::memcpy(&scale, row + size, 4);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, e4m3_values(load<Bytes>(row + i)) * scale);
    if (i < size) {
        uint8_t codes[LANES] = {};
        float values[LANES];
        std::memcpy(codes, row + i, size - i);
        store(values, e4m3_values(load<Bytes>(codes)) * scale);
        std::memcpy(out + i, values, 4 * (size - i));
    }
}

// The lanes whose numbers differ in one bit, exchanged.
template <int64_t WIDTH>
inline Floats exchanged(Floats v) {
#if defined(__clang__)
    Floats result;
    for (int64_t lane = 0; lane < LANES; lane++) result[lane] = v[lane ^ WIDTH];
    return result;
#else
    Ints from;
    for (int64_t lane = 0; lane < LANES; lane++) from[lane] = lane ^ WIDTH;
    return __builtin_shuffle(v, from);
#endif
}

template <int64_t WIDTH>
inline void butterfly_in_lanes(Floats (&v)[GROUP_VECTORS]) {
    if constexpr (WIDTH < LANES) {
        Floats sign;
        for (int64_t lane = 0; lane < LANES; lane++) sign[lane] = lane & WIDTH ? -1.0f : 1.0f;
        for (Floats& x : v) x = exchanged<WIDTH>(x) + x * sign;
        butterfly_in_lanes<2 * WIDTH>(v);
    }
}

// Times Sylvester's matrix of order 64, by the fast transform. The codes are half-integers, so every sum is exact.
inline void hadamard(Floats (&v)[GROUP_VECTORS]) {
    butterfly_in_lanes<1>(v);
    for (int64_t width = 1; width < GROUP_VECTORS; width *= 2)
        for (int64_t i = 0; i < GROUP_VECTORS; i++)
            if (!(i & width)) {
                const Floats low = v[i], high = v[i + width];
                v[i] = low + high;
                v[i + width] = low - high;
            }
}

// Half-integers of a group. With 4 bits value i is in the low half of byte i, value i + 32 in the high one.
template <int BITS>
inline void read_codes(const uint8_t* from, Floats (&v)[GROUP_VECTORS]) {
    const float middle = (1 << (BITS - 1)) - 0.5f;
    if constexpr (BITS == 8) {
        for (int64_t i = 0; i < GROUP_VECTORS; i++)
            v[i] = __builtin_convertvector(load<Bytes>(from + i * LANES), Floats) - middle;
    } else {
        for (int64_t i = 0; i < GROUP_VECTORS / 2; i++) {
            const Bytes pair = load<Bytes>(from + i * LANES);
            v[i] = __builtin_convertvector(pair & 15, Floats) - middle;
            v[i + GROUP_VECTORS / 2] = __builtin_convertvector(pair >> 4, Floats) - middle;
        }
    }
}

// One vector: codes of whole groups, then a bf16 scale for each group. `factor` undoes signs and channel scales.
template <int BITS>
inline void decode_rotated_row(const uint8_t* row, int64_t size, const float* factor, float* out) {
    const int64_t groups = (size + GROUP - 1) / GROUP, code_bytes = GROUP * BITS / 8;
    for (int64_t g = 0; g < groups; g++) {
        uint16_t upper;
        std::memcpy(&upper, row + groups * code_bytes + 2 * g, 2);
        const uint32_t bits = static_cast<uint32_t>(upper) << 16;
        float scale;
        std::memcpy(&scale, &bits, 4);
        scale *= 0.125f;  // 1 / sqrt(64): the rotation is orthonormal.
        Floats v[GROUP_VECTORS];
        read_codes<BITS>(row + g * code_bytes, v);
        hadamard(v);
        const int64_t first = g * GROUP;
        for (int64_t i = 0; i < GROUP_VECTORS; i++) {
            const int64_t at = first + i * LANES, left = size - at;
            if (left >= LANES) {
                store(out + at, v[i] * scale * load<Floats>(factor + at));
            } else {
                float values[LANES];
                store(values, v[i] * scale);
                for (int64_t j = 0; j < left; j++) out[at + j] = values[j] * factor[at + j];
            }
        }
    }
}

}  // namespace draftline
