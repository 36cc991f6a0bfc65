#include "math/parametric_cross_entropy.h"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

struct Shape {
  int64_t models, outer, classes, inner;  // S = outer * inner
};

constexpr int64_t ignored = -100;

template <class T>
struct Case {
  using A = accumulate_t<T>;

  Shape shape;
  bool sigmoid, rows, weighted;  // rows: a row of Phi for each sample, no labels
  Reduction reduction;
  int64_t samples = shape.outer * shape.inner, total = shape.models * samples,
          elements = total * shape.classes;
  int64_t matrix = shape.classes * shape.classes,
          groups = reduction == Reduction::none ? total : shape.models;
  std::vector<T> logits = std::vector<T>(elements);
  std::vector<int64_t> labels = std::vector<int64_t>(total + 1);  // never null, even where there are none
  std::vector<A> phi = std::vector<A>(rows ? elements : shape.models * matrix);
  std::vector<A> weight = std::vector<A>(shape.classes);
  std::vector<A> grad = std::vector<A>(groups);
  std::vector<double> loss = std::vector<double>(groups), grad_logits = std::vector<double>(elements),
                      grad_phi = std::vector<double>(phi.size());
  std::vector<char> bad = std::vector<char>(total);
  int64_t shift = 0;  // so many elements keep logits and their gradient from being aligned

  // `odd` puts in masked classes without correlation, and on request labels that no class has.
  Case(Shape shape_, Reduction reduction_, bool sigmoid_, bool rows_, bool weighted_, bool odd,
       bool bad_labels = false)
      : shape(shape_), sigmoid(sigmoid_), rows(rows_), weighted(weighted_ && !rows_), reduction(reduction_) {
    std::mt19937 random(13);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    std::uniform_int_distribution<int64_t> label(0, shape.classes - 1);
    for (T& x : logits) math::store(&x, A(2 * normal(random)));
    for (A& x : phi) x = A(0.5f * normal(random));
    for (A& x : weight) x = A(uniform(random));
    for (A& x : grad) x = A(normal(random));
    for (int64_t i = 0; i < total; ++i) labels[i] = odd && i % 5 == 3 ? ignored : label(random);
    if (odd && shape.classes > 2)
      for (int64_t i = 0; i < total; ++i)
        if (i % 3 == 1) {
          math::store(&logits[at(i, 1)], A(-INFINITY));
          if (rows) phi[at(i, 1)] = 0;
        }
    if (odd && shape.classes > 2 && !rows)
      for (int64_t k = 0; k < shape.models * shape.classes; ++k) phi[k * shape.classes + 1] = 0;
    if (bad_labels)
      for (int64_t i = 0; i < total; i += 4)
        labels[i] = i % 8 ? shape.classes : -(int64_t(1) << 40), bad[i] = 1;
    expect();
  }

  int64_t at(int64_t i, int64_t c) const {
    return i / shape.inner * shape.classes * shape.inner + c * shape.inner + i % shape.inner;
  }
  int64_t q_at(int64_t i, int64_t c) const {
    return rows ? at(i, c) : i / samples * matrix + labels[i] * shape.classes + c;
  }
  bool used(int64_t i) const { return rows || (labels[i] != ignored && !bad[i]); }

  // ALA Eq. 6 and its derivatives, sample by sample in float64.
  void expect() {
    std::vector<double> sum(shape.models), weights(shape.models);
    grad_logits.assign(elements, 0), grad_phi.assign(phi.size(), 0);
    const auto w = [&](int64_t i) { return !used(i) ? 0. : weighted ? double(weight[labels[i]]) : 1.; };
    for (int64_t i = 0; i < total; ++i) weights[i / samples] += w(i);
    for (int64_t i = 0; i < total; ++i) {
      if (bad[i]) {
        (reduction == Reduction::none ? loss[i] : loss[i / samples]) = NAN;
        sum[i / samples] = NAN;
      }
      if (!used(i)) continue;
      const auto x = [&](int64_t c) { return double(math::load(&logits[at(i, c)])); };
      const auto q = [&](int64_t c) { return double(phi[q_at(i, c)]); };
      double m = -INFINITY, exponentials = 0, z = 0, q_sum = 0;
      for (int64_t c = 0; c < shape.classes; ++c) m = std::max(m, x(c));
      for (int64_t c = 0; c < shape.classes; ++c) exponentials += std::exp(x(c) - m);
      const auto f = [&](int64_t c) { return x(c) - m - std::log(exponentials); };
      for (int64_t c = 0; c < shape.classes; ++c) z += q(c) == 0 ? 0 : q(c) * f(c), q_sum += q(c);
      const double s = 1 / (1 + std::exp(-z)), value = -w(i) * (sigmoid ? s : z);
      if (reduction == Reduction::none) loss[i] = value;
      sum[i / samples] += value;
      const double slope = sigmoid ? s / (1 + std::exp(z)) : 1;
      double g = -w(i) * slope * double(grad[reduction == Reduction::none ? i : i / samples]);
      if (reduction == Reduction::mean) g /= weights[i / samples];
      for (int64_t c = 0; c < shape.classes; ++c) {
        grad_logits[at(i, c)] = g * (q(c) - std::exp(f(c)) * q_sum);
        grad_phi[q_at(i, c)] += q(c) == 0 && std::isinf(f(c)) ? 0 : g * f(c);
      }
    }
    if (reduction != Reduction::none)
      for (int64_t b = 0; b < shape.models; ++b)
        loss[b] = reduction == Reduction::mean ? sum[b] / weights[b] : sum[b];
  }

  std::string name(const char* backend, int variant) const {
    std::ostringstream text;
    text << backend << variant << " B" << shape.models << " N" << shape.outer << " C" << shape.classes << " d"
         << shape.inner << " reduction " << int(reduction) << (sigmoid ? " sigmoid" : "")
         << (rows ? " rows" : "") << (weighted ? " weighted" : "") << " dtype " << int(dtype_of<T>)
         << " shift " << shift;
    return text.str();
  }

  // Everything that the kernels write, with one element beyond each result: nothing may be written there.
  struct Results {
    std::vector<A> statistics, losses, phi_gradient;
    std::vector<T> logit_gradient;  // behind `shift` elements
  };

  template <class Forward, class Backward>
  Results run(const Forward& forward, const Backward& backward, const std::string& name) const {
    Results r{std::vector<A>(4 * total + shape.models + 1, A(-77)), std::vector<A>(groups + 1, A(-77)),
              std::vector<A>(phi.size() + 1, A(-77)), std::vector<T>(shift + elements + 1)};
    for (T& x : r.logit_gradient) math::store(&x, A(-77));
    std::vector<T> shifted(shift + elements + 1);
    std::copy(logits.begin(), logits.end(), shifted.begin() + shift);
    ParametricCrossEntropy a{};
    a.dtype = dtype_of<T>, a.sigmoid = sigmoid, a.reduction = reduction;
    a.models = shape.models, a.samples = samples, a.classes = shape.classes, a.inner = shape.inner;
    a.ignore_index = ignored;
    a.logits = shifted.data() + shift, a.labels = rows ? nullptr : labels.data(), a.phi = phi.data(),
    a.phi_stride = matrix;
    a.weight = weighted ? weight.data() : nullptr;
    a.statistics = r.statistics.data();
    (reduction == Reduction::none ? a.loss : a.reduced) = r.losses.data();
    const auto call = [&](const auto& kernel, bool is_backward) {
      std::vector<unsigned char> scratch(parametric_cross_entropy_scratch(a, is_backward) + 64, 0xff);
      a.scratch = scratch.data();
      kernel(a);
      for (int i = 0; i < 64; ++i) CHECK(scratch[scratch.size() - 64 + i] == 0xff, name, " scratch overrun");
    };
    call(forward, false);
    a.grad = grad.data(), a.grad_logits = r.logit_gradient.data() + shift, a.grad_phi = r.phi_gradient.data();
    call(backward, true);
    return r;
  }

  template <class Forward, class Backward>
  void check(const Forward& forward, const Backward& backward, const char* backend, int variant) const {
    const std::string name = this->name(backend, variant);
    const Results r = run(forward, backward, name);
    const double tolerance = sizeof(A) == 8 ? 1e-12 : 1e-5, half = sizeof(T) == 2 ? 1e-2 : tolerance;
    // Sums over many samples are judged by the size of their terms.
    const double many = std::max(1., std::sqrt(double(samples) / 1000));
    for (int64_t i = 0; i < groups; ++i)
      CHECK_NEAR(r.losses[i], loss[i], tolerance, tolerance, name, " loss ", i);
    for (int64_t i = 0; i < elements; ++i)
      CHECK_NEAR(math::load(&r.logit_gradient[shift + i]), grad_logits[i],
                 half == tolerance ? tolerance : 1e-4, half, name, " dlogits ", i);
    for (size_t i = 0; i < phi.size(); ++i)
      CHECK_NEAR(r.phi_gradient[i], grad_phi[i], 10 * tolerance * many, tolerance, name, " dPhi ", i);
    for (int64_t i = 0; i < shift; ++i)
      CHECK(math::load(&r.logit_gradient[i]) == -77, name, " written before the start");
    CHECK(r.losses.back() == -77 && r.statistics.back() == -77 && r.phi_gradient.back() == -77 &&
              math::load(&r.logit_gradient.back()) == -77,
          name, " written beyond the end");
  }
};

// Few classes; one vector and its neighbours; packed; a block per row; classes strided; several models; many samples of
// a class; several parts; none.
const std::vector<Shape> shapes = {{1, 1, 1, 1},   {1, 9, 2, 1},   {1, 70, 10, 1},  {1, 20, 17, 1},
                                   {1, 9, 64, 1},  {1, 3, 259, 1}, {1, 2, 4100, 1}, {1, 2, 4099, 1},
                                   {1, 5, 3, 7},   {1, 2, 70, 33}, {3, 40, 5, 1},   {2, 6, 40, 1},
                                   {1, 600, 6, 1}, {1, 0, 5, 1}};

template <class Check>
void for_every_case(const Check& check, bool every_type = true, bool bad_labels = false) {
  int k = 0;
  for (const Shape& shape : shapes)
    for (Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum})
      for (bool rows : {false, true}) {
        if ((rows && (shape.models > 1 || bad_labels)) || (shape.outer == 0 && reduction == Reduction::mean))
          continue;
        if (!rows && shape.classes > 1000) continue;  // a Phi of 4100 x 4100 takes too long here
        const bool sigmoid = ++k % 2, odd = k % 3, weighted = k % 5 < 3;
        check(Case<float>(shape, reduction, sigmoid, rows, weighted, odd, bad_labels));
        if (!every_type) continue;
        check(Case<double>(shape, reduction, !sigmoid, rows, !weighted, odd, bad_labels));
        if (shape.classes > 1000) continue;
        check(Case<bfloat16>(shape, reduction, sigmoid, rows, weighted, odd, bad_labels));
        check(Case<float16>(shape, reduction, sigmoid, rows, weighted, odd, bad_labels));
      }
}

const auto cuda_forward = [](const ParametricCrossEntropy& a) {
  cuda::parametric_cross_entropy_forward(a, nullptr);
};
const auto cuda_backward = [](const ParametricCrossEntropy& a) {
  cuda::parametric_cross_entropy_backward(a, nullptr);
};

}  // namespace

TEST(cpu) {
  for_every_case([](const auto& c) {
    on_every_cpu([&](int isa) {
      c.check(cpu::parametric_cross_entropy_forward, cpu::parametric_cross_entropy_backward, "isa ", isa);
    });
  });
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    const int seeds = std::is_same_v<decltype(c), const Case<float>&> ? 4 : 1;
    for (int seed = 0; seed < seeds; ++seed) {
      simt::set_seed(seed);
      c.check(cuda_forward, cuda_backward, "seed ", seed);
    }
  });
}

TEST(cuda_bad_labels) {
  simt::set_seed(4);
  for_every_case([&](const auto& c) { c.check(cuda_forward, cuda_backward, "bad labels ", 0); }, false, true);
}

TEST(cuda_many_losses) {
  simt::set_seed(5);
  for (Reduction reduction : {Reduction::mean, Reduction::sum})
    Case<float>({2, 20000, 2, 1}, reduction, true, false, true, true)
        .check(cuda_forward, cuda_backward, "parts ", 0);
}

// Labels: one class has nine samples of ten; every class is empty but one.
template <class T, class Check>
void for_skewed_labels(Shape shape, const Check& check) {
  Case<T> c(shape, Reduction::mean, true, false, true, false);
  for (int64_t i = 0; i < c.total; ++i) c.labels[i] = i % 10 ? 1 : c.labels[i];
  c.expect();
  check(c);
  for (int64_t i = 0; i < c.total; ++i) c.labels[i] = shape.classes - 1;
  c.expect();
  check(c);
}

// More parts than one of the gradient of Phi and of the losses, so that the last block adds up what the others left.
TEST(cuda_in_several_parts) {
  for (const Shape& shape : {Shape{1, 1500, 6, 1}, Shape{2, 600, 10, 1}, Shape{1, 300, 5, 3}}) {
    CHECK(parametric_cross_entropy_phi_parts(shape.models, shape.outer * shape.inner, shape.classes) > 1);
    for (int seed = 0; seed < 3; ++seed) {
      simt::set_seed(seed);
      const auto check = [&](const auto& c) { c.check(cuda_forward, cuda_backward, "parts ", seed); };
      for_skewed_labels<float>(shape, check);
      for_skewed_labels<double>(shape, check);
      for_skewed_labels<bfloat16>(shape, check);
      for_skewed_labels<float16>(shape, check);
    }
  }
  CHECK(parametric_cross_entropy_loss_parts(20000) > 1);
}

TEST(misaligned_logits) {
  for (const Shape& shape :
       {Shape{1, 9, 64, 1}, Shape{1, 3, 259, 1}, Shape{1, 2, 4100, 1}, Shape{1, 9, 10, 1}})
    for (bool rows : {false, true}) {
      if (!rows && shape.classes > 1000) continue;
      const auto check = [&](auto c) {
        c.shift = 1;
        c.check(cuda_forward, cuda_backward, "shift ", 1);
        for (Isa isa : native::supported_isas()) {
          native::set_isa(isa);
          c.check(cpu::parametric_cross_entropy_forward, cpu::parametric_cross_entropy_backward, "isa ",
                  int(isa));
        }
      };
      check(Case<float>(shape, Reduction::mean, true, rows, true, true));
      check(Case<double>(shape, Reduction::mean, true, rows, true, true));
      check(Case<bfloat16>(shape, Reduction::mean, true, rows, true, true));
      check(Case<float16>(shape, Reduction::mean, true, rows, true, true));
    }
}

// The order of threads and blocks shows in no bit.
TEST(cuda_is_deterministic) {
  const auto same = [](const auto& a, const auto& b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0]));
  };
  for (const Shape& shape : {Shape{1, 1500, 6, 1}, Shape{2, 9000, 3, 1}}) {
    const Case<float> c(shape, Reduction::mean, true, false, true, false);
    simt::set_seed(0);
    const auto first = c.run(cuda_forward, cuda_backward, "");
    for (int seed = 1; seed < 4; ++seed) {
      simt::set_seed(seed);
      const auto again = c.run(cuda_forward, cuda_backward, "");
      CHECK(same(first.losses, again.losses) && same(first.statistics, again.statistics) &&
                same(first.phi_gradient, again.phi_gradient) &&
                same(first.logit_gradient, again.logit_gradient),
            "seed ", seed);
    }
  }
}

// Where the sigmoid is nearly 1 its slope is small but not lost.
TEST(slopes_keep_their_digits) {
  const auto check = [](auto c, const auto& forward, const auto& backward, const char* backend, int variant) {
    for (auto& q : c.phi) q = -std::abs(q) - 1;  // z = sum q log f is large and positive
    c.expect();
    const auto r = c.run(forward, backward, backend);
    for (int64_t i = 0; i < c.elements; ++i)
      CHECK_NEAR(math::load(&r.logit_gradient[i]), c.grad_logits[i], 1e-30, 1e-3, backend, variant, " ", i);
    for (size_t i = 0; i < c.phi.size(); ++i)
      CHECK_NEAR(r.phi_gradient[i], c.grad_phi[i], 1e-30, 1e-3, backend, variant, " phi ", i);
  };
  for (const Shape& shape : {Shape{1, 7, 10, 1}, Shape{1, 5, 17, 1}, Shape{1, 3, 11, 4}}) {
    const Case<float> c(shape, Reduction::sum, true, false, false, false);
    check(c, cuda_forward, cuda_backward, "cuda ", 0);
    for (Isa isa : native::supported_isas()) {
      native::set_isa(isa);
      check(c, cpu::parametric_cross_entropy_forward, cpu::parametric_cross_entropy_backward, "isa ",
            int(isa));
    }
  }
}

// No room for parts that are never written.
TEST(scratch_holds_what_is_used) {
  ParametricCrossEntropy a{};
  a.dtype = DType::float32, a.models = 1, a.samples = 8192, a.classes = 32000, a.inner = 1;
  CHECK(parametric_cross_entropy_scratch(a, true) == 32000 * 4 + 8192 * 6);
  a.samples = 600, a.classes = 6;
  CHECK(parametric_cross_entropy_scratch(a, true) == 3 * 36 * 4 + 6 * 4 + 600 * 6);
  CHECK(parametric_cross_entropy_scratch(a, false) == 2 * 4 + 4);
  a.dtype = DType::float64;
  CHECK(parametric_cross_entropy_scratch(a, true) == 3 * 36 * 8 + 6 * 4 + 600 * 6);
}

TEST(cuda_calls_that_fail) {
  ParametricCrossEntropy a{};
  a.models = 1, a.classes = 2, a.inner = 1;
  std::vector<float> statistics(1), reduced(1);
  std::vector<unsigned char> scratch(parametric_cross_entropy_scratch(a, false));
  a.reduction = Reduction::sum, a.statistics = statistics.data(), a.reduced = reduced.data();
  a.scratch = scratch.data();
  simt::broken = cudaErrorInvalidValue;
  std::string message;
  try {
    cuda_forward(a);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  simt::broken = cudaSuccess;
  CHECK(message == "cudaMemsetAsync fails", message);
}
