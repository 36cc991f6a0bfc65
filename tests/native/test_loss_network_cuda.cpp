#include "math/loss_network.h"

#include <array>
#include <random>
#include <vector>

#include "kernels.h"
#include "simt.h"

using namespace lossmeta;

namespace {

using Doubles = std::vector<double>;

struct Options {
  bool smooth = true, softplus = false, softmax = true, dense = false;
  double scale = 1;      // of the weights
  bool sigmoid = false;  // one class: every label is a row
};

// What the reference does for each element of W2: a row of it by two vectors, and the same backward. These loops take most
// of the time, and what is watched is the kernels: they are not sanitized.
#define NOT_SANITIZED __attribute__((no_sanitize("address", "undefined")))
NOT_SANITIZED void row_products(int64_t h, const double* row, const double* x, const double* y, double& row_x,
                                double& row_y) {
  for (int64_t k = 0; k < h; ++k) row_x += row[k] * x[k], row_y += row[k] * y[k];
}
NOT_SANITIZED void row_pullback(int64_t h, const double* row, const double* x, const double* y, double u,
                                double v, double* grad_row, double* grad_x, double* grad_y) {
  for (int64_t k = 0; k < h; ++k) {
    grad_row[k] += u * x[k] + v * y[k];
    grad_x[k] += row[k] * u, grad_y[k] += row[k] * v;
  }
}

// The operator in float64, one element after the other.
struct Reference {
  Options o;
  double leak, smoothness;
  int64_t width;
  Doubles w1, w2, w3;
  Doubles grad1 = Doubles(2 * width), grad2 = Doubles(width * width), grad3 = Doubles(width);

  // The k-th derivative of the hidden activation and of the output.
  double hidden(double x, int k) const {
    if (!o.smooth) return k == 0 ? (x > 0 ? x : x == x ? 0 : x) : k == 1 ? x > 0 : 0;
    const double b = smoothness, s = 1 / (1 + std::exp(-b * x));
    const double soft = x > 0 ? x + std::log1p(std::exp(-b * x)) / b : std::log1p(std::exp(b * x)) / b;
    return k == 0   ? (1 - leak) * soft + leak * x
           : k == 1 ? leak + (1 - leak) * s
                    : (1 - leak) * b * s * (1 - s);
  }
  double output(double z, int k) const {
    if (!o.softplus) return k == 0 ? z : k == 1;
    const double s = 1 / (1 + std::exp(-z));
    return k == 0 ? std::max(z, 0.) + std::log1p(std::exp(-std::abs(z))) : k == 1 ? s : s * (1 - s);
  }

  // l and l'. With `backward` the adjoint of u l + v l', line by line: returns dJ/df.
  double element(double y, double f, double& l, double& slope, bool backward = false, double u = 0,
                 double v = 0) {
    const int64_t h = width;
    Doubles a1(h), h1(h), t1(h), a2(h), h2(h), b2(h), t2(h);
    double z = 0, s = 0;
    for (int64_t k = 0; k < h; ++k) {
      a1[k] = w1[2 * k] * y + w1[2 * k + 1] * f;
      h1[k] = hidden(a1[k], 0), t1[k] = hidden(a1[k], 1) * w1[2 * k + 1];
    }
    for (int64_t p = 0; p < h; ++p) {
      row_products(h, &w2[p * h], h1.data(), t1.data(), a2[p], b2[p]);
      h2[p] = hidden(a2[p], 0), t2[p] = hidden(a2[p], 1) * b2[p];
      z += w3[p] * h2[p], s += w3[p] * t2[p];
    }
    l = output(z, 0), slope = output(z, 1) * s;
    if (!backward) return 0;
    const double dz = u * output(z, 1) + v * output(z, 2) * s, ds = v * output(z, 1);
    Doubles dh1(h), dt1(h);
    for (int64_t p = 0; p < h; ++p) {
      grad3[p] += dz * h2[p] + ds * t2[p];
      const double dt2 = ds * w3[p], db2 = dt2 * hidden(a2[p], 1);
      const double da2 = dz * w3[p] * hidden(a2[p], 1) + dt2 * b2[p] * hidden(a2[p], 2);
      row_pullback(h, &w2[p * h], h1.data(), t1.data(), da2, db2, &grad2[p * h], dh1.data(), dt1.data());
    }
    double df = 0;
    for (int64_t k = 0; k < h; ++k) {
      const double da1 = dh1[k] * hidden(a1[k], 1) + dt1[k] * w1[2 * k + 1] * hidden(a1[k], 2);
      grad1[2 * k] += da1 * y;
      grad1[2 * k + 1] += da1 * f + dt1[k] * hidden(a1[k], 1);
      df += da1 * w1[2 * k + 1];
    }
    return df;
  }

  // The same of a label.
  double label(double x, double y, Doubles& slope, double big_g, const Doubles* big_u, Doubles* grad) {
    const double f = 1 / (1 + std::exp(-x)), d = f * (1 - f);
    double loss, s;
    element(y, f, loss, s);
    slope = {s * d};
    if (!grad) return loss;
    const double u = (*big_u)[0];
    *grad = {d * (element(y, f, loss, s, true, big_g, u * d) + s * u * (1 - 2 * f))};
    return loss;
  }

  // A row's loss and slope; the gradient of G loss + U . slope.
  double row(const Doubles& x, const Doubles& y, Doubles& slope, double big_g = 0,
             const Doubles* big_u = nullptr, Doubles* grad = nullptr) {
    if (o.sigmoid) return label(x[0], y[0], slope, big_g, big_u, grad);
    const size_t c = x.size();
    Doubles f = x, g(c);
    double loss = 0, top = -INFINITY, sum = 0;
    for (double xj : x) top = std::max(top, xj);
    for (double xj : x) sum += std::exp(xj - top);
    if (o.softmax)
      for (size_t j = 0; j < c; ++j) f[j] = std::exp(x[j] - top) / sum;
    for (size_t j = 0; j < c; ++j) {
      double l, s;
      element(y[j], f[j], l, s);
      loss += l / c, g[j] = s / c;
    }
    const auto dot = [&](const Doubles& a, const Doubles& b) {
      double total = 0;
      for (size_t j = 0; j < c; ++j) total += a[j] * b[j];
      return total;
    };
    const auto pullback = [&](const Doubles& d) {  // of the softmax
      Doubles out = d;
      const double mean = dot(f, d);
      if (o.softmax)
        for (size_t j = 0; j < c; ++j) out[j] = f[j] * (d[j] - mean);
      return out;
    };
    slope = pullback(g);
    if (!grad) return loss;
    const Doubles v = pullback(*big_u);
    Doubles d(c);
    for (size_t j = 0; j < c; ++j) {
      double l, s;
      d[j] = element(y[j], f[j], l, s, true, big_g / c, v[j] / c);
      if (o.softmax) d[j] += (*big_u)[j] * g[j] - (*big_u)[j] * dot(f, g) - g[j] * dot(f, *big_u);
    }
    *grad = pullback(d);
    return loss;
  }
};

template <class T>
struct Case {
  using A = accumulate_t<T>;
  Options o;
  int64_t n, c, h, intervals = 0;
  std::mt19937 random;
  std::vector<T> pred = std::vector<T>(n * c);
  std::vector<int64_t> labels = std::vector<int64_t>(n);
  std::vector<A> target = std::vector<A>(n * c), w1 = std::vector<A>(2 * h), w2 = std::vector<A>(h * h),
                 w3 = std::vector<A>(h), grad_loss = std::vector<A>(n), grad_slope = std::vector<A>(n * c);
  bool uses_loss = true, uses_slope = true, wants_pred = true, wants_weights = true;
  int64_t kept_cotangents = LossNetwork{}.kept_cotangents;
  // Results, with one element beyond that nobody may write.
  std::vector<A> loss, slope, table, grad1, grad2, grad3;
  std::vector<T> grad_pred;
  Doubles want_loss, want_slope, want_pred, want1, want2, want3;

  Case(int64_t n_, int64_t c_, int64_t h_, Options options = {}, int seed = 1)
      : o(options), n(n_), c(c_), h(h_), random(unsigned(seed * 7919 + n_ * 31 + c_ * 7 + h_)) {
    std::normal_distribution<double> normal;
    for (T& x : pred) math::store(&x, A(2 * normal(random)));
    for (int64_t& y : labels) y = int64_t(random() % uint64_t(kinds()));
    for (A& y : target) y = A(normal(random));
    for (A& w : w1) w = A(normal(random) * 0.7 * o.scale);
    for (A& w : w2) w = A(normal(random) * std::sqrt(1. / h) * o.scale);
    for (A& w : w3) w = A(normal(random) * std::sqrt(1. / h) * o.scale);
    for (A& g : grad_loss) g = A(normal(random));
    for (A& u : grad_slope) u = A(normal(random) * 3 + 1);
  }

  int64_t kinds() const { return o.sigmoid ? 2 : c; }
  bool ignored(int64_t i) const { return !o.dense && labels[i] == -100; }
  bool bad(int64_t i) const { return !o.dense && !ignored(i) && (labels[i] < 0 || labels[i] >= kinds()); }

  LossNetwork arguments() {
    LossNetwork a{};
    a.dtype = dtype_of<T>;
    a.smooth = o.smooth, a.softplus = o.softplus, a.softmax = o.softmax;
    a.sigmoid = o.sigmoid;
    a.leak = 0.01, a.smoothness = 10;
    a.samples = n, a.classes = c, a.width = h, a.intervals = intervals, a.ignore_index = -100;
    a.kept_cotangents = kept_cotangents;
    a.pred = pred.data();
    if (o.dense)
      a.target = target.data();
    else
      a.labels = labels.data();
    a.input_weight = w1.data(), a.hidden_weight = w2.data(), a.output_weight = w3.data();
    if (intervals) {
      table.resize(loss_network_table_size(intervals));
      a.table = table.data();
    }
    return a;
  }

  template <class Run>
  static void with_workspace(LossNetwork& a, const Run& run) {
    std::vector<A> workspace(cuda::loss_network_workspace(a), A(NAN));
    a.workspace = workspace.data();
    run();
  }

  void forward() {
    LossNetwork a = arguments();
    loss.assign(n + 1, A(-77)), slope.assign(n * c + 1, A(-77));
    a.loss = loss.data(), a.slope = slope.data();
    with_workspace(a, [&] {
      if (intervals) cuda::loss_network_tabulate(a, nullptr), cuda::loss_network_table_forward(a, nullptr);
      cuda::loss_network_forward(a, nullptr);
    });
  }
  void backward() {
    LossNetwork a = arguments();
    T untouched;
    math::store(&untouched, A(-77));
    grad_pred.assign(n * c + 1, untouched);
    grad1.assign(2 * h + 1, A(-77)), grad2.assign(h * h + 1, A(-77)), grad3.assign(h + 1, A(-77));
    if (uses_loss) a.grad_loss = grad_loss.data();
    if (uses_slope) a.grad_slope = grad_slope.data();
    if (wants_pred) a.grad_pred = grad_pred.data();
    if (wants_weights)
      a.grad_input_weight = grad1.data(), a.grad_hidden_weight = grad2.data(),
      a.grad_output_weight = grad3.data();
    with_workspace(a, [&] {
      if (intervals) cuda::loss_network_table_backward(a, nullptr);
      cuda::loss_network_backward(a, nullptr);
    });
  }

  void expect() {
    Reference r{o,
                0.01,
                10,
                h,
                Doubles(w1.begin(), w1.end()),
                Doubles(w2.begin(), w2.end()),
                Doubles(w3.begin(), w3.end())};
    want_loss.clear(), want_slope.clear(), want_pred.clear();
    for (int64_t i = 0; i < n; ++i) {
      Doubles x(c), y(c), u(c), s(c), grad(c);
      for (int64_t j = 0; j < c; ++j) {
        x[j] = math::load(&pred[i * c + j]);
        y[j] = o.dense ? double(target[i * c + j]) : double(labels[i] == (o.sigmoid ? 1 : j));
        u[j] = uses_slope ? double(grad_slope[i * c + j]) : 0;
      }
      double l = 0;
      if (ignored(i) || bad(i)) {
        l = ignored(i) ? 0 : NAN;
        s.assign(c, l);
      } else {
        l = r.row(x, y, s, uses_loss ? double(grad_loss[i]) : 0, &u, &grad);
      }
      want_loss.push_back(l);
      want_slope.insert(want_slope.end(), s.begin(), s.end());
      want_pred.insert(want_pred.end(), grad.begin(), grad.end());
    }
    want1 = r.grad1, want2 = r.grad2, want3 = r.grad3;
  }

  // Errors relative to the largest expected magnitude.
  template <class V>
  void compare(const std::vector<V>& got, const Doubles& want, double tolerance, const char* name,
               int seed) const {
    double largest = 1e-2;  // gradients of a certain prediction are small by cancellation
    for (double w : want) largest = std::isfinite(w) ? std::max(largest, std::abs(w)) : largest;
    CHECK(got.size() == want.size() + 1);
    for (size_t i = 0; i < want.size(); ++i)
      CHECK_NEAR(math::load(&got[i]), want[i], tolerance * largest, 0, name, '[', i, "], seed ", seed, ", N ",
                 n, " C ", c, " H ", h, " smooth ", o.smooth, " softplus ", o.softplus, " softmax ",
                 o.softmax, " dense ", o.dense);
    CHECK(math::load(&got.back()) == A(-77), name, ": written beyond the end");
  }

  static double exact_tolerance() { return sizeof(A) == 8 ? 1e-12 : 2e-5; }
  static double pred_tolerance(double tolerance) {
    return std::max(tolerance, dtype_of<T> == DType::bfloat16  ? 1. / 256
                               : dtype_of<T> == DType::float16 ? 1. / 1024
                                                               : 0);
  }

  void compare_all(double tolerance, int seed) {
    compare(loss, want_loss, tolerance, "loss", seed);
    compare(slope, want_slope, tolerance, "slope", seed);
    if (wants_pred) compare(grad_pred, want_pred, pred_tolerance(tolerance), "grad_pred", seed);
    if (!wants_weights) return;
    compare(grad1, want1, tolerance, "grad_input_weight", seed);
    compare(grad2, want2, tolerance, "grad_hidden_weight", seed);
    compare(grad3, want3, tolerance, "grad_output_weight", seed);
  }

  void check(double tolerance = exact_tolerance(), int seeds = 1) {
    expect();
    for (int seed = 0; seed < seeds; ++seed) {
      simt::set_seed(seed);
      forward();
      backward();
      compare_all(tolerance, seed);
    }
  }
};

template <class F>
void each_option(const F& f) {
  for (int bits = 0; bits < 16; ++bits) {
    Options o;
    o.smooth = bits & 1, o.softplus = bits & 2, o.softmax = bits & 4, o.dense = bits & 8;
    f(o);
  }
}

// The derivative of value() with respect to x, which it reads.
template <class Value>
double difference(double& x, const Value& value) {
  const double kept = x, step = 1e-5;
  x = kept + step;
  const double up = value();
  x = kept - step;
  const double down = value();
  x = kept;
  return (up - down) / (2 * step);
}

}  // namespace

TEST(the_reference_agrees_with_finite_differences) {
  each_option([](Options o) {
    Case<double> k(2, 5, 7, o);
    k.expect();
    const Doubles want_pred = k.want_pred, want1 = k.want1, want2 = k.want2, want3 = k.want3,
                  slope = k.want_slope;
    const auto objective = [&] {
      k.expect();
      double sum = 0;
      for (int i = 0; i < 2; ++i) sum += k.grad_loss[i] * k.want_loss[i];
      for (int i = 0; i < 10; ++i) sum += k.grad_slope[i] * k.want_slope[i];
      return sum;
    };
    for (int i = 0; i < 10; ++i) {
      CHECK_NEAR(difference(k.pred[i], objective), want_pred[i], 1e-6, 1e-6, "pred ", i);
      CHECK_NEAR(difference(k.pred[i], [&] { return k.expect(), k.want_loss[i / 5]; }), slope[i], 1e-6, 1e-6);
    }
    for (int i = 0; i < 14; ++i) CHECK_NEAR(difference(k.w1[i], objective), want1[i], 1e-6, 1e-6, "w1 ", i);
    for (int i = 0; i < 49; ++i) CHECK_NEAR(difference(k.w2[i], objective), want2[i], 1e-6, 1e-6, "w2 ", i);
    for (int i = 0; i < 7; ++i) CHECK_NEAR(difference(k.w3[i], objective), want3[i], 1e-6, 1e-6, "w3 ", i);
  });
  Options o;
  o.softmax = false, o.sigmoid = true;
  Case<double> k(4, 1, 7, o);
  k.expect();
  const Doubles want_pred = k.want_pred, want2 = k.want2, slope = k.want_slope;
  const auto objective = [&] {
    k.expect();
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += k.grad_loss[i] * k.want_loss[i] + k.grad_slope[i] * k.want_slope[i];
    return sum;
  };
  for (int i = 0; i < 4; ++i) {
    CHECK_NEAR(difference(k.pred[i], objective), want_pred[i], 1e-6, 1e-6, "label ", i);
    CHECK_NEAR(difference(k.pred[i], [&] { return k.expect(), k.want_loss[i]; }), slope[i], 1e-6, 1e-6);
  }
  for (int i = 0; i < 49; ++i) CHECK_NEAR(difference(k.w2[i], objective), want2[i], 1e-6, 1e-6, "w2 ", i);
}

TEST(exact_every_option_and_type) {
  each_option([](Options o) {
    Case<float>(5, 5, 7, o).check();
    Case<double>(5, 33, 7, o).check();
    Case<float16>(3, 33, 7, o).check();
    Case<bfloat16>(5, 5, 7, o).check();
  });
}

TEST(exact_shapes) {
  for (int64_t h : {1, 7, 40})
    for (int64_t c : {1, 5, 33})
      for (int64_t n : {0, 1, 5}) {
        Case<float>(n, c, h).check(2e-5, 2);
        Case<double>(n, c, h).check();
      }
}

TEST(exact_seeds) {
  Case<float>(40, 10, 40).check(2e-5, 4);
  Options o;
  o.softmax = false, o.dense = true;
  Case<float>(5, 33, 40, o).check(2e-5, 4);
}

TEST(exact_long_rows) {
  Case<float>(5, 1100, 40).check();
  Case<bfloat16>(3, 1100, 7).check();
  Case<double>(1, 1100, 7).check();
}

TEST(exact_wide_networks) {
  for (int64_t h : {41, 100, 130, 300}) Case<float>(3, 10, h).check(4e-5);
  Case<double>(3, 10, 130).check();
  Case<double>(1, 10, 256).check();
  Case<float>(1, 10, 512).check(4e-5);
}

// Half precision goes backward a few rows at a time: one, some that do not divide N, all but one.
TEST(exact_half_precision_in_several_passes) {
  for (bool dense : {false, true}) {
    Options o;
    o.dense = dense;
    for (auto [n, c, kept] : {std::array<int64_t, 3>{5, 33, 33}, {10, 5, 15}, {11, 7, 70}, {2, 1100, 1}}) {
      Case<bfloat16> k(n, c, 7, o);
      k.kept_cotangents = kept;
      if (!dense) k.labels[n - 1] = -100, k.labels[0] = c;
      k.check(Case<bfloat16>::exact_tolerance(), 2);
      Case<float16> without_pred(n, c, 7, o);
      without_pred.kept_cotangents = kept, without_pred.wants_pred = false;
      without_pred.check();
    }
  }
  Case<float16> many(100, 3, 4);  // no more passes than a few, however little fits
  many.kept_cotangents = 1;
  many.check();
}

// In float32 the cotangents go where their result goes; in half precision few of them are kept at once.
TEST(workspace_does_not_grow_with_the_batch) {
  LossNetwork a{};
  a.smooth = a.softmax = true, a.leak = 0.01, a.smoothness = 10;
  a.samples = 8192, a.classes = 32000, a.width = 40;
  float any = 0;
  a.grad_pred = a.grad_input_weight = a.grad_hidden_weight = a.grad_output_weight = &any;
  const int64_t elements = a.samples * a.classes;
  a.dtype = DType::float32;
  const int64_t single = cuda::loss_network_workspace(a);
  a.dtype = DType::bfloat16;
  const int64_t half = cuda::loss_network_workspace(a);
  CHECK(single < elements / 8, single);
  CHECK(half < elements / 4, half);
}

// On either side of each width at which the tile, or where W2 lies, changes.
TEST(exact_on_devices_with_less_shared_memory) {
  struct Device {
    int number;
    std::vector<int64_t> floats, doubles;
  };
  for (const Device& device :
       {Device{0, {96, 97, 324, 325, 512}, {48, 49, 256}},
        {1,
         {88, 89, 96, 97, 124, 125, 160, 161, 180, 181, 324, 325, 512},
         {44, 45, 48, 49, 72, 73, 96, 97, 120, 121, 160, 161, 256}},
        {2,
         {56, 57, 64, 65, 84, 85, 116, 117, 124, 125, 132, 133, 224, 225, 372, 373, 512},
         {28, 29, 32, 33, 40, 48, 49, 60, 61, 68, 69, 88, 89, 112, 113, 184, 185, 256}}}) {
    cudaSetDevice(device.number);
    for (int64_t h : device.floats) Case<float>(1, 10, h).check(4e-5);
    for (int64_t h : device.doubles) Case<double>(1, 10, h).check();
  }
  cudaSetDevice(0);
}

TEST(exact_many_tiles_for_each_block) { Case<float>(7000, 5, 4).check(); }

TEST(exact_only_what_is_asked_for) {
  for (bool softmax : {false, true})
    for (int bits = 0; bits < 16; ++bits) {
      Options o;
      o.softmax = softmax;
      Case<float> k(5, 33, 7, o);
      k.uses_loss = bits & 1, k.uses_slope = bits & 2, k.wants_pred = bits & 4, k.wants_weights = bits & 8;
      k.check();
      if (!k.wants_weights) CHECK(k.grad1[0] == -77 && k.grad2[0] == -77 && k.grad3[0] == -77);
    }
}

TEST(exact_ignored_and_bad_labels) {
  for (bool softmax : {false, true})
    for (int64_t c : {5, 1100}) {
      Options o;
      o.softmax = softmax;
      Case<float> k(7, c, 7, o);
      k.labels[0] = -100, k.labels[2] = c, k.labels[3] = -1, k.labels[6] = int64_t(1) << 62;
      math::store(&k.pred[2 * c], NAN), math::store(&k.pred[0], NAN);
      k.check();
    }
}

Options of_labels(bool smooth = true, bool softplus = false, bool dense = false) {
  Options o;
  o.softmax = false, o.sigmoid = true, o.smooth = smooth, o.softplus = softplus, o.dense = dense;
  return o;
}

TEST(labels_exact) {
  for (int bits = 0; bits < 8; ++bits) {
    const Options o = of_labels(bits & 1, bits & 2, bits & 4);
    Case<float>(37, 1, 7, o).check();
    Case<double>(37, 1, 7, o).check();
    Case<float16>(5, 1, 7, o).check();
    Case<bfloat16>(5, 1, 7, o).check();
  }
  for (int64_t h : {1, 40, 100})
    for (int64_t n : {0, 1, 700}) Case<float>(n, 1, h, of_labels()).check(4e-5, 2);
}

TEST(labels_only_what_is_asked_for) {
  for (int64_t intervals : {0, 256})
    for (int bits = 0; bits < 16; ++bits) {
      Case<double> k(600, 1, 7, of_labels());
      k.intervals = intervals;
      k.uses_loss = bits & 1, k.uses_slope = bits & 2, k.wants_pred = bits & 4, k.wants_weights = bits & 8;
      k.check(intervals ? 1e-4 : 1e-12);
      if (!k.wants_weights) CHECK(k.grad1[0] == -77 && k.grad2[0] == -77 && k.grad3[0] == -77);
    }
}

TEST(labels_ignored_and_bad) {
  for (int64_t intervals : {0, 512}) {
    Case<float> k(40, 1, 7, of_labels());
    k.intervals = intervals;
    k.labels[0] = -100, k.labels[2] = 2, k.labels[3] = -1, k.labels[6] = int64_t(1) << 62;
    math::store(&k.pred[0], NAN);
    k.check(intervals ? 2e-3 : 2e-5);
    if (intervals) CHECK(k.table.back() == 1);
  }
}

TEST(labels_in_a_table) {
  for (int64_t n : {1, 511, 512, 5000}) {
    Case<double> k(n, 1, 7, of_labels());
    k.intervals = 512;
    k.check(1e-5, 2);
    CHECK(k.table.back() == 1);
    Case<float> single(n, 1, 40, of_labels());
    single.intervals = 512;
    single.check(2e-3, 2);
  }
  Case<bfloat16> half(700, 1, 7, of_labels());
  half.intervals = 256;
  half.check(2e-3);
}

TEST(labels_nan_and_infinite_logits) {
  for (int64_t intervals : {0, 512}) {
    Case<float> k(8, 1, 7, of_labels());
    k.intervals = intervals;
    k.pred[1] = NAN, k.pred[2] = -INFINITY, k.pred[3] = INFINITY;
    simt::set_seed(0);
    k.forward();
    k.backward();
    k.expect();
    for (int i = 0; i < 8; ++i) {
      CHECK(std::isnan(k.loss[i]) == (i == 1) && std::isnan(k.slope[i]) == (i == 1), i);
      CHECK(std::isnan(k.grad_pred[i]) == (i == 1), i);
      if (i == 1) continue;
      CHECK_NEAR(k.loss[i], k.want_loss[i], 1e-5, 1e-4);
      CHECK_NEAR(k.slope[i], k.want_slope[i], 1e-5, 1e-4);
    }
    CHECK(std::isnan(k.grad2[0]));
  }
}

TEST(exact_nan_and_infinite_logits) {
  Case<float> k(5, 5, 7);
  k.pred[1] = NAN, k.pred[7] = -INFINITY, k.pred[16] = INFINITY;
  for (int j = 20; j < 25; ++j) k.pred[j] = -INFINITY;
  simt::set_seed(0);
  k.forward();
  k.backward();
  k.expect();
  for (int i : {0, 3, 4}) {
    CHECK(std::isnan(k.loss[i]), i);
    for (int j = 0; j < 5; ++j)
      CHECK(std::isnan(k.slope[i * 5 + j]) && std::isnan(k.grad_pred[i * 5 + j]), i);
  }
  for (int i : {1, 2}) {
    CHECK_NEAR(k.loss[i], k.want_loss[i], 1e-6, 1e-5);
    for (int j = i * 5; j < i * 5 + 5; ++j) {
      CHECK_NEAR(k.slope[j], k.want_slope[j], 1e-6, 1e-5);
      CHECK_NEAR(k.grad_pred[j], k.want_pred[j], 1e-5, 1e-5);
    }
  }
  CHECK(std::isnan(k.grad2[0]));
}

// ---- The table.

namespace {

// Weights as they are in practice: the table is accepted.
template <class T>
Case<T> tabulated(int64_t n, int64_t c, int64_t h = 7, int64_t intervals = 512, bool softplus = false,
                  int seed = 1) {
  Options o;
  o.softplus = softplus, o.scale = 0.5;
  Case<T> k(n, c, h, o, seed);
  k.intervals = intervals;
  return k;
}

template <class T>
void check_table(Case<T> k, int seeds = 1) {
  k.check(sizeof(accumulate_t<T>) == 8 ? 1e-6 : 2e-4, seeds);
  CHECK(k.table.back() == 1, "accepted, N ", k.n, " C ", k.c, " H ", k.h);
}

}  // namespace

TEST(table_rows_of_every_kind) {
  for (int64_t c : {1, 2, 5, 33, 64, 65, 100, 256, 257, 264, 1000, 1024, 1100, 1101}) {
    check_table(tabulated<float>(5, c));
    check_table(tabulated<float16>(3, c));
    check_table(tabulated<bfloat16>(3, c));
    check_table(tabulated<double>(3, c));
  }
}

TEST(table_widths_and_intervals) {
  for (int64_t h : {1, 7, 40}) check_table(tabulated<float>(20, 33, h, 512, true));
  check_table(tabulated<float>(0, 33));
  check_table(tabulated<float>(1, 33));
}

// Rows in registers by 8 lanes and by 32, with 8 and 32 slots; streamed in packs and one by one: with the widths of networks
// that fill a tile differently.
TEST(table_wide_networks) {
  const auto check = [](auto k) {
    for (auto& w : k.w1) w *= 0.05f;  // a table with few nodes is accepted
    check_table(k);
  };
  for (int64_t c : {20, 200, 365, 1000, 1100, 1101}) {
    check(tabulated<float>(3, c, 40, 32));
    check(tabulated<bfloat16>(3, c, 40, 32));
    check(tabulated<float16>(3, c, 100, 32));
  }
  for (int64_t c : {20, 1101}) check(tabulated<float>(2, c, 512, 16));
}

TEST(table_of_the_largest_size_on_every_device) {
  for (int device = 0; device < simt::devices; ++device) {
    cudaSetDevice(device);
    for (DType dtype : {DType::float32, DType::bfloat16}) CHECK(cuda::loss_network_intervals(dtype) >= 1024);
    CHECK(cuda::loss_network_intervals(DType::float64) >= (device == 2 ? 896 : 1024));
    for (int64_t c : {33, 1100}) {
      check_table(tabulated<float>(5, c, 7, cuda::loss_network_intervals(DType::float32)));
      check_table(tabulated<double>(5, c, 7, cuda::loss_network_intervals(DType::float64)));
    }
  }
  cudaSetDevice(0);
}

TEST(table_on_devices_with_less_shared_memory) {
  const auto check = [](auto k) {
    for (auto& w : k.w1) w *= 0.05f;  // a table with few nodes is accepted
    check_table(k);
  };
  for (int device : {1, 2}) {
    cudaSetDevice(device);
    for (int64_t h : {40, 60, 117, 512}) check(tabulated<float>(5, 33, h, 32));
    for (int64_t h : {29, 40, 256}) check(tabulated<double>(5, 33, h, 32));
  }
  cudaSetDevice(0);
}

TEST(table_seeds) {
  check_table(tabulated<float>(300, 10), 4);
  check_table(tabulated<float>(2, 1100), 4);
}

// What is returned is differentiated as it is: the derivatives of the table, not of the network.
TEST(table_gradients_are_those_of_the_table) {
  Case<double> k = tabulated<double>(2, 5, 3, 12);
  for (double& w : k.w1) w *= 0.2;
  k.forward();
  k.backward();
  CHECK(k.table.back() == 1, "accepted");
  const auto slope = k.slope;
  const auto objective = [&] {
    k.forward();
    double sum = 0;
    for (int i = 0; i < 2; ++i) sum += k.grad_loss[i] * k.loss[i];
    for (int i = 0; i < 10; ++i) sum += k.grad_slope[i] * k.slope[i];
    return sum;
  };
  for (int i = 0; i < 10; ++i) {
    CHECK_NEAR(difference(k.pred[i], objective), k.grad_pred[i], 1e-9, 1e-8, "pred ", i);
    CHECK_NEAR(difference(k.pred[i], [&] { return k.forward(), k.loss[i / 5]; }), slope[i], 1e-9, 1e-8,
               "slope ", i);
  }
  for (int i = 0; i < 6; ++i) CHECK_NEAR(difference(k.w1[i], objective), k.grad1[i], 1e-9, 1e-8, "w1 ", i);
  for (int i = 0; i < 9; ++i) CHECK_NEAR(difference(k.w2[i], objective), k.grad2[i], 1e-9, 1e-8, "w2 ", i);
  for (int i = 0; i < 3; ++i) CHECK_NEAR(difference(k.w3[i], objective), k.grad3[i], 1e-9, 1e-8, "w3 ", i);
}

TEST(table_refused) {
  Case<float> k(20, 33, 7, {});
  for (auto* w : {&k.w1, &k.w2, &k.w3})
    for (float& x : *w) x *= 20;
  k.intervals = 512;
  k.check(1e-4);
  CHECK(k.table.back() == 0, "refused");
  k = tabulated<float>(5, 33);
  k.w2[3] = NAN;
  k.forward();
  CHECK(k.table.back() == 0, "refused where the slopes are not numbers");
  CHECK(std::isnan(k.loss[0]) && std::isnan(k.slope[0]));
}

TEST(only_one_path_writes) {
  for (int accepted : {0, 1}) {
    Case<float> k = tabulated<float>(5, 33);
    k.forward();
    k.table.back() = float(accepted);
    LossNetwork a = k.arguments();
    k.loss.assign(k.n, -77), k.slope.assign(k.n * k.c, -77), k.grad_pred.assign(k.n * k.c, -77);
    k.grad1.assign(2 * k.h, -77), k.grad2.assign(k.h * k.h, -77), k.grad3.assign(k.h, -77);
    a.loss = k.loss.data(), a.slope = k.slope.data();
    k.with_workspace(a, [&] {
      accepted ? cuda::loss_network_forward(a, nullptr) : cuda::loss_network_table_forward(a, nullptr);
    });
    a.loss = a.slope = nullptr;
    a.grad_loss = k.grad_loss.data(), a.grad_slope = k.grad_slope.data(), a.grad_pred = k.grad_pred.data();
    a.grad_input_weight = k.grad1.data(), a.grad_hidden_weight = k.grad2.data();
    a.grad_output_weight = k.grad3.data();
    k.with_workspace(a, [&] {
      accepted ? cuda::loss_network_backward(a, nullptr) : cuda::loss_network_table_backward(a, nullptr);
    });
    for (const auto* result : {&k.loss, &k.slope, &k.grad_pred, &k.grad1, &k.grad2, &k.grad3})
      for (float x : *result) CHECK(x == -77, accepted);
  }
}

TEST(table_only_what_is_asked_for) {
  for (int64_t c : {5, 1100})
    for (int bits = 0; bits < 16; ++bits) {
      Case<float> k = tabulated<float>(5, c);
      k.uses_loss = bits & 1, k.uses_slope = bits & 2, k.wants_pred = bits & 4, k.wants_weights = bits & 8;
      check_table(k);
    }
}

TEST(table_ignored_and_bad_labels) {
  for (int64_t c : {5, 100, 1000, 1100}) {
    Case<float> k = tabulated<float>(7, c);
    k.labels[0] = -100, k.labels[2] = c, k.labels[3] = -1, k.labels[6] = int64_t(1) << 62;
    k.pred[2 * c] = k.pred[0] = NAN;
    check_table(k);
  }
}

TEST(table_nan_and_infinite_logits) {
  for (int64_t c : {5, 100, 1000, 1100}) {
    Case<float> k = tabulated<float>(6, c);
    k.pred[1] = NAN, k.pred[c + 2] = -INFINITY, k.pred[3 * c + 1] = INFINITY;
    for (int64_t j = 0; j < c; ++j) k.pred[4 * c + j] = -INFINITY;
    simt::set_seed(0);
    k.forward();
    k.backward();
    k.expect();
    CHECK(k.table.back() == 1);
    for (int64_t i = 0; i < 6; ++i) {
      const bool number = i == 1 || i == 2 || i == 5;
      CHECK(std::isnan(k.loss[i]) == !number, i);
      if (number) CHECK_NEAR(k.loss[i], k.want_loss[i], 1e-5, 1e-5, "row ", i);
      for (int64_t j = i * c; j < (i + 1) * c; ++j) {
        CHECK(std::isnan(k.slope[j]) == !number && std::isnan(k.grad_pred[j]) == !number, i, ' ', j);
        if (number) CHECK_NEAR(k.slope[j], k.want_slope[j], 1e-5, 1e-5, "row ", i);
        if (number) CHECK_NEAR(k.grad_pred[j], k.want_pred[j], 1e-5, 1e-5, "row ", i);
      }
    }
    for (const auto* grad : {&k.grad1, &k.grad2, &k.grad3}) CHECK(std::isnan((*grad)[0]));
  }
}

TEST(table_gradients_of_any_size) {
  for (float size : {1e-30f, 1e-12f, 1e12f, 1e30f}) {
    Case<float> k = tabulated<float>(20, 33);
    for (float& g : k.grad_loss) g *= size;
    for (float& u : k.grad_slope) u *= size;
    k.expect();
    k.forward();
    k.backward();
    for (auto [got, want] : {std::pair{&k.grad1, &k.want1}, {&k.grad2, &k.want2}, {&k.grad3, &k.want3}})
      for (size_t i = 0; i < want->size(); ++i)
        CHECK_NEAR((*got)[i], (*want)[i], 2e-4 * size, 2e-5, size, ' ', i);
  }
  Case<float> k = tabulated<float>(20, 33);
  k.grad_slope[40] = INFINITY;
  k.forward();
  k.backward();
  CHECK(std::isnan(k.grad1[0]) && std::isnan(k.grad2[0]) && std::isnan(k.grad3[0]));
}

// The same bits whatever the order of the threads and of the blocks.
TEST(results_do_not_depend_on_the_order_of_threads) {
  for (int64_t intervals : {0, 512}) {
    Case<float> k = tabulated<float>(300, 10, 7, intervals);
    std::vector<float> first;
    for (int seed = 0; seed < 4; ++seed) {
      simt::set_seed(seed);
      k.forward();
      k.backward();
      std::vector<float> all;
      for (const auto* part : {&k.loss, &k.slope, &k.grad_pred, &k.grad1, &k.grad2, &k.grad3})
        all.insert(all.end(), part->begin(), part->end());
      if (seed == 0) first = all;
      CHECK(!std::memcmp(all.data(), first.data(), all.size() * sizeof(float)), "seed ", seed, " M ",
            intervals);
    }
  }
}
