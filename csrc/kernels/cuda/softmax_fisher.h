// The Gram matrix of tangents under the Fisher information of a softmax, on CUDA devices; free of torch.
//
// Conventions as in fisher.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scalar.h"

namespace transferops::cuda {

// Logits [samples, classes] and their derivatives along directions, [directions, samples, classes], read only. The
// classes are contiguous; strides count elements.
template <class T>
struct TangentBatch {
    const T* logits;
    std::int64_t logits_stride;  // of the samples
    const T* tangents;
    std::int64_t directions, samples, classes;
    std::int64_t direction_stride, sample_stride;
};

// gram [K, K] = sum_n sum_c p_nc (T_knc - m_kn)(T_lnc - m_ln) with p = softmax(logits), m_kn = sum_c p_nc T_knc,
// symmetric to the last bit. Probabilities are float32 (float64 for float64 inputs), all else float64.
template <class T>
cudaError_t softmax_fisher_gram(const TangentBatch<T>& batch, double* gram, double* workspace, int multiprocessors,
                                cudaStream_t stream);
template <class T>
std::int64_t softmax_fisher_gram_workspace(const TangentBatch<T>& batch, int multiprocessors);

}  // namespace transferops::cuda
