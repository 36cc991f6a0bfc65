// The table's gradients as integers of 64 bits: sums over all elements that do not depend on their order.
#pragma once

#include "cuda/loss_network.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int coefficients = 5;  // v, c0 .. c3
constexpr int sum_blocks = 256;  // of the passes over elements, on every device

__device__ inline long long nearest(float x) { return ::llrintf(x); }
__device__ inline long long nearest(double x) { return ::llrint(x); }
__device__ inline float scaled(float x, int exponent) { return ::ldexpf(x, exponent); }
__device__ inline double scaled(double x, int exponent) { return ::ldexp(x, exponent); }
__device__ inline int exponent_above(float x) {
  int k;
  ::frexpf(x, &k);
  return k;
}
__device__ inline int exponent_above(double x) {
  int k;
  ::frexp(x, &k);
  return k;
}

// The gradients on the coefficients of every interval, in units of 2^-shift. A term is at most |u| + |w|, with
// |u| <= max |G| / C and |w| <= 2 max |U| / C; with that bound below 2^k, shift = 61 - log2(N C) - k, and the sum of
// N C terms cannot overflow. Every addition is off by at most half a unit, N C 2^-62 of the bound.
template <class A>
struct FixedPoint {
  long long* sums;  // [2, 5, M]
  A* maxima;        // [sum_blocks]: max(|G|, 2 |U|) of each block's share
  int* poisoned;    // whether a row was not a number
  int* finished;    // blocks that have done with the nodes
  A inverse_classes;
  int headroom;  // 61 - log2(N C), rounded down

  // From offsets into the workspace.
  FixedPoint(const LossNetwork& a, int64_t sums_at, int64_t maxima_at, int64_t state_at)
      : inverse_classes(A(1) / A(a.classes)), headroom(61) {
    A* const base = static_cast<A*>(a.workspace);
    sums = reinterpret_cast<long long*>(base + sums_at), maxima = base + maxima_at;
    poisoned = reinterpret_cast<int*>(base + state_at), finished = poisoned + 1;
    for (int64_t count = 1; count < a.samples * a.classes; count *= 2) --headroom;
  }

  // Called by the whole block; false where the bound is not finite.
  template <int threads>
  __device__ bool find_shift(int& shift) const {
    A bound = 0;
    for (int k = threadIdx.x; k < sum_blocks; k += threads) bound = larger(bound, maxima[k]);
    bound = 2 * inverse_classes * reduce<threads>(bound, [](A x, A y) { return larger(x, y); });
    if (!(bound < A(INFINITY))) return false;
    constexpr int largest = sizeof(A) == 4 ? 126 : 1022;  // 2^shift and 2^-shift are normal
    const int wanted = headroom - exponent_above(bound);
    shift = wanted < largest ? wanted : largest;
    return true;
  }
};

// A block's share, in shared memory; halves apart, as shared memory adds words of 32 bits at once but longer ones only
// by trial.
template <class A>
struct Bins {
  unsigned* low;  // [2, 5, M], the higher halves behind; null where no sums are wanted
  int intervals;
  A scale;

  __device__ int size() const { return 2 * coefficients * intervals; }
  __device__ void clear() const {
    for (int i = threadIdx.x; i < 2 * size(); i += blockDim.x) low[i] = 0;
    __syncthreads();
  }
  __device__ void add(int target, int interval,
                      const A* terms) const {  // [5]
    for (int k = 0; k < coefficients; ++k) {
      const long long value = nearest(terms[k] * scale);
      unsigned* const to = low + (target * coefficients + k) * intervals + interval;
      const unsigned part = unsigned(value), carry = atomicAdd(to, part) + part < part;
      const unsigned rest = unsigned((unsigned long long)(value) >> 32) + carry;
      if (rest) atomicAdd(to + size(), rest);
    }
  }
  __device__ void flush(long long* sums) const {
    __syncthreads();
    for (int i = threadIdx.x; i < size(); i += blockDim.x) {
      const unsigned long long value = (unsigned long long)(low[size() + i]) << 32 | low[i];
      if (value) atomicAdd(reinterpret_cast<unsigned long long*>(sums) + i, value);
    }
  }
};

}  // namespace
}  // namespace lossmeta::cuda
