// Distances between all embeddings, and the gradient of a function of them: what the metric-learning losses share.
#pragma once

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {

constexpr int64_t pair_grain = 1 << 15;  // multiply-adds below which a thread costs more than it saves

// The embeddings in their accumulation type, each row padded with zeros to whole vectors.
template <class A>
struct Embeddings {
  using V = Vec<A>;
  int64_t count, dims, stride;
  Buffer<A> rows;       // [count, stride]
  bool finite = true;   // no infinity and no NaN

  template <class T>
  Embeddings(const T* x,  // [count, dims]
             int64_t count, int64_t dims)
      : count(count), dims(dims), stride((dims + V::size - 1) / V::size * V::size), rows(count * stride) {
    parallel_for(count, pair_grain / (dims + 1) + 1, [&](int64_t begin, int64_t end) {
      V probe(A(0));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t k = 0; k < dims; k += V::size) {
          const int n = int(dims - k < V::size ? dims - k : V::size);
          const V v = n == V::size ? load(x + i * dims + k) : load_partial(x + i * dims + k, n, A(0));
          store(rows.data() + i * stride + k, v);
          probe += v * A(0);
        }
      if (reduce_add(probe) != A(0)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
  }

  const A* row(int64_t i) const { return rows.data() + i * stride; }

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
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t b = t * columns + j;
        A* out = transposed.data() + t * dims * columns + j;
        for (int64_t k = 0; k < dims; ++k) out[k * columns] = b < count ? x.row(b)[k] : A(0);
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
          if (b + V::size <= count) store(out, d);
          else if (b < count) store_partial(out, d, int(count - b));
        }
    }
  };
  // The last blocks have the fewest columns: each goes with one of the first.
  parallel_for((blocks + 1) / 2, pair_grain / (rows * count * (dims + 1) + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block(i);
      if (blocks - 1 - i != i) block(blocks - 1 - i);
    }
  });
  parallel_for(blocks, pair_grain / (rows * count) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int used = int(count - i * rows < rows ? count - i * rows : rows);
      for (int64_t b = 0; b < i * rows / columns * columns; ++b)
        for (int r = 0; r < used; ++r) distances[(i * rows + r) * count + b] = distances[b * count + i * rows + r];
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
      if (n >= V::size) store(grad + r * x.dims + at, sum[r][v]);
      else if (n > 0) store_partial(grad + r * x.dims + at, sum[r][v], int(n));
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
  parallel_for(workers, pair_grain * workers / (count * count * (x.dims + 1) + 1) + 1, [&](int64_t begin, int64_t end) {
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
        for (; k + 2 * V::size <= x.stride; k += 2 * V::size) weighted_differences<2>(x, first, used, k, weights, out);
        if (k < x.stride) weighted_differences<1>(x, first, used, k, weights, out);
      }
    }
  });
}

}  // namespace lossmeta::LOSSMETA_ISA
