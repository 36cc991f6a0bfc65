// Softmax sums over rows of logits, by a few threads, a warp or a block per row: read once, 16 bytes at a time. And what
// sums over the rows need.
#pragma once

#include "base/dtype.h"
#include "cuda/launch.h"

namespace lossmeta::cuda {
namespace {

constexpr int block_threads = 256;
constexpr unsigned whole_warp = 0xffffffffu;

// Elements of one 16-byte load.
template <class T>
constexpr int pack_width = 16 / int(sizeof(T));

// Whether rows of `length` elements from p on can be read in packs.
template <class T>
bool packable(const T* p, int64_t length) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && length % pack_width<T> == 0;
}

// `width` neighbours of any alignment where width is 1, else of 16 bytes.
template <int width, class T>
__device__ __forceinline__ void load_pack(const T* p, accumulate_t<T>* x) {
  if constexpr (width == 1) {
    *x = math::load(p);
  } else {
    constexpr int part = pack_width<T>;
    for (int k = 0; k < width; k += part) {
      const uint4 bits = *reinterpret_cast<const uint4*>(p + k);
      T elements[part];
      memcpy(elements, &bits, sizeof bits);
      for (int i = 0; i < part; ++i) x[k + i] = math::load(elements + i);
    }
  }
}

template <int width, class T>
__device__ __forceinline__ void store_pack(T* p, const accumulate_t<T>* x) {
  if constexpr (width == 1) {
    math::store(p, *x);
  } else {
    constexpr int part = pack_width<T>;
    for (int k = 0; k < width; k += part) {
      T elements[part];
      for (int i = 0; i < part; ++i) math::store(elements + i, x[k + i]);
      uint4 bits;
      memcpy(&bits, elements, sizeof bits);
      *reinterpret_cast<uint4*>(p + k) = bits;
    }
  }
}

template <int lanes, class A>
__device__ __forceinline__ A lanes_max(A x) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(whole_warp, x, offset));
  return x;
}
template <int lanes, class A>
__device__ __forceinline__ A lanes_add(A x) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(whole_warp, x, offset);
  return x;
}

// True in every thread of the last block that comes here for a counter, which then sees what the others wrote before.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// A sum that remembers what its roundings lost.
template <class A>
struct CompensatedSum {
  A sum = 0, lost = 0;
  __device__ __forceinline__ void add(A x) {
    const A y = x - lost, next = sum + y;
    // An infinite or NaN sum has lost nothing that could come back.
    lost = next - next == A(0) ? (next - sum) - y : A(0);
    sum = next;
  }
};

// Sums over the part of a row seen so far, relative to its maximum m (NaN left out): sum exp(x - m) and, weighted by q,
// sum q (x - m) and sum q. A class of logit -infinity and q = 0 contributes nothing.
template <class A, bool weighted>
struct RowSums {
  A maximum = -INFINITY, sum = 0, dot = 0, weight = 0;

  template <int n>
  __device__ __forceinline__ void add(const A (&x)[n], const A (&q)[n]) {
    A top = maximum;
    for (int k = 0; k < n; ++k) top = fmax(top, x[k]);
    rescale(top);
    const A base = top == -INFINITY ? A(0) : top;
    for (int k = 0; k < n; ++k) {
      sum += math::exp(x[k] - base);
      if constexpr (weighted) {
        dot += q[k] == A(0) ? A(0) : q[k] * (x[k] - base);
        weight += q[k];
      }
    }
  }

  __device__ __forceinline__ void rescale(A top) {
    const A shift = maximum == -INFINITY ? A(0) : maximum - top;
    sum *= math::exp(shift);
    if constexpr (weighted) dot += weight == A(0) ? A(0) : weight * shift;
    maximum = top;
  }

  __device__ __forceinline__ void merge(RowSums other) {
    const A top = fmax(maximum, other.maximum);
    rescale(top);
    other.rescale(top);
    sum += other.sum, dot += other.dot, weight += other.weight;
  }

  // NaN where a logit is NaN or +infinity, or all are -infinity.
  __device__ __forceinline__ A log_sum() const { return math::log(sum + (maximum - maximum)); }
};

// The sums of all threads of a row, in each of them.
template <int threads, class A, bool weighted>
__device__ __forceinline__ void combine(RowSums<A, weighted>& sums) {
  constexpr int lanes = threads < 32 ? threads : 32;
  sums.rescale(lanes_max<lanes>(sums.maximum));
  sums.sum = lanes_add<lanes>(sums.sum);
  if constexpr (weighted) sums.dot = lanes_add<lanes>(sums.dot), sums.weight = lanes_add<lanes>(sums.weight);
  if constexpr (threads > 32) {
    __shared__ A warps[4][threads / 32];
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      warps[0][warp] = sums.maximum, warps[1][warp] = sums.sum;
      warps[2][warp] = sums.dot, warps[3][warp] = sums.weight;
    }
    __syncthreads();
    sums = {};
    for (int w = 0; w < threads / 32; ++w) {
      RowSums<A, weighted> other;
      other.maximum = warps[0][w], other.sum = warps[1][w], other.dot = warps[2][w],
      other.weight = warps[3][w];
      sums.merge(other);
    }
  }
}

// The sums of a row of `classes` logits x (none: of no logit), q its weights. Every thread of the block must come here.
template <int threads, int width, bool weighted, class T>
__device__ __forceinline__ RowSums<accumulate_t<T>, weighted> row_sums(const T* x, const accumulate_t<T>* q,
                                                                       int64_t classes) {
  using A = accumulate_t<T>;
  constexpr int items = threads < 32 || sizeof(A) == 8 ? 8 : 16;  // so many loads are on their way at once
  RowSums<A, weighted> sums;
  for (int64_t first = threadIdx.x % threads * width; first < classes; first += threads * items) {
    A logits[items], weights[items];
    for (int k = 0; k < items; k += width) {
      const int64_t c = first + k * threads;
      for (int i = 0; i < width; ++i) logits[k + i] = -INFINITY, weights[k + i] = 0;
      if (c >= classes) continue;
      load_pack<width>(x + c, logits + k);
      if constexpr (weighted) load_pack<width>(q + c, weights + k);
    }
    sums.add(logits, weights);
  }
  combine<threads>(sums);
  return sums;
}

}  // namespace
}  // namespace lossmeta::cuda
