#include "math/parametric_cross_entropy.h"

#include "cpu/group.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 14;  // below this a thread costs more than it saves

constexpr int64_t cached_bytes = 1 << 15;

constexpr int64_t streamed_bytes = 16 << 20;  // a gradient of this size does not stay in the caches

// The typed view of the arguments. Element (b, s, c) of logits lies at sample(b, s) + c * class_stride.
template <class T>
struct Problem : Statistics<accumulate_t<T>> {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Statistics<A>::maximum, Statistics<A>::log_sum, Statistics<A>::z, Statistics<A>::q_sum,
      Statistics<A>::denominator;

  const ParametricCrossEntropy& a;
  const T* logits = static_cast<const T*>(a.logits);
  const A* phi = static_cast<const A*>(a.phi);
  const A* weight = static_cast<const A*>(a.weight);
  int64_t total = a.models * a.samples;

  explicit Problem(const ParametricCrossEntropy& arguments) : Statistics<A>(arguments), a(arguments) {}

  int64_t offset(int64_t i) const { return i / a.inner * a.classes * a.inner + i % a.inner; }
  int64_t model(int64_t i) const { return a.models == 1 ? 0 : i / a.samples; }
  // Phi's row for flat sample i.
  const A* phi_row(int64_t i, int64_t label) const {
    return phi + model(i) * a.phi_stride + label * a.classes;
  }
  bool valid(int64_t i) const {
    return !a.labels || (a.labels[i] >= 0 && a.labels[i] < a.classes && a.labels[i] != a.ignore_index);
  }
  A class_weight(int64_t i) const { return weight && a.labels ? weight[a.labels[i]] : A(1); }

  // dloss/dz of n samples from i on, times the incoming gradient; 0 for ignored ones.
  V slopes(int64_t i, int n) const {
    const A* grad = static_cast<const A*>(a.grad);
    A scale[V::size];
    for (int l = 0; l < V::size; ++l) {
      if (l >= n || !valid(i + l)) {
        scale[l] = 0;
        continue;
      }
      scale[l] = -class_weight(i + l) * (a.reduction == Reduction::none ? grad[i + l] : grad[model(i + l)]);
      if (a.reduction == Reduction::mean) scale[l] /= denominator[model(i + l)];
    }
    const V slope = math::parametric_activation_slope(load_partial(z + i, n, A(0)), a.sigmoid);
    const V factor = load(scale);
    return select(factor == A(0), A(0), factor * slope);
  }
};

// ---- Lanes along the classes: contiguous rows, V::size of them at a time so that what follows the sums is vectorised.

// The row of the weights of sample i.
template <class T>
const accumulate_t<T>* weights_row(const Problem<T>& p, int64_t i) {
  return p.a.labels ? p.phi_row(i, p.a.labels[i]) : p.phi + i * p.a.classes;
}

template <class T>
void forward_rows(const Problem<T>& p, int64_t first, int n) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t classes = p.a.classes, full = classes / V::size * V::size;
  const int rest = int(classes - full);
  // The maxima of as many rows at once as stay in the innermost cache until they are exponentiated.
  const int64_t fitting = cached_bytes / (classes * int64_t(sizeof(T)));
  const int block = int(fitting < 1 ? 1 : fitting < V::size ? fitting : V::size);
  V sums[V::size], dots[V::size], weight_sums[V::size];
  for (int r = 0; r < V::size; ++r) sums[r] = dots[r] = weight_sums[r] = V(A(0));
  A maxima[V::size] = {};
  for (int begin = 0; begin < n; begin += block) {
    const int end = begin + block < n ? begin + block : n;
    V lanes[V::size];
    for (V& lane : lanes) lane = V(-INFINITY);
    for (int r = begin; r < end; ++r) {
      const T* x = p.logits + (first + r) * classes;
      V m0(-INFINITY), m1(-INFINITY);
      int64_t c = 0;
      for (; c + 2 * V::size <= full; c += 2 * V::size)
        m0 = max(load(x + c), m0), m1 = max(load(x + c + V::size), m1);
      for (; c < full; c += V::size) m0 = max(load(x + c), m0);
      if (rest) m1 = max(load_partial(x + full, rest, A(-INFINITY)), m1);
      lanes[r - begin] = max(m0, m1);
    }
    A shifts[V::size];
    store(shifts, reduce_max_rows(lanes));
    for (int r = begin; r < end; ++r) {
      const int64_t i = first + r;
      if (!p.valid(i)) continue;
      const T* x = p.logits + i * classes;
      const A* q = weights_row(p, i);
      const A* next_q = i + 1 < p.total && p.valid(i + 1) ? weights_row(p, i + 1) : q;
      const A m = shifts[r - begin];
      V sum(A(0)), dot(A(0)), weight_sum(A(0));
      for (int64_t c = 0; c < full; c += V::size) {
        const V d = load(x + c) - m, w = load(q + c);
        __builtin_prefetch(x + block * classes + c), __builtin_prefetch(next_q + c);
        sum += exp_bounded(d);
        dot += w * d;
        weight_sum += w;
      }
      if (rest) {
        const V d = load_partial(x + full, rest, A(-INFINITY)) - m, w = load_partial(q + full, rest, A(0));
        sum += exp_bounded(d);
        dot += math::weighted_logit(w, d);
        weight_sum += w;
      }
      // 0 * -infinity: the row has masked classes, and is summed again without them.
      if (any(dot != dot)) {
        dot = V(A(0));
        for (int64_t c = 0; c < classes; c += V::size) {
          const int width = int(classes - c < V::size ? classes - c : V::size);
          dot += math::weighted_logit(load_partial(q + c, width, A(0)), load_partial(x + c, width, A(0)) - m);
        }
      }
      maxima[r] = m;
      sums[r] = sum;
      dots[r] = dot;
      weight_sums[r] = weight_sum;
    }
  }
  const V log_sum = log(reduce_add_rows(sums)), q_sum = reduce_add_rows(weight_sums);
  store_partial(p.maximum + first, load(maxima), n);
  store_partial(p.log_sum + first, log_sum, n);
  store_partial(p.q_sum + first, q_sum, n);
  store_partial(p.z + first, reduce_add_rows(dots) - select(q_sum == A(0), A(0), q_sum * log_sum), n);
}

template <class T>
void clear_row(T* out, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) math::store(out + c, accumulate_t<T>(0));
}

template <class T>
void backward_rows(const Problem<T>& p, int64_t first, int n, T* grad_logits, accumulate_t<T>* grad_q) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t classes = p.a.classes;
  const bool streams = p.total * classes * int64_t(sizeof(T)) >= streamed_bytes && classes > 4 * V::size;
  const V slopes = p.slopes(first, n);
  for (int r = 0; r < n; ++r) {
    const int64_t i = first + r;
    if (!p.valid(i)) {
      clear_row(grad_logits + i * classes, classes);
      continue;
    }
    const T* x = p.logits + i * classes;
    const A* q = p.a.labels ? p.phi_row(i, p.a.labels[i]) : p.phi + i * classes;
    const A g = slopes[r], m = p.maximum[i], log_sum = p.log_sum[i];
    if (grad_logits) {
      // softmax = exp(x - m) / sum exp(x - m)
      const A scale = g * p.q_sum[i] * math::exp(-log_sum);
      T* out = grad_logits + i * classes;
      const int64_t next = i + 1 < p.total && p.valid(i + 1) ? i + 1 : i;
      const A* next_q = p.a.labels ? p.phi_row(next, p.a.labels[next]) : p.phi + next * classes;
      const auto value = [&](V logit, V w) { return w * g - exp_bounded(logit - m) * scale; };
      const auto partial = [&](int64_t c, int width) {
        store_partial(out + c, value(load_partial(x + c, width, m), load_partial(q + c, width, A(0))), width);
      };
      int64_t c = 0;
      if (streams) {
        const int head = int(-(reinterpret_cast<uintptr_t>(out) / sizeof(T)) % V::size);
        if (head) partial(0, head);
        for (c = head; c + V::size <= classes; c += V::size) {
          __builtin_prefetch(x + classes + c), __builtin_prefetch(next_q + c);
          stream(out + c, value(load(x + c), load(q + c)));
        }
      } else {
        for (; c + V::size <= classes; c += V::size) {
          __builtin_prefetch(x + classes + c), __builtin_prefetch(next_q + c);
          store(out + c, value(load(x + c), load(q + c)));
        }
      }
      if (c < classes) partial(c, int(classes - c));
    }
    if (grad_q) {
      A* out = grad_q + i * classes;
      for (int64_t c = 0; c < classes; c += V::size) {
        const int width = int(classes - c < V::size ? classes - c : V::size);
        const V f = load_partial(x + c, width, A(0)) - m - log_sum, w = load_partial(q + c, width, A(0));
        store_partial(out + c, select((w == A(0)) & (f == A(-INFINITY)), A(0), f * g), width);
      }
    }
  }
}

// ---- Lanes along the samples: for few classes, and for layouts [N, C, d...] whose classes are strided.

template <class T>
struct Lanes {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int64_t max_rows_classes = 16;  // up to here lanes across rows beat lanes along the row

  const Problem<T>& p;
  int64_t first;   // flat index of the first sample; the others follow it
  int n;           // samples in use
  int64_t stride;  // from sample to sample in logits

  const T* x(int64_t c) const { return p.logits + p.offset(first) + c * p.a.inner; }
  V logit(int64_t c) const { return load_strided(x(c), stride, n, A(0)); }
  V q(int64_t c) const {
    if (!p.a.labels) return load_strided(p.phi + p.offset(first) + c * p.a.inner, stride, n, A(0));
    A buffer[V::size];
    for (int l = 0; l < V::size; ++l)
      buffer[l] = l < n && p.valid(first + l) ? p.phi_row(first + l, p.a.labels[first + l])[c] : A(0);
    return load(buffer);
  }
};

template <class T>
void forward_lanes(const Lanes<T>& lanes) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const Problem<T>& p = lanes.p;
  V m(-INFINITY);
  for (int64_t c = 0; c < p.a.classes; ++c) m = max(lanes.logit(c), m);
  V sum(A(0)), dot(A(0)), weight_sum(A(0));
  for (int64_t c = 0; c < p.a.classes; ++c) {
    const V d = lanes.logit(c) - m, w = lanes.q(c);
    sum += exp_bounded(d);
    dot += math::weighted_logit(w, d);
    weight_sum += w;
  }
  const V log_sum = log(sum);
  const int64_t i = lanes.first;
  store_partial(p.maximum + i, m, lanes.n);
  store_partial(p.log_sum + i, log_sum, lanes.n);
  store_partial(p.q_sum + i, weight_sum, lanes.n);
  store_partial(p.z + i, dot - weight_sum * log_sum, lanes.n);
}

template <class T>
void backward_lanes(const Lanes<T>& lanes, T* grad_logits, accumulate_t<T>* grad_q) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const Problem<T>& p = lanes.p;
  const int64_t i = lanes.first;
  const V g = p.slopes(i, lanes.n), m = load_partial(p.maximum + i, lanes.n, A(0)),
          log_sum = load_partial(p.log_sum + i, lanes.n, A(0)),
          gq = g * load_partial(p.q_sum + i, lanes.n, A(0));
  for (int64_t c = 0; c < p.a.classes; ++c) {
    const int64_t at = p.offset(i) + c * p.a.inner;
    const V f = lanes.logit(c) - m - log_sum, w = lanes.q(c);
    // An ignored sample has g = 0 whatever its logits are.
    if (grad_logits)
      store_strided(grad_logits + at, lanes.stride, select(g == A(0), A(0), w * g - exp_bounded(f) * gq),
                    lanes.n);
    if (grad_q)
      store_strided(grad_q + at, lanes.stride, select((w == A(0)) & (f == A(-INFINITY)), A(0), f * g),
                    lanes.n);
  }
}

// Calls rows(first, n) or lanes(Lanes) for each group of samples, whichever suits the layout.
template <class T, class Rows, class Groups>
void for_each(const Problem<T>& p, const Rows& rows, const Groups& groups) {
  constexpr int width = Vec<accumulate_t<T>>::size;
  const int64_t classes = p.a.classes;
  if (p.total == 0) return;
  if (p.a.inner == 1 && classes > Lanes<T>::max_rows_classes)
    return parallel_for((p.total + width - 1) / width, grain_elements / (classes * width) + 1,
                        [&](int64_t begin, int64_t end) {
                          for (int64_t k = begin; k < end; ++k)
                            rows(k * width, int(p.total - k * width < width ? p.total - k * width : width));
                        });
  const int64_t outer = p.a.inner == 1 ? 1 : p.total / p.a.inner,
                length = p.a.inner == 1 ? p.total : p.a.inner;
  const int64_t blocks = (length + width - 1) / width;
  parallel_for(outer * blocks, grain_elements / (classes * width) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t start = k % blocks * width;
      const int n = int(length - start < width ? length - start : width);
      groups(Lanes<T>{p, k / blocks * length + start, n, p.a.inner == 1 ? classes : 1});
    }
  });
}

// The loss per sample, and its sum or mean per model: in a fixed order, in float64.
template <class T>
void finish(const Problem<T>& p) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  A* loss = static_cast<A*>(p.a.loss);
  A* reduced = static_cast<A*>(p.a.reduced);
  for (int64_t b = 0; b < p.a.models; ++b) {
    double sum = 0, weights = 0;
    const int64_t end = (b + 1) * p.a.samples;
    for (int64_t i = b * p.a.samples; i < end; i += V::size) {
      const int n = int(end - i < V::size ? end - i : V::size);
      const V activation = math::parametric_activation(load_partial(p.z + i, n, A(0)), p.a.sigmoid);
      for (int l = 0; l < n; ++l) {
        const A w = p.valid(i + l) ? p.class_weight(i + l) : A(0);
        const A value = p.valid(i + l) ? -w * activation[l] : A(0);
        if (loss) loss[i + l] = value;
        sum += double(value);
        weights += double(w);
      }
    }
    p.denominator[b] = A(weights);
    if (reduced) reduced[b] = A(p.a.reduction == Reduction::mean ? sum / weights : sum);
  }
}

template <class T>
void forward(const ParametricCrossEntropy& a) {
  const Problem<T> p{a};
  for_each<T>(
      p, [&](int64_t first, int n) { forward_rows(p, first, n); },
      [&](const Lanes<T>& lanes) { forward_lanes(lanes); });
  finish(p);
}

// dPhi[k] = sum of g log f over the samples of class k, in their order: no two threads share a row.
template <class T>
void phi_gradient(const Problem<T>& p, accumulate_t<T>* grad_phi) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t classes = p.a.classes;
  for (int64_t b = 0; b < p.a.models; ++b) {
    const int64_t first = b * p.a.samples;
    const Groups groups(p.a.labels + first, p.a.samples, classes);
    parallel_for(classes, grain_elements / (p.a.samples + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        A* out = grad_phi + (b * classes + k) * classes;
        const A* q = p.phi + b * p.a.phi_stride + k * classes;
        clear_row(out, classes);
        for (int64_t o = groups.offsets[k]; o < groups.offsets[k + 1]; ++o) {
          const int64_t i = first + groups.order[o];
          if (!p.valid(i)) continue;
          const A g = p.slopes(i, 1)[0], m = p.maximum[i], log_sum = p.log_sum[i];
          const T* x = p.logits + p.offset(i);
          for (int64_t c = 0; c < classes; c += V::size) {
            const int n = int(classes - c < V::size ? classes - c : V::size);
            const V f = (p.a.inner == 1 ? load_partial(x + c, n, A(0))
                                        : load_strided(x + c * p.a.inner, p.a.inner, n, A(0))) -
                        m - log_sum;
            const V masked =
                select((load_partial(q + c, n, A(0)) == A(0)) & (f == A(-INFINITY)), A(0), f * g);
            store_partial(out + c, load_partial(out + c, n, A(0)) + masked, n);
          }
        }
      }
    });
  }
}

template <class T>
void backward(const ParametricCrossEntropy& a) {
  using A = accumulate_t<T>;
  const Problem<T> p{a};
  T* grad_logits = static_cast<T*>(a.grad_logits);
  A* grad_phi = static_cast<A*>(a.grad_phi);
  A* grad_q = a.labels ? nullptr : grad_phi;
  if (grad_logits || grad_q)
    for_each<T>(
        p, [&](int64_t first, int n) { backward_rows(p, first, n, grad_logits, grad_q); },
        [&](const Lanes<T>& lanes) { backward_lanes(lanes, grad_logits, grad_q); });
  stream_fence();
  if (grad_phi && a.labels) phi_gradient(p, grad_phi);
}

}  // namespace

void parametric_cross_entropy_forward(const ParametricCrossEntropy& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void parametric_cross_entropy_backward(const ParametricCrossEntropy& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
