// Kernels and launchers of gradients.h. Figures in the comments are budgets and floors, not yet measured on a GPU: an
// H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores and half of it beside them (datasheet), and copies
// 4.3 TB/s.
//
// Lists of tensors travel as tables in the kernels' parameters (up to 32 KB since CUDA 12.1), so that one launch covers
// them all, nothing is copied to the device beforehand, and CUDA graphs can record the call. Longer lists take several
// launches.

#include <algorithm>
#include <memory>
#include <vector>

#include "device.h"
#include "gradients.h"

namespace transferops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Which of `count` pieces `chunk` belongs to: the last that begins at or before it. first_chunks[0] is 0.
__device__ inline int piece_of(const std::int64_t* first_chunks, int count, std::int64_t chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_chunks[middle] <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// ---------------------------------------------------------------------------------------------------------------------
// Running moments. A block takes a chunk of one tensor.

constexpr int kMostTensors = 448;
constexpr int kUpdateWidth = 4;   // weights per access: 16 bytes of float
constexpr int kUpdateUnroll = 4;  // accesses in flight per thread and array
constexpr std::int64_t kUpdateChunk = kThreads * kUpdateWidth * kUpdateUnroll;

template <class T, class S>
struct UpdateTable {
    RunningMoments<T, S> tensors[kMostTensors];
    std::int64_t first_chunks[kMostTensors + 1];
    bool aligned[kMostTensors];
    int count;
};

// Welford's recurrence for one number; `share` is 1 over the number of samples with this one.
template <class S>
__device__ __forceinline__ void take_in(S value, S share, S& mean, S& squares) {
    const S before = value - mean;
    mean += before * share;
    squares += before * (value - mean);
}

// One thread per 4 x 4 weights, which keeps their moments while the samples go by; Welford's recurrence. 256 threads,
// at most 128 registers, no shared memory: 2 blocks per multiprocessor, each with up to 48 KiB of float in flight.
// Floor: every gradient read once, the moments read and written once: (4 R + 8) d / 4.3e12 s for R float gradients of d
// weights and their mean alone, (4 R + 16) d / 4.3e12 s with the squares.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    expectation_update(const __grid_constant__ UpdateTable<T, S> table, std::int64_t samples, std::int64_t count) {
    const int piece = piece_of(table.first_chunks, table.count, blockIdx.x);
    const RunningMoments<T, S>& x = table.tensors[piece];
    const bool aligned = table.aligned[piece];
    const std::int64_t begin =
        (blockIdx.x - table.first_chunks[piece]) * kUpdateChunk + std::int64_t{threadIdx.x} * kUpdateWidth;
    const auto place = [=](int u) { return begin + std::int64_t{u} * kThreads * kUpdateWidth; };
    int width[kUpdateUnroll];
    Vector<S, kUpdateWidth> mean[kUpdateUnroll] = {}, squares[kUpdateUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUpdateUnroll; ++u) {
        width[u] = elements_left<kUpdateWidth>(x.size, place(u));
        if (count == 0) continue;
        Vector<S, kUpdateWidth> loaded[1];
        load_vectors(loaded, width[u], aligned, [&](int) { return x.mean + place(u); });
        mean[u] = loaded[0];
        if (!x.squares) continue;
        load_vectors(loaded, width[u], aligned, [&](int) { return x.squares + place(u); });
        squares[u] = loaded[0];
    }
    for (std::int64_t n = 0; n < samples; ++n) {
        const T* gradients = x.gradients + n * x.sample_stride;
        const S share = S{1} / static_cast<S>(count + n + 1);
        Vector<T, kUpdateWidth> values[kUpdateUnroll][1];
#pragma unroll
        for (int u = 0; u < kUpdateUnroll; ++u)
            load_vectors(values[u], width[u], aligned, [&](int) { return gradients + place(u); });
#pragma unroll
        for (int u = 0; u < kUpdateUnroll; ++u)
#pragma unroll
            for (int v = 0; v < kUpdateWidth; ++v)
                take_in(convert<S>(values[u][0].values[v]), share, mean[u].values[v], squares[u].values[v]);
    }
#pragma unroll
    for (int u = 0; u < kUpdateUnroll; ++u) {
        if (aligned && width[u] > 0) {
            *reinterpret_cast<Vector<S, kUpdateWidth>*>(x.mean + place(u)) = mean[u];
            if (x.squares) *reinterpret_cast<Vector<S, kUpdateWidth>*>(x.squares + place(u)) = squares[u];
        } else {
#pragma unroll
            for (int v = 0; v < kUpdateWidth; ++v) {
                if (v >= width[u]) continue;
                x.mean[place(u) + v] = mean[u].values[v];
                if (x.squares) x.squares[place(u) + v] = squares[u].values[v];
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gram matrices. Rows are taken in tiles of up to 8; a launch does one pair of tiles. Blocks stride over chunks of the
// weights and keep the tile's sums in registers; a second kernel adds the blocks' sums in order.

constexpr int kGramRows = 8;  // of a tile
constexpr int kMostRowPointers = 2048;
constexpr int kMostSegments = 256;
constexpr std::int64_t kGramChunk = 4096;

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

// parts[block] = the sum of the threads' sums, of the upper triangle if kDiagonal. By the whole block, in 4 KiB of
// shared memory.
template <int kRows, bool kDiagonal>
__device__ __forceinline__ void write_part(const double (&sums)[kRows][kRows], double* parts) {
    double* const shared = dynamic_shared();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = kDiagonal ? i : 0; j < kRows; ++j) {
            const double sum = sum_lanes(sums[i][j]);
            if (lane == 0) shared[warp * kRows * kRows + i * kRows + j] = sum;
        }
    __syncthreads();  // the warps' sums are complete
    const int index = threadIdx.x, row = index / kRows, column = index % kRows;
    if (row >= kRows || (kDiagonal && row > column)) return;
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kRows * kRows + index];
    parts[std::int64_t{blockIdx.x} * kRows * kRows + index] = sum;
}

// parts[block][kRows][kRows], of a tile with itself the upper triangle only. Rows that do not exist repeat the last,
// and their products are not used. 256 threads, at most 255 registers (128 for tiles of 4), 4 KiB of shared memory; 8
// accesses of 16 bytes (16 of 8 for two tiles) in flight per thread: 32 KiB. Floor: one read, 4 K d / 4.3e12 s for
// float, up to 8 rows; beyond, every row is read ceil(K / 8) times, since the 136 sums of 16 rows would take 272
// registers. Beside it stand, per weight and 8 rows, 36 float64 operations (64 for two tiles, which read 16 rows) and 8
// conversions, 16 per clock and multiprocessor: at most 0.6 of the time of the read.
template <class T, int kRows, bool kDiagonal>
__global__ void __launch_bounds__(kThreads)
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
        for (int step = 0; step < kGramChunk / (kThreads * kWidth); ++step) {
            const std::int64_t place = begin + std::int64_t{step} * kThreads * kWidth;
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

// Means that change, and their Gram matrix: per segment the moments of kRows lists, those that do not exist empty.
constexpr int kMostMoments = 720;

template <class T, class S, int kRows>
struct ExpectationGramTable {
    static constexpr int kSegments = kMostMoments / kRows;

    RunningMoments<T, S> moments[kSegments][kRows];
    std::int64_t first_chunks[kSegments + 1];
    std::int64_t counts[kRows];
    bool aligned[kSegments];
    int count, updated;  // segments; lists that take gradients
};

// The update and the products of the new means, which are still in registers, in one read of both. 256 threads, at most
// 255 registers, 4 KiB of shared memory. Floor: per weight the bytes of K means read, and of U gradients and U means
// (and twice that of the squares) read and written, over 4.3e12 B/s.
template <class T, class S, int kRows>
__global__ void __launch_bounds__(kThreads)
    expectation_gram(const __grid_constant__ ExpectationGramTable<T, S, kRows> table, std::int64_t chunks,
                     std::int64_t samples, double* parts) {
    constexpr int kWidth = 16 / sizeof(S);
    double sums[kRows][kRows] = {};
    for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int piece = piece_of(table.first_chunks, table.count, chunk);
        const RunningMoments<T, S>* const rows = table.moments[piece];
        const bool aligned = table.aligned[piece];
        const std::int64_t begin =
            (chunk - table.first_chunks[piece]) * kGramChunk + std::int64_t{threadIdx.x} * kWidth;
#pragma unroll 1
        for (int step = 0; step < kGramChunk / (kThreads * kWidth); ++step) {
            const std::int64_t place = begin + std::int64_t{step} * kThreads * kWidth;
            Vector<S, kWidth> means[kRows][1], squares[kRows][1] = {};
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                const int width = elements_left<kWidth>(rows[k].size, place);
                const bool begun = k >= table.updated || table.counts[k] > 0;
                load_vectors(means[k], begun ? width : 0, aligned, [=](int) { return rows[k].mean + place; });
                if (rows[k].squares)
                    load_vectors(squares[k], begun ? width : 0, aligned, [=](int) { return rows[k].squares + place; });
            }
            for (std::int64_t n = 0; n < samples; ++n) {
                Vector<T, kWidth> values[kRows][1];
#pragma unroll
                for (int k = 0; k < kRows; ++k)
                    load_vectors(values[k], k < table.updated ? elements_left<kWidth>(rows[k].size, place) : 0, aligned,
                                 [=](int) { return rows[k].gradients + n * rows[k].sample_stride + place; });
#pragma unroll
                for (int k = 0; k < kRows; ++k) {
                    if (k >= table.updated) continue;
                    const S share = S{1} / static_cast<S>(table.counts[k] + n + 1);
#pragma unroll
                    for (int v = 0; v < kWidth; ++v)
                        take_in(convert<S>(values[k][0].values[v]), share, means[k][0].values[v],
                                squares[k][0].values[v]);
                }
            }
            // Element by element: nvcc 13.0 makes that of stores of 16 bytes, too.
#pragma unroll
            for (int k = 0; k < kRows; ++k)
#pragma unroll
                for (int v = 0; v < kWidth; ++v) {
                    if (k >= table.updated || place + v >= rows[k].size) continue;
                    rows[k].mean[place + v] = means[k][0].values[v];
                    if (rows[k].squares) rows[k].squares[place + v] = squares[k][0].values[v];
                }
#pragma unroll
            for (int v = 0; v < kWidth; ++v)
#pragma unroll
                for (int i = 0; i < kRows; ++i)
#pragma unroll
                    for (int j = i; j < kRows; ++j)
                        sums[i][j] += to_double(means[i][0].values[v]) * to_double(means[j][0].values[v]);
        }
    }
    write_part<kRows, true>(sums, parts);
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

// ---------------------------------------------------------------------------------------------------------------------
// Summaries of per-sample gradients.

constexpr int kDirections = 8;                                         // of a tile: the columns of mma_f64
constexpr int kSampleRows = 16;                                        // samples at a time: its rows
constexpr int kFisherParts = kSampleRows * kDirections + kSampleRows;  // products and norms of a warp

// Columns of a lane at a time.
template <class T>
constexpr int kLaneColumns = sizeof(T) == 8 ? 16 : 32;
template <class T>
constexpr std::int64_t kFisherChunk = 4 * kWarps * kLaneColumns<T>;

// A warp owns 4 x 32 columns (16 of double): it keeps their part of 8 directions and of the diagonal in registers while
// all samples go by, 16 at a time. A lane reads 16 bytes of two samples; which columns these are is the same for both
// operands of the product, so that their order in it does not matter. Block x strides over chunks of 8 such stretches
// and adds into products[y][x][sample][8] and norms[x][sample]; block y takes 8 directions, and the first the diagonal
// and the norms. 256 threads, at most 255 registers, 18 KiB of shared memory. Floor: one read of the gradients,
// 4 N P / 4.3e12 s for float (16 float64 operations on tensor cores and 4 beside them per number are 0.6 of it); 8 more
// directions read them once more, where possible from the L2 cache. Partial sums are 1.1 % of that for float.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fisher_products(SampleGradients<T> x, bool aligned, double* products, double* norms, Compute<T>* diagonal) {
    constexpr int kWidth = 16 / sizeof(T), kGroups = kLaneColumns<T> / kWidth;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, member = lane % 4;
    const std::int64_t direction = std::int64_t{blockIdx.y} * kDirections + group;
    const bool first_tile = blockIdx.y == 0;
    products += (std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * x.samples * kDirections;
    norms += std::int64_t{blockIdx.x} * x.samples;
    double* const shared = dynamic_shared();
    int turn = 0;
    for (std::int64_t chunk = blockIdx.x; chunk * kFisherChunk<T> < x.columns; chunk += gridDim.x) {
        const std::int64_t begin = chunk * kFisherChunk<T> + warp * 4 * kLaneColumns<T> + member * kWidth;
        Compute<T> directions[kGroups][kWidth];
        double squares[kGroups][kWidth] = {};
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const std::int64_t column = begin + i * 4 * kWidth;
            const int width = direction < x.count ? elements_left<kWidth>(x.columns, column) : 0;
#pragma unroll
            for (int v = 0; v < kWidth; ++v)
                directions[i][v] = v < width ? x.directions[direction * x.columns + column + v] : Compute<T>{0};
        }
        for (std::int64_t row = 0; row < x.samples; row += kSampleRows, turn ^= 1) {
            double sums[4] = {}, norm[2] = {};
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                const std::int64_t column = begin + i * 4 * kWidth;
                const int width = elements_left<kWidth>(x.columns, column);
                Vector<T, kWidth> values[2][1];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const std::int64_t sample = row + group + 8 * h;
                    load_vectors(values[h], sample < x.samples ? width : 0, aligned,
                                 [&](int) { return x.gradients + sample * x.row_stride + column; });
                }
#pragma unroll
                for (int v = 0; v < kWidth; v += 2) {
                    const double a[4] = {to_double(values[0][0].values[v]), to_double(values[1][0].values[v]),
                                         to_double(values[0][0].values[v + 1]), to_double(values[1][0].values[v + 1])};
                    const double b[2] = {to_double(directions[i][v]), to_double(directions[i][v + 1])};
                    mma_f64(sums, a, b);
                    if (!first_tile) continue;
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        norm[e % 2] += a[e] * a[e];
                        squares[i][v + e / 2] += a[e] * a[e];
                    }
                }
            }
            double* const mine = shared + (turn * kWarps + warp) * kFisherParts;
#pragma unroll
            for (int e = 0; e < 4; ++e) mine[(group + e / 2 * 8) * kDirections + member * 2 + e % 2] = sums[e];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                norm[h] = sum_lanes<4>(norm[h]);
                if (member == 0) mine[kSampleRows * kDirections + group + 8 * h] = norm[h];
            }
            __syncthreads();  // the warps' sums of these samples are complete, and those before have been added
            const int index = threadIdx.x;
            const bool is_norm = index >= kSampleRows * kDirections;
            const std::int64_t sample = row + (is_norm ? index - kSampleRows * kDirections : index / kDirections);
            if (index >= kFisherParts || sample >= x.samples || (is_norm && !first_tile)) continue;
            double* const target = is_norm ? norms + sample : products + sample * kDirections + index % kDirections;
            double sum = chunk == blockIdx.x ? 0.0 : *target;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += shared[(turn * kWarps + w) * kFisherParts + index];
            *target = sum;
        }
        if (!first_tile) continue;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const std::int64_t column = begin + i * 4 * kWidth;
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
                double sum = squares[i][v];
#pragma unroll
                for (int distance = 4; distance < kWarp; distance *= 2)
                    sum += __shfl_xor_sync(kFullWarp, sum, distance);
                if (group == v && column + v < x.columns)
                    diagonal[column + v] = static_cast<Compute<T>>(sum / static_cast<double>(x.samples));
            }
        }
    }
}

// out[y][size] = the sum over p < count of parts[y][p][size]. A block takes 32 elements. 256 threads, at most 64
// registers, 2 KiB of shared memory. Bound by latency.
__global__ void __launch_bounds__(kSumThreads, 4)
    fisher_add_parts(const double* parts, std::int64_t count, std::int64_t size, double* out) {
    const std::int64_t index = std::int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
    parts += std::int64_t{blockIdx.y} * count * size;
    const double sum = sum_parts(index < size ? count : 0, [=](std::int64_t p) { return parts[p * size + index]; });
    if (threadIdx.x < kWarp && index < size) out[std::int64_t{blockIdx.y} * size + index] = sum;
}

// gram [directions, directions] = S^T S / samples for S as products[tile][sample][8]. A block takes 32 elements. 256
// threads, at most 64 registers, 2 KiB of shared memory. Bound by latency.
__global__ void __launch_bounds__(kSumThreads, 4)
    fisher_gram(const double* products, std::int64_t samples, std::int64_t directions, double* gram) {
    const std::int64_t index = std::int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
    const std::int64_t row = index / directions, column = index % directions;
    const bool exists = index < directions * directions;
    const auto entry = [=](std::int64_t sample, std::int64_t k) {
        return products[(k / kDirections * samples + sample) * kDirections + k % kDirections];
    };
    const double sum =
        sum_parts(exists ? samples : 0, [=](std::int64_t n) { return entry(n, row) * entry(n, column); });
    if (threadIdx.x < kWarp && exists) gram[index] = sum / static_cast<double>(samples);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching.

template <int kWidth, class T, class S>
bool vectors_aligned(const RunningMoments<T, S>& x, std::int64_t samples) {
    return x.size % kWidth == 0 && (samples == 1 || x.sample_stride % kWidth == 0) &&
           is_aligned(x.gradients, kWidth * sizeof(T)) && is_aligned(x.mean, kWidth * sizeof(S)) &&
           is_aligned(x.squares, kWidth * sizeof(S));
}

struct GramPlan {
    int tile;                    // rows of a tile
    std::int64_t tiles, blocks;  // blocks at most, of a launch

    std::int64_t part() const { return std::int64_t{tile} * tile; }
    int segments(bool diagonal) const {
        return std::min(kMostSegments, kMostRowPointers / (diagonal ? tile : 2 * tile));
    }
};

GramPlan plan_gram(std::int64_t rows, int multiprocessors) {
    const int tile = rows <= 4 ? 4 : kGramRows;
    return {tile, ceil_div(rows, tile), std::int64_t{2} * multiprocessors};
}

// Fills a table with segments begin .. end for the tiles that begin with these rows; its number of chunks.
template <class T>
std::int64_t fill_table(GramTable<T>& table, const GramSegment<T>* segments, std::int64_t begin, std::int64_t end,
                        const GramPlan& plan, std::int64_t rows, std::int64_t left, std::int64_t right) {
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

// Up to kRows lists: one launch for as many tensors as a table holds, and one for the sum.
template <int kRows, class T, class S>
cudaError_t launch_expectation_gram(const ExpectationGram<T, S>& x, double* gram, double* workspace,
                                    int multiprocessors, cudaStream_t stream) {
    using Table = ExpectationGramTable<T, S, kRows>;
    const auto table = std::make_unique<Table>();
    const GramPlan plan = plan_gram(x.lists, multiprocessors);
    table->updated = x.samples > 0 ? static_cast<int>(x.updated) : 0;
    std::copy_n(x.counts, x.updated, table->counts);
    std::int64_t chunks = 0, parts = 0;
    for (std::int64_t t = 0; t < x.tensors; ++t) {
        const RunningMoments<T, S>* own = x.moments + t * x.lists;
        table->first_chunks[table->count] = chunks;
        bool aligned = true;
        for (int k = 0; k < kRows; ++k) {
            RunningMoments<T, S>& row = table->moments[table->count][k];
            row = k < x.lists ? own[k] : RunningMoments<T, S>{};
            aligned = aligned && vectors_aligned<16 / sizeof(S)>(row, x.samples);
        }
        table->aligned[table->count++] = aligned;
        chunks += ceil_div(own->size, kGramChunk);
        if (table->count < Table::kSegments && t + 1 < x.tensors) continue;
        table->first_chunks[table->count] = chunks;
        const std::int64_t blocks = std::min(chunks, plan.blocks);
        const cudaError_t error =
            launch(expectation_gram<T, S, kRows>, Grid{blocks, 1}, kThreads, kWarps * plan.part() * sizeof(double),
                   stream, *table, chunks, x.samples, workspace + parts * plan.part());
        if (error != cudaSuccess) return error;
        parts += blocks;
        table->count = 0;
        chunks = 0;
    }
    return launch(gram_finish, Grid{ceil_div(plan.part(), kWarp), 1}, kSumThreads, kSumShared, stream, gram, workspace,
                  parts, x.lists, std::int64_t{0}, std::int64_t{0}, plan.tile);
}

template <class T>
std::int64_t fisher_blocks(const SampleGradients<T>& x, int multiprocessors) {
    return std::min(ceil_div(x.columns, kFisherChunk<T>), std::int64_t{2} * multiprocessors);
}

}  // namespace

template <class T, class S>
cudaError_t gradient_expectation(const RunningMoments<T, S>* tensors, std::int64_t tensor_count, std::int64_t samples,
                                 std::int64_t count, cudaStream_t stream) {
    const auto table = std::make_unique<UpdateTable<T, S>>();
    std::int64_t chunks = 0;
    if (samples == 0) return cudaSuccess;
    for (std::int64_t t = 0; t < tensor_count; ++t) {
        if (tensors[t].size > 0) {
            table->tensors[table->count] = tensors[t];
            table->aligned[table->count] = vectors_aligned<kUpdateWidth>(tensors[t], samples);
            table->first_chunks[table->count++] = chunks;
            chunks += ceil_div(tensors[t].size, kUpdateChunk);
        }
        if (table->count < kMostTensors && t + 1 < tensor_count) continue;
        table->first_chunks[table->count] = chunks;
        const cudaError_t error =
            launch(expectation_update<T, S>, Grid{chunks, 1}, kThreads, 0, stream, *table, samples, count);
        if (error != cudaSuccess) return error;
        table->count = 0;
        chunks = 0;
    }
    return cudaSuccess;
}

template <class T, class S>
cudaError_t gradient_expectation_gram(const ExpectationGram<T, S>& x, double* gram, double* workspace,
                                      int multiprocessors, cudaStream_t stream) {
    if (x.lists <= 4) return launch_expectation_gram<4>(x, gram, workspace, multiprocessors, stream);
    if (x.lists <= kGramRows) return launch_expectation_gram<kGramRows>(x, gram, workspace, multiprocessors, stream);
    std::vector<RunningMoments<T, S>> list(static_cast<std::size_t>(x.tensors));
    for (std::int64_t k = 0; k < x.updated; ++k) {
        for (std::int64_t t = 0; t < x.tensors; ++t) list[t] = x.moments[t * x.lists + k];
        const cudaError_t error = gradient_expectation(list.data(), x.tensors, x.samples, x.counts[k], stream);
        if (error != cudaSuccess) return error;
    }
    std::vector<const S*> rows;
    std::vector<GramSegment<S>> segments;
    for (std::int64_t i = 0; i < x.tensors * x.lists; ++i) rows.push_back(x.moments[i].mean);
    for (std::int64_t t = 0; t < x.tensors; ++t)
        segments.push_back({rows.data() + t * x.lists, x.moments[t * x.lists].size, nullptr, nullptr});
    return weighted_gram(segments.data(), x.tensors, x.lists, gram, workspace, multiprocessors, stream);
}

template <class T, class S>
std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, S>& x, int multiprocessors) {
    const GramPlan plan = plan_gram(x.lists, multiprocessors);
    const int segments = x.lists <= kGramRows ? kMostMoments / plan.tile : plan.segments(false);
    return ceil_div(x.tensors, segments) * plan.blocks * plan.part();
}

template <class T>
cudaError_t weighted_gram(const GramSegment<T>* segments, std::int64_t segment_count, std::int64_t rows, double* gram,
                          double* workspace, int multiprocessors, cudaStream_t stream) {
    const GramPlan plan = plan_gram(rows, multiprocessors);
    const auto table = std::make_unique<GramTable<T>>();
    for (std::int64_t left = 0; left < rows; left += plan.tile)
        for (std::int64_t right = left; right < rows; right += plan.tile) {
            const bool diagonal = left == right;
            const int step = plan.segments(diagonal);
            std::int64_t parts = 0;
            for (std::int64_t begin = 0; begin < segment_count; begin += step) {
                const std::int64_t end = std::min(begin + step, segment_count);
                const std::int64_t chunks = fill_table(*table, segments, begin, end, plan, rows, left, right);
                const std::int64_t blocks = std::min(chunks, plan.blocks);
                const auto kernel = plan.tile == 4 ? gram_chunks<T, 4, true>
                                    : diagonal     ? gram_chunks<T, kGramRows, true>
                                                   : gram_chunks<T, kGramRows, false>;
                const cudaError_t error =
                    launch(kernel, Grid{blocks, 1}, kThreads, kWarps * plan.part() * sizeof(double), stream, *table,
                           chunks, workspace + parts * plan.part());
                if (error != cudaSuccess) return error;
                parts += blocks;
            }
            const cudaError_t error = launch(gram_finish, Grid{ceil_div(plan.part(), kWarp), 1}, kSumThreads,
                                             kSumShared, stream, gram, workspace, parts, rows, left, right, plan.tile);
            if (error != cudaSuccess) return error;
        }
    return cudaSuccess;
}

template <class T>
std::int64_t weighted_gram_workspace(const GramSegment<T>*, std::int64_t segment_count, std::int64_t rows,
                                     int multiprocessors) {
    const GramPlan plan = plan_gram(rows, multiprocessors);
    return ceil_div(segment_count, plan.segments(plan.tiles <= 1)) * plan.blocks * plan.part();
}

template <class T>
cudaError_t gradient_fisher_gram(const SampleGradients<T>& x, double* gram, Compute<T>* diagonal, double* norms,
                                 double* workspace, int multiprocessors, cudaStream_t stream) {
    const std::int64_t blocks = fisher_blocks(x, multiprocessors);
    const std::int64_t tiles = std::max<std::int64_t>(ceil_div(x.count, kDirections), 1);
    const std::int64_t size = x.samples * kDirections;
    double* const norm_parts = workspace + tiles * blocks * size;
    double* const products = norm_parts + blocks * x.samples;
    const bool aligned =
        x.columns % (16 / sizeof(T)) == 0 && x.row_stride % (16 / sizeof(T)) == 0 && is_aligned(x.gradients, 16);
    constexpr std::size_t kShared = 2 * kWarps * kFisherParts * sizeof(double);
    cudaError_t error = launch(fisher_products<T>, Grid{blocks, tiles}, kThreads, kShared, stream, x, aligned,
                               workspace, norm_parts, diagonal);
    if (error != cudaSuccess) return error;
    error = launch(fisher_add_parts, Grid{ceil_div(x.samples, kWarp), 1}, kSumThreads, kSumShared, stream, norm_parts,
                   blocks, x.samples, norms);
    if (error != cudaSuccess) return error;
    error = launch(fisher_add_parts, Grid{ceil_div(size, kWarp), tiles}, kSumThreads, kSumShared, stream, workspace,
                   blocks, size, products);
    if (error != cudaSuccess) return error;
    return launch(fisher_gram, Grid{ceil_div(x.count * x.count, kWarp), 1}, kSumThreads, kSumShared, stream, products,
                  x.samples, x.count, gram);
}

template <class T>
std::int64_t gradient_fisher_gram_workspace(const SampleGradients<T>& x, int multiprocessors) {
    const std::int64_t tiles = std::max<std::int64_t>(ceil_div(x.count, kDirections), 1);
    const std::int64_t blocks = fisher_blocks(x, multiprocessors);
    return x.samples * (tiles * kDirections * (blocks + 1) + blocks);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                    \
    template cudaError_t gradient_expectation(const RunningMoments<T, float>*, std::int64_t, std::int64_t,            \
                                              std::int64_t, cudaStream_t);                                            \
    template cudaError_t gradient_expectation(const RunningMoments<T, double>*, std::int64_t, std::int64_t,           \
                                              std::int64_t, cudaStream_t);                                            \
    template cudaError_t gradient_expectation_gram(const ExpectationGram<T, float>&, double*, double*, int,           \
                                                   cudaStream_t);                                                     \
    template cudaError_t gradient_expectation_gram(const ExpectationGram<T, double>&, double*, double*, int,          \
                                                   cudaStream_t);                                                     \
    template std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, float>&, int);                 \
    template std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, double>&, int);                \
    template cudaError_t weighted_gram(const GramSegment<T>*, std::int64_t, std::int64_t, double*, double*, int,      \
                                       cudaStream_t);                                                                 \
    template std::int64_t weighted_gram_workspace(const GramSegment<T>*, std::int64_t, std::int64_t, int);            \
    template cudaError_t gradient_fisher_gram(const SampleGradients<T>&, double*, Compute<T>*, double*, double*, int, \
                                              cudaStream_t);                                                          \
    template std::int64_t gradient_fisher_gram_workspace(const SampleGradients<T>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
