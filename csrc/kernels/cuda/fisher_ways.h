// The ways to the quantities of a layer's per-sample gradients, of which fisher_routes.cu takes one. What
// the arguments are fisher.h says. A cost is what a way takes of each multiprocessor, in slabs of a tile of 128 x 64:
// infinite where there is no such way.
#pragma once

#include "fisher.h"

namespace transferops::cuda {

// From tiles of the gradients themselves, in registers.
template <class T>
cudaError_t tile_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                          cudaStream_t stream);
template <class T>
std::int64_t tile_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors);
template <class T>
double tile_diagonal_cost(const LayerBatch<T>& layer, int multiprocessors);

// From tiles of twice the size, for aligned 16-bit types whose samples have few enough positions.
template <class T>
cudaError_t wide_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                          cudaStream_t stream);
template <class T>
std::int64_t wide_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors);
template <class T>
double wide_diagonal_cost(const LayerBatch<T>& layer, int multiprocessors);

template <class T>
cudaError_t tile_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                      cudaStream_t stream);
template <class T>
std::int64_t tile_norm_workspace(const LayerBatch<T>& layer, int multiprocessors);
template <class T>
double tile_norm_cost(const LayerBatch<T>& layer, int multiprocessors);

template <class T>
cudaError_t tile_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                            Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t tile_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);
template <class T>
double tile_projection_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);

// From tiles of twice the size, for aligned 16-bit types; of convolutions, where the tables of their positions fit.
template <class T>
cudaError_t wide_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                            Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t wide_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);
template <class T>
double wide_projection_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);

// |G_n|^2 = sum over t and s of (a_t . a_s)(b_t . b_s).
template <class T>
cudaError_t ghost_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, cudaStream_t stream);
template <class T>
std::int64_t ghost_norm_workspace(const LayerBatch<T>& layer);
template <class T>
double ghost_norm_cost(const LayerBatch<T>& layer, int multiprocessors);

// The case of one position, |b|^2 |a|^2.
template <class T>
cudaError_t outer_product_norm(const LayerBatch<T>& layer, Compute<T>* out, cudaStream_t stream);

// <G_n, D_k> = sum over t of b_t . (D_k a_t), for linear layers whose samples have at most 128 positions.
template <class T>
cudaError_t contraction(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count, Compute<T>* out,
                        double* workspace, cudaStream_t stream);
template <class T>
std::int64_t contraction_workspace(const LayerBatch<T>& layer, std::int64_t count);
template <class T>
double contraction_cost(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors);

}  // namespace transferops::cuda
