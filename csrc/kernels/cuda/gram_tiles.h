// Tiles of symmetric matrices: how they are cut, planned and written. The output is cut into square tiles, of which
// those on and above the diagonal are computed, one block each; where they are too few for the device, the reduction is
// split between blocks too, and a second kernel adds the splits in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "device.h"

namespace transferops::cuda {

constexpr int kTile = 128;
constexpr int kGramThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32;  // of the tile: two warps down, four across
constexpr int kFragmentRows = kWarpRows / 16, kFragmentColumns = kWarpColumns / 8;  // blocks of mma_f64 in those

struct GramPlan {
    std::int64_t size, tiles;  // of the matrix, of its upper triangle
    int splits, slabs;         // of the reduction, of each split

    std::int64_t workspace(std::int64_t sets) const { return splits > 1 ? sets * tiles * splits * kTile * kTile : 0; }
};

// Weighs the blocks that run at a time against the partial tiles written and read. `slab_cost` is what a slab of
// `slab_depth` of the reduction takes, in units of one of 16 in float64 at the peak rate (2 * 128 * 128 * 16 / (67e12 /
// 132) s, about a microsecond).
inline GramPlan plan_gram(std::int64_t sets, std::int64_t size, std::int64_t depth, int slab_depth, double slab_cost,
                          int multiprocessors) {
    constexpr double kBlockCost = 2, kPassCost = 3, kPartialCost = 0.06;  // start and end, another launch, 2 x 128 KiB
    constexpr std::int64_t kMostPartials = 8;                             // per multiprocessor: 138 MB on 132
    const std::int64_t edge = ceil_div(size, kTile), tiles = edge * (edge + 1) / 2, slabs = ceil_div(depth, slab_depth);
    GramPlan best{size, tiles, 1, static_cast<int>(slabs)};
    double least = HUGE_VAL;
    const std::int64_t most = kMostPartials * multiprocessors / std::max<std::int64_t>(sets * tiles, 1);
    for (std::int64_t wanted = 1; wanted <= std::max<std::int64_t>(std::min(most, slabs), 1); ++wanted) {
        const std::int64_t length = ceil_div(slabs, wanted);                   // of a split
        const std::int64_t splits = length > 0 ? ceil_div(slabs, length) : 1;  // none of them empty
        const std::int64_t blocks = sets * tiles * splits;
        double cost = ceil_div(blocks, multiprocessors) * (length * slab_cost + kBlockCost);
        if (splits > 1) cost += kPassCost + kPartialCost * blocks;
        if (cost < least) {
            least = cost;
            best.splits = static_cast<int>(splits);
            best.slabs = static_cast<int>(length);
        }
    }
    return best;
}

// The place of an upper-triangular tile: tiles are counted down the columns, t = column (column + 1) / 2 + row.
struct UpperTile {
    int row, column;

    __device__ explicit UpperTile(std::int64_t tile) : column(static_cast<int>((sqrt(8.0 * tile + 1) - 1) / 2)) {
        while (tiles_before(column) > tile) --column;  // the root is rounded
        while (tiles_before(column + 1) <= tile) ++column;
        row = static_cast<int>(tile - tiles_before(column));
    }

    __device__ static std::int64_t tiles_before(std::int64_t column) { return column * (column + 1) / 2; }
};

// Where a thread's accumulators lie: fragment (m, n), half h, as mma_f64 leaves them.
struct ThreadPlace {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int row = warp % (kTile / kWarpRows) * kWarpRows, column = warp / (kTile / kWarpRows) * kWarpColumns;
    int group = lane / 4, member = lane % 4;
};

// Writes two neighbours of the upper triangle, and their mirror image. Each half is 64 contiguous bytes for some lanes.
__device__ inline void write_symmetric(double* gram, std::int64_t size, const UpperTile& tile,
                                       const ThreadPlace& thread, int m, int n, int h, const double (&pair)[2]) {
    const std::int64_t row = std::int64_t{tile.row} * kTile + thread.row + m * 16 + h * 8 + thread.group;
    const std::int64_t column = std::int64_t{tile.column} * kTile + thread.column + n * 8 + thread.member * 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (row <= column + e && column + e < size) {
            gram[row * size + column + e] = pair[e];
            gram[(column + e) * size + row] = pair[e];
        }
    }
}

// Partial tiles are kept in the order of the accumulators: neighbouring threads write neighbouring pairs.
__device__ inline double* partial_pair(double* partials, std::int64_t tile, int m, int n, int h) {
    return partials + tile * kTile * kTile + (((m * kFragmentColumns + n) * 2 + h) * kGramThreads + threadIdx.x) * 2;
}

// Adds the splits, if the plan has several.
cudaError_t finish_gram(double* gram, double* partials, std::int64_t sets, const GramPlan& plan, cudaStream_t stream);

}  // namespace transferops::cuda
