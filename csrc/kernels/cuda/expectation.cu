// Running moments of lists of gradients, and of the Gram matrix of their means (gradients.h). Figures in the comments
// are budgets and floors, not yet measured on a GPU: an H200 has 132 multiprocessors, 67 TFLOP/s on float64 tensor
// cores and half of it beside them (datasheet), and copies 4.3 TB/s.

#include <algorithm>
#include <memory>
#include <vector>

#include "gradients.h"
#include "list_gram.h"

namespace transferops::cuda {
namespace {

template <int kWidth, class T, class S>
bool vectors_aligned(const RunningMoments<T, S>& x, std::int64_t samples) {
    return x.size % kWidth == 0 && (samples == 1 || x.sample_stride % kWidth == 0) &&
           is_aligned(x.gradients, kWidth * sizeof(T)) && is_aligned(x.mean, kWidth * sizeof(S)) &&
           is_aligned(x.squares, kWidth * sizeof(S));
}

// Welford's recurrence for one number; `share` is 1 over the number of samples with this one.
template <class S>
__device__ __forceinline__ void take_in(S value, S share, S& mean, S& squares) {
    const S before = value - mean;
    mean += before * share;
    squares += before * (value - mean);
}

// ---------------------------------------------------------------------------------------------------------------------
// Running moments. A block takes a chunk of one tensor.

constexpr int kMostTensors = 448;
constexpr int kUpdateWidth = 4;   // weights per access: 16 bytes of float
constexpr int kUpdateUnroll = 4;  // accesses in flight per thread and array
constexpr std::int64_t kUpdateChunk = kListThreads * kUpdateWidth * kUpdateUnroll;

template <class T, class S>
struct UpdateTable {
    RunningMoments<T, S> tensors[kMostTensors];
    std::int64_t first_chunks[kMostTensors + 1];
    bool aligned[kMostTensors];
    int count;
};

// One thread per 4 x 4 weights, which keeps their moments while the samples go by; Welford's recurrence. 256 threads,
// at most 128 registers, no shared memory: 2 blocks per multiprocessor, each with up to 48 KiB of float in flight.
// Floor: every gradient read once, the moments read and written once: (4 R + 8) d / 4.3e12 s for R float gradients of d
// weights and their mean alone, (4 R + 16) d / 4.3e12 s with the squares.
template <class T, class S>
__global__ void __launch_bounds__(kListThreads, 2)
    expectation_update(const __grid_constant__ UpdateTable<T, S> table, std::int64_t samples, std::int64_t count) {
    const int piece = piece_of(table.first_chunks, table.count, blockIdx.x);
    const RunningMoments<T, S>& x = table.tensors[piece];
    const bool aligned = table.aligned[piece];
    const std::int64_t begin =
        (blockIdx.x - table.first_chunks[piece]) * kUpdateChunk + std::int64_t{threadIdx.x} * kUpdateWidth;
    const auto place = [=](int u) { return begin + std::int64_t{u} * kListThreads * kUpdateWidth; };
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
__global__ void __launch_bounds__(kListThreads)
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
        for (int step = 0; step < kGramChunk / (kListThreads * kWidth); ++step) {
            const std::int64_t place = begin + std::int64_t{step} * kListThreads * kWidth;
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

// Up to kRows lists: one launch for as many tensors as a table holds, and one for the sum.
template <int kRows, class T, class S>
cudaError_t launch_expectation_gram(const ExpectationGram<T, S>& x, double* gram, double* workspace,
                                    int multiprocessors, cudaStream_t stream) {
    using Table = ExpectationGramTable<T, S, kRows>;
    const auto table = std::make_unique<Table>();
    const ListGramPlan plan = plan_list_gram(x.lists, multiprocessors);
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
            launch(expectation_gram<T, S, kRows>, Grid{blocks, 1}, kListThreads, plan.shared_bytes(), stream, *table,
                   chunks, x.samples, workspace + parts * plan.part());
        if (error != cudaSuccess) return error;
        parts += blocks;
        table->count = 0;
        chunks = 0;
    }
    return add_gram_parts(gram, workspace, parts, x.lists, 0, 0, plan, stream);
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
            launch(expectation_update<T, S>, Grid{chunks, 1}, kListThreads, 0, stream, *table, samples, count);
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
    if (x.lists > kGramRows) return weighted_gram_workspace<S>(nullptr, x.tensors, x.lists, multiprocessors);
    const ListGramPlan plan = plan_list_gram(x.lists, multiprocessors);
    return ceil_div(x.tensors, kMostMoments / plan.tile) * plan.blocks * plan.part();
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                           \
    template cudaError_t gradient_expectation(const RunningMoments<T, float>*, std::int64_t, std::int64_t,   \
                                              std::int64_t, cudaStream_t);                                   \
    template cudaError_t gradient_expectation(const RunningMoments<T, double>*, std::int64_t, std::int64_t,  \
                                              std::int64_t, cudaStream_t);                                   \
    template cudaError_t gradient_expectation_gram(const ExpectationGram<T, float>&, double*, double*, int,  \
                                                   cudaStream_t);                                            \
    template cudaError_t gradient_expectation_gram(const ExpectationGram<T, double>&, double*, double*, int, \
                                                   cudaStream_t);                                            \
    template std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, float>&, int);        \
    template std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, double>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
