#include "math/focal_weighting.h"

#include "cuda/pairs.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int threads = 128, warps = threads / warp_size;

template <class T>
struct Problem {
  using A = accumulate_t<T>;

  Reduction reduction;
  int64_t count, dims;
  A offset;
  const T* x;
  const int64_t* labels;
  const A* phi;
  A *distances, *log_sums, *entropies;  // the latter two: [2, count]
  A* loss;
  const A* grad;
  T* grad_embeddings;
  A* grad_phi;

  explicit Problem(const FocalWeighting& a)
      : reduction(a.reduction),
        count(a.count),
        dims(a.dims),
        offset(A(a.offset)),
        x(static_cast<const T*>(a.embeddings)),
        labels(a.labels),
        phi(static_cast<const A*>(a.phi)),
        distances(static_cast<A*>(a.statistics)),
        log_sums(distances + count * count),
        entropies(log_sums + 2 * count),
        loss(static_cast<A*>(a.loss)),
        grad(static_cast<const A*>(a.grad)),
        grad_embeddings(static_cast<T*>(a.grad_embeddings)),
        grad_phi(static_cast<A*>(a.grad_phi)) {}

  __device__ bool valid() const {
    return phi[0] > A(0) && phi[1] > A(0) && phi[0] < A(INFINITY) && phi[1] < A(INFINITY);
  }
  __device__ A gradient(int64_t i) const {
    if (reduction == Reduction::none) return grad[i];
    return reduction == Reduction::mean ? grad[0] / A(count) : grad[0];
  }
  __device__ A anchor_loss(int64_t i) const {
    return math::focal_loss(phi, log_sums[i], log_sums[count + i]);
  }
};

// The larger of the two, NaN if either is.
template <class A>
__device__ A max_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

template <class A>
__device__ A block_max(A value) {
  __shared__ A shared[warps];
  for (int offset = warp_size / 2; offset > 0; offset /= 2)
    value = max_or_nan(value, __shfl_xor_sync(all_lanes, value, offset));
  __syncthreads();  // what an earlier call left has been read
  if (threadIdx.x % warp_size == 0) shared[threadIdx.x / warp_size] = value;
  __syncthreads();
  for (int w = 0; w < warps; ++w) value = max_or_nan(value, shared[w]);
  return value;
}

// One block per anchor: the maxima of the exponents (at least 0), then the sums relative to them.
template <class T>
__global__ void __launch_bounds__(threads) forward_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, label = p.labels[row];
  const A* d = p.distances + row * p.count;
  const A scale[2] = {p.phi[0], -p.phi[1]};
  A maxima[2] = {A(0), A(0)};
  for (int64_t b = threadIdx.x; b < p.count; b += threads) {
    const int side = p.labels[b] == label ? 0 : 1;
    if (b == row) continue;
    if (side == 0)
      maxima[0] = max_or_nan(maxima[0], scale[0] * (d[b] - p.offset));
    else
      maxima[1] = max_or_nan(maxima[1], scale[1] * (d[b] - p.offset));
  }
  maxima[0] = block_max(maxima[0]);
  maxima[1] = block_max(maxima[1]);
  A sums[4] = {};  // of exp(s - m) on both sides, and of (s - m) exp(s - m)
  for (int64_t b = threadIdx.x; b < p.count; b += threads) {
    if (b == row) continue;
    const int side = p.labels[b] == label ? 0 : 1;
    const A below =
        (side == 0 ? scale[0] : scale[1]) * (d[b] - p.offset) - (side == 0 ? maxima[0] : maxima[1]);
    const A e = math::exp(below), moment = e == A(0) ? A(0) : e * below;
    if (side == 0)
      sums[0] += e, sums[2] += moment;
    else
      sums[1] += e, sums[3] += moment;
  }
  block_sum<threads>(sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const A m = maxima[side];
    const auto result = math::focal_statistics(m, sums[side], sums[2 + side]);
    // An infinite maximum makes the loss infinite, and a NaN makes it NaN.
    p.log_sums[side * p.count + row] = !p.valid() ? A(NAN) : m < A(INFINITY) ? result.log_sum : m;
    p.entropies[side * p.count + row] = result.entropy;
  }
  if (p.reduction == Reduction::none) p.loss[row] = p.anchor_loss(row);
}

// One block: the reduced loss.
template <class T>
__global__ void __launch_bounds__(threads) reduce_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  A sum[1] = {};
  for (int64_t i = threadIdx.x; i < p.count; i += threads) sum[0] += p.anchor_loss(i);
  block_sum<threads>(sum);
  if (threadIdx.x == 0) *p.loss = p.reduction == Reduction::mean && p.count ? sum[0] / A(p.count) : sum[0];
}

template <class T>
struct FocalPair {
  using A = accumulate_t<T>;
  static constexpr int sums = 1;  // none: the gradient of phi comes from the statistics
  Problem<T> p;

  __device__ A operator()(int64_t a, int64_t b, A*) const {
    const A d = p.distances[a * p.count + b];
    if (a == b || d == A(0) || !p.valid()) return A(0);
    const int side = p.labels[a] == p.labels[b] ? 0 : 1;
    const A* log_sums = p.log_sums + side * p.count;
    const A s = (side == 0 ? p.phi[0] : -p.phi[1]) * (d - p.offset);
    const A weight = math::exp(s - log_sums[a]) * p.gradient(a) + math::exp(s - log_sums[b]) * p.gradient(b);
    return (side == 0 ? weight : -weight) / d;
  }
};

// One block.
template <class T>
__global__ void __launch_bounds__(threads) phi_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  A sums[2] = {};
  for (int64_t i = threadIdx.x; i < p.count && p.valid(); i += threads) {
    const A g = p.gradient(i);
    sums[0] += g * math::focal_phi_slope(p.phi[0], p.entropies[i]);
    sums[1] += g * math::focal_phi_slope(p.phi[1], p.entropies[p.count + i]);
  }
  block_sum<threads>(sums);
  if (threadIdx.x < 2) p.grad_phi[threadIdx.x] = threadIdx.x ? sums[1] : sums[0];
}

template <class T>
void forward(const FocalWeighting& a, cudaStream_t stream) {
  const Problem<T> p(a);
  launch_pair_distances(p.x, p.distances, a.count, a.dims, stream);
  if (a.count) LOSSMETA_LAUNCH(forward_kernel<T>, unsigned(a.count), threads, 0, stream, p);
  if (a.reduction != Reduction::none) LOSSMETA_LAUNCH(reduce_kernel<T>, 1, threads, 0, stream, p);
}

template <class T>
void backward(const FocalWeighting& a, cudaStream_t stream) {
  const Problem<T> p(a);
  if (p.grad_embeddings)
    launch_pair_gradient(p.x, p.grad_embeddings, static_cast<accumulate_t<T>*>(nullptr), a.count, a.dims,
                         FocalPair<T>{p}, stream);
  if (p.grad_phi) LOSSMETA_LAUNCH(phi_kernel<T>, 1, threads, 0, stream, p);
}

}  // namespace

void focal_weighting_forward(const FocalWeighting& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a, stream); });
}

void focal_weighting_backward(const FocalWeighting& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
