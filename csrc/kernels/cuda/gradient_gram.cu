// Gram matrices over all parameters at once (gradients.h). Figures in the comments are budgets and floors, not yet
// measured on a GPU: an H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores and half of it beside them
// (datasheet), and copies 4.3 TB/s.

#include <algorithm>
#include <memory>

#include "gradients.h"
#include "list_gram.h"

namespace transferops::cuda {
namespace {

// Rows are taken in tiles of up to 8; a launch does one pair of tiles. Blocks stride over chunks of the weights and
// keep the tile's sums in registers; a second kernel adds the blocks' sums in order.

constexpr int kMostRowPointers = 2048;
constexpr int kMostSegments = 256;

// Weights per access: 16 bytes, but 8 of float and the 16-bit types where 64 sums leave too few registers.
template <class T, bool kDiagonal>
constexpr int kGramWidth = (kDiagonal || sizeof(T) == 8 ? 16 : 8) / sizeof(T);
template <class T, bool kDiagonal>
constexpr int kWeightWidth = std::min<int>(kGramWidth<T, kDiagonal>, 16 / sizeof(Compute<T>));

template <class T>
struct GramTable {
    const T* rows[kMostRowPointers];  // per segment those of the left tile, then those of the right
    const T* bases[kMostSegments];
    const Compute<T>* weights[kMostSegments];
    std::int64_t sizes[kMostSegments];
    std::int64_t first_chunks[kMostSegments + 1];
    bool aligned[kMostSegments];
    int count;
};

// parts[block][kRows][kRows], of a tile with itself the upper triangle only. Rows that do not exist repeat the last,
// and their products are not used. 256 threads, at most 255 registers (128 for tiles of 4), 4 KiB of shared memory; 8
// accesses of 16 bytes (16 of 8 for two tiles) in flight per thread: 32 KiB. Floor: one read, 4 K d / 4.3e12 s for
// float, up to 8 rows; beyond, every row is read ceil(K / 8) times, since the 136 sums of 16 rows would take 272
// registers. Beside it stand, per weight and 8 rows, 36 float64 operations (64 for two tiles, which read 16 rows) and 8
// conversions, 16 per clock and multiprocessor: at most 0.6 of the time of the read.
template <class T, int kRows, bool kDiagonal>
__global__ void __launch_bounds__(kListThreads)
    gram_chunks(const __grid_constant__ GramTable<T> table, std::int64_t chunks, double* parts) {
    constexpr int kWidth = kGramWidth<T, kDiagonal>;
    constexpr int kLoads = kDiagonal ? kRows : 2 * kRows;
    using C = Compute<T>;
    constexpr int kWeights = kWeightWidth<T, kDiagonal>;
    double sums[kRows][kRows] = {};
    for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int piece = piece_of(table.first_chunks, table.count, chunk);
        const T* const* rows = table.rows + piece * kLoads;
        const T* const base = table.bases[piece];
        const Compute<T>* const weights = table.weights[piece];
        const std::int64_t begin =
            (chunk - table.first_chunks[piece]) * kGramChunk + std::int64_t{threadIdx.x} * kWidth;
#pragma unroll 1
        for (int step = 0; step < kGramChunk / (kListThreads * kWidth); ++step) {
            const std::int64_t place = begin + std::int64_t{step} * kListThreads * kWidth;
            const int width = elements_left<kWidth>(table.sizes[piece], place);
            Vector<T, kWidth> values[kLoads];
            Vector<T, kWidth> origins[1] = {};
            Vector<C, kWeights> factors[kWidth / kWeights] = {};
            const bool aligned = table.aligned[piece];
            load_vectors(values, width, aligned, [=](int i) { return rows[i] + place; });
            if (base) load_vectors(origins, width, aligned, [=](int) { return base + place; });
            if (weights) {
#pragma unroll
                for (int w = 0; w < kWidth / kWeights; ++w) {
                    Vector<C, kWeights> factor[1];
                    load_vectors(factor, width - w * kWeights, aligned,
                                 [=](int) { return weights + place + w * kWeights; });
                    factors[w] = factor[0];
                }
            }
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
                const double origin = to_double(origins[0].values[v]);
                const double weight = weights ? to_double(factors[v / kWeights].values[v % kWeights]) : 1.0;
                double right[kRows];
#pragma unroll
                for (int j = 0; j < kRows; ++j)
                    right[j] = to_double(values[kDiagonal ? j : kRows + j].values[v]) - origin;
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const double left = weight * (kDiagonal ? right[i] : to_double(values[i].values[v]) - origin);
#pragma unroll
                    for (int j = kDiagonal ? i : 0; j < kRows; ++j) sums[i][j] += left * right[j];
                }
            }
        }
    }
    write_part<kRows, kDiagonal>(sums, parts);
}

// Adds the blocks' parts of a pair of tiles and writes both halves of the matrix. A block takes 32 elements. 256
// threads, at most 64 registers, 2 KiB of shared memory. Bound by latency.
__global__ void __launch_bounds__(kSumThreads, 4)
    gram_finish(double* gram, const double* parts, std::int64_t count, std::int64_t rows, std::int64_t first_row,
                std::int64_t first_column, int tile) {
    const int index = blockIdx.x * kWarp + threadIdx.x % kWarp;
    const std::int64_t row = first_row + index / tile, column = first_column + index % tile;
    const bool exists = index < tile * tile && row <= column && column < rows;
    const double sum = sum_parts(exists ? count : 0, [=](std::int64_t p) { return parts[p * tile * tile + index]; });
    if (threadIdx.x < kWarp && exists) gram[row * rows + column] = gram[column * rows + row] = sum;
}

// Fills a table with segments begin .. end for the tiles that begin with these rows; its number of chunks.
template <class T>
std::int64_t fill_table(GramTable<T>& table, const GramSegment<T>* segments, std::int64_t begin, std::int64_t end,
                        const ListGramPlan& plan, std::int64_t rows, std::int64_t left, std::int64_t right) {
    const int loads = left == right ? plan.tile : 2 * plan.tile;
    std::int64_t chunks = 0;
    table.count = static_cast<int>(end - begin);
    for (std::int64_t s = begin; s < end; ++s) {
        const GramSegment<T>& segment = segments[s];
        const std::int64_t to = s - begin;
        bool aligned =
            segment.size % (16 / sizeof(T)) == 0 && is_aligned(segment.base, 16) && is_aligned(segment.weights, 16);
        for (int i = 0; i < loads; ++i) {
            const std::int64_t row = i < plan.tile ? left + i : right + i - plan.tile;
            const T* pointer = segment.rows[std::min(row, rows - 1)];
            table.rows[to * loads + i] = pointer;
            aligned = aligned && is_aligned(pointer, 16);
        }
        table.bases[to] = segment.base;
        table.weights[to] = segment.weights;
        table.sizes[to] = segment.size;
        table.aligned[to] = aligned;
        table.first_chunks[to] = chunks;
        chunks += ceil_div(segment.size, kGramChunk);
    }
    table.first_chunks[end - begin] = chunks;
    return chunks;
}

int most_segments(const ListGramPlan& plan, bool diagonal) {
    return std::min(kMostSegments, kMostRowPointers / (diagonal ? plan.tile : 2 * plan.tile));
}

}  // namespace

cudaError_t add_gram_parts(double* gram, const double* parts, std::int64_t count, std::int64_t rows,
                           std::int64_t first_row, std::int64_t first_column, const ListGramPlan& plan,
                           cudaStream_t stream) {
    return launch(gram_finish, Grid{ceil_div(plan.part(), kWarp), 1}, kSumThreads, kSumShared, stream, gram, parts,
                  count, rows, first_row, first_column, plan.tile);
}

template <class T>
cudaError_t weighted_gram(const GramSegment<T>* segments, std::int64_t segment_count, std::int64_t rows, double* gram,
                          double* workspace, int multiprocessors, cudaStream_t stream) {
    const ListGramPlan plan = plan_list_gram(rows, multiprocessors);
    const auto table = std::make_unique<GramTable<T>>();
    for (std::int64_t left = 0; left < rows; left += plan.tile)
        for (std::int64_t right = left; right < rows; right += plan.tile) {
            const bool diagonal = left == right;
            const int step = most_segments(plan, diagonal);
            std::int64_t parts = 0;
            for (std::int64_t begin = 0; begin < segment_count; begin += step) {
                const std::int64_t end = std::min(begin + step, segment_count);
                const std::int64_t chunks = fill_table(*table, segments, begin, end, plan, rows, left, right);
                const std::int64_t blocks = std::min(chunks, plan.blocks);
                const auto kernel = plan.tile == 4 ? gram_chunks<T, 4, true>
                                    : diagonal     ? gram_chunks<T, kGramRows, true>
                                                   : gram_chunks<T, kGramRows, false>;
                const cudaError_t error = launch(kernel, Grid{blocks, 1}, kListThreads, plan.shared_bytes(), stream,
                                                 *table, chunks, workspace + parts * plan.part());
                if (error != cudaSuccess) return error;
                parts += blocks;
            }
            const cudaError_t error = add_gram_parts(gram, workspace, parts, rows, left, right, plan, stream);
            if (error != cudaSuccess) return error;
        }
    return cudaSuccess;
}

template <class T>
std::int64_t weighted_gram_workspace(const GramSegment<T>*, std::int64_t segment_count, std::int64_t rows,
                                     int multiprocessors) {
    const ListGramPlan plan = plan_list_gram(rows, multiprocessors);
    return ceil_div(segment_count, most_segments(plan, plan.tiles <= 1)) * plan.blocks * plan.part();
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                               \
    template cudaError_t weighted_gram(const GramSegment<T>*, std::int64_t, std::int64_t, double*, double*, int, \
                                       cudaStream_t);                                                            \
    template std::int64_t weighted_gram_workspace(const GramSegment<T>*, std::int64_t, std::int64_t, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
