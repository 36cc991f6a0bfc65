// Rows of predictions: their softmax, held in registers or read again by each pass.
#pragma once

#include "cuda/loss_network.cuh"
#include "cuda/row.cuh"

namespace lossmeta::cuda {
namespace {

// f_j = e^(x_j - maximum) scale, and sum f U for the other array that a row is opened with.
template <class A>
struct Softmax {
  A maximum, scale, dot;
  __device__ A operator()(A x) const { return math::exp(x - maximum) * scale; }
};

enum class RowState : int8_t { live, ignored, bad, absent };

struct RowLabels {
  const int64_t* labels;  // [N] or null
  int64_t samples, classes, ignore_index;
  int64_t kinds;  // that a label may be: as many as classes, or on and off

  RowLabels(const LossNetwork& a, int64_t first, int64_t count)
      : labels(a.labels ? a.labels + first : nullptr),
        samples(count),
        classes(a.classes),
        ignore_index(a.ignore_index),
        kinds(a.sigmoid ? 2 : a.classes) {}

  __device__ RowState state(int64_t n) const {
    if (n >= samples) return RowState::absent;
    if (!labels) return RowState::live;
    const int64_t label = labels[n];
    if (label == ignore_index) return RowState::ignored;
    return label >= 0 && label < kinds ? RowState::live : RowState::bad;
  }
};

// Both kinds of row: open() with logits x and another array u (or null: zeros), then each(f(j, f + , u +)) over chunks of
// `width` elements. What each() writes to u is kept only in registers: `keeps`.
template <class T, int lanes_, int slots, int width_>
struct RegisterRow {
  using A = accumulate_t<T>;
  static constexpr int lanes = lanes_, width = width_;
  static constexpr int blocks = slots * sizeof(A) <= 32 ? 2 : 1;  // of 512 threads that the registers hold
  static constexpr bool keeps = true;
  int64_t classes;
  int lane;
  A f[slots], u[slots];
  Softmax<A> softmax;

  template <class F>
  __device__ void each(F&& body) {
#pragma unroll
    for (int k = 0; k < slots; k += width) {
      const int64_t j = int64_t(k) * lanes + lane * width;
      if (j < classes) body(j, f + k, u + k);
    }
  }

  __device__ void open(const T* x,  // [classes]
                       const A* other, int64_t count, int lane_) {
    classes = count, lane = lane_;
    A maximum = -INFINITY, sum = 0, dot = 0;
    each([&](int64_t j, A* fj, A* uj) {
      load_pack<width>(x + j, fj);
      if (other) load_pack<width>(other + j, uj);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (!other) uj[i] = 0;
        maximum = fmax(maximum, fj[i]);
      }
    });
    maximum = reduce<lanes>(maximum, [](A a, A b) { return fmax(a, b); });
    each([&](int64_t, A* fj, A* uj) {
#pragma unroll
      for (int i = 0; i < width; ++i) sum += fj[i] = math::exp(fj[i] - maximum), dot += fj[i] * uj[i];
    });
    const A scale = A(1) / reduce_sum<lanes>(sum);
    softmax = {maximum, scale, other ? reduce_sum<lanes>(dot) * scale : A(0)};
    each([&](int64_t, A* fj, A*) {
#pragma unroll
      for (int i = 0; i < width; ++i) fj[i] *= scale;
    });
  }
};

template <class T, int lanes_, int width_>
struct StreamedRow {
  using A = accumulate_t<T>;
  static constexpr int lanes = lanes_, width = width_;
  static constexpr int blocks = sizeof(A) == 4 && width <= 4 ? 2 : 1;
  static constexpr bool keeps = false;
  int64_t classes;
  int lane;
  const T* x;      // [classes]
  const A* other;  // [classes] or null
  Softmax<A> softmax;

  template <class F>
  __device__ void each_input(F&& body) {
#pragma unroll 1
    for (int64_t j = int64_t(lane) * width; j < classes; j += lanes * width) {
      A xj[width], uj[width] = {};
      load_pack<width>(x + j, xj);
      if (other) load_pack<width>(other + j, uj);
      body(j, xj, uj);
    }
  }
  template <class F>
  __device__ void each(F&& body) {
    each_input([&](int64_t j, A* xj, A* uj) {
#pragma unroll
      for (int i = 0; i < width; ++i) xj[i] = softmax(xj[i]);
      body(j, xj, uj);
    });
  }

  // One pass: sums relative to a maximum that grows. It starts finite, so that e^(-infinity - maximum) is 0.
  __device__ void open(const T* x_, const A* other_, int64_t count, int lane_) {
    x = x_, other = other_, classes = count, lane = lane_;
    const A lowest = sizeof(A) == 4 ? A(-3.4028234663852886e38) : A(-1.7976931348623157e308);
    A maximum = lowest, sum = 0, dot = 0;
    each_input([&](int64_t, const A* xj, const A* uj) {
      A top = maximum;
#pragma unroll
      for (int i = 0; i < width; ++i) top = fmax(top, xj[i]);
      const A shrink = math::exp(maximum - top);
      sum *= shrink, dot *= shrink, maximum = top;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const A e = math::exp(xj[i] - maximum);
        sum += e, dot += e * uj[i];
      }
    });
    const A top = reduce<lanes>(maximum, [](A a, A b) { return fmax(a, b); });
    const A shrink = math::exp(maximum - top), scale = A(1) / reduce_sum<lanes>(sum * shrink);
    softmax = {top, scale, other ? reduce_sum<lanes>(dot * shrink) * scale : A(0)};
  }
};

}  // namespace
}  // namespace lossmeta::cuda
