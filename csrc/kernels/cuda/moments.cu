// Class sums and norm moments (moments.h). Figures in the comments are budgets and floors, not yet measured on a GPU:
// an H200 has 132 multiprocessors and copies 4.3 TB/s.

#include <algorithm>
#include <cstddef>

#include "device.h"
#include "feature_sets.h"
#include "moments.h"

namespace transferops::cuda {
namespace {

// Columns that a lane takes at a time: one 16-byte load.
template <class T>
constexpr int kColumns = 16 / sizeof(T);

// ---------------------------------------------------------------------------------------------------------------------
// Sums of partial sums, the second pass of class_sums and norm_moments.

// store(column, sum over p = 0 .. count - 1 of partial(p)[column]) for every column. A block takes 32 columns at a
// time.
template <class Partial, class Store>
__device__ void sum_partials(std::int64_t count, std::int64_t columns, Partial partial, Store store) {
    for (std::int64_t first = std::int64_t{kWarp} * blockIdx.y; first < columns;
         first += std::int64_t{kWarp} * gridDim.y) {
        const std::int64_t column = first + threadIdx.x % kWarp;
        const bool exists = column < columns;
        const double sum = sum_parts(exists ? count : 0, [=](std::int64_t p) { return partial(p)[column]; });
        if (threadIdx.x < kWarp && exists) store(column, sum);
        __syncthreads();  // before the next columns take the shared memory
    }
}

// Blocks along x for `items` sums; along y as many as help to fill the device, each looping over groups of 32 columns.
Grid sum_grid(std::int64_t items, std::int64_t columns) {
    constexpr std::int64_t kBlocks = 4096;
    return {items, std::clamp<std::int64_t>(ceil_div(kBlocks, std::max<std::int64_t>(items, 1)), 1,
                                            std::max<std::int64_t>(ceil_div(columns, kWarp), 1))};
}

// ---------------------------------------------------------------------------------------------------------------------
// Class sums. The sorted rows are cut into chunks of equal length, so that the work is even whatever the class sizes. A
// class that lies within one chunk is written straight to the output. Any other leaves one partial sum in each chunk
// that it touches: the "tail" of the chunk it begins in, and the "head" of every later one. A chunk has at most one of
// each.

struct Chunks {
    std::int64_t rows, count;  // rows of a chunk (the last may have fewer), number of chunks
};

Chunks class_sum_chunks(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t kWarps = 4096;      // about 32 for each multiprocessor
    constexpr std::int64_t kMinimumRows = 64;  // the partial sums are then below a tenth of float input
    const std::int64_t strips = std::max<std::int64_t>(sets * ceil_div(columns, kWarp * kColumns<float>), 1);
    const std::int64_t wanted = std::clamp<std::int64_t>(kWarps / strips, 16, 1024);
    const std::int64_t chunk_rows = std::max(ceil_div(rows, wanted), kMinimumRows);
    return {chunk_rows, ceil_div(rows, chunk_rows)};
}

// partials[set][chunk][head or tail][column]
__device__ double* class_partial(double* partials, const Chunks& chunks, std::int64_t columns, std::int64_t set,
                                 std::int64_t chunk, bool tail) {
    return partials + ((set * chunks.count + chunk) * 2 + tail) * columns;
}

constexpr int kClassSumThreads = 128;
constexpr int kClassSumRows = 8;  // rows in flight

// One warp per set, chunk and strip of 32 x 16 bytes of columns; the lanes own their columns and never communicate.
// 128 threads, at most 102 registers (170 for 16-bit types), no shared memory: 5 blocks (3) per multiprocessor, and 8
// loads of 512 bytes in flight per warp: 80 KiB (48). Floor: one read of the features, 4 N D / 4.3e12 s for float. Two
// float64 operations and one conversion (16 per clock and multiprocessor: 7.6 TB/s of 16-bit input) are below that.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kClassSumThreads, sizeof(T) < 4 ? 3 : 5)
    class_sums_chunks(FeatureSets<T> x, const std::int64_t* order, const std::int64_t* offsets, std::int64_t classes,
                      const double* shift, double* sums, double* partials, Chunks chunks) {
    constexpr int kWidth = kColumns<T>;
    const std::int64_t strips = ceil_div(x.columns, kWarp * kWidth);
    const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const std::int64_t chunk = warp / strips % chunks.count, set = warp / strips / chunks.count;
    const std::int64_t column = (warp % strips * kWarp + threadIdx.x % kWarp) * kWidth;
    if (set >= x.sets || column >= x.columns) return;
    const int width = elements_left<kWidth>(x.columns, column);

    const std::int64_t begin = chunk * chunks.rows;
    const int length = static_cast<int>(min(chunks.rows, x.rows - begin));
    const T* data = x.data + set * x.set_stride + column;
    order += begin;
    double offset[kWidth], sum[kWidth] = {};
    load_doubles(offset, shift_at(shift, set * x.columns + column), width, kAligned);

    std::int64_t current = 0;  // the class of row `begin`: the first that ends behind it
    for (std::int64_t last = classes - 1; current < last;) {
        const std::int64_t middle = (current + last) / 2;
        if (offsets[middle + 1] > begin)
            last = middle;
        else
            current = middle + 1;
    }
    // Where the current class ends, counted from `begin`; one more than the chunk has if beyond it.
    const auto find_end = [&] { return static_cast<int>(min(offsets[current + 1] - begin, std::int64_t{length} + 1)); };
    int class_end = find_end();
    const auto finish_class = [&] {
        double* target = sums + (set * classes + current) * x.columns;
        if (offsets[current] < begin)
            target = class_partial(partials, chunks, x.columns, set, chunk, false);
        else if (class_end > length)
            target = class_partial(partials, chunks, x.columns, set, chunk, true);
        store_vector(target + column, sum, width, kAligned);
    };

    for (int first = 0; first < length; first += kClassSumRows) {
        Vector<T, kWidth> rows[kClassSumRows];
        const T* sources[kClassSumRows];  // all addresses before any load; beyond the chunk its last row again
#pragma unroll
        for (int r = 0; r < kClassSumRows; ++r) sources[r] = data + order[min(first + r, length - 1)] * x.row_stride;
        load_vectors(rows, width, kAligned, [&](int r) { return sources[r]; });
#pragma unroll
        for (int r = 0; r < kClassSumRows; ++r) {
            if (first + r >= length) break;
            if (first + r == class_end) {
                finish_class();
                for (; class_end == first + r; class_end = find_end()) ++current;  // steps over empty classes
#pragma unroll
                for (int v = 0; v < kWidth; ++v) sum[v] = 0;
            }
#pragma unroll
            for (int v = 0; v < kWidth; ++v) sum[v] += to_double(rows[r].values[v]) - offset[v];
        }
    }
    finish_class();
}

// One block per set and class (and groups of columns): adds the partial sums of a class that touches several chunks,
// writes zeros for an empty class. 256 threads, at most 64 registers, 2 KiB of shared memory: 4 blocks per
// multiprocessor. Floor: reads at most one row of doubles per 32 rows of the features; most blocks return at once.
__global__ void __launch_bounds__(kSumThreads, 4)
    class_sums_finish(double* sums, double* partials, const std::int64_t* offsets, std::int64_t classes,
                      std::int64_t columns, Chunks chunks) {
    const std::int64_t set = blockIdx.x / classes, current = blockIdx.x % classes;
    const std::int64_t begin = offsets[current], end = offsets[current + 1];
    const std::int64_t first = begin / chunks.rows, last = (end - 1) / chunks.rows;
    if (begin < end && first == last) return;
    double* target = sums + (set * classes + current) * columns;
    sum_partials(
        begin < end ? last - first + 1 : 0, columns,
        [=](std::int64_t p) { return class_partial(partials, chunks, columns, set, first + p, p == 0); },
        [=](std::int64_t column, double sum) { target[column] = sum; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Moments weighted by the squared norm of a row.

constexpr int kNormThreads = 256;
constexpr int kNormRows = 16;  // in a batch; their squared norms are known before the first is used
constexpr int kNormWarps = kNormThreads / kWarp;
static_assert(kNormRows == 2 * kNormWarps);                          // a warp sums the norms of two rows
constexpr std::size_t kNormShared = 2 * kNormRows * sizeof(double);  // one batch read while the next is written

// A multiple of the batch; about four blocks for each multiprocessor.
Chunks norm_chunks(std::int64_t sets, std::int64_t rows) {
    constexpr std::int64_t kBlocks = 512;
    const std::int64_t wanted = std::clamp<std::int64_t>(kBlocks / std::max<std::int64_t>(sets, 1), 16, kBlocks);
    const std::int64_t chunk_rows = std::max<std::int64_t>(ceil_div(ceil_div(rows, wanted), kNormRows), 1) * kNormRows;
    return {chunk_rows, ceil_div(rows, chunk_rows)};
}

// partials[set][chunk]: the columns of the cubic moment, then the quartic one; padded, so that pairs are aligned.
__host__ __device__ std::int64_t norm_pitch(std::int64_t columns) { return (columns + 2) / 2 * 2; }

// One block per set and chunk of rows, which it takes in batches: each warp sums the squares of two rows, in pairs of
// columns, so that the shift (8 bytes a column) is read without gaps; then each thread adds the weighted rows for its
// columns, reading them again from cache (a batch is 16 D elements). 256 threads, at most 128 registers, 256 bytes of
// shared memory: 2 blocks per multiprocessor, 64 bytes in flight per thread. Floor: one read of the features from
// memory, 4 N D / 4.3e12 s for float; the second read and the partial sums (16 bytes per column and batch) come from L1
// and L2.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_moments_chunks(FeatureSets<T> x, const double* shift, double* partials, Chunks chunks) {
    constexpr int kWidth = kColumns<T>, kFlight = sizeof(T) < 4 ? 4 : 8;  // rows in flight per thread
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const std::int64_t set = blockIdx.x / chunks.count, chunk = blockIdx.x % chunks.count;
    const std::int64_t begin = chunk * chunks.rows, end = min(begin + chunks.rows, x.rows);
    const T* data = x.data + set * x.set_stride;
    double* partial = partials + blockIdx.x * norm_pitch(x.columns);
    if (shift) shift += set * x.columns;

    double quartic = 0;
    for (std::int64_t first = begin; first < end; first += kNormRows) {
        double* norms = dynamic_shared() + (first - begin) / kNormRows % 2 * kNormRows;
        const int count = static_cast<int>(min(end - first, std::int64_t{kNormRows}));
        const T* batch = data + first * x.row_stride;
        double norm[2] = {};
        const std::int64_t rows[2] = {min(warp, count - 1) * x.row_stride,
                                      min(warp + kNormWarps, count - 1) * x.row_stride};
        for (std::int64_t start = lane * 2; start < x.columns; start += kWidth * kWarp * 2) {
            Vector<T, 2> loaded[kWidth][2];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const std::int64_t column = start + i * kWarp * 2;
                load_vectors(loaded[i], elements_left<2>(x.columns, column), kAligned,
                             [&](int j) { return batch + column + rows[j]; });
            }
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const std::int64_t column = start + i * kWarp * 2;
                const int width = elements_left<2>(x.columns, column);
                double offset[2];
                load_doubles(offset, shift_at(shift, column), width, kAligned);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int v = 0; v < 2; ++v) {
                        const double y = v < width ? to_double(loaded[i][j].values[v]) - offset[v] : 0.0;
                        norm[j] += y * y;
                    }
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            norm[j] = sum_lanes(norm[j]);
            if (lane == 0 && warp + j * kNormWarps < count) norms[warp + j * kNormWarps] = norm[j];
        }
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < count) quartic += norms[threadIdx.x] * norms[threadIdx.x];

        for (std::int64_t column = threadIdx.x * kWidth; column < x.columns; column += kNormThreads * kWidth) {
            const int width = elements_left<kWidth>(x.columns, column);
            double offset[kWidth], sum[kWidth];
            load_doubles(offset, shift_at(shift, column), width, kAligned);
            load_doubles(sum, first > begin ? partial + column : nullptr, width, kAligned);
#pragma unroll
            for (int part = 0; part < kNormRows; part += kFlight) {
                Vector<T, kWidth> loaded[kFlight];
                load_vectors(loaded, width, kAligned,
                             [&](int r) { return batch + column + min(part + r, count - 1) * x.row_stride; });
#pragma unroll
                for (int r = 0; r < kFlight; ++r) {
                    if (part + r >= count) break;
#pragma unroll
                    for (int v = 0; v < kWidth; ++v)
                        sum[v] += norms[part + r] * (to_double(loaded[r].values[v]) - offset[v]);
                }
            }
            store_vector(partial + column, sum, width, kAligned);
        }
    }

    if (warp == 0) {
        quartic = sum_lanes<kNormRows>(quartic);
        if (lane == 0) partial[x.columns] = quartic;
    }
}

// One block per set (and groups of columns): adds the chunks. 256 threads, at most 64 registers, 2 KiB of shared
// memory: 4 blocks per multiprocessor. Floor: at most 512 rows of doubles, bound by latency.
__global__ void __launch_bounds__(kSumThreads, 4)
    norm_moments_finish(double* cubic, double* quartic, const double* partials, std::int64_t columns,
                        std::int64_t chunks) {
    const std::int64_t set = blockIdx.x, pitch = norm_pitch(columns);
    sum_partials(
        chunks, columns + 1, [=](std::int64_t p) { return partials + (set * chunks + p) * pitch; },
        [=](std::int64_t column, double sum) {
            (column < columns ? cubic[set * columns + column] : quartic[set]) = sum;
        });
}

}  // namespace

template <class T>
cudaError_t class_sums(const FeatureSets<T>& features, const std::int64_t* order, const std::int64_t* offsets,
                       std::int64_t classes, const double* shift, double* sums, double* workspace,
                       cudaStream_t stream) {
    const std::int64_t sets = features.sets, rows = features.rows, columns = features.columns;
    if (columns == 0 || classes == 0) return cudaSuccess;
    const Chunks chunks = class_sum_chunks(sets, rows, columns);
    const bool aligned = vectors_aligned(features, shift, kColumns<T>) && is_aligned(sums, 16);
    const auto kernel = aligned ? class_sums_chunks<T, true> : class_sums_chunks<T, false>;
    const std::int64_t warps = sets * chunks.count * ceil_div(columns, kWarp * kColumns<T>);
    const cudaError_t error = launch(kernel, Grid{ceil_div(warps * kWarp, kClassSumThreads), 1}, kClassSumThreads, 0,
                                     stream, features, order, offsets, classes, shift, sums, workspace, chunks);
    if (error != cudaSuccess) return error;
    return launch(class_sums_finish, sum_grid(sets * classes, columns), kSumThreads, kSumShared, stream, sums,
                  workspace, offsets, classes, columns, chunks);
}

std::int64_t class_sums_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    return sets * class_sum_chunks(sets, rows, columns).count * 2 * columns;
}

template <class T>
cudaError_t norm_moments(const FeatureSets<T>& features, const double* shift, double* cubic, double* quartic,
                         double* workspace, cudaStream_t stream) {
    const Chunks chunks = norm_chunks(features.sets, features.rows);
    const auto kernel =
        vectors_aligned(features, shift, kColumns<T>) ? norm_moments_chunks<T, true> : norm_moments_chunks<T, false>;
    const cudaError_t error = launch(kernel, Grid{features.sets * chunks.count, 1}, kNormThreads, kNormShared, stream,
                                     features, shift, workspace, chunks);
    if (error != cudaSuccess) return error;
    return launch(norm_moments_finish, sum_grid(features.sets, features.columns + 1), kSumThreads, kSumShared, stream,
                  cubic, quartic, workspace, features.columns, chunks.count);
}

std::int64_t norm_moments_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns) {
    return sets * norm_chunks(sets, rows).count * norm_pitch(columns);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                                 \
    template cudaError_t class_sums(const FeatureSets<T>&, const std::int64_t*, const std::int64_t*, std::int64_t, \
                                    const double*, double*, double*, cudaStream_t);                                \
    template cudaError_t norm_moments(const FeatureSets<T>&, const double*, double*, double*, double*, cudaStream_t);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
