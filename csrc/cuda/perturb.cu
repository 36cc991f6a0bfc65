#include "math/perturb.h"

#include "cuda/launch.h"

namespace lossmeta::cuda {
namespace {

constexpr int threads = 256;
constexpr int staged = 64;  // directions whose coefficients are in shared memory at a time

template <class T, int width>
struct alignas(width * sizeof(T)) Pack {
  T lane[width];
};

// A thread computes `width` neighbouring parameters of all points, `rows` points at a time: for up to that
// many, base and directions are read once.
template <class T, int width, int rows>
__global__ void __launch_bounds__(threads)
    perturb_kernel(const T* base,                        // [P]
                   const T* directions,                  // [K, P]
                   const accumulate_t<T>* coefficients,  // [B, K]
                   T* out,                               // [B, P]
                   int64_t points, int64_t directions_count, int64_t parameters, int64_t out_stride) {
  using A = accumulate_t<T>;
  using P = Pack<T, width>;
  __shared__ A shared[rows * staged];
  const int64_t p = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  const bool inside = p < parameters;
  P theta{};
  if (inside) theta = *reinterpret_cast<const P*>(base + p);
  for (int64_t first = 0; first < points; first += rows) {
    A sum[rows][width];
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < width; ++i) sum[r][i] = math::load(&theta.lane[i]);
    for (int64_t start = 0; start < directions_count; start += staged) {
      const int count = int(directions_count - start < staged ? directions_count - start : staged);
      __syncthreads();
      for (int c = threadIdx.x; c < rows * count; c += threads) {
        const int64_t point = first + c / count;
        shared[c / count * staged + c % count] =
            point < points ? coefficients[point * directions_count + start + c % count] : A(0);
      }
      __syncthreads();
      for (int k = 0; inside && k < count; ++k) {
        const P delta = *reinterpret_cast<const P*>(directions + (start + k) * parameters + p);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const A d = math::load(&delta.lane[i]);
#pragma unroll
          for (int r = 0; r < rows; ++r) sum[r][i] += shared[r * staged + k] * d;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!inside || first + r >= points) continue;
      P result;
#pragma unroll
      for (int i = 0; i < width; ++i) math::store(&result.lane[i], sum[r][i]);
      *reinterpret_cast<P*>(out + (first + r) * out_stride + p) = result;
    }
  }
}

template <class T, int width>
void launch(const Perturb& a, cudaStream_t stream) {
  using A = accumulate_t<T>;
  constexpr int rows = 64 / width < 16 ? 64 / width : 16;
  const int64_t blocks = (a.parameters + threads * width - 1) / (threads * width);
  if (blocks == 0 || a.points == 0) return;
  LOSSMETA_LAUNCH((perturb_kernel<T, width, rows>), unsigned(blocks), threads, 0, stream,
                  static_cast<const T*>(a.base), static_cast<const T*>(a.directions),
                  static_cast<const A*>(a.coefficients), static_cast<T*>(a.out), a.points, a.directions_count,
                  a.parameters, a.out_stride);
}

// Whether every row that a kernel touches begins at 16 bytes.
bool aligned(const Perturb& a, int64_t element_bytes) {
  const auto starts = uintptr_t(a.base) | uintptr_t(a.directions) | uintptr_t(a.out);
  return starts % 16 == 0 && a.parameters * element_bytes % 16 == 0 && a.out_stride * element_bytes % 16 == 0;
}

}  // namespace

void perturb(const Perturb& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (aligned(a, sizeof(T)))
      launch<T, 16 / sizeof(T)>(a, stream);
    else
      launch<T, 1>(a, stream);
  });
}

}  // namespace lossmeta::cuda
