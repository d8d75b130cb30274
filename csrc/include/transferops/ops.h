// transferops for C++ programs: typed calls of the ops through torch's dispatcher.
//
//     find_package(transferops REQUIRED)
//     target_link_libraries(app PRIVATE transferops::transferops)
//
// Header only; the kernels and their registration live in libtransferops. Shapes, dtypes and errors are those of the
// Python functions of the same names in transferops.ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "version.h"

namespace transferops {

// Registration runs when libtransferops is loaded, and a linker drops a library that nothing refers to: this refers.
inline const char* const linked_version = transferops_version();

struct ClassMoments {
    at::Tensor counts;  // [classes] int64
    at::Tensor sums;    // [..., classes, D] float64, of x - shift
    at::Tensor gram;    // [..., D, D] float64, of x - shift
    at::Tensor shift;   // [..., D] float64, the column means
};

struct SampleGram {
    at::Tensor gram;   // [..., N, N] float64
    at::Tensor shift;  // [..., D] float64, the column means
};

struct NormMoments {
    at::Tensor cubic;    // [..., D] float64
    at::Tensor quartic;  // [...] float64
};

// `precision`: significant bits that the factors of the Gram matrix keep at least, 53, 24, 11 or 8.
inline ClassMoments class_moments(const at::Tensor& features, const at::Tensor& labels, std::int64_t num_classes,
                                  std::int64_t precision = 53) {
    using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::class_moments", "")
                               .typed<Result(const at::Tensor&, const at::Tensor&, std::int64_t, std::int64_t)>();
    auto [counts, sums, gram, shift] = op.call(features, labels, num_classes, precision);
    return {counts, sums, gram, shift};
}

inline SampleGram sample_gram(const at::Tensor& features) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::sample_gram", "")
                               .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>();
    auto [gram, shift] = op.call(features);
    return {gram, shift};
}

inline NormMoments norm_moments(const at::Tensor& features, const at::Tensor& shift) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::norm_moments", "")
                               .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&)>();
    auto [cubic, quartic] = op.call(features, shift);
    return {cubic, quartic};
}

struct EmpiricalPrediction {
    at::Tensor prediction;  // [N] float64
    at::Tensor mass;        // [C_s] float64, sums of the columns
    at::Tensor totals;      // [N] float64, sums of the rows
    at::Tensor lowest;      // [N] float64, smallest elements of the rows
};

inline EmpiricalPrediction empirical_prediction(const at::Tensor& probabilities, const at::Tensor& labels,
                                                std::int64_t num_classes) {
    using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::empirical_prediction", "")
                               .typed<Result(const at::Tensor&, const at::Tensor&, std::int64_t)>();
    auto [prediction, mass, totals, lowest] = op.call(probabilities, labels, num_classes);
    return {prediction, mass, totals, lowest};
}

// Per-sample gradients of weights, G_n, summarised: sum_n G_n * G_n, <G_n, D_k> and |G_n|^2.

inline at::Tensor linear_fisher_diagonal(const at::Tensor& inputs, const at::Tensor& grad_outputs) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::linear_fisher_diagonal", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
    return op.call(inputs, grad_outputs);
}

inline at::Tensor linear_fisher_projection(const at::Tensor& inputs, const at::Tensor& grad_outputs,
                                           at::TensorList directions) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::linear_fisher_projection", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::TensorList)>();
    return op.call(inputs, grad_outputs, directions);
}

inline at::Tensor linear_grad_norm(const at::Tensor& inputs, const at::Tensor& grad_outputs) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::linear_grad_norm", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
    return op.call(inputs, grad_outputs);
}

inline at::Tensor conv_fisher_diagonal(const at::Tensor& inputs, const at::Tensor& grad_outputs,
                                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                       at::IntArrayRef dilation, std::int64_t groups) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::conv_fisher_diagonal", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
                                                 at::IntArrayRef, at::IntArrayRef, std::int64_t)>();
    return op.call(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups);
}

inline at::Tensor conv_fisher_projection(const at::Tensor& inputs, const at::Tensor& grad_outputs,
                                         at::TensorList directions, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation, std::int64_t groups) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::conv_fisher_projection", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::TensorList, at::IntArrayRef,
                                                 at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, std::int64_t)>();
    return op.call(inputs, grad_outputs, directions, kernel_size, stride, padding, dilation, groups);
}

inline at::Tensor conv_grad_norm(const at::Tensor& inputs, const at::Tensor& grad_outputs, at::IntArrayRef kernel_size,
                                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                 std::int64_t groups) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::conv_grad_norm", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
                                                 at::IntArrayRef, at::IntArrayRef, std::int64_t)>();
    return op.call(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups);
}

inline at::Tensor softmax_fisher_gram(const at::Tensor& logits, const at::Tensor& tangents) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::softmax_fisher_gram", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
    return op.call(logits, tangents);
}

// Gradients as a whole.

struct GradientFisherGram {
    at::Tensor gram;      // [K, K] float64
    at::Tensor diagonal;  // [P], float64 for float64 gradients, float32 otherwise
    at::Tensor norms;     // [N] float64
};

// `squares` may be empty; with `stacked` the gradients are [R, *shape].
inline void gradient_expectation_(at::TensorList means, at::TensorList squares, at::TensorList gradients, bool stacked,
                                  std::int64_t count) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::gradient_expectation_", "")
                               .typed<void(at::TensorList, at::TensorList, at::TensorList, bool, std::int64_t)>();
    op.call(means, squares, gradients, stacked, count);
}

// `means` are the tensors of `lists` lists, one list after the other; `squares` (which may be empty) and `gradients`
// those of the first counts.size() of them. The inner products of the means afterwards.
inline at::Tensor gradient_expectation_gram_(at::TensorList means, at::TensorList squares, at::TensorList gradients,
                                             bool stacked, at::IntArrayRef counts, std::int64_t lists) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("transferops::gradient_expectation_gram_", "")
            .typed<at::Tensor(at::TensorList, at::TensorList, at::TensorList, bool, at::IntArrayRef, std::int64_t)>();
    return op.call(means, squares, gradients, stacked, counts, lists);
}

// `gradients` are the tensors of `lists` lists, one list after the other.
inline at::Tensor gradient_gram(at::TensorList gradients, std::int64_t lists) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::gradient_gram", "")
                               .typed<at::Tensor(at::TensorList, std::int64_t)>();
    return op.call(gradients, lists);
}

inline at::Tensor weighted_gram(const at::Tensor& directions, const at::Tensor& weights,
                                const std::optional<at::Tensor>& base = std::nullopt) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("transferops::weighted_gram", "")
            .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>();
    return op.call(directions, weights, base);
}

inline GradientFisherGram gradient_fisher_gram(const at::Tensor& gradients, const at::Tensor& directions) {
    using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("transferops::gradient_fisher_gram", "")
                               .typed<Result(const at::Tensor&, const at::Tensor&)>();
    auto [gram, diagonal, norms] = op.call(gradients, directions);
    return {gram, diagonal, norms};
}

}  // namespace transferops
