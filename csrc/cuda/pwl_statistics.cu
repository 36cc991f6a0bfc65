#include "math/pwl_statistics.h"

#include "cuda/launch.h"

namespace lossmeta::cuda {
namespace {

constexpr int warp = 32;
constexpr int quad = int(pwl_group_size);         // lanes that share sums, one quantity of a group each
constexpr int64_t shared_bytes_most = 48 * 1024;  // what a launch may ask for without opting in
constexpr int slices = 32;                        // of the blocks, in their reduction
constexpr int finish_threads = 1024;

// A block is one warp, and `quads` of its quads have sums of their own: no two threads ever add to the same
// number, so there are no atomics and the order of the additions is fixed. Blocks take contiguous shares of
// the parameters and blockIdx.y the groups. Where the sums of even one quad exceed shared memory they are
// kept in `partial`.
template <class T>
__global__ void __launch_bounds__(warp)
    sums_kernel(const T* theta,                // [P]
                const T* gradients,            // [R, P]
                const accumulate_t<T>* knots,  // [X]
                double* partial,               // [blocks, groups, cells, 4]
                int64_t parameters, int64_t knots_count, int64_t gradients_count, int quads, bool in_shared) {
  using A = accumulate_t<T>;
  LOSSMETA_DYNAMIC_SHARED(double, shared);  // [quads, cells, 4]
  const int64_t cells = math::pwl_cells(knots_count), size = cells * quad;
  const int64_t quantity = int64_t(blockIdx.y) * quad + threadIdx.x % quad;
  double* result = partial + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * size;
  double* bins = in_shared ? shared : result;
  for (int64_t i = threadIdx.x; i < quads * size; i += warp) bins[i] = 0;
  __syncwarp();

  const T* source = quantity == 1 ? theta
                    : quantity >= 2 && quantity - 2 < gradients_count
                        ? gradients + (quantity - 2) * parameters
                        : nullptr;
  const int64_t share = (parameters + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int64_t end = begin + share < parameters ? begin + share : parameters;
  const int lane = int(threadIdx.x) % quad, row = int(threadIdx.x) / quad;
  double* mine = bins + row * size + lane;
  for (int64_t base = begin; base < end; base += quads * quad) {
    // Each lane finds the cell of one parameter; its quad then adds the four, one after another.
    const int64_t p = base + threadIdx.x;
    const bool works = row < quads;
    int64_t cell = 0;
    if (works && p < end) cell = math::pwl_cell(knots, knots_count, math::load(theta + p));
    for (int e = 0; e < quad; ++e) {
      const int64_t at = base + row * quad + e;
      const int64_t target = __shfl_sync(0xffffffffu, (long long)cell, e, quad);
      if (works && at < end && (source || quantity == 0))
        mine[target * quad] += source ? double(A(math::load(source + at))) : 1.0;
    }
  }
  __syncwarp();
  if (!in_shared) return;
  for (int64_t i = threadIdx.x; i < size; i += warp) {
    double sum = 0;
    for (int q = 0; q < quads; ++q) sum += shared[q * size + i];
    result[i] = sum;
  }
}

// total[i] = sum over the blocks of partial[block, i]: one slice of the blocks after another, then over the
// slices.
__global__ void __launch_bounds__(warp* slices) total_kernel(const double* partial,  // [blocks, size]
                                                             double* total,          // [size]
                                                             int64_t blocks, int64_t size) {
  __shared__ double shared[slices][warp];
  const int64_t i = int64_t(blockIdx.x) * warp + threadIdx.x;
  double sum = 0;
  if (i < size)
    for (int64_t b = threadIdx.y; b < blocks; b += slices) sum += partial[b * size + i];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
  for (int s = 1; s < slices; ++s) sum += shared[s][threadIdx.x];
  total[i] = sum;
}

template <class A>
__global__ void __launch_bounds__(finish_threads)
    finish_kernel(PwlStatistics s, const double* total,  // [groups, cells, 4]
                  double* above) {                       // [cells]
  const int64_t x = s.knots_count, cells = math::pwl_cells(x);
  if (threadIdx.x == 0) {
    above[2 * x + 1] = 0;
    for (int64_t c = 2 * x; c >= 0; --c) above[c] = above[c + 1] + total[c * quad];
  }
  __syncthreads();
  for (int64_t q = 1 + threadIdx.x; q < 2 + s.gradients_count; q += blockDim.x)
    math::pwl_column(
        s, q, above, static_cast<const A*>(s.knots),
        [&](int64_t cell) { return total[(q / quad * cells + cell) * quad + q % quad]; },
        total[(2 * x + 1) * quad] > 0);
  for (int64_t i = threadIdx.x; i < 4 * x * x; i += blockDim.x)
    s.gram[i] = math::pwl_gram(above, x, i / (2 * x), i % (2 * x));
}

template <class T>
void launch(const PwlStatistics& s, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t blocks = math::pwl_blocks(s), groups = math::pwl_groups(s.gradients_count);
  const int64_t size = math::pwl_cells(s.knots_count) * quad, bytes = size * int64_t(sizeof(double));
  const bool in_shared = bytes <= shared_bytes_most;
  int quads = in_shared ? warp / quad : 1;
  while (quads > 1 && quads * bytes > shared_bytes_most) quads /= 2;
  double* total = s.scratch + blocks * groups * size;
  double* above = total + groups * size;
  LOSSMETA_LAUNCH(sums_kernel<T>, dim3(unsigned(blocks), unsigned(groups)), warp,
                  in_shared ? quads * bytes : 0, stream, static_cast<const T*>(s.theta),
                  static_cast<const T*>(s.gradients), static_cast<const A*>(s.knots), s.scratch, s.parameters,
                  s.knots_count, s.gradients_count, quads, in_shared);
  LOSSMETA_LAUNCH(total_kernel, unsigned((groups * size + warp - 1) / warp), dim3(warp, slices), 0, stream,
                  s.scratch, total, blocks, groups * size);
  LOSSMETA_LAUNCH(finish_kernel<A>, 1, finish_threads, 0, stream, s, total, above);
}

}  // namespace

void pwl_statistics(const PwlStatistics& s, cudaStream_t stream) {
  if (s.knots_count == 0) return;
  visit_dtype(s.dtype, [&](auto tag) { launch<typename decltype(tag)::type>(s, stream); });
}

}  // namespace lossmeta::cuda
