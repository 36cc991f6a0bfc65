#include "math/gaussian_curvature.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 15;  // below this a thread costs more than it saves

// `rows` rows of curvature at once: they share samples and differences.
template <int rows, class T>
void curvature_rows(const T* surface,            // [rows+2, H]
                    accumulate_t<T>* curvature,  // [rows, H-2]
                    int64_t columns, const math::GridScale<accumulate_t<T>>& scale) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t width = columns - 2;
  const auto evaluate = [&](int64_t j, auto&& read, auto&& write) {
    V f[rows + 2][3], k[rows];
    for (int r = 0; r < rows + 2; ++r)
      for (int d = 0; d < 3; ++d) f[r][d] = read(surface + r * columns + j + d);
    for (int r = 0; r < rows; ++r) k[r] = math::gaussian_curvature(f[r], f[r + 1], f[r + 2], scale);
    for (int r = 0; r < rows; ++r) write(curvature + r * width + j, k[r]);
  };
  if (width < V::size)
    return evaluate(
        0, [=](const T* p) { return load_partial(p, int(width), A(0)); },
        [=](A* p, V k) { store_partial(p, k, int(width)); });
  // The last vector of a row overlaps the one before.
  for (int64_t j = 0; j < width; j += V::size)
    evaluate(
        j <= width - V::size ? j : width - V::size, [](const T* p) { return load(p); },
        [](A* p, V k) { store(p, k); });
}

template <class T>
void curvature(const GaussianCurvature& s) {
  using A = accumulate_t<T>;
  constexpr int block = 4;
  const T* surface = static_cast<const T*>(s.surface);
  A* out = static_cast<A*>(s.curvature);
  const math::GridScale<A> scale(s.dx, s.dy);
  const int64_t rows = s.rows - 2, blocks = (rows + block - 1) / block;
  parallel_for(blocks, grain_elements / (block * s.columns) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block; i < end * block && i < rows; i += block) {
      const T* from = surface + i * s.columns;
      A* to = out + i * (s.columns - 2);
      if (i + block <= rows) {
        curvature_rows<block>(from, to, s.columns, scale);
      } else {
        for (int64_t r = 0; r < rows - i; ++r)
          curvature_rows<1>(from + r * s.columns, to + r * (s.columns - 2), s.columns, scale);
      }
    }
  });
}

}  // namespace

void gaussian_curvature(const GaussianCurvature& s) {
  visit_dtype(s.dtype, [&](auto tag) { curvature<typename decltype(tag)::type>(s); });
}

}  // namespace lossmeta::LOSSMETA_ISA
