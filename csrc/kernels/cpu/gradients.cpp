#include "gradients.h"

#include <algorithm>

#include "tile.h"

namespace transferops::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Pieces of the parameters: no piece crosses a tensor, and all but a tensor's last are equally long.

struct Piece {
    std::size_t tensor;
    std::int64_t begin, end;
};

template <class Tensors>
std::vector<Piece> pieces_of(const Tensors& tensors, std::int64_t length) {
    std::vector<Piece> pieces;
    for (std::size_t t = 0; t < tensors.size(); ++t)
        for (std::int64_t begin = 0; begin < tensors[t].size; begin += length)
            pieces.push_back({t, begin, std::min(begin + length, tensors[t].size)});
    return pieces;
}

// ---------------------------------------------------------------------------------------------------------------------
// Running moments.

constexpr std::int64_t kUpdatePiece = 1 << 16;  // weights of a task
constexpr std::int64_t kUpdateBlock = 1 << 11;  // weights whose moments stay in L1 while samples go by

// One gradient of one block, by Welford's recurrence; `share` is 1 over the number of samples with this one.
template <bool SQUARES, class T, class S>
__attribute__((always_inline)) inline void update_block(const T* __restrict__ gradient, std::int64_t size, S share,
                                                        S* __restrict__ mean, S* __restrict__ squares) {
    for (std::int64_t i = 0; i < size; ++i) {
        const S value = convert<S>(gradient[i]), before = value - mean[i];
        mean[i] += before * share;
        if constexpr (SQUARES) squares[i] += before * (value - mean[i]);
    }
}

template <class T, class S>
TRANSFEROPS_CLONES void update_piece(const RunningMoments<T, S>& x, std::int64_t begin, std::int64_t end,
                                     std::int64_t samples, std::int64_t count) {
    for (std::int64_t first = begin; first < end; first += kUpdateBlock) {
        const std::int64_t size = std::min(kUpdateBlock, end - first);
        S* mean = x.mean + first;
        S* squares = x.squares ? x.squares + first : nullptr;
        std::int64_t seen = count;
        for (std::int64_t n = 0; n < samples; ++n) {
            const T* gradient = x.gradients + n * x.sample_stride + first;
            if (++seen == 1) {
                for (std::int64_t i = 0; i < size; ++i) mean[i] = convert<S>(gradient[i]);
                if (squares) std::fill_n(squares, size, S{0});
                continue;
            }
            const S share = S{1} / static_cast<S>(seen);
            if (squares)
                update_block<true>(gradient, size, share, mean, squares);
            else
                update_block<false>(gradient, size, share, mean, squares);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of rows, in float64, a block of weights at a time: its rows are converted once and stay in L1 or L2.

constexpr std::int64_t kBlock = 256;            // weights
constexpr std::int64_t kGramPiece = 1 << 14;    // weights of a piece
constexpr std::int64_t kGramSlices = 64;        // at most so many partial sums,
constexpr std::int64_t kPartDoubles = 1 << 22;  // of so many doubles in all
constexpr std::int64_t kAhead = 8;              // blocks between asking for one and reading it
constexpr std::int64_t kGroup = 2;              // rows that one row is multiplied with at a time

// sums[g] += <left, right + g * kBlock> for ROWS rows of a block. Every product is summed in the same order, in
// whatever company, so that equal rows have equal products.
template <int ROWS>
__attribute__((always_inline)) inline void add_products(const double* left, const double* right, double* sums) {
    constexpr std::int64_t kChains = 2;  // independent sums, which hide the latency of the fused multiply-add
    EightDoubles lanes[ROWS][kChains] = {};
    for (std::int64_t i = 0; i < kBlock; i += kChains * kEight)
        for (std::int64_t c = 0; c < kChains; ++c) {
            const EightDoubles x = *reinterpret_cast<const EightDoubles*>(left + i + c * kEight);
            for (int g = 0; g < ROWS; ++g)
                lanes[g][c] += x * *reinterpret_cast<const EightDoubles*>(right + g * kBlock + i + c * kEight);
        }
    for (int g = 0; g < ROWS; ++g) sums[g] += sum_of(lanes[g][0] + lanes[g][1]);
}

// sums[k] += <left, right + k * kBlock>, k < rows.
__attribute__((always_inline)) inline void add_all_products(const double* left, const double* right, std::int64_t rows,
                                                            double* sums) {
    std::int64_t k = 0;
    for (; k + kGroup <= rows; k += kGroup) add_products<kGroup>(left, right + k * kBlock, sums + k);
    if (k < rows) add_products<1>(left, right + k * kBlock, sums + k);
}

// Asks for a block that will be read soon: the rows of a block are short and far apart, which hides them from the
// hardware's own prefetching. Addresses beyond the row do no harm.
template <class T>
__attribute__((always_inline)) inline void prefetch_block(const T* source) {
    for (std::int64_t i = 0; i < kBlock; i += 64 / sizeof(T)) __builtin_prefetch(source + i);
}

template <class T>
__attribute__((always_inline)) inline void convert_block(const T* __restrict__ source, std::int64_t size,
                                                         double* __restrict__ target) {
    for (std::int64_t i = 0; i < size; ++i) target[i] = to_double(source[i]);
    for (std::int64_t i = size; i < kBlock; ++i) target[i] = 0;
}

// Adds the products of a piece to the upper triangle of gram; block is scratch for rows + 1 rows of a block.
template <class T>
TRANSFEROPS_CLONES void gram_piece(const GramSegment<T>& x, std::int64_t rows, std::int64_t begin, std::int64_t end,
                                   double* block, double* gram) {
    double* const scaled = block + rows * kBlock;
    for (std::int64_t first = begin; first < end; first += kBlock) {
        const std::int64_t size = std::min(kBlock, end - first);
        for (std::int64_t k = 0; k < rows; ++k) {
            double* row = block + k * kBlock;
            prefetch_block(x.rows[k] + first + kAhead * kBlock);
            convert_block(x.rows[k] + first, size, row);
            if (x.base)
                for (std::int64_t i = 0; i < size; ++i) row[i] -= to_double(x.base[first + i]);
        }
        for (std::int64_t k = 0; k < rows; ++k) {
            const double* left = block + k * kBlock;
            if (x.weights) {
                for (std::int64_t i = 0; i < size; ++i) scaled[i] = left[i] * to_double(x.weights[first + i]);
                for (std::int64_t i = size; i < kBlock; ++i) scaled[i] = 0;
                left = scaled;
            }
            add_all_products(left, block + k * kBlock, rows - k, gram + k * rows + k);
        }
    }
}

// gram[size] += the parts, in order.
void add_parts(const double* parts, std::int64_t count, std::int64_t size, double* sum) {
    for (std::int64_t p = 0; p < count; ++p)
        for (std::int64_t i = 0; i < size; ++i) sum[i] += parts[p * size + i];
}

// How many partial sums of `size` doubles `tasks` tasks are gathered in. A function of the sizes alone, so that results
// do not depend on the number of threads.
std::int64_t slices_for(std::int64_t tasks, std::int64_t size) {
    return std::clamp<std::int64_t>(kPartDoubles / std::max<std::int64_t>(size, 1), 1,
                                    std::clamp<std::int64_t>(tasks, 1, kGramSlices));
}

// gram [rows, rows] of the segments; prepare(tensor, begin, end) runs before the products of those weights are taken,
// which are then still in L2.
template <class T, class Prepare>
void gram_of_segments(const std::vector<GramSegment<T>>& segments, std::int64_t rows, std::int64_t step, double* gram,
                      const ParallelFor& parallel_for, const Prepare& prepare) {
    const std::int64_t area = rows * rows;
    const std::vector<Piece> pieces = pieces_of(segments, kGramPiece);
    const auto count = static_cast<std::int64_t>(pieces.size());
    const std::int64_t slices = slices_for(count, area);
    std::vector<double> parts(static_cast<std::size_t>(slices * area), 0.0);
    parallel_for(slices, [&](std::int64_t slice) {
        const auto block = aligned_buffer<double>((rows + 1) * kBlock);
        for (std::int64_t index = slice * count / slices; index < (slice + 1) * count / slices; ++index) {
            const Piece& piece = pieces[index];
            for (std::int64_t begin = piece.begin; begin < piece.end; begin += step) {
                const std::int64_t end = std::min(begin + step, piece.end);
                prepare(piece.tensor, begin, end);
                gram_piece(segments[piece.tensor], rows, begin, end, block.get(), parts.data() + slice * area);
            }
        }
    });
    std::fill_n(gram, area, 0.0);
    add_parts(parts.data(), slices, area, gram);
    for (std::int64_t k = 0; k < rows; ++k)
        for (std::int64_t l = 0; l < k; ++l) gram[k * rows + l] = gram[l * rows + k];
}

// ---------------------------------------------------------------------------------------------------------------------
// Summaries of per-sample gradients: a block of columns at a time, all samples of it.

// Adds to products [samples, count + 1], the directions' and the row's own, and writes the diagonal of these columns.
template <class T>
TRANSFEROPS_CLONES void fisher_columns(const MatrixView<T>& gradients, const Compute<T>* directions, std::int64_t count,
                                       std::int64_t begin, std::int64_t end, double* block, double* products,
                                       Compute<T>* diagonal) {
    double* const row = block + count * kBlock;
    double squares[kBlock];
    for (std::int64_t first = begin; first < end; first += kBlock) {
        const std::int64_t size = std::min(kBlock, end - first);
        for (std::int64_t k = 0; k < count; ++k)
            convert_block(directions + k * gradients.columns + first, size, block + k * kBlock);
        std::fill_n(squares, kBlock, 0.0);
        for (std::int64_t n = 0; n < gradients.rows; ++n) {
            prefetch_block(gradients.data + (n + kAhead) * gradients.row_stride + first);
            convert_block(gradients.data + n * gradients.row_stride + first, size, row);
            for (std::int64_t i = 0; i < kBlock; ++i) squares[i] += row[i] * row[i];
            add_all_products(row, block, count + 1, products + n * (count + 1));
        }
        const double scale = 1 / static_cast<double>(std::max<std::int64_t>(gradients.rows, 1));
        for (std::int64_t i = 0; i < size; ++i) diagonal[first + i] = static_cast<Compute<T>>(squares[i] * scale);
    }
}

}  // namespace

template <class T, class S>
void gradient_expectation(const std::vector<RunningMoments<T, S>>& tensors, std::int64_t samples, std::int64_t count,
                          const ParallelFor& parallel_for) {
    const std::vector<Piece> pieces = pieces_of(tensors, kUpdatePiece);
    parallel_for(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t index) {
        const Piece& piece = pieces[index];
        update_piece(tensors[piece.tensor], piece.begin, piece.end, samples, count);
    });
}

template <class T, class S>
void gradient_expectation_gram(const std::vector<RunningMoments<T, S>>& moments, std::int64_t lists,
                               std::int64_t samples, const std::vector<std::int64_t>& counts, double* gram,
                               const ParallelFor& parallel_for) {
    std::vector<const S*> means;
    for (const RunningMoments<T, S>& x : moments) means.push_back(x.mean);
    std::vector<GramSegment<S>> segments;
    for (std::size_t i = 0; i < moments.size(); i += lists) segments.push_back({means.data() + i, moments[i].size});
    const auto update = [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
        for (std::size_t k = 0; k < counts.size(); ++k) {
            const RunningMoments<T, S>& x = moments[tensor * lists + k];
            for (std::int64_t n = 0; n < samples; ++n)
                prefetch_block(x.gradients + n * x.sample_stride + begin + kAhead * kBlock);
            update_piece(x, begin, end, samples, counts[k]);
        }
    };
    gram_of_segments(segments, lists, kBlock, gram, parallel_for, update);
}

template <class T>
void weighted_gram(const std::vector<GramSegment<T>>& segments, std::int64_t rows, double* gram,
                   const ParallelFor& parallel_for) {
    gram_of_segments(segments, rows, kGramPiece, gram, parallel_for, [](std::size_t, std::int64_t, std::int64_t) {});
}

template <class T>
void gradient_fisher_gram(const MatrixView<T>& gradients, const Compute<T>* directions, std::int64_t count,
                          double* gram, Compute<T>* diagonal, double* norms, const ParallelFor& parallel_for) {
    const std::int64_t width = count + 1, size = gradients.rows * width;
    const std::int64_t blocks = ceil_div(gradients.columns, kBlock);
    const std::int64_t slices = slices_for(blocks, size);
    std::vector<double> parts(static_cast<std::size_t>(slices * size), 0.0), products(static_cast<std::size_t>(size));
    parallel_for(slices, [&](std::int64_t slice) {
        const auto block = aligned_buffer<double>((count + 1) * kBlock);
        const std::int64_t begin = slice * blocks / slices * kBlock, end = (slice + 1) * blocks / slices * kBlock;
        fisher_columns(gradients, directions, count, begin, std::min(end, gradients.columns), block.get(),
                       parts.data() + slice * size, diagonal);
    });
    add_parts(parts.data(), slices, size, products.data());
    std::fill_n(gram, count * count, 0.0);
    for (std::int64_t n = 0; n < gradients.rows; ++n) {
        const double* product = products.data() + n * width;
        norms[n] = product[count];
        for (std::int64_t k = 0; k < count; ++k)
            for (std::int64_t l = 0; l < count; ++l) gram[k * count + l] += product[k] * product[l];
    }
    const auto samples = static_cast<double>(std::max<std::int64_t>(gradients.rows, 1));
    for (std::int64_t i = 0; i < count * count; ++i) gram[i] /= samples;
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                     \
    template void gradient_expectation(const std::vector<RunningMoments<T, float>>&, std::int64_t, std::int64_t,       \
                                       const ParallelFor&);                                                            \
    template void gradient_expectation(const std::vector<RunningMoments<T, double>>&, std::int64_t, std::int64_t,      \
                                       const ParallelFor&);                                                            \
    template void gradient_expectation_gram(const std::vector<RunningMoments<T, float>>&, std::int64_t, std::int64_t,  \
                                            const std::vector<std::int64_t>&, double*, const ParallelFor&);            \
    template void gradient_expectation_gram(const std::vector<RunningMoments<T, double>>&, std::int64_t, std::int64_t, \
                                            const std::vector<std::int64_t>&, double*, const ParallelFor&);            \
    template void weighted_gram(const std::vector<GramSegment<T>>&, std::int64_t, double*, const ParallelFor&);        \
    template void gradient_fisher_gram(const MatrixView<T>&, const Compute<T>*, std::int64_t, double*, Compute<T>*,    \
                                       double*, const ParallelFor&);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cpu
