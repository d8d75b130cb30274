// The gradients family on the CPU, registered with torch's dispatcher: checks and allocation only.
#include "gradients.h"

#include "../kernels/cpu/gradients.h"
#include "parallel.h"

namespace transferops {
namespace {

void gradient_expectation(TensorList means, TensorList squares, TensorList gradients, bool stacked,
                          std::int64_t count) {
    const MomentsArguments arguments(means, squares, gradients, stacked, count);
    arguments.by_type([&](auto* null, auto* moments, const auto& items) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using S = std::remove_pointer_t<decltype(moments)>;
        std::vector<cpu::RunningMoments<T, S>> tensors;
        for (const MomentsArguments::Item* x : items)
            tensors.push_back({static_cast<const T*>(x->gradient.data_ptr()), x->sample_stride, x->mean.numel(),
                               static_cast<S*>(x->mean.data_ptr()),
                               x->squares ? static_cast<S*>(x->squares->data_ptr()) : nullptr});
        cpu::gradient_expectation(tensors, arguments.samples, count, torch_parallel_for);
    });
    arguments.write_back();
}

Tensor gradient_expectation_gram(TensorList means, TensorList squares, TensorList gradients, bool stacked,
                                 std::vector<std::int64_t> counts, std::int64_t lists) {
    const ExpectationGramArguments x(means, squares, gradients, stacked, counts, lists);
    Tensor gram = torch::stable::new_empty(means[0], {lists, lists}, ScalarType::Double);
    x.by_type([&](auto* null, auto* state) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using S = std::remove_pointer_t<decltype(state)>;
        cpu::gradient_expectation_gram(x.moments<cpu::RunningMoments<T, S>, T, S>(), lists, x.samples, counts,
                                       static_cast<double*>(gram.data_ptr()), torch_parallel_for);
    });
    x.write_back();
    return gram;
}

// The Gram matrix of GramArguments or WeightedArguments.
template <class Arguments>
Tensor gram_of(const Arguments& x, const Tensor& like, std::int64_t rows) {
    Tensor gram = torch::stable::new_empty(like, {rows, rows}, ScalarType::Double);
    dispatch_floating("gradients", like.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const auto pointers = x.template rows<T>();
        cpu::weighted_gram(x.template segments<cpu::GramSegment<T>>(pointers), rows,
                           static_cast<double*>(gram.data_ptr()), torch_parallel_for);
    });
    return gram;
}

Tensor gradient_gram(TensorList gradients, std::int64_t lists) {
    const GramArguments x(gradients, lists);
    return gram_of(x, gradients[0], lists);
}

Tensor weighted_gram(Tensor directions, Tensor weights, std::optional<Tensor> base) {
    const WeightedArguments x(directions, weights, base);
    return gram_of(x, directions, directions.size(0));
}

std::tuple<Tensor, Tensor, Tensor> gradient_fisher_gram(Tensor gradients, Tensor directions) {
    const SampleArguments x(gradients, directions);
    const std::int64_t samples = gradients.size(0), columns = gradients.size(1), count = directions.size(0);
    Tensor gram = torch::stable::new_empty(gradients, {count, count}, ScalarType::Double);
    Tensor diagonal = torch::stable::new_empty(gradients, {columns}, compute_type(gradients));
    Tensor norms = torch::stable::new_empty(gradients, {samples}, ScalarType::Double);
    dispatch_floating("gradients", gradients.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using C = Compute<T>;
        const cpu::MatrixView<T> rows{static_cast<const T*>(x.gradients.data_ptr()), samples, columns,
                                      x.gradients.stride(0), 1};
        cpu::gradient_fisher_gram(rows, static_cast<const C*>(x.directions.data_ptr()), count,
                                  static_cast<double*>(gram.data_ptr()), static_cast<C*>(diagonal.data_ptr()),
                                  static_cast<double*>(norms.data_ptr()), torch_parallel_for);
    });
    return {gram, diagonal, norms};
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CPU, m) {
    m.impl("gradient_expectation_", TORCH_BOX(&transferops::gradient_expectation));
    m.impl("gradient_expectation_gram_", TORCH_BOX(&transferops::gradient_expectation_gram));
    m.impl("gradient_gram", TORCH_BOX(&transferops::gradient_gram));
    m.impl("weighted_gram", TORCH_BOX(&transferops::weighted_gram));
    m.impl("gradient_fisher_gram", TORCH_BOX(&transferops::gradient_fisher_gram));
}
