// The inner kernel of the float64 Gram: a register tile of C += A^T B over packed panels.
//
// A panel holds kPanel neighbouring columns of `depth` rows, row after row, so that the tile reads it front to back.
// Tile shapes are chosen so that the accumulators fill the vector registers and their number covers the latency of the
// fused multiply-add: 24x8 in 24 of 32 AVX-512 registers, 8x4 in 8 of 16 AVX2 registers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace transferops::cpu {

constexpr std::int64_t kPanel = 8;       // columns in a packed panel
constexpr std::int64_t kTile = 24;       // columns of A in a tile: three panels
constexpr std::int64_t kTileArea = kTile * kPanel;

// tile[j][i] = sum_p a[p][i] b[p][j] for the 24 columns i of A and 8 columns j of B, p < depth.
// a: three panels, panel_stride doubles apart; b: one panel. tile: row-major [8][24], overwritten.
using TileKernel = void (*)(std::int64_t depth, const double* a, std::int64_t panel_stride, const double* b,
                            double* tile);

// LANES doubles a vector, VECTORS vectors of A at a time, COLUMNS columns of B at a time.
template <int LANES, int VECTORS, int COLUMNS>
__attribute__((always_inline)) inline void tile_product(std::int64_t depth, const double* a, std::int64_t panel_stride,
                                                        const double* b, double* tile) {
    typedef double Vector __attribute__((vector_size(LANES * sizeof(double)), aligned(8)));
    constexpr int kWidth = VECTORS * LANES;
    static_assert(kTile % kWidth == 0 && kPanel % COLUMNS == 0 && kPanel % LANES == 0);
    for (std::int64_t i = 0; i < kTile; i += kWidth) {
        for (std::int64_t j = 0; j < kPanel; j += COLUMNS) {
            Vector sum[COLUMNS][VECTORS] = {};
            const double* source[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const std::int64_t column = i + v * LANES;
                source[v] = a + column / kPanel * panel_stride + column % kPanel;
            }
            for (std::int64_t p = 0; p < depth; ++p) {
                Vector left[VECTORS];
                for (int v = 0; v < VECTORS; ++v)
                    left[v] = *reinterpret_cast<const Vector*>(source[v] + p * kPanel);
                for (int column = 0; column < COLUMNS; ++column) {
                    const double right = b[p * kPanel + j + column];
                    for (int v = 0; v < VECTORS; ++v) sum[column][v] += left[v] * right;
                }
            }
            for (int column = 0; column < COLUMNS; ++column)
                for (int v = 0; v < VECTORS; ++v)
                    *reinterpret_cast<Vector*>(tile + (j + column) * kTile + i + v * LANES) = sum[column][v];
        }
    }
}

inline void tile_baseline(std::int64_t depth, const double* a, std::int64_t panel_stride, const double* b,
                          double* tile) {
    tile_product<2, 4, 4>(depth, a, panel_stride, b, tile);
}

#ifdef TRANSFEROPS_X86_64
TRANSFEROPS_TARGET_V3 inline void tile_v3(std::int64_t depth, const double* a, std::int64_t panel_stride,
                                          const double* b, double* tile) {
    tile_product<4, 3, 4>(depth, a, panel_stride, b, tile);
}

TRANSFEROPS_TARGET_V4 inline void tile_v4(std::int64_t depth, const double* a, std::int64_t panel_stride,
                                          const double* b, double* tile) {
    tile_product<8, 3, 8>(depth, a, panel_stride, b, tile);
}
#endif

inline TileKernel tile_kernel(Level level) {
#ifdef TRANSFEROPS_X86_64
    if (level == Level::kV4) return tile_v4;
    if (level == Level::kV3) return tile_v3;
#endif
    (void)level;
    return tile_baseline;
}

}  // namespace transferops::cpu
