#include "moments.h"

#include <algorithm>
#include <vector>

#include "gram.h"

namespace transferops::cpu {
namespace {

constexpr std::int64_t kStrip = 256;  // columns that one task of class_sums owns

// Columns begin .. end of every row: outputs of different strips are disjoint, so strips need no merging.
template <class T, bool UNIT>
__attribute__((always_inline)) inline void class_sums_rows(const MatrixView<T>& x, const std::int64_t* labels,
                                                           const double* shift, std::int64_t begin, std::int64_t end,
                                                           double* sums) {
    const std::int64_t stride = UNIT ? 1 : x.column_stride;
    for (std::int64_t n = 0; n < x.rows; ++n) {
        const T* row = x.data + n * x.row_stride;
        double* __restrict__ sum = sums + labels[n] * x.columns;
        for (std::int64_t i = begin; i < end; ++i) sum[i] += to_double(row[i * stride]) - shift[i];
    }
}

template <class T>
TRANSFEROPS_CLONES void class_sums_strip(const MatrixView<T>& x, const std::int64_t* labels, const double* shift,
                                         std::int64_t begin, std::int64_t end, double* sums) {
    if (x.column_stride == 1) return class_sums_rows<T, true>(x, labels, shift, begin, end, sums);
    return class_sums_rows<T, false>(x, labels, shift, begin, end, sums);
}

// Adds rows begin .. end to cubic and quartic; row is scratch for one centred row.
template <class T>
TRANSFEROPS_CLONES void norm_moments_rows(const MatrixView<T>& x, const double* shift, std::int64_t begin,
                                          std::int64_t end, double* __restrict__ row, double* __restrict__ cubic,
                                          double* quartic) {
    constexpr std::int64_t kLanes = 16;  // independent partial sums, so that the reduction vectorises
    for (std::int64_t n = begin; n < end; ++n) {
        const T* source = x.data + n * x.row_stride;
        for (std::int64_t i = 0; i < x.columns; ++i) row[i] = to_double(source[i * x.column_stride]) - shift[i];
        double lane[kLanes] = {};
        std::int64_t i = 0;
        for (; i + kLanes <= x.columns; i += kLanes)
            for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += row[i + k] * row[i + k];
        for (; i < x.columns; ++i) lane[0] += row[i] * row[i];
        double norm = 0;
        for (std::int64_t k = 0; k < kLanes; ++k) norm += lane[k];
        for (i = 0; i < x.columns; ++i) cubic[i] += norm * row[i];
        *quartic += norm * norm;
    }
}

// counts and sums [classes, columns] of x - shift.
template <class T>
void class_sums(const MatrixView<T>& features, const std::int64_t* labels, std::int64_t classes, const double* shift,
                std::int64_t* counts, double* sums, const ParallelFor& parallel_for) {
    std::fill_n(counts, classes, 0);
    for (std::int64_t n = 0; n < features.rows; ++n) ++counts[labels[n]];
    std::fill_n(sums, classes * features.columns, 0.0);
    parallel_for(ceil_div(features.columns, kStrip), [&](std::int64_t strip) {
        const std::int64_t begin = strip * kStrip;
        class_sums_strip(features, labels, shift, begin, std::min(begin + kStrip, features.columns), sums);
    });
}

// Class sums about the column means, and those means. Summing x - x_0 first keeps a common offset, however large, from
// costing digits.
template <class T>
void centred_class_sums(const MatrixView<T>& features, const std::int64_t* labels, std::int64_t classes,
                        std::int64_t* counts, double* sums, double* mean, const ParallelFor& parallel_for) {
    const std::int64_t columns = features.columns;
    std::vector<double> first(static_cast<std::size_t>(columns), 0.0);
    if (features.rows > 0)
        for (std::int64_t i = 0; i < columns; ++i) first[i] = to_double(features.data[i * features.column_stride]);
    class_sums(features, labels, classes, first.data(), counts, sums, parallel_for);
    std::vector<double> offset(static_cast<std::size_t>(columns), 0.0);  // mean - x_0
    for (std::int64_t c = 0; c < classes; ++c)
        for (std::int64_t i = 0; i < columns; ++i) offset[i] += sums[c * columns + i];
    for (std::int64_t i = 0; i < columns; ++i) {
        if (features.rows > 0) offset[i] /= static_cast<double>(features.rows);
        mean[i] = first[i] + offset[i];
    }
    for (std::int64_t c = 0; c < classes; ++c)
        for (std::int64_t i = 0; i < columns; ++i)
            sums[c * columns + i] -= static_cast<double>(counts[c]) * (mean[i] - first[i]);
}

}  // namespace

template <class T>
void class_moments(const MatrixView<T>& features, const std::int64_t* labels, std::int64_t classes,
                   std::int64_t* counts, double* sums, double* gram, double* shift, const ParallelFor& parallel_for) {
    centred_class_sums(features, labels, classes, counts, sums, shift, parallel_for);
    const GramOperand<T> x{features.data, features.rows, features.columns, features.row_stride, features.column_stride,
                           shift,         false};
    symmetric_gram(x, gram, parallel_for);
}

template <class T>
void sample_gram(const MatrixView<T>& features, double* gram, double* shift, const ParallelFor& parallel_for) {
    const std::vector<std::int64_t> one_class(static_cast<std::size_t>(features.rows), 0);
    std::vector<double> sum(static_cast<std::size_t>(features.columns));
    std::int64_t count;
    centred_class_sums(features, one_class.data(), 1, &count, sum.data(), shift, parallel_for);
    const GramOperand<T> x{
        features.data, features.columns, features.rows, features.column_stride, features.row_stride, shift, true};
    symmetric_gram(x, gram, parallel_for);
}

template <class T>
void norm_moments(const MatrixView<T>& features, const double* shift, double* cubic, double* quartic,
                  const ParallelFor& parallel_for) {
    const std::int64_t columns = features.columns;
    const std::int64_t slices = std::clamp<std::int64_t>(ceil_div(features.rows, kDepth), 1, kSlices);
    const std::int64_t slice_rows = ceil_div(features.rows, slices);
    std::vector<double> partial(static_cast<std::size_t>(slices * columns), 0.0);
    std::vector<double> partial_quartic(static_cast<std::size_t>(slices), 0.0);
    parallel_for(slices, [&](std::int64_t slice) {
        const std::int64_t begin = std::min(slice * slice_rows, features.rows);
        std::vector<double> row(static_cast<std::size_t>(columns));
        norm_moments_rows(features, shift, begin, std::min(begin + slice_rows, features.rows), row.data(),
                          partial.data() + slice * columns, &partial_quartic[slice]);
    });
    std::fill_n(cubic, columns, 0.0);
    *quartic = 0;
    for (std::int64_t slice = 0; slice < slices; ++slice) {
        for (std::int64_t i = 0; i < columns; ++i) cubic[i] += partial[slice * columns + i];
        *quartic += partial_quartic[slice];
    }
}

#define TRANSFEROPS_INSTANTIATE(T)                                                                               \
    template void class_moments(const MatrixView<T>&, const std::int64_t*, std::int64_t, std::int64_t*, double*, \
                                double*, double*, const ParallelFor&);                                           \
    template void sample_gram(const MatrixView<T>&, double*, double*, const ParallelFor&);                       \
    template void norm_moments(const MatrixView<T>&, const double*, double*, double*, const ParallelFor&);
TRANSFEROPS_INSTANTIATE(float)
TRANSFEROPS_INSTANTIATE(double)
TRANSFEROPS_INSTANTIATE(float16)
TRANSFEROPS_INSTANTIATE(bfloat16)
#undef TRANSFEROPS_INSTANTIATE

}  // namespace transferops::cpu
