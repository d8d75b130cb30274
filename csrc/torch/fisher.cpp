// The Fisher family on the CPU, registered with torch's dispatcher: checks and allocation only.
#include "fisher.h"

#include "../kernels/cpu/fisher.h"
#include "parallel.h"

namespace transferops {
namespace {

template <class T>
cpu::SignalView<T> view_of(const LayerArguments::Signal& x, std::int64_t samples) {
    return {static_cast<const T*>(x.tensor.data_ptr()),
            samples,
            x.channels,
            x.size,
            x.sample_stride(),
            x.channel_stride,
            x.stride};
}

// Calls body with the layer and a null pointer of the type that it computes in.
template <class Body>
void with_layer(const LayerArguments& x, const Body& body) {
    dispatch_floating("inputs", x.inputs.tensor.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const cpu::Window window{x.kernel, x.stride, x.padding, x.dilation, x.groups};
        body(cpu::LayerBatch<T>{view_of<T>(x.inputs, x.samples), view_of<T>(x.grad_outputs, x.samples), window},
             static_cast<Compute<T>*>(nullptr));
    });
}

Tensor diagonal(const LayerArguments& x) {
    Tensor out = x.new_result(x.weight_shape);
    with_layer(x, [&](const auto& layer, auto* null) {
        cpu::fisher_diagonal(layer, static_cast<decltype(null)>(out.data_ptr()), torch_parallel_for);
    });
    return out;
}

Tensor projection(const LayerArguments& x, const TensorList& directions) {
    const TensorList moves = x.contiguous_directions(directions);
    Tensor out = x.new_result({x.samples, static_cast<std::int64_t>(moves.size())});
    with_layer(x, [&](const auto& layer, auto* null) {
        using C = std::remove_pointer_t<decltype(null)>;
        std::vector<const C*> pointers;
        for (const Tensor& move : moves) pointers.push_back(static_cast<const C*>(move.data_ptr()));
        cpu::fisher_projection(layer, cpu::Directions<C>(pointers), static_cast<C*>(out.data_ptr()),
                               torch_parallel_for);
    });
    return out;
}

Tensor norm(const LayerArguments& x) {
    Tensor out = x.new_result({x.samples});
    with_layer(x, [&](const auto& layer, auto* null) {
        cpu::grad_norm(layer, static_cast<decltype(null)>(out.data_ptr()), torch_parallel_for);
    });
    return out;
}

Tensor linear_fisher_diagonal(Tensor inputs, Tensor grad_outputs) {
    return diagonal(LayerArguments(inputs, grad_outputs));
}

Tensor linear_fisher_projection(Tensor inputs, Tensor grad_outputs, TensorList directions) {
    return projection(LayerArguments(inputs, grad_outputs), directions);
}

Tensor linear_grad_norm(Tensor inputs, Tensor grad_outputs) { return norm(LayerArguments(inputs, grad_outputs)); }

Tensor conv_fisher_diagonal(Tensor inputs, Tensor grad_outputs, IntList kernel_size, IntList stride, IntList padding,
                            IntList dilation, std::int64_t groups) {
    return diagonal(LayerArguments(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups));
}

Tensor conv_fisher_projection(Tensor inputs, Tensor grad_outputs, TensorList directions, IntList kernel_size,
                              IntList stride, IntList padding, IntList dilation, std::int64_t groups) {
    return projection(LayerArguments(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups), directions);
}

Tensor conv_grad_norm(Tensor inputs, Tensor grad_outputs, IntList kernel_size, IntList stride, IntList padding,
                      IntList dilation, std::int64_t groups) {
    return norm(LayerArguments(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups));
}

Tensor softmax_fisher_gram(Tensor logits, Tensor tangents) {
    check_tangents(logits, tangents);
    const std::int64_t directions = tangents.size(0);
    Tensor gram = torch::stable::new_empty(logits, {directions, directions}, ScalarType::Double);
    dispatch_floating("logits", logits.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const cpu::TangentView<T> view{static_cast<const T*>(tangents.data_ptr()),
                                       directions,
                                       logits.size(0),
                                       logits.size(1),
                                       tangents.stride(0),
                                       tangents.stride(1),
                                       tangents.stride(2)};
        cpu::softmax_fisher_gram(static_cast<const T*>(logits.data_ptr()), logits.stride(0), logits.stride(1), view,
                                 static_cast<double*>(gram.data_ptr()), torch_parallel_for);
    });
    return gram;
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CPU, m) {
    m.impl("linear_fisher_diagonal", TORCH_BOX(&transferops::linear_fisher_diagonal));
    m.impl("linear_fisher_projection", TORCH_BOX(&transferops::linear_fisher_projection));
    m.impl("linear_grad_norm", TORCH_BOX(&transferops::linear_grad_norm));
    m.impl("conv_fisher_diagonal", TORCH_BOX(&transferops::conv_fisher_diagonal));
    m.impl("conv_fisher_projection", TORCH_BOX(&transferops::conv_fisher_projection));
    m.impl("conv_grad_norm", TORCH_BOX(&transferops::conv_grad_norm));
    m.impl("softmax_fisher_gram", TORCH_BOX(&transferops::softmax_fisher_gram));
}
