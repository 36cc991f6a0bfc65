#include "math/pwl_penalty.h"

#include <limits>
#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

enum class Knots { uniform, logarithmic, positive, clustered, equal };

// r and its slope by walking from 0 to x over all knots in between, in float64.
struct Walk {
  double value, slope;
};
template <class A>
Walk walk(const std::vector<A>& knots, const std::vector<A>& slopes, double x) {
  if (std::isnan(x)) return {x, x};
  double value = 0, at = 0;
  const size_t count = knots.size();
  if (x >= 0) {
    size_t i = 0;
    while (i < count && knots[i] < 0) ++i;
    for (; i < count && knots[i] < x; ++i) value += slopes[i] * (knots[i] - at), at = knots[i];
    if (slopes[i] != 0) value += slopes[i] * (x - at);
  } else {
    size_t i = count;
    while (i > 0 && knots[i - 1] > 0) --i;
    for (; i > 0 && knots[i - 1] > x; --i) value += slopes[i] * (knots[i - 1] - at), at = knots[i - 1];
    if (slopes[i] != 0) value += slopes[i] * (x - at);
  }
  size_t below = 0, up_to = 0;
  for (size_t k = 0; k < count; ++k) below += knots[k] < x, up_to += knots[k] <= x;
  return {value, 0.5 * slopes[below] + 0.5 * slopes[up_to]};
}

template <class T>
struct Case {
  using A = accumulate_t<T>;
  using S = slope_t<T>;
  static constexpr double rounding = std::numeric_limits<A>::epsilon();
  int64_t parameters;
  std::vector<T> theta, gradient;
  std::vector<A> knots, slopes;
  double value = 0, scale = 0;
  std::vector<double> slope;

  Case(int64_t parameters_, int64_t count, Knots kind, bool finite = true)
      : parameters(parameters_), theta(parameters), gradient(parameters), knots(count), slopes(count + 1) {
    std::mt19937 random(17);
    std::normal_distribution<float> normal;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t j = k - count / 2;
      knots[k] = kind == Knots::uniform ? A(j) / 8
                 : kind == Knots::logarithmic
                     ? (j < 0 ? -1 : j > 0) * std::ldexp(A(1), int(std::abs(j)) - int(count / 2))
                 : kind == Knots::positive ? A(k + 1) / 4
                 : kind == Knots::equal    ? A(j / 3) / 4
                                           : A(0.5) + A(k) * 4 * std::numeric_limits<A>::epsilon();
    }
    for (A& s : slopes) s = A(normal(random));
    slopes.front() = slopes.back() = 0;
    for (int64_t p = 0; p < parameters; ++p) {
      const bool on_knot = p % 3 == 1 && count > 0;
      math::store(&theta[p], on_knot ? knots[random() % count] : p % 7 == 5 ? A(0) : A(normal(random)));
      math::store(&gradient[p], A(normal(random)));
    }
    if (!finite) {
      math::store(&theta[parameters / 2], A(INFINITY));
      math::store(&theta[parameters - 1], A(-INFINITY));
    }
    for (const T& weight : theta) {
      const Walk w = walk(knots, slopes, double(math::load(&weight)));
      value += w.value, scale += std::abs(w.value) + rounding;
      slope.push_back(w.slope);
    }
  }

  PwlPenalty problem(std::vector<A>& result, std::vector<char>& scratch) const {
    PwlPenalty a{};
    a.dtype = dtype_of<T>;
    a.parameters = parameters, a.knots_count = int32_t(knots.size());
    a.theta = theta.data(), a.knots = knots.data(), a.slopes = slopes.data(), a.value = result.data();
    scratch.assign(pwl_penalty_scratch(a) + 64, char(-1));
    a.scratch = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 15);
    return a;
  }

  // `offset` elements before the slope and the gradient: other alignments.
  template <class Forward, class Backward>
  void check(const Forward& forward, const Backward& backward, const char* backend, int variant,
             int offset = 0) const {
    std::vector<A> result(2, A(-77));
    std::vector<char> scratch;
    PwlPenalty a = problem(result, scratch);
    const auto compare_value = [&](const char* form) {
      CHECK_NEAR(result[0], value, 4 * rounding * scale, 0, backend, variant, " P=", parameters,
                 " X=", knots.size(), " value ", form);
      CHECK(result[1] == A(-77), backend, variant, ": written beyond the value");
      CHECK(scratch[scratch.size() - 1] == char(-1), backend, variant, ": scratch written beyond the end");
      result[0] = A(-77);
    };
    forward(a);
    compare_value("alone");
    std::vector<S> s(parameters + offset + 1);
    for (S& x : s) math::store(&x, -77.f);
    a.slope = s.data() + offset;
    forward(a);
    compare_value("with the slope");
    const double stored = sizeof(S) == 2 ? 1.0 / 256 : rounding;
    for (int64_t p = 0; p < parameters; ++p)
      CHECK_NEAR(math::load(&s[offset + p]), slope[p], 0, stored, backend, variant, " P=", parameters,
                 " X=", knots.size(), " slope ", p, " at ", math::load(&theta[p]));
    CHECK(math::load(&s.back()) == -77, backend, variant, ": written beyond the slope");

    std::vector<T> g(gradient);
    g.insert(g.begin(), offset, g.empty() ? T() : g[0]);
    g.push_back(T());
    math::store(&g.back(), -77.f);
    const double half = sizeof(T) == 2 ? 1.0 / 256 : rounding;
    PwlPenalty b = a;
    const A factor = A(-2.5);
    b.grad = &factor, b.gradient = g.data() + offset;
    backward(b);
    for (int64_t p = 0; p < parameters; ++p)
      CHECK_NEAR(math::load(&g[offset + p]), -2.5 * slope[p], 0, 2 * half, backend, variant, " backward ", p);
    for (int64_t p = 0; p < parameters; ++p) g[offset + p] = gradient[p];
    a.slope = nullptr, a.gradient = g.data() + offset;
    forward(a);
    compare_value("added");
    for (int64_t p = 0; p < parameters; ++p)
      CHECK_NEAR(math::load(&g[offset + p]), double(math::load(&gradient[p])) + slope[p], half, half, backend,
                 variant, " P=", parameters, " X=", knots.size(), " added ", p);
    CHECK(math::load(&g.back()) == -77, backend, variant, ": written beyond the gradient");
  }
};

template <class Check>
void for_every_case(const Check& check) {
  struct {
    int64_t parameters, knots;
    Knots kind;
  } sizes[] = {{1, 0, Knots::uniform},       {7, 1, Knots::uniform},      {40, 2, Knots::uniform},
               {300, 3, Knots::logarithmic}, {521, 25, Knots::uniform},   {521, 40, Knots::logarithmic},
               {259, 9, Knots::positive},    {130, 20, Knots::clustered}, {270, 30, Knots::equal},
               {0, 3, Knots::uniform},       {0, 0, Knots::uniform},      {1500, 200, Knots::uniform},
               {33, 1025, Knots::uniform}};
  for (const auto& s : sizes) {
    check(Case<float>(s.parameters, s.knots, s.kind));
    check(Case<double>(s.parameters, s.knots, s.kind));
    check(Case<bfloat16>(s.parameters, s.knots, s.kind));
    check(Case<float16>(s.parameters, s.knots, s.kind));
  }
  // The outermost slopes are 0: what is infinite costs what the outermost knots cost.
  check(Case<float>(300, 9, Knots::uniform, false));
  check(Case<double>(300, 20, Knots::clustered, false));
}

}  // namespace

TEST(cpu) {
  const auto check = [](const auto& c) {
    on_every_cpu([&](int isa) { c.check(cpu::pwl_penalty_forward, cpu::pwl_penalty_backward, "isa ", isa); });
  };
  for_every_case(check);
  for (Knots kind : {Knots::uniform, Knots::logarithmic})
    check(Case<float>(100003, 25, kind));  // several chunks
}

TEST(nan) {
  for (Isa isa : native::supported_isas()) {
    native::set_isa(isa);
    Case<float> c(300, 9, Knots::uniform);
    c.theta[123] = NAN;
    c.value = c.slope[123] = NAN;
    c.check(cpu::pwl_penalty_forward, cpu::pwl_penalty_backward, "isa ", int(isa));
    c.check([](const PwlPenalty& a) { cuda::pwl_penalty_forward(a, nullptr); },
            [](const PwlPenalty& a) { cuda::pwl_penalty_backward(a, nullptr); }, "cuda ", 0);
  }
}

TEST(cuda) {
  const auto check = [](const auto& c) {
    for (int seed = 0; seed < 3; ++seed) {
      simt::set_seed(seed);
      for (int offset : {0, 1})
        c.check([](const PwlPenalty& a) { cuda::pwl_penalty_forward(a, nullptr); },
                [](const PwlPenalty& a) { cuda::pwl_penalty_backward(a, nullptr); }, "seed ", seed, offset);
    }
  };
  for_every_case(check);
  check(Case<float>(5003, 40, Knots::logarithmic));  // several blocks
}

// Of unsorted or NaN knots nothing may be expected but that no memory beyond the arguments is touched, which
// the sanitizers see.
TEST(cuda_garbage) {
  Case<float> c(300, 50, Knots::uniform);
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    for (float& k : c.knots) k = random() % 9 ? float(random() % 1000) - 500 : random() % 2 ? NAN : -INFINITY;
    std::vector<float> result(2, -77.f);
    std::vector<char> scratch;
    cuda::pwl_penalty_forward(c.problem(result, scratch), nullptr);
    CHECK(result[1] == -77, "written beyond the value");
    CHECK(scratch.back() == char(-1), "scratch written beyond the end");
  }
}
