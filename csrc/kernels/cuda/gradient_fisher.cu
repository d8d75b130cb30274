// Summaries of per-sample gradients (gradients.h). Figures in the comments are budgets and floors, not yet measured on
// a GPU: an H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor cores and half of it beside them (datasheet),
// and copies 4.3 TB/s.

#include <algorithm>

#include "device.h"
#include "gradients.h"

namespace transferops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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

template <class T>
std::int64_t fisher_blocks(const SampleGradients<T>& x, int multiprocessors) {
    return std::min(ceil_div(x.columns, kFisherChunk<T>), std::int64_t{2} * multiprocessors);
}

}  // namespace

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
    template cudaError_t gradient_fisher_gram(const SampleGradients<T>&, double*, Compute<T>*, double*, double*, int, \
                                              cudaStream_t);                                                          \
    template std::int64_t gradient_fisher_gram_workspace(const SampleGradients<T>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
