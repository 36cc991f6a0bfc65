#include "math/loss_network.h"

#include "cpu/loss_network_elements.h"
#include "cpu/parallel.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t tile_elements = 512;    // of a tile: whole rows, or a piece of one
constexpr int64_t grain_elements = 512;   // exact: below this a thread costs more than it saves
constexpr int64_t chunk_elements = 1024;  // least for a partial sum of the weights' gradients
constexpr int64_t max_chunks = 256;

// Elements whose network input is in place: f [count] with its targets y, both padded to whole vectors.
template <class A>
struct alignas(64) Tile {
  A f[tile_elements], y[tile_elements];
  int64_t count;
  int64_t hot[tile_elements];  // positions of the elements that are their row's class, where targets are indices
  int64_t hot_count;
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

  static LOSSMETA_SIMD V load_lanes(const T* p, int n, A fill) { return n == V::size ? load(p) : load_partial(p, n, fill); }

  // softmax = e^(x - maximum) * scale.
  struct Softmax {
    A maximum, scale;
  };
  Softmax softmax(int64_t n) const {
    const T* x = pred + n * classes;
    V m(-INFINITY), sum(A(0));
    for_vectors(classes, [&](int64_t j, int lanes) { m = max(load_lanes(x + j, lanes, A(-INFINITY)), m); });
    const A maximum = reduce_max(m);
    for_vectors(classes, [&](int64_t j, int lanes) { sum += exp(load_lanes(x + j, lanes, A(-INFINITY)) - maximum); });
    return {maximum, A(1) / reduce_add(sum)};
  }
  LOSSMETA_SIMD V probability(const Softmax& s, const T* x, int lanes) const {
    return exp(load_lanes(x, lanes, A(-INFINITY)) - s.maximum) * s.scale;
  }
};

template <class A>
LOSSMETA_SIMD Vec<A> load_some(const A* p, int n) {
  return n == Vec<A>::size ? load(p) : load_partial(p, n, A(0));
}
template <class A>
LOSSMETA_SIMD void store_some(A* p, Vec<A> x, int n) {
  n == Vec<A>::size ? store(p, x) : store_partial(p, x, n);
}

// Puts columns [begin, begin + columns) of rows [first, first + rows) in place. An ignored row is 0 everywhere.
template <class T>
void fill(const Rows<T>& p, int64_t first, int64_t rows, int64_t begin, int64_t columns,
          const typename Rows<T>::Softmax* known, Tile<accumulate_t<T>>& tile) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t padded = (rows * columns + V::size - 1) / V::size * V::size;
  tile.count = rows * columns;
  tile.hot_count = 0;
  for (int64_t i = padded - V::size; i < padded; ++i) tile.f[i] = A(0);
  if (p.a.labels)
    for (int64_t i = 0; i < padded; ++i) tile.y[i] = A(0);
  else
    for (int64_t i = padded - V::size; i < padded; ++i) tile.y[i] = A(0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r;
    A *f = tile.f + r * columns, *y = tile.y + r * columns;
    const T* x = p.pred + n * p.classes + begin;
    if (p.ignored(n)) {
      for (int64_t j = 0; j < columns; ++j) f[j] = A(0);
      continue;
    }
    if (!p.a.softmax) {
      p.for_vectors(columns, [&](int64_t j, int lanes) { store_some(f + j, p.load_lanes(x + j, lanes, A(0)), lanes); });
    } else if (known) {
      p.for_vectors(columns, [&](int64_t j, int lanes) { store_some(f + j, p.probability(*known, x + j, lanes), lanes); });
    } else {
      V m(-INFINITY), sum(A(0));
      p.for_vectors(columns, [&](int64_t j, int lanes) { m = max(p.load_lanes(x + j, lanes, A(-INFINITY)), m); });
      const A maximum = reduce_max(m);
      p.for_vectors(columns, [&](int64_t j, int lanes) {
        const V e = exp(p.load_lanes(x + j, lanes, A(-INFINITY)) - maximum);
        sum += e;
        store_some(f + j, e, lanes);
      });
      const A scale = A(1) / reduce_add(sum);
      p.for_vectors(columns, [&](int64_t j, int lanes) { store_some(f + j, load_some(f + j, lanes) * scale, lanes); });
    }
    if (p.a.labels) {
      const int64_t label = p.a.labels[n] - begin;
      if (label >= 0 && label < columns) {
        y[label] = A(1);
        tile.hot[tile.hot_count++] = r * columns + label;
      }
    } else {
      const A* t = p.target + n * p.classes + begin;
      for (int64_t j = 0; j < columns; ++j) y[j] = t[j];
    }
  }
}

// ---- Forward. Evaluator: network or table, evaluate(tile, values, slopes).

template <class T, class Evaluator>
void forward_rows(const Rows<T>& p, int64_t begin, int64_t end, const Evaluator& evaluate) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
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

// ---- Backward. Evaluator: evaluate(tile, u, v, r, slopes), which also adds to the gradients of weights or table.

// D_j and the sums over the row that the softmax's pullback needs.
template <class A>
struct RowSums {
  Vec<A> u_mean{A(0)}, g_mean{A(0)}, d_mean{A(0)};
};

template <class T, class Evaluator>
void backward_rows(const Rows<T>& p, int64_t begin, int64_t end, const Evaluator& evaluate,
                   accumulate_t<T>* scratch) {  // [classes] where a row is longer than a tile
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t classes = p.classes;
  Tile<A> tile;
  alignas(64) A u[tile_elements], v[tile_elements], r[tile_elements], slopes[tile_elements];
  T* grad_pred = static_cast<T*>(p.a.grad_pred);
  const auto incoming = [&](int64_t n, int64_t j, int lanes) {
    return p.grad_slope ? load_some(p.grad_slope + n * classes + j, lanes) : V(A(0));
  };

  for (int64_t first = begin, rows = p.rows_per_tile(); first < end; first += rows) {
    if (rows > end - first) rows = end - first;
    const bool whole = classes <= tile_elements;
    typename Rows<T>::Softmax known{};
    A u_mean_row = A(0);
    if (!whole && p.a.softmax && !p.ignored(first)) {
      known = p.softmax(first);
      V mean(A(0));
      if (p.grad_slope)
        p.for_vectors(classes, [&](int64_t j, int lanes) {
          mean += p.probability(known, p.pred + first * classes + j, lanes) * incoming(first, j, lanes);
        });
      u_mean_row = reduce_add(mean);
    }
    RowSums<A> long_row;
    for (int64_t start = 0; start < classes; start += tile_elements) {
      const int64_t columns = classes - start < tile_elements ? classes - start : tile_elements;
      fill(p, first, rows, start, columns, whole ? nullptr : &known, tile);
      const int64_t padded = (tile.count + V::size - 1) / V::size * V::size;
      for (int64_t i = padded - V::size; i < padded; ++i) u[i] = v[i] = A(0);
      A u_means[tile_elements];
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t n = first + k, at = k * columns;
        const bool ignored = p.ignored(n);
        const A g = ignored || !p.grad_loss ? A(0) : p.grad_loss[n] * p.inverse_classes;
        for (int64_t j = 0; j < columns; ++j) u[at + j] = g;
        if (ignored || !p.grad_slope) {
          for (int64_t j = 0; j < columns; ++j) v[at + j] = A(0);
          u_means[k] = A(0);
          continue;
        }
        A mean = u_mean_row;
        if (p.a.softmax && whole) {
          V sum(A(0));
          p.for_vectors(columns, [&](int64_t j, int lanes) {
            sum += load_some(tile.f + at + j, lanes) * incoming(n, start + j, lanes);
          });
          mean = reduce_add(sum);
        }
        u_means[k] = mean;
        p.for_vectors(columns, [&](int64_t j, int lanes) {
          const V in = incoming(n, start + j, lanes);
          const V s = p.a.softmax ? load_some(tile.f + at + j, lanes) * (in - mean) : in;
          store_some(v + at + j, s * p.inverse_classes, lanes);
        });
      }
      evaluate(tile, u, v, r, slopes);
      if (!grad_pred) continue;
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t n = first + k, at = k * columns;
        T* out = grad_pred + n * classes + start;
        if (p.ignored(n)) {
          for (int64_t j = 0; j < columns; ++j) math::store(out + j, A(0));
          continue;
        }
        if (!p.a.softmax) {
          p.for_vectors(columns, [&](int64_t j, int lanes) {
            const V s = load_some(r + at + j, lanes);
            lanes == V::size ? store(out + j, s) : store_partial(out + j, s, lanes);
          });
          continue;
        }
        const A mean = u_means[k];
        RowSums<A> short_row;
        RowSums<A>& sums = whole ? short_row : long_row;
        A* d = whole ? r + at : scratch + start;
        p.for_vectors(columns, [&](int64_t j, int lanes) {
          const V f = load_some(tile.f + at + j, lanes), g = load_some(slopes + at + j, lanes) * p.inverse_classes;
          const V dj = load_some(r + at + j, lanes) + g * (incoming(n, start + j, lanes) - mean);
          sums.g_mean += f * g;
          sums.d_mean += f * dj;
          store_some(d + j, dj, lanes);
        });
        if (start + columns < classes) continue;
        const A g_mean = reduce_add(sums.g_mean), d_mean = reduce_add(sums.d_mean) - mean * g_mean;
        p.for_vectors(classes, [&](int64_t j, int lanes) {
          const V f = whole ? load_some(tile.f + at + j, lanes) : p.probability(known, p.pred + n * classes + j, lanes);
          const V dj = load_some((whole ? d : scratch) + j, lanes) - incoming(n, j, lanes) * g_mean;
          T* const to = grad_pred + n * classes + j;
          const V s = f * (dj - d_mean);
          lanes == V::size ? store(to, s) : store_partial(to, s, lanes);
        });
      }
    }
  }
}

// Rows in chunks of fixed size, whatever the number of threads: one partial sum each.
struct Chunks {
  int64_t rows, count;
  Chunks(int64_t samples, int64_t classes, int64_t elements) {
    rows = elements / classes > 0 ? elements / classes : 1;
    if (rows * max_chunks < samples) rows = (samples + max_chunks - 1) / max_chunks;
    count = (samples + rows - 1) / rows;
  }
};

// Sums the chunks' gradients, in their order, into the three results.
template <class A>
void store_weight_gradients(const LossNetwork& a, const A* partials,  // [count, size]
                            int64_t count, int64_t size) {
  A* const out[] = {static_cast<A*>(a.grad_input_weight), static_cast<A*>(a.grad_hidden_weight),
                    static_cast<A*>(a.grad_output_weight)};
  const int64_t sizes[] = {2 * a.width, a.width * a.width, a.width};
  for (int64_t k = 0, at = 0; k < 3; at += sizes[k], ++k)
    for (int64_t i = 0; i < sizes[k]; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += double(partials[c * size + at + i]);
      out[k][i] = A(sum);
    }
}

template <class A>
bool table_accepted(const LossNetwork& a) {
  return a.table && static_cast<const A*>(a.table)[loss_network_table_size(a.intervals) - 1] != A(0);
}

template <class T>
void forward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  if (table_accepted<A>(a)) return;
  const NetworkWeights<A> weights(a);
  const Rows<T> p{a};
  parallel_for(a.samples, grain_elements / a.classes + 1, [&](int64_t begin, int64_t end) {
    const NetworkForward<A> network(weights);
    forward_rows(p, begin, end, [&](const Tile<A>& tile, A* values, A* slopes) {
      network(tile.f, tile.y, tile.count, values, slopes);
    });
  });
}

template <class T, bool tangent, bool need_weights>
void backward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  const NetworkWeights<A> weights(a);
  const Rows<T> p{a};
  const Chunks chunks(a.samples, a.classes, chunk_elements);
  const int64_t size = weights.gradient_size();
  const bool long_rows = a.classes > tile_elements && a.grad_pred;
  Buffer<A> partials(need_weights ? chunks.count * size : 0);
  parallel_for(chunks.count, 1, [&](int64_t begin, int64_t end) {
    NetworkBackward<A, tangent, need_weights> network(weights);
    Buffer<A> scratch(long_rows ? a.classes : 0);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * chunks.rows, last = first + chunks.rows < a.samples ? first + chunks.rows : a.samples;
      if (c > begin) network.clear();
      backward_rows(
          p, first, last,
          [&](const Tile<A>& tile, const A* u, const A* v, A* r, A* slopes) {
            network(tile.f, tile.y, u, v, tile.count, r, slopes);
          },
          scratch.data());
      if (need_weights) network.gradients(partials.data() + c * size);
    }
  });
  if (need_weights) store_weight_gradients(a, partials.data(), chunks.count, size);
}

template <class T>
void backward(const LossNetwork& a) {
  if (table_accepted<accumulate_t<T>>(a)) return;
  if (!a.grad_input_weight) return backward<T, true, false>(a);
  if (!a.grad_pred && !a.grad_slope) return backward<T, false, true>(a);
  return backward<T, true, true>(a);
}

}  // namespace

void loss_network_forward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void loss_network_backward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
namespace lossmeta::LOSSMETA_ISA {
void loss_network_tabulate(const LossNetwork& a) { visit_dtype(a.dtype, [&](auto tag) { using A = accumulate_t<typename decltype(tag)::type>; static_cast<A*>(a.table)[loss_network_table_size(a.intervals) - 1] = A(0); }); }
void loss_network_table_forward(const LossNetwork&) {}
void loss_network_table_backward(const LossNetwork&) {}
}
