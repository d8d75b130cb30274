// CPU kernels of the gradients family: running moments of gradients, and Gram matrices over all parameters at once.
//
// Parameters come as a list of tensors, each contiguous in memory. Sums over parameters are taken in float64. Results
// do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../scalar.h"
#include "fisher.h"
#include "moments.h"
#include "parallel.h"

namespace transferops::cpu {

// Gradients of one tensor of `size` weights, one after the other `sample_stride` elements apart, and their running
// moments of type S.
template <class T, class S>
struct RunningMoments {
    const T* gradients;
    std::int64_t sample_stride;
    std::int64_t size;
    S* mean;
    S* squares;  // sums of squared deviations from the mean; nullptr if not wanted
};

// Takes `samples` more gradients of every tensor into moments that hold `count` of them; before the first, the moments
// need not be initialised.
template <class T, class S>
void gradient_expectation(const std::vector<RunningMoments<T, S>>& tensors, std::int64_t samples, std::int64_t count,
                          const ParallelFor& parallel_for);

// The same for `lists` lists of tensors at once, and gram [lists, lists] = the inner products of the means afterwards,
// each list seen as one vector. moments is [tensors][lists], of the same size for a tensor in all lists. The first
// counts.size() lists take gradients and hold counts[k] of them; of the others the means are read and nothing else. No
// two means share memory, unless neither takes gradients.
template <class T, class S>
void gradient_expectation_gram(const std::vector<RunningMoments<T, S>>& moments, std::int64_t lists,
                               std::int64_t samples, const std::vector<std::int64_t>& counts, double* gram,
                               const ParallelFor& parallel_for);

// `rows` vectors over one tensor's `size` weights.
template <class T>
struct GramSegment {
    const T* const* rows;
    std::int64_t size;
    const T* base = nullptr;              // subtracted from every row
    const Compute<T>* weights = nullptr;  // of the products
};

// gram [rows, rows] = the sum over segments and weights p of weights_p (row_kp - base_p)(row_lp - base_p), both halves.
template <class T>
void weighted_gram(const std::vector<GramSegment<T>>& segments, std::int64_t rows, double* gram,
                   const ParallelFor& parallel_for);

// With S = G D^T for per-sample gradients G [samples, columns] and directions D [directions, columns], contiguous:
// gram [directions, directions] = S^T S / samples, diagonal [columns] = sum_n G_n * G_n / samples,
// norms [samples] = |G_n|^2. Without samples, zeros.
template <class T>
void gradient_fisher_gram(const MatrixView<T>& gradients, const Compute<T>* directions, std::int64_t count,
                          double* gram, Compute<T>* diagonal, double* norms, const ParallelFor& parallel_for);

}  // namespace transferops::cpu
