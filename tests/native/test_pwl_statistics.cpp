#include "math/pwl_statistics.h"

#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t parameters, knots_count, gradients_count;
  std::vector<T> theta, gradients;
  std::vector<A> knots;
  std::vector<double> features, gram, cross;

  // Knots 1/8 apart, or 2^k: with either, half of the parameters lie on a knot or beyond them.
  Case(int64_t parameters_, int64_t knots_count_, int64_t gradients_count_, bool uniform)
      : parameters(parameters_),
        knots_count(knots_count_),
        gradients_count(gradients_count_),
        theta(parameters),
        gradients(gradients_count * parameters),
        knots(knots_count),
        features(2 * knots_count),
        gram(4 * knots_count * knots_count),
        cross(2 * knots_count * gradients_count) {
    std::mt19937 random(13);
    std::normal_distribution<float> normal;
    for (int64_t k = 0; k < knots_count; ++k)
      knots[k] = uniform ? A((k - knots_count / 2) / 8.0) : std::ldexp(A(1), int(k) - 12);
    for (int64_t p = 0; p < parameters; ++p)
      math::store(&theta[p], p % 2 ? A(normal(random)) : knots[random() % knots_count]);
    for (T& value : gradients) math::store(&value, A(normal(random)));
    const auto slope = [&](int64_t p, int64_t m) {
      const double x = math::load(&theta[p]), a = knots[m % knots_count];
      return m < knots_count ? double(x > a) : -double(x < a);
    };
    for (int64_t p = 0; p < parameters; ++p)
      for (int64_t m = 0; m < 2 * knots_count; ++m) {
        if (slope(p, m) == 0) continue;
        features[m] += std::abs(double(math::load(&theta[p])) - double(knots[m % knots_count]));
        for (int64_t l = 0; l < 2 * knots_count; ++l)
          gram[m * 2 * knots_count + l] += slope(p, m) * slope(p, l);
        for (int64_t r = 0; r < gradients_count; ++r)
          cross[m * gradients_count + r] += slope(p, m) * double(math::load(&gradients[r * parameters + p]));
      }
  }

  template <class Run>
  void check(const Run& run, const char* backend, int variant) const {
    std::vector<double> f(features.size() + 1, -77), g(gram.size() + 1, -77), c(cross.size() + 1, -77);
    PwlStatistics s{dtype_of<T>,  parameters, knots_count, gradients_count, theta.data(), gradients.data(),
                    knots.data(), f.data(),   g.data(),    c.data(),        nullptr};
    std::vector<double> scratch(math::pwl_scratch_size(s) + 1, -77);
    s.scratch = scratch.data();
    run(s);
    const double tolerance = 1e-13 * double(parameters + 1);
    const auto compare = [&](const char* name, const std::vector<double>& actual,
                             const std::vector<double>& expected) {
      for (size_t i = 0; i < expected.size(); ++i)
        CHECK_NEAR(actual[i], expected[i], tolerance, 1e-12, backend, variant, " P=", parameters,
                   " X=", knots_count, " R=", gradients_count, " ", name, " ", i);
      CHECK(actual.back() == -77, backend, variant, " ", name, ": written beyond the end");
    };
    compare("features", f, features);
    compare("gram", g, gram);
    compare("cross", c, cross);
    CHECK(scratch.back() == -77, backend, variant, ": scratch written beyond the end");
  }
};

template <class Check>
void for_every_case(const Check& check) {
  struct {
    int64_t parameters, knots, gradients;
    bool uniform;
  } sizes[] = {{1, 1, 0, true},     {7, 2, 1, true},     {300, 1, 2, true}, {521, 25, 2, true},
               {521, 25, 2, false}, {130, 20, 3, false}, {259, 9, 7, true}, {0, 3, 2, true},
               {40, 200, 1, true},  {40, 420, 1, true},  {40, 800, 2, true}};
  for (const auto& s : sizes) {
    check(Case<float>(s.parameters, s.knots, s.gradients, s.uniform));
    check(Case<double>(s.parameters, s.knots, s.gradients, s.uniform));
    if (s.knots > 100) continue;
    check(Case<bfloat16>(s.parameters, s.knots, s.gradients, s.uniform));
    check(Case<float16>(s.parameters, s.knots, s.gradients, s.uniform));
  }
}

}  // namespace

TEST(cpu) {
  for_every_case(
      [](const auto& c) { on_every_cpu([&](int isa) { c.check(cpu::pwl_statistics, "isa ", isa); }); });
  const Case<float> long_one(100003, 5, 2, true);
  on_every_cpu([&](int isa) { long_one.check(cpu::pwl_statistics, "several chunks, isa ", isa); });
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    for (int seed = 0; seed < 4; ++seed) {
      simt::set_seed(seed);
      c.check([](const PwlStatistics& s) { cuda::pwl_statistics(s, nullptr); }, "seed ", seed);
    }
  });
}
