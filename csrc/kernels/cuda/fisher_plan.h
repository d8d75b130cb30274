// Which blocks take which tiles of per-sample gradients, and where a thread's part of a tile lies in the weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fisher_layer.h"
#include "fragments.h"

namespace transferops::cuda {

// Which blocks do what: block (slot, split) of chunk c takes the tiles slot, slot + slots, ..., for split_samples
// samples each and up to `chunk` directions.
struct Plan {
    std::int64_t row_tiles, column_tiles, tiles;
    std::int64_t slots, splits, split_samples;
    std::int64_t chunk, chunks;

    Grid grid() const { return {slots * splits, chunks}; }
};

// In slabs (about 0.4 us).
struct TileCosts {
    double sample;         // of a tile
    double part = 0;       // of a tile's squares, written and read at the rate of the memory, by all multiprocessors
    double direction = 0;  // of a tile, brought to a block at 24 bytes per clock
};

// Weighs the blocks that run at a time against the parts written and read.
inline Plan plan_tiles(std::int64_t groups, std::int64_t row_tiles, std::int64_t column_tiles, std::int64_t samples,
                       std::int64_t most_slots, std::int64_t count, std::int64_t most_chunk, const TileCosts& costs,
                       int multiprocessors) {
    constexpr double kBlockCost = 4;
    constexpr std::int64_t kMostBlocks = 8;  // per multiprocessor
    Plan best{row_tiles, column_tiles, groups * row_tiles * column_tiles, 0, 0, 0, 0, ceil_div(count, most_chunk)};
    best.chunk = ceil_div(count, best.chunks);
    best.slots = std::min(best.tiles, most_slots);
    const std::int64_t turns = ceil_div(best.tiles, best.slots), blocks = best.slots * best.chunks;
    const std::int64_t most = std::clamp<std::int64_t>(kMostBlocks * multiprocessors / blocks, 1, samples);
    const double block_cost = kBlockCost + best.chunk * costs.direction;
    double least = HUGE_VAL;
    for (std::int64_t wanted = 1; wanted <= most; ++wanted) {
        const std::int64_t split_samples = ceil_div(samples, wanted), splits = ceil_div(samples, split_samples);
        const double cost =
            ceil_div(blocks * splits, multiprocessors) * turns * (split_samples * costs.sample + block_cost) +
            (splits > 1 ? costs.part * blocks * splits : 0);
        if (cost < least) {
            least = cost;
            best.splits = splits;
            best.split_samples = split_samples;
        }
    }
    return best;
}

// Where a thread's part of a tile lies: fragment (m, n), half h, element e.
template <class Shape, int kParts = 1>
struct TilePlace {
    std::int64_t group, first_row, first_column;  // of the tile
    int row, column;                              // of the thread in it

    __device__ TilePlace(const Plan& plan, std::int64_t tile)
        : group(tile / plan.column_tiles / plan.row_tiles),
          first_row(tile / plan.column_tiles % plan.row_tiles * Shape::kRows),
          first_column(tile % plan.column_tiles * (kParts * Shape::kColumns)) {
        const int lane = threadIdx.x % kWarp;
        row = Shape::warp_row() + lane / 4;
        column = Shape::warp_column() + lane % 4 * 2;
    }

    // body(m, n, i, index) for accumulator i of fragment (m, n), with its index in the weight, or -1 if it has none.
    template <class Operand, class Body>
    __device__ void for_each(const Gradients<Operand>& x, Body body, int part = 0) const {
#pragma unroll
        for (int n = 0; n < Shape::kFragmentColumns; ++n) for_column(x, n, body, part);
    }

    // The same of one column of fragments.
    template <class Operand, class Body>
    __device__ void for_column(const Gradients<Operand>& x, int n, Body body, int part = 0) const {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const std::int64_t c = first_column + part * Shape::kColumns + column + n * 8 + e;
            const std::int64_t weight_column = c < x.columns() ? x.right.weight_column(c) : -1;
#pragma unroll
            for (int m = 0; m < Shape::kFragmentRows; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const std::int64_t r = first_row + row + m * 16 + h * 8;
                    const bool exists = r < x.rows() && weight_column >= 0;
                    body(m, n, 2 * h + e, exists ? (group * x.rows() + r) * x.columns() + weight_column : -1);
                }
        }
    }
};

}  // namespace transferops::cuda
