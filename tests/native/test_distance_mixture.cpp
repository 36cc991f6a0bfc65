#include "math/distance_mixture.h"

#include <random>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

struct Expected {
  std::vector<double> loss, terms, grad_embeddings, grad_phi;
};

constexpr double min_distance = 0.05;

// ALA Eq. 9 triplet by triplet in float64, with its derivatives as one finds them by hand.
struct Formula {
  double value[10], slope[10];

  Formula(double near, double far) {
    const double e2 = std::exp(0.6 * near * near), e1 = std::exp(0.6 * near), c = std::max(far, min_distance);
    const double v[10] = {
        near * near, std::pow(near, 2.5), std::pow(near, 1.5), (e2 - 1) / 2,    (e1 - 1) / 2, 0.5 / c,
        0.2 / c,     0.1 / (c * c),       -std::log(c),        -2 * std::log(c)};
    const double s[10] = {2 * near,
                          2.5 * std::pow(near, 1.5),
                          1.5 * std::sqrt(near),
                          0.6 * near * e2,
                          0.3 * e1,
                          -0.5 / (c * c),
                          -0.2 / (c * c),
                          -0.2 / (c * c * c),
                          -1 / c,
                          -2 / c};
    for (int i = 0; i < 10; ++i) {
      value[i] = v[i];
      slope[i] = (i < 5 ? near == 0 : far < min_distance) ? 0 : s[i];
    }
  }
};

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t count, dims;
  Reduction reduction;
  bool by_label;
  std::vector<T> x = std::vector<T>(count * dims);
  std::vector<int64_t> labels = std::vector<int64_t>(count), triplets;  // of the call
  std::vector<int64_t> all;                                             // what is meant
  std::vector<A> phi{A(1), A(0.5), A(0), A(0.25), A(1), A(0.75), A(0.5), A(0), A(1), A(0.25)};
  std::vector<A> grad_loss, grad_terms = std::vector<A>(10);
  Expected expected;

  Case(int64_t count_, int64_t dims_, int64_t number, Reduction reduction_, bool by_label_)
      : count(count_), dims(dims_), reduction(reduction_), by_label(by_label_) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal(0, 1 / std::sqrt(float(std::max<int64_t>(dims, 1))));
    for (T& value : x) math::store(&value, A(normal(random)));
    // Coincident embeddings, and a pair below min_distance.
    for (int64_t k = 0; count > 4 && k < dims; ++k) {
      x[3 * dims + k] = x[4 * dims + k] = x[dims + k];
      if (k == 0) math::store(&x[4 * dims], math::load(&x[dims]) + A(0.02));
    }
    for (int64_t i = 0; i < count; ++i) labels[i] = int64_t(random() % 4) - 2;
    if (count > 4) labels[3] = labels[1], labels[4] = labels[1] + 1;
    if (by_label) {
      for (int64_t a = 0; a < count; ++a)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t n = 0; n < count; ++n)
            if (a != p && labels[a] == labels[p] && labels[a] != labels[n]) all.insert(all.end(), {a, p, n});
    } else {
      for (int64_t t = 0; t < 3 * number; ++t) triplets.push_back(int64_t(random() % count));
      all = triplets;
    }
    const int64_t items = reduction != Reduction::none ? 1 : by_label ? count : number;
    for (int64_t i = 0; i < items; ++i) grad_loss.push_back(A(0.5 + 0.25 * double(i % 5)));
    for (int i = 0; i < 10; ++i) grad_terms[i] = A(0.5 - 0.125 * i);
    evaluate();
  }

  double at(int64_t i, int64_t k) const { return double(math::load(&x[i * dims + k])); }
  double distance(int64_t a, int64_t b) const {
    double sum = 0;
    for (int64_t k = 0; k < dims; ++k) sum += (at(a, k) - at(b, k)) * (at(a, k) - at(b, k));
    return std::sqrt(sum);
  }

  void evaluate() {
    const int64_t number = int64_t(all.size()) / 3;
    expected.loss.assign(grad_loss.size(), 0);
    expected.terms.assign(10, 0);
    expected.grad_phi.assign(10, 0);
    expected.grad_embeddings.assign(count * dims, 0);
    for (int64_t t = 0; t < number; ++t) {
      const int64_t *triplet = &all[3 * t], a = triplet[0];
      const double d[2] = {distance(a, triplet[1]), distance(a, triplet[2])};
      const Formula f(d[0], d[1]);
      const int64_t item = reduction != Reduction::none ? 0 : by_label ? a : t;
      const double share = reduction == Reduction::mean ? 1.0 / double(number) : 1.0;
      double slope[2] = {0, 0};
      for (int i = 0; i < 10; ++i) {
        expected.loss[item] += share * phi[i] * f.value[i];
        expected.terms[i] += f.value[i] / double(number);
        expected.grad_phi[i] += share * grad_loss[item] * f.value[i];
        slope[i / 5] += (share * grad_loss[item] * phi[i] + grad_terms[i] / double(number)) * f.slope[i];
      }
      for (int side = 0; side < 2; ++side) {
        if (d[side] == 0) continue;
        for (int64_t k = 0; k < dims; ++k) {
          const double g = slope[side] * (at(a, k) - at(triplet[1 + side], k)) / d[side];
          expected.grad_embeddings[a * dims + k] += g;
          expected.grad_embeddings[triplet[1 + side] * dims + k] -= g;
        }
      }
    }
  }

  // The results of both kernels, one element beyond the end included: nothing may be written there.
  template <class Forward, class Backward>
  std::vector<std::vector<double>> run(const Forward& forward, const Backward& backward) const {
    DistanceMixture a{};
    a.dtype = dtype_of<T>;
    a.reduction = reduction;
    a.count = count;
    a.dims = dims;
    a.triplet_count = int64_t(triplets.size()) / 3;
    a.min_distance = min_distance;
    a.embeddings = x.data();
    a.triplets = by_label ? nullptr : triplets.data();
    a.labels = by_label ? labels.data() : nullptr;
    a.phi = phi.data();
    const A untouched(-77);
    std::vector<A> statistics((by_label ? count * count + 2 * count + 1 : 2 * a.triplet_count) + 1,
                              untouched);
    std::vector<A> loss(grad_loss.size() + 1, untouched), terms(11, untouched), grad_phi(11, untouched);
    std::vector<A> workspace(distance_mixture_workspace(a) + 1, untouched);
    std::vector<T> grad(count * dims + 1);
    math::store(&grad.back(), untouched);
    a.statistics = statistics.data();
    a.loss = loss.data();
    a.terms = terms.data();
    a.workspace = workspace.data();
    forward(a);
    std::fill(workspace.begin(), workspace.end() - 1, A(NAN));
    a.loss = a.terms = nullptr;
    a.grad_loss = grad_loss.data();
    a.grad_terms = grad_terms.data();
    a.grad_embeddings = grad.data();
    a.grad_phi = grad_phi.data();
    backward(a);
    for (const std::vector<A>* v : {&statistics, &loss, &terms, &grad_phi, &workspace})
      CHECK(v->back() == untouched, "written beyond the end");
    CHECK(math::load(&grad.back()) == untouched, "written beyond the end");
    std::vector<std::vector<double>> results;
    for (const std::vector<A>* v : {&loss, &terms, &grad_phi}) results.emplace_back(v->begin(), v->end() - 1);
    results.emplace_back();
    for (size_t i = 0; i + 1 < grad.size(); ++i) results.back().push_back(double(math::load(&grad[i])));
    return results;
  }

  void check(const std::vector<std::vector<double>>& results, const char* backend, int variant) const {
    const std::vector<double>* wanted[] = {&expected.loss, &expected.terms, &expected.grad_phi,
                                           &expected.grad_embeddings};
    const char* names[] = {"loss", "terms", "grad_phi", "grad_embeddings"};
    for (int r = 0; r < 4; ++r) {
      double largest = 0;
      for (double e : *wanted[r]) largest = std::max(largest, std::abs(e));
      // Half gradients are rounded once.
      const double relative = sizeof(A) == 8 ? 1e-12 : r == 3 && sizeof(T) == 2 ? 5e-3 : 1e-4;
      for (size_t i = 0; i < wanted[r]->size(); ++i)
        CHECK_NEAR(results[r][i], (*wanted[r])[i], relative * 0.1 * largest, relative, backend, variant, " ",
                   names[r], " ", i, " of M=", count, " D=", dims, " T=", triplets.size() / 3, " reduction ",
                   int(reduction));
    }
  }
};

template <class Check>
void for_every_case(const Check& check) {
  struct Size {
    int64_t count, dims, number;
  };
  for (Size s :
       {Size{1, 1, 1}, {5, 0, 7}, {5, 3, 7}, {9, 40, 300}, {70, 5, 130}, {37, 130, 260}, {40, 33, 9}})
    for (bool by_label : {false, true})
      for (Reduction r : {Reduction::none, Reduction::mean, Reduction::sum}) {
        check(Case<float>(s.count, s.dims, s.number, r, by_label));
        check(Case<double>(s.count, s.dims, s.number, r, by_label));
        if (r != Reduction::mean) continue;
        check(Case<bfloat16>(s.count, s.dims, s.number, r, by_label));
        check(Case<float16>(s.count, s.dims, s.number, r, by_label));
      }
}

void cuda_forward(const DistanceMixture& a) { cuda::distance_mixture_forward(a, nullptr); }
void cuda_backward(const DistanceMixture& a) { cuda::distance_mixture_backward(a, nullptr); }

}  // namespace

TEST(cpu) {
  for_every_case([](const auto& c) {
    on_every_cpu([&](int isa) {
      c.check(c.run(cpu::distance_mixture_forward, cpu::distance_mixture_backward), "isa ", isa);
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

// The order in which threads happen to run must not show in a single bit.
TEST(cuda_is_deterministic) {
  const Case<float> c(50, 20, 400, Reduction::none, false);
  simt::set_seed(0);
  const auto first = c.run(cuda_forward, cuda_backward);
  for (unsigned seed = 1; seed < 4; ++seed) {
    simt::set_seed(seed);
    CHECK(c.run(cuda_forward, cuda_backward) == first, "seed ", seed);
  }
}

// A triplet with a bad index: loss NaN; for the gradients, as a triplet whose loss has gradient 0.
TEST(cuda_keeps_a_bad_triplet_apart) {
  Case<float> good(20, 6, 200, Reduction::none, false);
  good.grad_terms.assign(10, 0.f);
  Case<float> bad = good;
  const int64_t indices[] = {-1, 20, int64_t(1) << 40};
  for (int i = 0; i < 3; ++i) {
    bad.triplets[3 * (40 + i) + i] = indices[i];
    good.grad_loss[40 + i] = 0;
  }
  const auto expected = good.run(cuda_forward, cuda_backward), actual = bad.run(cuda_forward, cuda_backward);
  for (int64_t t = 0; t < 200; ++t) {
    if (t >= 40 && t < 43)
      CHECK(std::isnan(actual[0][t]), "triplet ", t);
    else
      CHECK(actual[0][t] == expected[0][t], "triplet ", t);
  }
  CHECK(actual[2] == expected[2]);
  CHECK(actual[3] == expected[3]);
}
