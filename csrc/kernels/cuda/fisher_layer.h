// From a layer to the operands of its per-sample gradients, and what the launchers of fisher.h share.
#pragma once

#include <cstdint>

#include "fisher.h"
#include "fisher_tiles.h"

namespace transferops::cuda {

// A layer as the kernels see it: per sample and group a matrix rows x columns, the product of two operands.
template <class Operand>
struct Gradients {
    Operand left, right;
    std::int64_t samples, groups;

    __host__ __device__ std::int64_t rows() const { return left.columns; }
    __host__ __device__ std::int64_t columns() const { return right.columns; }
    __host__ __device__ std::int64_t weights() const { return groups * rows() * columns(); }
    bool empty() const { return samples == 0 || left.positions == 0 || weights() == 0; }
};

// Whether windows are single positions along one axis.
template <class T>
bool is_linear(const LayerBatch<T>& layer) {
    const Window& w = layer.window;
    const Extent& inputs = layer.inputs.size;
    const Extent& outputs = layer.grad_outputs.size;
    return w.kernel.volume() == 1 && w.padding.depth + w.padding.height + w.padding.width == 0 && w.stride.width == 1 &&
           inputs.depth == 1 && inputs.height == 1 && inputs.width == outputs.width &&
           outputs.volume() == outputs.width;
}

// Whether the channels of each group are whole vectors of 16 bytes, aligned to as many, wherever they stand.
template <class T>
bool vectors_aligned(const Signal<T>& x, std::int64_t groups) {
    constexpr std::int64_t kWidth = 16 / sizeof(T);
    const auto whole = [](std::int64_t stride, std::int64_t size) { return size == 1 || stride % kWidth == 0; };
    return is_aligned(x.data, 16) && x.channels / groups % kWidth == 0 && whole(x.sample_stride, x.samples) &&
           whole(x.stride.depth, x.size.depth) && whole(x.stride.height, x.size.height) &&
           whole(x.stride.width, x.size.width);
}

template <class T>
Positions<T> positions_of(const Signal<T>& x, std::int64_t groups) {
    return {x.data, x.size.width, x.channels / groups, x.sample_stride, x.stride.width, vectors_aligned(x, groups)};
}

template <class T>
Patches<T> patches_of(const Signal<T>& x, const Window& window, const Extent& outputs) {
    const auto box = [](const Extent& e) {
        return
            typename Patches<T>::Box{static_cast<int>(e.depth), static_cast<int>(e.height), static_cast<int>(e.width)};
    };
    const std::int64_t channels = x.channels / window.groups;
    return {x.data,
            outputs.volume(),
            channels * window.kernel.volume(),
            x.sample_stride,
            x.stride,
            static_cast<int>(channels),
            box(x.size),
            box(window.kernel),
            box(window.stride),
            box(window.padding),
            box(window.dilation),
            Divisor(channels),
            Divisor(window.kernel.width),
            Divisor(window.kernel.height),
            Divisor(outputs.width),
            Divisor(outputs.height),
            vectors_aligned(x, window.groups)};
}

template <class T>
Gradients<Positions<T>> linear_gradients(const LayerBatch<T>& layer) {
    const std::int64_t groups = layer.window.groups;
    return {positions_of(layer.grad_outputs, groups), positions_of(layer.inputs, groups), layer.inputs.samples, groups};
}

// body(gradients) with the operands that fit the layer.
template <class T, class Body>
auto with_gradients(const LayerBatch<T>& layer, const Body& body) {
    const std::int64_t groups = layer.window.groups, samples = layer.inputs.samples;
    if (is_linear(layer)) return body(linear_gradients(layer));
    Window point;
    point.groups = groups;
    return body(Gradients<Patches<T>>{patches_of(layer.grad_outputs, point, layer.grad_outputs.size),
                                      patches_of(layer.inputs, layer.window, layer.grad_outputs.size), samples,
                                      groups});
}

// Whether gradients are outer products of vectors: then neither their squares nor their norms need the gradients.
template <class T>
bool has_one_position(const LayerBatch<T>& layer) {
    return is_linear(layer) && layer.inputs.size.width == 1;
}

// In doubles, for so many numbers of type C.
template <class C>
std::int64_t doubles_for(std::int64_t size) {
    return ceil_div(size * sizeof(C), sizeof(double));
}

// out[i] = sum over p < count of parts[p][i] in double, where a part is `size` numbers of type C.
template <class C>
cudaError_t launch_add_parts(C* out, const double* parts, std::int64_t count, std::int64_t size, cudaStream_t stream);

// out = the sum of what launch_parts(parts) leaves for each split of the samples, of one alone without a workspace.
template <class C, class Launch>
cudaError_t launch_splits(C* out, double* workspace, std::int64_t splits, std::int64_t size, cudaStream_t stream,
                          const Launch& launch_parts) {
    if (splits == 1) return launch_parts(out);
    const cudaError_t error = launch_parts(reinterpret_cast<C*>(workspace));
    return error != cudaSuccess ? error : launch_add_parts(out, workspace, splits, size, stream);
}

template <class C>
std::int64_t splits_workspace(std::int64_t splits, std::int64_t size) {
    return splits == 1 ? 0 : doubles_for<C>(splits * size);
}

}  // namespace transferops::cuda
