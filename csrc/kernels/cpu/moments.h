// CPU kernels of the moments family: class sums, centred Gram matrices, moments of the row norms.
//
// Everything is accumulated in float64, and float32 and 16-bit inputs are converted to float64 before anything is
// subtracted or multiplied. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../scalar.h"
#include "parallel.h"

namespace transferops::cpu {

// A strided [rows, columns] matrix, read only. Strides count elements.
template <class T>
struct MatrixView {
    const T* data;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t row_stride;
    std::int64_t column_stride;
};

// With shift = the column means of all rows, per class c of labels [rows] in 0 .. classes-1 (the caller checks):
// counts[c] = number of rows of the class, sums[c, :] = sum over those rows of (x_n - shift), and over all rows
// gram [columns, columns] = sum_n (x_n - shift)(x_n - shift)^T, both halves. All four outputs are overwritten.
template <class T>
void class_moments(const MatrixView<T>& features, const std::int64_t* labels, std::int64_t classes,
                   std::int64_t* counts, double* sums, double* gram, double* shift, const ParallelFor& parallel_for);

// gram [rows, rows] = Y Y^T with Y = X - 1 shift^T, both halves, and shift [columns] = the column means.
template <class T>
void sample_gram(const MatrixView<T>& features, double* gram, double* shift, const ParallelFor& parallel_for);

// With y_n = x_n - shift: cubic [columns] = sum_n |y_n|^2 y_n and *quartic = sum_n |y_n|^4.
template <class T>
void norm_moments(const MatrixView<T>& features, const double* shift, double* cubic, double* quartic,
                  const ParallelFor& parallel_for);

}  // namespace transferops::cpu
