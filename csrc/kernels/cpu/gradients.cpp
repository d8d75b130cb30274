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

// Of every `lists`th of the tensors; a piece's `tensor` counts those alone.
template <class Tensors>
std::vector<Piece> pieces_of(const Tensors& tensors, std::int64_t length, std::size_t lists = 1) {
    std::vector<Piece> pieces;
    for (std::size_t t = 0; t < tensors.size() / lists; ++t)
        for (std::int64_t begin = 0, size = tensors[t * lists].size; begin < size; begin += length)
            pieces.push_back({t, begin, std::min(begin + length, size)});
    return pieces;
}

// ---------------------------------------------------------------------------------------------------------------------
// Walks over a block, which ask for what they will read soon, line by line as they go: the streams are many and their
// stretches short, which hides them from the hardware's own prefetching, and requests in bursts wait for each other.

constexpr std::int64_t kLine = 16;           // weights of a step: a cache line of floats
constexpr std::int64_t kAhead = 32 * kLine;  // weights between asking for a line and reading it

// Addresses beyond the end do no harm.
template <class T>
__attribute__((always_inline)) inline void prefetch_line(const T* source) {
    for (std::int64_t i = 0; i < kLine; i += 64 / sizeof(T)) __builtin_prefetch(source + i);
}

// step(i, count) for the lines of `size` weights, what is left over one by one: counts are constants, so that loops
// over them become straight code.
template <class Step>
__attribute__((always_inline)) inline void by_lines(std::int64_t size, const Step& step) {
    std::int64_t i = 0;
    for (; i + kLine <= size; i += kLine) step(i, kLine);
    for (; i < size; ++i) step(i, 1);
}

// Values of a line are taken out of memory before any is written, or the compiler would have to fear that what is
// written is read again, and would not vectorise.

template <class T>
__attribute__((always_inline)) inline void convert_line(const T* source, std::int64_t count, double* target) {
    double values[kLine];
    for (std::int64_t i = 0; i < count; ++i) values[i] = to_double(source[i]);
    for (std::int64_t i = 0; i < count; ++i) target[i] = values[i];
}

// target = source; asks for the block at `next`.
template <class T>
__attribute__((always_inline)) inline void convert_block(const T* source, const T* next, std::int64_t size,
                                                         double* target) {
    by_lines(size, [=](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        prefetch_line(next + i);
        convert_line(source + i, count, target + i);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Running moments.

constexpr std::int64_t kUpdatePiece = 1 << 16;  // weights of a task
constexpr std::int64_t kUpdateBlock = 1 << 11;  // weights whose moments stay in L1 while samples go by

// By Welford's recurrence; the new mean goes to `wide` too, unless that is nullptr.
template <bool SQUARES, class T, class S>
__attribute__((always_inline)) inline void update_line(const T* gradient, std::int64_t count, S share, S* mean,
                                                       S* squares, double* wide) {
    S values[kLine], before[kLine], after[kLine];
    for (std::int64_t i = 0; i < count; ++i) values[i] = convert<S>(gradient[i]);
    for (std::int64_t i = 0; i < count; ++i) before[i] = values[i] - mean[i];
    for (std::int64_t i = 0; i < count; ++i) after[i] = mean[i] + before[i] * share;
    for (std::int64_t i = 0; i < count; ++i) mean[i] = after[i];
    if constexpr (SQUARES) {
        S moved[kLine];
        for (std::int64_t i = 0; i < count; ++i) moved[i] = squares[i] + before[i] * (values[i] - after[i]);
        for (std::int64_t i = 0; i < count; ++i) squares[i] = moved[i];
    }
    if (wide) convert_line(after, count, wide);
}

// One gradient of one block; `share` is 1 over the number of samples with this one.
template <bool SQUARES, class T, class S>
__attribute__((always_inline)) inline void update_block(const T* gradient, std::int64_t size, S share, S* mean,
                                                        S* squares, double* wide) {
    by_lines(size, [=](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        if (SQUARES || wide) {  // a gradient and its mean alone the hardware finds sooner
            prefetch_line(gradient + i + kAhead);
            prefetch_line(mean + i + kAhead);
            if constexpr (SQUARES) prefetch_line(squares + i + kAhead);
        }
        update_line<SQUARES>(gradient + i, count, share, mean + i, SQUARES ? squares + i : nullptr,
                             wide ? wide + i : nullptr);
    });
}

// The gradients of one block, from weight `first` on; the mean afterwards goes to `wide` too, unless that is nullptr.
template <class T, class S>
__attribute__((always_inline)) inline void update_moments(const RunningMoments<T, S>& x, std::int64_t first,
                                                          std::int64_t size, std::int64_t samples, std::int64_t count,
                                                          double* wide) {
    S* const mean = x.mean + first;
    S* const squares = x.squares ? x.squares + first : nullptr;
    for (std::int64_t n = 0; n < samples; ++n) {
        const T* gradient = x.gradients + n * x.sample_stride + first;
        double* const last = n + 1 == samples ? wide : nullptr;
        const std::int64_t seen = count + n + 1;
        if (seen == 1) {
            for (std::int64_t i = 0; i < size; ++i) mean[i] = convert<S>(gradient[i]);
            if (squares) std::fill_n(squares, size, S{0});
            if (last) convert_block(mean, mean + kAhead, size, last);
        } else if (squares) {
            update_block<true>(gradient, size, S{1} / static_cast<S>(seen), mean, squares, last);
        } else {
            update_block<false>(gradient, size, S{1} / static_cast<S>(seen), mean, squares, last);
        }
    }
}

template <class T, class S>
TRANSFEROPS_CLONES void update_piece(const RunningMoments<T, S>& x, std::int64_t begin, std::int64_t end,
                                     std::int64_t samples, std::int64_t count) {
    for (std::int64_t first = begin; first < end; first += kUpdateBlock)
        update_moments(x, first, std::min(kUpdateBlock, end - first), samples, count, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of rows, in float64, a block of weights at a time: its rows are converted once and stay in L1 or L2.

constexpr std::int64_t kBlock = 128;            // weights
constexpr std::int64_t kGramPiece = 1 << 14;    // weights of a piece
constexpr std::int64_t kGramSlices = 64;        // at most so many partial sums,
constexpr std::int64_t kPartDoubles = 1 << 22;  // of so many doubles in all
constexpr std::int64_t kPair = 2;               // rows that others are multiplied with at a time

// sums[l * pitch + r] += <left + l * size, right + r * size> for `count` <= kPair rows of a block of `size` weights and
// `rows` others. Every product is summed in the same order, in whatever company, so that equal rows have equal
// products.
struct BlockProducts {
    std::int64_t size;
    const double* left;
    std::int64_t count;
    const double* right;
    std::int64_t rows;
    double* sums;
    std::int64_t pitch;

    template <int LANES>
    __attribute__((always_inline)) inline void run() const {
        if (count == kPair)
            by_tiles<LANES, kPair>();
        else
            by_tiles<LANES, 1>();
    }

  private:
    template <int LANES, int LEFT>
    __attribute__((always_inline)) inline void by_tiles() const {
        constexpr int kMost = LANES == kPanel<double> ? 4 : 2;  // as many as there are registers for
        std::int64_t r = 0;
        for (; r + kMost <= rows; r += kMost) tile<LANES, LEFT, kMost>(r);
        for (; r + 2 <= rows; r += 2) tile<LANES, LEFT, 2>(r);
        if (r < rows) tile<LANES, LEFT, 1>(r);
    }

    template <int LANES, int LEFT, int RIGHT>
    __attribute__((always_inline)) inline void tile(std::int64_t first) const {
        using Vectors = Simd<double, LANES>;
        using Vector = typename Vectors::Vector;
        constexpr std::int64_t kChains = 2;  // independent sums, which hide the latency of the fused multiply-add
        Vector lanes[kChains][LEFT][RIGHT] = {};
        for (std::int64_t i = 0; i < size; i += kChains * LANES)
            for (std::int64_t c = 0; c < kChains; ++c) {
                Vector x[LEFT];
                for (int l = 0; l < LEFT; ++l) x[l] = Vectors::load(left + l * size + i + c * LANES);
                for (int r = 0; r < RIGHT; ++r) {
                    const Vector y = Vectors::load(right + (first + r) * size + i + c * LANES);
                    for (int l = 0; l < LEFT; ++l) lanes[c][l][r] += x[l] * y;
                }
            }
        for (int l = 0; l < LEFT; ++l)
            for (int r = 0; r < RIGHT; ++r)
                sums[l * pitch + first + r] += sum_of_lanes<double, LANES>(lanes[0][l][r] + lanes[1][l][r]);
    }
};

// Where the rows of a Gram matrix come from: load() writes a block of one, weights() are those of its products or
// nullptr.

template <class T>
struct SegmentRows {
    const std::vector<GramSegment<T>>& segments;

    __attribute__((always_inline)) void load(std::size_t segment, std::int64_t k, std::int64_t first, std::int64_t size,
                                             double* row) const {
        const T* source = segments[segment].rows[k] + first;
        convert_block(source, source + kAhead, size, row);
        if (const T* base = segments[segment].base)
            for (std::int64_t i = 0; i < size; ++i) row[i] -= to_double(base[first + i]);
    }

    const Compute<T>* weights(std::size_t segment) const { return segments[segment].weights; }
};

// Means that take gradients first, all or some of them.
template <class T, class S>
struct UpdatedRows {
    const std::vector<RunningMoments<T, S>>& moments;  // [tensors][lists]
    std::int64_t lists, samples;
    const std::vector<std::int64_t>& counts;

    __attribute__((always_inline)) void load(std::size_t tensor, std::int64_t k, std::int64_t first, std::int64_t size,
                                             double* row) const {
        const RunningMoments<T, S>& x = moments[tensor * lists + k];
        if (k < static_cast<std::int64_t>(counts.size()) && samples > 0)
            update_moments(x, first, size, samples, counts[k], row);
        else
            convert_block(x.mean + first, x.mean + first + kAhead, size, row);
    }

    const S* weights(std::size_t) const { return nullptr; }
};

// Adds the products of a block's rows, weighted or not, to the upper triangle of gram and anything to the lower; scaled
// is scratch for kPair rows.
__attribute__((always_inline)) inline void multiply_block(const double* block, std::int64_t rows, const double* weights,
                                                          double* scaled, double* gram) {
    for (std::int64_t k = 0; k < rows; k += kPair) {
        const std::int64_t count = std::min(kPair, rows - k);
        const double* const right = block + k * kBlock;
        if (weights)
            for (std::int64_t l = 0; l < count; ++l)
                for (std::int64_t i = 0; i < kBlock; ++i) scaled[l * kBlock + i] = right[l * kBlock + i] * weights[i];
        run<double>(BlockProducts{kBlock, weights ? scaled : right, count, right, rows - k, gram + k * rows + k, rows});
    }
}

constexpr std::int64_t kScratch = kPair + 1;  // rows of a block besides those that are multiplied

// Adds the products of a piece to the upper triangle of gram; block is scratch for rows + kScratch rows of a block.
template <class Rows>
TRANSFEROPS_CLONES void gram_piece(const Rows& source, const Piece& piece, std::int64_t rows, double* block,
                                   double* gram) {
    const auto* from = source.weights(piece.tensor);
    double* const weights = from ? block + rows * kBlock : nullptr;
    for (std::int64_t first = piece.begin; first < piece.end; first += kBlock) {
        const std::int64_t size = std::min(kBlock, piece.end - first);
        if (size < kBlock) std::fill_n(block, (rows + kScratch) * kBlock, 0.0);
        for (std::int64_t k = 0; k < rows; ++k) source.load(piece.tensor, k, first, size, block + k * kBlock);
        if (weights) convert_block(from + first, from + first + kAhead, size, weights);
        multiply_block(block, rows, weights, block + (rows + 1) * kBlock, gram);
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

// gram [rows, rows] over the pieces of the rows' tensors.
template <class Rows>
void gram_of(const Rows& source, const std::vector<Piece>& pieces, std::int64_t rows, double* gram,
             const ParallelFor& parallel_for) {
    const std::int64_t area = rows * rows;
    const auto count = static_cast<std::int64_t>(pieces.size());
    const std::int64_t slices = slices_for(count, area);
    std::vector<double> parts(static_cast<std::size_t>(slices * area), 0.0);
    parallel_for(slices, [&](std::int64_t slice) {
        const auto block = aligned_buffer<double>((rows + kScratch) * kBlock);
        for (std::int64_t index = slice * count / slices; index < (slice + 1) * count / slices; ++index)
            gram_piece(source, pieces[index], rows, block.get(), parts.data() + slice * area);
    });
    std::fill_n(gram, area, 0.0);
    add_parts(parts.data(), slices, area, gram);
    for (std::int64_t k = 0; k < rows; ++k)
        for (std::int64_t l = 0; l < k; ++l) gram[k * rows + l] = gram[l * rows + k];
}

// ---------------------------------------------------------------------------------------------------------------------
// Summaries of per-sample gradients: a block of columns at a time, all samples of it.

constexpr std::int64_t kColumns = 256;  // of a block
constexpr std::int64_t kRowsAhead = 8;  // samples between asking for a block of one and reading it

// Adds to products [samples, count + 1], the directions' and the row's own, and writes the diagonal of these columns.
template <class T>
TRANSFEROPS_CLONES void fisher_columns(const MatrixView<T>& gradients, const Compute<T>* directions, std::int64_t count,
                                       std::int64_t begin, std::int64_t end, double* block, double* products,
                                       Compute<T>* diagonal) {
    double* const row = block + count * kColumns;
    double squares[kColumns];
    for (std::int64_t first = begin; first < end; first += kColumns) {
        const std::int64_t size = std::min(kColumns, end - first);
        if (size < kColumns) std::fill_n(block, (count + 1) * kColumns, 0.0);
        for (std::int64_t k = 0; k < count; ++k) {
            const Compute<T>* source = directions + k * gradients.columns + first;
            convert_block(source, source + kColumns, size, block + k * kColumns);
        }
        std::fill_n(squares, kColumns, 0.0);
        for (std::int64_t n = 0; n < gradients.rows; ++n) {
            const T* source = gradients.data + n * gradients.row_stride + first;
            convert_block(source, source + kRowsAhead * gradients.row_stride, size, row);
            for (std::int64_t i = 0; i < kColumns; ++i) squares[i] += row[i] * row[i];
            double* const sums = products + n * (count + 1);
            run<double>(BlockProducts{kColumns, row, 1, block, count + 1, sums, count + 1});
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
    gram_of(UpdatedRows<T, S>{moments, lists, samples, counts}, pieces_of(moments, kGramPiece, lists), lists, gram,
            parallel_for);
}

template <class T>
void weighted_gram(const std::vector<GramSegment<T>>& segments, std::int64_t rows, double* gram,
                   const ParallelFor& parallel_for) {
    gram_of(SegmentRows<T>{segments}, pieces_of(segments, kGramPiece), rows, gram, parallel_for);
}

template <class T>
void gradient_fisher_gram(const MatrixView<T>& gradients, const Compute<T>* directions, std::int64_t count,
                          double* gram, Compute<T>* diagonal, double* norms, const ParallelFor& parallel_for) {
    const std::int64_t width = count + 1, size = gradients.rows * width;
    const std::int64_t blocks = ceil_div(gradients.columns, kColumns);
    const std::int64_t slices = slices_for(blocks, size);
    std::vector<double> parts(static_cast<std::size_t>(slices * size), 0.0), products(static_cast<std::size_t>(size));
    parallel_for(slices, [&](std::int64_t slice) {
        const auto block = aligned_buffer<double>(width * kColumns);
        const std::int64_t begin = slice * blocks / slices * kColumns, end = (slice + 1) * blocks / slices * kColumns;
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
