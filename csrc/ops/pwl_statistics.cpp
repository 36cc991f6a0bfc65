#include "math/pwl_statistics.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "pwl_statistics";

// Knots that are finite and rise, in the precision in which they are compared with theta. On CUDA looking
// would synchronise: there every cell found lies in range whatever the knots are.
template <class T>
void check_knots(const T* knots,  // [count]
                 int64_t count) {
#ifndef LOSSMETA_BACKEND_CUDA
  for (int64_t k = 0; k < count; ++k) {
    LOSSMETA_CHECK(std::isfinite(knots[k]), op, ": knots must be finite in the precision of theta, got ",
                   knots[k], " at index ", k);
    LOSSMETA_CHECK(k == 0 || knots[k - 1] < knots[k], op,
                   ": knots must rise strictly in the precision of theta, got ", knots[k], " at index ", k,
                   " after ", knots[k - 1]);
  }
#else
  (void)knots, (void)count;
#endif
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& theta, const std::optional<Tensor>& gradients,
                                              const Tensor& knots) {
  PwlStatistics s{};
  s.dtype = float_dtype(theta, op, "theta");
  LOSSMETA_CHECK(theta.dim() == 1, op, ": theta must be [P], got ", shape(theta));
  s.parameters = theta.size(0);
  float_dtype(knots, op, "knots");
  check_same_device(knots, theta, op, "knots", "theta");
  LOSSMETA_CHECK(knots.dim() == 1, op, ": knots must be [X], got ", shape(knots));
  s.knots_count = knots.size(0);
  std::optional<Tensor> rows;
  if (gradients) {
    LOSSMETA_CHECK(gradients->scalar_type() == theta.scalar_type(), op,
                   ": gradients must have the dtype of theta, ", dtype_name(theta), ", got ",
                   dtype_name(*gradients));
    check_same_device(*gradients, theta, op, "gradients", "theta");
    LOSSMETA_CHECK(gradients->dim() == 2 && gradients->size(1) == s.parameters, op,
                   ": gradients must be [R, ", s.parameters, "], got ", shape(*gradients));
    rows = packed(*gradients);
    s.gradients_count = rows->size(0);
    s.gradients = rows->const_data_ptr();
  }
  const Tensor values = packed(theta), sorted = packed_as(knots, accumulation_type(s.dtype));
  s.theta = values.const_data_ptr();
  s.knots = sorted.const_data_ptr();
  if (s.dtype == DType::float64)
    check_knots(static_cast<const double*>(s.knots), s.knots_count);
  else
    check_knots(static_cast<const float*>(s.knots), s.knots_count);
  const int64_t features_count = 2 * s.knots_count;
  Tensor features = empty({features_count}, ScalarType::Double, theta);
  Tensor gram = empty({features_count, features_count}, ScalarType::Double, theta);
  Tensor cross = empty({features_count, s.gradients_count}, ScalarType::Double, theta);
  s.features = static_cast<double*>(features.mutable_data_ptr());
  s.gram = static_cast<double*>(gram.mutable_data_ptr());
  s.cross = static_cast<double*>(cross.mutable_data_ptr());
#ifdef LOSSMETA_BACKEND_CUDA
  Tensor scratch = empty({math::pwl_scratch_size(s)}, ScalarType::Double, theta);
  s.scratch = static_cast<double*>(scratch.mutable_data_ptr());
#endif
  LOSSMETA_RUN(pwl_statistics, s, theta);
  return {features, gram, cross};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "pwl_statistics(Tensor theta, Tensor? gradients, Tensor knots) -> (Tensor features, Tensor gram, "
      "Tensor cross)");
}

LOSSMETA_IMPLEMENT(m) { m.impl("pwl_statistics", TORCH_BOX(&statistics)); }

}  // namespace lossmeta
