#include "math/loss_network.h"

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "kernels.h"

using namespace lossmeta;

namespace {

using Real = long double;
using Reals = std::vector<Real>;

struct Options {
  bool smooth = true, softplus = false, softmax = true, dense = false;
  int64_t intervals = 0;
  bool sigmoid = false;  // one class: every label is a row
};

// The derivatives are those of J = G . loss + U . slope, by differences along random directions: what is
// differentiated is written down here and nothing else.
struct Reference {
  Options o;
  int64_t samples, classes, width, ignore;
  Reals pred, target, weights;  // W1, W2, w3 one after the other
  std::vector<int64_t> labels;

  Real activation(Real x, bool slope) const {
    if (!o.smooth) return slope ? x > 0 : std::max(x, Real(0));
    const Real b = 10, leak = 0.01,
               soft = x > 0 ? x + std::log1p(std::exp(-b * x)) / b : std::log1p(std::exp(b * x)) / b;
    return slope ? leak + (1 - leak) / (1 + std::exp(-b * x)) : (1 - leak) * soft + leak * x;
  }
  void element(Real y, Real f, Real& value, Real& slope) const {
    const Real *w1 = weights.data(), *w2 = w1 + 2 * width, *w3 = w2 + width * width;
    Reals h(width), t(width);
    for (int64_t k = 0; k < width; ++k) {
      const Real a = w1[2 * k] * y + w1[2 * k + 1] * f;
      h[k] = activation(a, false), t[k] = activation(a, true) * w1[2 * k + 1];
    }
    Real z = 0, s = 0;
    for (int64_t p = 0; p < width; ++p) {
      Real a = 0, b = 0;
      for (int64_t k = 0; k < width; ++k) a += w2[p * width + k] * h[k], b += w2[p * width + k] * t[k];
      z += w3[p] * activation(a, false), s += w3[p] * activation(a, true) * b;
    }
    value = o.softplus ? std::log1p(std::exp(z)) : z;
    slope = o.softplus ? s / (1 + std::exp(-z)) : s;
  }
  void run(Reals& loss, Reals& slope) const {
    loss.assign(samples, 0), slope.assign(samples * classes, 0);
    for (int64_t n = 0; n < samples; ++n) {
      if (!o.dense && labels[n] == ignore) continue;
      Real total = 0, mean = 0;
      for (int64_t j = 0; j < classes; ++j) total += std::exp(pred[n * classes + j]);
      Reals f(classes), g(classes);
      for (int64_t j = 0; j < classes; ++j) {
        const Real x = pred[n * classes + j];
        Real value;
        f[j] = o.softmax ? std::exp(x) / total : o.sigmoid ? 1 / (1 + std::exp(-x)) : x;
        const Real y = o.dense ? target[n * classes + j] : Real(labels[n] == (o.sigmoid ? 1 : j));
        element(y, f[j], value, g[j]);
        if (o.sigmoid) g[j] *= f[j] * (1 - f[j]);
        loss[n] += value / classes, mean += f[j] * g[j];
      }
      for (int64_t j = 0; j < classes; ++j)
        slope[n * classes + j] = (o.softmax ? f[j] * (g[j] - mean) : g[j]) / classes;
    }
  }
  Real objective(const Reals& grad_loss, const Reals& grad_slope) const {
    Reals loss, slope;
    run(loss, slope);
    Real sum = 0;
    for (size_t n = 0; n < loss.size(); ++n) sum += grad_loss[n] * loss[n];
    for (size_t i = 0; i < slope.size(); ++i) sum += grad_slope[i] * slope[i];
    return sum;
  }
};

template <class T>
struct Case {
  using A = accumulate_t<T>;
  Reference r;
  std::vector<T> pred;
  std::vector<A> target, w1, w2, w3, grad_loss, grad_slope;
  Reals real_loss, real_slope;
  std::mt19937 random{7};
  std::normal_distribution<float> normal;
  struct Difference {
    Reals direction;
    Real value;
  };
  std::map<std::pair<int, int64_t>, std::array<Difference, 2>> differences;

  template <class S>
  void fill(std::vector<S>& to, Reals& real, int64_t size, float scale) {
    for (int64_t i = 0; i < size; ++i) {
      S value;
      math::store(&value, A(scale * normal(random)));
      to.push_back(value);
      real.push_back(Real(math::load(&value)));
    }
  }

  Case(int64_t samples, int64_t classes, int64_t width, Options o) {
    r.o = o, r.samples = samples, r.classes = classes, r.width = width, r.ignore = -7;
    fill(pred, r.pred, samples * classes, 2);
    fill(target, r.target, samples * classes, 1);
    for (int64_t n = 0; n < samples; ++n)
      r.labels.push_back(n == 1 ? r.ignore : int64_t(random() % (o.sigmoid ? 2 : classes)));
    fill(w1, r.weights, 2 * width, .5f);
    fill(w2, r.weights, width * width, 1 / std::sqrt(float(width)));
    fill(w3, r.weights, width, 1 / std::sqrt(float(width)));
    fill(grad_loss, real_loss, samples, 1);
    fill(grad_slope, real_slope, samples * classes, 1);
  }

  // Along random directions of the part of x from `begin` on: the difference of J, found once for all instruction sets,
  // against the gradient.
  void check_gradient(int which, Reals& x, int64_t begin, const Reals& gradient, const Reals& u,
                      const Reals& v, double tolerance, const std::string& what) {
    const auto [found, is_new] = differences.try_emplace({which, &x == &r.pred ? -1 : begin});
    if (is_new)
      for (Difference& d : found->second) {
        const Real step = 1e-6L;
        const Reals before = x;
        for (size_t i = 0; i < gradient.size(); ++i) d.direction.push_back(normal(random));
        Real ends[2];
        for (int e = 0; e < 2; ++e) {
          for (size_t i = 0; i < gradient.size(); ++i)
            x[begin + i] = before[begin + i] + (e ? step : -step) * d.direction[i];
          ends[e] = r.objective(u, v);
        }
        x = before;
        d.value = (ends[1] - ends[0]) / (2 * step);
      }
    Real length = 0;
    for (Real g : gradient) length += g * g;
    for (const Difference& d : found->second) {
      Real along = 0;
      for (size_t i = 0; i < gradient.size(); ++i) along += d.direction[i] * gradient[i];
      CHECK_NEAR(double(along), double(d.value),
                 tolerance * double(std::sqrt(length)) + std::max(1e-9, 1e-3 * tolerance), 0, what);
    }
  }

  template <class S>
  static Reals reals(const std::vector<S>& v) {
    Reals result;
    for (const S& x : v) result.push_back(Real(math::load(&x)));
    return result;
  }

  void check(const std::string& name) {
    on_every_cpu([&](int isa) { check_kernels("isa " + std::to_string(isa) + ", " + name); });
  }

  void check_kernels(const std::string& name) {
    const int64_t n = r.samples, c = r.classes, h = r.width, size = n * c;
    const double exact = std::is_same_v<A, double> ? 1e-12 : 2e-5, near = r.o.intervals ? 2e-5 : exact;
    std::vector<A> loss(n, A(-77)), slope(size, A(-77)), table(r.o.intervals ? 10 * r.o.intervals + 1 : 0);
    LossNetwork a{};
    a.dtype = dtype_of<T>, a.smooth = r.o.smooth, a.softplus = r.o.softplus, a.softmax = r.o.softmax;
    a.sigmoid = r.o.sigmoid;
    a.leak = .01, a.smoothness = 10, a.samples = n, a.classes = c, a.width = h, a.intervals = r.o.intervals;
    a.ignore_index = r.ignore, a.pred = pred.data(), a.labels = r.o.dense ? nullptr : r.labels.data();
    a.target = r.o.dense ? target.data() : nullptr;
    a.input_weight = w1.data(), a.hidden_weight = w2.data(), a.output_weight = w3.data();
    a.loss = loss.data(), a.slope = slope.data(), a.table = r.o.intervals ? table.data() : nullptr;
    if (a.table) {
      cpu::loss_network_tabulate(a);
      CHECK(table.back() == A(1), name, ": table refused");
      cpu::loss_network_table_forward(a);
    }
    cpu::loss_network_forward(a);
    Reals expected_loss, expected_slope;
    r.run(expected_loss, expected_slope);
    for (int64_t i = 0; i < n; ++i)
      CHECK_NEAR(loss[i], double(expected_loss[i]), near, near, name, " loss ", i);
    for (int64_t i = 0; i < size; ++i)
      CHECK_NEAR(slope[i], double(expected_slope[i]), near, near, name, " slope ", i);

    // The gradient of pred is rounded to T; through the table it is the curvature of a cubic.
    const double rounded = std::is_same_v<T, bfloat16> ? 8e-3 : std::is_same_v<T, float16> ? 1e-3 : 0;
    for (int which = 1; which < 16; ++which) {
      const bool use_loss = which & 1, use_slope = which & 2, need_pred = which & 4, need_weights = which & 8;
      if ((!use_loss && !use_slope) || (!need_pred && !need_weights)) continue;
      const std::string what = name + " case " + std::to_string(which);
      const Reals zero_loss(n), zero_slope(size), &u = use_loss ? real_loss : zero_loss,
                                                  &v = use_slope ? real_slope : zero_slope;
      std::vector<T> gp(size);
      std::vector<A> g1(2 * h), g2(h * h), g3(h);
      a.grad_loss = use_loss ? grad_loss.data() : nullptr;
      a.grad_slope = use_slope ? grad_slope.data() : nullptr;
      a.grad_pred = need_pred ? gp.data() : nullptr;
      a.grad_input_weight = need_weights ? g1.data() : nullptr;
      a.grad_hidden_weight = need_weights ? g2.data() : nullptr;
      a.grad_output_weight = need_weights ? g3.data() : nullptr;
      if (a.table) cpu::loss_network_table_backward(a);
      cpu::loss_network_backward(a);
      const double tolerance = 10 * std::max(exact, 1e-9);
      if (need_pred)
        check_gradient(which, r.pred, 0, reals(gp), u, v,
                       tolerance + 4 * rounded + (r.o.intervals ? 2e-3 : 0), what + " pred");
      if (need_weights) {
        const double w = tolerance + (r.o.intervals ? 1e-4 : 0);
        check_gradient(which, r.weights, 0, reals(g1), u, v, w, what + " W1");
        check_gradient(which, r.weights, 2 * h, reals(g2), u, v, w, what + " W2");
        check_gradient(which, r.weights, 2 * h + h * h, reals(g3), u, v, w, what + " w3");
      }
      // A refused table leaves everything to the exact kernels, an accepted one nothing.
      if (a.table && which == 15) {
        const std::vector<A> kept = g2;
        cpu::loss_network_backward(a);
        CHECK(g2 == kept, what, ": the exact kernel ran beside the table");
        table.back() = A(0);
        cpu::loss_network_backward(a);
        CHECK(g2 != kept, what, ": no kernel ran");
        const std::vector<A> refused = g2;
        cpu::loss_network_table_backward(a);
        CHECK(g2 == refused, what, ": the table's kernel ran though it is refused");
      }
    }
  }
};

}  // namespace

TEST(cpu) {
  const Options variants[] = {{},
                              {true, true},
                              {false, true},
                              {true, false, false},
                              {true, false, true, true},
                              {true, false, false, true}};
  for (const Options& o : variants) {
    const std::string which = "variant " + std::to_string(&o - variants) + " ";
    Case<float>(3, 5, 7, o).check(which + "float");
    Case<double>(3, 5, 7, o).check(which + "double");
    Case<double>(2, 17, 9, o).check(which + "double");
    Case<float>(1, 1, 1, o).check(which + "one of everything");
  }
  Case<bfloat16>(3, 20, 8, {}).check("bfloat16");
  Case<float16>(3, 20, 8, {}).check("float16");
  for (const Options& o : {Options{}, Options{true, false, false, true}})
    Case<float>(3, 700, 5, o).check("long rows");
  Options tabulated;
  tabulated.intervals = 512;
  Case<double>(9, 13, 7, tabulated).check("table");
  Case<float>(9, 13, 7, tabulated).check("table");
  Case<float>(3, 600, 5, tabulated).check("table, long rows");
  Case<bfloat16>(3, 600, 5, tabulated).check("table, long rows");

  Options labels;
  labels.softmax = false, labels.sigmoid = true;
  for (int bits = 0; bits < 8; ++bits) {
    Options o = labels;
    o.smooth = bits & 1, o.softplus = bits & 2, o.dense = bits & 4;
    const std::string which = "labels, variant " + std::to_string(bits) + " ";
    for (int64_t n : {1, 2, 37}) Case<double>(n, 1, 7, o).check(which + "double");
    Case<float>(37, 1, 7, o).check(which + "float");
  }
  Case<double>(1100, 1, 5, labels).check("labels in several tiles");
  Case<bfloat16>(40, 1, 8, labels).check("labels bfloat16");
  Case<float16>(40, 1, 8, labels).check("labels float16");
  labels.intervals = 512;
  Case<double>(1100, 1, 7, labels).check("labels, table");
  Case<float>(37, 1, 7, labels).check("labels, table");
  Case<float>(1100, 1, 7, labels).check("labels, table");
  Case<bfloat16>(700, 1, 5, labels).check("labels, table, bfloat16");
}
