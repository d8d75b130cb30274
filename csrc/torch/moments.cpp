// The moments family on the CPU, registered with torch's dispatcher: checks and allocation only.
#include "moments.h"

#include <algorithm>

#include "../kernels/cpu/moments.h"
#include "parallel.h"

namespace transferops {
namespace {

double* float64(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

template <class T>
cpu::MatrixView<T> view_of(const FeatureSets& features, std::int64_t set) {
    const Tensor& x = features.tensor;
    return {static_cast<const T*>(x.data_ptr()) + set * x.stride(0), features.rows, features.columns, x.stride(1),
            x.stride(2)};
}

// In float64 whatever the precision asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> class_moments(Tensor features, Tensor labels, std::int64_t num_classes,
                                                         std::int64_t precision) {
    const FeatureSets x(features);
    check_precision(precision);
    check_labels(labels, "features", features, x.rows, num_classes);
    labels = torch::stable::contiguous(labels);
    const std::int64_t* label = labels_in_range(labels, num_classes);

    Tensor counts = torch::stable::new_empty(labels, {num_classes});
    Tensor sums = x.new_float64({num_classes, x.columns});
    Tensor gram = x.new_float64({x.columns, x.columns});
    Tensor shift = x.new_float64({x.columns});
    auto* count = static_cast<std::int64_t*>(counts.data_ptr());
    if (x.sets == 0) {  // no kernel runs, and the labels count all the same
        std::fill_n(count, num_classes, 0);
        for (std::int64_t n = 0; n < x.rows; ++n) ++count[label[n]];
    }

    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        for (std::int64_t set = 0; set < x.sets; ++set)
            cpu::class_moments(
                view_of<T>(x, set), label, num_classes, count, float64(sums) + set * num_classes * x.columns,
                float64(gram) + set * x.columns * x.columns, float64(shift) + set * x.columns, torch_parallel_for);
    });
    return {counts, sums, gram, shift};
}

std::tuple<Tensor, Tensor> sample_gram(Tensor features) {
    const FeatureSets x(features);
    Tensor gram = x.new_float64({x.rows, x.rows});
    Tensor shift = x.new_float64({x.columns});
    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        for (std::int64_t set = 0; set < x.sets; ++set)
            cpu::sample_gram(view_of<T>(x, set), float64(gram) + set * x.rows * x.rows,
                             float64(shift) + set * x.columns, torch_parallel_for);
    });
    return {gram, shift};
}

std::tuple<Tensor, Tensor> norm_moments(Tensor features, Tensor shift) {
    const FeatureSets x(features);
    check_shift(x, shift);
    shift = torch::stable::contiguous(shift);
    Tensor cubic = x.new_float64({x.columns});
    Tensor quartic = x.new_float64({});
    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        for (std::int64_t set = 0; set < x.sets; ++set)
            cpu::norm_moments(view_of<T>(x, set), float64(shift) + set * x.columns, float64(cubic) + set * x.columns,
                              float64(quartic) + set, torch_parallel_for);
    });
    return {cubic, quartic};
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CPU, m) {
    m.impl("class_moments", TORCH_BOX(&transferops::class_moments));
    m.impl("sample_gram", TORCH_BOX(&transferops::sample_gram));
    m.impl("norm_moments", TORCH_BOX(&transferops::norm_moments));
}
