#include "math/focal_weighting.h"

#include <random>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t count, dims;
  Reduction reduction;
  double offset = 0.75;
  std::vector<T> x = std::vector<T>(count * dims);
  std::vector<int64_t> labels = std::vector<int64_t>(count);
  std::vector<A> phi{A(0.5), A(3)}, grad;
  std::vector<double> loss, grad_embeddings, grad_phi{0, 0};  // expected

  Case(int64_t count_, int64_t dims_, Reduction reduction_)
      : count(count_), dims(dims_), reduction(reduction_) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 1 / std::sqrt(float(dims)));
    for (T& value : x) math::store(&value, A(normal(random)));
    for (int64_t i = 0; i < count; ++i) labels[i] = int64_t(random() % 4) - 2;
    if (count > 3) {  // coincident embeddings, and a label of its own
      for (int64_t k = 0; k < dims; ++k) x[3 * dims + k] = x[dims + k];
      labels[0] = 77;
    }
    const int64_t items = reduction == Reduction::none ? count : 1;
    for (int64_t i = 0; i < items; ++i) grad.push_back(A(0.5 + 0.25 * double(i % 5)));
    evaluate();
  }

  double at(int64_t i, int64_t k) const { return double(math::load(&x[i * dims + k])); }

  // ALA Eq. 10 anchor by anchor in float64, with its derivatives as one finds them by hand.
  void evaluate() {
    loss.assign(grad.size(), 0);
    grad_embeddings.assign(count * dims, 0);
    for (int64_t a = 0; a < count; ++a) {
      const double share = reduction == Reduction::mean ? 1.0 / double(count) : 1.0;
      const int64_t item = reduction == Reduction::none ? a : 0;
      for (int side = 0; side < 2; ++side) {
        const double sign = side ? -1 : 1, f = phi[side];
        std::vector<double> d(count), e(count);
        double sum = 1, slope = 0;
        for (int64_t b = 0; b < count; ++b) {
          if (b == a || (labels[a] == labels[b]) != (side == 0)) continue;
          for (int64_t k = 0; k < dims; ++k) d[b] += (at(a, k) - at(b, k)) * (at(a, k) - at(b, k));
          d[b] = std::sqrt(d[b]);
          e[b] = std::exp(sign * f * (d[b] - offset));
          sum += e[b];
          slope += sign * (d[b] - offset) * e[b];
        }
        loss[item] += share * std::log(sum) / f;
        grad_phi[side] += share * grad[item] * (slope / sum / f - std::log(sum) / (f * f));
        for (int64_t b = 0; b < count; ++b)
          for (int64_t k = 0; k < dims && d[b] > 0; ++k) {
            const double g = share * grad[item] * sign * e[b] / sum * (at(a, k) - at(b, k)) / d[b];
            grad_embeddings[a * dims + k] += g;
            grad_embeddings[b * dims + k] -= g;
          }
      }
    }
  }

  struct Results {
    std::vector<A> loss, grad_phi;
    std::vector<double> grad_embeddings;
  };

  // The results of both kernels, one element beyond the end included: nothing may be written there.
  template <class Forward, class Backward>
  Results run(const Forward& forward, const Backward& backward) const {
    FocalWeighting a{};
    a.dtype = dtype_of<T>;
    a.reduction = reduction;
    a.count = count;
    a.dims = dims;
    a.offset = offset;
    a.embeddings = x.data();
    a.labels = labels.data();
    a.phi = phi.data();
    const A untouched(-77);
    std::vector<A> statistics(count * count + 4 * count + 1, untouched);
    Results r{std::vector<A>(grad.size() + 1, untouched), std::vector<A>(3, untouched), {}};
    std::vector<T> gradient(count * dims + 1);
    math::store(&gradient.back(), untouched);
    a.statistics = statistics.data();
    a.loss = r.loss.data();
    forward(a);
    a.loss = nullptr;
    a.grad = grad.data();
    a.grad_embeddings = gradient.data();
    a.grad_phi = r.grad_phi.data();
    backward(a);
    CHECK(statistics.back() == untouched && r.loss.back() == untouched && r.grad_phi.back() == untouched &&
              math::load(&gradient.back()) == untouched,
          "written beyond the end");
    for (size_t i = 0; i + 1 < gradient.size(); ++i)
      r.grad_embeddings.push_back(double(math::load(&gradient[i])));
    return r;
  }

  void check(const Results& r, const char* backend, int variant) const {
    const double relative = sizeof(A) == 8 ? 1e-12 : 2e-5, gradients = sizeof(T) == 2 ? 5e-3 : relative;
    for (size_t i = 0; i < loss.size(); ++i)
      CHECK_NEAR(r.loss[i], loss[i], relative, relative, backend, variant, " loss ", i, " of ", count, "x",
                 dims);
    for (int i = 0; i < 2; ++i)
      CHECK_NEAR(r.grad_phi[i], grad_phi[i], relative * double(count), relative, backend, variant,
                 " grad_phi ", i, " of ", count, "x", dims);
    for (size_t i = 0; i < grad_embeddings.size(); ++i)
      CHECK_NEAR(r.grad_embeddings[i], grad_embeddings[i], gradients, gradients, backend, variant,
                 " grad_embeddings ", i, " of ", count, "x", dims);
  }
};

template <class Check>
void for_every_case(const Check& check) {
  for (auto [count, dims] : {std::pair{1, 1}, {2, 3}, {5, 3}, {40, 33}, {70, 5}, {37, 130}})
    for (Reduction r : {Reduction::none, Reduction::mean, Reduction::sum}) {
      check(Case<float>(count, dims, r));
      check(Case<double>(count, dims, r));
      if (r != Reduction::mean) continue;
      check(Case<bfloat16>(count, dims, r));
      check(Case<float16>(count, dims, r));
    }
}

void cuda_forward(const FocalWeighting& a) { cuda::focal_weighting_forward(a, nullptr); }
void cuda_backward(const FocalWeighting& a) { cuda::focal_weighting_backward(a, nullptr); }

}  // namespace

TEST(cpu) {
  for_every_case([](const auto& c) {
    on_every_cpu([&](int isa) {
      c.check(c.run(cpu::focal_weighting_forward, cpu::focal_weighting_backward), "isa ", isa);
    });
  });
}

TEST(cuda) {
  for_every_case([](const auto& c) {
    for (int seed = 0; seed < 4; ++seed) {
      simt::set_seed(unsigned(seed));
      c.check(c.run(cuda_forward, cuda_backward), "seed ", seed);
    }
  });
}

// Exponents of thousands: nothing overflows, and the loss is the hardest pair's distance beyond the offset.
TEST(large_exponents) {
  Case<float> c(6, 1, Reduction::none);
  for (int64_t i = 0; i < 6; ++i) c.x[i] = 1000.f * float(i);
  c.labels = {0, 0, 0, 1, 1, 1};
  c.offset = 2500;
  const std::vector<double> expected{0, 500, 1500, 1500, 500, 0};
  native::set_isa(native::supported_isas().back());
  for (const auto& r : {c.run(cpu::focal_weighting_forward, cpu::focal_weighting_backward),
                        c.run(cuda_forward, cuda_backward)}) {
    for (int i = 0; i < 6; ++i) CHECK_NEAR(r.loss[i], expected[i], 1e-3, 1e-6, "anchor ", i);
    for (double g : r.grad_embeddings) CHECK(std::isfinite(g));
    for (int i = 0; i < 2; ++i) CHECK(std::isfinite(r.grad_phi[i]));
  }
}

// Looking at phi would synchronise: bad ones make the loss NaN and leave the gradients 0.
TEST(cuda_bad_phi) {
  for (double bad : {0.0, -1.0, double(NAN), double(INFINITY)})
    for (int side = 0; side < 2; ++side)
      for (Reduction reduction : {Reduction::none, Reduction::mean}) {
        Case<float> c(9, 4, reduction);
        c.phi[side] = float(bad);
        const auto r = c.run(cuda_forward, cuda_backward);
        for (size_t i = 0; i < c.grad.size(); ++i) CHECK(std::isnan(r.loss[i]), bad);
        for (double g : r.grad_embeddings) CHECK(g == 0, bad);
        CHECK(r.grad_phi[0] == 0 && r.grad_phi[1] == 0, bad);
      }
}

// The order in which threads happen to run must not show in a single bit.
TEST(cuda_is_deterministic) {
  const Case<float> c(50, 20, Reduction::none);
  simt::set_seed(0);
  const auto first = c.run(cuda_forward, cuda_backward);
  for (unsigned seed = 1; seed < 4; ++seed) {
    simt::set_seed(seed);
    const auto again = c.run(cuda_forward, cuda_backward);
    CHECK(again.loss == first.loss && again.grad_phi == first.grad_phi &&
              again.grad_embeddings == first.grad_embeddings,
          "seed ", seed);
  }
}
