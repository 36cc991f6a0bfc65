#include "math/gaussian_curvature.h"

#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t rows, columns;
  double dx = 0.5, dy = 1.25;
  std::vector<T> surface = std::vector<T>(rows * columns);
  std::vector<double> expected = std::vector<double>((rows - 2) * (columns - 2));

  Case(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (T& value : surface) math::store(&value, A(normal(random)));
    const auto f = [&](int64_t i, int64_t j) { return double(math::load(&surface[i * columns + j])); };
    for (int64_t i = 1; i < rows - 1; ++i)
      for (int64_t j = 1; j < columns - 1; ++j) {
        const double fx = (f(i + 1, j) - f(i - 1, j)) / (2 * dx), fy = (f(i, j + 1) - f(i, j - 1)) / (2 * dy);
        const double fxx = (f(i + 1, j) - 2 * f(i, j) + f(i - 1, j)) / (dx * dx);
        const double fyy = (f(i, j + 1) - 2 * f(i, j) + f(i, j - 1)) / (dy * dy);
        const double fxy =
            (f(i + 1, j + 1) - f(i + 1, j - 1) - f(i - 1, j + 1) + f(i - 1, j - 1)) / (4 * dx * dy);
        expected[(i - 1) * (columns - 2) + j - 1] =
            (fxx * fyy - fxy * fxy) / ((1 + fx * fx + fy * fy) * (1 + fx * fx + fy * fy));
      }
  }

  template <class Run>
  void check(const Run& run, const char* backend, int variant) const {
    std::vector<A> result(expected.size() + 1, A(-77));  // one element beyond: nothing may be written there
    run(GaussianCurvature{dtype_of<T>, rows, columns, dx, dy, surface.data(), result.data()});
    const double tolerance = sizeof(A) == 8 ? 1e-13 : 3e-5;
    for (size_t i = 0; i < expected.size(); ++i)
      CHECK_NEAR(result[i], expected[i], tolerance, tolerance, backend, variant, " ", rows, "x", columns,
                 " point ", i);
    CHECK(result.back() == A(-77), backend, variant, " ", rows, "x", columns, ": written beyond the end");
  }
};

template <class Check>
void for_every_case(const Check& check) {
  for (auto [rows, columns] : {std::pair{3, 3}, {3, 40}, {41, 3}, {5, 17}, {6, 18}, {7, 35}, {260, 130}}) {
    check(Case<float>(rows, columns));
    check(Case<double>(rows, columns));
    check(Case<bfloat16>(rows, columns));
    check(Case<float16>(rows, columns));
  }
}

}  // namespace

TEST(cpu) {
  for_every_case(
      [](const auto& c) { on_every_cpu([&](int isa) { c.check(cpu::gaussian_curvature, "isa ", isa); }); });
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    for (int seed = 0; seed < 4; ++seed) {
      simt::set_seed(seed);
      c.check([](const GaussianCurvature& s) { cuda::gaussian_curvature(s, nullptr); }, "seed ", seed);
    }
  });
}
