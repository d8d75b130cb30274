// How kernels of the moments family read features and shifts.
#pragma once

#include <cstdint>

#include "device.h"
#include "moments.h"

namespace transferops::cuda {

// Whether the columns are whole vectors of `width` elements, each aligned to its size, and the shift can be read in
// pairs.
template <class T>
bool vectors_aligned(const FeatureSets<T>& x, const double* shift, int width) {
    return is_aligned(x.data, width * sizeof(T)) && is_aligned(shift, 16) && x.columns % width == 0 &&
           x.row_stride % width == 0 && (x.sets == 1 || x.set_stride % width == 0);
}

// The first `width` of kWidth doubles at `source`, two per access if `aligned`; zeros for the others, and for no
// source.
template <int kWidth>
__device__ void load_doubles(double (&values)[kWidth], const double* source, int width, bool aligned) {
#pragma unroll
    for (int v = 0; v < kWidth; v += 2) {
        Vector<double, 2> pair{};
        if (aligned) {
            if (source && v < width) pair = *reinterpret_cast<const Vector<double, 2>*>(source + v);
        } else {
            if (source && v < width) pair.values[0] = source[v];
            if (source && v + 1 < width) pair.values[1] = source[v + 1];
        }
        values[v] = pair.values[0];
        values[v + 1] = pair.values[1];
    }
}

// The address of `column`, or nullptr if there is no shift.
__device__ inline const double* shift_at(const double* shift, std::int64_t column) {
    return shift ? shift + column : nullptr;
}

}  // namespace transferops::cuda
