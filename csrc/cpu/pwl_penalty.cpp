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

// Where rows are found, of the buckets `at` [V::size]: in memory, or in registers where two hold a column.
template <class A>
struct InMemory {
  const math::PwlPiece<A>* rows;

  InMemory(const math::PwlPiece<A>* table, int64_t) : rows(table) {}

  LOSSMETA_SIMD void find(const math::bits_t<A>* at, Vec<A> (&columns)[4]) const {
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
      // A row is one load, where a gather makes one of each number. Rows are then exchanged for columns, four by four.
      const auto row = [&](int i) { return _mm_load_ps(&rows[at[i]].knot); };
      const auto two = [&](int i) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(row(i)), row(4 + i), 1);
      };
#if defined(__AVX512F__)
      const auto all = [&](int i) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(two(i)), two(8 + i), 1);
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
    for (int i = 0; i < Vec<A>::size; ++i) {
      const math::PwlPiece<A>& row = rows[at[i]];
      columns[0].v[i] = row.knot, columns[1].v[i] = row.below;
      columns[2].v[i] = row.above, columns[3].v[i] = row.value;
    }
  }
};
template <class A>
struct InRegisters {
  Vec<A> low[4], high[4];

  InRegisters(const math::PwlPiece<A>* table, int64_t count) {
    for (int i = 0; i < 2 * Vec<A>::size; ++i) {
      const math::PwlPiece<A> row = i < count ? table[i] : math::PwlPiece<A>{};
      const A numbers[4] = {row.knot, row.below, row.above, row.value};
      for (int k = 0; k < 4; ++k) (i < Vec<A>::size ? low : high)[k].v[i % Vec<A>::size] = numbers[k];
    }
  }

  LOSSMETA_SIMD void find(const math::bits_t<A>* at, Vec<A> (&columns)[4]) const {
    typename Vec<A>::Bits index;
    memcpy(&index, at, sizeof index);
    for (int k = 0; k < 4; ++k) columns[k] = permute(low[k], high[k], index);
  }
};

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
    int32_t shift = math::widest_shift<A>;
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

// The numbers of the buckets of n weights.
template <class T>
void find_buckets(const math::PwlBuckets<accumulate_t<T>>& buckets, const T* theta, int64_t n,
                  math::bits_t<accumulate_t<T>>* at) {  // [n, but whole vectors]
  using V = Vec<accumulate_t<T>>;
  using Bits = typename V::Bits;
  const Bits zero{}, last = zero + (buckets.count - 1);
  for (int64_t i = 0; i < n; i += V::size) {
    const V x = n - i >= V::size ? load(theta + i) : load_partial(theta + i, int(n - i), 0);
    Bits found = (abs(x).bits() >> buckets.shift) - buckets.base;
    found = found > zero ? found : zero;
    found = found < last ? found : last;
    found += (x.bits() >> (8 * int(sizeof(x.v[0])) - 1)) & buckets.count;  // the sign, in all bits
    memcpy(at + i, &found, sizeof found);
  }
}

// r of n weights x, whose slopes go to `use`.
template <bool shared, class Lookup, class A, class Use>
LOSSMETA_SIMD Vec<A> penalty(const Table<A>& table, const Lookup& lookup, const math::bits_t<A>* at, Vec<A> x,
                             const Use& use) {
  using V = Vec<A>;
  V row[4];  // knot, below, above, value
  lookup.find(at, row);
  if constexpr (shared) {
    for (uint32_t open = lane_bits(row[0] != row[0]); open; open &= open - 1) {
      const int i = __builtin_ctz(open);
      const auto piece = math::resolved(table.r, {row[0][i], row[1][i], row[2][i], row[3][i]}, x[i]);
      row[0].v[i] = piece.knot, row[1].v[i] = piece.below;
      row[2].v[i] = piece.above, row[3].v[i] = piece.value;
    }
  }
  const V mean = row[1] * A(0.5) + row[2] * A(0.5);
  const V slope = select(x == row[0], mean, select(x < row[0], row[1], row[2]));
  use(slope);
  return row[3] + slope * (x - row[0]);
}

// The sum over the weights [begin, end).
template <bool shared, class Lookup, class T, class Use>
double sum_weights(const Table<accumulate_t<T>>& table, const Lookup& lookup, const T* theta, int64_t begin,
                   int64_t end, const Use& use) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int unroll = 4;
  alignas(64) math::bits_t<A> at[block];
  Sum<A> sum;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t stop = first + block < end ? first + block : end;
    const int64_t next = stop + block < end ? stop + block : end;
    use.prefetch(stop, next);
    prefetch_range(theta, stop, next);
    find_buckets(table.buckets, theta + first, stop - first, at);
    int64_t i = first;
    for (; i + unroll * V::size <= stop; i += unroll * V::size) {
      V r[unroll];
      for (int u = 0; u < unroll; ++u) {
        const int64_t j = i + u * V::size;
        r[u] = penalty<shared>(table, lookup, at + (j - first), load(theta + j),
                               [&](V s) { use(j, s, V::size); });
      }
      sum.add((r[0] + r[1]) + (r[2] + r[3]));
    }
    for (; i < stop; i += V::size) {
      const int n = int(stop - i < V::size ? stop - i : V::size);
      const V x = load_partial(theta + i, n, A(0));  // r(0) = 0
      sum.add(penalty<shared>(table, lookup, at + (i - first), x, [&](V s) { use(i, s, n); }));
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
  const int64_t chunks = (a.parameters + chunk - 1) / chunk, rows = 2 * int64_t(table.buckets.count);
  const Buffer<double> partial(chunks);
  const auto run = [&](auto shared, const auto& lookup) {
    parallel_for(chunks, grain_elements / chunk, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        partial[c] = sum_weights<decltype(shared)::value>(
            table, lookup, theta, c * chunk, (c + 1) * chunk < a.parameters ? (c + 1) * chunk : a.parameters,
            use);
    });
  };
  if (table.buckets.shared) run(std::true_type(), InMemory<A>(table.rows.data(), rows));
#if defined(__AVX512F__)
  else if (rows <= 2 * Vec<A>::size)
    run(std::false_type(), InRegisters<A>(table.rows.data(), rows));
#endif
  else
    run(std::false_type(), InMemory<A>(table.rows.data(), rows));
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
