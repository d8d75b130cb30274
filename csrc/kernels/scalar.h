// The element types that kernels read, and their conversion to float and double: exact, but from double to float.
//
// The two 16-bit types are bit patterns and nothing more: kernels read them, convert, and compute in float or double.
// Shared by the CPU kernels (g++, clang) and the CUDA kernels (nvcc); includes no CUDA header and no torch header.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define TRANSFEROPS_INLINE __host__ __device__ __forceinline__
#else
#define TRANSFEROPS_INLINE inline __attribute__((always_inline))
#endif

namespace transferops {

struct float16 {  // IEEE 754 binary16
    std::uint16_t bits;
};

struct bfloat16 {  // the upper half of a binary32
    std::uint16_t bits;
};

TRANSFEROPS_INLINE float to_float(float x) { return x; }

TRANSFEROPS_INLINE float to_float(bfloat16 x) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

TRANSFEROPS_INLINE float to_float(float16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    // Only integer selects, so that loops vectorise on any x86-64. No operand is a subnormal float, so that the result
    // does not depend on the flush-to-zero mode and costs no microcode assist: a subnormal half gets the exponent of
    // 2^-14, which is subtracted again.
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t subtrahend = exponent == 0 ? 113u << 23 : 0u;
    const std::uint32_t addend = exponent == 0 ? 113u << 23 : exponent == 31 ? 224u << 23 : 112u << 23;
    const float y = __builtin_bit_cast(float, magnitude + addend) - __builtin_bit_cast(float, subtrahend);
    return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, y) | sign);
#endif
}

TRANSFEROPS_INLINE double to_double(double x) { return x; }

TRANSFEROPS_INLINE double to_double(float x) { return x; }

TRANSFEROPS_INLINE double to_double(float16 x) { return to_float(x); }

TRANSFEROPS_INLINE double to_double(bfloat16 x) { return to_float(x); }

// What inputs of element type T are multiplied in, where that is not double for all.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// x as C, float or double.
template <class C, class T>
TRANSFEROPS_INLINE C convert(T x) {
    if constexpr (std::is_same_v<C, double>)
        return to_double(x);
    else if constexpr (std::is_same_v<T, double>)
        return static_cast<float>(x);
    else
        return to_float(x);
}

}  // namespace transferops
