// The loss network on a flat list of elements, lanes along the elements.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "math/loss_network.h"

namespace lossmeta::LOSSMETA_ISA {

// While it lives, this thread takes denormal numbers for 0: a confident softmax is full of them, and an operation on one
// costs a hundred others.
class FlushDenormals {
#ifdef __SSE2__
  static constexpr unsigned flush_to_zero = 0x8000, denormals_are_zero = 0x0040;
  const unsigned before_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(before_ | flush_to_zero | denormals_are_zero); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#else
 public:
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Hidden units per register block: two accumulators for each, the weights broadcast.
#if defined(__AVX512F__)
constexpr int unit_block = 8;
#else
constexpr int unit_block = 4;
#endif

// The weights as the loops read them: rows padded with zeros to whole blocks.
template <class A>
struct NetworkWeights {
  int64_t width, padded;
  math::HiddenActivation<A> activation;
  bool softplus;
  Buffer<A> y_in, f_in, out;  // [padded]
  Buffer<A> by_input;         // [width, padded]: W2[o][k] at (k, o)
  Buffer<A> by_output;        // [width, padded]: W2[o][k] at (o, k)

  explicit NetworkWeights(const LossNetwork& a)
      : width(a.width),
        padded((width + unit_block - 1) / unit_block * unit_block),
        activation(a),
        softplus(a.softplus),
        y_in(padded),
        f_in(padded),
        out(padded),
        by_input(width * padded),
        by_output(width * padded) {
    const A *w1 = static_cast<const A*>(a.input_weight), *w2 = static_cast<const A*>(a.hidden_weight),
            *w3 = static_cast<const A*>(a.output_weight);
    for (int64_t k = 0; k < padded; ++k) {
      const bool used = k < width;
      y_in[k] = used ? w1[2 * k] : A(0);
      f_in[k] = used ? w1[2 * k + 1] : A(0);
      out[k] = used ? w3[k] : A(0);
      for (int64_t o = 0; o < width; ++o) {
        by_input[o * padded + k] = used ? w2[k * width + o] : A(0);
        by_output[o * padded + k] = used ? w2[o * width + k] : A(0);
      }
    }
  }
  // Gradients of all weights: [width, 2], [width, width] and [width], one after the other.
  int64_t gradient_size() const { return width * (width + 3); }
};

// a[j] = sum_k x[k] w[k][j], and b likewise from y. Only `width` units are read: an infinite activation must
// not meet the zeros of the padding.
template <bool both, class A>
LOSSMETA_SIMD void products(const Vec<A>* x,   // [width]
                            const Vec<A>* y,   // [width], or unused
                            const A* weights,  // [width, padded], at the first column of the block
                            int64_t width, int64_t padded, Vec<A> (&a)[unit_block], Vec<A> (&b)[unit_block]) {
#pragma GCC unroll 8
  for (int j = 0; j < unit_block; ++j) a[j] = b[j] = Vec<A>(A(0));
  for (int64_t k = 0; k < width; ++k) {
    const Vec<A> xk = x[k], yk = both ? y[k] : xk;
#pragma GCC unroll 8
    for (int j = 0; j < unit_block; ++j) {
      const Vec<A> w(weights[k * padded + j]);
      a[j] += xk * w;
      if (both) b[j] += yk * w;
    }
  }
}

// f(j) for the n <= unit_block units of a block; unrolled where it is whole, so that the accumulators stay in
// registers.
template <class F>
LOSSMETA_SIMD void for_units(int64_t n, const F& f) {
  if (n >= unit_block) {
#pragma GCC unroll 8
    for (int j = 0; j < unit_block; ++j) f(j);
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < unit_block; ++j)
      if (j < n) f(j);
  }
}

// Value and slope.
template <class A>
class NetworkForward {
  using V = Vec<A>;
  const NetworkWeights<A>& w_;
  V *const value_, *const tangent_;  // [width]

 public:
  static int64_t scratch_size(const NetworkWeights<A>& w) { return 2 * w.width; }
  NetworkForward(const NetworkWeights<A>& w, V* scratch)
      : w_(w), value_(scratch), tangent_(scratch + w.width) {}

  // Reads and writes whole vectors: the arrays are padded.
  void operator()(const A* f, const A* y, int64_t count, A* value, A* slope) const {
    for (int64_t i = 0; i < count; i += V::size) one_vector(load(f + i), load(y + i), value + i, slope + i);
  }

 private:
  void one_vector(V f, V y, A* value, A* slope) const {
    const auto& act = w_.activation;
    for (int64_t k = 0; k < w_.width; ++k) {
      const auto unit = act(y * w_.y_in[k] + f * w_.f_in[k]);
      value_[k] = unit.value;
      tangent_[k] = act.slope(unit.gate) * w_.f_in[k];
    }
    V z(A(0)), s(A(0));
    for (int64_t first = 0; first < w_.width; first += unit_block) {
      V a[unit_block], b[unit_block];
      products<true>(value_, tangent_, w_.by_input.data() + first, w_.width, w_.padded, a, b);
      for_units(w_.width - first, [&](int j) {
        const auto unit = act(a[j]);
        z += unit.value * w_.out[first + j];
        s += act.slope(unit.gate) * b[j] * w_.out[first + j];
      });
    }
    const auto out = math::output_activation<A>(z, w_.softplus);
    store(value, out.value);
    store(slope, out.slope * s);
  }
};

// Derivatives of J = sum u l + v l' over the elements that it is given; those of the weights add up. tangent:
// v, r = dJ/df and l' are in use; without it v = 0. weights: the gradients of the weights are wanted.
template <class A, bool tangent, bool weights>
class NetworkBackward {
  using V = Vec<A>;
  static constexpr int vectors = 8;                         // of elements, handled together
  static constexpr int rows = unit_block / 2, columns = 4;  // register block of dJ/dW2

  const NetworkWeights<A>& w_;
  const int64_t width_, padded_;
  V *h1_, *gate1_, *a2_, *b2_;        // [vectors, padded]; a2 and b2 are the cotangents A2 and B2
  V *t1_, *h2_, *gate2_, *tangent2_;  // [padded], of one vector; tangent2 is b2 of the formula
  V *sum_y_, *sum_f_, *sum_out_;      // [padded], lanes still apart
  V* sum_hidden_;                     // [padded, padded], with the weights' gradients

 public:
  static int64_t scratch_size(const NetworkWeights<A>& w) {
    return w.padded * (4 * vectors + 7 + (weights ? w.padded : 0));
  }
  NetworkBackward(const NetworkWeights<A>& w, V* scratch) : w_(w), width_(w.width), padded_(w.padded) {
    const auto take = [&](int64_t size) {
      V* p = scratch;
      scratch += size;
      return p;
    };
    const int64_t matrix = padded_ * vectors;
    h1_ = take(matrix), gate1_ = take(matrix), a2_ = take(matrix), b2_ = take(matrix);
    t1_ = take(padded_), h2_ = take(padded_), gate2_ = take(padded_), tangent2_ = take(padded_);
    sum_y_ = take(padded_), sum_f_ = take(padded_), sum_out_ = take(padded_);
    sum_hidden_ = scratch;
    for (int64_t i = 0; i < matrix; ++i) h1_[i] = gate1_[i] = a2_[i] = b2_[i] = V(A(0));
    clear();
  }

  void clear() {
    for (int64_t k = 0; k < padded_; ++k) sum_y_[k] = sum_f_[k] = sum_out_[k] = V(A(0));
    if (weights)
      for (int64_t i = 0; i < padded_ * padded_; ++i) sum_hidden_[i] = V(A(0));
  }

  // Whole vectors are read and written: the arrays are padded, u and v with zeros.
  void operator()(const A* f, const A* y, const A* u, const A* v, int64_t count, A* r, A* slope) const {
    for (int64_t start = 0; start < count; start += vectors * V::size) {
      const int64_t left = (count - start + V::size - 1) / V::size;
      const int n = int(left < vectors ? left : vectors);
      for (int e = 0; e < n; ++e) {
        const int64_t i = start + e * V::size;
        first_layer(e, load(f + i), load(y + i));
        const V s = second_layer(e, load(u + i), tangent ? load(v + i) : V(A(0)));
        if (tangent) store(slope + i, s);
        const V gradient = first_layer_backward(e, load(f + i), load(y + i));
        if (tangent) store(r + i, gradient);
      }
      if (weights) hidden_sums(n);
    }
  }

  // The sums of the weights' gradients so far.
  void gradients(A* out) const {  // [width * (width + 3)]
    for (int64_t k = 0; k < width_; ++k) {
      out[2 * k] = reduce_add(sum_y_[k]);
      out[2 * k + 1] = reduce_add(sum_f_[k]);
      out[width_ * (width_ + 2) + k] = reduce_add(sum_out_[k]);
      for (int64_t first = 0; first < width_; first += V::size) {
        const int n = int(width_ - first < V::size ? width_ - first : V::size);
        V lanes[V::size];
        for (int j = 0; j < V::size; ++j) lanes[j] = j < n ? sum_hidden_[k * padded_ + first + j] : V(A(0));
        store_partial(out + width_ * (2 + k) + first, reduce_add_rows(lanes), n);
      }
    }
  }

 private:
  LOSSMETA_SIMD void first_layer(int e, V f, V y) const {
    const auto& act = w_.activation;
    for (int64_t k = 0; k < width_; ++k) {
      const auto unit = act(y * w_.y_in[k] + f * w_.f_in[k]);
      h1_[e * padded_ + k] = unit.value;
      gate1_[e * padded_ + k] = unit.gate;
      if (tangent) t1_[k] = act.slope(unit.gate) * w_.f_in[k];
    }
  }

  // Runs the second layer of vector e, leaves A2 and B2 and returns the slope.
  LOSSMETA_SIMD V second_layer(int e, V u, V v) const {
    const auto& act = w_.activation;
    V z(A(0)), s(A(0));
    for (int64_t first = 0; first < width_; first += unit_block) {
      V a[unit_block], b[unit_block];
      products<tangent>(h1_ + e * padded_, t1_, w_.by_input.data() + first, width_, padded_, a, b);
      for_units(width_ - first, [&](int j) {
        const auto unit = act(a[j]);
        h2_[first + j] = unit.value;
        gate2_[first + j] = unit.gate;
        z += unit.value * w_.out[first + j];
        if (tangent) {
          tangent2_[first + j] = b[j];
          s += act.slope(unit.gate) * b[j] * w_.out[first + j];
        }
      });
    }
    const auto out = math::output_activation<A>(z, w_.softplus);
    const V dz = tangent ? u * out.slope + v * out.curvature * s : u * out.slope, ds = v * out.slope;
    for (int64_t o = 0; o < width_; ++o) {
      const V slope = act.slope(gate2_[o]);
      if (tangent) {
        if (weights) sum_out_[o] += dz * h2_[o] + ds * (slope * tangent2_[o]);
        a2_[e * padded_ + o] = (dz * slope + ds * (tangent2_[o] * act.curvature(gate2_[o]))) * w_.out[o];
        b2_[e * padded_ + o] = ds * slope * w_.out[o];
      } else {
        if (weights) sum_out_[o] += dz * h2_[o];
        a2_[e * padded_ + o] = dz * slope * w_.out[o];
      }
    }
    return out.slope * s;
  }

  // The gradients of W1 from vector e, and dJ/df.
  LOSSMETA_SIMD V first_layer_backward(int e, V f, V y) const {
    const auto& act = w_.activation;
    V gradient(A(0));
    for (int64_t first = 0; first < width_; first += unit_block) {
      V a[unit_block], b[unit_block];
      products<tangent>(a2_ + e * padded_, b2_ + e * padded_, w_.by_output.data() + first, width_, padded_, a,
                        b);
      for_units(width_ - first, [&](int j) {
        const int64_t k = first + j;
        const V gate = gate1_[e * padded_ + k], slope = act.slope(gate);
        V a1 = a[j] * slope;
        if (tangent) a1 += b[j] * (act.curvature(gate) * w_.f_in[k]);
        if (weights) {
          sum_y_[k] += a1 * y;
          sum_f_[k] += tangent ? a1 * f + b[j] * slope : a1 * f;
        }
        gradient += a1 * w_.f_in[k];
      });
    }
    return gradient;
  }

  // dJ/dW2 += A2 h1^T + B2 t1^T over n vectors of elements.
  void hidden_sums(int n) const {
    const auto& act = w_.activation;
    for (int64_t o = 0; o < padded_; o += rows)
      for (int64_t k = 0; k < padded_; k += columns) {
        V sums[rows][columns];
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j) sums[i][j] = V(A(0));
        for (int e = 0; e < n; ++e) {
          const V* h = h1_ + e * padded_ + k;
          V t[columns];
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j)
            if (tangent) t[j] = act.slope(gate1_[e * padded_ + k + j]) * w_.f_in[k + j];
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) {
            const V a = a2_[e * padded_ + o + i], b = b2_[e * padded_ + o + i];
#pragma GCC unroll 4
            for (int j = 0; j < columns; ++j) {
              sums[i][j] += a * h[j];
              if (tangent) sums[i][j] += b * t[j];
            }
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j) sum_hidden_[(o + i) * padded_ + k + j] += sums[i][j];
      }
  }
};

// Sums the chunks' gradients, in their order, into the three results.
template <class A>
void store_weight_gradients(const LossNetwork& a, const A* partials,  // [count, size]
                            int64_t count, int64_t size) {
  A* const out[] = {static_cast<A*>(a.grad_input_weight), static_cast<A*>(a.grad_hidden_weight),
                    static_cast<A*>(a.grad_output_weight)};
  const int64_t sizes[] = {2 * a.width, a.width * a.width, a.width};
  for (int64_t k = 0, at = 0; k < 3; at += sizes[k], ++k)
    for (int64_t i = 0; i < sizes[k]; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += double(partials[c * size + at + i]);
      out[k][i] = A(sum);
    }
}

}  // namespace lossmeta::LOSSMETA_ISA
