// CPU kernels of the Fisher family: what a weight's per-sample gradients are asked for, without the gradients in
// memory.
//
// Products and short sums are taken in float32 (float64 for float64 inputs), sums over tiles of a sample's gradient in
// float64. Results do not depend on the number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "../scalar.h"
#include "parallel.h"

namespace transferops::cpu {

using Extent = std::array<std::int64_t, 3>;  // depth, height, width; 1 for the dimensions that are not there

// A strided [samples, channels, depth, height, width] tensor, read only. Strides count elements.
template <class T>
struct SignalView {
    const T* data;
    std::int64_t samples;
    std::int64_t channels;
    Extent size;
    std::int64_t sample_stride;
    std::int64_t channel_stride;
    Extent stride;
};

// Which inputs meet which weights, as in a convolution with zero padding.
struct Window {
    Extent kernel{1, 1, 1};
    Extent stride{1, 1, 1};
    Extent padding{0, 0, 0};
    Extent dilation{1, 1, 1};
    std::int64_t groups = 1;
};

// A layer's inputs and the gradients at its outputs, for a batch. The per-sample gradient of its weight [O, I/groups,
// *kernel] is G_n = sum over output positions t of b_nt a_nt^T, with b_nt the output gradients and a_nt the inputs
// under the window. A linear layer is the case of a 1x1x1 window and its positions as the width. The caller guarantees
// that sizes fit: channels divisible by groups, grad_outputs of the size that the window gives.
template <class T>
struct LayerBatch {
    SignalView<T> inputs;
    SignalView<T> grad_outputs;
    Window window;
};

// out [O, I/groups, *kernel] = sum_n G_n * G_n, elementwise.
template <class T>
void fisher_diagonal(const LayerBatch<T>& layer, Compute<T>* out, const ParallelFor& parallel_for);

// Directions D_k, each as the weight [O, I/groups, *kernel], contiguous: wherever they are, so that nobody has to stack
// them.
template <class C>
using Directions = std::span<const C* const>;

// out [samples, number of directions] = <G_n, D_k>.
template <class T>
void fisher_projection(const LayerBatch<T>& layer, Directions<Compute<T>> directions, Compute<T>* out,
                       const ParallelFor& parallel_for);

// out [samples] = |G_n|^2.
template <class T>
void grad_norm(const LayerBatch<T>& layer, Compute<T>* out, const ParallelFor& parallel_for);

// A strided [directions, samples, classes] tensor, read only.
template <class T>
struct TangentView {
    const T* data;
    std::int64_t directions;
    std::int64_t samples;
    std::int64_t classes;
    std::int64_t direction_stride;
    std::int64_t sample_stride;
    std::int64_t class_stride;
};

// gram [K, K] = sum_n sum_c p_nc (T_knc - m_kn)(T_lnc - m_ln), p = softmax(logits [samples, classes]), m_kn = sum_c
// p_nc T_knc. Means are taken of the differences to the tangent at a sample's likeliest class, so that a common
// shift counts for nothing.
template <class T>
void softmax_fisher_gram(const T* logits, std::int64_t logits_sample_stride, std::int64_t logits_class_stride,
                         const TangentView<T>& tangents, double* gram, const ParallelFor& parallel_for);

}  // namespace transferops::cpu
