#include "math/pwl_penalty.h"

#include <type_traits>

#include "cuda/row.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int table_threads = 512;
constexpr int resident_blocks = 3;  // at least: for more the compiler spills registers

// What the blocks share, at the head of the scratch.
template <class A>
struct Head {
  math::PwlFunction<A> r;
  math::PwlBuckets<A> buckets;
  unsigned counter;
};
static_assert(sizeof(Head<double>) <= pwl_head_bytes);

template <class A>
struct Shared {
  math::PwlPiece<A>* rows;  // [2, buckets.count]
  Head<A>* head;
  double* partial;  // [blocks]
  A* values;        // [X]

  explicit Shared(const PwlPenalty& a)
      : rows(static_cast<math::PwlPiece<A>*>(a.scratch)),
        head(reinterpret_cast<Head<A>*>(static_cast<char*>(a.scratch) + 2 * pwl_row_bytes)),
        partial(reinterpret_cast<double*>(reinterpret_cast<char*>(head) + pwl_head_bytes)),
        values(reinterpret_cast<A*>(partial + pwl_penalty_blocks(a.parameters))) {}
};

// The sum of the numbers of all earlier threads.
__device__ double sum_before(double x) {
  __shared__ double sums[table_threads];
  const int t = int(threadIdx.x);
  sums[t] = x;
  __syncthreads();
  for (int offset = 1; offset < table_threads; offset *= 2) {
    const double before = t >= offset ? sums[t - offset] : 0;
    __syncthreads();
    sums[t] += before;
    __syncthreads();
  }
  const double sum = t > 0 ? sums[t - 1] : 0;
  __syncthreads();
  return sum;
}

// One block: r at the knots, from 0 outwards, and the rows of the buckets.
template <class A>
__global__ void __launch_bounds__(table_threads) table_kernel(const A* knots,   // [X]
                                                              const A* slopes,  // [X+1]
                                                              int32_t count, Shared<A> shared) {
  __shared__ int32_t least_shift;
  const int t = int(threadIdx.x);
  const int32_t zero = math::knots_below(knots, 0, count, A(0), false);
  const int32_t positive = math::knots_below(knots, zero, count, A(0), true);
  if (t == 0) least_shift = math::binade_shift<A>;
  __syncthreads();
  // A thread has `share` neighbouring knots of each side, the nearest to 0 first.
  int32_t shift = math::binade_shift<A>;
  for (int side = 0; side < 2; ++side) {
    const int64_t size = side ? count - zero : zero, share = (size + table_threads - 1) / table_threads;
    const int64_t begin = t * share < size ? t * share : size,
                  end = begin + share < size ? begin + share : size;
    const auto knot = [&](int64_t i) { return int32_t(side ? zero + i : zero - 1 - i); };
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += math::pwl_rise(knots, slopes, zero, knot(i));
    sum = sum_before(sum);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t k = knot(i);
      shared.values[k] = A(sum += math::pwl_rise(knots, slopes, zero, k));
      const int32_t own = k > 0 ? math::separating_shift(knots[k - 1], knots[k]) : shift;
      shift = own < shift ? own : shift;
    }
  }
  atomicMin(&least_shift, shift);
  __syncthreads();
  A smallest = A(0);
  if (positive < count) smallest = knots[positive];
  if (zero > 0 && (smallest == A(0) || -knots[zero - 1] < smallest)) smallest = -knots[zero - 1];
  A largest = smallest;
  if (count > 0 && -knots[0] > largest) largest = -knots[0];
  if (count > 0 && knots[count - 1] > largest) largest = knots[count - 1];
  const math::PwlFunction<A> r{count, knots, slopes, shared.values, zero};
  const auto buckets = math::PwlBuckets<A>::between(smallest, largest, least_shift,
                                                    pwl_row_bytes / int64_t(sizeof(math::PwlPiece<A>)));
  if (t == 0) *shared.head = {r, buckets, 0};
  __threadfence_block();
  __syncthreads();
  // Knots come in the order of their buckets, on either side outwards.
  const auto bucket_of = [&](int32_t k) { return buckets.of_magnitude(knots[k]); };
  for (int64_t row = t; row < 2 * int64_t(buckets.count); row += table_threads) {
    const bool negative = row >= buckets.count;
    const int64_t b = negative ? row - buckets.count : row;
    const int32_t size = negative ? positive : count - zero;
    const auto before = [&](int64_t bound) {  // knots of this side whose bucket is below the bound
      int32_t low = 0, high = size;
      while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        const bool below = bucket_of(negative ? positive - 1 - middle : zero + middle) < bound;
        low = below ? middle + 1 : low;
        high = below ? high : middle;
      }
      return low;
    };
    const int32_t begin = before(b), beyond = before(b + 1), end = beyond > begin ? beyond : begin;
    shared.rows[row] = negative ? math::bucket_row(r, positive - end, positive - begin)
                                : math::bucket_row(r, zero + begin, zero + end);
  }
}

template <class A, int n>
__device__ __forceinline__ A tree_sum(const A (&x)[n]) {
  A sums[n];
  for (int i = 0; i < n; ++i) sums[i] = x[i];
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// A block has `share` weights, a thread `width` of them at a time. The last block adds up what all found.
template <int width, class T>
__global__ void __launch_bounds__(block_threads, resident_blocks)
    penalty_kernel(const T* theta,     // [P]
                   slope_t<T>* slope,  // [P] or null
                   T* gradient,        // [P] or null
                   accumulate_t<T>* value, int64_t parameters, int64_t share,
                   Shared<accumulate_t<T>> shared) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(math::PwlPiece<A>, rows);
  __shared__ double sums[block_threads];
  const int t = int(threadIdx.x);
  const math::PwlFunction<A> r = shared.head->r;
  const math::PwlBuckets<A> buckets = shared.head->buckets;
  for (int i = t; i < 2 * int(buckets.count); i += block_threads) rows[i] = shared.rows[i];
  __syncthreads();
  const int64_t begin = blockIdx.x * share, end = begin + share < parameters ? begin + share : parameters;
  const auto weights = [&](auto number, int64_t p) {
    constexpr int n = decltype(number)::value;
    A x[n], s[n], penalty[n];
    load_pack<n>(theta + p, x);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      math::PwlPiece<A> piece = rows[buckets.of(x[i])];
      if (buckets.shared) piece = math::resolved(r, piece, x[i]);
      s[i] = piece.slope(x[i]);
      penalty[i] = piece.penalty(x[i]);
    }
    if (slope) store_pack<n>(slope + p, s);
    if (gradient) {
      A g[n];
      load_pack<n>(gradient + p, g);
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] += s[i];
      store_pack<n>(gradient + p, g);
    }
    return double(tree_sum(penalty));
  };
  double sum = 0;
  for (int64_t p = begin + t * width; p < end; p += block_threads * width) {
    if (p + width <= end)
      sum += weights(std::integral_constant<int, width>(), p);
    else
      for (int64_t i = p; i < end; ++i) sum += weights(std::integral_constant<int, 1>(), i);
  }
  const auto block_sum = [&] {  // of `sum`, in thread 0
    sums[t] = sum;
    for (int half = block_threads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (t < half) sums[t] += sums[t + half];
    }
    __syncthreads();
    return sums[0];
  };
  const double own = block_sum();
  if (t == 0) shared.partial[blockIdx.x] = own;
  if (!is_last_block(&shared.head->counter, gridDim.x)) return;
  sum = 0;
  for (int64_t b = t; b < gridDim.x; b += block_threads) sum += shared.partial[b];
  const double total = block_sum();
  if (t == 0) *value = A(total);
}

template <int width, class T>
__global__ void __launch_bounds__(block_threads) scale_kernel(const slope_t<T>* slope,      // [P]
                                                              const accumulate_t<T>* grad,  // []
                                                              T* gradient,                  // [P]
                                                              int64_t parameters) {
  using A = accumulate_t<T>;
  const A factor = *grad;
  const int64_t step = int64_t(gridDim.x) * block_threads * width;
  for (int64_t p = (int64_t(blockIdx.x) * block_threads + threadIdx.x) * width; p < parameters; p += step) {
    if (p + width <= parameters) {
      A s[width];
      load_pack<width>(slope + p, s);
#pragma unroll
      for (int i = 0; i < width; ++i) s[i] *= factor;
      store_pack<width>(gradient + p, s);
    } else {
      for (int64_t i = p; i < parameters; ++i) math::store(gradient + i, math::load(slope + i) * factor);
    }
  }
}

template <int width, class T>
void forward(const PwlPenalty& a, const Shared<accumulate_t<T>>& shared, cudaStream_t stream) {
  LOSSMETA_LAUNCH((penalty_kernel<width, T>), unsigned(pwl_penalty_blocks(a.parameters)), block_threads,
                  2 * pwl_row_bytes, stream, static_cast<const T*>(a.theta),
                  static_cast<slope_t<T>*>(a.slope), static_cast<T*>(a.gradient),
                  static_cast<accumulate_t<T>*>(a.value), a.parameters, pwl_penalty_share(a.parameters),
                  shared);
}

template <int width, class T>
void backward(const PwlPenalty& a, cudaStream_t stream) {
  const int64_t wanted = (a.parameters + block_threads * width - 1) / (block_threads * width);
  LOSSMETA_LAUNCH((scale_kernel<width, T>), unsigned(wanted < (1 << 20) ? wanted : 1 << 20), block_threads, 0,
                  stream, static_cast<const slope_t<T>*>(a.slope),
                  static_cast<const accumulate_t<T>*>(a.grad), static_cast<T*>(a.gradient), a.parameters);
}

// Whether packs of all these begin at 16 bytes; null does.
bool aligned(const void* a, const void* b, const void* c) {
  return (uintptr_t(a) | uintptr_t(b) | uintptr_t(c)) % 16 == 0;
}

}  // namespace

void pwl_penalty_forward(const PwlPenalty& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    constexpr int width = pack_width<T>;
    const Shared<A> shared(a);
    LOSSMETA_LAUNCH(table_kernel<A>, 1, table_threads, 0, stream, static_cast<const A*>(a.knots),
                    static_cast<const A*>(a.slopes), a.knots_count, shared);
    if (aligned(a.theta, a.slope, a.gradient))
      forward<width, T>(a, shared, stream);
    else
      forward<1, T>(a, shared, stream);
  });
}

void pwl_penalty_backward(const PwlPenalty& a, cudaStream_t stream) {
  if (a.parameters == 0) return;
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (aligned(a.slope, a.gradient, nullptr))
      backward<pack_width<T>, T>(a, stream);
    else
      backward<1, T>(a, stream);
  });
}

}  // namespace lossmeta::cuda
