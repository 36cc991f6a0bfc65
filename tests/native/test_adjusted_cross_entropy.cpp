#include "math/adjusted_cross_entropy.h"

#include <random>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

template <class T>
struct Case {
  using A = accumulate_t<T>;
  using S = slope_t<T>;
  int64_t models, samples, classes;
  bool adjusted;
  std::vector<T> logits = std::vector<T>(models * samples * classes);
  std::vector<int64_t> labels = std::vector<int64_t>(samples);
  std::vector<A> shift = std::vector<A>(models * classes), exponent = std::vector<A>(models),
                 smoothing = exponent, grad = exponent;
  std::vector<double> loss, slope, grad_shift, grad_exponent, grad_smoothing;  // expected

  Case(int64_t models_, int64_t samples_, int64_t classes_, bool adjusted_)
      : models(models_), samples(samples_), classes(classes_), adjusted(adjusted_) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0, 2);
    for (T& x : logits) math::store(&x, A(normal(random)));
    for (int64_t& label : labels) label = random() % 7 ? int64_t(random() % uint64_t(classes)) : -100;
    if (samples > 0) labels[samples / 2] = classes - 1;
    for (A& m : shift) m = A(normal(random));
    for (int64_t b = 0; b < models; ++b) {
      exponent[b] = A(b == 0 ? 0.7 : b == 1 ? 0.0 : b == 2 ? 1e-6 : 1.0);
      smoothing[b] = A(0.1 * double(b % 3 + 1));
      grad[b] = A(0.5 + double(b));
    }
    evaluate();
  }

  double at(int64_t b, int64_t i, int64_t c) const {
    return double(math::load(&logits[(b * samples + i) * classes + c])) +
           (adjusted ? double(shift[b * classes + c]) : 0);
  }

  // Sample by sample in float64, with the derivatives in the exponent and the smoothing as one finds them by hand.
  void evaluate() {
    loss.assign(models, 0);
    slope.assign(logits.size(), 0);
    grad_shift.assign(shift.size(), 0);
    grad_exponent.assign(models, 0);
    grad_smoothing.assign(models, 0);
    double count = 0;
    for (int64_t label : labels) count += label != -100;
    for (int64_t b = 0; b < models; ++b) {
      const double q = adjusted ? double(exponent[b]) : 0, eps = adjusted ? double(smoothing[b]) : 0;
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t y = labels[i];
        if (y == -100) continue;
        double m = -INFINITY, sum = 0, uniform = 0;
        for (int64_t c = 0; c < classes; ++c) m = std::max(m, at(b, i, c));
        for (int64_t c = 0; c < classes; ++c) sum += std::exp(at(b, i, c) - m);
        const auto cost = [&](int64_t c) { return m + std::log(sum) - at(b, i, c); };
        for (int64_t c = 0; c < classes; ++c) uniform += cost(c) / double(classes);
        const double s = cost(y), w = std::exp(-q * s), u = q * s;
        loss[b] += ((q > 0 ? -std::expm1(-u) / q : s) + eps * (uniform - s)) / count;
        grad_exponent[b] += double(grad[b]) / count *
                            (u < 1e-3 ? s * s * (-0.5 + u / 3 - u * u / 8) : ((1 + u) * w - 1) / (q * q));
        grad_smoothing[b] += double(grad[b]) / count * (uniform - s);
        for (int64_t c = 0; c < classes; ++c) {
          const double g = (w * std::exp(-cost(c)) - (c == y ? w - eps : 0) - eps / double(classes)) / count;
          slope[(b * samples + i) * classes + c] = g;
          grad_shift[b * classes + c] += g * double(grad[b]);
        }
      }
      if (count == 0) loss[b] = NAN;
    }
  }

  struct Results {
    std::vector<A> loss, derivatives, grad_shift, grad_exponent, grad_smoothing;
    std::vector<double> slope, grad_logits;
  };

  // The results of both kernels, one element beyond the end included: nothing may be written there.
  template <class Forward, class Backward>
  Results run(const Forward& forward, const Backward& backward, bool with_slope = true) const {
    AdjustedCrossEntropy a{};
    a.dtype = dtype_of<T>;
    a.models = models;
    a.samples = samples;
    a.classes = classes;
    a.ignore_index = -100;
    a.logits = logits.data();
    a.labels = labels.data();
    if (adjusted) a.shift = shift.data(), a.exponent = exponent.data(), a.smoothing = smoothing.data();
    const A untouched(-77);
    Results r{std::vector<A>(models + 1, untouched),
              std::vector<A>(2 * models + 1, untouched),
              std::vector<A>(shift.size() + 1, untouched),
              std::vector<A>(models + 1, untouched),
              std::vector<A>(models + 1, untouched),
              {},
              {}};
    std::vector<S> slopes(logits.size() + 1);
    std::vector<T> gradient(logits.size() + 1);
    for (S& x : slopes) math::store(&x, untouched);
    for (T& x : gradient) math::store(&x, untouched);
    a.loss = r.loss.data();
    a.derivatives = r.derivatives.data();
    a.slope = with_slope ? slopes.data() : nullptr;
    std::vector<char> scratch(adjusted_cross_entropy_scratch(a, false) + 1, char(0x7f));
    a.scratch = scratch.data();
    forward(a);
    CHECK(scratch.back() == 0x7f && r.loss.back() == untouched && r.derivatives.back() == untouched &&
              math::load(&slopes.back()) == untouched,
          "written beyond the end");
    if (!with_slope) return r;
    a.loss = nullptr;
    a.grad = grad.data();
    a.grad_logits = gradient.data();
    a.grad_shift = r.grad_shift.data();
    a.grad_exponent = r.grad_exponent.data();
    a.grad_smoothing = r.grad_smoothing.data();
    scratch.assign(adjusted_cross_entropy_scratch(a, true) + 1, char(0x7f));
    a.scratch = scratch.data();
    backward(a);
    CHECK(scratch.back() == 0x7f && r.grad_shift.back() == untouched && r.grad_exponent.back() == untouched &&
              r.grad_smoothing.back() == untouched && math::load(&gradient.back()) == untouched,
          "written beyond the end");
    for (size_t i = 0; i + 1 < slopes.size(); ++i) {
      r.slope.push_back(double(math::load(&slopes[i])));
      r.grad_logits.push_back(double(math::load(&gradient[i])));
    }
    return r;
  }

  template <class... Where>
  void check(const Results& r, const Where&... where) const {
    const double relative = sizeof(A) == 8 ? 1e-12 : 1e-5, rounded = sizeof(T) == 2 ? 1e-2 : relative,
                 share = 1 / std::max(1.0, double(samples)), absolute = relative * share;
    const auto near = [&](const auto& actual, const std::vector<double>& expected, double most, double part,
                          const char* name) {
      for (size_t i = 0; i < expected.size(); ++i)
        CHECK_NEAR(actual[i], expected[i], most, part, where..., name, ' ', i, " of ", models, 'x', samples,
                   'x', classes);
    };
    near(r.loss, loss, relative, relative, " loss");
    if (r.slope.empty()) return;
    near(r.slope, slope, absolute, std::is_same_v<T, bfloat16> ? rounded : relative, " slope");
    const double smallest = std::is_same_v<T, float16> ? 6e-8 * double(models) : 0;  // half a subnormal
    for (size_t i = 0; i < slope.size(); ++i) {
      const double g = double(grad[i / size_t(samples * classes)]);
      CHECK_NEAR(r.grad_logits[i], slope[i] * g, absolute * g + smallest, rounded, where..., " grad_logits ",
                 i);
    }
    near(r.grad_shift, grad_shift, rounded * double(models), rounded, " grad_shift");
    near(r.grad_exponent, grad_exponent, 4 * relative * double(models), relative, " grad_exponent");
    near(r.grad_smoothing, grad_smoothing, 4 * relative * double(models), relative, " grad_smoothing");
  }
};

struct Sizes {
  int64_t models, samples, classes;
};

template <class Check>
void for_every_case(const Check& check) {
  for (const auto [models, samples, classes] : {Sizes{1, 1, 1},
                                                {1, 5, 2},
                                                {4, 37, 10},
                                                {2, 64, 16},
                                                {2, 33, 17},
                                                {4, 19, 40},
                                                {1, 300, 100},
                                                {1, 4, 1001},
                                                {1, 3, 4104},
                                                {1, 2, 5001}})
    for (bool adjusted : {false, true}) {
      check(Case<float>(models, samples, classes, adjusted));
      check(Case<double>(models, samples, classes, adjusted));
      check(Case<bfloat16>(models, samples, classes, adjusted));
      check(Case<float16>(models, samples, classes, adjusted));
    }
}

void cuda_forward(const AdjustedCrossEntropy& a) { cuda::adjusted_cross_entropy_forward(a, nullptr); }
void cuda_backward(const AdjustedCrossEntropy& a) { cuda::adjusted_cross_entropy_backward(a, nullptr); }

// Of one model, alone.
template <class T>
Case<T> only(const Case<T>& all, int64_t b) {
  Case<T> one(1, all.samples, all.classes, all.adjusted);
  const int64_t size = all.samples * all.classes;
  one.labels = all.labels;
  one.logits.assign(all.logits.begin() + b * size, all.logits.begin() + (b + 1) * size);
  one.shift.assign(all.shift.begin() + b * all.classes, all.shift.begin() + (b + 1) * all.classes);
  one.exponent = {all.exponent[b]};
  one.smoothing = {all.smoothing[b]};
  one.grad = {all.grad[b]};
  one.evaluate();
  return one;
}

template <class T, class Forward, class Backward>
void check_alone(const Case<T>& c, const Forward& forward, const Backward& backward) {
  const auto together = c.run(forward, backward);
  for (int64_t b = 0; b < c.models; ++b) {
    const auto alone = only(c, b).run(forward, backward);
    CHECK(alone.loss[0] == together.loss[b] && alone.grad_exponent[0] == together.grad_exponent[b], b);
    for (size_t i = 0; i < alone.slope.size(); ++i)
      CHECK(alone.slope[i] == together.slope[b * alone.slope.size() + i], b, ' ', i);
  }
}

}  // namespace

TEST(cpu) {
  for_every_case([](const auto& c) {
    on_every_cpu([&](int isa) {
      for (bool with_slope : {false, true})
        c.check(c.run(cpu::adjusted_cross_entropy_forward, cpu::adjusted_cross_entropy_backward, with_slope),
                "isa ", isa);
    });
  });
  const Case<float> few(3, 37, 10, true), many(3, 21, 40, true);
  on_every_cpu([&](int) {
    for (const auto* c : {&few, &many})
      check_alone(*c, cpu::adjusted_cross_entropy_forward, cpu::adjusted_cross_entropy_backward);
  });
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    for (int seed = 0; seed < 3; ++seed) {
      simt::set_seed(unsigned(seed));
      for (bool with_slope : {false, true})
        c.check(c.run(cuda_forward, cuda_backward, with_slope), "seed ", seed);
    }
  });
  const Case<float> few(3, 37, 10, true), many(3, 21, 40, true);
  check_alone(few, cuda_forward, cuda_backward);
  check_alone(many, cuda_forward, cuda_backward);
}

// More than 8192 samples are counted and summed in parts.
TEST(cuda_parts) {
  const Case<float> c(2, 20000, 3, true);
  c.check(c.run(cuda_forward, cuda_backward), "parts");
}

TEST(no_sample_counts) {
  native::set_isa(native::supported_isas().back());
  for (int64_t samples : {0, 5}) {
    Case<float> c(2, samples, 3, true);
    for (int64_t& label : c.labels) label = -100;
    c.evaluate();
    for (const auto& r : {c.run(cpu::adjusted_cross_entropy_forward, cpu::adjusted_cross_entropy_backward),
                          c.run(cuda_forward, cuda_backward)}) {
      for (int b = 0; b < 2; ++b) CHECK(std::isnan(r.loss[b]));
      for (double s : r.slope) CHECK(s == 0);
      for (double g : r.grad_logits) CHECK(g == 0);
      for (const auto* grads : {&r.grad_shift, &r.grad_exponent, &r.grad_smoothing})
        for (size_t i = 0; i + 1 < grads->size(); ++i) CHECK((*grads)[i] == 0);
    }
  }
}

// Looking at labels and parameters would synchronise: a bad one makes the loss NaN.
TEST(cuda_bad_values) {
  for (int64_t label : {int64_t(-1), int64_t(10), int64_t(1) << 40}) {
    Case<float> c(2, 9, 10, true);
    c.labels[3] = label;
    const auto r = c.run(cuda_forward, cuda_backward);
    CHECK(std::isnan(r.loss[0]) && std::isnan(r.loss[1]), label);
    for (int i = 0; i < 10; ++i) CHECK(r.slope[30 + i] == 0 && std::isfinite(r.slope[i]), label);
  }
  for (double bad : {-0.1, 1.5, double(NAN)})
    for (bool exponent : {false, true}) {
      Case<float> c(2, 9, 10, true);
      (exponent ? c.exponent : c.smoothing)[1] = float(bad);
      const auto r = c.run(cuda_forward, cuda_backward);
      CHECK(std::isfinite(r.loss[0]) && std::isnan(r.loss[1]), bad);
    }
}

// The order in which threads happen to run must not show in a single bit.
TEST(cuda_is_deterministic) {
  const Case<float> c(2, 1000, 20, true);
  simt::set_seed(0);
  const auto first = c.run(cuda_forward, cuda_backward);
  for (unsigned seed = 1; seed < 4; ++seed) {
    simt::set_seed(seed);
    const auto again = c.run(cuda_forward, cuda_backward);
    CHECK(again.loss == first.loss && again.slope == first.slope && again.grad_shift == first.grad_shift &&
              again.grad_exponent == first.grad_exponent,
          "seed ", seed);
  }
}
