#include "math/distance_mixture.h"

#include "cpu/pairs.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t chunk =
    1024;  // triplets whose partial sums are formed together, whatever the number of threads

template <class A>
LOSSMETA_SIMD Mask<A> first_lanes(int n) {
  A lanes[Vec<A>::size];
  for (int i = 0; i < Vec<A>::size; ++i) lanes[i] = A(i);
  return load(lanes) < A(n);
}

// The typed view of the arguments.
template <class T>
struct Problem {
  using A = accumulate_t<T>;
  using V = Vec<A>;

  const DistanceMixture& a;
  const T* x = static_cast<const T*>(a.embeddings);
  const A* phi = static_cast<const A*>(a.phi);
  A* statistics = static_cast<A*>(a.statistics);
  A* positives = statistics + a.count * a.count;  // with labels
  A* negatives = positives + a.count;
  A* loss = static_cast<A*>(a.loss);
  A* terms = static_cast<A*>(a.terms);
  const A* grad_loss = static_cast<const A*>(a.grad_loss);
  const A* grad_terms = static_cast<const A*>(a.grad_terms);

  A min_distance() const { return A(a.min_distance); }

  // Gradients for one triplet: of its loss, if that is reduced, and of each F through the terms.
  A shared_gradient(A triplets) const {
    if (!grad_loss || a.reduction == Reduction::none || triplets == A(0)) return A(0);
    return a.reduction == Reduction::mean ? grad_loss[0] / triplets : grad_loss[0];
  }
  A term_gradient(int i, A triplets) const {
    return grad_terms && triplets != A(0) ? grad_terms[i] / triplets : A(0);
  }

  // The means of F, and the reduced loss: both from the sums of F over the triplets.
  void finish(const double* sums,  // [10]
              double triplets) const {
    double mixed = 0;
    for (int i = 0; i < 10; ++i) {
      mixed += math::weighted_distance(double(phi[i]), sums[i]);
      terms[i] = triplets == 0 ? A(0) : A(sums[i] / triplets);
    }
    if (a.reduction == Reduction::sum) loss[0] = A(mixed);
    if (a.reduction == Reduction::mean) loss[0] = triplets == 0 ? A(0) : A(mixed / triplets);
  }
};

template <class V>
LOSSMETA_SIMD V mixture(const typename V::Element* phi,  // [5]
                        const V (&f)[5]) {
  V sum(typename V::Element(0));
  for (int i = 0; i < 5; ++i) sum += math::weighted_distance(V(phi[i]), f[i]);
  return sum;
}

// Adds g times the pair's F to the gradient of each coefficient.
template <class V>
LOSSMETA_SIMD void add_coefficient_gradients(const typename V::Element* phi,  // [5]
                                             V g, const V (&f)[5], V* sums) {
  for (int i = 0; i < 5; ++i) sums[i] += math::coefficient_gradient(V(phi[i]), g, f[i]);
}

template <class A>
void sum_rows(const A* partial,  // [rows, 10]
              int64_t rows, double* sums) {
  for (int i = 0; i < 10; ++i) sums[i] = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int i = 0; i < 10; ++i) sums[i] += double(partial[r * 10 + i]);
}

template <class A>
void store_gradient(const double* sums,  // [10]
                    A* grad_phi) {
  for (int i = 0; i < 10; ++i) grad_phi[i] = A(sums[i]);
}

// ---- Triplets.

// Whether all pairs of embeddings are fewer than those that the triplets name, at their price in bulk.
inline bool dense(const DistanceMixture& a) { return a.count * a.count <= 8 * a.triplet_count; }

template <class T>
void forward_triplets(const Problem<T>& p) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const DistanceMixture& a = p.a;
  const int64_t triplets = a.triplet_count, chunks = (triplets + chunk - 1) / chunk;
  const Embeddings<A> x(p.x, a.count, a.dims);
  const bool table = dense(a);
  Buffer<A> all(table ? a.count * a.count : 0), partial(chunks * 10);
  if (table) pair_distances(x, all.data());
  A *positive = p.statistics, *negative = p.statistics + triplets;
  parallel_for(chunks, table ? 4 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t last = (c + 1) * chunk < triplets ? (c + 1) * chunk : triplets;
      for (int64_t t = c * chunk; t < last; ++t) {
        const int64_t* triplet = a.triplets + 3 * t;
        positive[t] = table ? all[triplet[0] * a.count + triplet[1]] : x.distance(triplet[0], triplet[1]);
        negative[t] = table ? all[triplet[0] * a.count + triplet[2]] : x.distance(triplet[0], triplet[2]);
      }
      V sums[10];
      for (V& sum : sums) sum = V(A(0));
      for (int64_t t = c * chunk; t < last; t += V::size) {
        const int n = int(last - t < V::size ? last - t : V::size);
        const Mask<A> live = first_lanes<A>(n);
        const auto near = math::increasing_distances(load_partial(positive + t, n, A(1)));
        const auto far = math::decreasing_distances(load_partial(negative + t, n, A(1)), V(p.min_distance()));
        for (int i = 0; i < 5; ++i) {
          sums[i] += select(live, near.value[i], A(0));
          sums[5 + i] += select(live, far.value[i], A(0));
        }
        if (a.reduction == Reduction::none)
          store_partial(p.loss + t, mixture(p.phi, near.value) + mixture(p.phi + 5, far.value), n);
      }
      for (int i = 0; i < 10; ++i) partial[c * 10 + i] = reduce_add(sums[i]);
    }
  });
  double sums[10];
  sum_rows(partial.data(), chunks, sums);
  p.finish(sums, double(triplets));
}

template <class T>
void backward_triplets(const Problem<T>& p) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const DistanceMixture& a = p.a;
  const int64_t triplets = a.triplet_count, chunks = (triplets + chunk - 1) / chunk;
  const A *positive = p.statistics, *negative = p.statistics + triplets;
  // The weights of (anchor - positive) and of (anchor - negative) in the gradient of the anchor.
  Buffer<A> pulls(2 * triplets), partial(chunks * 10);
  A *pull_positive = pulls.data(), *pull_negative = pull_positive + triplets;
  const A shared = p.shared_gradient(A(triplets));
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t last = (c + 1) * chunk < triplets ? (c + 1) * chunk : triplets;
      V sums[10];
      for (V& sum : sums) sum = V(A(0));
      for (int64_t t = c * chunk; t < last; t += V::size) {
        const int n = int(last - t < V::size ? last - t : V::size);
        const auto near = math::increasing_distances(load_partial(positive + t, n, A(1)));
        const auto far = math::decreasing_distances(load_partial(negative + t, n, A(1)), V(p.min_distance()));
        V g = select(first_lanes<A>(n), V(shared), A(0));
        if (p.grad_loss && a.reduction == Reduction::none) g = load_partial(p.grad_loss + t, n, A(0));
        V near_pull(A(0)), far_pull(A(0));
        for (int i = 0; i < 5; ++i) {
          near_pull += math::weighted_distance(g * p.phi[i] + p.term_gradient(i, A(triplets)), near.pull[i]);
          far_pull +=
              math::weighted_distance(g * p.phi[5 + i] + p.term_gradient(5 + i, A(triplets)), far.pull[i]);
        }
        store_partial(pull_positive + t, near_pull, n);
        store_partial(pull_negative + t, far_pull, n);
        if (a.grad_phi) {
          add_coefficient_gradients(p.phi, g, near.value, sums);
          add_coefficient_gradients(p.phi + 5, g, far.value, sums + 5);
        }
      }
      for (int i = 0; i < 10; ++i) partial[c * 10 + i] = reduce_add(sums[i]);
    }
  });
  if (a.grad_phi) {
    double sums[10];
    sum_rows(partial.data(), chunks, sums);
    store_gradient(sums, static_cast<A*>(a.grad_phi));
  }
  if (!a.grad_embeddings) return;

  T* grad = static_cast<T*>(a.grad_embeddings);
  const Embeddings<A> x(p.x, a.count, a.dims);
  if (dense(a)) {
    // Pulls by anchor and other; a range of anchors adds its own in the order of the triplets.
    Buffer<A> pull(a.count * a.count);
    parallel_for(a.count, pair_grain / (8 * triplets + 1) * a.count + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * a.count; i < end * a.count; ++i) pull[i] = A(0);
      for (int64_t t = 0; t < triplets; ++t) {
        const int64_t* triplet = a.triplets + 3 * t;
        if (triplet[0] < begin || triplet[0] >= end) continue;
        pull[triplet[0] * a.count + triplet[1]] += pull_positive[t];
        pull[triplet[0] * a.count + triplet[2]] += pull_negative[t];
      }
    });
    return pull_gradient(x, pull.data(), grad);
  }
  // Entry 3 t + role of the flattened triplets, grouped by embedding: each collects its own.
  const Groups groups(a.triplets, 3 * triplets, a.count);
  constexpr int vectors = 4;  // sums held in registers
  parallel_for(a.count, pair_grain / (4 * triplets * (a.dims + 1) / (a.count + 1) + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row)
                   for (int64_t k = 0; k < x.stride; k += vectors * V::size) {
                     const int used =
                         int(x.stride - k < vectors * V::size ? (x.stride - k) / V::size : vectors);
                     V sum[vectors];
                     for (V& s : sum) s = V(A(0));
                     const auto add = [&](int64_t other, A pull) {
                       const A *own = x.row(row) + k, *its = x.row(other) + k;
                       if (pull == A(0)) return;  // 0 times an infinite difference would be NaN
                       if (used == vectors)
                         for (int v = 0; v < vectors; ++v)
                           sum[v] += pull * (load(own + v * V::size) - load(its + v * V::size));
                       else
                         for (int v = 0; v < used; ++v)
                           sum[v] += pull * (load(own + v * V::size) - load(its + v * V::size));
                     };
                     for (int64_t o = groups.offsets[row]; o < groups.offsets[row + 1]; ++o) {
                       const int64_t t = groups.order[o] / 3, role = groups.order[o] % 3;
                       const int64_t* triplet = a.triplets + 3 * t;
                       if (role == 0)
                         add(triplet[1], pull_positive[t]), add(triplet[2], pull_negative[t]);
                       else
                         add(triplet[0], role == 1 ? pull_positive[t] : pull_negative[t]);
                     }
                     for (int v = 0; v < used; ++v) {
                       const int64_t at = k + v * V::size;
                       store_partial(grad + row * a.dims + at, sum[v],
                                     int(a.dims - at < V::size ? a.dims - at : V::size));
                     }
                   }
               });
}

// ---- Labels: all valid triplets.

template <class T>
void forward_labels(const Problem<T>& p) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const DistanceMixture& a = p.a;
  const int64_t count = a.count;
  const Embeddings<A> x(p.x, count, a.dims);
  pair_distances(x, p.statistics);
  const Classes<A> classes(a.labels, count);
  double triplets = 0;
  for (int64_t i = 0; i < count; ++i) {
    p.positives[i] = A(classes.size(i) - 1);
    p.negatives[i] = A(count - classes.size(i));
    triplets += double(p.positives[i]) * double(p.negatives[i]);
  }
  p.statistics[count * count + 2 * count] = A(triplets);

  Buffer<A> sums(count * 10);  // for each anchor the sums over its triplets
  parallel_for(count, pair_grain / (16 * count + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const A* d = p.statistics + row * count;
      V sum[10];
      for (V& s : sum) s = V(A(0));
      classes.for_each_positive(row, [&](const int64_t* others, int n) {
        const auto near = math::increasing_distances(load_indexed(d, others, n, A(0)));
        for (int i = 0; i < 5; ++i) sum[i] += near.value[i];
      });
      const A own = classes.id[row];
      for (int64_t b = 0; b < count; b += V::size) {
        const int n = int(count - b < V::size ? count - b : V::size);
        const auto far = math::decreasing_distances(load_partial(d + b, n, A(1)), V(p.min_distance()));
        const Mask<A> same = load_partial(classes.id.data() + b, n, own) == own;
        for (int i = 0; i < 5; ++i) sum[5 + i] += select(same, A(0), far.value[i]);
      }
      A* out = sums.data() + row * 10;
      const A positives = p.positives[row], negatives = p.negatives[row];
      A mixed = 0;
      for (int i = 0; i < 10; ++i) {
        const A times = i < 5 ? negatives : positives;
        out[i] = times == A(0) ? A(0) : times * reduce_add(sum[i]);
        mixed += math::weighted_distance(p.phi[i], out[i]);
      }
      if (a.reduction == Reduction::none) p.loss[row] = mixed;
    }
  });
  double total[10];
  sum_rows(sums.data(), count, total);
  p.finish(total, triplets);
}

template <class T>
void backward_labels(const Problem<T>& p) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const DistanceMixture& a = p.a;
  const int64_t count = a.count;
  const Classes<A> classes(a.labels, count);
  const A triplets = p.statistics[count * count + 2 * count];
  const A shared = p.shared_gradient(triplets);
  // A pair occurs in the triplets of both its embeddings: gradient of the loss times how often, for each as the anchor.
  Buffer<A> near_gradient(count), far_gradient(count);
  for (int64_t i = 0; i < count; ++i) {
    const A g = p.grad_loss && a.reduction == Reduction::none ? p.grad_loss[i] : shared;
    const bool anchor = p.positives[i] != A(0) && p.negatives[i] != A(0);
    near_gradient[i] = anchor ? g * p.negatives[i] : A(0);
    far_gradient[i] = anchor ? g * p.positives[i] : A(0);
  }
  if (a.grad_phi) {
    Buffer<A> partial(count * 10);
    parallel_for(count, pair_grain / (16 * count + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const A* d = p.statistics + row * count;
        V sum[10];
        for (V& s : sum) s = V(A(0));
        classes.for_each_positive(row, [&](const int64_t* others, int n) {
          const auto near = math::increasing_distances(load_indexed(d, others, n, A(0)));
          add_coefficient_gradients(p.phi, V(near_gradient[row]), near.value, sum);
        });
        const A own = classes.id[row];
        for (int64_t b = 0; b < count; b += V::size) {
          const int n = int(count - b < V::size ? count - b : V::size);
          const auto far = math::decreasing_distances(load_partial(d + b, n, A(1)), V(p.min_distance()));
          const Mask<A> same = load_partial(classes.id.data() + b, n, own) == own;
          V value[5];
          for (int i = 0; i < 5; ++i) value[i] = select(same, A(0), far.value[i]);
          add_coefficient_gradients(p.phi + 5, V(far_gradient[row]), value, sum + 5);
        }
        for (int i = 0; i < 10; ++i) partial[row * 10 + i] = reduce_add(sum[i]);
      }
    });
    double sums[10];
    sum_rows(partial.data(), count, sums);
    store_gradient(sums, static_cast<A*>(a.grad_phi));
  }
  if (!a.grad_embeddings) return;

  const Embeddings<A> x(p.x, count, a.dims);
  A term[10];
  for (int i = 0; i < 10; ++i) term[i] = p.term_gradient(i, triplets);
  const auto fill_row = [&](int64_t row, A* weights) {
    const A* d = p.statistics + row * count;
    const A own = classes.id[row], own_positives = p.negatives[row] == A(0) ? A(0) : p.positives[row];
    for (int64_t b = 0; b < count; b += V::size) {
      const int n = int(count - b < V::size ? count - b : V::size);
      const auto far = math::decreasing_distances(load_partial(d + b, n, A(1)), V(p.min_distance()));
      const Mask<A> same = load_partial(classes.id.data() + b, n, own) == own;
      const V g = load_partial(far_gradient.data() + b, n, A(0)) + far_gradient[row];
      const V times = load_partial(p.positives + b, n, A(0)) + own_positives;
      V pull(A(0));
      for (int i = 0; i < 5; ++i)
        pull += math::weighted_distance(g * p.phi[5 + i] + times * term[5 + i], far.pull[i]);
      store_partial(weights + b, select(same, A(0), pull), n);
    }
    classes.for_each_positive(row, [&](const int64_t* others, int n) {
      const auto near = math::increasing_distances(load_indexed(d, others, n, A(0)));
      const V g = load_indexed(near_gradient.data(), others, n, A(0)) + near_gradient[row];
      V pull(A(0));
      for (int i = 0; i < 5; ++i)
        pull += math::weighted_distance(g * p.phi[i] + A(2) * p.negatives[row] * term[i], near.pull[i]);
      for (int i = 0; i < n; ++i) weights[others[i]] = pull[i];
    });
  };
  pair_gradient(x, static_cast<T*>(a.grad_embeddings), [&](int64_t first, int rows, A* weights) {
    for (int r = 0; r < rows; ++r) fill_row(first + r, weights + r * count);
  });
}

}  // namespace

void distance_mixture_forward(const DistanceMixture& a) {
  visit_dtype(a.dtype, [&](auto tag) {
    const Problem<typename decltype(tag)::type> p{a};
    a.labels ? forward_labels(p) : forward_triplets(p);
  });
}

void distance_mixture_backward(const DistanceMixture& a) {
  visit_dtype(a.dtype, [&](auto tag) {
    const Problem<typename decltype(tag)::type> p{a};
    a.labels ? backward_labels(p) : backward_triplets(p);
  });
}

}  // namespace lossmeta::LOSSMETA_ISA
