// What the CPU and the CUDA registration of the moments family share: argument checks and shapes.
#pragma once

#include <vector>

#include "stable.h"

namespace transferops {

// features [..., N, D] seen as [sets, rows, columns], rows and columns with any strides.
struct FeatureSets {
    Tensor tensor;  // the features with their leading dimensions flattened into one
    std::int64_t sets, rows, columns;
    std::vector<std::int64_t> leading;  // the leading dimensions as they came

    explicit FeatureSets(const Tensor& features) : tensor(features) {
        if (features.dim() < 2) fail("features: expected shape [..., N, D], got ", shape_of(features));
        const std::int64_t last = features.dim() - 1;
        rows = features.size(last - 1);
        columns = features.size(last);
        sets = 1;
        for (std::int64_t i = 0; i < last - 1; ++i) {
            leading.push_back(features.size(i));
            sets *= features.size(i);
        }
        const std::vector<std::int64_t> flat{sets, rows, columns};
        if (features.dim() != 3) tensor = torch::stable::reshape(features, flat);
    }

    // The shape [..., extra...] of an output.
    std::vector<std::int64_t> shape(std::initializer_list<std::int64_t> extra) const {
        std::vector<std::int64_t> out = leading;
        out.insert(out.end(), extra);
        return out;
    }

    Tensor new_float64(std::initializer_list<std::int64_t> extra) const {
        return torch::stable::new_empty(tensor, shape(extra), ScalarType::Double);
    }
};

// Labels [rows] of the rows of `values`, a class each; whether they are in range is not looked at.
inline void check_labels(const Tensor& labels, const char* argument, const Tensor& values, std::int64_t rows,
                         std::int64_t num_classes) {
    check_dtype("labels", labels, ScalarType::Long, "int64");
    if (labels.dim() != 1 || labels.size(0) != rows)
        fail("labels: expected shape [", rows, "], one label per row of ", argument, ", got ", shape_of(labels));
    if (labels.is_cuda() != values.is_cuda()) fail("labels: expected the device of ", argument, ", got another");
    const int least = rows > 0 ? 1 : 0;
    if (num_classes < least) fail("num_classes: expected at least ", least, ", got ", num_classes);
}

// Labels on the CPU, as the kernels read them: contiguous, and all in range.
inline const std::int64_t* labels_in_range(const Tensor& labels, std::int64_t num_classes) {
    const auto* label = static_cast<const std::int64_t*>(labels.data_ptr());
    for (std::int64_t n = 0; n < labels.numel(); ++n)
        if (label[n] < 0 || label[n] >= num_classes)
            fail("labels: expected ", num_classes, " classes 0..", num_classes - 1, ", got ", label[n], " at position ",
                 n);
    return label;
}

// Significant bits that the factors of a Gram matrix keep at least: those of float64, float32, tf32 or bfloat16.
inline void check_precision(std::int64_t precision) {
    if (precision != 53 && precision != 24 && precision != 11 && precision != 8)
        fail("precision: expected 53, 24, 11 or 8 significant bits, got ", precision);
}

inline void check_shift(const FeatureSets& features, const Tensor& shift) {
    check_dtype("shift", shift, ScalarType::Double, "float64");
    const bool matches = shift.dim() == static_cast<std::int64_t>(features.leading.size()) + 1 &&
                         shift.numel() == features.sets * features.columns &&
                         shift.size(shift.dim() - 1) == features.columns;
    if (!matches) fail("shift: expected shape [..., ", features.columns, "] like features, got ", shape_of(shift));
    if (shift.is_cuda() != features.tensor.is_cuda()) fail("shift: expected the device of features, got another");
}

}  // namespace transferops
