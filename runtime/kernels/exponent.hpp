// 2^x for vectors of any number of lanes: what the softmax of both attentions is made of.
#pragma once

namespace {

// For x <= 0: 0 below 2^-126, NaN for NaN. Relative error 1e-7. Bits: of the lanes of Floats.
template <class Bits, class Floats>
inline Floats power_of_two(Floats x) {
    constexpr float SHIFT = 3 << 22;  // a float of this size keeps no fraction: adding it rounds
    const Floats shifted = x + SHIFT, f = x - (shifted - SHIFT);
    Floats p = f * 0.000153533605f + 0.0013398875f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    const Floats power = (Floats)((Bits)p + ((Bits)shifted << 23));
    return x < -126.0f ? Floats{} : x == x ? power : x;
}

}  // namespace
