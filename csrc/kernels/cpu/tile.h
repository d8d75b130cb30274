// The register tile that every product here is made of: C += A^T B over packed panels, with a choice of what is done
// with C while it is still in registers.
//
// A panel holds kPanel neighbouring columns (one cache line) of `depth` rows, row after row, so that the tile reads it
// front to back. Tile shapes are chosen so that the accumulators fill the vector registers and their number covers the
// latency of the fused multiply-add: 3 vectors by 8 columns in 24 of 32 AVX-512 registers, 3 by 4 in 12 of 16 AVX2
// registers.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "lanes.h"

namespace transferops::cpu {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class E>
using AlignedBuffer = std::unique_ptr<E[], AlignedDelete>;

// Room for `size` elements, uninitialised, aligned to a cache line.
template <class E>
AlignedBuffer<E> aligned_buffer(std::int64_t size) {
    return AlignedBuffer<E>(
        static_cast<E*>(::operator new[](static_cast<std::size_t>(size) * sizeof(E), std::align_val_t(64))));
}

constexpr std::int64_t kTilePanels = 3;  // panels of A in a full tile
constexpr std::int64_t kTileRows = 8;    // columns of B in a tile, the rows of C
template <class E>
constexpr std::int64_t kTileColumns = kTilePanels * kPanel<E>;
template <class E>
constexpr std::int64_t kTileArea = kTileRows * kTileColumns<E>;

// c[j][i] = sum_p a[p][i] b[p][j], p < depth, for the columns i of `panels` panels of A, `panel_stride` elements apart,
// and 8 neighbouring columns j of one panel of B.
template <class E>
struct TileOperands {
    std::int64_t depth;
    const E* a;
    std::int64_t panel_stride;
    std::int64_t panels;  // 1 .. kTilePanels
    const E* b;
};

// ROWS rows by VECTORS vectors of the tile, from its row `row` and column `column` on. `finish` gets the sums.
template <class E, int LANES, int VECTORS, int ROWS, class Finish>
__attribute__((always_inline)) inline void part_of_tile(const TileOperands<E>& x, std::int64_t row, std::int64_t column,
                                                        const Finish& finish) {
    using Vectors = Simd<E, LANES>;
    using Vector = typename Vectors::Vector;
    Vector sum[ROWS][VECTORS] = {};
    const E* source[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const std::int64_t first = column + v * LANES;
        source[v] = x.a + first / kPanel<E> * x.panel_stride + first % kPanel<E>;
    }
    const E* b = x.b + row;
    for (std::int64_t p = 0; p < x.depth; ++p) {
        Vector left[VECTORS];
        for (int v = 0; v < VECTORS; ++v) left[v] = Vectors::load(source[v] + p * kPanel<E>);
        for (int j = 0; j < ROWS; ++j) {
            const E right = b[p * kPanel<E> + j];
            for (int v = 0; v < VECTORS; ++v) sum[j][v] += left[v] * right;
        }
    }
    finish.template apply<LANES, VECTORS, ROWS>(sum, row, column);
}

// Registers are few: all rows of one panel, a pair of rows at a time.
template <class E, class Finish>
void tile_baseline(const TileOperands<E>& x, const Finish& finish) {
    constexpr int kLanes = kPanel<E> / 4;
    for (std::int64_t i = 0; i < x.panels * kPanel<E>; i += kPanel<E>)
        for (std::int64_t j = 0; j < kTileRows; j += 2) part_of_tile<E, kLanes, 4, 2>(x, j, i, finish);
}

#ifdef TRANSFEROPS_X86_64
template <class E, class Finish>
TRANSFEROPS_TARGET_V3 void tile_v3(const TileOperands<E>& x, const Finish& finish) {
    constexpr int kLanes = kPanel<E> / 2;
    if (x.panels == kTilePanels) {
        for (std::int64_t i = 0; i < kTileColumns<E>; i += 3 * kLanes)
            for (std::int64_t j = 0; j < kTileRows; j += 4) part_of_tile<E, kLanes, 3, 4>(x, j, i, finish);
        return;
    }
    for (std::int64_t i = 0; i < x.panels * kPanel<E>; i += kPanel<E>)
        for (std::int64_t j = 0; j < kTileRows; j += 4) part_of_tile<E, kLanes, 2, 4>(x, j, i, finish);
}

template <class E, class Finish>
TRANSFEROPS_TARGET_V4 void tile_v4(const TileOperands<E>& x, const Finish& finish) {
    constexpr int kLanes = kPanel<E>;
    if (x.panels == 3) return part_of_tile<E, kLanes, 3, 8>(x, 0, 0, finish);
    if (x.panels == 2) return part_of_tile<E, kLanes, 2, 8>(x, 0, 0, finish);
    part_of_tile<E, kLanes, 1, 8>(x, 0, 0, finish);
}
#endif

template <class E, class Finish>
void multiply_tile(Level level, const TileOperands<E>& x, const Finish& finish) {
#ifdef TRANSFEROPS_X86_64
    if (level == Level::kV4) return tile_v4(x, finish);
    if (level == Level::kV3) return tile_v3(x, finish);
#endif
    (void)level;
    tile_baseline(x, finish);
}

// What to do with a tile. Tiles in memory are row-major [kTileRows][kTileColumns].

// tile = c, whose rows may lie further apart
template <class E>
struct StoreTile {
    E* tile;
    std::int64_t row_stride = kTileColumns<E>;

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        for (int j = 0; j < ROWS; ++j)
            for (int v = 0; v < VECTORS; ++v)
                Vectors::at(tile + (row + j) * row_stride + column + v * LANES) = sum[j][v];
    }
};

// tile += c, likewise
template <class E>
struct AddTile {
    E* tile;
    std::int64_t row_stride = kTileColumns<E>;

    template <int LANES, int VECTORS, int ROWS>
    __attribute__((always_inline)) inline void apply(const typename Simd<E, LANES>::Vector (&sum)[ROWS][VECTORS],
                                                     std::int64_t row, std::int64_t column) const {
        using Vectors = Simd<E, LANES>;
        for (int j = 0; j < ROWS; ++j)
            for (int v = 0; v < VECTORS; ++v)
                Vectors::at(tile + (row + j) * row_stride + column + v * LANES) += sum[j][v];
    }
};

}  // namespace transferops::cpu
