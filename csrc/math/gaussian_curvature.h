// Gaussian curvature of a loss surface z = f(x, y) that is sampled on a grid (ALA, analysis of the loss
// landscape): K = (f_xx f_yy - f_xy^2) / (1 + f_x^2 + f_y^2)^2, with central differences.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct GaussianCurvature {
  DType dtype;          // of surface; curvature is in its accumulation type
  int64_t rows;         // G, along x
  int64_t columns;      // H, along y
  double dx, dy;        // grid spacings
  const void* surface;  // [G, H]
  void* curvature;      // [G-2, H-2]
};

namespace math {

// Factors of the central differences on a grid.
template <class T>
struct GridScale {
  T x, y;        // 1 / 2dx, 1 / 2dy
  T xx, yy, xy;  // 1 / dx^2, 1 / dy^2, 1 / 4dxdy

  GridScale(double dx, double dy)
      : x(T(0.5 / dx)), y(T(0.5 / dy)), xx(T(1 / dx / dx)), yy(T(1 / dy / dy)), xy(T(0.25 / dx / dy)) {}
};

// The curvature at the middle of three rows a, b, c (x grows from a to c) of three samples each (y grows).
// A second difference is the difference of two first differences, which are exact where samples are close:
// f0 - 2 f1 + f2 = 2 (f2 - f1) - (f2 - f0).
template <class V, class T>
LOSSMETA_HD V gaussian_curvature(const V (&a)[3], const V (&b)[3], const V (&c)[3],
                                 const GridScale<T>& scale) {
  const V across_x = c[1] - a[1], across_y = b[2] - b[0];
  const V fx = across_x * scale.x, fy = across_y * scale.y;
  const V fxx = ((c[1] - b[1]) * T(2) - across_x) * scale.xx;
  const V fyy = ((b[2] - b[1]) * T(2) - across_y) * scale.yy;
  const V fxy = ((c[2] - c[0]) - (a[2] - a[0])) * scale.xy;
  const V metric = fx * fx + (fy * fy + T(1));
  return (fxx * fyy - fxy * fxy) / (metric * metric);
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(gaussian_curvature, GaussianCurvature)
