// Distances between all embeddings, and the gradient of a function of them: the kernels that the metric-learning losses
// share.
#pragma once

#include "base/dtype.h"
#include "cuda/launch.h"

namespace lossmeta::cuda {
namespace {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

template <class A>
__device__ A warp_sum(A value) {
  for (int offset = warp_size / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(all_lanes, value, offset);
  return value;
}

// Sums of each of `values` over the block, in a fixed order, left with every thread.
template <int threads, int n, class A>
__device__ void block_sum(A (&values)[n]) {
  __shared__ A shared[threads / warp_size][n];
  __syncthreads();  // what an earlier call left has been read
  for (int i = 0; i < n; ++i) {
    const A sum = warp_sum(values[i]);
    if (threadIdx.x % warp_size == 0) shared[threadIdx.x / warp_size][i] = sum;
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    values[i] = A(0);
    for (int w = 0; w < threads / warp_size; ++w) values[i] += shared[w][i];
  }
}

// ---- distances[a, b] = |x_a - x_b|, from differences: a tile of pairs per block, each computed once and mirrored.

constexpr int tile = 32, tile_dims = 32, tile_threads = 256;

template <class T>
__global__ void __launch_bounds__(tile_threads)
    pair_distances_kernel(const T* x,                  // [count, dims]
                          accumulate_t<T>* distances,  // [count, count]
                          int64_t count, int64_t dims) {
  using A = accumulate_t<T>;
  __shared__ A rows[tile][tile_dims + 1], columns[tile][tile_dims + 1];
  if (blockIdx.x < blockIdx.y) return;
  const int64_t first_row = int64_t(blockIdx.y) * tile, first_column = int64_t(blockIdx.x) * tile;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  A total[2][2] = {};
  for (int64_t start = 0; start < dims; start += tile_dims) {
    for (int i = threadIdx.x; i < tile * tile_dims; i += tile_threads) {
      const int r = i / tile_dims, k = i % tile_dims;
      const int64_t row = first_row + r, column = first_column + r;
      rows[r][k] = row < count && start + k < dims ? math::load(x + row * dims + start + k) : A(0);
      columns[r][k] = column < count && start + k < dims ? math::load(x + column * dims + start + k) : A(0);
    }
    __syncthreads();
    A sum[2][2] = {};  // partial sums bound the rounding error
    for (int k = 0; k < tile_dims; ++k)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
          const A difference = rows[ty + 16 * i][k] - columns[tx + 16 * j][k];
          sum[i][j] += difference * difference;
        }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) total[i][j] += sum[i][j];
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const int64_t row = first_row + ty + 16 * i, column = first_column + tx + 16 * j;
      if (row >= count || column >= count) continue;
      const A d = math::sqrt(total[i][j]);
      distances[row * count + column] = d;
      if (blockIdx.x != blockIdx.y) distances[column * count + row] = d;
    }
}

template <class T>
void launch_pair_distances(const T* x, accumulate_t<T>* distances, int64_t count, int64_t dims,
                           cudaStream_t stream) {
  if (count == 0) return;
  const unsigned tiles = unsigned((count + tile - 1) / tile);
  LOSSMETA_LAUNCH(pair_distances_kernel<T>, dim3(tiles, tiles), tile_threads, 0, stream, x, distances, count,
                  dims);
}

// ---- grad[a] = sum over b of w(a, b) (x_a - x_b). A block has a few rows; its warps divide the others among them.

constexpr int gradient_rows = 4, gradient_others = 64, gradient_threads = gradient_rows * gradient_others;
constexpr int gradient_warps = gradient_threads / warp_size;
constexpr int lane_dims = 4, block_dims = lane_dims * warp_size;  // dimensions of a block

// Pair is a function object: pair(a, b, sums) returns the symmetric weight w(a, b) and adds what pair (a, b) contributes
// to Pair::sums sums, which are written for each block to partial [blocks, Pair::sums] unless that is null.
template <class T, class Pair>
__global__ void __launch_bounds__(gradient_threads)
    pair_gradient_kernel(const T* x,  // [count, dims]
                         T* grad,     // [count, dims] or null
                         accumulate_t<T>* partial, int64_t count, int64_t dims, Pair pair) {
  using A = accumulate_t<T>;
  __shared__ A weights[gradient_rows][gradient_others];
  __shared__ A parts[gradient_warps][gradient_rows][block_dims];
  const int64_t first = int64_t(blockIdx.x) * gradient_rows, first_dim = int64_t(blockIdx.y) * block_dims;
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  A own[gradient_rows][lane_dims], sum[gradient_rows][lane_dims];
  for (int r = 0; r < gradient_rows; ++r)
    for (int j = 0; j < lane_dims; ++j) {
      const int64_t k = first_dim + lane + j * warp_size;
      own[r][j] = first + r < count && k < dims ? math::load(x + (first + r) * dims + k) : A(0);
      sum[r][j] = A(0);
    }
  A sums[Pair::sums] = {};
  for (int64_t start = 0; start < count; start += gradient_others) {
    const int r = threadIdx.x / gradient_others, o = threadIdx.x % gradient_others;
    weights[r][o] = first + r < count && start + o < count ? pair(first + r, start + o, sums) : A(0);
    __syncthreads();
    if (grad)
      for (int i = warp; i < gradient_others && start + i < count; i += gradient_warps) {
        A other[lane_dims];
        for (int j = 0; j < lane_dims; ++j) {
          const int64_t k = first_dim + lane + j * warp_size;
          other[j] = k < dims ? math::load(x + (start + i) * dims + k) : A(0);
        }
        for (int row = 0; row < gradient_rows; ++row) {
          const A w = weights[row][i];
          if (w == A(0)) continue;  // 0 times an infinite difference would be NaN
          for (int j = 0; j < lane_dims; ++j) sum[row][j] += w * (own[row][j] - other[j]);
        }
      }
    __syncthreads();
  }
  if (grad) {
    for (int row = 0; row < gradient_rows; ++row)
      for (int j = 0; j < lane_dims; ++j) parts[warp][row][lane + j * warp_size] = sum[row][j];
    __syncthreads();
    for (int i = threadIdx.x; i < gradient_rows * block_dims; i += gradient_threads) {
      const int row = i / block_dims, k = i % block_dims;
      A total = A(0);
      for (int w = 0; w < gradient_warps; ++w) total += parts[w][row][k];
      if (first + row < count && first_dim + k < dims)
        math::store(grad + (first + row) * dims + first_dim + k, total);
    }
  }
  if (partial && blockIdx.y == 0) {
    block_sum<gradient_threads>(sums);
    if (threadIdx.x == 0)
      for (int i = 0; i < Pair::sums; ++i) partial[int64_t(blockIdx.x) * Pair::sums + i] = sums[i];
  }
}

template <class T, class Pair>
void launch_pair_gradient(const T* x, T* grad, accumulate_t<T>* partial, int64_t count, int64_t dims,
                          const Pair& pair, cudaStream_t stream) {
  const unsigned blocks = unsigned((count + gradient_rows - 1) / gradient_rows);
  // The sums are wanted even of embeddings without dimensions.
  const unsigned parts = grad && dims > 0 ? unsigned((dims + block_dims - 1) / block_dims) : 1;
  if (blocks == 0) return;
  LOSSMETA_LAUNCH((pair_gradient_kernel<T, Pair>), dim3(blocks, parts), gradient_threads, 0, stream, x, grad,
                  partial, count, dims, pair);
}

}  // namespace
}  // namespace lossmeta::cuda
