#include "math/adjusted_cross_entropy.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 14;   // below this a thread costs more than it saves
constexpr int64_t max_lanes_classes = 16;     // up to here lanes across rows beat lanes along the row
constexpr int64_t cached_bytes = 1 << 15;     // of the rows that are looked at twice
constexpr int64_t streamed_bytes = 16 << 20;  // a result of this size does not stay in the caches
constexpr int64_t summed_rows = 4096;         // of the slope, in each part of the gradient of the shift

// Of a group of samples of one model. Groups depend on N and C alone, and so do all sums.
struct Sums {
  double loss, exponent, smoothing;
};

// The typed view of the arguments.
template <class T>
struct Problem {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using S = slope_t<T>;

  const AdjustedCrossEntropy& a;
  const T* logits = static_cast<const T*>(a.logits);
  const A* shift = static_cast<const A*>(a.shift);
  const A* exponent = static_cast<const A*>(a.exponent);
  const A* smoothing = static_cast<const A*>(a.smoothing);
  S* slope = static_cast<S*>(a.slope);
  int64_t model_size = a.samples * a.classes;
  int64_t counted = 0;
  A share;

  explicit Problem(const AdjustedCrossEntropy& arguments) : a(arguments) {
    for (int64_t i = 0; i < a.samples; ++i) counted += counts(i);
    share = A(1.0 / double(counted));
  }

  bool counts(int64_t i) const {
    return uint64_t(a.labels[i]) < uint64_t(a.classes) && a.labels[i] != a.ignore_index;
  }
  const A* shift_of(int64_t model) const { return shift ? shift + model * a.classes : nullptr; }

  // Of n samples, one per lane, those that count: `used` is 1 for them and 0 for the others.
  LOSSMETA_SIMD math::AdjustedRow<V> finish(int64_t model, int n, V used, V sum, V d_label, V d_total,
                                            Sums& sums) const {
    const V q(exponent ? exponent[model] : A(0)), eps(smoothing ? smoothing[model] : A(0));
    const auto row = math::adjusted_row(sum, d_label, d_total, q, eps, V(A(a.classes)), V(share));
    sums = {};
    for (int l = 0; l < n; ++l) {
      if (used[l] == A(0)) continue;
      sums.loss += double(row.loss[l]);
      sums.exponent += double(row.exponent[l]);
      sums.smoothing += double(row.smoothing[l]);
    }
    return row;
  }
};

// ---- Lanes across the samples, for few classes.

template <class T>
void lanes(const Problem<T>& p, int64_t model, int64_t first, int n, Sums& sums) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using S = slope_t<T>;
  const int64_t classes = p.a.classes, width = (classes + V::size - 1) / V::size * V::size;
  const int64_t start = model * p.model_size + first * classes;
  const T* rows = p.logits + start;
  T copy[(V::size + 1) * max_lanes_classes];
  // The last rows are read in whole vectors too.
  if (start + (V::size - 1) * classes + width > p.a.models * p.model_size) {
    memset(copy, 0, sizeof copy);
    rows = static_cast<T*>(memcpy(copy, rows, size_t(n * classes) * sizeof(T)));
  }
  A labels[V::size], counted[V::size];
  for (int l = 0; l < V::size; ++l) {
    const bool counts = l < n && p.counts(first + l);
    labels[l] = counts ? A(p.a.labels[first + l]) : A(-1);
    counted[l] = counts ? A(1) : A(0);
  }
  const V label = load(labels), used = load(counted);

  V x[max_lanes_classes];
  for (int64_t c = 0; c < classes; c += V::size) {
    V block[V::size];
    for (int l = 0; l < V::size; ++l) block[l] = load(rows + l * classes + c);
    transpose(block);
    for (int l = 0; l < V::size; ++l) x[c + l] = block[l];
  }
  if (const A* shift = p.shift_of(model))
    for (int64_t c = 0; c < classes; ++c) x[c] += V(shift[c]);
  V m(-INFINITY);
  for (int64_t c = 0; c < classes; ++c) m = max(x[c], m);
  V sum(A(0)), d_label(A(0)), d_total(A(0));
  for (int64_t c = 0; c < classes; ++c) {
    const V d = x[c] - m;
    x[c] = exp_bounded(d);
    sum += x[c];
    d_total += d;
    d_label = select(label == A(c), d, d_label);
  }
  const auto row = p.finish(model, n, used, sum, d_label, d_total, sums);
  if (!p.slope) return;

  for (int64_t c = 0; c < classes; ++c) {
    const V value = x[c] * row.scale - row.rest - select(label == A(c), row.own, A(0));
    x[c] = select(used == A(0), A(0), value);
  }
  for (int64_t c = classes; c < width; ++c) x[c] = V(A(0));
  for (int64_t c = 0; c < classes; c += V::size) {
    V block[V::size];
    for (int l = 0; l < V::size; ++l) block[l] = x[c + l];
    transpose(block);
    for (int l = 0; l < V::size; ++l) x[c + l] = block[l];
  }
  // What a row's last vector writes into the next row is overwritten by that; not so beyond the group.
  S* out = p.slope + start;
  for (int l = 0; l < n; ++l)
    for (int64_t c = 0; c < classes; c += V::size) {
      S* to = out + l * classes + c;
      if (l * classes + c + V::size <= n * classes)
        store(to, x[c + l]);
      else
        store_partial(to, x[c + l], int(classes - c < V::size ? classes - c : V::size));
    }
}

// ---- Lanes along the classes. Of up to V::size rows, whose exponentials are kept, at a time: what follows the sums is
// vectorised.

template <class T>
int64_t rows_at_once(int64_t classes) {
  constexpr int64_t size = Vec<accumulate_t<T>>::size;
  const int64_t fitting = cached_bytes / (classes * int64_t(sizeof(accumulate_t<T>)));
  return fitting < 1 ? 1 : fitting < size ? fitting : size;
}

// A row of the slope: value(c, width) are the lanes of its elements from c on.
template <class S, class Value>
LOSSMETA_SIMD void write_row(S* out, int64_t classes, bool streams, const Value& value) {
  constexpr int size = Vec<accumulate_t<S>>::size;
  int64_t c = 0;
  if (streams) {
    c = int64_t(-(reinterpret_cast<uintptr_t>(out) / sizeof(S)) % size);
    if (c) store_partial(out, value(0, int(c)), int(c));
    for (; c + size <= classes; c += size) stream(out + c, value(c, size));
  } else {
    for (; c + size <= classes; c += size) store(out + c, value(c, size));
  }
  if (c < classes) store_partial(out + c, value(c, int(classes - c)), int(classes - c));
}

template <class T>
void rows(const Problem<T>& p, int64_t model, int64_t first, int n,
          accumulate_t<T>* buffer,  // [n, width]
          Sums& sums) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using S = slope_t<T>;
  const int64_t classes = p.a.classes, full = classes / V::size * V::size,
                width = (classes + V::size - 1) / V::size * V::size;
  const int rest = int(classes - full);
  const int64_t start = model * p.model_size + first * classes;
  const A* shift = p.shift_of(model);
  // What the exponentials are taken of: the logits as they are, or what the search for the maximum leaves in the buffer.
  const bool copies = sizeof(T) != sizeof(A) || shift;

  V tops[V::size];
  for (V& top : tops) top = V(-INFINITY);
  for (int r = 0; r < n; ++r) {
    const T* x = p.logits + start + r * classes;
    A* kept = buffer + r * width;
    V m0(-INFINITY), m1(-INFINITY);
    const auto look = [&](auto prepare) {
      int64_t c = 0;
      for (; c + 2 * V::size <= full; c += 2 * V::size)
        m0 = max(prepare(c), m0), m1 = max(prepare(c + V::size), m1);
      for (; c < full; c += V::size) m0 = max(prepare(c), m0);
    };
    if (shift)
      look([&](int64_t c) {
        const V y = load(x + c) + load(shift + c);
        store(kept + c, y);
        return y;
      });
    else if (copies)
      look([&](int64_t c) {
        const V y = load(x + c);
        store(kept + c, y);
        return y;
      });
    else
      look([&](int64_t c) { return load(x + c); });
    if (rest) {
      V y = load_partial(x + full, rest, A(-INFINITY));
      if (shift) y += load_partial(shift + full, rest, A(0));
      store(kept + full, y);
      m1 = max(y, m1);
    }
    tops[r] = max(m0, m1);
  }
  A maxima[V::size], d_labels[V::size], counted[V::size];
  store(maxima, reduce_max_rows(tops));

  V exponentials[V::size], totals[V::size];
  for (int r = 0; r < V::size; ++r) {
    exponentials[r] = totals[r] = V(A(0));
    const bool counts = r < n && p.counts(first + r);
    counted[r] = counts ? A(1) : A(0);
    d_labels[r] = A(0);
    if (!counts) continue;
    const T* x = p.logits + start + r * classes;
    const int64_t label = p.a.labels[first + r];
    const A m = maxima[r];
    d_labels[r] = math::load(x + label) + (shift ? shift[label] : A(0)) - m;
    A* kept = buffer + r * width;
    V sum(A(0)), total(A(0));
    const auto add = [&](auto prepared) {
      for (int64_t c = 0; c < full; c += V::size) {
        __builtin_prefetch(x + n * classes + c);
        const V d = prepared(c) - m, e = exp_bounded(d);
        store(kept + c, e);
        sum += e;
        total += d;
      }
    };
    if (copies)
      add([&](int64_t c) { return load(kept + c); });
    else
      add([&](int64_t c) { return load(x + c); });
    if (rest) {
      const V e = exp_bounded(load(kept + full) - m);
      total += load_partial(kept + full, rest, m) - m;
      store(kept + full, e);
      sum += e;
    }
    exponentials[r] = sum;
    totals[r] = total;
  }
  const auto row = p.finish(model, n, load(counted), reduce_add_rows(exponentials), load(d_labels),
                            reduce_add_rows(totals), sums);
  if (!p.slope) return;

  const bool streams =
      p.a.models * p.model_size * int64_t(sizeof(S)) >= streamed_bytes && classes > 4 * V::size;
  for (int r = 0; r < n; ++r) {
    S* out = p.slope + start + r * classes;
    if (counted[r] == A(0)) {
      for (int64_t c = 0; c < classes; ++c) math::store(out + c, A(0));
      continue;
    }
    const int64_t label = p.a.labels[first + r];
    const A* kept = buffer + r * width;
    const A scale = row.scale[r], less = row.rest[r], own = row.own[r];
    write_row(out, classes, streams, [&](int64_t c, int lanes) {
      V value = (lanes == V::size ? load(kept + c) : load_partial(kept + c, lanes, A(0))) * scale - less;
      if (uint64_t(label - c) < uint64_t(V::size)) {
        A elements[V::size];
        store(elements, value);
        elements[label - c] -= own;
        value = load(elements);
      }
      return value;
    });
  }
}

template <class T>
void forward(const AdjustedCrossEntropy& a) {
  using A = accumulate_t<T>;
  constexpr int64_t size = Vec<A>::size;
  const Problem<T> p(a);
  const bool few = a.classes <= max_lanes_classes;
  const int64_t block = few ? size : rows_at_once<T>(a.classes), per_model = (a.samples + block - 1) / block,
                count = a.models * per_model;
  const Buffer<Sums> sums(count);
  const auto each = [&](int64_t k, const auto& group) {
    const int64_t first = k % per_model * block, left = a.samples - first;
    group(k / per_model, first, int(left < block ? left : block), sums[k]);
  };
  const int64_t grain = grain_elements / (a.classes * block) + 1;
  if (few) {
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        each(k, [&](int64_t model, int64_t first, int n, Sums& to) { lanes(p, model, first, n, to); });
    });
  } else if (count > 0) {
    const int64_t width = (a.classes + size - 1) / size * size, workers = worker_count(count, grain);
    const WorkerBuffer<A> buffers(workers, block * width);
    parallel_for_workers(count, workers, [&](int64_t worker, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        each(k, [&](int64_t model, int64_t first, int n, Sums& to) {
          rows(p, model, first, n, buffers[worker], to);
        });
    });
    stream_fence();
  }
  A* loss = static_cast<A*>(a.loss);
  A* derivatives = static_cast<A*>(a.derivatives);
  for (int64_t b = 0; b < a.models; ++b) {
    Sums all{};
    for (int64_t k = b * per_model; k < (b + 1) * per_model; ++k) {
      all.loss += sums[k].loss;
      all.exponent += sums[k].exponent;
      all.smoothing += sums[k].smoothing;
    }
    // Where nothing counts the loss is 0 / 0, and its derivatives are 0.
    const double count = double(p.counted), divisor = p.counted ? count : 1.0;
    loss[b] = A(all.loss / count);
    derivatives[b] = A(all.exponent / divisor);
    derivatives[a.models + b] = A(all.smoothing / divisor);
  }
}

// ---- Backward.

template <class T>
void scale(const AdjustedCrossEntropy& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const slope_t<T>* slope = static_cast<const slope_t<T>*>(a.slope);
  const A* grad = static_cast<const A*>(a.grad);
  T* out = static_cast<T*>(a.grad_logits);
  const int64_t model_size = a.samples * a.classes, total = a.models * model_size;
  const bool streams = total * int64_t(sizeof(T)) >= streamed_bytes;
  parallel_for(total, grain_elements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t model = begin / model_size, next = (model + 1) * model_size,
                    count = (next < end ? next : end) - begin;
      const slope_t<T>* from = slope + begin;
      const A g = grad[model];
      write_row(out + begin, count, streams && count > V::size, [&](int64_t c, int lanes) {
        return (lanes == V::size ? load(from + c) : load_partial(from + c, lanes, A(0))) * g;
      });
      begin += count;
    }
  });
  stream_fence();
}

// Sums over the samples, by parts of fixed size.
template <class T>
void sum_shift(const AdjustedCrossEntropy& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int together = 4, columns = together * V::size;
  constexpr int64_t chunk = 128;  // rows that are added up before they are widened
  const slope_t<T>* slope = static_cast<const slope_t<T>*>(a.slope);
  const A* grad = static_cast<const A*>(a.grad);
  A* out = static_cast<A*>(a.grad_shift);
  const int64_t tiles = (a.classes + columns - 1) / columns,
                parts = (a.samples + summed_rows - 1) / summed_rows;
  const Buffer<double> partial(a.models * parts * a.classes);
  parallel_for(a.models * parts * tiles, grain_elements / (summed_rows * columns) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k) {
                   const int64_t tile = k % tiles * columns, part = k / tiles % parts,
                                 model = k / tiles / parts;
                   const int used = int(a.classes - tile < columns ? a.classes - tile : columns);
                   const int64_t first = part * summed_rows,
                                 last = first + summed_rows < a.samples ? first + summed_rows : a.samples;
                   double totals[columns] = {};
                   for (int64_t row = first; row < last; row += chunk) {
                     V sums[together];
                     for (V& sum : sums) sum = V(A(0));
                     for (int64_t i = row; i < last && i < row + chunk; ++i) {
                       const slope_t<T>* x = slope + (model * a.samples + i) * a.classes + tile;
                       for (int v = 0; v < together; ++v) {
                         const int left = used - v * V::size;
                         if (left >= V::size)
                           sums[v] += load(x + v * V::size);
                         else if (left > 0)
                           sums[v] += load_partial(x + v * V::size, left, A(0));
                       }
                     }
                     for (int c = 0; c < columns; ++c) totals[c] += double(sums[c / V::size][c % V::size]);
                   }
                   for (int c = 0; c < used; ++c)
                     partial[(model * parts + part) * a.classes + tile + c] = totals[c];
                 }
               });
  for (int64_t b = 0; b < a.models; ++b)
    for (int64_t c = 0; c < a.classes; ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[(b * parts + part) * a.classes + c];
      out[b * a.classes + c] = A(total * double(grad[b]));
    }
}

template <class T>
void backward(const AdjustedCrossEntropy& a) {
  using A = accumulate_t<T>;
  if (a.grad_logits) scale<T>(a);
  if (a.grad_shift) sum_shift<T>(a);
  const A* grad = static_cast<const A*>(a.grad);
  const A* derivatives = static_cast<const A*>(a.derivatives);
  A* const out[] = {static_cast<A*>(a.grad_exponent), static_cast<A*>(a.grad_smoothing)};
  for (int k = 0; k < 2; ++k)
    for (int64_t b = 0; out[k] && b < a.models; ++b) out[k][b] = grad[b] * derivatives[k * a.models + b];
}

}  // namespace

void adjusted_cross_entropy_forward(const AdjustedCrossEntropy& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void adjusted_cross_entropy_backward(const AdjustedCrossEntropy& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
