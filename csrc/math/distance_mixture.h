// Distance mixture (ALA, Eq. 9 and supplement B): five increasing functions of the distance between anchor and positive
// and five decreasing ones of that between anchor and negative, mixed with the coefficients Phi.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

// Either triplets are given, or labels: then all valid triplets are meant, as the weighted sums over pairs that they are.
// Anchor a with P positives and N negatives has P N of them, in which each positive occurs N times, each negative P times.
struct DistanceMixture {
  DType dtype;              // of embeddings; everything else is in its accumulation type
  Reduction reduction;      // over the triplets
  int64_t count;            // M
  int64_t dims;             // D
  int64_t triplet_count;    // T; unused with labels
  double min_distance;      // below it F- is constant
  const void* embeddings;   // [M, D]
  const int64_t* triplets;  // [T, 3] anchor, positive, negative; or null
  const int64_t* labels;    // [M], or null
  const void* phi;          // [10]
  // Triplets: distances to the positive, to the negative. Labels: all distances; then for each anchor the positives P and
  // the negatives N; then T.
  void* statistics;  // [2, T] or [M, M] followed by [2, M] and [1]
  void* loss;        // forward: [T] or [M] (sum over the triplets of an anchor), or [] where it is reduced
  void* terms;       // forward: [10], means of F over the triplets
  const void* grad_loss;   // backward: as loss, or null
  const void* grad_terms;  // backward: [10], or null
  void* grad_embeddings;   // backward: as embeddings, or null
  void* grad_phi;          // backward: [10], or null
  void* workspace;         // CUDA: distance_mixture_workspace(a) numbers
};

// On CUDA: blocks that form partial sums of the ten functions, at most; and the scratch that they need.
inline int64_t distance_mixture_parts(const DistanceMixture& a) {
  return a.labels ? a.count : (a.triplet_count + 127) / 128;
}
inline int64_t distance_mixture_workspace(const DistanceMixture& a) {
  return 10 * distance_mixture_parts(a) + 2 * a.triplet_count;
}

namespace math {

// The values F_i(d) of one side, and their slopes over the distance: the gradient of F_i(|x - y|) in x is pull_i (x - y).
template <class T>
struct MixtureSide {
  T value[5], pull[5];
};

// F+ = d^2, d^2.5, d^1.5, (e^(0.6 d^2) - 1)/2, (e^(0.6 d) - 1)/2; at d = 0 the gradient is defined as 0.
template <class T>
LOSSMETA_HD MixtureSide<T> increasing_distances(T d) {
  const T root = sqrt(d), square = d * d;
  const T inverse = select(d == T(0), T(0), T(1) / d);
  const T gauss = expm1(T(0.6) * square), laplace = expm1(T(0.6) * d);
  return {{square, square * root, d * root, T(0.5) * gauss, T(0.5) * laplace},
          {T(2), T(2.5) * root, T(1.5) * root * inverse, T(0.6) * (gauss + T(1)),
           T(0.3) * (laplace + T(1)) * inverse}};
}

// F- = 0.5/d, 0.2/d, 0.1/d^2, log(1/d), log(1/d^2), constant below min_distance.
template <class T>
LOSSMETA_HD MixtureSide<T> decreasing_distances(T d, T min_distance) {
  const auto clamped = d < min_distance;
  const T inverse = T(1) / select(clamped, min_distance, d), square = inverse * inverse;
  const T logarithm = log(inverse), slope = select(clamped, T(0), square);
  return {{T(0.5) * inverse, T(0.2) * inverse, T(0.1) * square, logarithm, T(2) * logarithm},
          {T(-0.5) * inverse * slope, T(-0.2) * inverse * slope, T(-0.2) * square * slope, -slope,
           T(-2) * slope}};
}

// A zero coefficient contributes 0 even where F is infinite.
template <class T>
LOSSMETA_HD T weighted_distance(T coefficient, T f) {
  return select(coefficient == T(0), T(0), coefficient * f);
}

// What g F adds to the gradient of its coefficient: 0 where that is 0 and F infinite.
template <class T>
LOSSMETA_HD T coefficient_gradient(T coefficient, T g, T f) {
  return select(coefficient == T(0), select(abs(f) == T(INFINITY), T(0), g * f), g * f);
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(distance_mixture_forward, DistanceMixture)
LOSSMETA_DECLARE_KERNEL(distance_mixture_backward, DistanceMixture)
