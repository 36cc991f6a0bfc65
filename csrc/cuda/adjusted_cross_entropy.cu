#include "math/adjusted_cross_entropy.h"

#include "cuda/row.cuh"

namespace lossmeta::cuda {
namespace {

// What the mean is made of, for each sample of each model.
template <class A>
struct Terms {
  A* loss;       // [B, N]
  A* exponent;   // [B, N]
  A* smoothing;  // [B, N]
};

// The typed view of the arguments; rows are numbered through all models.
template <class T>
struct Problem {
  using A = accumulate_t<T>;

  int64_t models, samples, classes, ignore_index;
  const T* logits;        // [B, N, C]
  const int64_t* labels;  // [N]
  const A* shift;         // [B, C] or null
  const A* exponent;      // [B] or null
  const A* smoothing;     // [B] or null
  slope_t<T>* slope;      // [B, N, C] or null

  explicit Problem(const AdjustedCrossEntropy& a)
      : models(a.models),
        samples(a.samples),
        classes(a.classes),
        ignore_index(a.ignore_index),
        logits(static_cast<const T*>(a.logits)),
        labels(a.labels),
        shift(static_cast<const A*>(a.shift)),
        exponent(static_cast<const A*>(a.exponent)),
        smoothing(static_cast<const A*>(a.smoothing)),
        slope(static_cast<slope_t<T>*>(a.slope)) {}

  LOSSMETA_HD int64_t total() const { return models * samples; }
  LOSSMETA_HD int64_t model(int64_t row) const { return models == 1 ? 0 : row / samples; }
  LOSSMETA_HD int64_t label(int64_t row) const { return labels[models == 1 ? row : row % samples]; }
  // Neither ignored nor, with a label that nobody has looked at, out of bounds.
  LOSSMETA_HD bool counts(int64_t label) const {
    return label >= 0 && label < classes && label != ignore_index;
  }
  // NaN where it lies outside [0, 1], which nobody has looked at.
  LOSSMETA_HD A fraction(const A* values, int64_t model) const {
    if (!values) return A(0);
    const A value = values[model];
    return value >= A(0) && value <= A(1) ? value : A(NAN);
  }
};

// ---- Forward.

// Grid: part. How many samples of each part count.
__global__ __launch_bounds__(block_threads) void count_labels(const int64_t* labels,  // [N]
                                                              int64_t samples, int64_t classes,
                                                              int64_t ignore_index,
                                                              int64_t* counts,     // [parts]
                                                              unsigned* counters,  // [B], set to zero
                                                              int64_t models) {
  __shared__ int shared[block_threads];
  const int64_t part = blockIdx.x, parts = gridDim.x;
  for (int64_t b = part * block_threads + threadIdx.x; b < models; b += parts * block_threads)
    counters[b] = 0;
  int count = 0;
  const int64_t end = samples * (part + 1) / parts;
  for (int64_t i = samples * part / parts + threadIdx.x; i < end; i += block_threads)
    count += labels[i] >= 0 && labels[i] < classes && labels[i] != ignore_index;
  shared[threadIdx.x] = count;
  for (int half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) counts[part] = shared[0];
}

// All threads of a warp come here.
__device__ __forceinline__ int64_t total_count(const int64_t* counts, int64_t parts) {
  long long total = 0;
  for (int64_t part = threadIdx.x % 32; part < parts; part += 32) total += counts[part];
  return lanes_add<32>(total);
}

// `width` logits from class c on, shifted.
template <int width, class T>
__device__ __forceinline__ void load_shifted(const T* x, const accumulate_t<T>* shift, int64_t c,
                                             accumulate_t<T>* out) {
  load_pack<width>(x + c, out);
  if (!shift) return;
  accumulate_t<T> moved[width];
  load_pack<width>(shift + c, moved);
  for (int k = 0; k < width; ++k) out[k] += moved[k];
}

// `threads` threads for each row, which is read a second time, from the caches, for its slope.
template <class T, int threads, int width>
__global__ __launch_bounds__(block_threads, sizeof(accumulate_t<T>) == 8
                                                ? 1
                                                : 2) void forward_rows(Problem<T> p,
                                                                       Terms<accumulate_t<T>> terms,
                                                                       const int64_t* counts,  // [parts]
                                                                       int64_t parts) {
  using A = accumulate_t<T>;
  constexpr int items = threads < 32 || sizeof(A) == 8 ? 8 : 16;  // so many loads are on their way at once
  const A share = A(1) / A(total_count(counts, parts));
  const int64_t row = int64_t(blockIdx.x) * (block_threads / threads) + threadIdx.x / threads;
  const bool inside = row < p.total();
  const int64_t label = inside ? p.label(row) : -1, model = inside ? p.model(row) : 0;
  const bool used = inside && p.counts(label);
  const T* x = p.logits + (used ? row * p.classes : 0);
  const A* shift = p.shift ? p.shift + model * p.classes : nullptr;
  RowSums<A, true> sums;
  for (int64_t first = threadIdx.x % threads * width; used && first < p.classes; first += threads * items) {
    A logits[items], weights[items];
    for (int k = 0; k < items; k += width) {
      const int64_t c = first + k * threads;
      for (int i = 0; i < width; ++i) logits[k + i] = -INFINITY, weights[k + i] = c < p.classes ? 1 : 0;
      if (c < p.classes) load_shifted<width>(x, shift, c, logits + k);
    }
    sums.add(logits, weights);
  }
  combine<threads>(sums);
  if (!inside) return;
  slope_t<T>* slope = p.slope ? p.slope + row * p.classes : nullptr;
  const bool first_thread = threadIdx.x % threads == 0;
  if (!used) {
    const A out[width] = {};
    for (int64_t c = threadIdx.x % threads * width; slope && c < p.classes; c += threads * width)
      store_pack<width>(slope + c, out);
    if (first_thread) {
      terms.loss[row] = label == p.ignore_index ? A(0) : A(NAN);
      terms.exponent[row] = terms.smoothing[row] = 0;
    }
    return;
  }
  // NaN where a logit is NaN or +infinity, or all are -infinity.
  const A m = sums.maximum, sum = sums.sum + (m - m);
  const A d_label = math::load(x + label) + (shift ? shift[label] : A(0)) - m;
  const auto result = math::adjusted_row(sum, d_label, sums.dot, p.fraction(p.exponent, model),
                                         p.fraction(p.smoothing, model), A(p.classes), share);
  if (first_thread) {
    terms.loss[row] = result.loss;
    terms.exponent[row] = result.exponent;
    terms.smoothing[row] = result.smoothing;
  }
  for (int64_t c = threadIdx.x % threads * width; slope && c < p.classes; c += threads * width) {
    A values[width];
    load_shifted<width>(x, shift, c, values);
    for (int k = 0; k < width; ++k)
      values[k] =
          math::exp(values[k] - m) * result.scale - result.rest - (c + k == label ? result.own : A(0));
    store_pack<width>(slope + c, values);
  }
}

// Grid: (model, part). The means in a fixed order; the last block of a model adds up the parts.
template <class A>
__global__ __launch_bounds__(block_threads) void reduce_terms(Terms<A> terms, int64_t samples,
                                                              const int64_t* counts,  // [parts]
                                                              A* partial,             // [B, parts, 3]
                                                              unsigned* counters,     // [B], zero
                                                              A* loss,                // [B]
                                                              A* derivatives) {       // [2, B]
  __shared__ A shared[3][block_threads];
  const int64_t model = blockIdx.x, models = gridDim.x, part = blockIdx.y, parts = gridDim.y;
  const A* const each[3] = {terms.loss, terms.exponent, terms.smoothing};
  CompensatedSum<A> sums[3];
  const int64_t begin = model * samples + samples * part / parts,
                end = model * samples + samples * (part + 1) / parts;
  for (int64_t i = begin + threadIdx.x; i < end; i += block_threads)
    for (int k = 0; k < 3; ++k) sums[k].add(each[k][i]);
  for (int k = 0; k < 3; ++k) shared[k][threadIdx.x] = sums[k].sum;
  for (int half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      for (auto& values : shared) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) partial[(model * parts + part) * 3 + k] = shared[k][0];
  if (!is_last_block(counters + model, unsigned(parts)) || threadIdx.x != 0) return;
  const volatile A* const all = partial + model * parts * 3;
  int64_t count = 0;
  for (int64_t s = 0; s < parts; ++s) count += counts[s];
  A* const out[3] = {loss + model, derivatives + model, derivatives + models + model};
  for (int k = 0; k < 3; ++k) {
    CompensatedSum<A> sum;
    for (int64_t s = 0; s < parts; ++s) sum.add(all[3 * s + k]);
    // Where nothing counts the loss is 0 / 0, and its derivatives are 0.
    *out[k] = sum.sum / A(k > 0 && count == 0 ? 1 : count);
  }
}

// ---- Backward.

template <class T, int width>
__global__ __launch_bounds__(block_threads) void scale_slope(const slope_t<T>* slope,      // [B, N, C]
                                                             const accumulate_t<T>* grad,  // [B]
                                                             int64_t models,
                                                             int64_t size,  // N C
                                                             T* out) {      // [B, N, C]
  using A = accumulate_t<T>;
  const int64_t at = (int64_t(blockIdx.x) * block_threads + threadIdx.x) * width;
  if (at >= models * size) return;
  const A g = grad[models == 1 ? 0 : at / size];
  A values[width];
  load_pack<width>(slope + at, values);
  for (int k = 0; k < width; ++k) values[k] *= g;
  store_pack<width>(out + at, values);
}

constexpr int slices = 8;  // of the samples: blocks of 32 classes x 8

// Grid: (32 classes of a model, part). The sums over the samples of a part, times the incoming gradient.
template <class T>
__global__ __launch_bounds__(block_threads) void sum_samples(const slope_t<T>* slope,      // [B, N, C]
                                                             const accumulate_t<T>* grad,  // [B]
                                                             int64_t models, int64_t samples, int64_t classes,
                                                             accumulate_t<T>* sums) {  // [parts, B, C]
  using A = accumulate_t<T>;
  __shared__ A shares[slices][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t tiles = (classes + 31) / 32, model = blockIdx.x / tiles, part = blockIdx.y, parts = gridDim.y;
  const int64_t c = blockIdx.x % tiles * 32 + lane, end = samples * (part + 1) / parts;
  // A thousand slopes of 1e-9 on one of 1e-4: a plain sum of them loses more than torch's, which is a tree.
  CompensatedSum<A> total;
  if (c < classes) {
    const slope_t<T>* x = slope + model * samples * classes + c;
#pragma unroll 4
    for (int64_t i = samples * part / parts + slice; i < end; i += slices)
      total.add(math::load(x + i * classes));
  }
  shares[slice][lane] = total.sum;
  __syncthreads();
  if (slice > 0 || c >= classes) return;
  for (int s = 1; s < slices; ++s) total.add(shares[s][lane]);
  sums[(part * models + model) * classes + c] = total.sum * grad[model];
}

template <class A>
__global__ __launch_bounds__(block_threads) void add_parts(const A* sums,  // [parts, size]
                                                           int64_t parts, int64_t size,
                                                           A* out) {  // [size]
  const int64_t at = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (at >= size) return;
  CompensatedSum<A> total;
  for (int64_t part = 0; part < parts; ++part) total.add(sums[part * size + at]);
  out[at] = total.sum;
}

template <class A>
__global__ __launch_bounds__(block_threads) void scale_derivatives(const A* derivatives,  // [2, B]
                                                                   const A* grad,         // [B]
                                                                   int64_t models,
                                                                   A* exponent,     // [B] or null
                                                                   A* smoothing) {  // [B] or null
  const int64_t b = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (b >= models) return;
  if (exponent) exponent[b] = grad[b] * derivatives[b];
  if (smoothing) smoothing[b] = grad[b] * derivatives[models + b];
}

// ---- Launches.

template <class T>
void forward(const AdjustedCrossEntropy& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (a.models == 0) return;
  const Problem<T> p(a);
  const int64_t total = p.total(), parts = adjusted_cross_entropy_loss_parts(a.samples);
  int64_t* counts = static_cast<int64_t*>(a.scratch);
  A* values = reinterpret_cast<A*>(counts + parts);
  const Terms<A> terms{values, values + total, values + 2 * total};
  A* partial = values + 3 * total;
  unsigned* counters = reinterpret_cast<unsigned*>(partial + a.models * parts * 3);
  LOSSMETA_LAUNCH(count_labels, unsigned(parts), block_threads, 0, stream, a.labels, a.samples, a.classes,
                  a.ignore_index, counts, counters, a.models);
  const auto rows = [&](auto kernel, int threads) {
    LOSSMETA_LAUNCH(kernel, (total * threads + block_threads - 1) / block_threads, block_threads, 0, stream,
                    p, terms, counts, parts);
  };
  if (total > 0) {
    constexpr int width = pack_width<T>;
    const bool packed =
        packable(p.logits, p.classes) && packable(p.shift, p.classes) && packable(p.slope, p.classes);
    if (p.classes <= 32)
      rows(forward_rows<T, 4, 1>, 4);
    else if (p.classes <= 4096)
      packed ? rows(forward_rows<T, 32, width>, 32) : rows(forward_rows<T, 32, 1>, 32);
    else
      packed ? rows(forward_rows<T, 256, width>, 256) : rows(forward_rows<T, 256, 1>, 256);
  }
  LOSSMETA_LAUNCH(reduce_terms<A>, dim3(unsigned(a.models), unsigned(parts)), block_threads, 0, stream, terms,
                  a.samples, counts, partial, counters, static_cast<A*>(a.loss),
                  static_cast<A*>(a.derivatives));
}

template <class T>
void backward(const AdjustedCrossEntropy& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (a.models == 0) return;
  const slope_t<T>* slope = static_cast<const slope_t<T>*>(a.slope);
  const A* grad = static_cast<const A*>(a.grad);
  const int64_t size = a.samples * a.classes, total = a.models * size;
  if (a.grad_logits && total > 0) {
    constexpr int width = pack_width<T>;
    T* out = static_cast<T*>(a.grad_logits);
    const auto scale = [&](auto kernel, int elements) {
      const int64_t block = int64_t(block_threads) * elements;
      LOSSMETA_LAUNCH(kernel, (total + block - 1) / block, block_threads, 0, stream, slope, grad, a.models,
                      size, out);
    };
    packable(out, size) && packable(slope, size) ? scale(scale_slope<T, width>, width)
                                                 : scale(scale_slope<T, 1>, 1);
  }
  if (a.grad_shift) {
    const int64_t parts = adjusted_cross_entropy_shift_parts(a), tiles = (a.classes + 31) / 32,
                  shifts = a.models * a.classes;
    A* out = static_cast<A*>(a.grad_shift);
    A* sums = parts > 1 ? static_cast<A*>(a.scratch) : out;
    LOSSMETA_LAUNCH(sum_samples<T>, dim3(unsigned(a.models * tiles), unsigned(parts)), block_threads, 0,
                    stream, slope, grad, a.models, a.samples, a.classes, sums);
    if (parts > 1)
      LOSSMETA_LAUNCH(add_parts<A>, (shifts + block_threads - 1) / block_threads, block_threads, 0, stream,
                      sums, parts, shifts, out);
  }
  if (a.grad_exponent || a.grad_smoothing)
    LOSSMETA_LAUNCH(scale_derivatives<A>, (a.models + block_threads - 1) / block_threads, block_threads, 0,
                    stream, static_cast<const A*>(a.derivatives), grad, a.models,
                    static_cast<A*>(a.grad_exponent), static_cast<A*>(a.grad_smoothing));
}

}  // namespace

void adjusted_cross_entropy_forward(const AdjustedCrossEntropy& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a, stream); });
}

void adjusted_cross_entropy_backward(const AdjustedCrossEntropy& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
