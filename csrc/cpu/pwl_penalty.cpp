#include "math/pwl_penalty.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t chunk = 1 << 14;  // weights with a sum of their own: fixed, whatever the threads
constexpr int64_t grain_elements = 1 << 15;
constexpr int64_t rows_most = 4096;  // of either sign, unless there are more knots
constexpr int64_t rows_least = 64;   // fewer weights repay no more
constexpr int64_t weights_per_row = 16;
constexpr int64_t block = 256;  // weights whose buckets are found before their rows are read

// r at the knots, and the rows of all buckets.
template <class A>
struct Table {
  Buffer<A> values;
  math::PwlFunction<A> r;
  math::PwlBuckets<A> buckets;
  Buffer<math::PwlPiece<A>> rows;  // [2, buckets.count]

  explicit Table(const PwlPenalty& a)
      : values(a.knots_count), r(function(a)), buckets(choose(a)), rows(2 * int64_t(buckets.count)) {
    // Outwards from 0 on either side: the knots of a bucket follow those of the one before.
    const auto in_bucket = [&](int32_t k, int64_t b) { return buckets.of_magnitude(r.knots[k]) == b; };
    int32_t first = r.zero, last = math::knots_below(r.knots, r.zero, r.count, A(0), true), k = first;
    for (int64_t b = 0; b < buckets.count; ++b, first = k) {
      while (k < r.count && in_bucket(k, b)) ++k;
      rows[b] = math::bucket_row(r, first, k);
    }
    k = last;
    for (int64_t b = 0; b < buckets.count; ++b, last = k) {
      while (k > 0 && in_bucket(k - 1, b)) --k;
      rows[buckets.count + b] = math::bucket_row(r, k, last);
    }
  }

 private:
  math::PwlFunction<A> function(const PwlPenalty& a) const {
    const A *knots = static_cast<const A*>(a.knots), *slopes = static_cast<const A*>(a.slopes);
    const int32_t count = a.knots_count, zero = math::knots_below(knots, 0, count, A(0), false);
    double sum = 0;
    for (int32_t k = zero; k < count; ++k) values[k] = A(sum += math::pwl_rise(knots, slopes, zero, k));
    sum = 0;
    for (int32_t k = zero; k-- > 0;) values[k] = A(sum += math::pwl_rise(knots, slopes, zero, k));
    return {count, knots, slopes, values.data(), zero};
  }

  math::PwlBuckets<A> choose(const PwlPenalty& a) const {
    A smallest(0), largest(0);
    int32_t shift = math::binade_shift<A>;
    for (int32_t k = 0; k < r.count; ++k) {
      const A size = math::abs(r.knots[k]);
      if (size > A(0) && (smallest == A(0) || size < smallest)) smallest = size;
      if (size > largest) largest = size;
      if (k == 0) continue;
      const int32_t own = math::separating_shift(r.knots[k - 1], r.knots[k]);
      if (own < shift) shift = own;
    }
    const int64_t wanted = a.parameters / weights_per_row, most = r.count > rows_most ? r.count : rows_most;
    return math::PwlBuckets<A>::between(smallest, largest, shift,
                                        wanted < rows_least ? rows_least
                                        : wanted < most     ? wanted
                                                            : most);
  }
};

// PwlBuckets::of().
template <class A>
LOSSMETA_SIMD typename Vec<A>::Bits bucket(const math::PwlBuckets<A>& buckets, Vec<A> x) {
  using Bits = typename Vec<A>::Bits;
  const Bits zero{}, last = zero + (buckets.count - 1);
  Bits at = (abs(x).bits() >> buckets.shift) - buckets.base;
  at = at > zero ? at : zero;
  at = at < last ? at : last;
  return at + ((x.bits() >> (8 * int(sizeof(A)) - 1)) & buckets.count);  // the sign, in all bits
}

// Finds rows in memory.
template <class A>
class InMemory {
 public:
  explicit InMemory(const Table<A>& table) : buckets_(table.buckets), rows_(table.rows.data()) {}

  // For n weights at once: what was stored just now is slow to load in other sizes.
  template <class T>
  void prepare(const T* theta, int64_t n) {
    const math::PwlBuckets<A> buckets = buckets_;  // stays in registers
    for (int64_t i = 0; i < n; i += Vec<A>::size) {
      const Vec<A> x = n - i >= Vec<A>::size ? load(theta + i) : load_partial(theta + i, int(n - i), A(0));
      const auto found = bucket(buckets, x);
      memcpy(at_ + i, &found, sizeof found);
    }
  }

  // The rows of the weights x, which are the i-th prepared and those that follow.
  LOSSMETA_SIMD void find(int64_t i, Vec<A>, Vec<A> (&columns)[4]) const {
    const math::bits_t<A>* at = at_ + i;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
      // A row is one load, where a gather makes one of each number. Rows are then exchanged for columns, four by four.
      const auto row = [&](int k) { return _mm_load_ps(&rows_[at[k]].knot); };
      const auto two = [&](int k) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(row(k)), row(4 + k), 1);
      };
#if defined(__AVX512F__)
      const auto all = [&](int k) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(two(k)), two(8 + k), 1);
      };
#define LOSSMETA_UNPACK(half, type, a, b) (__m512) _mm512_unpack##half##_##type(a, b)
      using Double = __m512d;
#else
      const auto& all = two;
#define LOSSMETA_UNPACK(half, type, a, b) (__m256) _mm256_unpack##half##_##type(a, b)
      using Double = __m256d;
#endif
      const auto r0 = all(0), r1 = all(1), r2 = all(2), r3 = all(3);
      const auto low01 = (Double)LOSSMETA_UNPACK(lo, ps, r0, r1),
                 low23 = (Double)LOSSMETA_UNPACK(lo, ps, r2, r3);
      const auto high01 = (Double)LOSSMETA_UNPACK(hi, ps, r0, r1),
                 high23 = (Double)LOSSMETA_UNPACK(hi, ps, r2, r3);
      using Native = typename Vec<A>::Native;
      columns[0].v = (Native)LOSSMETA_UNPACK(lo, pd, low01, low23);
      columns[1].v = (Native)LOSSMETA_UNPACK(hi, pd, low01, low23);
      columns[2].v = (Native)LOSSMETA_UNPACK(lo, pd, high01, high23);
      columns[3].v = (Native)LOSSMETA_UNPACK(hi, pd, high01, high23);
#undef LOSSMETA_UNPACK
      return;
    }
#endif
    for (int k = 0; k < Vec<A>::size; ++k) {
      const math::PwlPiece<A>& row = rows_[at[k]];
      columns[0].v[k] = row.knot, columns[1].v[k] = row.below;
      columns[2].v[k] = row.above, columns[3].v[k] = row.value;
    }
  }

 private:
  math::PwlBuckets<A> buckets_;
  const math::PwlPiece<A>* rows_;
  alignas(64) math::bits_t<A> at_[block];
};

// Finds rows in registers: two hold a column.
template <class A>
class InRegisters {
 public:
  static constexpr int most = 2 * Vec<A>::size;

  explicit InRegisters(const Table<A>& table) : buckets_(table.buckets) {
    for (int i = 0; i < most; ++i) {
      const math::PwlPiece<A> row = i < 2 * buckets_.count ? table.rows[i] : math::PwlPiece<A>{};
      const A numbers[4] = {row.knot, row.below, row.above, row.value};
      for (int k = 0; k < 4; ++k) (i < Vec<A>::size ? low_ : high_)[k].v[i % Vec<A>::size] = numbers[k];
    }
  }

  template <class T>
  LOSSMETA_SIMD void prepare(const T*, int64_t) {}

  LOSSMETA_SIMD void find(int64_t, Vec<A> x, Vec<A> (&columns)[4]) const {
    const auto at = bucket(buckets_, x);
    for (int k = 0; k < 4; ++k) columns[k] = permute(low_[k], high_[k], at);
  }

 private:
  math::PwlBuckets<A> buckets_;
  Vec<A> low_[4], high_[4];
};

// Sums of vectors in float64.
template <class A>
struct Sum {
  Vec<double> low{0.0}, high{0.0};
  LOSSMETA_SIMD void add(Vec<A> x) {
    if constexpr (sizeof(A) == 4) {
      Vec<double> a, b;
      widen(x, a, b);
      low += a, high += b;
    } else {
      low += x;
    }
  }
  double total() const { return reduce_add(low + high); }
};

template <class T>
void prefetch_range(const T* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

// What becomes of the slopes of n weights from the i-th on, and of that of a NaN.
struct Dropped {
  void prefetch(int64_t, int64_t) const {}
  template <class V>
  LOSSMETA_SIMD void operator()(int64_t, V, int) const {}
  void poison(int64_t) const {}
};
template <class S>
struct Written {
  S* slope;
  void prefetch(int64_t, int64_t) const {}
  LOSSMETA_SIMD void operator()(int64_t i, Vec<accumulate_t<S>> s, int n) const {
    if (n == s.size)
      store(slope + i, s);
    else
      store_partial(slope + i, s, n);
  }
  void poison(int64_t i) const { math::store(slope + i, accumulate_t<S>(NAN)); }
};
template <class T>
struct Added {
  T* gradient;
  void prefetch(int64_t begin, int64_t end) const { prefetch_range(gradient, begin, end); }
  LOSSMETA_SIMD void operator()(int64_t i, Vec<accumulate_t<T>> s, int n) const {
    if (n == s.size)
      store(gradient + i, load(gradient + i) + s);
    else
      store_partial(gradient + i, load_partial(gradient + i, n, accumulate_t<T>(0)) + s, n);
  }
  void poison(int64_t i) const { math::store(gradient + i, accumulate_t<T>(NAN)); }
};

// r of n weights x, whose slopes go to `use`.
template <bool shared, class Lookup, class A, class Use>
LOSSMETA_SIMD Vec<A> penalty(const Table<A>& table, const Lookup& lookup, int64_t i, Vec<A> x,
                             const Use& use) {
  using V = Vec<A>;
  V row[4];  // knot, below, above, value
  lookup.find(i, x, row);
  if constexpr (shared) {
    for (uint32_t open = lane_bits(row[0] != row[0]); open; open &= open - 1) {
      const int k = __builtin_ctz(open);
      const auto piece = math::resolved(table.r, {row[0][k], row[1][k], row[2][k], row[3][k]}, x[k]);
      row[0].v[k] = piece.knot, row[1].v[k] = piece.below;
      row[2].v[k] = piece.above, row[3].v[k] = piece.value;
    }
  }
  const V mean = row[1] * A(0.5) + row[2] * A(0.5);
  const V slope = select(x == row[0], mean, select(x < row[0], row[1], row[2]));
  use(slope);
  return row[3] + slope * (x - row[0]);
}

// The sum over the weights [begin, end).
template <bool shared, class Lookup, class T, class Use>
double sum_weights(const Table<accumulate_t<T>>& table, const T* theta, int64_t begin, int64_t end,
                   const Use& use) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int unroll = 4;
  Lookup lookup(table);
  Sum<A> sum;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t stop = first + block < end ? first + block : end;
    const int64_t next = stop + block < end ? stop + block : end;
    use.prefetch(stop, next);
    prefetch_range(theta, stop, next);
    lookup.prepare(theta + first, stop - first);
    int64_t i = first;
    for (; i + unroll * V::size <= stop; i += unroll * V::size) {
      V r[unroll];
      for (int u = 0; u < unroll; ++u) {
        const int64_t j = i + u * V::size;
        r[u] = penalty<shared>(table, lookup, j - first, load(theta + j), [&](V s) { use(j, s, V::size); });
      }
      sum.add((r[0] + r[1]) + (r[2] + r[3]));
    }
    for (; i < stop; i += V::size) {
      const int n = int(stop - i < V::size ? stop - i : V::size);
      const V x = load_partial(theta + i, n, A(0));  // r(0) = 0
      sum.add(penalty<shared>(table, lookup, i - first, x, [&](V s) { use(i, s, n); }));
    }
  }
  const double total = sum.total();
  if (total - total == 0) return total;
  // A weight is not finite, or a sum of float32 was not.
  double careful = 0;
  for (int64_t i = begin; i < end; ++i) {
    const A x = math::load(theta + i);
    if (x != x) use.poison(i);
    careful += double(math::resolved(table.r, table.rows[table.buckets.of(x)], x).penalty(x));
  }
  return careful;
}

template <class T, class Use>
void forward(const PwlPenalty& a, const Use& use) {
  using A = accumulate_t<T>;
  const T* theta = static_cast<const T*>(a.theta);
  const Table<A> table(a);
  const int64_t chunks = (a.parameters + chunk - 1) / chunk;
  const Buffer<double> partial(chunks);
  const auto run = [&](auto shared, auto lookup) {
    parallel_for(chunks, grain_elements / chunk, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * chunk, end = begin + chunk < a.parameters ? begin + chunk : a.parameters;
        partial[c] = sum_weights<decltype(shared)::value, typename decltype(lookup)::type>(table, theta,
                                                                                           begin, end, use);
      }
    });
  };
  if (table.buckets.shared) run(std::true_type(), type_tag<InMemory<A>>());
#if defined(__AVX512F__)
  else if (2 * table.buckets.count <= InRegisters<A>::most)
    run(std::false_type(), type_tag<InRegisters<A>>());
#endif
  else
    run(std::false_type(), type_tag<InMemory<A>>());
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += partial[c];
  *static_cast<A*>(a.value) = A(total);
}

template <class T>
void backward(const PwlPenalty& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const slope_t<T>* slope = static_cast<const slope_t<T>*>(a.slope);
  const A* factor = static_cast<const A*>(a.grad);
  T* gradient = static_cast<T*>(a.gradient);
  parallel_for(a.parameters, grain_elements, [=](int64_t begin, int64_t end) {
    const A grad = *factor;
    int64_t i = begin;
    for (; i + V::size <= end; i += V::size) store(gradient + i, load(slope + i) * grad);
    if (i < end) {
      const int n = int(end - i);
      store_partial(gradient + i, load_partial(slope + i, n, A(0)) * grad, n);
    }
  });
}

}  // namespace

void pwl_penalty_forward(const PwlPenalty& a) {
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.gradient)
      forward<T>(a, Added<T>{static_cast<T*>(a.gradient)});
    else if (a.slope)
      forward<T>(a, Written<slope_t<T>>{static_cast<slope_t<T>*>(a.slope)});
    else
      forward<T>(a, Dropped());
  });
}

void pwl_penalty_backward(const PwlPenalty& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
