// The schema list: every op of the library, one line each. Implementations are registered beside their families.
#include "../include/transferops/version.h"
#include "stable.h"

STABLE_TORCH_LIBRARY(transferops, m) {
    m.def(
        "class_moments(Tensor features, Tensor labels, int num_classes, int precision=53) -> (Tensor, Tensor, Tensor, "
        "Tensor)");
    m.def("sample_gram(Tensor features) -> (Tensor, Tensor)");
    m.def("norm_moments(Tensor features, Tensor shift) -> (Tensor, Tensor)");
    m.def(
        "empirical_prediction(Tensor probabilities, Tensor labels, int num_classes) -> (Tensor, Tensor, Tensor, "
        "Tensor)");
    m.def("linear_fisher_diagonal(Tensor inputs, Tensor grad_outputs) -> Tensor");
    m.def("linear_fisher_projection(Tensor inputs, Tensor grad_outputs, Tensor[] directions) -> Tensor");
    m.def("linear_grad_norm(Tensor inputs, Tensor grad_outputs) -> Tensor");
    m.def(
        "conv_fisher_diagonal(Tensor inputs, Tensor grad_outputs, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups) -> Tensor");
    m.def(
        "conv_fisher_projection(Tensor inputs, Tensor grad_outputs, Tensor[] directions, int[] kernel_size, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
    m.def(
        "conv_grad_norm(Tensor inputs, Tensor grad_outputs, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups) -> Tensor");
    m.def("softmax_fisher_gram(Tensor logits, Tensor tangents) -> Tensor");
    m.def(
        "gradient_expectation_(Tensor(a!)[] means, Tensor(b!)[] squares, Tensor[] gradients, bool stacked, int count) "
        "-> ()");
    m.def(
        "gradient_expectation_gram_(Tensor(a!)[] means, Tensor(b!)[] squares, Tensor[] gradients, bool stacked, "
        "int[] counts, int lists) -> Tensor");
    m.def("gradient_gram(Tensor[] gradients, int lists) -> Tensor");
    m.def("weighted_gram(Tensor directions, Tensor weights, Tensor? base) -> Tensor");
    m.def("gradient_fisher_gram(Tensor gradients, Tensor directions) -> (Tensor, Tensor, Tensor)");
}

extern "C" const char* transferops_version() { return TRANSFEROPS_VERSION; }
