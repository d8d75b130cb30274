// What the CPU and the CUDA registration of the Fisher family share: argument checks and shapes.
#pragma once

#include <array>
#include <vector>

#include "stable.h"

namespace transferops {

using IntList = std::vector<std::int64_t>;

inline void check_same_kind(const char* argument, const Tensor& tensor, const Tensor& inputs) {
    if (tensor.scalar_type() != inputs.scalar_type()) fail(argument, ": expected the dtype of inputs, got another");
    if (tensor.is_cuda() != inputs.is_cuda()) fail(argument, ": expected the device of inputs, got another");
}

// A layer's inputs [N, I, *spatial], its output gradients [N, O, *out_spatial] and its window, seen with three spatial
// dimensions. Strides are in elements; dimensions that are not there have size 1.
struct LayerArguments {
    struct Signal {
        Tensor tensor;
        std::int64_t channels, channel_stride;
        std::array<std::int64_t, 3> size{1, 1, 1}, stride{0, 0, 0};

        std::int64_t sample_stride() const { return tensor.stride(0); }
    };

    Signal inputs, grad_outputs;
    std::int64_t samples, groups = 1;
    std::array<std::int64_t, 3> kernel{1, 1, 1}, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1};
    std::vector<std::int64_t> weight_shape;

    // A linear layer: [N, T, I] and [N, T, O], or without positions [N, I] and [N, O].
    LayerArguments(const Tensor& input, const Tensor& grad_output)
        : inputs(positions_last(input)), grad_outputs(positions_last(grad_output)), samples(input.size(0)) {
        check_same_kind("grad_outputs", grad_output, input);
        bool fits = input.dim() == grad_output.dim();
        for (std::int64_t d = 0; fits && d + 1 < input.dim(); ++d) fits = input.size(d) == grad_output.size(d);
        if (!fits)
            fail("grad_outputs: expected the shape of inputs but for the last dimension, ", shape_of(input), ", got ",
                 shape_of(grad_output));
        weight_shape = {grad_outputs.channels, inputs.channels};
    }

    // A convolution with zero padding, of one to three spatial dimensions.
    LayerArguments(const Tensor& input, const Tensor& grad_output, const IntList& kernel_size, const IntList& strides,
                   const IntList& paddings, const IntList& dilations, std::int64_t group_count)
        : inputs(channels_second("inputs", input)),
          grad_outputs(channels_second("grad_outputs", grad_output)),
          samples(input.size(0)),
          groups(group_count) {
        check_same_kind("grad_outputs", grad_output, input);
        const std::int64_t spatial = input.dim() - 2;
        if (grad_output.dim() != input.dim() || grad_output.size(0) != samples)
            fail("grad_outputs: expected ", samples, " samples of ", spatial, " spatial dimensions, got shape ",
                 shape_of(grad_output));
        if (groups < 1 || inputs.channels % groups || grad_outputs.channels % groups)
            fail("groups: expected a divisor of ", inputs.channels, " and ", grad_outputs.channels, " channels, got ",
                 groups);
        set("kernel_size", kernel_size, spatial, 1, kernel);
        set("stride", strides, spatial, 1, stride);
        set("padding", paddings, spatial, 0, padding);
        set("dilation", dilations, spatial, 1, dilation);
        for (int d = 0; d < 3; ++d) {
            const std::int64_t room = inputs.size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
            if (grad_outputs.size[d] != (room < 0 ? 0 : room / stride[d] + 1))
                fail("grad_outputs: expected the spatial size of the convolution's output, got shape ",
                     shape_of(grad_output));
        }
        weight_shape = {grad_outputs.channels, inputs.channels / groups};
        weight_shape.insert(weight_shape.end(), kernel_size.begin(), kernel_size.end());
    }

    // Directions as the kernels take them, each contiguous and of the compute type: those that are so are not copied.
    TensorList contiguous_directions(const TensorList& directions) const {
        TensorList moves;
        for (const Tensor& direction : directions) {
            check_direction(direction, moves.size());
            moves.push_back(torch::stable::contiguous(torch::stable::to(direction, compute_type())));
        }
        return moves;
    }

    // What products are taken in, and results returned in.
    ScalarType compute_type() const {
        return inputs.tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    }

    Tensor new_result(const std::vector<std::int64_t>& shape) const {
        return torch::stable::new_empty(inputs.tensor, shape, compute_type());
    }

  private:
    void check_direction(const Tensor& direction, std::size_t index) const {
        if (direction.is_cuda() != inputs.tensor.is_cuda() ||
            direction.get_device_index() != inputs.tensor.get_device_index())
            fail("directions: expected the device of inputs, got another at index ", index);
        bool fits = direction.dim() == static_cast<std::int64_t>(weight_shape.size());
        for (std::size_t d = 0; fits && d < weight_shape.size(); ++d)
            fits = direction.size(static_cast<std::int64_t>(d)) == weight_shape[d];
        if (!fits) {
            std::ostringstream shape;
            for (const std::int64_t size : weight_shape) shape << (shape.tellp() > 0 ? ", " : "") << size;
            fail("directions: expected the weight's shape [", shape.str(), "] at index ", index, ", got ",
                 shape_of(direction));
        }
    }

    static Signal positions_last(const Tensor& x) {
        if (x.dim() != 2 && x.dim() != 3) fail("inputs: expected shape [N, T, I] or [N, I], got ", shape_of(x));
        Signal signal{x, x.size(x.dim() - 1), x.stride(x.dim() - 1)};
        if (x.dim() == 3) {
            signal.size[2] = x.size(1);
            signal.stride[2] = x.stride(1);
        }
        return signal;
    }

    static Signal channels_second(const char* argument, const Tensor& x) {
        if (x.dim() < 3 || x.dim() > 5)
            fail(argument, ": expected shape [N, C, *spatial] with 1 to 3 spatial dimensions, got ", shape_of(x));
        Signal signal{x, x.size(1), x.stride(1)};
        for (std::int64_t d = 2; d < x.dim(); ++d) {
            signal.size[3 - x.dim() + d] = x.size(d);
            signal.stride[3 - x.dim() + d] = x.stride(d);
        }
        return signal;
    }

    static void set(const char* argument, const IntList& values, std::int64_t spatial, std::int64_t minimum,
                    std::array<std::int64_t, 3>& out) {
        const auto count = static_cast<std::int64_t>(values.size());
        if (count != spatial) fail(argument, ": expected ", spatial, " integers, got ", count);
        for (std::int64_t d = 0; d < count; ++d) {
            if (values[d] < minimum) fail(argument, ": expected integers of at least ", minimum, ", got ", values[d]);
            out[3 - count + d] = values[d];
        }
    }
};

// Logits [N, C] and tangents [K, N, C].
inline void check_tangents(const Tensor& logits, const Tensor& tangents) {
    if (logits.dim() != 2) fail("logits: expected shape [N, C], got ", shape_of(logits));
    if (tangents.dim() != 3 || tangents.size(1) != logits.size(0) || tangents.size(2) != logits.size(1))
        fail("tangents: expected shape [K, ", logits.size(0), ", ", logits.size(1), "], got ", shape_of(tangents));
    if (tangents.scalar_type() != logits.scalar_type()) fail("tangents: expected the dtype of logits, got another");
    if (tangents.is_cuda() != logits.is_cuda()) fail("tangents: expected the device of logits, got another");
}

}  // namespace transferops
