#include "math/parametric_cross_entropy.h"

#include "cuda/group.cuh"

namespace lossmeta::cuda {
namespace {

// The typed view of the arguments; samples are numbered through all models.
template <class T>
struct Problem : Statistics<accumulate_t<T>> {
  using A = accumulate_t<T>;
  using Statistics<A>::maximum, Statistics<A>::log_sum, Statistics<A>::z, Statistics<A>::q_sum,
      Statistics<A>::denominator;

  int64_t models, samples, classes, inner, ignore_index, phi_stride;
  bool sigmoid;
  Reduction reduction;
  const T* logits;        // [B, N, C, inner]
  const int64_t* labels;  // [B, S] or null
  const A* phi;           // [B, C, C]; without labels as logits
  const A* weight;        // [C] or null

  explicit Problem(const ParametricCrossEntropy& a)
      : Statistics<A>(a),
        models(a.models),
        samples(a.samples),
        classes(a.classes),
        inner(a.inner),
        ignore_index(a.ignore_index),
        phi_stride(a.phi_stride),
        sigmoid(a.sigmoid),
        reduction(a.reduction),
        logits(static_cast<const T*>(a.logits)),
        labels(a.labels),
        phi(static_cast<const A*>(a.phi)),
        weight(static_cast<const A*>(a.weight)) {}

  LOSSMETA_HD int64_t total() const { return models * samples; }
  LOSSMETA_HD int64_t offset(int64_t i) const {
    return inner == 1 ? i * classes : i / inner * classes * inner + i % inner;
  }
  LOSSMETA_HD bool ignored(int64_t i) const { return labels && labels[i] == ignore_index; }
  // Neither ignored nor, with a label that nobody has looked at, out of bounds.
  LOSSMETA_HD bool valid(int64_t i) const {
    return !labels || (labels[i] >= 0 && labels[i] < classes && labels[i] != ignore_index);
  }
  LOSSMETA_HD const A* q(int64_t i) const {  // of a valid sample; its classes are q_step() apart
    return labels ? phi + (models == 1 ? 0 : i / samples * phi_stride) + labels[i] * classes
                  : phi + offset(i);
  }
  LOSSMETA_HD int64_t q_step() const { return labels ? 1 : inner; }
  LOSSMETA_HD A class_weight(int64_t i) const {
    return !valid(i) ? A(0) : weight && labels ? weight[labels[i]] : A(1);
  }
  LOSSMETA_HD A loss(int64_t i) const {
    if (ignored(i)) return A(0);
    return valid(i) ? -class_weight(i) * math::parametric_activation(z[i], sigmoid) : A(NAN);
  }
  // dloss/dz of sample i times the incoming gradient.
  LOSSMETA_HD A slope(int64_t i, const A* grad) const {
    const int64_t model = models == 1 ? 0 : i / samples;
    A scale = -class_weight(i) * (reduction == Reduction::none ? grad[i] : grad[model]);
    if (reduction == Reduction::mean) scale /= denominator[model];
    return valid(i) && scale != A(0) ? scale * math::parametric_activation_slope(z[i], sigmoid) : A(0);
  }

  __device__ __forceinline__ void keep(int64_t i, const RowSums<A, true>& row, A* losses) const {
    const bool used = valid(i);
    const A log_sum_i = row.log_sum();
    maximum[i] = used ? row.maximum : A(0);
    log_sum[i] = used ? log_sum_i : A(0);
    q_sum[i] = used ? row.weight : A(0);
    z[i] = used ? row.dot - (row.weight == A(0) ? A(0) : row.weight * log_sum_i) : A(0);
    if (losses) losses[i] = loss(i);
  }
};

// ---- Forward. Rows: `threads` threads for each.

// Of a multiprocessor, at the least. Two leave a thread 128 registers, which float64 can exceed.
template <class T>
constexpr int forward_blocks = sizeof(accumulate_t<T>) == 8 ? 1 : 2;

template <class T, int threads, int width>
__global__ __launch_bounds__(block_threads,
                             forward_blocks<T>) void forward_rows(Problem<T> p,
                                                                  accumulate_t<T>* losses,  // [B, S] or null
                                                                  unsigned* counters) {  // [B], set to zero
  for (int64_t b = int64_t(blockIdx.x) * block_threads + threadIdx.x; b < p.models;
       b += int64_t(gridDim.x) * block_threads)
    counters[b] = 0;
  const int64_t i = int64_t(blockIdx.x) * (block_threads / threads) + threadIdx.x / threads;
  const bool used = i < p.total() && p.valid(i);
  const auto row = row_sums<threads, width, true>(p.logits + (used ? i * p.classes : 0),
                                                  used ? p.q(i) : p.phi, used ? p.classes : 0);
  if (i < p.total() && threadIdx.x % threads == 0) p.keep(i, row, losses);
}

constexpr int slices =
    8;  // of the classes where neighbouring threads take neighbouring samples: blocks of 32 x 8

template <class T>
__global__ __launch_bounds__(block_threads, forward_blocks<T>) void forward_lanes(Problem<T> p,
                                                                                  accumulate_t<T>* losses,
                                                                                  unsigned* counters) {
  using A = accumulate_t<T>;
  constexpr int items = 8;
  __shared__ A shares[4][slices][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  for (int64_t b = int64_t(blockIdx.x) * block_threads + threadIdx.x; b < p.models;
       b += int64_t(gridDim.x) * block_threads)
    counters[b] = 0;
  const int64_t i = int64_t(blockIdx.x) * 32 + lane;
  const bool used = i < p.total() && p.valid(i);
  const T* x = p.logits + (used ? p.offset(i) : 0);
  const A* q = used ? p.q(i) : p.phi;
  RowSums<A, true> row;
  for (int64_t first = slice; used && first < p.classes; first += slices * items) {
    A logits[items], weights[items];
    for (int k = 0; k < items; ++k) {
      const int64_t c = first + k * slices;
      logits[k] = c < p.classes ? math::load(x + c * p.inner) : A(-INFINITY);
      weights[k] = c < p.classes ? q[c * p.q_step()] : A(0);
    }
    row.add(logits, weights);
  }
  shares[0][slice][lane] = row.maximum, shares[1][slice][lane] = row.sum;
  shares[2][slice][lane] = row.dot, shares[3][slice][lane] = row.weight;
  __syncthreads();
  if (slice > 0 || i >= p.total()) return;
  for (int s = 1; s < slices; ++s) {
    RowSums<A, true> other;
    other.maximum = shares[0][s][lane], other.sum = shares[1][s][lane];
    other.dot = shares[2][s][lane], other.weight = shares[3][s][lane];
    row.merge(other);
  }
  p.keep(i, row, losses);
}

// Grid: (part, model). The sums of losses and class weights in a fixed order; the last block of a model adds up the parts.
template <class T>
__global__ __launch_bounds__(block_threads) void reduce_losses(Problem<T> p,
                                                               accumulate_t<T>* reduced,  // [B] or null
                                                               accumulate_t<T>* partial,  // [B, parts, 2]
                                                               unsigned* counters) {      // [B], zero
  using A = accumulate_t<T>;
  __shared__ A shared[2][block_threads];
  const int64_t model = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  CompensatedSum<A> losses, weights;
  const int64_t begin = model * p.samples + p.samples * part / parts,
                end = model * p.samples + p.samples * (part + 1) / parts;
  for (int64_t i = begin + threadIdx.x; i < end; i += block_threads)
    losses.add(p.loss(i)), weights.add(p.class_weight(i));
  shared[0][threadIdx.x] = losses.sum, shared[1][threadIdx.x] = weights.sum;
  for (int half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      for (auto& sums : shared) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0)
    for (int k = 0; k < 2; ++k) partial[(model * parts + part) * 2 + k] = shared[k][0];
  if (!is_last_block(counters + model, unsigned(parts)) || threadIdx.x != 0) return;
  losses = weights = {};
  const volatile A* const all = partial + model * parts * 2;
  for (int64_t k = 0; k < parts; ++k) losses.add(all[2 * k]), weights.add(all[2 * k + 1]);
  p.denominator[model] = weights.sum;
  if (reduced) reduced[model] = p.reduction == Reduction::mean ? losses.sum / weights.sum : losses.sum;
}

// ---- Backward.

// dloss/dx = g (q - softmax(x) sum q) and, where q belongs to the sample, dloss/dq = g log softmax(x).
template <class A>
struct RowGradient {
  A g, maximum, log_sum, scale;

  template <class T>
  __device__ __forceinline__ RowGradient(const Problem<T>& p, int64_t i, const A* grad)
      : g(p.slope(i, grad)), maximum(p.maximum[i]), log_sum(p.log_sum[i]), scale(g * p.q_sum[i]) {}

  __device__ __forceinline__ A logit(A x, A q) const {
    return q * g - math::exp(x - maximum - log_sum) * scale;
  }
  __device__ __forceinline__ A weight(A x, A q) const {
    const A f = x - maximum - log_sum;
    return q == A(0) && f == -INFINITY ? A(0) : f * g;
  }
};

template <class T, int threads, int width>
__global__ __launch_bounds__(block_threads,
                             2) void backward_rows(Problem<T> p, const accumulate_t<T>* grad,
                                                   T* grad_logits,             // [B, N, C] or null
                                                   accumulate_t<T>* grad_q) {  // [B, N, C] or null
  using A = accumulate_t<T>;
  const int64_t i = int64_t(blockIdx.x) * (block_threads / threads) + threadIdx.x / threads;
  if (i >= p.total()) return;
  const bool used = p.valid(i);
  const RowGradient<A> gradient(p, i, grad);
  const T* x = p.logits + i * p.classes;
  const A* q = used ? p.q(i) : nullptr;
  for (int64_t c = threadIdx.x % threads * width; c < p.classes; c += threads * width) {
    A logits[width], weights[width], out[width] = {};
    if (used) load_pack<width>(x + c, logits), load_pack<width>(q + c, weights);
    if (grad_logits) {
      for (int k = 0; used && k < width; ++k) out[k] = gradient.logit(logits[k], weights[k]);
      store_pack<width>(grad_logits + i * p.classes + c, out);
    }
    if (grad_q) {
      for (int k = 0; used && k < width; ++k) out[k] = gradient.weight(logits[k], weights[k]);
      store_pack<width>(grad_q + i * p.classes + c, out);
    }
  }
}

template <class T>
__global__ __launch_bounds__(block_threads, 2) void backward_lanes(Problem<T> p, const accumulate_t<T>* grad,
                                                                   T* grad_logits, accumulate_t<T>* grad_q) {
  using A = accumulate_t<T>;
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  if (i >= p.total()) return;
  const bool used = p.valid(i);
  const RowGradient<A> gradient(p, i, grad);
  const int64_t start = p.offset(i);
  const A* q = used ? p.q(i) : nullptr;
  for (int64_t c = threadIdx.x / 32; c < p.classes; c += slices) {
    const int64_t at = start + c * p.inner;
    const A x = used ? math::load(p.logits + at) : A(0), w = used ? q[c * p.q_step()] : A(0);
    if (grad_logits) math::store(grad_logits + at, used ? gradient.logit(x, w) : A(0));
    if (grad_q) grad_q[at] = used ? gradient.weight(x, w) : A(0);
  }
}

// Grid: (class of a model, part). dPhi[k] = sum of g log softmax(x) over the samples of class k, a batch at a time.
template <class T>
__global__ __launch_bounds__(block_threads,
                             2) void phi_gradient(Problem<T> p, const accumulate_t<T>* grad,
                                                  SortedLabels sorted,        // [B, S]
                                                  accumulate_t<T>* grad_phi,  // [B, C, C]
                                                  accumulate_t<T>* partial,   // [parts, B, C, C], parts > 1
                                                  unsigned* counters) {       // [B, C], zero
  using A = accumulate_t<T>;
  constexpr int rows = 32;
  __shared__ A slopes[rows], shifts[2][rows];
  __shared__ int64_t offsets[rows];
  __shared__ A shares[block_threads];
  const int t = int(threadIdx.x);
  const int columns = p.classes <= 32 ? 32 : block_threads, row_slices = block_threads / columns,
            slice = t / columns;
  const int64_t row = blockIdx.x, model = row / p.classes, k = row % p.classes, part = blockIdx.y,
                parts = gridDim.y;
  const int64_t all = p.models * p.classes * p.classes, chunks = chunk_count(p.samples),
                first = model * p.samples;
  const A* q = p.phi + model * p.phi_stride + k * p.classes;
  A* out = (parts == 1 ? grad_phi : partial + part * all) + row * p.classes;
  sorted.keys += first, sorted.order += first;
  bool overwrite = true;
  for_each_batch<rows>(
      sorted, int32_t(k), chunks * part / parts, chunks * (part + 1) / parts, [&](const int64_t* ids, int n) {
        if (t < n) {
          const int64_t i = first + ids[t];
          slopes[t] = p.slope(i, grad), shifts[0][t] = p.maximum[i], shifts[1][t] = p.log_sum[i],
          offsets[t] = p.offset(i);
        }
        __syncthreads();
        for (int64_t begin = 0; begin < p.classes; begin += columns) {
          const int64_t c = begin + t % columns;
          A total = 0;
          if (c < p.classes) {
            const bool unweighted = q[c] == A(0);
#pragma unroll 4
            for (int r = slice; r < n; r += row_slices) {
              const A f = math::load(p.logits + offsets[r] + c * p.inner) - shifts[0][r] - shifts[1][r];
              total += unweighted && f == -INFINITY ? A(0) : f * slopes[r];
            }
          }
          if (row_slices > 1) {  // then all columns are in one round
            shares[t] = total;
            __syncthreads();
            for (int s = 1; s < row_slices; ++s) total += shares[s * columns + t % columns];
          }
          if (slice == 0 && c < p.classes) out[c] = overwrite ? total : out[c] + total;
        }
        overwrite = false;
      });
  if (overwrite)
    for (int64_t c = t; c < p.classes; c += block_threads) out[c] = 0;
  if (parts == 1 || !is_last_block(counters + row, unsigned(parts))) return;
  const volatile A* const each = partial + row * p.classes;
  for (int64_t c = t; c < p.classes; c += block_threads) {
    A total = 0;
    for (int64_t s = 0; s < parts; ++s) total += each[s * all + c];
    grad_phi[row * p.classes + c] = total;
  }
}

// ---- Launches.

template <class T>
void forward(const ParametricCrossEntropy& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Problem<T> p(a);
  const int64_t total = p.total(), parts = parametric_cross_entropy_loss_parts(a.samples);
  A* losses = static_cast<A*>(a.loss);
  A* partial = static_cast<A*>(a.scratch);
  unsigned* counters = reinterpret_cast<unsigned*>(partial + a.models * parts * 2);
  const auto rows = [&](auto kernel, int threads) {
    LOSSMETA_LAUNCH(kernel, (total * threads + block_threads - 1) / block_threads, block_threads, 0, stream,
                    p, losses, counters);
  };
  if (total == 0) {
    if (a.models == 0) return;
    check_cuda(cudaMemsetAsync(counters, 0, size_t(a.models) * sizeof(unsigned), stream));
  } else if (a.inner > 1) {
    LOSSMETA_LAUNCH(forward_lanes<T>, (total + 31) / 32, block_threads, 0, stream, p, losses, counters);
  } else {
    constexpr int width = pack_width<T>;
    const bool packed = packable(p.logits, p.classes) && packable(p.phi, p.classes);
    if (p.classes <= 32)
      rows(forward_rows<T, 4, 1>, 4);
    else if (p.classes <= 4096)
      packed ? rows(forward_rows<T, 32, width>, 32) : rows(forward_rows<T, 32, 1>, 32);
    else
      packed ? rows(forward_rows<T, 256, width>, 256) : rows(forward_rows<T, 256, 1>, 256);
  }
  LOSSMETA_LAUNCH(reduce_losses<T>, dim3(unsigned(a.models), unsigned(parts)), block_threads, 0, stream, p,
                  static_cast<A*>(a.reduced), partial, counters);
}

template <class T>
void backward(const ParametricCrossEntropy& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Problem<T> p(a);
  const int64_t total = p.total();
  const A* grad = static_cast<const A*>(a.grad);
  T* grad_logits = static_cast<T*>(a.grad_logits);
  A* grad_phi = static_cast<A*>(a.grad_phi);
  A* grad_q = a.labels ? nullptr : grad_phi;
  const auto rows = [&](auto kernel, int threads) {
    LOSSMETA_LAUNCH(kernel, (total * threads + block_threads - 1) / block_threads, block_threads, 0, stream,
                    p, grad, grad_logits, grad_q);
  };
  if ((grad_logits || grad_q) && total > 0) {
    constexpr int width = pack_width<T>;
    const bool packed = packable(p.logits, p.classes) && packable(p.phi, p.classes) &&
                        packable(grad_logits, p.classes) && packable(grad_q, p.classes);
    if (a.inner > 1)
      LOSSMETA_LAUNCH(backward_lanes<T>, (total + 31) / 32, block_threads, 0, stream, p, grad, grad_logits,
                      grad_q);
    else if (p.classes <= 32)
      rows(backward_rows<T, 4, 1>, 4);
    else if (p.classes <= 4096)
      packed ? rows(backward_rows<T, 32, width>, 32) : rows(backward_rows<T, 32, 1>, 32);
    else
      packed ? rows(backward_rows<T, 256, width>, 256) : rows(backward_rows<T, 256, 1>, 256);
  }
  if (!grad_phi || !a.labels || a.models == 0) return;
  const int64_t parts = parametric_cross_entropy_phi_parts(a.models, a.samples, a.classes),
                matrix = a.classes * a.classes;
  A* partial = static_cast<A*>(a.scratch);
  unsigned* counters = reinterpret_cast<unsigned*>(partial + (parts > 1 ? a.models * parts * matrix : 0));
  int32_t* keys = reinterpret_cast<int32_t*>(counters + a.models * a.classes);
  const SortedLabels sorted{keys, reinterpret_cast<uint16_t*>(keys + total), a.samples};
  if (total > 0)
    LOSSMETA_LAUNCH(sort_labels, a.models * chunk_count(a.samples), block_threads, 0, stream, a.labels,
                    a.classes, a.ignore_index, sorted, counters, a.models * a.classes);
  LOSSMETA_LAUNCH(phi_gradient<T>, dim3(a.models * a.classes, parts), block_threads, 0, stream, p, grad,
                  sorted, grad_phi, partial, counters);
}

}  // namespace

void parametric_cross_entropy_forward(const ParametricCrossEntropy& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a, stream); });
}

void parametric_cross_entropy_backward(const ParametricCrossEntropy& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
