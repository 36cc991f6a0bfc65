#include <type_traits>

#include "cuda/loss_network_rows.cuh"
#include "cuda/loss_network_sums.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int row_threads = 512;
constexpr int forward_blocks = 2048;

// Where a call keeps what in the workspace, in elements of A.
struct TablePlan {
  int64_t values, slopes;                 // tabulate: [2, M + 3] each
  int64_t sums, maxima, state, partials;  // backward
  int blocks;                             // of the nodes' passes
  int64_t size;
};

template <class A>
TablePlan table_plan(const LossNetwork& a) {
  const Network<A> net(a);
  const int64_t nodes = loss_network_nodes(a.intervals);
  TablePlan plan{};
  plan.blocks = int((nodes + net.tile - 1) / net.tile);
  if (a.loss) {
    plan.slopes = nodes, plan.size = 2 * nodes;
  } else if (a.grad_input_weight) {
    plan.maxima = 2 * coefficients * a.intervals * int64_t(sizeof(long long) / sizeof(A));
    plan.state = plan.maxima + sum_blocks;
    plan.partials = plan.state + 4;
    plan.size = plan.partials + int64_t(plan.blocks) * net.gradient_size();
  }
  return plan;
}

// ---- The nodes, which go through the network: first those of y = 0, then of y = 1.

template <class A>
struct Nodes {
  int64_t count;
  int per_target, intervals;

  explicit Nodes(const LossNetwork& a)
      : count(loss_network_nodes(a.intervals)),
        per_target(int(a.intervals + 3)),
        intervals(int(a.intervals)) {}

  __device__ Input<A> input(int64_t e) const {
    const int k = int(e) % per_target;
    return {A(k - 1) / A(intervals), A(e >= per_target)};
  }
};

template <class A>
struct TabulatedNodes : Nodes<A> {
  A *values, *slopes;  // [count]

  __device__ Sums<A> finish(int64_t e, A, A value, A slope) const {
    values[e] = value, slopes[e] = slope;
    return {};
  }
  __device__ void segments(const Sums<A>*, int64_t, int) const {}
};

// One block: the largest error estimate decides.
template <class A>
__global__ void coefficients_kernel(TabulatedNodes<A> nodes, A bound,
                                    A* table) {  // [2, 5, M], and the flag
  const int intervals = nodes.intervals;
  A error = 0, largest = 0;
  for (int k = threadIdx.x; k < nodes.count; k += row_threads)
    largest = larger(largest, math::abs(nodes.slopes[k]));
  for (int target = 0; target < 2; ++target) {
    const A *const value = nodes.values + target * nodes.per_target, *const slope = nodes.slopes +
                                                                                    target * nodes.per_target;
    for (int k = threadIdx.x; k + 5 <= nodes.per_target; k += row_threads)
      error = larger(error, math::table_error(slope + k));
    for (int i = threadIdx.x; i < intervals; i += row_threads) {
      A c[4];
      math::table_coefficients(slope + i, c);
      A* const to = table + target * coefficients * intervals + i;
      to[0] = value[i + 1];
      for (int k = 0; k < 4; ++k) to[(k + 1) * intervals] = c[k];
    }
  }
  const auto combine = [](A x, A y) { return larger(x, y); };
  error = reduce<row_threads>(error, combine), largest = reduce<row_threads>(largest, combine);
  if (threadIdx.x == 0)
    table[2 * coefficients * intervals] = A(largest < A(INFINITY) && error <= bound * largest);
}

// ---- The table in a kernel: that of y = 0 in shared memory, that of y = 1 only for a row's own class.

template <class A>
struct Place {
  int interval;
  A t;
};

// A probability rounded above 1 is extrapolated; NaN makes t NaN.
template <class A>
__device__ Place<A> locate(A f, int intervals) {
  const A x = f * A(intervals);
  const int i = x < A(intervals) ? int(x) : intervals - 1;
  return {i, x - A(i)};
}

template <class A>
struct Point {
  A v;
  Quad<A> c;
  __device__ A value(A t, A h) const { return math::table_value(v, c.v[0], c.v[1], c.v[2], c.v[3], t, h); }
  __device__ A slope(A t) const { return math::table_slope(c.v[0], c.v[1], c.v[2], c.v[3], t); }
  __device__ A curvature(A t, A intervals) const {
    return math::table_curvature(c.v[1], c.v[2], c.v[3], t, intervals);
  }
};

template <class A>
struct Table {
  const A* global;  // [2, 5, M]
  int intervals;
  A h;
  Quad<A>* c;  // [M], shared
  A* v;        // [M], shared

  explicit Table(const LossNetwork& a)
      : global(static_cast<const A*>(a.table)), intervals(int(a.intervals)), h(A(1) / A(a.intervals)) {}

  // `values`: v is wanted, behind c.
  __device__ void load(A* shared, bool values) {
    c = reinterpret_cast<Quad<A>*>(shared), v = values ? shared + 4 * intervals : nullptr;
    for (int i = threadIdx.x; i < intervals; i += blockDim.x) {
      if (values) v[i] = global[i];
      for (int k = 0; k < 4; ++k) c[i].v[k] = global[(k + 1) * intervals + i];
    }
    __syncthreads();
  }
  __device__ Point<A> other(int i) const { return {v[i], c[i]}; }
  __device__ Point<A> other_slope(int i) const { return {A(0), c[i]}; }
  __device__ Point<A> own(int i) const {
    const A* const from = global + coefficients * intervals + i;
    return {from[0], {from[intervals], from[2 * intervals], from[3 * intervals], from[4 * intervals]}};
  }
};

// ---- Passes over rows.

// First pass: clears the sums and finds the maxima.
template <class A>
__global__ void prepare_kernel(Gate<A> gate, FixedPoint<A> fixed, int64_t sums,
                               const A* grad_loss,  // [N] or null
                               int64_t samples,
                               const A* grad_slope,  // [N, C] or null
                               int64_t elements) {
  if (gate.closed()) return;
  const int64_t first = int64_t(blockIdx.x) * row_threads + threadIdx.x,
                step = int64_t(sum_blocks) * row_threads;
  for (int64_t i = first; i < sums; i += step) fixed.sums[i] = 0;
  if (first == 0) *fixed.poisoned = *fixed.finished = 0;
  A bound = 0;
  if (grad_loss)
    for (int64_t i = first; i < samples; i += step) bound = larger(bound, math::abs(grad_loss[i]));
  if (grad_slope) {
#pragma unroll 4
    for (int64_t i = first; i < elements; i += step) bound = larger(bound, A(2) * math::abs(grad_slope[i]));
  }
  bound = reduce<row_threads>(bound, [](A x, A y) { return larger(x, y); });
  if (threadIdx.x == 0) fixed.maxima[blockIdx.x] = bound;
}

template <class T>
struct TableRows {
  using A = accumulate_t<T>;
  RowLabels rows;
  Table<A> table;
  A inverse_classes;
  const T* pred;
  const A* grad_loss;
  const A* grad_slope;
  A* loss;
  A* slope;
  T* grad_pred;

  explicit TableRows(const LossNetwork& a)
      : rows(a, 0, a.samples),
        table(a),
        inverse_classes(A(1) / A(a.classes)),
        pred(static_cast<const T*>(a.pred)),
        grad_loss(static_cast<const A*>(a.grad_loss)),
        grad_slope(static_cast<const A*>(a.grad_slope)),
        loss(static_cast<A*>(a.loss)),
        slope(static_cast<A*>(a.slope)),
        grad_pred(static_cast<T*>(a.grad_pred)) {}
};

template <class T, class Row>
__global__ void __launch_bounds__(row_threads, Row::blocks)
    table_forward_kernel(Gate<accumulate_t<T>> gate, TableRows<T> p) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (gate.closed()) return;
  p.table.load(shared, true);
  constexpr int block_rows = row_threads / Row::lanes;
  const int lane = threadIdx.x % Row::lanes;
  const int64_t classes = p.rows.classes;
  for (int64_t n = int64_t(blockIdx.x) * block_rows; n < p.rows.samples;
       n += int64_t(gridDim.x) * block_rows) {
    const int64_t own_row = n + threadIdx.x / Row::lanes, at = own_row * classes;
    const RowState state = p.rows.state(own_row);
    const bool live = state == RowState::live;
    Row row;
    row.open(p.pred + at, nullptr, live ? classes : 0, lane);

    const int64_t label = live ? p.rows.labels[own_row] : -1;
    const Place<A> own_at =
        locate(live ? row.softmax(math::load(p.pred + at + label)) : A(0), p.table.intervals);
    const Point<A> own = p.table.own(own_at.interval);
    const A own_value = own.value(own_at.t, p.table.h), own_slope = own.slope(own_at.t);
    const auto scaled_slope = [&](int64_t j, A slope) {
      return (j == label ? own_slope : slope) * p.inverse_classes;
    };

    A value_sum = 0, mean = 0;
    row.each([&](int64_t j, A* f, A* g) {
#pragma unroll
      for (int i = 0; i < Row::width; ++i) {
        const Place<A> place = locate(f[i], p.table.intervals);
        const Point<A> other = p.table.other(place.interval);
        g[i] = scaled_slope(j + i, other.slope(place.t));
        value_sum += j + i == label ? own_value : other.value(place.t, p.table.h);
        mean += f[i] * g[i];
      }
    });
    value_sum = reduce_sum<Row::lanes>(value_sum), mean = reduce_sum<Row::lanes>(mean);
    const A dead = state == RowState::ignored ? A(0) : A(NAN);
    if (live) {
      row.each([&](int64_t j, const A* f, const A* g) {
        A out[Row::width];
#pragma unroll
        for (int i = 0; i < Row::width; ++i) {
          A gi = g[i];
          if constexpr (!Row::keeps) {
            const Place<A> place = locate(f[i], p.table.intervals);
            gi = scaled_slope(j + i, p.table.other(place.interval).slope(place.t));
          }
          out[i] = f[i] * (gi - mean);
        }
        store_pack<Row::width>(p.slope + at + j, out);
      });
    } else if (state != RowState::absent) {
      for (int64_t j = lane; j < classes; j += Row::lanes) p.slope[at + j] = dead;
    }
    if (lane == 0 && state != RowState::absent) p.loss[own_row] = live ? value_sum * p.inverse_classes : dead;
  }
}

// The block's share of the sums; none where they are not wanted or their bound is not finite.
template <class A>
__device__ Bins<A> open_bins(const Table<A>& table, A* shared, bool sums, const FixedPoint<A>& fixed) {
  Bins<A> bins{nullptr, table.intervals, 0};
  int shift;
  if (sums && fixed.template find_shift<row_threads>(shift)) {
    bins.low = reinterpret_cast<unsigned*>(shared + 4 * table.intervals);
    bins.scale = scaled(A(1), shift);
    bins.clear();
  }
  return bins;
}

// grad_x_j = f_j (d_j - (U_j - sum f U) sum f g - sum f d) with d_j = r_j + g_j (U_j - sum f U).
template <class T, class Row>
__global__ void __launch_bounds__(row_threads, Row::blocks)
    table_backward_kernel(Gate<accumulate_t<T>> gate, TableRows<T> p, bool sums,
                          FixedPoint<accumulate_t<T>> fixed) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (gate.closed()) return;
  p.table.load(shared, false);
  const Bins<A> bins = open_bins(p.table, shared, sums, fixed);
  constexpr int block_rows = row_threads / Row::lanes, warp_lanes = Row::lanes < 32 ? Row::lanes : 32;
  const int lane = threadIdx.x % Row::lanes;
  const int64_t classes = p.rows.classes;
  for (int64_t n = int64_t(blockIdx.x) * block_rows; n < p.rows.samples;
       n += int64_t(gridDim.x) * block_rows) {
    const int64_t own_row = n + threadIdx.x / Row::lanes, at = own_row * classes;
    const RowState state = p.rows.state(own_row);
    const bool live = state == RowState::live;
    Row row;
    row.open(p.pred + at, p.grad_slope ? p.grad_slope + at : nullptr, live ? classes : 0, lane);
    const A u = live && p.grad_loss ? p.grad_loss[own_row] * p.inverse_classes : A(0),
            u_mean = row.softmax.dot;
    const bool number = row.softmax.scale < A(INFINITY), adds = bins.low && live && number;
    if (sums && live && !number && lane == 0) *fixed.poisoned = 1;

    const int64_t label = live ? p.rows.labels[own_row] : -1;
    const Place<A> own_at =
        locate(live ? row.softmax(math::load(p.pred + at + label)) : A(0), p.table.intervals);
    const Point<A> own = p.table.own(own_at.interval);
    const A own_slope = own.slope(own_at.t), own_curvature = own.curvature(own_at.t, A(p.table.intervals));

    // d_j and g_j, of an element with v_j
    const auto gradient = [&](bool is_own, const Place<A>& place, A v, A centred, A& g) {
      const Point<A> other = p.table.other_slope(place.interval);
      const A slope = is_own ? own_slope : other.slope(place.t);
      const A curvature = is_own ? own_curvature : other.curvature(place.t, A(p.table.intervals));
      g = slope * p.inverse_classes;
      return u * slope + v * curvature + g * centred;
    };

    A g_mean = 0, d_mean = 0, first_interval[coefficients] = {};  // where most probabilities lie
    row.each([&](int64_t j, const A* f, const A* big_u) {
#pragma unroll
      for (int i = 0; i < Row::width; ++i) {
        const Place<A> place = locate(f[i], p.table.intervals);
        const bool is_own = j + i == label;
        const A centred = big_u[i] - u_mean, v = f[i] * centred * p.inverse_classes;
        if (p.grad_pred) {
          A g;
          d_mean += f[i] * gradient(is_own, place, v, centred, g);
          g_mean += f[i] * g;
        }
        if (!adds) continue;
        A terms[coefficients];
        math::table_adjoint(u, v, place.t, p.table.h, terms);
        if (is_own || place.interval > 0) {
          bins.add(is_own, place.interval, terms);
        } else {
#pragma unroll
          for (int k = 0; k < coefficients; ++k) first_interval[k] += terms[k];
        }
      }
    });
    if (bins.low) {
#pragma unroll
      for (int k = 0; k < coefficients; ++k) first_interval[k] = reduce_sum<warp_lanes>(first_interval[k]);
      if (lane % warp_lanes == 0 && adds) bins.add(0, 0, first_interval);
    }
    if (!p.grad_pred) continue;
    g_mean = reduce_sum<Row::lanes>(g_mean), d_mean = reduce_sum<Row::lanes>(d_mean);
    if (live) {
      row.each([&](int64_t j, const A* f, const A* big_u) {
        A out[Row::width];
#pragma unroll
        for (int i = 0; i < Row::width; ++i) {
          const A centred = big_u[i] - u_mean, v = f[i] * centred * p.inverse_classes;
          A g;
          const A d = gradient(j + i == label, locate(f[i], p.table.intervals), v, centred, g);
          out[i] = f[i] * (d - centred * g_mean - d_mean);
        }
        store_pack<Row::width>(p.grad_pred + at + j, out);
      });
    } else if (state != RowState::absent) {
      for (int64_t j = lane; j < classes; j += Row::lanes) math::store(p.grad_pred + at + j, A(0));
    }
  }
  if (bins.low) bins.flush(fixed.sums);
}

// ---- Passes over labels on their own, with the sigmoid link.

template <class T>
__global__ void __launch_bounds__(row_threads, 2)
    labels_forward_kernel(Gate<accumulate_t<T>> gate, TableRows<T> p) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (gate.closed()) return;
  p.table.load(shared, true);
  const int64_t step = int64_t(gridDim.x) * row_threads;
  for (int64_t e = int64_t(blockIdx.x) * row_threads + threadIdx.x; e < p.rows.samples; e += step) {
    const RowState state = p.rows.state(e);
    if (state != RowState::live) {
      p.loss[e] = p.slope[e] = state == RowState::ignored ? A(0) : A(NAN);
      continue;
    }
    const auto f = math::sigmoid<A>(A(math::load(p.pred + e)));
    const Place<A> place = locate(f.value, p.table.intervals);
    const Point<A> point =
        p.rows.labels[e] == 1 ? p.table.own(place.interval) : p.table.other(place.interval);
    p.loss[e] = point.value(place.t, p.table.h);
    p.slope[e] = point.slope(place.t) * f.slope;
  }
}

template <class T>
__global__ void __launch_bounds__(row_threads, 2)
    labels_backward_kernel(Gate<accumulate_t<T>> gate, TableRows<T> p, bool sums,
                           FixedPoint<accumulate_t<T>> fixed) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (gate.closed()) return;
  p.table.load(shared, false);
  const Bins<A> bins = open_bins(p.table, shared, sums, fixed);
  const int64_t step = int64_t(gridDim.x) * row_threads;
  for (int64_t e = int64_t(blockIdx.x) * row_threads + threadIdx.x; e < p.rows.samples; e += step) {
    if (p.rows.state(e) != RowState::live) {
      if (p.grad_pred) math::store(p.grad_pred + e, A(0));
      continue;
    }
    const auto f = math::sigmoid<A>(A(math::load(p.pred + e)));
    const Place<A> place = locate(f.value, p.table.intervals);
    const bool on = p.rows.labels[e] == 1, number = f.value >= A(0);
    const A u = p.grad_loss ? p.grad_loss[e] : A(0), big_u = p.grad_slope ? p.grad_slope[e] : A(0);
    const A v = big_u * f.slope;
    if (p.grad_pred) {
      const Point<A> point = on ? p.table.own(place.interval) : p.table.other_slope(place.interval);
      const A slope = point.slope(place.t), curvature = point.curvature(place.t, A(p.table.intervals));
      const A r = u * slope + v * curvature + big_u * slope * (A(1) - A(2) * f.value);
      math::store(p.grad_pred + e, f.slope * r);
    }
    if (sums && !number) *fixed.poisoned = 1;
    if (bins.low && number) {
      A terms[coefficients];
      math::table_adjoint(u, v, place.t, p.table.h, terms);
      bins.add(on, place.interval, terms);
    }
  }
  if (bins.low) bins.flush(fixed.sums);
}

// ---- From the intervals to the nodes and through the network.

template <class A>
struct DerivedNodes : Nodes<A> {
  static constexpr bool has_input_gradient = false;
  FixedPoint<A> fixed;
  A unit;  // NaN where the sums are not numbers

  __device__ Cotangents<A> cotangents(int64_t e, A) const {
    const int k = int(e) % this->per_target, target = e >= this->per_target;
    const auto sum = [&](int coefficient, int interval) {
      return A(fixed.sums[(target * coefficients + coefficient) * this->intervals + interval]) * unit;
    };
    Cotangents<A> node{};
    if (k > 0 && k <= this->intervals) node.u = sum(0, k - 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // node k is the j-th of interval k - j
      const int interval = k - j;
      if (interval < 0 || interval >= this->intervals) continue;
      A c[4], slopes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = sum(i + 1, interval);
      math::table_coefficients_adjoint(c, slopes);
      node.v += slopes[j];
    }
    return node;
  }
};

// A tile for each block; the block that ends last adds up the weights' gradients of all.
template <class A, bool resident>
__global__ void __launch_bounds__(max_network_threads, network_blocks<A>)
    nodes_backward_kernel(Gate<A> gate, Network<A> net, DerivedNodes<A> nodes,
                          A* partials,  // [blocks, gradient_size]
                          WeightGradients<A> gradients) {
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  __shared__ A unit;
  __shared__ bool is_last;
  if (gate.closed()) return;
  if (threadIdx.x < 32) {
    int shift;
    const bool finite = nodes.fixed.template find_shift<32>(shift);
    if (threadIdx.x == 0) unit = finite && !*nodes.fixed.poisoned ? scaled(A(1), -shift) : A(NAN);
  }
  __syncthreads();
  nodes.unit = unit;
  network_backward<A, resident>(net, nodes, shared, partials);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(nodes.fixed.finished, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int size = net.gradient_size();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    A sum = 0;
#pragma unroll 8
    for (int k = 0; k < int(gridDim.x); ++k) sum += partials[int64_t(k) * size + i];
    gradients[i] = sum;
  }
}

// ---- Launches.

template <class A>
void tabulate(const LossNetwork& a, cudaStream_t stream) {
  const Network<A> net(a);
  const TablePlan plan = table_plan<A>(a);
  A* const base = static_cast<A*>(a.workspace);
  const TabulatedNodes<A> nodes{Nodes<A>(a), base + plan.values, base + plan.slopes};
  const bool resident = net.resident(false);
  const int bytes = net.shared_bytes(false, resident);
  const auto kernel = resident ? network_forward_kernel<A, true, TabulatedNodes<A>>
                               : network_forward_kernel<A, false, TabulatedNodes<A>>;
  allow_shared(kernel, bytes);
  LOSSMETA_LAUNCH(kernel, plan.blocks, net.threads(), bytes, stream, Gate<A>{}, net, nodes);
  LOSSMETA_LAUNCH(coefficients_kernel<A>, 1, row_threads, 0, stream, nodes, A(loss_network_table_bound),
                  static_cast<A*>(a.table));
}

// choose(type_tag<Row>) with the kind of row that suits: part of a warp, a warp with the row in registers, a block.
template <class T, class Choose>
void choose_row(const LossNetwork& a, const Choose& choose) {
  using A = accumulate_t<T>;
  constexpr int width = pack_width<T>;
  const auto fits = [&](const void* p) { return packable(static_cast<const A*>(p), a.classes); };
  const bool wide = packable(static_cast<const T*>(a.pred), a.classes) && fits(a.slope) &&
                    fits(a.grad_slope) && fits(a.grad_pred);
  if (a.classes <= 64) return choose(type_tag<RegisterRow<T, 8, 8, 1>>{});
  if (a.classes <= 256) return choose(type_tag<RegisterRow<T, 32, 8, 1>>{});
  if constexpr (sizeof(T) < 8) {  // float64 in packs would spill on sm_120
    if (a.classes <= 1024 && wide) return choose(type_tag<RegisterRow<T, 32, 32, width>>{});
    if (wide) return choose(type_tag<StreamedRow<T, row_threads, width>>{});
  }
  return choose(type_tag<StreamedRow<T, row_threads, 1>>{});
}

template <class Row>
int row_blocks(int64_t samples, int limit) {
  const int64_t block_rows = row_threads / Row::lanes, wanted = (samples + block_rows - 1) / block_rows;
  return int(wanted < limit ? wanted : limit);
}

// Shared memory of a block for each interval: of the forward pass, and of the backward one with sums.
template <class A>
constexpr int64_t forward_bytes = coefficients * sizeof(A);
template <class A>
constexpr int64_t backward_bytes = 4 * sizeof(A) + 2 * coefficients * sizeof(long long);

inline int label_blocks(int64_t labels, int limit) {
  const int64_t wanted = (labels + row_threads - 1) / row_threads;
  return int(wanted < limit ? wanted : limit);
}

template <class T>
void table_forward(const LossNetwork& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (a.samples == 0) return;
  if (a.sigmoid) {
    const int64_t bytes = a.intervals * forward_bytes<A>;
    allow_shared(labels_forward_kernel<T>, bytes);
    LOSSMETA_LAUNCH(labels_forward_kernel<T>, label_blocks(a.samples, forward_blocks), row_threads, bytes,
                    stream, table_gate<A>(a), TableRows<T>(a));
    return;
  }
  choose_row<T>(a, [&](auto tag) {
    using Row = typename decltype(tag)::type;
    const auto kernel = table_forward_kernel<T, Row>;
    const int64_t bytes = a.intervals * forward_bytes<A>;
    allow_shared(kernel, bytes);
    LOSSMETA_LAUNCH(kernel, row_blocks<Row>(a.samples, forward_blocks), row_threads, bytes, stream,
                    table_gate<A>(a), TableRows<T>(a));
  });
}

template <class T>
void table_backward(const LossNetwork& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const bool sums = a.grad_input_weight;
  const TablePlan plan = table_plan<A>(a);
  const FixedPoint<A> fixed(a, plan.sums, plan.maxima, plan.state);
  const Gate<A> gate = table_gate<A>(a);
  const int64_t cells = 2 * coefficients * a.intervals;
  if (sums)
    LOSSMETA_LAUNCH(prepare_kernel<A>, sum_blocks, row_threads, 0, stream, gate, fixed, cells,
                    static_cast<const A*>(a.grad_loss), a.samples, static_cast<const A*>(a.grad_slope),
                    a.samples * a.classes);
  const int64_t bytes = a.intervals * (sums ? backward_bytes<A> : 4 * sizeof(A));
  if (a.samples > 0 && a.sigmoid) {
    allow_shared(labels_backward_kernel<T>, bytes);
    LOSSMETA_LAUNCH(labels_backward_kernel<T>, label_blocks(a.samples, sums ? sum_blocks : forward_blocks),
                    row_threads, bytes, stream, gate, TableRows<T>(a), sums, fixed);
  } else if (a.samples > 0) {
    choose_row<T>(a, [&](auto tag) {
      using Row = typename decltype(tag)::type;
      const auto kernel = table_backward_kernel<T, Row>;
      allow_shared(kernel, bytes);
      LOSSMETA_LAUNCH(kernel, row_blocks<Row>(a.samples, sums ? sum_blocks : forward_blocks), row_threads,
                      bytes, stream, gate, TableRows<T>(a), sums, fixed);
    });
  }
  if (!sums) return;
  const Network<A> net(a);
  const bool resident = net.resident(true);
  const int shared_bytes = net.shared_bytes(true, resident);
  const auto kernel = resident ? nodes_backward_kernel<A, true> : nodes_backward_kernel<A, false>;
  allow_shared(kernel, shared_bytes);
  const DerivedNodes<A> nodes{Nodes<A>(a), fixed, A(0)};
  LOSSMETA_LAUNCH(kernel, plan.blocks, net.threads(), shared_bytes, stream, gate, net, nodes,
                  static_cast<A*>(a.workspace) + plan.partials, WeightGradients<A>(a));
}

}  // namespace

int64_t loss_network_intervals(DType dtype) {
  return shared_limit() / (dtype == DType::float64 ? backward_bytes<double> : backward_bytes<float>);
}

int64_t table_workspace(const LossNetwork& a) {
  return a.dtype == DType::float64 ? table_plan<double>(a).size : table_plan<float>(a).size;
}

void loss_network_tabulate(const LossNetwork& a, cudaStream_t stream) {
  a.dtype == DType::float64 ? tabulate<double>(a, stream) : tabulate<float>(a, stream);
}

void loss_network_table_forward(const LossNetwork& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { table_forward<typename decltype(tag)::type>(a, stream); });
}

void loss_network_table_backward(const LossNetwork& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { table_backward<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
