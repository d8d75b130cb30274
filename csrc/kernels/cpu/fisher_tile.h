// What the Fisher kernels do with a tile of a per-sample gradient while it is in registers.
#pragma once

#include <algorithm>

#include "tile.h"

namespace transferops::cpu {

constexpr std::int64_t kPositions = 512;         // summed in one run: three panels of A are 96 KiB, in L2
constexpr std::int64_t kSlabElements = 1 << 20;  // held for all tasks at a time, in L3

// Where the 8 columns of row tile j begin in consecutive panels of `depth` rows.
template <class C>
std::int64_t row_tile_offset(std::int64_t j, std::int64_t depth) {
    const std::int64_t first = j * kTileRows;
    return first / kPanel<C> * depth * kPanel<C> + first % kPanel<C>;
}

// Adds LANES partial sums to as many of kPanel float64 accumulators.
template <class E, int LANES>
__attribute__((always_inline)) inline void add_lanes(const typename Simd<E, LANES>::Vector& sum, double* lanes) {
    using Wide = Simd<double, LANES>;
    Wide::at(lanes) += __builtin_convertvector(sum, typename Wide::Vector);
}

// total += c * c, with c continued from `start` if there is one: the diagonal.
template <class E>
struct SquareTile {
    E* total;
    const E* start;

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        for (int j = 0; j < ROWS; ++j)
            for (int v = 0; v < VECTORS; ++v) {
                const std::int64_t offset = (row + j) * kTileColumns<E> + column + v * LANES;
                const typename Vectors::Vector c = start ? sum[j][v] + Vectors::load(start + offset) : sum[j][v];
                Vectors::at(total + offset) += c * c;
            }
    }
};

// lanes += c * c, with c continued from `start` if there is one: the squared norm.
template <class E>
struct NormTile {
    const E* start;
    double* lanes;  // [kPanel]

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        typename Vectors::Vector total[VECTORS] = {};
        for (int j = 0; j < ROWS; ++j)
            for (int v = 0; v < VECTORS; ++v) {
                const std::int64_t offset = (row + j) * kTileColumns<E> + column + v * LANES;
                const typename Vectors::Vector c = start ? sum[j][v] + Vectors::load(start + offset) : sum[j][v];
                total[v] += c * c;
            }
        for (int v = 1; v < VECTORS; ++v) total[0] += total[v];
        add_lanes<E, LANES>(total[0], lanes);
    }
};

// lanes[k] += c * direction_k for `count` tiles one after the other: the projections.
template <class E>
struct DotTile {
    const E* directions;
    std::int64_t count;
    double* lanes;  // [count][kPanel]

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        for (std::int64_t k = 0; k < count; ++k) {
            const E* direction = directions + k * kTileArea<E> + row * kTileColumns<E> + column;
            typename Vectors::Vector total[VECTORS] = {};
            for (int j = 0; j < ROWS; ++j)
                for (int v = 0; v < VECTORS; ++v)
                    total[v] += sum[j][v] * Vectors::load(direction + j * kTileColumns<E> + v * LANES);
            for (int v = 1; v < VECTORS; ++v) total[0] += total[v];
            add_lanes<E, LANES>(total[0], lanes + k * kPanel<E>);
        }
    }
};

// lanes[j] += c[j] * other[j] for the rows j, with rows of `other` in panels `panel_stride` elements apart.
template <class E>
struct RowDotTile {
    const E* other;
    std::int64_t panel_stride;
    E* lanes;  // [kTileRows][kPanel]

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        for (int j = 0; j < ROWS; ++j) {
            auto& total = Vectors::at(lanes + (row + j) * kPanel<E>);
            for (int v = 0; v < VECTORS; ++v) {
                const std::int64_t first = column + v * LANES;
                const E* source = other + first / kPanel<E> * panel_stride + first % kPanel<E> + (row + j) * kPanel<E>;
                total += sum[j][v] * Vectors::load(source);
            }
        }
    }
};

}  // namespace transferops::cpu
