// CPU kernel of LEEP: the target's labels, predicted from the class probabilities of a source model.
//
// Sums are taken in float64. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "moments.h"
#include "parallel.h"

namespace transferops::cpu {

// With J [classes, columns] the sums of the rows of each class of labels [rows] in 0 .. classes-1 (the caller checks),
// and mass [columns] its column sums: prediction[n] = sum_z J[labels[n], z] / mass[z] row_nz over the z that have mass,
// totals[n] the sum of a row and lowest[n] its smallest element (infinity in a row of no columns). Columns are
// contiguous. NaN is passed on by the sums; of a row that holds one, `lowest` says nothing.
template <class T>
void empirical_prediction(const MatrixView<T>& probabilities, const std::int64_t* labels, std::int64_t classes,
                          double* prediction, double* mass, double* totals, double* lowest,
                          const ParallelFor& parallel_for);

}  // namespace transferops::cpu
