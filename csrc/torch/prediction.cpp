// The prediction family on the CPU, registered with torch's dispatcher: checks and allocation only.
#include "../kernels/cpu/prediction.h"

#include "moments.h"
#include "parallel.h"

namespace transferops {
namespace {

double* float64(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> empirical_prediction(Tensor probabilities, Tensor labels,
                                                                std::int64_t num_classes) {
    if (probabilities.dim() != 2) fail("probabilities: expected shape [N, C_s], got ", shape_of(probabilities));
    const std::int64_t rows = probabilities.size(0), columns = probabilities.size(1);
    if (columns > 1 && probabilities.stride(1) != 1) probabilities = torch::stable::contiguous(probabilities);
    check_labels(labels, "probabilities", probabilities, rows, num_classes);
    labels = torch::stable::contiguous(labels);
    const std::int64_t* label = labels_in_range(labels, num_classes);
    const auto new_float64 = [&](std::int64_t size) {
        return torch::stable::new_empty(probabilities, {size}, ScalarType::Double);
    };
    Tensor prediction = new_float64(rows), mass = new_float64(columns), totals = new_float64(rows);
    Tensor lowest = new_float64(rows);
    dispatch_floating("probabilities", probabilities.scalar_type(), [&](auto* null) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
        const cpu::MatrixView<T> x{static_cast<const T*>(probabilities.data_ptr()), rows, columns,
                                   probabilities.stride(0), 1};
        cpu::empirical_prediction(x, label, num_classes, float64(prediction), float64(mass), float64(totals),
                                  float64(lowest), torch_parallel_for);
    });
    return {prediction, mass, totals, lowest};
}

}  // namespace
}  // namespace transferops

STABLE_TORCH_LIBRARY_IMPL(transferops, CPU, m) {
    m.impl("empirical_prediction", TORCH_BOX(&transferops::empirical_prediction));
}
