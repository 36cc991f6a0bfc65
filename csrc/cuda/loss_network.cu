#include "cuda/loss_network_rows.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int long_row = 1024, row_threads = 256, block_lanes = 512;

// Gradients of the weights are summed by at most this many blocks: the result depends on the device only through the
// tile that its shared memory holds.
constexpr int64_t gradient_blocks = 512, forward_blocks = 2048;

// Half precision cannot keep the softmax's cotangents where their result goes, and so goes backward a few rows at a
// time; in at most so many passes, as each costs three launches.
constexpr int64_t most_passes = 16;

// Where a call keeps what in the workspace, in elements of A.
struct ExactPlan {
  int64_t rows, tiles, segments;  // of a pass
  int tile;
  int64_t softmaxes, parts, cotangents, partials, size;
};

inline int64_t gradient_parts(int64_t tiles) { return tiles < gradient_blocks ? tiles : gradient_blocks; }

template <class A>
ExactPlan exact_plan(const LossNetwork& a) {
  const Network<A> net(a);
  const bool half = a.dtype == DType::bfloat16 || a.dtype == DType::float16;
  const bool keeps_cotangents = a.softmax && half && a.grad_pred;
  ExactPlan plan{};
  plan.rows = a.samples;
  if (keeps_cotangents) {
    const int64_t fitting = a.kept_cotangents / a.classes,
                  least = (a.samples + most_passes - 1) / most_passes;
    const int64_t rows = fitting > least ? fitting : least;
    if (rows < plan.rows) plan.rows = rows;
  }
  plan.tile = net.tile;
  plan.tiles = (plan.rows * a.classes + net.tile - 1) / net.tile;
  plan.segments = (net.tile + a.classes - 2) / a.classes + 1;
  const int64_t passes = plan.rows ? (a.samples + plan.rows - 1) / plan.rows : 0;
  const auto take = [&](int64_t elements) { return (plan.size += elements) - elements; };
  plan.softmaxes = take(a.softmax ? 3 * plan.rows : 0);
  plan.parts = take(a.sigmoid ? 0 : 2 * plan.tiles * plan.segments);
  plan.cotangents = take(keeps_cotangents ? plan.rows * a.classes : 0);
  plan.partials = take(a.grad_input_weight ? passes * gradient_parts(plan.tiles) * net.gradient_size() : 0);
  return plan;
}

// The array from an element on; null stays null.
template <class T, class Pointer>
T* from(Pointer array, int64_t element) {
  return array ? static_cast<T*>(array) + element : nullptr;
}

// The arguments with their types, and what the passes leave for one another. A row's sums come in parts, one for each
// tile that the row touches.
template <class T>
struct Problem {
  using A = accumulate_t<T>;
  RowLabels rows;
  bool softmax, sigmoid;
  int64_t segments;  // rows that a tile may touch
  int tile;
  A inverse_classes;
  const T* pred;
  const A* target;
  const A* grad_loss;
  const A* grad_slope;
  A* loss;
  A* slope;  // with the softmax link first g, then the slope
  T* grad_pred;
  Softmax<A>* softmaxes;  // [N]
  Sums<A>* parts;         // [tiles, segments]
  A* cotangents;          // [N, C]: r + g (U - sum f U) before the pullback; may be grad_pred

  // Of the rows [first, first + count).
  Problem(const LossNetwork& a, const ExactPlan& plan, int64_t first, int64_t count)
      : rows(a, first, count),
        softmax(a.softmax),
        sigmoid(a.sigmoid),
        segments(plan.segments),
        tile(plan.tile),
        inverse_classes(A(1) / A(a.classes)),
        pred(from<const T>(a.pred, first * a.classes)),
        target(from<const A>(a.target, first * a.classes)),
        grad_loss(from<const A>(a.grad_loss, first)),
        grad_slope(from<const A>(a.grad_slope, first * a.classes)),
        loss(from<A>(a.loss, first)),
        slope(from<A>(a.slope, first * a.classes)),
        grad_pred(from<T>(a.grad_pred, first * a.classes)) {
    A* const base = static_cast<A*>(a.workspace);
    softmaxes = reinterpret_cast<Softmax<A>*>(base + plan.softmaxes);
    parts = reinterpret_cast<Sums<A>*>(base + plan.parts);
    if constexpr (std::is_same_v<T, A>) {
      cotangents = grad_pred;
    } else {
      cotangents = base + plan.cotangents;
    }
  }

  // Sum over the parts of row n.
  template <int lanes>
  __device__ Sums<A> row_sums(int64_t n, int lane) const {
    const int64_t first = n * rows.classes / tile, last = ((n + 1) * rows.classes - 1) / tile;
    Sums<A> sum{};
    for (int64_t k = first + lane; k <= last; k += lanes) {
      const Sums<A> part = parts[k * segments + n - k * tile / rows.classes];
      sum.first += part.first, sum.second += part.second;
    }
    return {reduce_sum<lanes>(sum.first), reduce_sum<lanes>(sum.second)};
  }
};

// ---- The elements of pred, in the order of memory.

template <class T>
struct PredElements {
  using A = accumulate_t<T>;
  Problem<T> p;
  int64_t count;

  __device__ Input<A> input(int64_t e) const {
    const int64_t n = e / p.rows.classes;
    if (p.rows.state(n) != RowState::live) return {};
    const A x = math::load(p.pred + e);
    const A y = p.target ? p.target[e] : A(p.rows.labels[n] == (p.sigmoid ? 1 : e - n * p.rows.classes));
    return {p.softmax ? p.softmaxes[n](x) : p.sigmoid ? math::sigmoid<A>(x).value : x, y};
  }
  // sigmoid'(x)
  __device__ A link_slope(int64_t e) const { return math::sigmoid<A>(A(math::load(p.pred + e))).slope; }

  // Sums of the elements of each row, a warp for each.
  __device__ void segments(const Sums<A>* sums,  // [size]
                           int64_t tile, int size) const {
    const int64_t start = tile * size, classes = p.rows.classes, row = start / classes;
    const int64_t end = start + size < count ? start + size : count;
    const int used = int((end - 1) / classes - row) + 1, lane = threadIdx.x % 32;
    for (int s = threadIdx.x / 32; s < used; s += blockDim.x / 32) {
      const int64_t from = (row + s) * classes, to = from + classes;
      const int last = int((to < end ? to : end) - start);
      Sums<A> sum{};
      for (int e = (from > start ? int(from - start) : 0) + lane; e < last; e += 32)
        sum.first += sums[e].first, sum.second += sums[e].second;
      sum = {reduce_sum<32>(sum.first), reduce_sum<32>(sum.second)};
      if (lane == 0) p.parts[tile * p.segments + s] = sum;
    }
  }
};

template <class T>
struct ForwardElements : PredElements<T> {
  using A = accumulate_t<T>;
  using PredElements<T>::p;

  // Parts of sum l and sum f g. A label is done.
  __device__ Sums<A> finish(int64_t e, A f, A value, A slope) const {
    const RowState state = p.rows.state(e / p.rows.classes);
    if (state != RowState::live) {
      const A dead = state == RowState::ignored ? A(0) : A(NAN);
      p.slope[e] = dead;
      if (p.sigmoid) p.loss[e] = dead;
      return {dead, dead};
    }
    if (p.sigmoid) {
      p.loss[e] = value, p.slope[e] = slope * this->link_slope(e);
      return {};
    }
    const A g = slope * p.inverse_classes;
    p.slope[e] = g;
    return {value, f * g};
  }

  __device__ void segments(const Sums<A>* sums, int64_t tile, int size) const {
    if (!p.sigmoid) PredElements<T>::segments(sums, tile, size);
  }
};

template <class T>
struct BackwardElements : PredElements<T> {
  using A = accumulate_t<T>;
  using PredElements<T>::p;
  static constexpr bool has_input_gradient = true;

  // U - sum f U
  __device__ A centred(int64_t e, int64_t n) const {
    if (!p.grad_slope) return 0;
    return p.softmax ? p.grad_slope[e] - p.softmaxes[n].dot : p.grad_slope[e];
  }

  __device__ Cotangents<A> cotangents(int64_t e, A f) const {
    const int64_t n = e / p.rows.classes;
    if (p.rows.state(n) != RowState::live) return {};
    const A u = p.grad_loss ? p.grad_loss[n] * p.inverse_classes : A(0);
    const A link = p.softmax ? f : p.sigmoid ? this->link_slope(e) : A(1);
    return {u, link * centred(e, n) * p.inverse_classes};
  }

  // Parts of sum f g and sum f D, D without its term in sum f g.
  __device__ Sums<A> finish(int64_t e, A f, A r, A slope) const {
    if (!p.grad_pred) return {};
    const int64_t n = e / p.rows.classes;
    const bool live = p.rows.state(n) == RowState::live;
    if (p.sigmoid && live) r = this->link_slope(e) * (r + slope * centred(e, n) * (A(1) - A(2) * f));
    if (!p.softmax) {
      math::store(p.grad_pred + e, live ? r : A(0));
      return {};
    }
    const A g = slope * p.inverse_classes, d = r + g * centred(e, n);
    p.cotangents[e] = d;
    return {f * g, f * d};
  }

  __device__ void segments(const Sums<A>* sums, int64_t tile, int size) const {
    if (p.softmax && p.grad_pred) PredElements<T>::segments(sums, tile, size);
  }
};

template <class A, bool resident, class Elements>
__global__ void __launch_bounds__(max_network_threads, network_blocks<A>)
    network_backward_kernel(Gate<A> gate, Network<A> net, Elements elements, A* partials) {
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (!gate.closed()) network_backward<A, resident>(net, elements, shared, partials);
}

// ---- Passes over rows.

// f(n, lane) for every row, `lanes` threads each.
template <int lanes, class F>
__device__ void each_row(int64_t samples, F&& body) {
  const int64_t step = int64_t(gridDim.x) * (blockDim.x / lanes);
  for (int64_t n = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes; n < samples; n += step)
    body(n, int(threadIdx.x % lanes));
}

template <class T, int lanes>
__global__ void softmax_kernel(Gate<accumulate_t<T>> gate, Problem<T> p) {
  if (gate.closed()) return;
  each_row<lanes>(p.rows.samples, [&](int64_t n, int lane) {
    const int64_t at = n * p.rows.classes;
    StreamedRow<T, lanes, 1> row;
    row.open(p.pred + at, p.grad_slope ? p.grad_slope + at : nullptr, p.rows.classes, lane);
    if (lane == 0) p.softmaxes[n] = row.softmax;
  });
}

template <class T, int lanes>
__global__ void finish_forward_kernel(Gate<accumulate_t<T>> gate, Problem<T> p) {
  using A = accumulate_t<T>;
  if (gate.closed()) return;
  each_row<lanes>(p.rows.samples, [&](int64_t n, int lane) {
    const Sums<A> sum = p.template row_sums<lanes>(n, lane);
    if (lane == 0) p.loss[n] = sum.first * p.inverse_classes;
    if (!p.softmax || p.rows.state(n) != RowState::live) return;
    for (int64_t e = n * p.rows.classes + lane; e < (n + 1) * p.rows.classes; e += lanes)
      p.slope[e] = p.softmaxes[n](math::load(p.pred + e)) * (p.slope[e] - sum.second);
  });
}

// The softmax's pullback. D_j - sum f D = d_j - (U_j - sum f U) sum f g - sum f d, with d as the elements leave it.
template <class T, int lanes>
__global__ void finish_backward_kernel(Gate<accumulate_t<T>> gate, Problem<T> p) {
  using A = accumulate_t<T>;
  if (gate.closed()) return;
  each_row<lanes>(p.rows.samples, [&](int64_t n, int lane) {
    const Sums<A> sum = p.template row_sums<lanes>(n, lane);
    const bool live = p.rows.state(n) == RowState::live;
    for (int64_t e = n * p.rows.classes + lane; e < (n + 1) * p.rows.classes; e += lanes) {
      const A centred = p.grad_slope ? p.grad_slope[e] - p.softmaxes[n].dot : A(0);
      const A d = p.cotangents[e] - centred * sum.first - sum.second;
      math::store(p.grad_pred + e, live ? p.softmaxes[n](math::load(p.pred + e)) * d : A(0));
    }
  });
}

// Adds up the blocks' gradients: a warp's lanes are neighbouring entries, its y the strided parts of their sums.
constexpr int sum_slices = 8;
template <class A>
__global__ void sum_partials_kernel(Gate<A> gate,
                                    const A* partials,  // [blocks, size]
                                    int blocks, int size, WeightGradients<A> gradients) {
  __shared__ A parts[sum_slices][32];
  if (gate.closed()) return;
  const int i = blockIdx.x * 32 + threadIdx.x;
  A sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int k = threadIdx.y; k < blocks; k += sum_slices) sum += partials[int64_t(k) * size + i];
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
  for (int k = 1; k < sum_slices; ++k) sum += parts[k][threadIdx.x];
  gradients[i] = sum;
}

// ---- Launches.

template <class T>
class Exact {
  using A = accumulate_t<T>;
  const LossNetwork& a_;
  const cudaStream_t stream_;
  const ExactPlan plan_;
  const Gate<A> gate_;
  const Network<A> net_;

 public:
  Exact(const LossNetwork& a, cudaStream_t stream)
      : a_(a), stream_(stream), plan_(exact_plan<A>(a)), gate_(exact_gate<A>(a)), net_(a) {}

  void forward() const {
    if (a_.samples == 0) return;
    const Problem<T> problem(a_, plan_, 0, a_.samples);
    if (a_.softmax) rows(problem, [&](auto lanes) { return softmax_kernel<T, decltype(lanes)::value>; });
    const ForwardElements<T> elements{{problem, a_.samples * a_.classes}};
    const int64_t blocks = plan_.tiles < forward_blocks ? plan_.tiles : forward_blocks;
    if (net_.resident(false)) {
      network<false>(network_forward_kernel<A, true, ForwardElements<T>>, true, blocks, elements);
    } else {
      network<false>(network_forward_kernel<A, false, ForwardElements<T>>, false, blocks, elements);
    }
    if (!a_.sigmoid)
      rows(problem, [&](auto lanes) { return finish_forward_kernel<T, decltype(lanes)::value>; });
  }

  void backward() const {
    A* const partials = a_.grad_input_weight ? static_cast<A*>(a_.workspace) + plan_.partials : nullptr;
    const int size = net_.gradient_size();
    int parts = 0;
    for (int64_t first = 0; first < a_.samples; first += plan_.rows) {
      const int64_t left = a_.samples - first;
      const Problem<T> problem(a_, plan_, first, left < plan_.rows ? left : plan_.rows);
      parts += backward(problem, partials ? partials + int64_t(parts) * size : nullptr);
    }
    if (!a_.grad_input_weight) return;
    LOSSMETA_LAUNCH(sum_partials_kernel<A>, (size + 31) / 32, dim3(32, sum_slices), 0, stream_, gate_,
                    partials, parts, size, WeightGradients<A>(a_));
  }

 private:
  // One pass; returns how many parts of the weights' gradients it leaves.
  int backward(const Problem<T>& problem, A* partials) const {
    if (a_.softmax) rows(problem, [&](auto lanes) { return softmax_kernel<T, decltype(lanes)::value>; });
    const int64_t count = problem.rows.samples * a_.classes, tiles = (count + plan_.tile - 1) / plan_.tile;
    const BackwardElements<T> elements{{problem, count}};
    const int blocks = int(gradient_parts(tiles));
    if (net_.resident(true)) {
      network<true>(network_backward_kernel<A, true, BackwardElements<T>>, true, blocks, elements, partials);
    } else {
      network<true>(network_backward_kernel<A, false, BackwardElements<T>>, false, blocks, elements,
                    partials);
    }
    if (a_.softmax && a_.grad_pred)
      rows(problem, [&](auto lanes) { return finish_backward_kernel<T, decltype(lanes)::value>; });
    return blocks;
  }

  template <bool backward, class Kernel, class... More>
  void network(Kernel* kernel, bool resident, int64_t blocks, const More&... arguments) const {
    const int bytes = net_.shared_bytes(backward, resident);
    allow_shared(kernel, bytes);
    LOSSMETA_LAUNCH(kernel, blocks, net_.threads(), bytes, stream_, gate_, net_, arguments...);
  }

  // A warp for each row, or a block for each long one.
  template <class Choose>
  void rows(const Problem<T>& problem, const Choose& choose) const {
    const int64_t limit = 1 << 20, samples = problem.rows.samples;
    if (a_.classes > long_row) {
      const auto kernel = choose(std::integral_constant<int, block_lanes>{});
      LOSSMETA_LAUNCH(kernel, samples < limit ? samples : limit, block_lanes, 0, stream_, gate_, problem);
    } else {
      const auto kernel = choose(std::integral_constant<int, 32>{});
      const int64_t blocks = (samples + row_threads / 32 - 1) / (row_threads / 32);
      LOSSMETA_LAUNCH(kernel, blocks < limit ? blocks : limit, row_threads, 0, stream_, gate_, problem);
    }
  }
};

}  // namespace

int64_t loss_network_workspace(const LossNetwork& a) {
  int64_t size = 0;
  visit_dtype(a.dtype,
              [&](auto tag) { size = exact_plan<accumulate_t<typename decltype(tag)::type>>(a).size; });
  const int64_t table = a.intervals ? table_workspace(a) : 0;
  return size > table ? size : table;
}

void loss_network_forward(const LossNetwork& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { Exact<typename decltype(tag)::type>(a, stream).forward(); });
}

void loss_network_backward(const LossNetwork& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { Exact<typename decltype(tag)::type>(a, stream).backward(); });
}

}  // namespace lossmeta::cuda
