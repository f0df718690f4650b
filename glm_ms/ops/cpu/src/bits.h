// Conversions of single numbers by their bits, without intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

namespace glm {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// float16 (IEEE half) to float, exact; a signalling NaN becomes quiet, as in hardware.
inline float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        float value = (float)fraction * 5.9604644775390625e-8f;
        return float_of_bits(sign | bits_of_float(value));
    }
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace glm
