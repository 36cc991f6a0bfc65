// The piecewise-linear regulariser of TuneLoss (Eq. 4), sum_p r(theta_p). r is continuous, r(0) = 0, and its slope is
// slopes[i] between knots i-1 and i; at a knot it is the mean of both sides.
//
// Floor for P float32 weights: P reads and P writes of 4 bytes, and next to no arithmetic. So the interval of a weight is
// not searched. The leading bits of a floating-point number are a bucket whose width is relative to its size, as are
// the distances of knots worth having. With as many bits as keep the knots apart each bucket is one row of four numbers:
// a knot, the slopes below and above it, and r there. A weight costs about ten operations on its bits and one row.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct PwlPenalty {
  DType dtype;          // of theta; knots, slopes and value are in its accumulation type
  int64_t parameters;   // P
  int32_t knots_count;  // X
  const void* theta;    // [P]
  const void* knots;    // [X], each at least the one before
  const void* slopes;   // [X+1]
  void* value;          // forward: []
  void* slope;          // [P] of slope_t; forward: or null
  const void* grad;     // backward: []
  void*
      gradient;   // [P], as theta; forward: the slope is added to it, or null; backward: grad times the slope
  void* scratch;  // on the GPU, forward: of pwl_penalty_scratch(...) bytes
};

namespace math {

LOSSMETA_HD int32_t signed_bits(float x) { return int32_t(float_to_bits(x)); }
LOSSMETA_HD int64_t signed_bits(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class A>
using bits_t = decltype(signed_bits(A()));
template <class A>
constexpr int32_t widest_shift = 8 * int32_t(sizeof(A)) - 2;  // leaves one bit of a magnitude
// Leaves the exponent: no weight of a bucket is below half of its knot, where value + s (x - knot) would cancel.
template <class A>
constexpr int32_t binade_shift = sizeof(A) == 4 ? 23 : 52;

template <class A>
LOSSMETA_HD bits_t<A> magnitude_bits(A x) {
  return signed_bits(x) & ~(bits_t<A>(1) << (8 * sizeof(A) - 1));
}

// How many of the knots lie below x, or below or at x; known to be at least `begin` and at most `end`.
template <class A>
LOSSMETA_HD int32_t knots_below(const A* knots, int32_t begin, int32_t end, A x, bool or_at) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    const A knot = knots[middle];
    const bool below = or_at ? knot <= x : knot < x;
    begin = below ? middle + 1 : begin;
    end = below ? end : middle;
  }
  return begin;
}

// r near a knot: value + (x < knot ? below : above) (x - knot).
template <class A>
struct alignas(16) PwlPiece {
  A knot, below, above, value;

  LOSSMETA_HD A slope(A x) const {
    const A mean = A(0.5) * below + A(0.5) * above, s = x < knot ? below : x > knot ? above : mean;
    return x == x ? s : x;
  }
  // Where the slope is 0, r is constant up to infinity.
  LOSSMETA_HD A penalty(A x) const {
    const A s = slope(x);
    return s == A(0) ? value : value + s * (x - knot);
  }
};

template <class A>
struct PwlFunction {
  int32_t count;    // X
  const A* knots;   // [X]
  const A* slopes;  // [X+1]
  const A* values;  // [X], r at the knots
  int32_t zero;     // knots below 0: the interval of this number holds 0, or ends there

  // For all x above `first` knots that meet no others but the knots [first, last), which are equal. Without such the
  // piece hangs on the next knot on the way to 0, or on 0: nothing cancels there.
  LOSSMETA_HD PwlPiece<A> piece(int32_t first, int32_t last) const {
    const A s = slopes[first];
    if (first < last) return {knots[first], s, slopes[last], values[first]};
    if (first == zero) return {A(0), s, s, A(0)};
    const int32_t next = first > zero ? first - 1 : first;
    return {knots[next], s, s, values[next]};
  }

  // The piece for one x, which is above `begin` knots at least and `end` at most.
  LOSSMETA_HD PwlPiece<A> search(A x, int32_t begin, int32_t end) const {
    const int32_t first = knots_below(knots, begin, end, x, false);
    return piece(first, knots_below(knots, first, end, x, true));
  }
};

// By how much r rises to knot k from the next one on the way to 0, or from 0.
template <class A>
LOSSMETA_HD double pwl_rise(const A* knots, const A* slopes, int32_t zero, int32_t k) {
  if (k < zero)
    return double(slopes[k + 1]) * (double(knots[k]) - (k + 1 < zero ? double(knots[k + 1]) : 0.0));
  return double(slopes[k]) * (double(knots[k]) - (k > zero ? double(knots[k - 1]) : 0.0));
}

// Numbers the buckets: those of x >= 0 from 0 on with growing x, those of x < 0 from `count` on with growing -x. The
// first and the last of either sign reach to 0 and to infinity.
template <class A>
struct PwlBuckets {
  bits_t<A> base, count;
  int32_t shift;
  bool shared;  // whether some bucket holds different knots

  LOSSMETA_HD bits_t<A> of_magnitude(A x) const {
    const bits_t<A> at = (magnitude_bits(x) >> shift) - base;
    return at < 0 ? 0 : at < count ? at : count - 1;
  }
  LOSSMETA_HD bits_t<A> of(A x) const { return of_magnitude(x) + (signed_bits(x) < 0 ? count : 0); }

  // For knots whose magnitudes, but for 0, lie in [smallest, largest] and whose buckets differ at this shift; at most
  // `most` of either sign. `smallest` is 0 where no other knot is.
  LOSSMETA_HD static PwlBuckets between(A smallest, A largest, int32_t shift, int64_t most) {
    if (!(smallest > A(0))) return {0, 1, widest_shift<A>, false};
    const bits_t<A> low = magnitude_bits(smallest), high = magnitude_bits(largest);
    const int32_t wanted = shift;
    while ((high >> shift) - (low >> shift) + 3 > most && shift < widest_shift<A>) ++shift;
    const bits_t<A> count = (high >> shift) - (low >> shift) + 3;
    return {(low >> shift) - 1, count < 1 ? 1 : count, shift, shift > wanted};
  }
};

// The largest shift, up to the exponent's, at which the knots a <= b have buckets of their own.
template <class A>
LOSSMETA_HD int32_t separating_shift(A a, A b) {
  int32_t shift = binade_shift<A>;
  if (a == b || (a < A(0) && b > A(0))) return shift;
  const bits_t<A> difference = magnitude_bits(a) ^ magnitude_bits(b);
  while (shift > 0 && !(difference >> shift)) --shift;
  return shift;
}

// The row of a bucket that holds the knots [first, last). Where these differ the row has no knot but says which they are.
template <class A>
LOSSMETA_HD PwlPiece<A> bucket_row(const PwlFunction<A>& r, int32_t first, int32_t last) {
  if (first == last || r.knots[first] == r.knots[last - 1]) return r.piece(first, last);
  const bits_t<A> range[2] = {bits_t<A>(first), bits_t<A>(last)};
  PwlPiece<A> row{A(NAN), A(0), A(0), A(0)};
  memcpy(&row.below, &range[0], sizeof(A));
  memcpy(&row.above, &range[1], sizeof(A));
  return row;
}
template <class A>
LOSSMETA_HD PwlPiece<A> resolved(const PwlFunction<A>& r, const PwlPiece<A>& row, A x) {
  if (row.knot == row.knot) return row;
  bits_t<A> range[2];
  memcpy(&range[0], &row.below, sizeof(A));
  memcpy(&range[1], &row.above, sizeof(A));
  return r.search(x, int32_t(range[0]), int32_t(range[1]));
}

}  // namespace math

// On the GPU: the bytes of the rows of either sign, the weights of a block, and the bytes of what the blocks share. They
// depend on the problem only, as does the order of the sums.
constexpr int64_t pwl_row_bytes = 16 << 10;
constexpr int64_t pwl_head_bytes = 128;

inline int64_t pwl_penalty_share(int64_t parameters) {
  constexpr int64_t least = 1024, most = 16384, few = 1024, many = 1 << 17;
  const int64_t wanted = (parameters + few - 1) / few, needed = (parameters + many - 1) / many;
  const int64_t share = wanted < least ? least : wanted < most ? wanted : most;
  return ((share > needed ? share : needed) + least - 1) / least * least;
}
inline int64_t pwl_penalty_blocks(int64_t parameters) {
  const int64_t share = pwl_penalty_share(parameters);
  return parameters > 0 ? (parameters + share - 1) / share : 1;
}
inline int64_t pwl_penalty_scratch(const PwlPenalty& a) {
  const int64_t element = a.dtype == DType::float64 ? 8 : 4;
  return 2 * pwl_row_bytes + pwl_head_bytes + 8 * pwl_penalty_blocks(a.parameters) + element * a.knots_count;
}

}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(pwl_penalty_forward, PwlPenalty)
LOSSMETA_DECLARE_KERNEL(pwl_penalty_backward, PwlPenalty)
