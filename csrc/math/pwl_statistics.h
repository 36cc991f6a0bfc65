// Statistics of the piecewise-linear features of TuneLoss (Eq. 4): for knots a_0 < ... < a_(X-1) the 2X
// features are sum_p max(0, theta_p - a_k), then sum_p max(0, a_k - theta_p), with Jacobian J (slope 0 at
// theta = a).
//
// All of it follows from sums per cell. Cell 2k is the open interval below knot k (2X: above the last), cell
// 2k+1 the knot k itself, cell 2X+1 holds NaN. So theta > a_k means cell >= 2k+2, and theta < a_k means cell
// <= 2k.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct PwlStatistics {
  DType dtype;              // of theta and gradients; knots are in its accumulation type
  int64_t parameters;       // P
  int64_t knots_count;      // X
  int64_t gradients_count;  // R
  const void* theta;        // [P]
  const void* gradients;    // [R, P]
  const void* knots;        // [X]
  double* features;         // [2X]
  double* gram;             // [2X, 2X]
  double* cross;            // [2X, R]
  double* scratch;          // CUDA: [pwl_scratch_size()]
};

// The sums are kept as groups of four quantities: group 0 holds the number of parameters, theta and the first
// two gradients, each further group four gradients more.
constexpr int64_t pwl_group_size = 4;

namespace math {

LOSSMETA_HD int64_t pwl_cells(int64_t knots_count) { return 2 * knots_count + 2; }
LOSSMETA_HD int64_t pwl_groups(int64_t gradients_count) {
  return (2 + gradients_count + pwl_group_size - 1) / pwl_group_size;
}

// On the GPU each block keeps sums of its own; how many blocks depends on the problem only, as do the
// results.
inline int64_t pwl_blocks(const PwlStatistics& s) {
  constexpr int64_t most = 1024, parameters_per_block = 256, sums_most = int64_t(1) << 18;
  const int64_t wanted = (s.parameters + parameters_per_block - 1) / parameters_per_block;
  const int64_t fitting = sums_most / pwl_cells(s.knots_count);
  const int64_t blocks = wanted < fitting ? wanted : fitting;
  return blocks < 1 ? 1 : blocks > most ? most : blocks;
}
// Sums per block, their total, and the counts above each cell.
inline int64_t pwl_scratch_size(const PwlStatistics& s) {
  const int64_t cells = pwl_cells(s.knots_count);
  return (pwl_blocks(s) + 1) * pwl_groups(s.gradients_count) * cells * pwl_group_size + cells;
}

// The cell of x, by bisection.
template <class T>
LOSSMETA_HD int64_t pwl_cell(const T* knots,  // [X]
                             int64_t knots_count, T x) {
  if (x != x) return 2 * knots_count + 1;
  int64_t low = 0, high = knots_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (knots[middle] < x)
      low = middle + 1;
    else
      high = middle;
  }
  return 2 * low + (low < knots_count && knots[low] == x);
}

// The features and the columns of J^T G, from the sums of theta (quantity 1) or of gradient r (quantity 2 +
// r) per cell. above[c] counts the parameters in the cells c and higher, without NaN.
template <class T, class Sum>
LOSSMETA_HD void pwl_column(const PwlStatistics& s, int64_t quantity, const double* above,  // [2X+2]
                            const T* knots,                                                 // [X]
                            const Sum& sum, bool any_nan) {
  const int64_t x = s.knots_count, r = quantity - 2;
  double upper = 0, lower = 0;
  for (int64_t k = x - 1; k >= 0; --k) {
    upper += sum(2 * k + 2);
    if (k < x - 1) upper += sum(2 * k + 3);
    if (r >= 0)
      s.cross[k * s.gradients_count + r] = upper;
    else
      s.features[k] = any_nan ? NAN : upper - above[2 * k + 2] * double(knots[k]);
  }
  for (int64_t k = 0; k < x; ++k) {
    lower += sum(2 * k);
    if (k > 0) lower += sum(2 * k - 1);
    if (r >= 0)
      s.cross[(x + k) * s.gradients_count + r] = -lower;
    else
      s.features[x + k] = any_nan ? NAN : (above[0] - above[2 * k + 1]) * double(knots[k]) - lower;
  }
}

// An element of J^T J. Rows and columns m < X are the features max(0, theta - a_m), the others max(0, a_(m-X)
// - theta).
LOSSMETA_HD double pwl_gram(const double* above,  // [2X+2]
                            int64_t knots_count, int64_t row, int64_t column) {
  const bool row_above = row < knots_count, column_above = column < knots_count;
  const int64_t i = row_above ? row : row - knots_count, j = column_above ? column : column - knots_count;
  if (row_above && column_above) return above[2 * (i > j ? i : j) + 2];
  if (!row_above && !column_above) return above[0] - above[2 * (i < j ? i : j) + 1];
  const int64_t low = row_above ? i : j, high = row_above ? j : i;
  return low < high ? above[2 * high + 1] - above[2 * low + 2] : 0.0;
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(pwl_statistics, PwlStatistics)
