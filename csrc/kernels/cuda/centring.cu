// Kernels and launchers of centring.h. All are bound by latency or by one read of small arrays; none has been measured
// on a GPU yet.

#include "centring.h"
#include "device.h"

namespace transferops::cuda {
namespace {

constexpr int kThreads = 256;

// The number of labels below `label`.
__device__ std::int64_t lower_bound(const std::int64_t* sorted_labels, std::int64_t rows, std::int64_t label) {
    std::int64_t begin = 0, end = rows;
    while (begin < end) {
        const std::int64_t middle = (begin + end) / 2;
        if (sorted_labels[middle] < label)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

// One thread per class, two binary searches each. 256 threads, at most 32 registers, no shared memory.
__global__ void __launch_bounds__(kThreads)
    class_offsets_search(const std::int64_t* sorted_labels, std::int64_t rows, std::int64_t classes,
                         std::int64_t* offsets, std::int64_t* counts) {
    const std::int64_t label = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (label > classes) return;
    const auto offset = [&](std::int64_t c) {
        return c == 0 ? 0 : c == classes ? rows : lower_bound(sorted_labels, rows, c);
    };
    const std::int64_t begin = offset(label);
    offsets[label] = begin;
    if (label < classes) counts[label] = offset(label + 1) - begin;
}

// One thread per column and set. 256 threads, at most 32 registers, no shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads) first_rows_copy(FeatureSets<T> x, double* out) {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= x.sets * x.columns) return;
    const std::int64_t set = index / x.columns, column = index % x.columns;
    out[index] = x.rows > 0 ? to_double(x.data[set * x.set_stride + column]) : 0.0;
}

// One thread per column and set, which walks down the classes twice; neighbours read neighbouring columns. 256 threads,
// at most 48 registers, no shared memory. Floor: sums read twice and written once, 24 C D / 4.3e12 s.
__global__ void __launch_bounds__(kThreads)
    recentre_columns(const std::int64_t* counts, std::int64_t sets, std::int64_t rows, std::int64_t classes,
                     std::int64_t columns, double* sums, double* shift) {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= sets * columns) return;
    double* column = sums + index / columns * classes * columns + index % columns;
    double total = 0;
#pragma unroll 8
    for (std::int64_t c = 0; c < classes; ++c) total += column[c * columns];
    const double before = shift[index];
    const double mean = before + (rows > 0 ? total / static_cast<double>(rows) : 0.0);
    shift[index] = mean;
    const double change = mean - before;  // as rounded, so that sums and shift agree
#pragma unroll 8
    for (std::int64_t c = 0; c < classes; ++c) column[c * columns] -= static_cast<double>(counts[c]) * change;
}

}  // namespace

cudaError_t class_offsets(const std::int64_t* sorted_labels, std::int64_t rows, std::int64_t classes,
                          std::int64_t* offsets, std::int64_t* counts, cudaStream_t stream) {
    return launch(class_offsets_search, Grid{ceil_div(classes + 1, kThreads), 1}, kThreads, 0, stream, sorted_labels,
                  rows, classes, offsets, counts);
}

template <class T>
cudaError_t first_rows(const FeatureSets<T>& features, double* out, cudaStream_t stream) {
    return launch(first_rows_copy<T>, Grid{ceil_div(features.sets * features.columns, kThreads), 1}, kThreads, 0,
                  stream, features, out);
}

cudaError_t recentre(const std::int64_t* counts, std::int64_t sets, std::int64_t rows, std::int64_t classes,
                     std::int64_t columns, double* sums, double* shift, cudaStream_t stream) {
    return launch(recentre_columns, Grid{ceil_div(sets * columns, kThreads), 1}, kThreads, 0, stream, counts, sets,
                  rows, classes, columns, sums, shift);
}

template cudaError_t first_rows(const FeatureSets<float>&, double*, cudaStream_t);
template cudaError_t first_rows(const FeatureSets<double>&, double*, cudaStream_t);
template cudaError_t first_rows(const FeatureSets<float16>&, double*, cudaStream_t);
template cudaError_t first_rows(const FeatureSets<bfloat16>&, double*, cudaStream_t);

}  // namespace transferops::cuda
