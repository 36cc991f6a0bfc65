#include "math/loss_network.h"

#include "cpu/loss_network_elements.h"
#include "cpu/loss_network_rows.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 13;  // below this a thread costs more than it saves
constexpr int64_t chunk_elements = 1 << 13;  // least for a partial sum of the table's gradients
constexpr int64_t max_chunks = 64;
constexpr int64_t node_chunk = 256;  // nodes that go through the network together
constexpr int coefficients = 5;      // v, c0 .. c3

template <class A>
A node_position(int64_t k, int64_t intervals) {
  return A(k - 1) / A(intervals);
}

template <class A>
void tabulate(const LossNetwork& a) {
  const int64_t intervals = a.intervals, per_target = intervals + 3, nodes = loss_network_nodes(intervals);
  const NetworkWeights<A> weights(a);
  Buffer<A> values(nodes + node_chunk), slopes(nodes + node_chunk);
  const int64_t chunks = (nodes + node_chunk - 1) / node_chunk, workers = worker_count(chunks, 1);
  const WorkerBuffer<Vec<A>> scratch(workers, NetworkForward<A>::scratch_size(weights));
  parallel_for_workers(chunks, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const NetworkForward<A> network(weights, scratch[worker]);
    alignas(64) A f[node_chunk], y[node_chunk];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * node_chunk, n = nodes - first < node_chunk ? nodes - first : node_chunk;
      for (int64_t i = 0; i < node_chunk; ++i) {
        const int64_t node = first + i < nodes ? first + i : nodes - 1;
        f[i] = node_position<A>(node % per_target, intervals);
        y[i] = A(node / per_target);
      }
      network(f, y, n, values.data() + first, slopes.data() + first);
    }
  });
  A* table = static_cast<A*>(a.table);
  A largest(0);
  for (int64_t k = 0; k < nodes; ++k)
    if (math::abs(slopes[k]) > largest) largest = math::abs(slopes[k]);
  const A limit = A(loss_network_table_bound) * largest;
  bool accepted = largest < A(INFINITY);
  for (int64_t target = 0; target < 2; ++target) {
    const A *v = values.data() + target * per_target, *s = slopes.data() + target * per_target;
    for (int64_t k = 0; k + 5 <= per_target; ++k) accepted = accepted && math::table_error(s + k) <= limit;
    for (int64_t i = 0; i < intervals; ++i) {
      A c[4];
      math::table_coefficients(s + i, c);
      table[i] = v[i + 1];
      for (int j = 0; j < 4; ++j) table[(j + 1) * intervals + i] = c[j];
    }
    table += coefficients * intervals;
  }
  *table = A(accepted);
}

// The table of one target on vectors of elements.
template <class A>
struct Table {
  using V = Vec<A>;
  using Bits = typename V::Bits;
  static constexpr int near =
      2 * V::size;  // intervals whose coefficients fit two registers: most probabilities are small

  const A* table;  // [5, intervals]
  int64_t intervals;
  A h = A(1) / A(intervals);

  struct Place {
    Bits interval;
    V t;
  };
  // NaN: interval 0, t NaN. A probability rounded above 1 is extrapolated.
  LOSSMETA_SIMD Place place(V f) const {
    const V x = f * A(intervals), low = min(max(x, V(A(0))), V(A(intervals - 1)));
    const Bits interval = truncate(low);
    return {interval, x - V(__builtin_convertvector(interval, typename V::Native))};
  }
  // Where the second target's are `distance` behind those of the first, and y may be 1.
  LOSSMETA_SIMD static Bits of_target(Bits interval, V y, int64_t distance) {
    return interval + truncate(y * A(distance));
  }
  LOSSMETA_SIMD static bool is_near(Bits interval) { return all(Mask<A>{interval < near}); }

  LOSSMETA_SIMD V coefficient(int c, Bits interval, bool is_near) const {
    const A* from = table + c * intervals;
    return is_near ? permute(load(from), load(from + V::size), interval) : gather(from, interval);
  }
};

// One element, for the row's own class.
template <class A>
struct Point {
  int64_t interval;
  A t, c[coefficients];
  Point(const Table<A>& table, A f) {
    const A x = f * A(table.intervals), last = A(table.intervals - 1);
    interval = x > A(0) ? int64_t(x < last ? x : last) : 0;
    t = x - A(interval);
    for (int k = 0; k < coefficients; ++k) c[k] = table.table[k * table.intervals + interval];
  }
};

template <class T>
void forward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  if (!table_accepted<A>(a)) return;
  const A* const table = static_cast<const A*>(a.table);
  const Table<A> others{table, a.intervals}, own{table + coefficients * a.intervals, a.intervals};
  const Rows<T> p{a};
  parallel_for(a.samples, grain_elements / a.classes + 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    forward_rows(p, begin, end, [&](const Tile<A>& tile, A* values, A* slopes) {
      for (int64_t i = 0; i < tile.count; i += V::size) {
        const auto at = others.place(load(tile.f + i));
        // Of a row most elements are others, of labels some are on.
        const V y = a.sigmoid ? load(tile.y + i) : V(A(0));
        const auto from = others.of_target(at.interval, y, coefficients * a.intervals);
        const bool near = others.is_near(from);
        V c[coefficients];
        for (int k = 0; k < coefficients; ++k) c[k] = others.coefficient(k, from, near);
        store(values + i, math::table_value(c[0], c[1], c[2], c[3], c[4], at.t, others.h));
        store(slopes + i, math::table_slope(c[1], c[2], c[3], c[4], at.t));
      }
      for (int64_t k = 0; k < tile.own_count; ++k) {
        const int64_t i = tile.own[k];
        const Point<A> point(own, tile.f[i]);
        const A* c = point.c;
        values[i] = math::table_value(c[0], c[1], c[2], c[3], c[4], point.t, own.h);
        slopes[i] = math::table_slope(c[1], c[2], c[3], c[4], point.t);
      }
    });
  });
}

// Gradients on the coefficients of every interval. Those of the near intervals stay apart by lane and are
// added up in float32 for a while: their sums are the long ones.
template <class A>
class Bins {
  using V = Vec<A>;
  using Bits = typename V::Bits;
  static constexpr int near = Table<A>::near, flush_after = 1024;  // vectors

  int64_t intervals_, vectors_ = 0;
  V* const near_;       // [near, 5], of target 0
  double* const sums_;  // [2, intervals, 5]

 public:
  static constexpr int64_t near_size = near * coefficients;
  static int64_t sums_size(int64_t intervals) { return 2 * intervals * coefficients; }

  Bins(int64_t intervals, V* near_scratch, double* sums_scratch)
      : intervals_(intervals), near_(near_scratch), sums_(sums_scratch) {
    clear();
  }
  void clear() {
    for (int i = 0; i < near_size; ++i) near_[i] = V(A(0));
    for (int64_t i = 0; i < sums_size(intervals_); ++i) sums_[i] = 0;
  }

  LOSSMETA_SIMD void add(Bits interval, bool is_near, const V* sums) {
    if (!is_near) {
      for (int lane = 0; lane < V::size; ++lane)
        for (int k = 0; k < coefficients; ++k)
          sums_[interval[lane] * coefficients + k] += double(sums[k][lane]);
      return;
    }
    uint32_t left = (1u << V::size) - 1;
    while (left) {
      const auto bin = interval[__builtin_ctz(left)];
      const Mask<A> here{interval == bin};
      V* to = near_ + bin * coefficients;
      for (int k = 0; k < coefficients; ++k) to[k] += select(here, sums[k], A(0));
      left &= ~lane_bits(here);
    }
    if (++vectors_ == flush_after) flush();
  }
  void add(int64_t target, int64_t interval, const A* sums) {
    for (int k = 0; k < coefficients; ++k)
      sums_[(target * intervals_ + interval) * coefficients + k] += double(sums[k]);
  }

  // [2, intervals, 5]
  const double* sums() {
    flush();
    return sums_;
  }

 private:
  void flush() {
    for (int i = 0; i < near_size; ++i) {
      sums_[i] += double(reduce_add(near_[i]));
      near_[i] = V(A(0));
    }
    vectors_ = 0;
  }
};

// From gradients on the coefficients to the weights' gradients. Nodes that no element has touched are left
// out.
template <class A>
void network_gradients(const LossNetwork& a, const double* sums) {  // [2, intervals, 5]
  const int64_t intervals = a.intervals, per_target = intervals + 3, nodes = loss_network_nodes(intervals);
  Buffer<double> node_u(nodes), node_v(nodes);
  for (int64_t k = 0; k < nodes; ++k) node_u[k] = node_v[k] = 0;
  for (int64_t target = 0; target < 2; ++target)
    for (int64_t i = 0; i < intervals; ++i) {
      const double* c = sums + (target * intervals + i) * coefficients;
      double slopes[4];
      math::table_coefficients_adjoint(c + 1, slopes);
      const int64_t first = target * per_target + i;
      node_u[first + 1] += c[0];
      for (int j = 0; j < 4; ++j) node_v[first + j] += slopes[j];
    }
  Buffer<A> f(nodes + node_chunk), y(nodes + node_chunk), u(nodes + node_chunk), v(nodes + node_chunk);
  int64_t used = 0;
  for (int64_t k = 0; k < nodes; ++k)
    if (node_u[k] != 0 || node_v[k] != 0) {
      f[used] = node_position<A>(k % per_target, intervals);
      y[used] = A(k / per_target);
      u[used] = A(node_u[k]);
      v[used++] = A(node_v[k]);
    }
  for (int64_t i = used; i < used + Vec<A>::size; ++i) f[i] = y[i] = u[i] = v[i] = A(0);
  const NetworkWeights<A> weights(a);
  using Network = NetworkBackward<A, true, true>;
  const int64_t chunks = (used + node_chunk - 1) / node_chunk, size = weights.gradient_size();
  const int64_t workers = worker_count(chunks, 1);
  const Buffer<A> partials(chunks * size);
  const WorkerBuffer<Vec<A>> scratch(workers, Network::scratch_size(weights));
  parallel_for_workers(chunks, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Network network(weights, scratch[worker]);
    alignas(64) A r[node_chunk], slopes[node_chunk];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * node_chunk, n = used - first < node_chunk ? used - first : node_chunk;
      if (c > begin) network.clear();
      network(f.data() + first, y.data() + first, u.data() + first, v.data() + first, n, r, slopes);
      network.gradients(partials.data() + c * size);
    }
  });
  store_weight_gradients(a, partials.data(), chunks, size);
}

template <class T, bool need_pred, bool need_weights>
void backward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const A* const table = static_cast<const A*>(a.table);
  const Table<A> others{table, a.intervals}, own{table + coefficients * a.intervals, a.intervals};
  const Rows<T> p{a};
  const Chunks chunks(a.samples, a.classes, chunk_elements, max_chunks);
  const int64_t intervals = need_weights ? a.intervals : 0, size = Bins<A>::sums_size(intervals);
  const int64_t workers = worker_count(chunks.count, 1);
  const Buffer<double> partials(chunks.count * size);
  const WorkerBuffer<V> of_near(workers, Bins<A>::near_size);
  const WorkerBuffer<double> of_sums(workers, size);
  const WorkerBuffer<A> of_rows(workers, a.classes > tile_elements && need_pred ? a.classes : 0);
  parallel_for_workers(chunks.count, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Bins<A> bins(intervals, of_near[worker], of_sums[worker]);
    RowsBackward<T> rows(p, of_rows[worker]);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunks.rows,
                    last = first + chunks.rows < a.samples ? first + chunks.rows : a.samples;
      if (need_weights && chunk > begin) bins.clear();
      const auto evaluate = [&](const Tile<A>& tile, A* u, A* v, A* r, A* slopes) {
        A own_u[tile_elements], own_v[tile_elements];
        for (int64_t k = 0; k < tile.own_count; ++k) {
          A &uk = u[tile.own[k]], &vk = v[tile.own[k]];
          own_u[k] = uk, own_v[k] = vk;
          uk = vk = A(0);
        }
        for (int64_t i = 0; i < tile.count; i += V::size) {
          const auto at = others.place(load(tile.f + i));
          const V y = a.sigmoid ? load(tile.y + i) : V(A(0));
          const auto from = others.of_target(at.interval, y, coefficients * a.intervals);
          const bool near = others.is_near(from);
          const V ui = load(u + i), vi = load(v + i);
          if (need_pred) {
            V c[coefficients];
            for (int k = 1; k < coefficients; ++k) c[k] = others.coefficient(k, from, near);
            const V slope = math::table_slope(c[1], c[2], c[3], c[4], at.t);
            store(slopes + i, slope);
            store(r + i, ui * slope + vi * math::table_curvature(c[2], c[3], c[4], at.t, A(a.intervals)));
          }
          if (need_weights) {
            V sums[coefficients];
            math::table_adjoint(ui, vi, at.t, others.h, sums);
            bins.add(others.of_target(at.interval, y, a.intervals), near, sums);
          }
        }
        for (int64_t k = 0; k < tile.own_count; ++k) {
          const int64_t i = tile.own[k];
          const Point<A> point(own, tile.f[i]);
          const A* c = point.c;
          if (need_pred) {
            slopes[i] = math::table_slope(c[1], c[2], c[3], c[4], point.t);
            r[i] = own_u[k] * slopes[i] +
                   own_v[k] * math::table_curvature(c[2], c[3], c[4], point.t, A(a.intervals));
          }
          if (need_weights) {
            A sums[coefficients];
            math::table_adjoint(own_u[k], own_v[k], point.t, own.h, sums);
            bins.add(1, point.interval, sums);
          }
        }
      };
      rows(first, last, evaluate);
      if (need_weights) memcpy(partials.data() + chunk * size, bins.sums(), size_t(size) * sizeof(double));
    }
  });
  if (!need_weights) return;
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
    for (int64_t i = 0; i < size; ++i) partials[i] += partials[chunk * size + i];
  network_gradients<A>(a, partials.data());
}

template <class T>
void backward(const LossNetwork& a) {
  if (!table_accepted<accumulate_t<T>>(a)) return;
  if (!a.grad_input_weight) return backward<T, true, false>(a);
  return a.grad_pred ? backward<T, true, true>(a) : backward<T, false, true>(a);
}

}  // namespace

void loss_network_tabulate(const LossNetwork& a) {
  a.dtype == DType::float64 ? tabulate<double>(a) : tabulate<float>(a);
}

void loss_network_table_forward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void loss_network_table_backward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
