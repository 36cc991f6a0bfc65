#include "math/gaussian_curvature.h"

#include "cuda/launch.h"

namespace lossmeta::cuda {
namespace {

constexpr int threads = 256;

// One thread per point; neighbouring threads read neighbouring samples, and the nine reads of each meet in
// the cache.
template <class T>
__global__ void curvature_kernel(const T* surface,            // [G, H]
                                 accumulate_t<T>* curvature,  // [G-2, H-2]
                                 int64_t points, int64_t columns, math::GridScale<accumulate_t<T>> scale) {
  const int64_t width = columns - 2, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < points; k += step) {
    const T* corner = surface + k / width * columns + k % width;
    accumulate_t<T> f[3][3];
    for (int r = 0; r < 3; ++r)
      for (int d = 0; d < 3; ++d) f[r][d] = math::load(corner + r * columns + d);
    curvature[k] = math::gaussian_curvature(f[0], f[1], f[2], scale);
  }
}

template <class T>
void launch(const GaussianCurvature& s, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t points = (s.rows - 2) * (s.columns - 2), wanted = (points + threads - 1) / threads;
  if (points == 0) return;
  const int blocks = int(wanted < (1 << 20) ? wanted : 1 << 20);
  LOSSMETA_LAUNCH(curvature_kernel<T>, blocks, threads, 0, stream, static_cast<const T*>(s.surface),
                  static_cast<A*>(s.curvature), points, s.columns, math::GridScale<A>(s.dx, s.dy));
}

}  // namespace

void gaussian_curvature(const GaussianCurvature& s, cudaStream_t stream) {
  visit_dtype(s.dtype, [&](auto tag) { launch<typename decltype(tag)::type>(s, stream); });
}

}  // namespace lossmeta::cuda
