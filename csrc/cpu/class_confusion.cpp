#include "math/class_confusion.h"

#include "cpu/group.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 14;  // below this a thread costs more than it saves
constexpr int64_t max_lanes_classes = 16;    // up to here lanes across rows beat lanes along the row

// sums[0 .. size) -= x, in float64.
template <class A>
LOSSMETA_SIMD void subtract(double* sums, Vec<A> x) {
  if constexpr (sizeof(A) == 8) {
    store(sums, load(sums) - x);
  } else {
    Vec<double> low, high;
    widen(x, low, high);
    store(sums, load(sums) - low);
    store(sums + low.size, load(sums + low.size) - high);
  }
}

// The lanes of the maximum of a row.
template <class T>
LOSSMETA_SIMD Vec<accumulate_t<T>> maximum(const T* x, int64_t classes) {
  using V = Vec<accumulate_t<T>>;
  V m0(-INFINITY), m1(-INFINITY);
  int64_t c = 0;
  for (; c + 2 * V::size <= classes; c += 2 * V::size)
    m0 = max(load(x + c), m0), m1 = max(load(x + c + V::size), m1);
  for (; c + V::size <= classes; c += V::size) m0 = max(load(x + c), m0);
  if (c < classes) m1 = max(load_partial(x + c, int(classes - c), accumulate_t<T>(-INFINITY)), m1);
  return max(m0, m1);
}

// Subtracts x - m of `count` rows from the sums of their class and leaves the lanes of their sum exp(x - m), while later
// rows are fetched. The rows' x - m are first added to each other: all have one sign.
template <int count, class T>
LOSSMETA_SIMD void add_rows(const T* const* rows, const T* const* later, Vec<accumulate_t<T>> m, int first,
                            int64_t classes, Vec<accumulate_t<T>>* exponentials, double* sums,
                            double* padding) {  // [V::size], the sums of what is left of C
  using A = accumulate_t<T>;
  using V = Vec<A>;
  V e[count], maxima[count];
  for (int r = 0; r < count; ++r) e[r] = V(A(0)), maxima[r] = V(m[first + r]);
  const auto step = [&](auto load_lanes, int64_t c, double* to) {
    V total;
    for (int r = 0; r < count; ++r) {
      __builtin_prefetch(later[first + r] + c);
      const V d = load_lanes(rows[first + r] + c) - maxima[r];
      e[r] += exp_bounded(d);
      total = r ? total + d : d;
    }
    subtract(to, total);
  };
  int64_t c = 0;
  for (; c + V::size <= classes; c += V::size) step([](const T* x) { return load(x); }, c, sums + c);
  if (c < classes)
    step([&](const T* x) { return load_partial(x, int(classes - c), A(-INFINITY)); }, c, padding);
  for (int r = 0; r < count; ++r) exponentials[first + r] = e[r];
}

// sums += what the samples order[0 .. count) of one class contribute. Those of the next classes follow up to `known`, and
// are fetched meanwhile: rows in random order, each a page or so, are no stream that the processor would see.
template <class T>
void add_class(const ClassConfusion& a, const int64_t* order, int64_t count, int64_t known, double* sums) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  // So many rows are looked at twice in cache, and the next ones fetched.
  const int64_t in_cache = (1 << 17) / (a.classes * int64_t(sizeof(T))) + 1;
  const T* logits = static_cast<const T*>(a.logits);
  constexpr int together = 2;
  const int64_t block = in_cache < V::size ? in_cache : V::size;
  double log_sums = 0, padding[V::size] = {};
  for (int64_t o = 0; o < count; o += block) {
    const int n = int(count - o < block ? count - o : block);
    const T *rows[V::size], *later[V::size];
    V lanes[V::size];
    for (int r = 0; r < V::size; ++r) {
      const int64_t next = o + n + r;
      rows[r] = logits + (r < n ? order[o + r] * a.classes : 0);
      later[r] = next < known ? logits + order[next] * a.classes : rows[r];
      lanes[r] = r < n ? maximum(rows[r], a.classes) : V(A(0));
    }
    const V m = reduce_max_rows(lanes);
    int r = 0;
    for (; r + together <= n; r += together)
      add_rows<together>(rows, later, m, r, a.classes, lanes, sums, padding);
    for (; r < n; ++r) add_rows<1>(rows, later, m, r, a.classes, lanes, sums, padding);
    const V log_sum = log(reduce_add_rows(lanes));
    for (int r = 0; r < n; ++r) log_sums += double(log_sum[r]);
  }
  for (int64_t j = 0; j < a.classes / V::size * V::size; ++j) sums[j] += log_sums;
  for (int64_t j = a.classes / V::size * V::size; j < a.classes; ++j)
    sums[j] += padding[j % V::size] + log_sums;
}

// Each class at a time, its row of sums in cache: no two threads share one.
template <class T>
void by_class(const ClassConfusion& a) {
  const Groups groups(a.labels, a.samples, a.classes);
  // Threads share the samples evenly, up to a class: class k stands at the k-th of the classes and their samples.
  parallel_for(
      groups.offsets[a.classes] + a.classes, grain_elements / a.classes + 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = 0; k < a.classes; ++k) {
          const int64_t first = groups.offsets[k],
                        count = k == a.ignore_index ? 0 : groups.offsets[k + 1] - first;
          if (first + k < begin || first + k >= end) continue;
          double* sums = a.sums + k * a.classes;
          if (!a.accumulate) {
            memset(sums, 0, size_t(a.classes) * sizeof(double));
            a.counts[k] = 0;
          }
          add_class<T>(a, groups.order.data() + first, count, groups.offsets[a.classes] - first, sums);
          a.counts[k] += count;
        }
      });
}

// Few classes: lanes across samples, and sums of their own for each chunk of samples, added up in their order.
template <class T>
struct Chunks {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int64_t length = 1024;
  static constexpr int together = 128;

  const ClassConfusion& a;
  const T* logits = static_cast<const T*>(a.logits);
  int64_t width = (a.classes + V::size - 1) / V::size * V::size;  // of a padded row
  int64_t size = a.classes * (width + 1);                         // the rows; then counts

  // The maximum m of each of V::size rows, one per lane, and sum exp(x - m).
  static LOSSMETA_SIMD void normalise(const T* rows, int64_t classes, V& m, V& sum) {
    V x[max_lanes_classes];
    for (int64_t c = 0; c < classes; c += V::size) {
      V block[V::size];
      for (int l = 0; l < V::size; ++l) block[l] = load(rows + l * classes + c);
      transpose(block);
      for (int l = 0; l < V::size; ++l) x[c + l] = block[l];
    }
    m = V(-INFINITY), sum = V(A(0));
    for (int64_t c = 0; c < classes; ++c) m = max(x[c], m);
    for (int64_t c = 0; c < classes; ++c) sum += exp_bounded(x[c] - m);
  }

  // Adds m + log sum exp(x - m) - x of n samples to the row of their label. Where a row ends within a vector, the next
  // one falls into the padding of its sums. In phases, so that one sample's chain of operations hides behind others'.
  static void add_rows(const T* rows, const int64_t* labels, int n, int64_t classes, int64_t row_size,
                       int64_t ignore_index, double* sums) {
    A maxima[together], logs[together];
    for (int l = 0; l < n; l += V::size) {
      V m, sum;
      normalise(rows + l * classes, classes, m, sum);
      store(maxima + l, m);
      store(logs + l, sum);
    }
    for (int l = 0; l < n; l += V::size) store(logs + l, log(load(logs + l)));
    double* counts = sums + classes * row_size;
    for (int l = 0; l < n; ++l) {
      const int64_t label = labels[l];
      if (!math::counts_label(label, classes, ignore_index)) continue;
      for (int64_t c = 0; c < row_size; c += V::size)
        subtract(sums + label * row_size + c, load(rows + l * classes + c) - maxima[l] - logs[l]);
      counts[label] += 1;
    }
  }

  void add_chunk(int64_t chunk, double* sums) const {
    for (int64_t i = 0; i < size; ++i) sums[i] = 0;
    const int64_t end = (chunk + 1) * length < a.samples ? (chunk + 1) * length : a.samples;
    T copy[(together + 1) * max_lanes_classes];
    for (int64_t i = chunk * length; i < end; i += together) {
      const int n = int(end - i < together ? end - i : together);
      const T* rows = logits + i * a.classes;
      // The last rows are read in whole vectors too.
      if (i + together >= a.samples) {
        memset(copy, 0, sizeof copy);
        rows = static_cast<T*>(memcpy(copy, rows, size_t(n * a.classes) * sizeof(T)));
      }
      add_rows(rows, a.labels + i, n, a.classes, width, a.ignore_index, sums);
    }
  }

  void finish(const double* sums) const {
    const double* counts = sums + a.classes * width;
    for (int64_t k = 0; k < a.classes; ++k) {
      for (int64_t j = 0; j < a.classes; ++j) a.sums[k * a.classes + j] += sums[k * width + j];
      a.counts[k] += int64_t(counts[k]);
    }
  }
};

template <class T>
void by_chunk(const ClassConfusion& a) {
  const Chunks<T> chunks{a};
  const int64_t count = (a.samples + chunks.length - 1) / chunks.length;
  const Buffer<double> sums(count * chunks.size);
  parallel_for(count, grain_elements / (chunks.length * a.classes) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) chunks.add_chunk(k, sums.data() + k * chunks.size);
  });
  if (!a.accumulate) {
    memset(a.sums, 0, size_t(a.classes * a.classes) * sizeof(double));
    memset(a.counts, 0, size_t(a.classes) * sizeof(int64_t));
  }
  for (int64_t k = 0; k < count; ++k) chunks.finish(sums.data() + k * chunks.size);
}

}  // namespace

void class_confusion(const ClassConfusion& a) {
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.classes <= max_lanes_classes)
      by_chunk<T>(a);
    else
      by_class<T>(a);
  });
}

}  // namespace lossmeta::LOSSMETA_ISA
