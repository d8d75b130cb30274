// Which way the quantities of fisher.h take: the one of the lower cost. No kernels are here.

#include <algorithm>

#include "fisher_layer.h"
#include "fisher_ways.h"

namespace transferops::cuda {
namespace {

// Fewer tiles, for which less is read, against more, where blocks are fewer than multiprocessors. As good is better: it
// has more slabs on their way and a convolution's addresses in a table.
template <class T>
bool wide_diagonal_is_cheaper(const LayerBatch<T>& layer, int multiprocessors) {
    return wide_diagonal_cost(layer, multiprocessors) <= tile_diagonal_cost(layer, multiprocessors);
}

// Products between positions against those of the gradient: where positions are few, (T + 1) (I + O) / 2 < I O.
template <class T>
bool ghost_norm_is_cheaper(const LayerBatch<T>& layer, int multiprocessors) {
    return ghost_norm_cost(layer, multiprocessors) < tile_norm_cost(layer, multiprocessors);
}

enum class ProjectionWay { kTiles, kWideTiles, kContraction };

// Products of every position with every direction against those of the gradient and what dotting it takes, in tiles of
// which the wide ones read less.
template <class T>
ProjectionWay projection_way(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    const double tiles = tile_projection_cost(layer, count, multiprocessors);
    const double wide = wide_projection_cost(layer, count, multiprocessors);
    if (contraction_cost(layer, count, multiprocessors) < std::min(tiles, wide)) return ProjectionWay::kContraction;
    return wide <= tiles ? ProjectionWay::kWideTiles : ProjectionWay::kTiles;
}

}  // namespace

template <class T>
cudaError_t fisher_diagonal(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                            cudaStream_t stream) {
    return wide_diagonal_is_cheaper(layer, multiprocessors)
               ? wide_diagonal(layer, out, workspace, multiprocessors, stream)
               : tile_diagonal(layer, out, workspace, multiprocessors, stream);
}

template <class T>
std::int64_t fisher_diagonal_workspace(const LayerBatch<T>& layer, int multiprocessors) {
    return wide_diagonal_is_cheaper(layer, multiprocessors) ? wide_diagonal_workspace(layer, multiprocessors)
                                                            : tile_diagonal_workspace(layer, multiprocessors);
}

template <class T>
cudaError_t fisher_projection(const LayerBatch<T>& layer, const Compute<T>* directions, std::int64_t count,
                              Compute<T>* out, double* workspace, int multiprocessors, cudaStream_t stream) {
    switch (projection_way(layer, count, multiprocessors)) {
        case ProjectionWay::kContraction:
            return contraction(layer, directions, count, out, workspace, stream);
        case ProjectionWay::kWideTiles:
            return wide_projection(layer, directions, count, out, workspace, multiprocessors, stream);
        default:
            return tile_projection(layer, directions, count, out, workspace, multiprocessors, stream);
    }
}

template <class T>
std::int64_t fisher_projection_workspace(const LayerBatch<T>& layer, std::int64_t count, int multiprocessors) {
    switch (projection_way(layer, count, multiprocessors)) {
        case ProjectionWay::kContraction:
            return contraction_workspace(layer, count);
        case ProjectionWay::kWideTiles:
            return wide_projection_workspace(layer, count, multiprocessors);
        default:
            return tile_projection_workspace(layer, count, multiprocessors);
    }
}

template <class T>
cudaError_t grad_norm(const LayerBatch<T>& layer, Compute<T>* out, double* workspace, int multiprocessors,
                      cudaStream_t stream) {
    if (has_one_position(layer)) return outer_product_norm(layer, out, stream);
    return ghost_norm_is_cheaper(layer, multiprocessors) ? ghost_norm(layer, out, workspace, stream)
                                                         : tile_norm(layer, out, workspace, multiprocessors, stream);
}

template <class T>
std::int64_t grad_norm_workspace(const LayerBatch<T>& layer, int multiprocessors) {
    if (has_one_position(layer)) return 0;
    return ghost_norm_is_cheaper(layer, multiprocessors) ? ghost_norm_workspace(layer)
                                                         : tile_norm_workspace(layer, multiprocessors);
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                             \
    template cudaError_t fisher_diagonal(const LayerBatch<T>&, Compute<T>*, double*, int, cudaStream_t);       \
    template std::int64_t fisher_diagonal_workspace(const LayerBatch<T>&, int);                                \
    template cudaError_t fisher_projection(const LayerBatch<T>&, const Compute<T>*, std::int64_t, Compute<T>*, \
                                           double*, int, cudaStream_t);                                        \
    template std::int64_t fisher_projection_workspace(const LayerBatch<T>&, std::int64_t, int);                \
    template cudaError_t grad_norm(const LayerBatch<T>&, Compute<T>*, double*, int, cudaStream_t);             \
    template std::int64_t grad_norm_workspace(const LayerBatch<T>&, int);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cuda
