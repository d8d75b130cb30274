// First and second moments of feature sets, and the fourth-order ones of shrinkage, on CUDA devices; free of torch.
//
// y_n = x_n - shift throughout. Arithmetic (but in narrow_gram) and outputs are float64 whatever the element type; T is
// float, double, float16 or bfloat16. Every sum has a fixed order: results are bit for bit the same from run to run. A
// workspace is scratch of as many doubles as its function returns, aligned to 16 bytes (nullptr where that is 0).
// `shift` is [sets, columns], or nullptr for 0. Outputs are contiguous, may have any alignment and are fully written,
// also for empty inputs. Nothing here allocates or synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scalar.h"

namespace transferops::cuda {

// `sets` matrices of rows x columns. The columns are contiguous; the strides count elements.
template <class T>
struct FeatureSets {
    const T* data;
    std::int64_t sets, rows, columns;
    std::int64_t set_stride, row_stride;
};

// sums[sets, classes, columns]: sum of y_n over the rows of each class. `order` [rows] holds the row numbers sorted
// stably by class, the same for every set; the rows of class c are order[offsets[c]] .. order[offsets[c + 1] - 1], with
// `offsets` [classes + 1] from 0 to rows.
template <class T>
cudaError_t class_sums(const FeatureSets<T>& features, const std::int64_t* order, const std::int64_t* offsets,
                       std::int64_t classes, const double* shift, double* sums, double* workspace, cudaStream_t stream);
std::int64_t class_sums_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns);

// gram[sets, columns, columns] = sum_n y_n y_n^T, symmetric to the last bit. `multiprocessors` of the device decides
// how often the sum over rows is split, and is the one thing beside the input that the last bits depend on.
template <class T>
cudaError_t gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                 int multiprocessors, cudaStream_t stream);
std::int64_t gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors);

// What the rows y_n of a Gram matrix are rounded to before they are multiplied: float, of which products are float32's,
// or numbers of 11 (tf32) and 8 (bfloat16) significant bits. Sums are double beyond 1024 (float) or
// 2^20 rows, float before, and the tensor cores' own for a slab or 2048 rows.
enum class Precision { kFloat32, kTf32, kBfloat16 };

// `gram` on the narrow tensor cores. With u = 2^-24 an entry is within (8 + 4 + 12 + 64) u, 2^-10 + 2^-14 or 2^-7 +
// 2^-14 of sum_n |y_ni y_nj|, where the tensor cores' sums are rounded once a step. Wide features of 4 or 8 bytes are
// rounded to bfloat16 into the workspace first.
template <class T>
cudaError_t narrow_gram(const FeatureSets<T>& features, const double* shift, Precision precision, double* gram,
                        double* workspace, int multiprocessors, cudaStream_t stream);
template <class T>
std::int64_t narrow_gram_workspace(const FeatureSets<T>& features, Precision precision, int multiprocessors);

// gram[sets, rows, rows]: the inner products <y_n, y_m>; otherwise as `gram`.
template <class T>
cudaError_t sample_gram(const FeatureSets<T>& features, const double* shift, double* gram, double* workspace,
                        int multiprocessors, cudaStream_t stream);
std::int64_t sample_gram_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns, int multiprocessors);

// cubic[sets, columns] = sum_n |y_n|^2 y_n and quartic[sets] = sum_n |y_n|^4.
template <class T>
cudaError_t norm_moments(const FeatureSets<T>& features, const double* shift, double* cubic, double* quartic,
                         double* workspace, cudaStream_t stream);
std::int64_t norm_moments_workspace(std::int64_t sets, std::int64_t rows, std::int64_t columns);

}  // namespace transferops::cuda
