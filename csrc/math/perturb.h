// Points around a point: theta_b = theta + sum_k c_bk delta_k, for loss surfaces and line searches.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct Perturb {
  DType dtype;               // of base, directions and out; coefficients are in its accumulation type
  int64_t points;            // B
  int64_t directions_count;  // K
  int64_t parameters;        // P
  const void* base;          // [P]
  const void* directions;    // [K, P]
  const void* coefficients;  // [B, K]
  void* out;                 // [B, P], row b at b * out_stride
  int64_t out_stride;        // >= P
};

}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(perturb, Perturb)
