#include "math/pwl_statistics.h"

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t block = 512;              // parameters whose cells are found together
constexpr int64_t chunk_minimum = 1 << 15;  // parameters with sums of their own: fixed, whatever the threads
constexpr int64_t chunk_maximum_count = 256;
constexpr int64_t copied_bytes = 1 << 13;  // sums up to this size are kept in several copies
constexpr int64_t buckets_maximum = 4096;

// The sums of a group of quantities over a cell.
typedef double Quad __attribute__((vector_size(32)));

// Finds cells: a uniform grid of buckets over the knots narrows the search, and bisection among the knots of
// a bucket ends it. The bucket of x is monotone in x, rounding included: knots in lower buckets lie below x,
// in higher ones above.
template <class A>
class CellFinder {
 public:
  using V = Vec<A>;
  using Integer = typename V::Integer;
  using Bits = typename V::Bits;

  CellFinder(const A* knots, int64_t count)
      : nan_cell_(Integer(2 * count + 1)),
        buckets_(bucket_count(count)),
        first_(knots[0]),
        scale_(A(buckets_) / (knots[count - 1] - knots[0])),
        starts_(buckets_),
        candidates_(buckets_),
        knots_(3 * count + 2) {
    // Beyond the last knot NaN, which is neither below nor equal to anything.
    for (int64_t k = 0; k < 3 * count + 2; ++k) knots_[k] = k < count ? knots[k] : A(NAN);
    int64_t most = 0;
    for (int64_t b = 0, k = 0; b < buckets_; ++b) {
      const Integer start = Integer(k);
      while (k < count && bucket(V(knots[k]))[0] == b) ++k;
      memcpy(&starts_[b], &start, sizeof start);
      candidates_[b] = k > start ? knots[start] : A(NAN);
      most = k - start > most ? k - start : most;
    }
    for (step_ = 1; 2 * step_ - 1 < most;) step_ *= 2;
    single_ = most <= 1;
  }

  // Calls use(i, cells) with the cells of theta[i .. i + V::size) for every such i below n.
  template <class T, class Use>
  void find(const T* theta,  // [n]
            int64_t n, const Use& use) const {
    if (single_)
      each<true>(theta, n, use);
    else
      each<false>(theta, n, use);
  }

 private:
  static int64_t bucket_count(int64_t knots) {
    int64_t buckets = 16;
    while (buckets < 4 * knots && buckets < buckets_maximum) buckets *= 2;
    return buckets;
  }
  Bits bucket(V x) const {
    const V at = min(max((x - first_) * scale_, V(A(0))), V(A(buckets_ - 1)));  // NaN: 0
    return __builtin_convertvector(at.v, Bits);
  }

  template <bool single, class T, class Use>
  void each(const T* theta, int64_t n, const Use& use) const {
    for (int64_t i = 0; i < n; i += V::size) {
      const V x = n - i >= V::size ? load(theta + i) : load_partial(theta + i, int(n - i), A(0));
      const Bits at = bucket(x);
      Bits below = gather(starts_.data(), at).bits();  // of the knots, so many lie below x
      Bits cell;
      if constexpr (single) {
        const V knot = gather(candidates_.data(), at);
        cell = 2 * below - (knot < x).m - (knot <= x).m;
      } else {
        for (Integer step = step_; step > 0; step /= 2)
          below += (gather(knots_.data(), below + (step - 1)) < x).m & step;
        cell = 2 * below - (gather(knots_.data(), below) == x).m;
      }
      use(i, (x == x).m ? cell : Bits{} + nan_cell_);
    }
  }

  Integer nan_cell_, step_;
  int64_t buckets_;
  A first_, scale_;
  bool single_;           // no bucket has two knots
  Buffer<A> starts_;      // [buckets] bits of an integer: the first knot that is not in a lower bucket
  Buffer<A> candidates_;  // [buckets] that knot where it lies in the bucket, else NaN
  Buffer<A> knots_;       // [X], then NaN
};

// Where the four quantities of a group come from; null: zero.
template <class T>
struct Group {
  bool counts;
  const T* source[4];
};

template <class T>
Group<T> group_of(const PwlStatistics& a, int64_t index) {
  const T* gradients = static_cast<const T*>(a.gradients);
  Group<T> group{index == 0, {nullptr, nullptr, nullptr, nullptr}};
  if (index == 0) group.source[1] = static_cast<const T*>(a.theta);
  for (int i = index == 0 ? 2 : 0; i < 4; ++i) {
    const int64_t r = 4 * index - 2 + i;
    if (r < a.gradients_count) group.source[i] = gradients + r * a.parameters;
  }
  return group;
}

// Adds the quantities of `n` parameters from p on to the sums of their cells; neighbours take turns among the
// copies, so that an addition seldom waits for the one before.
template <int copies, class T>
void scatter(const Group<T>& group, const typename Vec<accumulate_t<T>>::Integer* cells,  // [n]
             int64_t p, int n, Quad* sums,                                                // [copies, cells]
             int64_t cell_count) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  alignas(64) A columns[4][block];
  alignas(64) A rows[4 * block];
  for (int i = 0; i < 4; ++i)
    for (int64_t j = 0; j < n; j += V::size) {
      const int rest = n - j < V::size ? int(n - j) : V::size;
      V value(group.counts && i == 0 ? A(1) : A(0));
      if (group.source[i])
        value = rest == V::size ? load(group.source[i] + p + j)
                                : load_partial(group.source[i] + p + j, rest, A(0));
      store(columns[i] + j, value);
    }
  for (int64_t j = 0; j < block; ++j)
    for (int i = 0; i < 4; ++i) rows[4 * j + i] = columns[i][j];
  const auto add = [&](int64_t j, int copy) {
    const A* row = rows + 4 * j;
    sums[copy * cell_count + cells[j]] +=
        Quad{double(row[0]), double(row[1]), double(row[2]), double(row[3])};
  };
  int64_t j = 0;
  for (; j + copies <= n; j += copies)
    for (int copy = 0; copy < copies; ++copy) add(j + copy, copy);
  for (; j < n; ++j) add(j, 0);
}

// The statistics from the sums over all parameters.
template <class A>
void assemble(const PwlStatistics& a, const Quad* sums) {  // [groups, cells]
  const int64_t x = a.knots_count, cells = math::pwl_cells(x);
  const Buffer<double> above(cells);
  above[2 * x + 1] = 0;
  for (int64_t c = 2 * x; c >= 0; --c) above[c] = above[c + 1] + sums[c][0];
  for (int64_t q = 1; q < 2 + a.gradients_count; ++q)
    math::pwl_column(
        a, q, above.data(), static_cast<const A*>(a.knots),
        [&](int64_t cell) { return sums[q / pwl_group_size * cells + cell][q % pwl_group_size]; },
        sums[2 * x + 1][0] > 0);
  for (int64_t m = 0; m < 2 * x; ++m)
    for (int64_t l = 0; l < 2 * x; ++l) a.gram[m * 2 * x + l] = math::pwl_gram(above.data(), x, m, l);
}

template <int copies, class T>
void statistics(const PwlStatistics& a) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const T* theta = static_cast<const T*>(a.theta);
  const int64_t cells = math::pwl_cells(a.knots_count), groups = math::pwl_groups(a.gradients_count);
  const int64_t share = (a.parameters + chunk_maximum_count - 1) / chunk_maximum_count;
  int64_t chunk = share > chunk_minimum ? share : chunk_minimum;
  if (chunk < 8 * cells) chunk = 8 * cells;
  chunk = (chunk + block - 1) / block * block;
  const int64_t chunks = (a.parameters + chunk - 1) / chunk, size = groups * copies * cells;
  const CellFinder<A> finder(static_cast<const A*>(a.knots), a.knots_count);
  const Buffer<Quad> partial(chunks * size), total(groups * cells);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Quad* sums = partial.data() + c * size;
      for (int64_t i = 0; i < size; ++i) sums[i] = Quad{};
      const int64_t stop = (c + 1) * chunk < a.parameters ? (c + 1) * chunk : a.parameters;
      for (int64_t p = c * chunk; p < stop; p += block) {
        const int n = int(stop - p < block ? stop - p : block);
        alignas(64) typename V::Integer found[block];
        finder.find(theta + p, n, [&](int64_t i, typename V::Bits at) { memcpy(found + i, &at, sizeof at); });
        for (int64_t g = 0; g < groups; ++g)
          scatter<copies>(group_of<T>(a, g), found, p, n, sums + g * copies * cells, cells);
      }
    }
  });
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < cells; ++i) {
      Quad sum{};
      for (int64_t c = 0; c < chunks; ++c)
        for (int copy = 0; copy < copies; ++copy) sum += partial[c * size + (g * copies + copy) * cells + i];
      total[g * cells + i] = sum;
    }
  assemble<A>(a, total.data());
}

}  // namespace

void pwl_statistics(const PwlStatistics& a) {
  if (a.knots_count == 0) return;
  const int64_t bytes = math::pwl_cells(a.knots_count) * int64_t(sizeof(Quad));
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (bytes <= copied_bytes)
      statistics<4, T>(a);
    else
      statistics<1, T>(a);
  });
}

}  // namespace lossmeta::LOSSMETA_ISA
