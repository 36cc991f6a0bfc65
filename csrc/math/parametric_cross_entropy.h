// Parametric cross-entropy (ALA, Eq. 6): z = q . log softmax(x), loss = -a act(z), with q the row of Phi that belongs to
// the target, a the weight of its class and act the sigmoid or the identity.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct ParametricCrossEntropy {
  DType dtype;  // of logits; everything else is in its accumulation type
  bool sigmoid;
  Reduction reduction;
  int64_t models;   // B
  int64_t samples;  // S = N * inner, per model
  int64_t classes;  // C
  int64_t inner;    // product of the dimensions after the classes
  int64_t ignore_index;
  const void* logits;     // [B, N, C, inner]
  const int64_t* labels;  // [B, S], or null: phi holds one row per sample
  const void* phi;        // [B, C, C]; without labels [B, N, C, inner]
  int64_t phi_stride;     // from model to model with labels: C * C, or 0 where the models share one phi
  const void* weight;     // [C] or null
  void* statistics;       // of parametric_cross_entropy_statistics(B, S) elements, see Statistics
  void* loss;             // forward: [B, S] where it is not reduced (or scratch), else unused
  void* reduced;          // forward: [B] for mean and sum
  const void* grad;       // backward: [B, S] or [B]
  void* grad_logits;      // backward: as logits, or null
  void* grad_phi;         // backward: as phi, or null
  void* scratch;          // on the GPU, of parametric_cross_entropy_scratch(...) bytes
};

// What the forward pass leaves for the backward one: [4, B, S] followed by [B].
constexpr int64_t parametric_cross_entropy_statistics_per_sample = 4;
inline int64_t parametric_cross_entropy_statistics(int64_t models, int64_t samples) {
  return (parametric_cross_entropy_statistics_per_sample * samples + 1) * models;
}
template <class A>
struct Statistics {
  A* maximum;      // [B, S]: m
  A* log_sum;      // [B, S]: log sum exp(x - m)
  A* z;            // [B, S]
  A* q_sum;        // [B, S]: sum of q
  A* denominator;  // [B]: of the mean

  explicit Statistics(const ParametricCrossEntropy& a)
      : maximum(static_cast<A*>(a.statistics)),
        log_sum(maximum + a.models * a.samples),
        z(log_sum + a.models * a.samples),
        q_sum(z + a.models * a.samples),
        denominator(q_sum + a.models * a.samples) {}
};

// On the GPU the sum of many losses and the gradient of a small Phi are computed in several parts.
inline int64_t parametric_cross_entropy_loss_parts(int64_t samples) {
  const int64_t wanted = (samples + 8191) / 8192;
  return wanted < 1 ? 1 : wanted < 512 ? wanted : 512;
}
inline int64_t parametric_cross_entropy_phi_parts(int64_t models, int64_t samples, int64_t classes) {
  const int64_t wanted = (512 + models * classes - 1) / (models * classes), chunks = (samples + 255) / 256;
  return chunks < 1 ? 1 : wanted < chunks ? wanted : chunks;
}

// Bytes. Forward, per model and part two sums, and per model a counter. Backward, with labels, per part the gradient of
// Phi where there are several; per class a counter; per sample a key and its place.
inline int64_t parametric_cross_entropy_scratch(const ParametricCrossEntropy& a, bool backward) {
  const int64_t element = a.dtype == DType::float64 ? 8 : 4;
  if (!backward) return a.models * (parametric_cross_entropy_loss_parts(a.samples) * 2 * element + 4);
  const int64_t parts = parametric_cross_entropy_phi_parts(a.models, a.samples, a.classes);
  const int64_t partial = parts > 1 ? parts * a.classes * a.classes : 0;
  return a.models * (partial * element + a.classes * 4 + a.samples * 6);
}

namespace math {

template <class T>
LOSSMETA_HD T sigmoid(T x) {
  // Never exponentiates a positive number.
  const T e = exp(-abs(x));
  return select(x >= T(0), T(1) / (T(1) + e), e / (T(1) + e));
}

template <class T>
LOSSMETA_HD T parametric_activation(T z, bool use_sigmoid) {
  return use_sigmoid ? sigmoid(z) : z;
}

template <class T>
LOSSMETA_HD T parametric_activation_slope(T z, bool use_sigmoid) {
  if (!use_sigmoid) return T(1);
  // s (1 - s) would lose its digits where s rounds to 1.
  const T e = exp(-abs(z)), r = T(1) / (T(1) + e);
  return e * r * r;
}

// q times a (shifted) logit or log-probability. A masked class, logit -infinity, with q = 0 contributes nothing.
template <class T>
LOSSMETA_HD T weighted_logit(T q, T x) {
  return select(q == T(0), T(0), q * x);
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(parametric_cross_entropy_forward, ParametricCrossEntropy)
LOSSMETA_DECLARE_KERNEL(parametric_cross_entropy_backward, ParametricCrossEntropy)
