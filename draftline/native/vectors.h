// Vectors in the notation of GCC and Clang (`vector_size`): no intrinsics, -march=native decides the instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace draftline {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int64_t MAX_ROWS = 8;
#else
constexpr int64_t LANES = 8;
constexpr int64_t MAX_ROWS = 4;
#endif
constexpr int64_t PANEL = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <class Vector>
inline Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats splat(float value) { return value - Floats{}; }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// The sum of a vector's lanes, by halves.
inline float sum(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// e^x to about one unit in the last place, for x <= 88; below -87 it gives e^-87. Cephes' polynomial.
inline Floats exponential(Floats x) {
    x = max(x, splat(-87.0f));
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer.
    const Floats n = (x * 1.44269504088896341f + shift) - shift;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

}  // namespace draftline
