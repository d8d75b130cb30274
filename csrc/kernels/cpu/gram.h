// The symmetric float64 Gram of a centred matrix, blocked for the caches: half the multiplications of a general
// product.
//
// Rows are taken in blocks. A block is packed once - converted to float64, centred, laid out in panels - and then each
// tile of the upper triangle is formed from it. Wide matrices share a block between threads (panels, then tiles are
// tasks); narrow ones, whose few tiles could not feed the threads, are cut along the rows into slices, as many as the
// shape says, that are added in order, so that the result never depends on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "moments.h"
#include "tile.h"

namespace transferops::cpu {

constexpr std::int64_t kGramPanel = kPanel<double>;
constexpr std::int64_t kGramTile = kTileColumns<double>;
constexpr std::int64_t kDepth = 256;                  // rows that a register tile sums at a time: B panel 16 KiB, in L1
constexpr std::int64_t kColumnBlock = 8 * kGramTile;  // columns of A per task: 192 x 256 doubles, 384 KiB, in L2
constexpr std::int64_t kPackedDoubles = 1 << 20;      // a packed block of about 8 MiB, in L3
constexpr std::int64_t kNarrow = 2 * kColumnBlock;    // up to here the rows are sliced
constexpr std::int64_t kSlices = 16;

// The matrix whose columns are multiplied with each other: element(p, i) for p < depth, i < width. For the class
// moments p is a row and i a column of the features (shift by i); for the sample Gram the other way round (shift by p).
template <class T>
struct GramOperand {
    const T* data;
    std::int64_t depth;
    std::int64_t width;
    std::int64_t depth_stride;
    std::int64_t width_stride;
    const double* shift;
    bool shift_by_depth;
};

template <class T, bool SHIFT_BY_DEPTH, bool UNIT_WIDTH, bool UNIT_DEPTH>
__attribute__((always_inline)) inline void pack_panel_as(const GramOperand<T>& x, std::int64_t first, std::int64_t rows,
                                                         std::int64_t panel, double* out) {
    const std::int64_t column = panel * kGramPanel;
    const std::int64_t valid = std::clamp<std::int64_t>(x.width - column, 0, kGramPanel);
    const std::int64_t width_stride = UNIT_WIDTH ? 1 : x.width_stride;
    const std::int64_t depth_stride = UNIT_DEPTH ? 1 : x.depth_stride;
    const T* base = x.data + first * depth_stride + column * width_stride;
    if (valid < kGramPanel) {
        std::memset(out, 0, static_cast<std::size_t>(rows * kGramPanel) * sizeof(double));
        for (std::int64_t p = 0; p < rows; ++p)
            for (std::int64_t i = 0; i < valid; ++i)
                out[p * kGramPanel + i] = to_double(base[p * depth_stride + i * width_stride]) -
                                          x.shift[SHIFT_BY_DEPTH ? first + p : column + i];
        return;
    }
    for (std::int64_t p = 0; p < rows; ++p)
        for (std::int64_t i = 0; i < kGramPanel; ++i)
            out[p * kGramPanel + i] =
                to_double(base[p * depth_stride + i * width_stride]) - x.shift[SHIFT_BY_DEPTH ? first + p : column + i];
}

template <class T>
TRANSFEROPS_CLONES void pack_panel(const GramOperand<T>& x, std::int64_t first, std::int64_t rows, std::int64_t panel,
                                   double* out) {
    if (x.shift_by_depth) {
        if (x.depth_stride == 1) return pack_panel_as<T, true, false, true>(x, first, rows, panel, out);
        return pack_panel_as<T, true, false, false>(x, first, rows, panel, out);
    }
    if (x.width_stride == 1) return pack_panel_as<T, false, true, false>(x, first, rows, panel, out);
    return pack_panel_as<T, false, false, false>(x, first, rows, panel, out);
}

// Adds the rows first .. first+rows of a packed block to the upper triangle of gram, for the columns of one A block
// against one B block. `packed` holds, per kDepth rows, all panels one after the other.
inline void gram_block(const double* packed, std::int64_t rows, std::int64_t panels, std::int64_t width,
                       std::int64_t a_block, std::int64_t b_block, double* gram) {
    alignas(64) double tile[kTileArea<double>];
    const Level level = cpu_level();
    const std::int64_t a_end = std::min((a_block + 1) * kColumnBlock, panels * kGramPanel);
    const std::int64_t b_end = std::min((b_block + 1) * kColumnBlock, panels * kGramPanel);
    for (std::int64_t start = 0; start < rows; start += kDepth) {
        const std::int64_t depth = std::min(kDepth, rows - start);
        const std::int64_t panel_stride = depth * kGramPanel;
        const double* chunk = packed + start * panels * kGramPanel;
        for (std::int64_t j = b_block * kColumnBlock; j < b_end; j += kGramPanel) {
            const std::int64_t tile_rows = std::min(kGramPanel, width - j);
            for (std::int64_t i = std::max(a_block * kColumnBlock, j); i < a_end; i += kGramTile) {
                double* target = gram + j * width + i;
                const std::int64_t columns = std::min({kGramTile, a_end - i, width - i});
                for (std::int64_t row = 0; row < tile_rows; ++row)
                    for (std::int64_t column = 0; column < columns; column += kGramPanel)
                        __builtin_prefetch(target + row * width + column, 1);
                multiply_tile(
                    level,
                    TileOperands<double>{depth, chunk + i / kGramPanel * panel_stride, panel_stride,
                                         ceil_div(columns, kGramPanel), chunk + j / kGramPanel * panel_stride},
                    StoreTile<double>{tile});
                for (std::int64_t row = 0; row < tile_rows; ++row, target += width) {
                    if (columns == kGramTile)
                        for (std::int64_t column = 0; column < kGramTile; ++column)
                            target[column] += tile[row * kGramTile + column];
                    else
                        for (std::int64_t column = 0; column < columns; ++column)
                            target[column] += tile[row * kGramTile + column];
                }
            }
        }
    }
}

// Adds the operand's rows begin .. end to the upper triangle of gram [width, width].
template <class T>
void accumulate_gram(const GramOperand<T>& x, std::int64_t begin, std::int64_t end, double* gram,
                     const ParallelFor& parallel_for) {
    const std::int64_t panels = ceil_div(x.width, kGramPanel);
    const std::int64_t columns = panels * kGramPanel;
    const std::int64_t blocks = ceil_div(columns, kColumnBlock);
    const std::int64_t block_rows =
        std::min(ceil_div(end - begin, kDepth), std::max<std::int64_t>(1, kPackedDoubles / (columns * kDepth))) *
        kDepth;
    const auto packed = aligned_buffer<double>(std::min(block_rows, end - begin) * columns);

    std::vector<std::pair<std::int64_t, std::int64_t>> pairs;  // (A block, B block) that touch the upper triangle
    for (std::int64_t b = 0; b < blocks; ++b)
        for (std::int64_t a = b; a < blocks; ++a) pairs.emplace_back(a, b);

    for (std::int64_t first = begin; first < end; first += block_rows) {
        const std::int64_t rows = std::min(block_rows, end - first);
        parallel_for(ceil_div(panels, kTilePanels), [&](std::int64_t group) {
            const std::int64_t group_end = std::min((group + 1) * kTilePanels, panels);
            for (std::int64_t start = 0; start < rows; start += kDepth) {
                const std::int64_t depth = std::min(kDepth, rows - start);
                for (std::int64_t panel = group * kTilePanels; panel < group_end; ++panel)
                    pack_panel(x, first + start, depth, panel,
                               packed.get() + start * columns + panel * depth * kGramPanel);
            }
        });
        parallel_for(static_cast<std::int64_t>(pairs.size()), [&](std::int64_t index) {
            gram_block(packed.get(), rows, panels, x.width, pairs[index].first, pairs[index].second, gram);
        });
    }
}

inline void mirror_upper(double* gram, std::int64_t width) {
    constexpr std::int64_t kBlock = 32;  // both sides of a 32x32 block stay in L1
    for (std::int64_t j0 = 0; j0 < width; j0 += kBlock)
        for (std::int64_t i0 = j0; i0 < width; i0 += kBlock)
            for (std::int64_t j = j0; j < std::min(j0 + kBlock, width); ++j)
                for (std::int64_t i = std::max(i0, j + 1); i < std::min(i0 + kBlock, width); ++i)
                    gram[i * width + j] = gram[j * width + i];
}

template <class T>
void symmetric_gram(const GramOperand<T>& x, double* gram, const ParallelFor& parallel_for) {
    const std::int64_t area = x.width * x.width;
    if (area == 0) return;  // and gram may be null
    std::memset(gram, 0, static_cast<std::size_t>(area) * sizeof(double));
    if (x.depth == 0) return;
    // One block of columns is one task: shorter slices then, though each is a Gram matrix to add.
    const std::int64_t least_rows = x.width <= kColumnBlock ? kDepth : 4 * kDepth;
    const std::int64_t slices = x.width <= kNarrow ? std::min(kSlices, ceil_div(x.depth, least_rows)) : 1;
    if (slices > 1) {
        const std::int64_t slice_rows = ceil_div(x.depth, slices);
        const auto partial = aligned_buffer<double>((slices - 1) * area);  // the first slice goes to gram itself
        parallel_for(slices, [&](std::int64_t slice) {
            double* out = slice == 0 ? gram : partial.get() + (slice - 1) * area;
            if (slice > 0) std::memset(out, 0, static_cast<std::size_t>(area) * sizeof(double));
            const std::int64_t begin = std::min(slice * slice_rows, x.depth);
            accumulate_gram(x, begin, std::min(begin + slice_rows, x.depth), out, serial_for);
        });
        for (std::int64_t slice = 1; slice < slices; ++slice)
            for (std::int64_t i = 0; i < area; ++i) gram[i] += partial[(slice - 1) * area + i];
    } else {
        accumulate_gram(x, 0, x.depth, gram, parallel_for);
    }
    mirror_upper(gram, x.width);
}

}  // namespace transferops::cpu
