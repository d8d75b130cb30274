// The small steps around the moments kernels: where classes begin, the first row as a provisional shift, the column
// means.
#pragma once

#include "moments.h"

namespace transferops::cuda {

// offsets [classes + 1]: class c is sorted_labels[offsets[c]] .. sorted_labels[offsets[c + 1] - 1]; counts [classes]
// their sizes. Labels below 0 or from `classes` on count to the first or the last class, so that every row has one.
cudaError_t class_offsets(const std::int64_t* sorted_labels, std::int64_t rows, std::int64_t classes,
                          std::int64_t* offsets, std::int64_t* counts, cudaStream_t stream);

// out [sets, columns] = the first row of every set; 0 if there is none.
template <class T>
cudaError_t first_rows(const FeatureSets<T>& features, double* out, cudaStream_t stream);

// Moves class sums [sets, classes, columns] of x - shift to the column means, in place, and shift [sets, columns] with
// them: shift += sum over classes / rows, sums -= counts * the change. Summing x - x_0 first keeps a common offset,
// however large, from costing digits.
cudaError_t recentre(const std::int64_t* counts, std::int64_t sets, std::int64_t rows, std::int64_t classes,
                     std::int64_t columns, double* sums, double* shift, cudaStream_t stream);

}  // namespace transferops::cuda
