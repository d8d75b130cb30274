// Tiles of symmetric matrices: how they are cut, planned, streamed and written. The output is cut into tiles as wide as
// high or half as wide, of which those that reach above the diagonal are computed, one block each; where they are too
// few for the device, the reduction is split between blocks too, and a second kernel adds the splits in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "device.h"
#include "fragments.h"

namespace transferops::cuda {

using SquareTile = TileShape<double, 128, 128>;
using TallTile = TileShape<double, 256, 128>;

// The place of a tile that reaches above the diagonal: they are counted down the columns.
template <class Shape>
struct UpperTile {
    static constexpr int kRatio = Shape::kRows / Shape::kColumns;
    static_assert(Shape::kRows == kRatio * Shape::kColumns && (kRatio == 1 || kRatio == 2));

    int row, column;

    __device__ explicit UpperTile(std::int64_t tile) : column(static_cast<int>(sqrt(2.0 * kRatio * tile))) {
        while (tiles_before(column) > tile) --column;  // the root is about right
        while (tiles_before(column + 1) <= tile) ++column;
        row = static_cast<int>(tile - tiles_before(column));
    }

    // A column has column / kRatio + 1 of them.
    __host__ __device__ static std::int64_t tiles_before(std::int64_t column) {
        return kRatio == 1 ? column * (column + 1) / 2 : (column + 1) * (column + 1) / 4;
    }
};

struct GramPlan {
    std::int64_t size, tiles;  // of the matrix, of its upper triangle
    int splits, slabs;         // of the reduction, of each split

    template <class Shape>
    std::int64_t workspace(std::int64_t sets) const {
        return splits > 1 ? sets * tiles * splits * Shape::kElements : 0;
    }
};

// Weighs the blocks that run at a time against the partial tiles written and read. `slab_cost` is what a slab of
// `slab_depth` of the reduction takes, in units of one of 16 in float64 at the peak rate (2 * 128 * 128 * 16 / (67e12 /
// 132) s, about a microsecond). A split is of at most `most_slabs`.
template <class Shape>
GramPlan plan_gram(std::int64_t sets, std::int64_t size, std::int64_t depth, int slab_depth, double slab_cost,
                   int multiprocessors, std::int64_t most_slabs = INT_MAX) {
    constexpr double kBlockCost = 2, kPassCost = 3;                                   // start and end, another launch
    constexpr double kPartialCost = 0.06 * Shape::kElements / SquareTile::kElements;  // 2 x 128 KiB
    constexpr std::int64_t kMostPartials = 8 * std::int64_t{SquareTile::kElements} / Shape::kElements;  // 138 MB on 132
    const std::int64_t tiles = UpperTile<Shape>::tiles_before(ceil_div(size, Shape::kColumns));
    const std::int64_t slabs = ceil_div(depth, slab_depth),
                       least_splits = std::max<std::int64_t>(ceil_div(slabs, most_slabs), 1);
    GramPlan best{size, tiles, 1, static_cast<int>(slabs)};
    double least = HUGE_VAL;
    const std::int64_t most = kMostPartials * multiprocessors / std::max<std::int64_t>(sets * tiles, 1);
    for (std::int64_t wanted = least_splits; wanted <= std::max(std::min(most, slabs), least_splits); ++wanted) {
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

// What a block computes: slabs [begin, end) of a tile of a set. Tiles run fastest: blocks that run together read the
// same part of the features.
template <class Shape>
struct GramBlock {
    UpperTile<Shape> tile;
    std::int64_t set;
    int begin, end;

    __device__ GramBlock(const GramPlan& plan, std::int64_t slabs)
        : tile(blockIdx.x % plan.tiles),
          set(blockIdx.x / plan.tiles / plan.splits),
          begin(static_cast<int>(blockIdx.x / plan.tiles % plan.splits) * plan.slabs),
          end(static_cast<int>(min(std::int64_t{begin} + plan.slabs, slabs))) {}

    // Of the left operand's or the right operand's columns.
    __device__ std::int64_t first(int operand) const {
        return operand == 0 ? std::int64_t{tile.row} * Shape::kRows : std::int64_t{tile.column} * Shape::kColumns;
    }
};

// Where a thread's accumulators lie: fragment (m, n), half h, as mma_f64 leaves them.
template <class Shape>
struct ThreadPlace {
    int row = Shape::warp_row(), column = Shape::warp_column();
    int group = threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
};

// body(m, n, h) for all pairs of a thread's accumulators.
template <class Shape, class Body>
__device__ void for_each_pair(Body body) {
#pragma unroll
    for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
        for (int n = 0; n < Shape::kFragmentColumns; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) body(m, n, h);
}

// Writes two neighbours of the upper triangle, and their mirror image. Each half is 64 contiguous bytes for some lanes.
template <class Shape>
__device__ void write_symmetric(double* gram, std::int64_t size, const UpperTile<Shape>& tile, int m, int n, int h,
                                const double (&pair)[2]) {
    const ThreadPlace<Shape> thread;
    const std::int64_t row = std::int64_t{tile.row} * Shape::kRows + thread.row + m * 16 + h * 8 + thread.group;
    const std::int64_t column = std::int64_t{tile.column} * Shape::kColumns + thread.column + n * 8 + thread.member * 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (row <= column + e && column + e < size) {
            gram[row * size + column + e] = pair[e];
            gram[(column + e) * size + row] = pair[e];
        }
    }
}

// Tiles are kept in the order of the accumulators: neighbouring threads write neighbouring pairs.
template <class Shape, class C>
__device__ C* own_pair(C* tiles, std::int64_t tile, int m, int n, int h) {
    const int fragment = m * Shape::kFragmentColumns + n;
    return tiles + tile * Shape::kElements + ((fragment * 2 + h) * kTileThreads + threadIdx.x) * 2;
}

// Writes the block's tile: its part of it, or the matrix where it is not split. pair_at(m, n, h, double (&)[2]).
template <class Shape, class PairAt>
__device__ void write_tile(const GramPlan& plan, const GramBlock<Shape>& block, double* gram, double* partials,
                           PairAt pair_at) {
    for_each_pair<Shape>([&](int m, int n, int h) {
        double pair[2];
        pair_at(m, n, h, pair);
        if (plan.splits > 1)
            store_vector(own_pair<Shape>(partials, blockIdx.x, m, n, h), pair, 2, true);
        else
            write_symmetric(gram + block.set * plan.size * plan.size, plan.size, block.tile, m, n, h, pair);
    });
}

// Adds the splits, if the plan has several, of square or of tall tiles.
cudaError_t finish_gram(double* gram, double* partials, std::int64_t sets, const GramPlan& plan, bool tall,
                        cudaStream_t stream);

}  // namespace transferops::cuda
