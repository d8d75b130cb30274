// The projection at very few positions: the directions applied to the output gradients, tile by tile.
#pragma once

#include <algorithm>
#include <vector>

#include "fisher.h"
#include "fisher_grid.h"

namespace transferops::cpu {

// A task packs columns of a direction for all positions of a slab; for fewer, but not less than kLeastPositions, where
// there would be less than kProducts tasks.
constexpr std::int64_t kLeastPositions = 64, kProducts = 16;

// Multiplications per weight: the tile takes one for each position and, with what it costs to leave the registers,
// about two for each direction; contraction takes one for each position and direction. Measured so for 128 to 1024 rows
// and columns and 1 to 50 directions, of a contraction that was up to a fifth slower: it is level at 2 to 3 positions,
// 4 with two directions. With one direction contraction stays ahead, by less than 15 % from 16 positions on; tiles then
// need no table of all samples' positions.
inline bool contraction_is_cheaper(std::int64_t positions, std::int64_t directions) {
    return positions <= 16 && positions * directions <= positions + 2 * directions;
}

// sums[n][k] += sum_t a_nt . (D_k^T b_nt), for positions of all samples together: tiles of D_k^T b, each dotted with a.
template <class C, class S, class T>
void contract(const Operand<S>& a, const Operand<T>& b, const LayerShape& shape, Directions<C> directions, C* out,
              const ParallelFor& parallel_for) {
    const Grid<C> grid(shape);
    const Level level = cpu_level();
    const auto count = static_cast<std::int64_t>(directions.size());
    const std::int64_t all_positions = shape.samples * shape.positions;
    std::vector<std::int64_t> row_offset(static_cast<std::size_t>(grid.rows));
    for (std::int64_t row = 0; row < grid.rows; ++row) row_offset[row] = row * grid.columns;

    // Of a slab of positions: panels of a, [group][column panel][position][kPanel], and of b,
    // [position panel][group][row][kPanel].
    const std::int64_t a_columns = grid.groups * grid.column_panels() * kPanel<C>, b_rows = grid.groups * grid.rows;
    const std::int64_t fit = kSlabElements / (a_columns + b_rows) / kPanel<C> * kPanel<C>;
    const std::int64_t slab = std::min(std::max(fit, kPanel<C>), ceil_div(all_positions, kPanel<C>) * kPanel<C>);
    const auto packed_a = aligned_buffer<C>(slab * a_columns), packed_b = aligned_buffer<C>(slab * b_rows);
    // A task packs 3 panels of a direction for a chunk of the slab, all of it unless there were too few tasks.
    const std::int64_t per_chunk = count * grid.groups * grid.column_tiles();
    const std::int64_t chunk =
        std::clamp(slab * per_chunk / kProducts / kPanel<C> * kPanel<C>, std::min(kLeastPositions, slab), slab);
    std::vector<double> total(static_cast<std::size_t>(shape.samples * count), 0.0);
    for (std::int64_t begin = 0; begin < all_positions; begin += slab) {
        const std::int64_t positions = std::min(slab, all_positions - begin);
        parallel_for(grid.groups * grid.column_panels(), [&](std::int64_t index) {
            const std::int64_t group = index / grid.column_panels();
            const std::int64_t column = index % grid.column_panels() * kPanel<C>;
            pack_panel(a.data, a.positions.data() + begin, positions, a.columns.data() + group * grid.columns + column,
                       std::min(kPanel<C>, grid.columns - column), packed_a.get() + index * slab * kPanel<C>);
        });
        parallel_for(ceil_div(positions, kPanel<C>), [&](std::int64_t panel) {
            const std::int64_t first = begin + panel * kPanel<C>;
            pack_panel(b.data, b.columns.data(), b_rows, b.positions.data() + first,
                       std::min(kPanel<C>, all_positions - first), packed_b.get() + panel * b_rows * kPanel<C>);
        });
        const std::int64_t chunks = ceil_div(positions, chunk), tasks = chunks * per_chunk;
        // [k][group][column tile][chunk][position]
        std::vector<double> partial(static_cast<std::size_t>(tasks * chunk));
        parallel_for(tasks, [&](std::int64_t task) {
            const std::int64_t first = task % chunks * chunk, last = std::min(first + chunk, positions);
            const std::int64_t column_tile = task / chunks % grid.column_tiles();
            const std::int64_t group = task / chunks / grid.column_tiles() % grid.groups;
            const std::int64_t k = task / chunks / grid.column_tiles() / grid.groups;
            const std::int64_t panels = grid.panels_of(column_tile);
            const C* direction = directions[k] + group * grid.rows * grid.columns;
            const C* inputs =
                packed_a.get() + (group * grid.column_panels() + column_tile * kTilePanels) * slab * kPanel<C>;
            const auto packed = aligned_buffer<C>(std::min(kPositions, grid.rows) * kTileColumns<C>);
            const auto sums = zeros<C>(chunk * kPanel<C>);
            for (std::int64_t row = 0; row < grid.rows; row += kPositions) {
                const std::int64_t depth = std::min(kPositions, grid.rows - row);
                for (std::int64_t panel = 0; panel < panels; ++panel) {
                    const std::int64_t column = column_tile * kTileColumns<C> + panel * kPanel<C>;
                    pack_panel(direction, row_offset.data() + row, depth, shape.weight_index.data() + column,
                               std::min(kPanel<C>, grid.columns - column), packed.get() + panel * depth * kPanel<C>);
                }
                for (std::int64_t position = first; position < last; position += kTileRows) {
                    const std::int64_t panel = position / kPanel<C>, lane = position % kPanel<C>;
                    const TileOperands<C> x{
                        depth, packed.get(), depth * kPanel<C>, panels,
                        packed_b.get() + (panel * b_rows + group * grid.rows + row) * kPanel<C> + lane};
                    multiply_tile(level, x,
                                  RowDotTile<C>{inputs + position * kPanel<C>, slab * kPanel<C>,
                                                sums.get() + (position - first) * kPanel<C>});
                }
            }
            for (std::int64_t i = 0; i < last - first; ++i)
                for (std::int64_t l = 0; l < kPanel<C>; ++l) partial[task * chunk + i] += sums[i * kPanel<C> + l];
        });
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t first = begin + task % chunks * chunk, last = std::min(first + chunk, begin + positions);
            const std::int64_t k = task / chunks / grid.column_tiles() / grid.groups;
            for (std::int64_t i = 0; i < last - first; ++i)
                total[(first + i) / shape.positions * count + k] += partial[task * chunk + i];
        }
    }
    for (std::size_t i = 0; i < total.size(); ++i) out[i] = static_cast<C>(total[i]);
}

}  // namespace transferops::cpu
