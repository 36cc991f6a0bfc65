// The rows around the loss network or its table: the link, the loss of a row and its slope, and their
// derivatives.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "math/loss_network.h"

namespace lossmeta::LOSSMETA_ISA {

constexpr int64_t tile_elements = 512;  // of a tile: whole rows, or a piece of one

// The first n lanes.
template <class T>
LOSSMETA_SIMD Vec<accumulate_t<T>> load_some(const T* p, int n, accumulate_t<T> fill = 0) {
  return n == Vec<accumulate_t<T>>::size ? load(p) : load_partial(p, n, fill);
}
template <class T>
LOSSMETA_SIMD void store_some(T* p, Vec<accumulate_t<T>> x, int n) {
  n == x.size ? store(p, x) : store_partial(p, x, n);
}

// Elements whose network input is in place: f [count] with its targets y, both padded to whole vectors.
template <class A>
struct alignas(64) Tile {
  A f[tile_elements], y[tile_elements];
  int64_t count;
  int64_t
      own[tile_elements];  // positions of the elements that are their row's class, where targets are indices
  int64_t own_count;
};

// The typed view of the arguments, and the link.
template <class T>
struct Rows {
  using A = accumulate_t<T>;
  using V = Vec<A>;

  const LossNetwork& a;
  const int64_t classes = a.classes;
  const T* pred = static_cast<const T*>(a.pred);
  const A* target = static_cast<const A*>(a.target);
  const A* grad_loss = static_cast<const A*>(a.grad_loss);
  const A* grad_slope = static_cast<const A*>(a.grad_slope);
  A inverse_classes = A(1) / A(a.classes);

  bool ignored(int64_t n) const { return a.labels && a.labels[n] == a.ignore_index; }
  int64_t rows_per_tile() const { return classes <= tile_elements ? tile_elements / classes : 1; }

  // Calls f(offset, n) for the row's vectors, the last with n < V::size lanes.
  template <class F>
  LOSSMETA_SIMD static void for_vectors(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) f(i, V::size);
    if (i < count) f(i, int(count - i));
  }

  // softmax = e^(x - maximum) * scale.
  struct Softmax {
    A maximum, scale;
  };
  Softmax softmax(int64_t n) const {
    const T* x = pred + n * classes;
    V m(-INFINITY), sum(A(0));
    for_vectors(classes, [&](int64_t j, int lanes) { m = max(load_some(x + j, lanes, A(-INFINITY)), m); });
    const A maximum = reduce_max(m);
    for_vectors(classes,
                [&](int64_t j, int lanes) { sum += exp(load_some(x + j, lanes, A(-INFINITY)) - maximum); });
    return {maximum, A(1) / reduce_add(sum)};
  }
  LOSSMETA_SIMD V probability(const Softmax& s, const T* x, int lanes) const {
    return exp(load_some(x, lanes, A(-INFINITY)) - s.maximum) * s.scale;
  }
};

// Puts columns [begin, begin + columns) of rows [first, first + rows) in place. An ignored row is 0
// everywhere.
template <class T>
void fill(const Rows<T>& p, int64_t first, int64_t rows, int64_t begin, int64_t columns,
          const typename Rows<T>::Softmax* known, Tile<accumulate_t<T>>& tile) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t padded = (rows * columns + V::size - 1) / V::size * V::size;
  tile.count = rows * columns;
  tile.own_count = 0;
  for (int64_t i = tile.count; i < padded; ++i) tile.f[i] = A(0);
  for (int64_t i = p.a.labels ? 0 : tile.count; i < padded; ++i) tile.y[i] = A(0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r;
    A *f = tile.f + r * columns, *y = tile.y + r * columns;
    const T* x = p.pred + n * p.classes + begin;
    if (p.ignored(n)) {
      for (int64_t j = 0; j < columns; ++j) f[j] = A(0);
      continue;
    }
    if (!p.a.softmax) {
      p.for_vectors(columns,
                    [&](int64_t j, int lanes) { store_some(f + j, load_some(x + j, lanes), lanes); });
    } else if (known) {
      p.for_vectors(columns, [&](int64_t j, int lanes) {
        store_some(f + j, p.probability(*known, x + j, lanes), lanes);
      });
    } else {
      V m(-INFINITY), sum(A(0));
      p.for_vectors(columns,
                    [&](int64_t j, int lanes) { m = max(load_some(x + j, lanes, A(-INFINITY)), m); });
      const A maximum = reduce_max(m);
      p.for_vectors(columns, [&](int64_t j, int lanes) {
        const V e = exp(load_some(x + j, lanes, A(-INFINITY)) - maximum);
        sum += e;
        store_some(f + j, e, lanes);
      });
      const A scale = A(1) / reduce_add(sum);
      p.for_vectors(columns,
                    [&](int64_t j, int lanes) { store_some(f + j, load_some(f + j, lanes) * scale, lanes); });
    }
    if (p.a.labels) {
      const int64_t label = p.a.labels[n] - begin;
      if (label >= 0 && label < columns) {
        y[label] = A(1);
        tile.own[tile.own_count++] = r * columns + label;
      }
    } else {
      const A* t = p.target + n * p.classes + begin;
      for (int64_t j = 0; j < columns; ++j) y[j] = t[j];
    }
  }
}

// ---- Labels on their own, with the sigmoid link: a row has one element, and a tile as many rows as it holds.

template <class T, class F>
void for_ignored(const Rows<T>& p, int64_t first, int64_t count, const F& f) {
  if (!p.a.labels) return;
  for (int64_t i = 0; i < count; ++i)
    if (p.ignored(first + i)) f(i);
}

// Puts labels [first, first + count) in place, with d = sigmoid'(x). An ignored one is 0.
template <class T>
void fill_labels(const Rows<T>& p, int64_t first, int64_t count, Tile<accumulate_t<T>>& tile,
                 accumulate_t<T>* d) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  tile.count = count;
  tile.own_count = 0;
  for (int64_t i = count; i < (count + V::size - 1) / V::size * V::size; ++i) tile.f[i] = tile.y[i] = A(0);
  p.for_vectors(count, [&](int64_t j, int lanes) {
    const auto s = math::sigmoid<A>(load_some(p.pred + first + j, lanes));
    store_some(tile.f + j, s.value, lanes);
    store_some(d + j, s.slope, lanes);
  });
  if (!p.a.labels) {
    for (int64_t i = 0; i < count; ++i) tile.y[i] = p.target[first + i];
    return;
  }
  for (int64_t i = 0; i < count; ++i) tile.y[i] = A(p.a.labels[first + i] == 1);
  for_ignored(p, first, count, [&](int64_t i) { tile.f[i] = d[i] = A(0); });
}

template <class T, class Evaluator>
void forward_labels(const Rows<T>& p, int64_t begin, int64_t end, const Evaluator& evaluate) {
  using A = accumulate_t<T>;
  Tile<A> tile;
  alignas(64) A values[tile_elements], slopes[tile_elements], d[tile_elements];
  for (int64_t first = begin; first < end; first += tile_elements) {
    const int64_t count = end - first < tile_elements ? end - first : tile_elements;
    A *loss = static_cast<A*>(p.a.loss) + first, *slope = static_cast<A*>(p.a.slope) + first;
    fill_labels(p, first, count, tile, d);
    evaluate(tile, values, slopes);
    p.for_vectors(count, [&](int64_t j, int lanes) {
      store_some(loss + j, load_some(values + j, lanes), lanes);
      store_some(slope + j, load_some(slopes + j, lanes) * load_some(d + j, lanes), lanes);
    });
    for_ignored(p, first, count, [&](int64_t i) { loss[i] = slope[i] = A(0); });
  }
}

// ---- Forward. Evaluator: network or table, evaluate(tile, values, slopes).

template <class T, class Evaluator>
void forward_rows(const Rows<T>& p, int64_t begin, int64_t end, const Evaluator& evaluate) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  if (p.a.sigmoid) return forward_labels(p, begin, end, evaluate);
  const int64_t classes = p.classes;
  Tile<A> tile;
  alignas(64) A values[tile_elements], slopes[tile_elements];
  A *loss = static_cast<A*>(p.a.loss), *slope = static_cast<A*>(p.a.slope);

  if (classes <= tile_elements) {
    for (int64_t first = begin, rows = p.rows_per_tile(); first < end; first += rows) {
      if (rows > end - first) rows = end - first;
      fill(p, first, rows, 0, classes, nullptr, tile);
      evaluate(tile, values, slopes);
      for (int64_t r = 0; r < rows; ++r) {
        const A *l = values + r * classes, *g = slopes + r * classes, *f = tile.f + r * classes;
        A* out = slope + (first + r) * classes;
        if (p.ignored(first + r)) {
          loss[first + r] = A(0);
          for (int64_t j = 0; j < classes; ++j) out[j] = A(0);
          continue;
        }
        V total(A(0)), mean(A(0));
        p.for_vectors(classes, [&](int64_t j, int lanes) {
          total += load_some(l + j, lanes);
          mean += load_some(f + j, lanes) * load_some(g + j, lanes);
        });
        loss[first + r] = reduce_add(total) * p.inverse_classes;
        const A g_mean = reduce_add(mean);
        p.for_vectors(classes, [&](int64_t j, int lanes) {
          const V gj = load_some(g + j, lanes);
          const V s = p.a.softmax ? load_some(f + j, lanes) * (gj - g_mean) : gj;
          store_some(out + j, s * p.inverse_classes, lanes);
        });
      }
    }
    return;
  }
  // A row in pieces: l' waits in `slope` for its mean.
  for (int64_t n = begin; n < end; ++n) {
    A* out = slope + n * classes;
    if (p.ignored(n)) {
      loss[n] = A(0);
      for (int64_t j = 0; j < classes; ++j) out[j] = A(0);
      continue;
    }
    const auto known = p.a.softmax ? p.softmax(n) : typename Rows<T>::Softmax{};
    V total(A(0)), mean(A(0));
    for (int64_t start = 0; start < classes; start += tile_elements) {
      const int64_t columns = classes - start < tile_elements ? classes - start : tile_elements;
      fill(p, n, 1, start, columns, &known, tile);
      evaluate(tile, values, slopes);
      p.for_vectors(columns, [&](int64_t j, int lanes) {
        const V g = load_some(slopes + j, lanes);
        total += load_some(values + j, lanes);
        mean += load_some(tile.f + j, lanes) * g;
        store_some(out + start + j, p.a.softmax ? g : g * p.inverse_classes, lanes);
      });
    }
    loss[n] = reduce_add(total) * p.inverse_classes;
    if (!p.a.softmax) continue;
    const A g_mean = reduce_add(mean);
    const T* x = p.pred + n * classes;
    p.for_vectors(classes, [&](int64_t j, int lanes) {
      const V s = p.probability(known, x + j, lanes) * (load_some(out + j, lanes) - g_mean);
      store_some(out + j, s * p.inverse_classes, lanes);
    });
  }
}

// ---- Backward. Evaluator: evaluate(tile, u, v, r, slopes) leaves r = dJ/df and l', and adds to the
// gradients of the network or its table.

template <class T>
class RowsBackward {
  using A = accumulate_t<T>;
  using V = Vec<A>;

  // Of a row with the softmax link, lanes still apart.
  struct Sums {
    V g_mean{A(0)}, d_mean{A(0)};  // sum f g, sum f D
  };

  const Rows<T>& p_;
  A* const scratch_;  // [classes] where a row is longer than a tile and grad_pred is wanted
  Tile<A> tile_;
  alignas(64) A u_[tile_elements], v_[tile_elements], r_[tile_elements], slopes_[tile_elements];
  alignas(64) A u_mean_[tile_elements];  // sum f U of each row; of labels sigmoid'(x)

 public:
  RowsBackward(const Rows<T>& p, A* scratch) : p_(p), scratch_(scratch) {}

  template <class Evaluator>
  void operator()(int64_t begin, int64_t end, const Evaluator& evaluate) {
    const int64_t classes = p_.classes;
    if (p_.a.sigmoid) {
      for (int64_t first = begin; first < end; first += tile_elements)
        labels(first, end - first < tile_elements ? end - first : tile_elements, evaluate);
      return;
    }
    if (classes > tile_elements) {
      for (int64_t n = begin; n < end; ++n) long_row(n, evaluate);
      return;
    }
    for (int64_t first = begin, rows = p_.rows_per_tile(); first < end; first += rows) {
      if (rows > end - first) rows = end - first;
      fill(p_, first, rows, 0, classes, nullptr, tile_);
      for (int64_t k = 0; k < rows; ++k) {
        const A* f = tile_.f + k * classes;
        u_mean_[k] =
            mean_of_incoming(first + k, [&](int64_t j, int lanes) { return load_some(f + j, lanes); });
        cotangents(first + k, 0, classes, k);
      }
      pad();
      evaluate(tile_, u_, v_, r_, slopes_);
      if (p_.a.grad_pred)
        for (int64_t k = 0; k < rows; ++k) {
          const int64_t at = k * classes;
          Sums sums;
          cotangent_of_f(first + k, 0, classes, k, r_ + at, sums);
          pull_back(first + k, r_ + at, u_mean_[k], sums,
                    [&](int64_t j, int lanes) { return load_some(tile_.f + at + j, lanes); });
        }
    }
  }

 private:
  // Labels on their own, which need no means.
  template <class Evaluator>
  void labels(int64_t first, int64_t count, const Evaluator& evaluate) {
    const auto incoming = [&](int64_t j, int lanes) {
      return p_.grad_slope ? load_some(p_.grad_slope + first + j, lanes) : V(A(0));
    };
    A* const d = u_mean_;
    fill_labels(p_, first, count, tile_, d);
    p_.for_vectors(count, [&](int64_t j, int lanes) {
      store_some(u_ + j, p_.grad_loss ? load_some(p_.grad_loss + first + j, lanes) : V(A(0)), lanes);
      store_some(v_ + j, incoming(j, lanes) * load_some(d + j, lanes), lanes);
    });
    for_ignored(p_, first, count, [&](int64_t j) { u_[j] = v_[j] = A(0); });
    pad();
    evaluate(tile_, u_, v_, r_, slopes_);
    if (!p_.a.grad_pred) return;
    T* const out = static_cast<T*>(p_.a.grad_pred) + first;
    p_.for_vectors(count, [&](int64_t j, int lanes) {
      const V f = load_some(tile_.f + j, lanes), bend = incoming(j, lanes) * (V(A(1)) - f * A(2));
      const V r = load_some(r_ + j, lanes) + load_some(slopes_ + j, lanes) * bend;
      store_some(out + j, load_some(d + j, lanes) * r, lanes);
    });
    for_ignored(p_, first, count, [&](int64_t j) { math::store(out + j, A(0)); });
  }

  // A row in pieces; f is computed again where it has left the tile.
  template <class Evaluator>
  void long_row(int64_t n, const Evaluator& evaluate) {
    const T* x = p_.pred + n * p_.classes;
    const auto known = p_.a.softmax && !p_.ignored(n) ? p_.softmax(n) : typename Rows<T>::Softmax{};
    const auto probability = [&](int64_t j, int lanes) { return p_.probability(known, x + j, lanes); };
    u_mean_[0] = mean_of_incoming(n, probability);
    Sums sums;
    for (int64_t start = 0; start < p_.classes; start += tile_elements) {
      const int64_t columns = p_.classes - start < tile_elements ? p_.classes - start : tile_elements;
      fill(p_, n, 1, start, columns, &known, tile_);
      cotangents(n, start, columns, 0);
      pad();
      evaluate(tile_, u_, v_, r_, slopes_);
      if (p_.a.grad_pred) cotangent_of_f(n, start, columns, 0, scratch_ + start, sums);
    }
    if (p_.a.grad_pred) pull_back(n, scratch_, u_mean_[0], sums, probability);
  }

  LOSSMETA_SIMD V incoming(int64_t n, int64_t j, int lanes) const {
    return p_.grad_slope ? load_some(p_.grad_slope + n * p_.classes + j, lanes) : V(A(0));
  }

  template <class F>
  A mean_of_incoming(int64_t n, const F& f) const {
    if (!p_.a.softmax || !p_.grad_slope || p_.ignored(n)) return A(0);
    V sum(A(0));
    p_.for_vectors(p_.classes, [&](int64_t j, int lanes) { sum += f(j, lanes) * incoming(n, j, lanes); });
    return reduce_add(sum);
  }

  // u and v of the columns [start, start + columns) of row n, row k of the tile.
  void cotangents(int64_t n, int64_t start, int64_t columns, int64_t k) {
    const bool ignored = p_.ignored(n);
    const A g = ignored || !p_.grad_loss ? A(0) : p_.grad_loss[n] * p_.inverse_classes, mean = u_mean_[k];
    A *u = u_ + k * columns, *v = v_ + k * columns;
    const A* f = tile_.f + k * columns;
    p_.for_vectors(columns, [&](int64_t j, int lanes) {
      store_some(u + j, V(g), lanes);
      V vj(A(0));
      if (p_.grad_slope && !ignored) {
        vj = incoming(n, start + j, lanes) * p_.inverse_classes;
        if (p_.a.softmax) vj = load_some(f + j, lanes) * (vj - mean * p_.inverse_classes);
      }
      store_some(v + j, vj, lanes);
    });
  }
  void pad() {
    for (int64_t i = tile_.count; i % V::size; ++i) u_[i] = v_[i] = A(0);
  }

  // D_j, but for the term with sum f g, which is not known yet; with the identity link r itself.
  void cotangent_of_f(int64_t n, int64_t start, int64_t columns, int64_t k, A* d, Sums& sums) const {
    const int64_t at = k * columns;
    if (!p_.a.softmax) {
      if (d != r_ + at)
        for (int64_t j = 0; j < columns; ++j) d[j] = r_[at + j];
      return;
    }
    p_.for_vectors(columns, [&](int64_t j, int lanes) {
      const V f = load_some(tile_.f + at + j, lanes),
              g = load_some(slopes_ + at + j, lanes) * p_.inverse_classes;
      const V dj = load_some(r_ + at + j, lanes) + g * (incoming(n, start + j, lanes) - u_mean_[k]);
      sums.g_mean += f * g;
      sums.d_mean += f * dj;
      store_some(d + j, dj, lanes);
    });
  }

  template <class F>
  void pull_back(int64_t n, const A* d, A u_mean, const Sums& sums, const F& f) const {
    T* out = static_cast<T*>(p_.a.grad_pred) + n * p_.classes;
    const A g_mean = reduce_add(sums.g_mean), d_mean = reduce_add(sums.d_mean) - u_mean * g_mean;
    const bool ignored = p_.ignored(n);
    p_.for_vectors(p_.classes, [&](int64_t j, int lanes) {
      V x = load_some(d + j, lanes);
      if (p_.a.softmax) x = f(j, lanes) * (x - incoming(n, j, lanes) * g_mean - d_mean);
      if (ignored) x = V(A(0));
      store_some(out + j, x, lanes);
    });
  }
};

// Rows in chunks of fixed size, whatever the number of threads: one partial sum each.
struct Chunks {
  int64_t rows, count;
  Chunks(int64_t samples, int64_t classes, int64_t least_elements, int64_t max_chunks) {
    rows = least_elements / classes > 0 ? least_elements / classes : 1;
    if (rows * max_chunks < samples) rows = (samples + max_chunks - 1) / max_chunks;
    count = (samples + rows - 1) / rows;
  }
};

template <class A>
bool table_accepted(const LossNetwork& a) {
  return a.table && static_cast<const A*>(a.table)[loss_network_table_size(a.intervals) - 1] != A(0);
}

}  // namespace lossmeta::LOSSMETA_ISA
