// Products of rows that lie contiguous in memory: sums in lanes along the rows, so that nothing is packed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace transferops::cpu {

// products[k * pitch + l] = sum_i left[k][i] right[l][i], i < length; of rows with themselves (left == right) only l >=
// k, and perhaps more. By tiles of 4 by 4 rows (4 by 2 where registers are few), then what is left by twos and ones. A
// product is summed in the same order, in whatever company.
template <class E>
struct RowProducts {
    const E* const* left;
    std::int64_t left_rows;
    const E* const* right;
    std::int64_t right_rows;
    std::int64_t length;
    E* products;
    std::int64_t pitch;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        constexpr int kMost = LANES == kPanel<E> ? 4 : 2;
        const auto step = [](std::int64_t rows) { return rows >= 4 ? 4 : rows >= 2 ? 2 : 1; };
        for (std::int64_t k = 0, height; k < left_rows; k += height) {
            height = step(left_rows - k);
            for (std::int64_t l = left == right ? k : 0, width; l < right_rows; l += width) {
                width = std::min(step(right_rows - l), kMost);
                switch (height * 8 + width) {
                    case 4 * 8 + 4:
                        tile<LANES, 4, kMost>(k, l);
                        break;
                    case 4 * 8 + 2:
                        tile<LANES, 4, 2>(k, l);
                        break;
                    case 4 * 8 + 1:
                        tile<LANES, 4, 1>(k, l);
                        break;
                    case 2 * 8 + 4:
                        tile<LANES, 2, kMost>(k, l);
                        break;
                    case 2 * 8 + 2:
                        tile<LANES, 2, 2>(k, l);
                        break;
                    case 2 * 8 + 1:
                        tile<LANES, 2, 1>(k, l);
                        break;
                    case 1 * 8 + 4:
                        tile<LANES, 1, kMost>(k, l);
                        break;
                    case 1 * 8 + 2:
                        tile<LANES, 1, 2>(k, l);
                        break;
                    default:
                        tile<LANES, 1, 1>(k, l);
                }
            }
        }
    }

  private:
    template <int LANES, int K, int L>
    __attribute__((always_inline)) inline void tile(std::int64_t first, std::int64_t second) const {
        using Vectors = Simd<E, LANES>;
        using Vector = typename Vectors::Vector;
        const E *a[K], *b[L];
        for (int k = 0; k < K; ++k) a[k] = left[first + k];
        for (int l = 0; l < L; ++l) b[l] = right[second + l];
        Vector sum[K][L] = {};
        std::int64_t i = 0;
        for (; i + LANES <= length; i += LANES) {
            Vector other[L];
            for (int l = 0; l < L; ++l) other[l] = Vectors::load(b[l] + i);
            for (int k = 0; k < K; ++k) {
                const Vector own = Vectors::load(a[k] + i);
                for (int l = 0; l < L; ++l) sum[k][l] += own * other[l];
            }
        }
        for (int k = 0; k < K; ++k)
            for (int l = 0; l < L; ++l) {
                E total = sum_of_lanes<E, LANES>(sum[k][l]);
                for (std::int64_t rest = i; rest < length; ++rest) total += a[k][rest] * b[l][rest];
                products[(first + k) * pitch + second + l] = total;
            }
    }
};

}  // namespace transferops::cpu
