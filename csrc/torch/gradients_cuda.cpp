// The gradients family on CUDA devices, registered with torch's dispatcher: checks, allocation and launches only.
#include "../kernels/cuda/gradients.h"
#include "cuda.h"
#include "gradients.h"

namespace transferops {
namespace {

void gradient_expectation(TensorList means, TensorList squares, TensorList gradients, bool stacked,
                          std::int64_t count) {
    const MomentsArguments arguments(means, squares, gradients, stacked, count);
    if (means.empty()) return;
    const DeviceScope scope(means[0]);
    arguments.by_type([&](auto* null, auto* moments, const auto& items) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using S = std::remove_pointer_t<decltype(moments)>;
        std::vector<cuda::RunningMoments<T, S>> tensors;
        for (const MomentsArguments::Item* x : items)
            tensors.push_back({static_cast<const T*>(x->gradient.data_ptr()), x->sample_stride, x->mean.numel(),
                               static_cast<S*>(x->mean.data_ptr()),
                               x->squares ? static_cast<S*>(x->squares->data_ptr()) : nullptr});
        check_cuda(cuda::gradient_expectation(tensors.data(), static_cast<std::int64_t>(tensors.size()),
                                              arguments.samples, count, scope.stream));
    });
    arguments.write_back();
}

Tensor gradient_expectation_gram(TensorList means, TensorList squares, TensorList gradients, bool stacked,
                                 std::vector<std::int64_t> counts, std::int64_t lists) {
    const ExpectationGramArguments x(means, squares, gradients, stacked, counts, lists);
    const DeviceScope scope(means[0]);
    const int multiprocessors = scope.multiprocessors();
    Tensor gram = torch::stable::new_empty(means[0], {lists, lists}, ScalarType::Double);
    x.by_type([&](auto* null, auto* state) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using S = std::remove_pointer_t<decltype(state)>;
        const auto moments = x.moments<cuda::RunningMoments<T, S>, T, S>();
        const cuda::ExpectationGram<T, S> all{moments.data(), x.length, lists, x.updated, x.samples, counts.data()};
        const Workspace scratch(means[0], cuda::gradient_expectation_gram_workspace(all, multiprocessors));
        check_cuda(cuda::gradient_expectation_gram(all, static_cast<double*>(gram.data_ptr()), scratch.data(),
                                                   multiprocessors, scope.stream));
    });
    x.write_back();
    return gram;
}

// The Gram matrix of GramArguments or WeightedArguments.
template <class Arguments>
Tensor gram_of(const Arguments& x, const Tensor& like, std::int64_t rows) {
    const DeviceScope scope(like);
    const int multiprocessors = scope.multiprocessors();
    Tensor gram = torch::stable::new_empty(like, {rows, rows}, ScalarType::Double);
    dispatch_floating("gradients", like.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const auto pointers = x.template rows<T>();
        const auto segments = x.template segments<cuda::GramSegment<T>>(pointers);
        const auto count = static_cast<std::int64_t>(segments.size());
        const Workspace scratch(like, cuda::weighted_gram_workspace(segments.data(), count, rows, multiprocessors));
        check_cuda(cuda::weighted_gram(segments.data(), count, rows, static_cast<double*>(gram.data_ptr()),
                                       scratch.data(), multiprocessors, scope.stream));
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
    const DeviceScope scope(gradients);
    const int multiprocessors = scope.multiprocessors();
    const std::int64_t samples = gradients.size(0), columns = gradients.size(1), count = directions.size(0);
    if (samples == 0)
        return {torch::stable::new_zeros(gradients, {count, count}, ScalarType::Double),
                torch::stable::new_zeros(gradients, {columns}, compute_type(gradients)),
                torch::stable::new_zeros(gradients, {0}, ScalarType::Double)};
    Tensor gram = torch::stable::new_empty(gradients, {count, count}, ScalarType::Double);
    Tensor diagonal = torch::stable::new_empty(gradients, {columns}, compute_type(gradients));
    Tensor norms = torch::stable::new_empty(gradients, {samples}, ScalarType::Double);
    dispatch_floating("gradients", gradients.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        using C = Compute<T>;
        const cuda::SampleGradients<T> rows{
            static_cast<const T*>(x.gradients.data_ptr()),  samples, columns, x.gradients.stride(0),
            static_cast<const C*>(x.directions.data_ptr()), count};
        const Workspace scratch(gradients, cuda::gradient_fisher_gram_workspace(rows, multiprocessors));
        check_cuda(cuda::gradient_fisher_gram(
            rows, static_cast<double*>(gram.data_ptr()), static_cast<C*>(diagonal.data_ptr()),
            static_cast<double*>(norms.data_ptr()), scratch.data(), multiprocessors, scope.stream));
    });
    return {gram, diagonal, norms};
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CUDA, m) {
    m.impl("gradient_expectation_", TORCH_BOX(&transferops::gradient_expectation));
    m.impl("gradient_expectation_gram_", TORCH_BOX(&transferops::gradient_expectation_gram));
    m.impl("gradient_gram", TORCH_BOX(&transferops::gradient_gram));
    m.impl("weighted_gram", TORCH_BOX(&transferops::weighted_gram));
    m.impl("gradient_fisher_gram", TORCH_BOX(&transferops::gradient_fisher_gram));
}
