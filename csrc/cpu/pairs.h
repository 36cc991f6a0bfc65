// Distances between all embeddings, and the gradient of a function of them: what the metric-learning losses share.
#pragma once

#include "cpu/buffer.h"
#include "cpu/group.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {

constexpr int64_t pair_grain = 1 << 15;  // multiply-adds below which a thread costs more than it saves

// The embeddings in their accumulation type, each row padded with zeros to whole vectors: a copy where they are not.
template <class A>
struct Embeddings {
  using V = Vec<A>;
  int64_t count, dims, stride;
  Buffer<A> copy;
  const A* rows;       // [count, stride]
  bool finite = true;  // no infinity and no NaN

  template <class T>
  Embeddings(const T* x,  // [count, dims]
             int64_t count, int64_t dims)
      : count(count),
        dims(dims),
        stride((dims + V::size - 1) / V::size * V::size),
        copy(copies<T>() ? count * stride : 0) {
    if constexpr (std::is_same_v<T, A>) rows = x;
    if (copies<T>()) rows = copy.data();
    parallel_for(count, pair_grain / (dims + 1) + 1, [&](int64_t begin, int64_t end) {
      V probe(A(0));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t k = 0; k < dims; k += V::size) {
          const int n = int(dims - k < V::size ? dims - k : V::size);
          const V v = n == V::size ? load(x + i * dims + k) : load_partial(x + i * dims + k, n, A(0));
          if (copies<T>()) store(copy.data() + i * stride + k, v);
          probe += v * A(0);
        }
      if (reduce_add(probe) != A(0)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
  }

  template <class T>
  bool copies() const {
    return !std::is_same_v<T, A> || stride != dims;
  }
  const A* row(int64_t i) const { return rows + i * stride; }

  A distance(int64_t a, int64_t b) const {
    V sum(A(0));
    for (int64_t k = 0; k < stride; k += V::size) {
      const V difference = load(row(a) + k) - load(row(b) + k);
      sum += difference * difference;
    }
    return math::sqrt(reduce_add(sum));
  }
};

// distances[a, b] = |x_a - x_b| of all pairs: computed for half of them, from differences, and mirrored.
template <class A>
void pair_distances(const Embeddings<A>& x,
                    A* distances) {  // [count, count]
  using V = Vec<A>;
  constexpr int rows = vector_bytes == 64 ? 8 : 4, columns = 2 * V::size;
  constexpr int64_t chunk = 256;  // partial sums of so many dimensions bound the rounding error
  const int64_t count = x.count, dims = x.dims, tiles = (count + columns - 1) / columns;
  const int64_t blocks = (count + rows - 1) / rows;
  // Tile t holds the transpose of its rows: lanes run over the second embedding.
  Buffer<A> transposed(tiles * dims * columns);
  parallel_for(tiles, pair_grain / (dims * columns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t k = 0; k < dims; k += V::size)
        for (int64_t j = 0; j < columns; j += V::size) {
          V square[V::size];
          for (int i = 0; i < V::size; ++i) {
            const int64_t b = t * columns + j + i;
            square[i] = b < count ? load(x.row(b) + k) : V(A(0));
          }
          transpose(square);
          for (int i = 0; i < V::size && k + i < dims; ++i)
            store(transposed.data() + (t * dims + k + i) * columns + j, square[i]);
        }
  });

  const auto block = [&](int64_t i) {
    const A* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = x.row(i * rows + r < count ? i * rows + r : count - 1);
    for (int64_t t = i * rows / columns; t < tiles; ++t) {
      const A* tile = transposed.data() + t * dims * columns;
      V total[rows][2];
      for (int r = 0; r < rows; ++r) total[r][0] = total[r][1] = V(A(0));
      for (int64_t first = 0; first < dims; first += chunk) {
        V sum[rows][2];
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = V(A(0));
        const int64_t last = first + chunk < dims ? first + chunk : dims;
        for (int64_t k = first; k < last; ++k) {
          const V low = load(tile + k * columns), high = load(tile + k * columns + V::size);
          for (int r = 0; r < rows; ++r) {
            const V v(row[r][k]), d0 = v - low, d1 = v - high;
            sum[r][0] += d0 * d0;
            sum[r][1] += d1 * d1;
          }
        }
        for (int r = 0; r < rows; ++r) total[r][0] += sum[r][0], total[r][1] += sum[r][1];
      }
      for (int r = 0; r < rows && i * rows + r < count; ++r)
        for (int half = 0; half < 2; ++half) {
          const int64_t b = t * columns + half * V::size;
          A* out = distances + (i * rows + r) * count + b;
          const V d = sqrt(total[r][half]);
          if (b + V::size <= count)
            store(out, d);
          else if (b < count)
            store_partial(out, d, int(count - b));
        }
    }
  };
  // The last blocks have the fewest columns: each goes with one of the first.
  parallel_for((blocks + 1) / 2, pair_grain / (rows * count * (dims + 1) + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   block(i);
                   if (blocks - 1 - i != i) block(blocks - 1 - i);
                 }
               });
  // What lies to the left of a block's first tile was computed as its mirror image.
  parallel_for((count + V::size - 1) / V::size, pair_grain / (V::size * count + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t a = begin * V::size; a < end * V::size && a < count; a += V::size) {
                   const int n = int(count - a < V::size ? count - a : V::size);
                   for (int64_t b = 0; b < a / columns * columns; b += V::size) {
                     V square[V::size];
                     for (int i = 0; i < V::size; ++i)
                       square[i] = load_partial(distances + (b + i) * count + a, n, A(0));
                     transpose(square);
                     for (int i = 0; i < n; ++i) store(distances + (a + i) * count + b, square[i]);
                   }
                 }
               });
}

constexpr int gradient_rows = vector_bytes == 64 ? 4 : 2;

// grad[r] = sum over b of weights[r, b] (x_(first + r) - x_b), in dimensions k to k + vectors * V::size.
template <int vectors, class A, class T>
void weighted_differences(const Embeddings<A>& x, int64_t first, int used, int64_t k,
                          const A* weights,  // [gradient_rows, count]
                          T* grad) {         // [used, dims]
  using V = Vec<A>;
  V own[gradient_rows][vectors], sum[gradient_rows][vectors];
  for (int r = 0; r < gradient_rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      own[r][v] = load(x.row(first + (r < used ? r : 0)) + k + v * V::size);
      sum[r][v] = V(A(0));
    }
  for (int64_t b = 0; b < x.count; ++b) {
    V other[vectors];
    for (int v = 0; v < vectors; ++v) other[v] = load(x.row(b) + k + v * V::size);
    for (int r = 0; r < gradient_rows; ++r) {
      const V w(weights[r * x.count + b]);
      for (int v = 0; v < vectors; ++v) sum[r][v] += w * (own[r][v] - other[v]);
    }
  }
  for (int r = 0; r < used; ++r)
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = k + v * V::size, n = x.dims - at;
      if (n >= V::size)
        store(grad + r * x.dims + at, sum[r][v]);
      else if (n > 0)
        store_partial(grad + r * x.dims + at, sum[r][v], int(n));
    }
}

// The same for one row, leaving out zero weights: 0 (x - infinity) would be NaN.
template <class A, class T>
void sparse_weighted_differences(const Embeddings<A>& x, int64_t row,
                                 const A* weights,  // [count]
                                 T* grad) {         // [dims]
  using V = Vec<A>;
  for (int64_t k = 0; k < x.dims; k += V::size) {
    V sum(A(0));
    for (int64_t b = 0; b < x.count; ++b)
      if (weights[b] != A(0)) sum += weights[b] * (load(x.row(row) + k) - load(x.row(b) + k));
    store_partial(grad + k, sum, int(x.dims - k < V::size ? x.dims - k : V::size));
  }
}

// grad[a] = sum over b of w[a, b] (x_a - x_b). fill(first, rows, w) writes rows [first, first + rows) of the symmetric
// weights to w [rows, count].
template <class A, class T, class Fill>
void pair_gradient(const Embeddings<A>& x,
                   T* grad,  // [count, dims]
                   const Fill& fill) {
  using V = Vec<A>;
  const int64_t count = x.count, blocks = (count + gradient_rows - 1) / gradient_rows;
  const int64_t workers = blocks < 64 ? blocks : 64;  // each with weights of its own
  Buffer<A> scratch(workers * gradient_rows * count);
  parallel_for(workers, pair_grain * workers / (count * count * (x.dims + 1) + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t worker = begin; worker < end; ++worker) {
                   A* weights = scratch.data() + worker * gradient_rows * count;
                   for (int64_t i = blocks * worker / workers; i < blocks * (worker + 1) / workers; ++i) {
                     const int64_t first = i * gradient_rows;
                     const int used = int(count - first < gradient_rows ? count - first : gradient_rows);
                     fill(first, used, weights);
                     for (int64_t j = used * count; j < gradient_rows * count; ++j) weights[j] = A(0);
                     T* out = grad + first * x.dims;
                     if (!x.finite) {
                       for (int r = 0; r < used; ++r)
                         sparse_weighted_differences(x, first + r, weights + r * count, out + r * x.dims);
                       continue;
                     }
                     int64_t k = 0;
                     for (; k + 2 * V::size <= x.stride; k += 2 * V::size)
                       weighted_differences<2>(x, first, used, k, weights, out);
                     if (k < x.stride) weighted_differences<1>(x, first, used, k, weights, out);
                   }
                 }
               });
}

// The same for weights pull[a, b] + pull[b, a].
template <class A, class T>
void pull_gradient(const Embeddings<A>& x,
                   const A* pull,  // [count, count]
                   T* grad) {      // [count, dims]
  const int64_t count = x.count;
  pair_gradient(x, grad, [&](int64_t first, int rows, A* weights) {
    for (int r = 0; r < rows; ++r)
      for (int64_t b = 0; b < count; ++b) weights[r * count + b] = pull[(first + r) * count + b];
    for (int64_t b = 0; b < count; ++b)
      for (int r = 0; r < rows; ++r) weights[r * count + b] += pull[b * count + first + r];
  });
}

// Embeddings of one class, and the class of each as a floating-point number that lanes can compare.
template <class A>
struct Classes {
  Buffer<int64_t> first;  // the first embedding of the same label stands for it
  Buffer<A> id;
  Groups members;

  Classes(const int64_t* labels,  // [count]
          int64_t count)
      : first(count), id(count), members(find_first(labels, count, first.data()), count, count) {
    for (int64_t i = 0; i < count; ++i) id[i] = A(first[i]);
  }
  int64_t size(int64_t i) const { return members.offsets[first[i] + 1] - members.offsets[first[i]]; }

  static const int64_t* find_first(const int64_t* labels, int64_t count, int64_t* first) {
    parallel_for(count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t j = 0;
        while (labels[j] != labels[i]) ++j;
        first[i] = j;
      }
    });
    return first;
  }

  // f(others, n) for the other members of row's class, up to a vector of them at a time.
  template <class F>
  void for_each_positive(int64_t row, const F& f) const {
    int64_t others[Vec<A>::size];
    int n = 0;
    for (int64_t o = members.offsets[first[row]]; o < members.offsets[first[row] + 1]; ++o) {
      if (members.order[o] != row) others[n++] = members.order[o];
      if (n == Vec<A>::size) f(others, n), n = 0;
    }
    if (n) f(others, n);
  }
};

template <class A>
LOSSMETA_SIMD Vec<A> load_indexed(const A* values, const int64_t* indices, int n, A fill) {
  A buffer[Vec<A>::size];
  for (int i = 0; i < Vec<A>::size; ++i) buffer[i] = i < n ? values[indices[i]] : fill;
  return load(buffer);
}

}  // namespace lossmeta::LOSSMETA_ISA
