// Adjusted cross-entropy. With p = softmax(x + shift) and s = -log p_y a sample costs
// (1 - e^{-q s}) / q + eps (1/C sum_c -log p_c - s). Its derivative in the logits is w p - (w - eps) 1_y - eps / C with
// w = e^{-q s}. All of it follows from d = x + shift - m, m the maximum of the row: p = e^d / sum e^d and
// s = log sum e^d - d_y, and what smoothing adds is d_y less the mean of d.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct AdjustedCrossEntropy {
  DType dtype;      // of logits; parameters and results are in its accumulation type
  int64_t models;   // B
  int64_t samples;  // N
  int64_t classes;  // C
  int64_t ignore_index;
  const void* logits;     // [B, N, C]
  const int64_t* labels;  // [N]
  const void* shift;      // [B, C] or null
  const void* exponent;   // q, [B] or null
  const void* smoothing;  // eps, [B] or null
  void* loss;             // forward: [B]
  void* slope;            // [B, N, C] of slope_t; forward: or null
  void* derivatives;      // [2, B]: of the loss in q and in eps
  const void* grad;       // backward: [B]
  void* grad_logits;      // backward: as logits, or null
  void* grad_shift;       // backward: [B, C] or null
  void* grad_exponent;    // backward: [B] or null
  void* grad_smoothing;   // backward: [B] or null
  void* scratch;          // on the GPU, of adjusted_cross_entropy_scratch(...) bytes
};

// On the GPU the sums over many samples are computed in several parts.
inline int64_t adjusted_cross_entropy_loss_parts(int64_t samples) {
  const int64_t wanted = (samples + 8191) / 8192;
  return wanted < 1 ? 1 : wanted < 512 ? wanted : 512;
}
inline int64_t adjusted_cross_entropy_shift_parts(const AdjustedCrossEntropy& a) {
  const int64_t tiles = a.models * ((a.classes + 31) / 32), chunks = (a.samples + 255) / 256;
  const int64_t wanted = tiles > 0 ? (512 + tiles - 1) / tiles : 1;
  return chunks < 1 ? 1 : wanted < chunks ? wanted : chunks;
}

// Bytes. Forward, per part a count; three numbers per sample, and their sums per model and part; per model a counter.
// Backward, per part the gradient of the shift where there are several.
inline int64_t adjusted_cross_entropy_scratch(const AdjustedCrossEntropy& a, bool backward) {
  const int64_t element = a.dtype == DType::float64 ? 8 : 4;
  if (!backward) {
    const int64_t parts = adjusted_cross_entropy_loss_parts(a.samples);
    return parts * 8 + a.models * ((a.samples + parts) * 3 * element + 4);
  }
  const int64_t parts = adjusted_cross_entropy_shift_parts(a);
  return a.grad_shift && parts > 1 ? parts * a.models * a.classes * element : 0;
}

namespace math {

// q s, also for the s of a label that is masked, which is infinite.
template <class T>
LOSSMETA_HD T damping(T s, T q) {
  return select(q == T(0), T(0), q * s);
}

// (1 - e^{-u}) / q with u = q s; s to the rounding where u is tiny.
template <class T>
LOSSMETA_HD T generalised(T s, T q, T u) {
  return select(u < T(1e-17f), s, -expm1(-u) / q);
}

// Its derivative in q, ((1 + u) e^{-u} - 1) / q^2 = s^2 ((1 + u) e^{-u} - 1) / u^2.
template <class T>
LOSSMETA_HD T generalised_slope(T s, T q, T u, T w) {
  // The difference cancels for small u. Of the series -1/2 + u/3 - u^2/8 + ... each term is the one before it times
  // -u k / ((k - 1) (k + 1)).
  T series(1);
  for (int k = 16; k >= 2; --k) series = T(1) - series * u * (T(float(k)) / T(float((k - 1) * (k + 1))));
  // Where w is 0, u may be infinite.
  const T difference = select(w == T(0), T(0), (T(1) + u) * w) - T(1);
  return select(u < T(0.5f), s * s * series * T(-0.5f), difference / (q * q));
}

// A row's loss with its derivatives in q and eps, and how e^d becomes its slope: e^d scale - rest, less own at the label.
template <class T>
struct AdjustedRow {
  T loss, exponent, smoothing, scale, own, rest;
};

template <class T>
LOSSMETA_HD AdjustedRow<T> adjusted_row(T sum,      // of e^d
                                        T d_label,  // d_y
                                        T d_total,  // sum of d
                                        T q, T eps, T classes,
                                        T share) {  // of a sample in the mean
  const T s = log(sum) - d_label, u = damping(s, q), w = exp(-u), rest = eps / classes;
  // Divided, not multiplied by a rounded 1/C, which would be off to the same side in all samples.
  const T smoothed = d_label - d_total / classes;
  // Without smoothing a masked class, of d = -infinity, costs nothing.
  return {generalised(s, q, u) + select(eps == T(0), T(0), eps * smoothed),
          generalised_slope(s, q, u, w),
          smoothed,
          w / sum * share,
          (w - eps) * share,
          rest * share};
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(adjusted_cross_entropy_forward, AdjustedCrossEntropy)
LOSSMETA_DECLARE_KERNEL(adjusted_cross_entropy_backward, AdjustedCrossEntropy)
