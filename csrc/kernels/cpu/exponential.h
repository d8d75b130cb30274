// exp of vectors.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace transferops::cpu {

// Coefficients of a polynomial for exp(r), |r| <= h = ln 2 / 2: of the Taylor series, from the highest power down to
// the one above DEGREE, each r^n gives way to the polynomial of lower degree that is nearest to it,
// r^n - T_n(r / h) h^n / 2^(n-1) with Chebyshev's T_n, at an error of h^n / 2^(n-1) / n!.
template <int DEGREE>
constexpr std::array<long double, DEGREE + 1> exp_coefficients() {
    constexpr int kTerms = DEGREE + 6;  // the others are below 2^-50 of an error of DEGREE
    constexpr long double kHalfWidth = 0.34657359027997265470861606072908828L;
    std::array<long double, kTerms + 1> c{1};
    for (std::size_t n = 1; n <= kTerms; ++n) c[n] = c[n - 1] / n;
    for (std::size_t n = kTerms; n > DEGREE; --n) {
        long double next = c[n];
        for (std::size_t j = 0, power = n; power >= 2; ++j, power -= 2) {
            next *= -kHalfWidth * kHalfWidth * (power * (power - 1)) / (4 * (j + 1) * (n - j - 1));
            c[power - 2] -= next;
        }
    }
    std::array<long double, DEGREE + 1> low{};
    for (std::size_t n = 0; n <= DEGREE; ++n) low[n] = c[n];
    return low;
}

// exp(x) = 2^n exp(r) for x <= 0, |r| <= ln 2 / 2: within one unit in the last place, 0 where it would be subnormal for
// all r, NaN for NaN. In two steps: a loop that takes the first for the next vector before the second for its own has
// two chains of dependent instructions at a time, each half as long.
template <class E, int LANES>
struct Exponential {
    using Vector = typename Simd<E, LANES>::Vector;

    Vector r, power;

    __attribute__((always_inline)) static inline Exponential of(const Vector& argument) {
        using Bits = std::conditional_t<kDouble, std::uint64_t, std::uint32_t>;
        using BitVector = typename Simd<Bits, LANES>::Vector;
        // x + kRound has no fraction, and n + the bias of exponents in its last bits.
        constexpr int kMantissa = kDouble ? 52 : 23;
        constexpr E kBias = kDouble ? 1023 : 127;
        constexpr E kRound = E(3) * static_cast<E>(std::uint64_t{1} << (kMantissa - 1)) + kBias;
        constexpr E kLog2High = kDouble ? E(0x1.62e42fefa38p-1) : E(0x1.62ep-1);  // times n is exact
        constexpr E kLog2Low = kDouble ? E(0x1.ef35793c7673p-45) : E(0x1.0bfbe8p-15);
        const Vector lowest = Vector{} + (kDouble ? E(-709) : E(-88));  // n = -kBias, a power of 0
        const Vector x = lowest > argument ? lowest : argument;
        const Vector shifted = x * E(0x1.71547652b82fep+0) + kRound;
        const Vector n = shifted - kRound;
        return {(x - n * kLog2High) - n * kLog2Low, (Vector)((BitVector)shifted << kMantissa)};
    }

    __attribute__((always_inline)) inline Vector value() const {
        constexpr int kDegree = kDouble ? 11 : 6;  // for an error below 2^-57 or 2^-28
        constexpr auto kCoefficients = exp_coefficients<kDegree>();
        Vector sum = Vector{} + static_cast<E>(kCoefficients[kDegree]);
        for (int i = kDegree - 1; i >= 0; --i) sum = sum * r + static_cast<E>(kCoefficients[i]);
        return sum * power;
    }

  private:
    static constexpr bool kDouble = std::is_same_v<E, double>;
};

}  // namespace transferops::cpu
