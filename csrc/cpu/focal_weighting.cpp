#include "math/focal_weighting.h"

#include "cpu/pairs.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

// The typed view of the arguments.
template <class T>
struct Problem {
  using A = accumulate_t<T>;

  const FocalWeighting& a;
  const T* x = static_cast<const T*>(a.embeddings);
  const A* phi = static_cast<const A*>(a.phi);
  A offset = A(a.offset);
  A* distances = static_cast<A*>(a.statistics);
  A* log_sums = distances + a.count * a.count;  // [2, count]
  A* entropies = log_sums + 2 * a.count;        // [2, count]
  A* loss = static_cast<A*>(a.loss);
  const A* grad = static_cast<const A*>(a.grad);

  A gradient(int64_t row) const {
    if (a.reduction == Reduction::none) return grad[row];
    return a.reduction == Reduction::mean ? grad[0] / A(a.count) : grad[0];
  }
};

// The sums of exp(s - m) and of (s - m) exp(s - m), relative to the maximum m of s and 0 so that nothing overflows.
template <class A>
struct LogSum {
  A maximum;
  Vec<A> sum{A(0)}, moment{A(0)};

  LOSSMETA_SIMD void add(Vec<A> s, Mask<A> left_out) {
    const Vec<A> below = s - maximum, e = select(left_out, A(0), exp_bounded(below));
    sum += e;
    moment += select(e == A(0), A(0), e * below);
  }

  // total is NaN if a distance is: an infinite maximum alone makes the loss infinite.
  math::FocalStatistics<A> finish(A total) const {
    auto result = math::focal_statistics(maximum, reduce_add(sum), reduce_add(moment));
    if (maximum == A(INFINITY)) result.log_sum = maximum + total;
    return result;
  }
};

template <class T>
void forward(const FocalWeighting& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const Problem<T> p{a};
  const int64_t count = a.count;
  const Embeddings<A> x(p.x, count, a.dims);
  pair_distances(x, p.distances);
  const Classes<A> classes(a.labels, count);
  const V nothing(A(-INFINITY));
  parallel_for(count, pair_grain / (16 * count + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const A* d = p.distances + row * count;
      const A own = classes.id[row];
      V farthest = nothing, nearest = V(A(INFINITY));
      A total = 0;
      classes.for_each_positive(row, [&](const int64_t* others, int n) {
        farthest = max(load_indexed(d, others, n, A(-INFINITY)), farthest);
        for (int i = 0; i < n; ++i) total += d[others[i]] == d[others[i]] ? A(0) : A(NAN);
      });
      for (int64_t b = 0; b < count; b += V::size) {
        const int n = int(count - b < V::size ? count - b : V::size);
        const Mask<A> same = load_partial(classes.id.data() + b, n, own) == own;
        nearest = min(select(same, A(INFINITY), load_partial(d + b, n, A(0))), nearest);
      }
      const A strongest = p.phi[0] * (reduce_max(farthest) - p.offset);
      const A weakest = -p.phi[1] * (-reduce_max(-nearest) - p.offset);
      LogSum<A> positive{strongest > A(0) ? strongest : A(0)}, negative{weakest > A(0) ? weakest : A(0)};
      classes.for_each_positive(row, [&](const int64_t* others, int n) {
        const V distance = load_indexed(d, others, n, A(-INFINITY));
        positive.add((distance - p.offset) * p.phi[0], distance == nothing);
      });
      for (int64_t b = 0; b < count; b += V::size) {
        const int n = int(count - b < V::size ? count - b : V::size);
        const Mask<A> same = load_partial(classes.id.data() + b, n, own) == own;
        negative.add((load_partial(d + b, n, A(0)) - p.offset) * -p.phi[1], same);
      }
      const auto near = positive.finish(total), far = negative.finish(A(0));
      p.log_sums[row] = near.log_sum, p.log_sums[count + row] = far.log_sum;
      p.entropies[row] = near.entropy, p.entropies[count + row] = far.entropy;
      if (a.reduction == Reduction::none)
        p.loss[row] = math::focal_loss(p.phi, p.log_sums[row], p.log_sums[count + row]);
    }
  });
  if (a.reduction == Reduction::none) return;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += double(math::focal_loss(p.phi, p.log_sums[i], p.log_sums[count + i]));
  p.loss[0] = A(a.reduction == Reduction::mean && count > 0 ? sum / double(count) : sum);
}

template <class T>
void backward(const FocalWeighting& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const Problem<T> p{a};
  const int64_t count = a.count;
  if (a.grad_phi) {
    double sums[2] = {0, 0};
    for (int64_t i = 0; i < count; ++i)
      for (int side = 0; side < 2; ++side)
        sums[side] +=
            double(p.gradient(i) * math::focal_phi_slope(p.phi[side], p.entropies[side * count + i]));
    for (int side = 0; side < 2; ++side) static_cast<A*>(a.grad_phi)[side] = A(sums[side]);
  }
  if (!a.grad_embeddings) return;
  const Embeddings<A> x(p.x, count, a.dims);
  const Classes<A> classes(a.labels, count);
  // A pair weighs exp(s - L) in the loss of either of its embeddings as the anchor.
  const A *positive = p.log_sums, *negative = p.log_sums + count;
  Buffer<A> gradients(count);
  for (int64_t i = 0; i < count; ++i) gradients[i] = p.gradient(i);
  const auto fill_row = [&](int64_t row, A* weights) {
    const A *d = p.distances + row * count, g = gradients[row], own = classes.id[row];
    for (int64_t b = 0; b < count; b += V::size) {
      const int n = int(count - b < V::size ? count - b : V::size);
      const V distance = load_partial(d + b, n, A(1)), s = (distance - p.offset) * -p.phi[1];
      const V weight =
          exp_bounded(s - negative[row]) * g +
          exp_bounded(s - load_partial(negative + b, n, A(0))) * load_partial(gradients.data() + b, n, A(0));
      const Mask<A> left_out = (load_partial(classes.id.data() + b, n, own) == own) | (distance == A(0));
      store_partial(weights + b, select(left_out, A(0), -weight / distance), n);
    }
    classes.for_each_positive(row, [&](const int64_t* others, int n) {
      const V distance = load_indexed(d, others, n, A(1)), s = (distance - p.offset) * p.phi[0];
      const V weight =
          exp_bounded(s - positive[row]) * g + exp_bounded(s - load_indexed(positive, others, n, A(0))) *
                                                   load_indexed(gradients.data(), others, n, A(0));
      const V pull = select(distance == A(0), A(0), weight / distance);
      for (int i = 0; i < n; ++i) weights[others[i]] = pull[i];
    });
  };
  pair_gradient(x, static_cast<T*>(a.grad_embeddings), [&](int64_t first, int rows, A* weights) {
    for (int r = 0; r < rows; ++r) fill_row(first + r, weights + r * count);
  });
}

}  // namespace

void focal_weighting_forward(const FocalWeighting& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void focal_weighting_backward(const FocalWeighting& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
