// Norms and projections of per-sample gradients by way of products between positions, which a layer of few of them is
// better served by (fisher.h says what the arguments are, fisher.cu which way is taken).
#pragma once

#include "fisher.h"

namespace transferops::cuda {

// |G_n|^2 = sum over t and s of (a_t . a_s)(b_t . b_s).
template <class T>
cudaError_t ghost_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, cudaStream_t stream);
template <class T>
std::int64_t ghost_norm_workspace(const LayerBatch<T>& layer);

// <G_n, D_k> = sum over t of b_t . (D_k a_t), for linear layers whose samples have at most 128 positions.
template <class T>
cudaError_t contraction(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count, Compute<T>* out,
                        double* workspace, cudaStream_t stream);
template <class T>
std::int64_t contraction_workspace(const LayerBatch<T>& layer, std::int64_t count);

// What they take of a multiprocessor, in slabs of a tile of 128 x 64 (16 channels; 32 of 16-bit norms). Infinite where
// there is no such way.
template <class T>
double ghost_norm_cost(const LayerBatch<T>& layer, int multiprocessors);
template <class T>
double contraction_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);

}  // namespace transferops::cuda
