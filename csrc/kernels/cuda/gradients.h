// Running moments of gradients, and Gram matrices over all parameters at once, on CUDA devices; free of torch.
//
// Parameters come as a list of tensors, each contiguous in memory. A workspace is scratch of so many doubles, which may
// be dropped once the stream has passed. Results are the same in every run; `multiprocessors` of the device decides how
// sums are split, and is the one thing beside the input that the last bits of a Gram matrix depend on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scalar.h"
#include "fisher.h"

namespace transferops::cuda {

// Gradients of one tensor of `size` weights, one after the other `sample_stride` elements apart, and their running
// moments of type S.
template <class T, class S>
struct RunningMoments {
    const T* gradients;
    std::int64_t sample_stride;
    std::int64_t size;
    S* mean;
    S* squares;  // sums of squared deviations from the mean; nullptr in all tensors of a call if not wanted
};

// Takes `samples` more gradients of every tensor into moments that hold `count` of them; before the first, the moments
// need not be initialised.
template <class T, class S>
cudaError_t gradient_expectation(const RunningMoments<T, S>* tensors, std::int64_t tensor_count, std::int64_t samples,
                                 std::int64_t count, cudaStream_t stream);

// Running moments of `lists` lists of tensors, [tensors][lists] and of one size for a tensor in all lists. The first
// `updated` take `samples` gradients and hold counts[k]; of the others the means are read and nothing else.
template <class T, class S>
struct ExpectationGram {
    const RunningMoments<T, S>* moments;
    std::int64_t tensors, lists, updated, samples;
    const std::int64_t* counts;
};

// The update of each list, and gram [lists, lists] = the inner products of the means afterwards, each list seen as one
// vector: together for up to 8 lists, one after the other for more.
template <class T, class S>
cudaError_t gradient_expectation_gram(const ExpectationGram<T, S>& x, double* gram, double* workspace,
                                      int multiprocessors, cudaStream_t stream);
template <class T, class S>
std::int64_t gradient_expectation_gram_workspace(const ExpectationGram<T, S>& x, int multiprocessors);

// Vectors over one tensor's `size` weights: rows[0] .. rows[count of the call - 1].
template <class T>
struct GramSegment {
    const T* const* rows;
    std::int64_t size;
    const T* base;              // subtracted from every row; may be nullptr
    const Compute<T>* weights;  // of the products; may be nullptr
};

// gram [rows, rows] = the sum over segments and weights p of weights_p (row_kp - base_p)(row_lp - base_p), symmetric to
// the last bit.
template <class T>
cudaError_t weighted_gram(const GramSegment<T>* segments, std::int64_t segment_count, std::int64_t rows, double* gram,
                          double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t weighted_gram_workspace(const GramSegment<T>* segments, std::int64_t segment_count, std::int64_t rows,
                                     int multiprocessors);

// Per-sample gradients G [samples, columns] and directions D [directions, columns], contiguous columns.
template <class T>
struct SampleGradients {
    const T* gradients;
    std::int64_t samples, columns, row_stride;
    const Compute<T>* directions;
    std::int64_t count;  // of the directions, `columns` elements apart
};

// With S = G D^T: gram [directions, directions] = S^T S / samples, diagonal [columns] = sum_n G_n * G_n / samples,
// norms [samples] = |G_n|^2. There has to be a sample.
template <class T>
cudaError_t gradient_fisher_gram(const SampleGradients<T>& x, double* gram, Compute<T>* diagonal, double* norms,
                                 double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t gradient_fisher_gram_workspace(const SampleGradients<T>& x, int multiprocessors);

}  // namespace transferops::cuda
