#include "math/distance_mixture.h"

#include "cuda/pairs.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int threads = 128, warps = threads / warp_size;

template <class T>
struct Problem {
  using A = accumulate_t<T>;

  Reduction reduction;
  int64_t count, dims, triplets;
  A min_distance;
  const T* x;
  const int64_t *triplet, *labels;
  const A* phi;
  A *statistics, *positives, *negatives, *number;  // the last three with labels
  A *loss, *terms;
  const A *grad_loss, *grad_terms;
  T* grad_embeddings;
  A *grad_phi, *partial, *pulls;

  explicit Problem(const DistanceMixture& a)
      : reduction(a.reduction),
        count(a.count),
        dims(a.dims),
        triplets(a.triplet_count),
        min_distance(A(a.min_distance)),
        x(static_cast<const T*>(a.embeddings)),
        triplet(a.triplets),
        labels(a.labels),
        phi(static_cast<const A*>(a.phi)),
        statistics(static_cast<A*>(a.statistics)),
        positives(statistics + count * count),
        negatives(positives + count),
        number(negatives + count),
        loss(static_cast<A*>(a.loss)),
        terms(static_cast<A*>(a.terms)),
        grad_loss(static_cast<const A*>(a.grad_loss)),
        grad_terms(static_cast<const A*>(a.grad_terms)),
        grad_embeddings(static_cast<T*>(a.grad_embeddings)),
        grad_phi(static_cast<A*>(a.grad_phi)),
        partial(static_cast<A*>(a.workspace)),
        pulls(partial + 10 * distance_mixture_parts(a)) {}

  __device__ A triplet_number() const { return labels ? *number : A(triplets); }
  // Gradient of one triplet's (without reduction: item i's) loss, and of F_i through the terms.
  __device__ A gradient(int64_t i, A total) const {
    if (!grad_loss || total == A(0)) return A(0);
    if (reduction == Reduction::none) return grad_loss[i];
    return reduction == Reduction::mean ? grad_loss[0] / total : grad_loss[0];
  }
  __device__ A term_gradient(int i, A total) const {
    return grad_terms && total != A(0) ? grad_terms[i] / total : A(0);
  }
  __device__ bool valid(int64_t t) const {
    for (int i = 0; i < 3; ++i)
      if (triplet[3 * t + i] < 0 || triplet[3 * t + i] >= count) return false;
    return true;
  }
};

template <class A>
__device__ A mixture(const A* phi, const A (&f)[5]) {
  A sum = A(0);
  for (int i = 0; i < 5; ++i) sum += math::weighted_distance(phi[i], f[i]);
  return sum;
}

// The sums of the blocks' partial sums become terms and reduced loss, or the gradient of phi. One warp per column.
template <class T>
__global__ void finish_kernel(Problem<T> p, int64_t parts, bool forward) {
  using A = accumulate_t<T>;
  __shared__ A sums[10];
  const int column = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  A sum = A(0), number = A(0);
  for (int64_t i = lane; i < parts; i += warp_size) sum += p.partial[i * 10 + column];
  sum = warp_sum(sum);
  if (forward && p.labels) {
    for (int64_t i = lane; i < p.count; i += warp_size) number += p.positives[i] * p.negatives[i];
    number = warp_sum(number);
    if (threadIdx.x == 0) *p.number = number;
  } else {
    number = A(p.triplets);
  }
  if (lane == 0) sums[column] = sum;
  if (!forward) {
    if (lane == 0) p.grad_phi[column] = sum;
    return;
  }
  if (lane == 0) p.terms[column] = number == A(0) ? A(0) : sum / number;
  __syncthreads();
  if (threadIdx.x != 0 || p.reduction == Reduction::none) return;
  A mixed = A(0);
  for (int i = 0; i < 10; ++i) mixed += math::weighted_distance(p.phi[i], sums[i]);
  *p.loss = p.reduction == Reduction::sum ? mixed : number == A(0) ? A(0) : mixed / number;
}

// ---- Triplets.

// Distances by a warp per triplet, then the functions of them by a thread per triplet.
template <class T>
__global__ void __launch_bounds__(threads) forward_triplets_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  const int64_t first = int64_t(blockIdx.x) * threads;
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  __shared__ A near_distance[threads], far_distance[threads];
  for (int i = warp; i < threads && first + i < p.triplets; i += warps) {
    const int64_t t = first + i;
    A near = A(NAN), far = A(NAN);
    if (p.valid(t)) {
      const T *anchor = p.x + p.triplet[3 * t] * p.dims, *positive = p.x + p.triplet[3 * t + 1] * p.dims,
              *negative = p.x + p.triplet[3 * t + 2] * p.dims;
      near = far = A(0);
      for (int64_t k = lane; k < p.dims; k += warp_size) {
        const A x = math::load(anchor + k), u = x - math::load(positive + k),
                v = x - math::load(negative + k);
        near += u * u;
        far += v * v;
      }
    }
    near = math::sqrt(warp_sum(near));
    far = math::sqrt(warp_sum(far));
    if (lane == 0) near_distance[i] = near, far_distance[i] = far;
  }
  __syncthreads();
  const int64_t t = first + threadIdx.x;
  A sums[10] = {};
  if (t < p.triplets) {
    const A near = near_distance[threadIdx.x], far = far_distance[threadIdx.x];
    const auto increasing = math::increasing_distances(near);
    const auto decreasing = math::decreasing_distances(far, p.min_distance);
    p.statistics[t] = near;
    p.statistics[p.triplets + t] = far;
    for (int i = 0; i < 5; ++i) sums[i] = increasing.value[i], sums[5 + i] = decreasing.value[i];
    if (p.reduction == Reduction::none)
      p.loss[t] =
          p.valid(t) ? mixture(p.phi, increasing.value) + mixture(p.phi + 5, decreasing.value) : A(NAN);
  }
  block_sum<threads>(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 10; ++i) p.partial[int64_t(blockIdx.x) * 10 + i] = sums[i];
}

// The weights of (anchor - positive) and of (anchor - negative) in the gradient of the anchor; 0 for a bad triplet.
template <class T>
__global__ void __launch_bounds__(threads) pulls_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  const int64_t t = int64_t(blockIdx.x) * threads + threadIdx.x;
  A sums[10] = {};
  if (t < p.triplets) {
    const bool valid = p.valid(t);
    const A total = A(p.triplets), g = p.gradient(t, total);
    const auto near = math::increasing_distances(p.statistics[t]);
    const auto far = math::decreasing_distances(p.statistics[p.triplets + t], p.min_distance);
    A near_pull = A(0), far_pull = A(0);
    for (int i = 0; i < 5 && valid; ++i) {
      near_pull += math::weighted_distance(g * p.phi[i] + p.term_gradient(i, total), near.pull[i]);
      far_pull += math::weighted_distance(g * p.phi[5 + i] + p.term_gradient(5 + i, total), far.pull[i]);
      sums[i] = math::coefficient_gradient(p.phi[i], g, near.value[i]);
      sums[5 + i] = math::coefficient_gradient(p.phi[5 + i], g, far.value[i]);
    }
    p.pulls[t] = near_pull;
    p.pulls[p.triplets + t] = far_pull;
  }
  if (!p.grad_phi) return;
  block_sum<threads>(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 10; ++i) p.partial[int64_t(blockIdx.x) * 10 + i] = sums[i];
}

constexpr int owned = 8;  // embeddings of a warp

// Each warp looks through all triplets, in their order, for those of its embeddings and adds what they pull: no atomics,
// and the same order of additions in every run.
template <class T>
__global__ void __launch_bounds__(threads) collect_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  __shared__ A shared[warps][owned][block_dims];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  const int64_t first = (int64_t(blockIdx.x) * warps + warp) * owned,
                first_dim = int64_t(blockIdx.y) * block_dims;
  if (first >= p.count) return;
  auto& sum = shared[warp];  // each lane has columns of its own
  for (int r = 0; r < owned; ++r)
    for (int k = lane; k < block_dims; k += warp_size) sum[r][k] = A(0);
  const auto add = [&](int row, int64_t other, A pull) {
    if (pull == A(0)) return;
    for (int k = lane; k < block_dims && first_dim + k < p.dims; k += warp_size) {
      const int64_t at = first_dim + k;
      sum[row][k] +=
          pull * (math::load(p.x + (first + row) * p.dims + at) - math::load(p.x + other * p.dims + at));
    }
  };
  const int64_t entries = 3 * p.triplets;
  for (int64_t start = 0; start < entries; start += warp_size) {
    const int64_t offset = start + lane < entries ? p.triplet[start + lane] - first : -1;
    const bool mine = offset >= 0 && offset < owned && first + offset < p.count;
    for (unsigned hits = __ballot_sync(all_lanes, mine); hits; hits &= hits - 1) {
      const int hit = __ffs(int(hits)) - 1, row = __shfl_sync(all_lanes, int(offset), hit);
      const int64_t t = (start + hit) / 3;
      const int role = int((start + hit) % 3);
      const A near = p.pulls[t], far = p.pulls[p.triplets + t];
      if (role == 0) {
        add(row, p.triplet[3 * t + 1], near);
        add(row, p.triplet[3 * t + 2], far);
      } else {
        add(row, p.triplet[3 * t], role == 1 ? near : far);
      }
    }
  }
  for (int r = 0; r < owned && first + r < p.count; ++r)
    for (int k = lane; k < block_dims && first_dim + k < p.dims; k += warp_size)
      math::store(p.grad_embeddings + (first + r) * p.dims + first_dim + k, sum[r][k]);
}

// ---- Labels: all valid triplets.

// One block per anchor.
template <class T>
__global__ void __launch_bounds__(threads) forward_labels_kernel(Problem<T> p) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, label = p.labels[row];
  const A* d = p.statistics + row * p.count;
  A sums[12] = {};  // of F, of positives and of negatives
  for (int64_t b = threadIdx.x; b < p.count; b += threads) {
    if (b == row) continue;
    const bool same = p.labels[b] == label;
    const auto f = same ? math::increasing_distances(d[b]) : math::decreasing_distances(d[b], p.min_distance);
    for (int i = 0; i < 5; ++i) sums[i] += same ? f.value[i] : A(0), sums[5 + i] += same ? A(0) : f.value[i];
    sums[10] += A(same);
    sums[11] += A(!same);
  }
  block_sum<threads>(sums);
  if (threadIdx.x != 0) return;
  const A positives = sums[10], negatives = sums[11];
  p.positives[row] = positives;
  p.negatives[row] = negatives;
  A mixed = A(0);
  for (int i = 0; i < 10; ++i) {
    const A times = i < 5 ? negatives : positives, other = i < 5 ? positives : negatives;
    const A sum = times == A(0) || other == A(0) ? A(0) : times * sums[i];
    p.partial[row * 10 + i] = sum;
    mixed += math::weighted_distance(p.phi[i], sum);
  }
  if (p.reduction == Reduction::none) p.loss[row] = mixed;
}

// A pair occurs in the triplets of both its embeddings: negatives (or positives) of either times.
template <class T>
struct LabelPair {
  using A = accumulate_t<T>;
  static constexpr int sums = 10;
  Problem<T> p;

  __device__ A operator()(int64_t a, int64_t b, A* sums) const {
    if (a == b) return A(0);
    const bool same = p.labels[a] == p.labels[b];
    const A total = *p.number;
    const A *times = same ? p.negatives : p.positives, *others = same ? p.positives : p.negatives;
    const A times_a = others[a] == A(0) ? A(0) : times[a], times_b = others[b] == A(0) ? A(0) : times[b];
    const A g_a = times_a == A(0) ? A(0) : times_a * p.gradient(a, total);
    const A g_b = times_b == A(0) ? A(0) : times_b * p.gradient(b, total);
    const A d = p.statistics[a * p.count + b];
    const auto f = same ? math::increasing_distances(d) : math::decreasing_distances(d, p.min_distance);
    const int first = same ? 0 : 5;
    A pull = A(0);
    for (int i = 0; i < 5; ++i) {
      const A h = p.term_gradient(first + i, total);
      pull += math::weighted_distance((g_a + g_b) * p.phi[first + i] + (times_a + times_b) * h, f.pull[i]);
      const A slope = times_a == A(0) ? A(0) : math::coefficient_gradient(p.phi[first + i], g_a, f.value[i]);
      sums[i] += same ? slope : A(0);
      sums[5 + i] += same ? A(0) : slope;
    }
    return pull;
  }
};

template <class T>
void forward(const DistanceMixture& a, cudaStream_t stream) {
  const Problem<T> p(a);
  const int64_t parts = a.labels ? a.count : (a.triplet_count + threads - 1) / threads;
  if (a.labels) launch_pair_distances(p.x, p.statistics, a.count, a.dims, stream);
  if (parts && a.labels) LOSSMETA_LAUNCH(forward_labels_kernel<T>, unsigned(parts), threads, 0, stream, p);
  if (parts && !a.labels) LOSSMETA_LAUNCH(forward_triplets_kernel<T>, unsigned(parts), threads, 0, stream, p);
  LOSSMETA_LAUNCH(finish_kernel<T>, 1, 10 * warp_size, 0, stream, p, parts, true);
}

template <class T>
void backward(const DistanceMixture& a, cudaStream_t stream) {
  const Problem<T> p(a);
  int64_t parts;
  if (a.labels) {
    parts = (a.count + gradient_rows - 1) / gradient_rows;
    launch_pair_gradient(p.x, p.grad_embeddings, p.grad_phi ? p.partial : nullptr, a.count, a.dims,
                         LabelPair<T>{p}, stream);
  } else {
    parts = (a.triplet_count + threads - 1) / threads;
    if (parts) LOSSMETA_LAUNCH(pulls_kernel<T>, unsigned(parts), threads, 0, stream, p);
    const unsigned rows = unsigned((a.count + warps * owned - 1) / (warps * owned));
    const unsigned columns = unsigned((a.dims + block_dims - 1) / block_dims);
    if (p.grad_embeddings && rows && columns)
      LOSSMETA_LAUNCH(collect_kernel<T>, dim3(rows, columns), threads, 0, stream, p);
  }
  if (p.grad_phi) LOSSMETA_LAUNCH(finish_kernel<T>, 1, 10 * warp_size, 0, stream, p, parts, false);
}

}  // namespace

void distance_mixture_forward(const DistanceMixture& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a, stream); });
}

void distance_mixture_backward(const DistanceMixture& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
