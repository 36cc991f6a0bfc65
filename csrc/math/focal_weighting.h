// Focal weighting (ALA, Eq. 10): two log-sum-exps for each anchor, over the distances to the embeddings of its label and
// over those to the others, with temperatures Phi.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct FocalWeighting {
  DType dtype;             // of embeddings; everything else is in its accumulation type
  Reduction reduction;     // over the anchors
  int64_t count;           // M
  int64_t dims;            // D
  double offset;           // alpha
  const void* embeddings;  // [M, D]
  const int64_t* labels;   // [M]
  const void* phi;         // [2], positive
  // All distances; then for positives and negatives L = log(1 + sum exp s), and the entropy H of the weights exp(s - L).
  void* statistics;       // [M, M] followed by [2, M] and [2, M]
  void* loss;             // forward: [M], or [] where it is reduced
  const void* grad;       // backward: as loss
  void* grad_embeddings;  // backward: as embeddings, or null
  void* grad_phi;         // backward: [2], or null
};

namespace math {

template <class T>
struct FocalStatistics {
  T log_sum;  // L = log(1 + sum exp s), where s = +-Phi (d - alpha)
  T entropy;  // H = sum of w (L - s), with weights w = exp(s - L) of the pairs and exp(-L) of the 1, whose s is 0
};

// From the maximum m of 0 and all s, and the sums of exp(s - m) and of (s - m) exp(s - m).
template <class T>
LOSSMETA_HD FocalStatistics<T> focal_statistics(T m, T sum, T moment) {
  const T one = exp(-m), total = one + sum, log_total = m > T(0) ? log(total) : log1p(sum);
  return {m + log_total, log_total + (m * one - moment) / total};
}

// The loss of an anchor.
template <class T>
LOSSMETA_HD T focal_loss(const T* phi,  // [2]
                         T positive, T negative) {
  return positive / phi[0] + negative / phi[1];
}

// d(L / Phi)/dPhi = (sum of w s - L) / Phi^2; the difference is -H, which L and the sum would give inexactly.
template <class T>
LOSSMETA_HD T focal_phi_slope(T phi, T entropy) {
  return -entropy / (phi * phi);
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(focal_weighting_forward, FocalWeighting)
LOSSMETA_DECLARE_KERNEL(focal_weighting_backward, FocalWeighting)
