// Vectors of f32, and the elements that they are widened from and narrowed to: f32, fp16, bf16.
#pragma once
#include <cstdint>
#include <cstring>
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of bf16 are read as little-endian words"
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PIECE = 16;  // sizes are rounded up to it in scratch memory
constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const void* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}
inline void store(void* to, Floats x) { memcpy(to, &x, sizeof x); }

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

inline Bits load_halves(const void* from) {
    Halves x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Bits);
}

inline Floats widen(const float* x) { return load(x); }
inline Floats widen(const Bf16* x) { return (Floats)(load_halves(x) << 16); }
inline Floats widen(const Fp16* x) {
    const Bits bits = load_halves(x), magnitude = bits & 0x7fff, sign = (bits ^ magnitude) << 16;
    const Floats scaled = (Floats)(magnitude << 13) * 0x1p112f;  // subnormal numbers as well
    return (Floats)((Bits)scaled | sign | (magnitude >= 0x7c00 ? Bits{} + INFINITE : Bits{}));
}

// To the nearest element, ties to even, in the lower bits of each lane.
inline Bits narrow(Floats x, float) { return (Bits)x; }
inline Bits narrow(Floats x, Bf16) {
    const Bits bits = (Bits)x;
    return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : Bits{} + 0x7fc00000) >> 16;
}
inline Bits narrow(Floats x, Fp16) {
    const Bits magnitude = (Bits)x & MAGNITUDE, sign = ((Bits)x ^ magnitude) >> 16;
    const Bits normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
    const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000;
    const Bits finite = magnitude < 0x38800000 ? subnormal : normal;
    const Bits beyond = magnitude > INFINITE ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    return sign | (magnitude >= 0x47800000 ? beyond : finite);
}

// PIECE of them, the last ones of which may be zeros instead of what memory does not hold.
template <class Element>
struct Elements {
    Element x[PIECE] = {};

    Elements(const Element* from, size_t count) {
        if (count == PIECE) memcpy(x, from, sizeof x);
        else memcpy(x, from, count * sizeof(Element));
    }
};

}  // namespace
