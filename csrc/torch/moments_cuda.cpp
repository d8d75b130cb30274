// The moments family on CUDA devices, registered with torch's dispatcher: checks, allocation and launches only.
//
// Nothing here waits for the device, so labels are not checked: those out of range count to the first or last class.
#include "../kernels/cuda/centring.h"
#include "cuda.h"
#include "moments.h"

namespace transferops {
namespace {

double* float64(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }
std::int64_t* int64(const Tensor& tensor) { return static_cast<std::int64_t*>(tensor.data_ptr()); }

// Row numbers sorted by class, where each class begins, and how many rows it has.
struct ClassOrder {
    Tensor order, offsets, counts;

    ClassOrder(const Tensor& labels, std::int64_t classes, const DeviceScope& scope) {
        using torch::stable::detail::from;
        using torch::stable::detail::to;
        // sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False) -> (Tensor, Tensor)
        std::array<StableIValue, 4> stack{from(labels), from(std::optional<bool>(true)), from(std::int64_t{0}),
                                          from(false)};
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
        const Tensor sorted = to<Tensor>(stack[0]);
        order = to<Tensor>(stack[1]);
        offsets = torch::stable::new_empty(labels, {classes + 1});
        counts = torch::stable::new_empty(labels, {classes});
        check_cuda(
            cuda::class_offsets(int64(sorted), labels.size(0), classes, int64(offsets), int64(counts), scope.stream));
    }
};

template <class T>
cuda::FeatureSets<T> sets_of(const FeatureSets& x) {
    return {
        static_cast<const T*>(x.tensor.data_ptr()), x.sets, x.rows, x.columns, x.tensor.stride(0), x.tensor.stride(1)};
}

// The kernels want contiguous columns; other layouts are copied.
FeatureSets with_contiguous_columns(const Tensor& features) {
    FeatureSets x(features);
    if (x.columns > 1 && x.tensor.stride(2) != 1) x.tensor = torch::stable::contiguous(x.tensor);
    return x;
}

// Class sums about the column means, and those means, by way of sums of x - x_0.
template <class T>
void centred_class_sums(const FeatureSets& x, const ClassOrder& rows, std::int64_t classes, const Tensor& sums,
                        const Tensor& shift, const DeviceScope& scope) {
    const auto features = sets_of<T>(x);
    const Workspace scratch(x.tensor, cuda::class_sums_workspace(x.sets, x.rows, x.columns));
    check_cuda(cuda::first_rows(features, float64(shift), scope.stream));
    check_cuda(cuda::class_sums(features, int64(rows.order), int64(rows.offsets), classes, float64(shift),
                                float64(sums), scratch.data(), scope.stream));
    check_cuda(cuda::recentre(int64(rows.counts), x.sets, x.rows, classes, x.columns, float64(sums), float64(shift),
                              scope.stream));
}

// The Gram matrix about a shift, in float64 or as its factors are rounded to so many significant bits.
template <class T>
void gram_of(const FeatureSets& x, const Tensor& shift, std::int64_t precision, const Tensor& gram,
             const DeviceScope& scope) {
    const int multiprocessors = scope.multiprocessors();
    if (precision == 53) {
        const Workspace scratch(x.tensor, cuda::gram_workspace(x.sets, x.rows, x.columns, multiprocessors));
        return check_cuda(
            cuda::gram(sets_of<T>(x), float64(shift), float64(gram), scratch.data(), multiprocessors, scope.stream));
    }
    const cuda::Precision narrow = precision == 24   ? cuda::Precision::kFloat32
                                   : precision == 11 ? cuda::Precision::kTf32
                                                     : cuda::Precision::kBfloat16;
    const Workspace scratch(x.tensor, cuda::narrow_gram_workspace(sets_of<T>(x), narrow, multiprocessors));
    check_cuda(cuda::narrow_gram(sets_of<T>(x), float64(shift), narrow, float64(gram), scratch.data(), multiprocessors,
                                 scope.stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_moments(Tensor features, Tensor labels, std::int64_t num_classes,
                                                         std::int64_t precision) {
    const FeatureSets x = with_contiguous_columns(features);
    check_precision(precision);
    check_labels(labels, "features", features, x.rows, num_classes);
    const DeviceScope scope(features);
    const ClassOrder rows(labels, num_classes, scope);
    Tensor sums = x.new_float64({num_classes, x.columns});
    Tensor gram = x.new_float64({x.columns, x.columns});
    Tensor shift = x.new_float64({x.columns});
    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        centred_class_sums<T>(x, rows, num_classes, sums, shift, scope);
        gram_of<T>(x, shift, precision, gram, scope);
    });
    return {rows.counts, sums, gram, shift};
}

std::tuple<Tensor, Tensor> sample_gram(Tensor features) {
    const FeatureSets x = with_contiguous_columns(features);
    const DeviceScope scope(features);
    const ClassOrder rows(torch::stable::new_zeros(x.tensor, {x.rows}, ScalarType::Long), 1, scope);
    Tensor gram = x.new_float64({x.rows, x.rows});
    Tensor shift = x.new_float64({x.columns});
    const Tensor sums = x.new_float64({1, x.columns});
    const int multiprocessors = scope.multiprocessors();
    const Workspace scratch(x.tensor, cuda::sample_gram_workspace(x.sets, x.rows, x.columns, multiprocessors));
    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        centred_class_sums<T>(x, rows, 1, sums, shift, scope);
        check_cuda(cuda::sample_gram(sets_of<T>(x), float64(shift), float64(gram), scratch.data(), multiprocessors,
                                     scope.stream));
    });
    return {gram, shift};
}

std::tuple<Tensor, Tensor> norm_moments(Tensor features, Tensor shift) {
    const FeatureSets x = with_contiguous_columns(features);
    check_shift(x, shift);
    shift = torch::stable::contiguous(shift);
    const DeviceScope scope(features);
    Tensor cubic = x.new_float64({x.columns});
    Tensor quartic = x.new_float64({});
    const Workspace scratch(x.tensor, cuda::norm_moments_workspace(x.sets, x.rows, x.columns));
    dispatch_floating("features", features.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        check_cuda(cuda::norm_moments(sets_of<T>(x), float64(shift), float64(cubic), float64(quartic), scratch.data(),
                                      scope.stream));
    });
    return {cubic, quartic};
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CUDA, m) {
    m.impl("class_moments", TORCH_BOX(&transferops::class_moments));
    m.impl("sample_gram", TORCH_BOX(&transferops::sample_gram));
    m.impl("norm_moments", TORCH_BOX(&transferops::norm_moments));
}
