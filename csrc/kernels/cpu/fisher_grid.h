// The tiles of a layer's weight, and how many of them a task takes.
#pragma once

#include <algorithm>

#include "fisher_operand.h"
#include "fisher_tile.h"

namespace transferops::cpu {

// Row tiles of a task, which packs the columns of A that they share: many, as packing 128 rows' worth costs several
// percent of their multiplications, but so that there are tasks for many threads. By the shape alone, since sums over
// tasks depend on it.
constexpr std::int64_t kLeastRowTiles = 16, kMostRowTiles = 64, kTasks = 64;

// The tile grid of one weight matrix per group.
template <class C>
struct Grid {
    std::int64_t groups, rows, columns, task_row_tiles;

    explicit Grid(const LayerShape& shape)
        : groups(shape.groups),
          rows(shape.rows),
          columns(shape.columns),
          task_row_tiles(std::clamp(tiles() / kTasks, kLeastRowTiles, kMostRowTiles)) {}

    std::int64_t row_tiles() const { return ceil_div(rows, kTileRows); }
    std::int64_t row_panels() const { return ceil_div(rows, kPanel<C>); }
    std::int64_t row_blocks() const { return ceil_div(row_tiles(), task_row_tiles); }
    std::int64_t column_panels() const { return ceil_div(columns, kPanel<C>); }
    std::int64_t column_tiles() const { return ceil_div(column_panels(), kTilePanels); }
    std::int64_t panels_of(std::int64_t column_tile) const {
        return std::min(kTilePanels, column_panels() - column_tile * kTilePanels);
    }
    std::int64_t tile(std::int64_t group, std::int64_t column_tile, std::int64_t row_tile) const {
        return (group * column_tiles() + column_tile) * row_tiles() + row_tile;
    }
    struct Begin {
        std::int64_t group, column, row;
    };
    Begin begin_of(std::int64_t tile) const {
        return {tile / row_tiles() / column_tiles(), tile / row_tiles() % column_tiles() * kTileColumns<C>,
                tile % row_tiles() * kTileRows};
    }
    std::int64_t tiles() const { return groups * column_tiles() * row_tiles(); }
    std::int64_t tasks() const { return groups * column_tiles() * row_blocks(); }
};

}  // namespace transferops::cpu
