// The learned loss of AdaLFL (Eq. 3, 4) with its slope, and their derivatives. One element with target y and
// prediction f goes through the network
//   a1 = W1 (y, f),  h1 = act(a1),  a2 = W2 h1,  h2 = act(a2),  z = w3 . h2,  l(y, f) = out(z)
// and its slope l' = dl/df through the forward tangent
//   t1 = act'(a1) W1f,  b2 = W2 t1,  t2 = act'(a2) b2,  s = w3 . t2,  l' = out'(z) s.
//
// The derivatives of  J = u l + v l'  (u, v: cotangents of value and slope, one each per element) are
//   dz = u out'(z) + v out''(z) s,   ds = v out'(z),   dJ/dw3 = dz h2 + ds t2,
//   A2 = w3 (dz act'(a2) + ds b2 act''(a2)),   B2 = w3 ds act'(a2),
//   dJ/dW2[o][k] = A2[o] h1[k] + B2[o] t1[k],
//   A1 = act'(a1) W2^T A2 + act''(a1) W1f W2^T B2,
//   dJ/dW1y = A1 y,   dJ/dW1f = A1 f + act'(a1) W2^T B2,   dJ/df = W1f . A1  ( = u l' + v l'' ).
// In the sums over elements W1f may be taken out of t1:
//   dJ/dW2[o][k] = sum A2[o] h1[k] + W1f[k] sum B2[o] act'(a1[k]).
//
// A row n is  loss = (1/C) sum_j l(y_j, f_j).  With the identity link, slope_j = l'_j / C, and J has u = G /
// C, v_j = U_j / C, where G and U are the incoming gradients of loss and slope. With the softmax link f =
// softmax(x) and, g_j = l'_j / C,
//   slope_j = f_j (g_j - sum f g),
//   u = G / C,   v_j = f_j (U_j - sum f U) / C,   and with r_j = dJ/df_j from the network
//   D_j = r_j + g_j (U_j - sum f U) - U_j sum f g,      grad_x_j = f_j (D_j - sum f D).
// With the sigmoid link every label is a row of its own, C = 1, f = sigmoid(x), d = sigmoid'(x) = f (1 - f), and
//   loss = l,  slope = l' d,   u = G,  v = U d,   grad_x = d (r + l' U (1 - 2 f)).
//
// The table. With class indices and the softmax link, or labels and the sigmoid link, the network is two
// functions of f in [0, 1], y = 0 and y = 1. It is evaluated with its slope at the nodes f_k = (k - 1) / M, k = 0 .. M + 2; in the interval
// [i/M, (i+1)/M], with t = M f - i and h = 1/M,
//   l'(f) = c0 + c1 t + c2 t^2 + c3 t^3 through the slopes of the nodes i .. i + 3 (t = -1, 0, 1, 2),
//   l(f)  = v + h (c0 t + c1 t^2/2 + c2 t^3/3 + c3 t^4/4)  with v the value of the node i + 1,
// so that slope and curvature are the derivatives of the value that is returned. (Cubic Hermite from
// differences of values would cost float32 log2(M) of its bits in the slope.) The error of l' is 3/128
// |fourth difference| of the slopes: where its maximum exceeds loss_network_table_bound times the largest
// |slope|, or is not a number, the table is refused and the exact kernels run instead. Gradients are summed
// per interval on (v, c0 .. c3), carried from there to the nodes, and go through the network once.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

// One structure serves all kernels of the operator; what a kernel neither reads nor writes may be null.
// A: the accumulation type of pred (float32; float64 for float64).
struct LossNetwork {
  DType dtype;                // of pred and grad_pred; everything else that is not an integer is A
  bool smooth;                // hidden activation: smooth leaky ReLU, else ReLU
  bool softplus;              // output activation: softplus, else linear
  bool softmax;               // link: softmax, or
  bool sigmoid;               // sigmoid, with one class, else identity
  double leak, smoothness;    // of the smooth leaky ReLU
  int64_t samples;            // N
  int64_t classes;            // C
  int64_t width;              // H
  int64_t intervals;          // M of the table, 0: no table
  int64_t ignore_index;       // rows with this label have loss 0, slope 0 and no gradient
  const void* pred;           // [N, C]
  const int64_t* labels;      // [N], targets one-hot, with the sigmoid link 0 or 1; or null
  const void* target;         // [N, C] dense, where labels is null
  const void* input_weight;   // [H, 2]: W1, columns y and f
  const void* hidden_weight;  // [H, H]: W2[o][k]
  const void* output_weight;  // [H]: w3
  void* loss;                 // forward: [N]
  void* slope;                // forward: [N, C]
  // [2 * 5 * M + 1] or null: for y = 0 and y = 1 the M values of v, then of c0, c1, c2, c3; last 1 where the
  // table may be used and 0 where it is refused. Exact kernels return at once where table is given and
  // accepted, table kernels where it is refused: the caller calls both, and nothing is read back from the
  // device in between.
  void* table;
  const void* grad_loss;     // backward: G [N], or null for 0
  const void* grad_slope;    // backward: U [N, C], or null for 0
  void* grad_pred;           // backward: [N, C], or null
  void* grad_input_weight;   // backward: [H, 2]; the three weights' gradients are all given or all null
  void* grad_hidden_weight;  // backward: [H, H]
  void* grad_output_weight;  // backward: [H]
  void* workspace;  // CUDA: cuda::loss_network_workspace(...) elements of A; the CPU allocates its own
  // CUDA, exact backward in half precision: elements whose cotangents are kept at once, in float32.
  int64_t kept_cotangents = int64_t(1) << 25;
};

// The stated error of the table's slope, relative to the largest slope on [0, 1]. The weights of a loss that learns grow:
// after 1,600 steps the error was 6e-5 with 512 intervals and 7e-4 with 256, where it had begun at 3e-8 and 5e-7.
constexpr double loss_network_table_bound = 1e-3;
// Intervals that a table may have, and elements for each node, with fewer of which there is none.
constexpr int64_t loss_network_min_intervals = 16, loss_network_max_intervals = 1024;
constexpr int64_t loss_network_elements_per_node = 1;

inline int64_t loss_network_nodes(int64_t intervals) { return 2 * (intervals + 3); }
inline int64_t loss_network_table_size(int64_t intervals) { return 2 * 5 * intervals + 1; }

// The widest network that the CUDA kernels can take, on every device.
inline int64_t loss_network_cuda_width(DType dtype) { return dtype == DType::float64 ? 256 : 512; }

namespace cuda {
// The largest M of a table that fits the shared memory of the current device.
int64_t loss_network_intervals(DType);
// Scratch that a call with these arguments wants on the current device, results included, in elements of A: a forward
// call where loss is given, else a backward one.
int64_t loss_network_workspace(const LossNetwork&);
}  // namespace cuda

namespace math {

template <class T>
struct Activated {
  T value;
  T gate;  // s in [0, 1]: slope = leak + (1 - leak) s, curvature = (1 - leak) smoothness s (1 - s)
};

// Both activations through their gate: sigma(beta x), or the step function with leak 0.
template <class A>
struct HiddenActivation {
  bool smooth;
  A leak, smoothness, rise, scale,
      bend;  // rise = 1 - leak, scale = rise / smoothness, bend = rise * smoothness

  LOSSMETA_HD explicit HiddenActivation(const LossNetwork& a)
      : smooth(a.smooth),
        leak(a.smooth ? A(a.leak) : A(0)),
        smoothness(A(a.smoothness)),
        rise(a.smooth ? A(1 - a.leak) : A(1)),
        scale(A((1 - a.leak) / a.smoothness)),
        bend(a.smooth ? A((1 - a.leak) * a.smoothness) : A(0)) {}

  // Eq. 4: phi(x) = (1 - leak) / beta log(1 + e^(beta x)) + leak x, without exponentiating a positive number.
  template <class T>
  LOSSMETA_HD Activated<T> smooth_leaky_relu(T x) const {
    const T scaled = x * smoothness, e = exp(-abs(scaled)), r = reciprocal(e + A(1));
    const auto positive = scaled > A(0);
    return {(select(positive, scaled, A(0)) + log1p_unit(e)) * scale + x * leak, select(positive, r, e * r)};
  }

  template <class T>
  LOSSMETA_HD static Activated<T> relu(T x) {
    const auto off = x <= T(A(0));
    return {select(off, A(0), x), select(off, A(0), T(A(1)))};  // NaN stays NaN
  }

  template <class T>
  LOSSMETA_HD Activated<T> operator()(T x) const {
    return smooth ? smooth_leaky_relu(x) : relu(x);
  }

  template <class T>
  LOSSMETA_HD T slope(T gate) const {
    return gate * rise + leak;
  }
  template <class T>
  LOSSMETA_HD T curvature(T gate) const {
    return gate * (T(A(1)) - gate) * bend;
  }
};

// out(z) with its first two derivatives.
template <class T>
struct Output {
  T value, slope, curvature;
};

template <class A, class T>
LOSSMETA_HD Output<T> output_activation(T z, bool softplus) {
  if (!softplus) return {z, T(A(1)), T(A(0))};
  const T e = exp(-abs(z)), r = reciprocal(e + A(1));
  const auto positive = z > A(0);
  return {select(positive, z, A(0)) + log1p_unit(e), select(positive, r, e * r), e * r * r};
}

// The sigmoid with its derivative.
template <class T>
struct Sigmoid {
  T value, slope;
};

template <class A, class T>
LOSSMETA_HD Sigmoid<T> sigmoid(T x) {
  const T e = exp(-abs(x)), r = reciprocal(e + A(1));
  return {select(x > A(0), r, e * r), e * r * r};
}

// ---- The table's formulas.

// c0 .. c3 from the slopes of four neighbouring nodes, at t = -1, 0, 1, 2.
template <class T>
LOSSMETA_HD void table_coefficients(const T* slopes,  // [4]
                                    T* c) {           // [4]
  c[0] = slopes[1];
  c[2] = T(0.5) * ((slopes[0] - slopes[1]) + (slopes[2] - slopes[1]));
  c[3] = T(1) / T(6) * (slopes[3] - slopes[0]) + T(0.5) * (slopes[1] - slopes[2]);
  c[1] = (slopes[2] - slopes[1]) - c[2] - c[3];
}

// Its adjoint: from gradients on c0 .. c3 to gradients on the four slopes.
template <class T>
LOSSMETA_HD void table_coefficients_adjoint(const T* c,   // [4]
                                            T* slopes) {  // [4]
  const T third = T(1) / T(3), sixth = T(1) / T(6), half = T(0.5);
  slopes[0] = half * c[2] - third * c[1] - sixth * c[3];
  slopes[1] = c[0] - half * c[1] - c[2] + half * c[3];
  slopes[2] = c[1] + half * (c[2] - c[3]);
  slopes[3] = sixth * (c[3] - c[1]);
}

// Error estimate of the cubic through the middle four of five neighbouring slopes.
template <class T>
LOSSMETA_HD T table_error(const T* slopes) {  // [5]
  const T outer = slopes[0] + slopes[4], inner = slopes[1] + slopes[3];
  return T(3) / T(128) * abs(outer - T(4) * inner + T(6) * slopes[2]);
}

template <class T, class A>
LOSSMETA_HD T table_value(T v, T c0, T c1, T c2, T c3, T t, A h) {
  return ((((c3 * A(0.25) * t + c2 * (A(1) / A(3))) * t + c1 * A(0.5)) * t + c0) * t) * h + v;
}
template <class T>
LOSSMETA_HD T table_slope(T c0, T c1, T c2, T c3, T t) {
  return ((c3 * t + c2) * t + c1) * t + c0;
}
template <class T, class A>
LOSSMETA_HD T table_curvature(T c1, T c2, T c3, T t, A intervals) {
  return ((c3 * A(3) * t + c2 * A(2)) * t + c1) * intervals;
}

// What an element with cotangents u of its value and w of its slope adds to the gradients on v (index 0) and
// c0 .. c3 (1 .. 4) of its interval.
template <class T, class A>
LOSSMETA_HD void table_adjoint(T u, T w, T t, A h, T* sums) {  // [5]
  const T t2 = t * t, uh = u * h * t;
  sums[0] = u;
  sums[1] = uh + w;
  sums[2] = (uh * A(0.5) + w) * t;
  sums[3] = (uh * (A(1) / A(3)) + w) * t2;
  sums[4] = (uh * A(0.25) + w) * (t2 * t);
}

}  // namespace math
}  // namespace lossmeta

// Exact: loss and slope. Then, from grad_loss and grad_slope, grad_pred and the gradients of the weights.
LOSSMETA_DECLARE_KERNEL(loss_network_forward, LossNetwork)
LOSSMETA_DECLARE_KERNEL(loss_network_backward, LossNetwork)
// Fills in `table` from the weights. The row passes of the table; the backward one ends with the network's
// gradients at the nodes.
LOSSMETA_DECLARE_KERNEL(loss_network_tabulate, LossNetwork)
LOSSMETA_DECLARE_KERNEL(loss_network_table_forward, LossNetwork)
LOSSMETA_DECLARE_KERNEL(loss_network_table_backward, LossNetwork)
