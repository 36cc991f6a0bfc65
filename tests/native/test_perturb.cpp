#include "math/perturb.h"

#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

// One rounding of the result, and a few of its accumulation.
template <class T>
constexpr double tolerance = std::is_same_v<T, double>     ? 1e-13
                             : std::is_same_v<T, bfloat16> ? 4e-3
                             : std::is_same_v<T, float16>  ? 5e-4
                                                           : 1e-5;

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t points, count, parameters, stride;
  std::vector<T> base, directions;
  std::vector<A> coefficients;

  Case(int64_t points_, int64_t count_, int64_t parameters_, int64_t gap)
      : points(points_),
        count(count_),
        parameters(parameters_),
        stride(parameters_ + gap),
        base(parameters),
        directions(count * parameters),
        coefficients(points * count) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (T& value : base) math::store(&value, A(normal(random)));
    for (T& value : directions) math::store(&value, A(normal(random)));
    for (A& value : coefficients) value = A(normal(random));
  }

  template <class Run>
  void check(const Run& run, const char* backend, int variant) const {
    T untouched;
    math::store(&untouched, A(-77));
    std::vector<T> out(points * stride + 1, untouched);
    run(Perturb{dtype_of<T>, points, count, parameters, base.data(), directions.data(), coefficients.data(),
                out.data(), stride});
    for (int64_t b = 0; b < points; ++b)
      for (int64_t p = 0; p < stride; ++p) {
        double expected = -77;
        if (p < parameters) {
          expected = math::load(&base[p]);
          for (int64_t k = 0; k < count; ++k)
            expected += double(coefficients[b * count + k]) * math::load(&directions[k * parameters + p]);
        }
        CHECK_NEAR(math::load(&out[b * stride + p]), expected, tolerance<T>, tolerance<T>, backend, variant,
                   " ", points, "x", count, "x", parameters, " point ", b, " parameter ", p);
      }
    CHECK(math::load(&out.back()) == A(-77), backend, variant, ": written beyond the end");
  }
};

template <class Check>
void for_every_case(const Check& check) {
  struct {
    int64_t points, count, parameters, gap;
  } sizes[] = {{1, 1, 1, 0},     {3, 2, 5, 2},     {2, 1, 67, 0}, {16, 2, 1024, 0}, {17, 2, 1024, 16},
               {4, 130, 257, 1}, {33, 3, 2056, 8}, {3, 0, 40, 0}, {0, 2, 40, 0},    {3, 2, 0, 0}};
  for (const auto& s : sizes) {
    check(Case<float>(s.points, s.count, s.parameters, s.gap));
    check(Case<double>(s.points, s.count, s.parameters, s.gap));
    check(Case<bfloat16>(s.points, s.count, s.parameters, s.gap));
    check(Case<float16>(s.points, s.count, s.parameters, s.gap));
  }
}

}  // namespace

TEST(cpu) {
  const auto check = [](const auto& c) {
    on_every_cpu([&](int isa) { c.check(cpu::perturb, "isa ", isa); });
  };
  for_every_case(check);
  // Large enough to be streamed; rows that begin anywhere in a cache line.
  check(Case<float>(3, 2, 1500007, 1));
  check(Case<double>(3, 1, 750011, 2));
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    for (int seed = 0; seed < 4; ++seed) {
      simt::set_seed(seed);
      c.check([](const Perturb& a) { cuda::perturb(a, nullptr); }, "seed ", seed);
    }
  });
}
