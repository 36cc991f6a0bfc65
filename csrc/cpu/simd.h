// One SIMD register of T, as wide as the instruction set that this file is compiled for, and elementary functions of
// it. Formulas of csrc/math take Vec<T> wherever they take T.
#pragma once

#include <type_traits>
#include <utility>

#include "base/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LOSSMETA_ISA
#error "csrc/cpu is compiled once per instruction set, with LOSSMETA_ISA naming it"
#endif

// Everything here lives in the namespace of its instruction set: the linker must never merge two of them.
namespace lossmeta::LOSSMETA_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// The vectors that GCC and Clang operate on; Bits is also a mask: lanes 0 or -1.
template <class T>
struct native;
template <>
struct native<float> {
  typedef float Vector __attribute__((vector_size(vector_bytes), may_alias));
  typedef int32_t Bits __attribute__((vector_size(vector_bytes), may_alias));
};
template <>
struct native<double> {
  typedef double Vector __attribute__((vector_size(vector_bytes), may_alias));
  typedef int64_t Bits __attribute__((vector_size(vector_bytes), may_alias));
};

template <class T>
struct Vec {
  static constexpr int size = vector_bytes / int(sizeof(T));
  using Element = T;
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Native = typename native<T>::Vector;
  using Bits = typename native<T>::Bits;

  Native v;

  Vec() = default;
  Vec(Native vector) : v(vector) {}
  Vec(T x) : v(x - Native{}) {}  // broadcast
  T operator[](int lane) const { return v[lane]; }
  Bits bits() const { return (Bits)v; }
  static Vec from_bits(Bits b) { return Vec((Native)b); }
};

template <class T>
struct Mask {
  typename Vec<T>::Bits m;
};

#define LOSSMETA_SIMD inline __attribute__((always_inline))

#define LOSSMETA_SIMD_BINARY(op)                                           \
  template <class T>                                                       \
  LOSSMETA_SIMD Vec<T> operator op(Vec<T> a, Vec<T> b) {                   \
    return Vec<T>(a.v op b.v);                                             \
  }                                                                        \
  template <class T>                                                       \
  LOSSMETA_SIMD Vec<T> operator op(Vec<T> a, typename Vec<T>::Element b) { \
    return Vec<T>(a.v op Vec<T>(b).v);                                     \
  }                                                                        \
  template <class T>                                                       \
  LOSSMETA_SIMD Vec<T> operator op(typename Vec<T>::Element a, Vec<T> b) { \
    return Vec<T>(Vec<T>(a).v op b.v);                                     \
  }
LOSSMETA_SIMD_BINARY(+)
LOSSMETA_SIMD_BINARY(-)
LOSSMETA_SIMD_BINARY(*)
LOSSMETA_SIMD_BINARY(/)
#undef LOSSMETA_SIMD_BINARY

#define LOSSMETA_SIMD_COMPARE(op)                                           \
  template <class T>                                                        \
  LOSSMETA_SIMD Mask<T> operator op(Vec<T> a, Vec<T> b) {                   \
    return {a.v op b.v};                                                    \
  }                                                                         \
  template <class T>                                                        \
  LOSSMETA_SIMD Mask<T> operator op(Vec<T> a, typename Vec<T>::Element b) { \
    return {a.v op Vec<T>(b).v};                                            \
  }
LOSSMETA_SIMD_COMPARE(<)
LOSSMETA_SIMD_COMPARE(<=)
LOSSMETA_SIMD_COMPARE(>)
LOSSMETA_SIMD_COMPARE(>=)
LOSSMETA_SIMD_COMPARE(==)
LOSSMETA_SIMD_COMPARE(!=)
#undef LOSSMETA_SIMD_COMPARE

template <class T>
LOSSMETA_SIMD Vec<T> operator-(Vec<T> a) {
  return Vec<T>(-a.v);
}
template <class T>
LOSSMETA_SIMD Vec<T>& operator+=(Vec<T>& a, Vec<T> b) {
  return a = a + b;
}
template <class T>
LOSSMETA_SIMD Vec<T>& operator-=(Vec<T>& a, Vec<T> b) {
  return a = a - b;
}
template <class T>
LOSSMETA_SIMD Vec<T>& operator*=(Vec<T>& a, Vec<T> b) {
  return a = a * b;
}
template <class T>
LOSSMETA_SIMD Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.m & b.m};
}
template <class T>
LOSSMETA_SIMD Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.m | b.m};
}
template <class T>
LOSSMETA_SIMD Vec<T> select(Mask<T> condition, Vec<T> yes, Vec<T> no) {
  return Vec<T>(condition.m ? yes.v : no.v);
}
template <class T>
LOSSMETA_SIMD Vec<T> select(Mask<T> condition, Vec<T> yes, typename Vec<T>::Element no) {
  return select(condition, yes, Vec<T>(no));
}
template <class T>
LOSSMETA_SIMD Vec<T> select(Mask<T> condition, typename Vec<T>::Element yes, Vec<T> no) {
  return select(condition, Vec<T>(yes), no);
}
// The larger (smaller) of the two; `b` where one of them is NaN.
template <class T>
LOSSMETA_SIMD Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm512_max_ps((__m512)a.v, (__m512)b.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm256_max_ps((__m256)a.v, (__m256)b.v));
#endif
  return select(a > b, a, b);
}
template <class T>
LOSSMETA_SIMD Vec<T> min(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm512_min_ps((__m512)a.v, (__m512)b.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm256_min_ps((__m256)a.v, (__m256)b.v));
#endif
  return select(a < b, a, b);
}
template <class T>
LOSSMETA_SIMD Vec<T> abs(Vec<T> a) {
  constexpr auto sign = typename Vec<T>::Integer(1) << (8 * sizeof(T) - 1);
  return Vec<T>::from_bits(a.bits() & ~sign);
}
template <class T>
LOSSMETA_SIMD Vec<T> sqrt(Vec<T> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm512_sqrt_ps((__m512)a.v));
  else
    return Vec<T>((typename Vec<T>::Native)_mm512_sqrt_pd((__m512d)a.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>((typename Vec<T>::Native)_mm256_sqrt_ps((__m256)a.v));
  else
    return Vec<T>((typename Vec<T>::Native)_mm256_sqrt_pd((__m256d)a.v));
#else
  for (int i = 0; i < Vec<T>::size; ++i) a.v[i] = math::sqrt(a.v[i]);
  return a;
#endif
}

// ---- Memory: element types are converted to and from their accumulation type.

template <class T>
LOSSMETA_SIMD Vec<accumulate_t<T>> load(const T* p) {
  using V = Vec<accumulate_t<T>>;
  if constexpr (sizeof(T) == 2) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<T, float16>)
      return V((typename V::Native)_mm512_cvtph_ps(half));
    else
      return V((typename V::Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<T, float16>)
      return V((typename V::Native)_mm256_cvtph_ps(half));
    else
      return V((typename V::Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    V r;
    for (int i = 0; i < V::size; ++i) r.v[i] = math::load(p + i);
    return r;
#endif
  } else {
    V r;
    memcpy(&r.v, p, sizeof r.v);
    return r;
  }
}

template <class T>
LOSSMETA_SIMD void store(T* p, Vec<accumulate_t<T>> x) {
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < x.size; ++i) math::store(p + i, x.v[i]);
  } else {
    memcpy(p, &x.v, sizeof x.v);
  }
}

// The first n lanes from memory (0 <= n <= size), the others `fill`.
template <class T>
LOSSMETA_SIMD Vec<accumulate_t<T>> load_partial(const T* p, int n, accumulate_t<T> fill) {
  using V = Vec<accumulate_t<T>>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return V((typename V::Native)_mm512_mask_loadu_ps((__m512)V(fill).v, __mmask16((1u << n) - 1), p));
#endif
  accumulate_t<T> buffer[V::size];
  for (int i = 0; i < V::size; ++i) buffer[i] = i < n ? math::load(p + i) : fill;
  return load(buffer);
}

template <class T>
LOSSMETA_SIMD void store_partial(T* p, Vec<accumulate_t<T>> x, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x.v);
#endif
  for (int i = 0; i < n; ++i) math::store(p + i, x.v[i]);
}

// Past the caches, to memory that is aligned to the vector: for results too large to stay in them. What other threads
// read afterwards needs stream_fence() first.
template <class T>
LOSSMETA_SIMD void stream(T* p, Vec<accumulate_t<T>> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, (__m512)x.v);
  if constexpr (std::is_same_v<T, double>) return _mm512_stream_pd(p, (__m512d)x.v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(p, (__m256)x.v);
  if constexpr (std::is_same_v<T, double>) return _mm256_stream_pd(p, (__m256d)x.v);
#endif
  store(p, x);
}
LOSSMETA_SIMD void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Lane i reads p[i * stride]; lanes from n on are `fill`.
template <class T>
LOSSMETA_SIMD Vec<accumulate_t<T>> load_strided(const T* p, int64_t stride, int n, accumulate_t<T> fill) {
  using V = Vec<accumulate_t<T>>;
  if (n == V::size && stride == 1) return load(p);
  accumulate_t<T> buffer[V::size];
  for (int i = 0; i < V::size; ++i) buffer[i] = i < n ? math::load(p + i * stride) : fill;
  return load(buffer);
}

// Lane i reads p[index[i]].
template <class T>
LOSSMETA_SIMD Vec<T> gather(const T* p, typename Vec<T>::Bits index) {
  using V = Vec<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return V((typename V::Native)_mm512_i32gather_ps((__m512i)index, p, 4));
  else
    return V((typename V::Native)_mm512_i64gather_pd((__m512i)index, p, 8));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return V((typename V::Native)_mm256_i32gather_ps(p, (__m256i)index, 4));
  else
    return V((typename V::Native)_mm256_i64gather_pd(p, (__m256i)index, 8));
#else
  V r;
  for (int i = 0; i < V::size; ++i) r.v[i] = p[index[i]];
  return r;
#endif
}

template <class T>
LOSSMETA_SIMD void store_strided(T* p, int64_t stride, Vec<accumulate_t<T>> x, int n) {
  if (n == x.size && stride == 1) return store(p, x);
  for (int i = 0; i < n; ++i) math::store(p + i * stride, x.v[i]);
}

// The lower and the upper half of the lanes in float64.
LOSSMETA_SIMD void widen(Vec<float> x, Vec<double>& low, Vec<double>& high) {
  using V = Vec<double>::Native;
#if defined(__AVX512F__)
  low.v = (V)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x.v));
  high.v = (V)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x.v, 1));
#elif defined(__AVX2__)
  low.v = (V)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.v));
  high.v = (V)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.v, 1));
#else
  V halves[2];
  for (int i = 0; i < 2 * low.size; ++i) halves[i / low.size][i % low.size] = x.v[i];
  low.v = halves[0], high.v = halves[1];
#endif
}

// ---- Tables. An index is a vector of integers as wide as T.

// Rounds towards zero.
template <class T>
LOSSMETA_SIMD typename Vec<T>::Bits truncate(Vec<T> x) {
  return __builtin_convertvector(x.v, typename Vec<T>::Bits);
}

// Bit i is set where lane i of the mask is.
template <class T>
LOSSMETA_SIMD uint32_t lane_bits(Mask<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_movepi32_mask((__m512i)mask.m);
  else
    return _mm512_movepi64_mask((__m512i)mask.m);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm256_movemask_ps((__m256)mask.m));
  else
    return uint32_t(_mm256_movemask_pd((__m256d)mask.m));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::size; ++i) bits |= uint32_t(mask.m[i] & 1) << i;
  return bits;
#endif
}
template <class T>
LOSSMETA_SIMD bool all(Mask<T> mask) {
  return lane_bits(mask) == (1u << Vec<T>::size) - 1;
}

// gather() for 0 <= index[i] < 2 * size, from two registers.
template <class T>
LOSSMETA_SIMD Vec<T> permute(Vec<T> low, Vec<T> high, typename Vec<T>::Bits index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(
        (typename Vec<T>::Native)_mm512_permutex2var_ps((__m512)low.v, (__m512i)index, (__m512)high.v));
  else
    return Vec<T>(
        (typename Vec<T>::Native)_mm512_permutex2var_pd((__m512d)low.v, (__m512i)index, (__m512d)high.v));
#else
  Vec<T> r;
  for (int i = 0; i < r.size; ++i) r.v[i] = index[i] < r.size ? low.v[index[i]] : high.v[index[i] - r.size];
  return r;
#endif
}

// ---- Reductions over the lanes, in a fixed (tree) order.

template <class V, int... lane>
LOSSMETA_SIMD V shuffle_xor(V x, int offset, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  typename V::Native r;
  for (int i = 0; i < V::size; ++i) r[i] = x.v[i ^ offset];
  return V(r);
#else
  return V(__builtin_shuffle(x.v, typename V::Bits{(lane ^ offset)...}));
#endif
}

template <class T>
LOSSMETA_SIMD T reduce_add(Vec<T> x) {
  for (int offset = x.size / 2; offset > 0; offset /= 2)
    x += shuffle_xor(x, offset, std::make_integer_sequence<int, Vec<T>::size>());
  return x.v[0];
}

template <class T>
LOSSMETA_SIMD bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask.m, (__m512i)mask.m) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask.m, (__m256i)mask.m);
#else
  typename Vec<T>::Integer bits = 0;
  for (int i = 0; i < Vec<T>::size; ++i) bits |= mask.m[i];
  return bits != 0;
#endif
}

// Lane r of the result is the sum over the lanes of rows[r]: half the rows are folded into the other half at a time.
template <class T>
LOSSMETA_SIMD Vec<T> reduce_add_rows(Vec<T> (&rows)[Vec<T>::size]) {
  constexpr int size = Vec<T>::size;
  const auto lanes = std::make_integer_sequence<int, size>();
  for (int half = size / 2; half > 0; half /= 2) {
    typename Vec<T>::Bits upper;
    for (int i = 0; i < size; ++i) upper[i] = i & half ? -1 : 0;
    for (int r = 0; r < half; ++r) {
      const Vec<T> kept = select(Mask<T>{upper}, rows[r + half], rows[r]);
      const Vec<T> other = select(Mask<T>{upper}, rows[r], rows[r + half]);
      rows[r] = kept + shuffle_xor(other, half, lanes);
    }
  }
  return rows[0];
}

// Lane c of row r and lane r of row c change places, one bit of r and c after the other.
template <int bit, class V, int... lane>
LOSSMETA_SIMD void exchange_bit(V (&rows)[V::size], std::integer_sequence<int, lane...>) {
  for (int r = 0; r < V::size; ++r) {
    if (r & bit) continue;
    const typename V::Native x = rows[r].v, y = rows[r | bit].v;
#if defined(__clang__)
    for (int i = 0; i < V::size; ++i) {
      rows[r].v[i] = i & bit ? y[i ^ bit] : x[i];
      rows[r | bit].v[i] = i & bit ? y[i] : x[i ^ bit];
    }
#else
    rows[r].v = __builtin_shuffle(x, y, typename V::Bits{(lane & bit ? (lane ^ bit) + V::size : lane)...});
    rows[r | bit].v =
        __builtin_shuffle(x, y, typename V::Bits{(lane & bit ? lane + V::size : lane ^ bit)...});
#endif
  }
}
template <class T, int bit = Vec<T>::size / 2>
LOSSMETA_SIMD void transpose(Vec<T> (&rows)[Vec<T>::size]) {
  exchange_bit<bit>(rows, std::make_integer_sequence<int, Vec<T>::size>());
  if constexpr (bit > 1) transpose<T, bit / 2>(rows);
}

// Lane r of the result is the largest lane of rows[r], NaN lanes skipped; -infinity where all are NaN.
template <class T>
LOSSMETA_SIMD Vec<T> reduce_max_rows(Vec<T> (&rows)[Vec<T>::size]) {
  transpose(rows);
  Vec<T> m(-INFINITY);
  for (const Vec<T>& row : rows) m = max(row, m);
  return m;
}

// NaN lanes are skipped; -infinity where all are NaN.
template <class T>
LOSSMETA_SIMD T reduce_max(Vec<T> x) {
  x = select(x == x, x, -INFINITY);
  for (int offset = x.size / 2; offset > 0; offset /= 2)
    x = max(x, shuffle_xor(x, offset, std::make_integer_sequence<int, Vec<T>::size>()));
  return x.v[0];
}

// 1/x to 2 ulp where x and 1/x are normal numbers: an estimate and a Newton step, a quarter of a division's time.
template <class T>
LOSSMETA_SIMD Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
    const Vec<T> r((typename Vec<T>::Native)_mm512_rcp14_ps((__m512)x.v));
#else
    const Vec<T> r((typename Vec<T>::Native)_mm256_rcp_ps((__m256)x.v));
#endif
    return r * (T(2) - x * r);
  }
#endif
  return T(1) / x;
}

// ---- Elementary functions. float32: polynomials, relative error below 2^-22; float64: the C library per lane.
// Infinities, NaN and subnormal results are those of the C library.

template <int n, class V>
LOSSMETA_SIMD V horner(V x, const typename V::Element (&coefficients)[n]) {
  V r(coefficients[0]);
  for (int i = 1; i < n; ++i) r = r * x + coefficients[i];
  return r;
}

// exp for x below 89 (or NaN), as in a softmax, where x <= 0.
LOSSMETA_SIMD Vec<float> exp_bounded(Vec<float> x) {
  using V = Vec<float>;
  // What is below half the smallest subnormal is set to 0, not computed: an underflow costs over 100 cycles.
  constexpr float lowest = -103.97f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x.v, (__m512)V(lowest).v, _CMP_NLT_UQ);
#else
  const V argument = x;
  x = max(V(lowest), x);
#endif
  // e^x = 2^n e^r with n = round(x / log 2) and |r| <= log(2)/2; log 2 is split so that n log 2 is exact.
  const V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum rounds to an integer
  const V n = shifted - 12582912.f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const V p = horner(r, {8.31250124e-3f, 4.18903315e-2f, 1.66671154e-1f, 4.99992303e-1f, 1.f, 1.f});
#if defined(__AVX512F__)
  return V((V::Native)_mm512_maskz_scalef_ps(kept, (__m512)p.v, (__m512)n.v));
#else
  // Two factors of 2^(n/2) reach the subnormals and infinity.
  const V::Bits integer = shifted.bits() - V(12582912.f).bits(), half = integer >> 1;
  const V y = p * V::from_bits((half + 127) << 23) * V::from_bits((integer - half + 127) << 23);
  return select(argument < lowest, 0.f, y);
#endif
}

LOSSMETA_SIMD Vec<float> exp(Vec<float> x) { return exp_bounded(min(Vec<float>(89.f), x)); }

// e^x - 1 without cancellation near 0.
LOSSMETA_SIMD Vec<float> expm1(Vec<float> x) {
  using V = Vec<float>;
  // As exp: 2^n e^r - 1 = 2^n (e^r - 1) + (2^n - 1). Beyond 2^24 the 1 no longer counts, and below -17 it is all.
  const V whole = exp(x), y = select(x < -17.f, -17.f, select(x > 17.f, 17.f, x));
  const V shifted = y * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const V r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  const V q = horner(r, {1.3926251e-3f, 8.3632329e-3f, 4.1666554e-2f, 1.6666577e-1f, 0.5f});
  const V power = V::from_bits((shifted.bits() - V(12582912.f).bits() + 127) << 23);
  const V small = (q * (r * r) + r) * power + (power - 1.f);
  return select(x > 17.f, whole, select(x == x, small, x));
}

LOSSMETA_SIMD Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const auto tiny = x < 1.17549435e-38f;
  const V scaled = select(tiny, x * 8388608.f, x);
  const V::Bits offset = scaled.bits() - 0x3f3504f3;
  V e(__builtin_convertvector(offset >> 23, V::Native));
  e = e - select(tiny, V(23.f), V(0.f));
  const V f = V::from_bits((offset & 0x007fffff) + 0x3f3504f3) - 1.f;
  const V q = horner(f, {6.9716115e-2f, -1.1479734e-1f, 1.1685420e-1f, -1.2425687e-1f, 1.4249058e-1f,
                         -1.6667802e-1f, 2.0000716e-1f, -2.4999997e-1f, 3.3333331e-1f});
  const V f2 = f * f;
  V r = e * 0.693359375f + (f + (f2 * -0.5f + (f * f2 * q + e * -2.12194440e-4f)));
  r = select(x == INFINITY, V(INFINITY), r);
  r = select(x == 0.f, V(-INFINITY), r);
  return select(x >= 0.f, r, V(NAN));
}

// log(1 + y) for y in [0, 1] (as softplus needs it): 2 atanh(y / (2 + y)).
LOSSMETA_SIMD Vec<float> log1p_unit(Vec<float> y) {
  const Vec<float> s = y * reciprocal(y + 2.f);
  return s * horner(s * s, {2.4393908e-1f, 2.1398561e-1f, 2.8620207e-1f, 3.9998711e-1f, 6.6666679e-1f, 2.f});
}

LOSSMETA_SIMD Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < x.size; ++i) x.v[i] = math::exp(x.v[i]);
  return x;
}
LOSSMETA_SIMD Vec<double> exp_bounded(Vec<double> x) { return exp(x); }
LOSSMETA_SIMD Vec<double> expm1(Vec<double> x) {
  for (int i = 0; i < x.size; ++i) x.v[i] = math::expm1(x.v[i]);
  return x;
}
LOSSMETA_SIMD Vec<double> log(Vec<double> x) {
  for (int i = 0; i < x.size; ++i) x.v[i] = math::log(x.v[i]);
  return x;
}
LOSSMETA_SIMD Vec<double> log1p_unit(Vec<double> y) {
  for (int i = 0; i < y.size; ++i) y.v[i] = math::log1p(y.v[i]);
  return y;
}

}  // namespace lossmeta::LOSSMETA_ISA
