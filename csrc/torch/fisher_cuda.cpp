// The Fisher family on CUDA devices, registered with torch's dispatcher: checks, allocation and launches only.
#include "../kernels/cuda/fisher.h"
#include "../kernels/cuda/softmax_fisher.h"
#include "cuda.h"
#include "fisher.h"

namespace transferops {
namespace {

cuda::Extent extent_of(const std::array<std::int64_t, 3>& x) { return {x[0], x[1], x[2]}; }

template <class T>
cuda::Signal<T> signal_of(const LayerArguments::Signal& x, std::int64_t samples) {
    return {static_cast<const T*>(x.tensor.data_ptr()),
            samples,
            x.channels,
            extent_of(x.size),
            x.sample_stride(),
            extent_of(x.stride)};
}

// The kernels want contiguous channels, or classes; other layouts are copied.
Tensor with_contiguous_last(const Tensor& x) {
    const std::int64_t last = x.dim() - 1;
    return last >= 0 && x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

// The same of [N, C, *spatial], where channels are second: copied to channels last.
Tensor with_contiguous_second(const Tensor& x) {
    if (x.dim() < 3 || x.numel() == 0 || x.size(1) == 1 || x.stride(1) == 1) return x;
    std::vector<std::int64_t> shape, flat{x.size(0), x.size(1), 1};
    for (std::int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
    for (std::int64_t d = 2; d < x.dim(); ++d) flat[2] *= x.size(d);
    const Tensor rows = torch::stable::transpose(torch::stable::reshape(x, flat), 1, 2);
    return torch::stable::view(torch::stable::transpose(torch::stable::contiguous(rows), 1, 2), shape);
}

// Calls body with the layer and a null pointer of the type that it computes in.
template <class Body>
void with_layer(const LayerArguments& x, const Body& body) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;  // the kernels count positions and their extent in 32 bits
    for (int d = 0; d < 3; ++d)
        if (x.inputs.size[d] + 2 * x.padding[d] >= kMost)
            fail("inputs: expected less than 2^30 positions along an axis");
    if (x.grad_outputs.size[0] * x.grad_outputs.size[1] * x.grad_outputs.size[2] >= kMost)
        fail("grad_outputs: expected less than 2^30 positions");
    dispatch_floating("inputs", x.inputs.tensor.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const cuda::Window window{extent_of(x.kernel), extent_of(x.stride), extent_of(x.padding), extent_of(x.dilation),
                                  x.groups};
        body(cuda::LayerBatch<T>{signal_of<T>(x.inputs, x.samples), signal_of<T>(x.grad_outputs, x.samples), window},
             static_cast<Compute<T>*>(nullptr));
    });
}

Tensor diagonal(const LayerArguments& x) {
    const DeviceScope scope(x.inputs.tensor);
    const int multiprocessors = scope.multiprocessors();
    Tensor out = x.new_result(x.weight_shape);
    with_layer(x, [&](const auto& layer, auto* null) {
        const Workspace scratch(x.inputs.tensor, cuda::fisher_diagonal_workspace(layer, multiprocessors));
        check_cuda(cuda::fisher_diagonal(layer, static_cast<decltype(null)>(out.data_ptr()), scratch.data(),
                                         multiprocessors, scope.stream));
    });
    return out;
}

// Directions one behind the other, as the kernels want them; those that are so, the parts of one tensor, are not
// copied.
Tensor in_one_block(const LayerArguments& x, const TensorList& moves) {
    const auto count = static_cast<std::int64_t>(moves.size());
    bool adjacent = true;
    for (std::int64_t k = 1; adjacent && k < count; ++k) {
        const auto* before = static_cast<const char*>(moves[k - 1].data_ptr());
        adjacent = moves[k].data_ptr() == before + moves[k - 1].numel() * moves[k - 1].element_size();
    }
    if (count > 0 && adjacent) return moves[0];
    std::vector<std::int64_t> shape = x.weight_shape;
    shape.insert(shape.begin(), count);
    Tensor block = x.new_result(shape);
    for (std::int64_t k = 0; k < count; ++k) {
        Tensor part = torch::stable::select(block, 0, k);
        torch::stable::copy_(part, moves[k]);
    }
    return block;
}

Tensor projection(const LayerArguments& x, const TensorList& directions) {
    const DeviceScope scope(x.inputs.tensor);
    const int multiprocessors = scope.multiprocessors();
    const TensorList list = x.contiguous_directions(directions);
    const Tensor moves = in_one_block(x, list);  // perhaps a part of what the list keeps
    const auto count = static_cast<std::int64_t>(list.size());
    Tensor out = x.new_result({x.samples, count});
    with_layer(x, [&](const auto& layer, auto* null) {
        using Pointer = decltype(null);
        const Workspace scratch(x.inputs.tensor, cuda::fisher_projection_workspace(layer, count, multiprocessors));
        check_cuda(cuda::fisher_projection(layer, static_cast<Pointer>(moves.data_ptr()), count,
                                           static_cast<Pointer>(out.data_ptr()), scratch.data(), multiprocessors,
                                           scope.stream));
    });
    return out;
}

Tensor norm(const LayerArguments& x) {
    const DeviceScope scope(x.inputs.tensor);
    const int multiprocessors = scope.multiprocessors();
    Tensor out = x.new_result({x.samples});
    with_layer(x, [&](const auto& layer, auto* null) {
        const Workspace scratch(x.inputs.tensor, cuda::grad_norm_workspace(layer, multiprocessors));
        check_cuda(cuda::grad_norm(layer, static_cast<decltype(null)>(out.data_ptr()), scratch.data(), multiprocessors,
                                   scope.stream));
    });
    return out;
}

LayerArguments linear(const Tensor& inputs, const Tensor& grad_outputs) {
    return {with_contiguous_last(inputs), with_contiguous_last(grad_outputs)};
}

LayerArguments conv(const Tensor& inputs, const Tensor& grad_outputs, const IntList& kernel_size, const IntList& stride,
                    const IntList& padding, const IntList& dilation, std::int64_t groups) {
    return {with_contiguous_second(inputs),
            with_contiguous_second(grad_outputs),
            kernel_size,
            stride,
            padding,
            dilation,
            groups};
}

Tensor linear_fisher_diagonal(Tensor inputs, Tensor grad_outputs) { return diagonal(linear(inputs, grad_outputs)); }

Tensor linear_fisher_projection(Tensor inputs, Tensor grad_outputs, TensorList directions) {
    return projection(linear(inputs, grad_outputs), directions);
}

Tensor linear_grad_norm(Tensor inputs, Tensor grad_outputs) { return norm(linear(inputs, grad_outputs)); }

Tensor conv_fisher_diagonal(Tensor inputs, Tensor grad_outputs, IntList kernel_size, IntList stride, IntList padding,
                            IntList dilation, std::int64_t groups) {
    return diagonal(conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups));
}

Tensor conv_fisher_projection(Tensor inputs, Tensor grad_outputs, TensorList directions, IntList kernel_size,
                              IntList stride, IntList padding, IntList dilation, std::int64_t groups) {
    return projection(conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups), directions);
}

Tensor conv_grad_norm(Tensor inputs, Tensor grad_outputs, IntList kernel_size, IntList stride, IntList padding,
                      IntList dilation, std::int64_t groups) {
    return norm(conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups));
}

Tensor softmax_fisher_gram(Tensor logits, Tensor tangents) {
    check_tangents(logits, tangents);
    logits = with_contiguous_last(logits);
    tangents = with_contiguous_last(tangents);
    const DeviceScope scope(logits);
    const int multiprocessors = scope.multiprocessors();
    const std::int64_t directions = tangents.size(0);
    Tensor gram = torch::stable::new_empty(logits, {directions, directions}, ScalarType::Double);
    dispatch_floating("logits", logits.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const cuda::TangentBatch<T> batch{static_cast<const T*>(logits.data_ptr()),
                                          logits.stride(0),
                                          static_cast<const T*>(tangents.data_ptr()),
                                          directions,
                                          logits.size(0),
                                          logits.size(1),
                                          tangents.stride(0),
                                          tangents.stride(1)};
        const Workspace scratch(logits, cuda::softmax_fisher_gram_workspace(batch, multiprocessors));
        check_cuda(cuda::softmax_fisher_gram(batch, static_cast<double*>(gram.data_ptr()), scratch.data(),
                                             multiprocessors, scope.stream));
    });
    return gram;
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CUDA, m) {
    m.impl("linear_fisher_diagonal", TORCH_BOX(&transferops::linear_fisher_diagonal));
    m.impl("linear_fisher_projection", TORCH_BOX(&transferops::linear_fisher_projection));
    m.impl("linear_grad_norm", TORCH_BOX(&transferops::linear_grad_norm));
    m.impl("conv_fisher_diagonal", TORCH_BOX(&transferops::conv_fisher_diagonal));
    m.impl("conv_fisher_projection", TORCH_BOX(&transferops::conv_fisher_projection));
    m.impl("conv_grad_norm", TORCH_BOX(&transferops::conv_grad_norm));
    m.impl("softmax_fisher_gram", TORCH_BOX(&transferops::softmax_fisher_gram));
}
