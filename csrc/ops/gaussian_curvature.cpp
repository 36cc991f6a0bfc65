#include "math/gaussian_curvature.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "gaussian_curvature";

Tensor curvature(const Tensor& surface, double dx, double dy) {
  GaussianCurvature s{};
  s.dtype = float_dtype(surface, op, "surface");
  LOSSMETA_CHECK(surface.dim() == 2 && surface.size(0) >= 3 && surface.size(1) >= 3, op,
                 ": surface must be [G, H] with G, H >= 3, got ", shape(surface));
  LOSSMETA_CHECK(std::isfinite(dx) && dx > 0, op, ": dx must be positive and finite, got ", dx);
  LOSSMETA_CHECK(std::isfinite(dy) && dy > 0, op, ": dy must be positive and finite, got ", dy);
  const Tensor samples = packed(surface);
  s.rows = surface.size(0);
  s.columns = surface.size(1);
  s.dx = dx;
  s.dy = dy;
  s.surface = samples.const_data_ptr();
  Tensor result = empty({s.rows - 2, s.columns - 2}, accumulation_type(s.dtype), surface);
  s.curvature = result.mutable_data_ptr();
  LOSSMETA_RUN(gaussian_curvature, s, surface);
  return result;
}

}  // namespace

LOSSMETA_DEFINE(m) { m.def("gaussian_curvature(Tensor surface, float dx, float dy) -> Tensor"); }

LOSSMETA_IMPLEMENT(m) { m.impl("gaussian_curvature", TORCH_BOX(&curvature)); }

}  // namespace lossmeta
