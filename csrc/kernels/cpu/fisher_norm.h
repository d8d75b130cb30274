// Squared norms of per-sample gradients from the Gram matrices between positions, the "ghost" norm:
// |G_n|^2 = sum over t and s of (a_t . a_s)(b_t . b_s).
#pragma once

#include <algorithm>
#include <vector>

#include "fisher_operand.h"
#include "fisher_tile.h"
#include "row_products.h"

namespace transferops::cpu {

constexpr std::int64_t kBlockRows = 32;  // of a Gram matrix: a few hundred KiB of rows at a time, in L2
constexpr std::int64_t kSamplesPerTask = 4;

// Multiplications per sample, of both Gram matrices' upper halves against the gradient itself.
inline bool ghost_norm_is_cheaper(const LayerShape& shape) {
    return shape.positions == 1 ||
           (shape.positions + 1) / 2 * (shape.rows + shape.columns) < shape.rows * shape.columns;
}

// The length of the runs of neighbours that the columns of a group consist of.
inline std::int64_t run_length(const std::vector<std::int64_t>& columns, std::int64_t count) {
    std::int64_t length = 1;
    while (length < count && columns[length] == columns[0] + length) ++length;
    return length;
}

// Positions as rows of `count` columns side by side: where they stand, or copies in room [positions][count].
template <class C, class E>
TRANSFEROPS_CLONES void rows_of(const E* sample, const std::vector<std::int64_t>& positions,
                                const std::int64_t* columns, std::int64_t count, std::int64_t run, C* __restrict__ room,
                                const C** rows) {
    for (std::size_t t = 0; t < positions.size(); ++t) {
        const E* source = sample + positions[t];
        if constexpr (std::is_same_v<C, E>)
            if (run == count) {
                rows[t] = source + columns[0];
                continue;
            }
        C* row = room + static_cast<std::int64_t>(t) * count;
        if (run == 1)
            for (std::int64_t i = 0; i < count; ++i) row[i] = convert<C>(source[columns[i]]);
        else
            for (std::int64_t first = 0; first < count; first += run)
                for (std::int64_t i = 0; i < run; ++i) row[first + i] = convert<C>(source[columns[first] + i]);
        rows[t] = row;
    }
}

// At one position, |a|^2 |b|^2, summed over groups.
template <class C, class Source, class T>
void outer_product_norm(Source& a, const Operand<T>& b, const LayerShape& shape, C* out) {
    const auto square = [](const auto* data, const std::int64_t* offsets, std::int64_t count) {
        double sum = 0;
        for (std::int64_t i = 0; i < count; ++i) sum += to_double(data[offsets[i]]) * to_double(data[offsets[i]]);
        return sum;
    };
    for (std::int64_t n = 0; n < shape.samples; ++n) {
        a.begin(n, 1);
        a.load(n);
        double sum = 0;
        for (std::int64_t g = 0; g < shape.groups; ++g)
            sum += square(a.sample(n) + a.positions[0], a.columns.data() + g * shape.columns, shape.columns) *
                   square(b.sample(n) + b.positions[0], b.columns.data() + g * shape.rows, shape.rows);
        out[n] = static_cast<C>(sum);
    }
}

// Both Gram matrices in blocks, of products of rows: nothing is packed.
template <class C, class Source, class T>
void ghost_norm(Source& a, const Operand<T>& b, const LayerShape& shape, C* out, const ParallelFor& parallel_for) {
    if (shape.positions == 1) return outer_product_norm<C>(a, b, shape, out);
    const std::int64_t positions = shape.positions;
    const std::int64_t runs[2] = {run_length(a.columns, shape.columns), run_length(b.columns, shape.rows)};
    const std::int64_t slab = std::clamp<std::int64_t>(kSlabElements / (a.elements_per_sample() + 1), 1, shape.samples);
    for (std::int64_t first = 0; first < shape.samples; first += slab) {
        const std::int64_t samples = std::min(slab, shape.samples - first);
        a.begin(first, samples);
        parallel_for(ceil_div(samples, kSamplesPerTask), [&](std::int64_t task) {
            const auto copies = aligned_buffer<C>(positions * (shape.columns + shape.rows));
            std::vector<const C*> inputs(static_cast<std::size_t>(positions)), outputs(inputs.size());
            C grams[2][kBlockRows * kBlockRows];
            const std::int64_t end = std::min((task + 1) * kSamplesPerTask, samples);
            for (std::int64_t n = first + task * kSamplesPerTask; n < first + end; ++n) {
                a.load(n);
                double sum = 0;
                for (std::int64_t g = 0; g < shape.groups; ++g) {
                    rows_of(a.sample(n), a.positions, a.columns.data() + g * shape.columns, shape.columns, runs[0],
                            copies.get(), inputs.data());
                    rows_of(b.sample(n), b.positions, b.columns.data() + g * shape.rows, shape.rows, runs[1],
                            copies.get() + positions * shape.columns, outputs.data());
                    for (std::int64_t t = 0; t < positions; t += kBlockRows)
                        for (std::int64_t s = t; s < positions; s += kBlockRows) {
                            const std::int64_t height = std::min(kBlockRows, positions - t);
                            const std::int64_t width = std::min(kBlockRows, positions - s);
                            run<C>(RowProducts<C>{inputs.data() + t, height, inputs.data() + s, width, shape.columns,
                                                  grams[0], kBlockRows});
                            run<C>(RowProducts<C>{outputs.data() + t, height, outputs.data() + s, width, shape.rows,
                                                  grams[1], kBlockRows});
                            for (std::int64_t k = 0; k < height; ++k)  // pairs t < s stand for both orders
                                for (std::int64_t l = s == t ? k : 0; l < width; ++l)
                                    sum +=
                                        (t + k < s + l ? 2 : 1) * (static_cast<double>(grams[0][k * kBlockRows + l]) *
                                                                   grams[1][k * kBlockRows + l]);
                        }
                }
                out[n] = static_cast<C>(sum);
            }
        });
    }
}

}  // namespace transferops::cpu
