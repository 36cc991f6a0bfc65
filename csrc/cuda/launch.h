// Lets nvcc compile a kernel file for the GPU, and with -DLOSSMETA_SIMT a C++ compiler for tests.
#pragma once

#include <stdexcept>
#include <utility>

#ifdef LOSSMETA_SIMT
#include "simt.h"
#define LOSSMETA_START(kernel, ...) simt::launch(#kernel, kernel, __VA_ARGS__)
#else
#include <cuda_runtime.h>

// One symbol of one type for all kernels of a file: `extern __shared__` arrays of other types would clash.
extern __shared__ __align__(16) unsigned char lossmeta_dynamic_shared[];

namespace lossmeta::cuda {

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  cudaStream_t stream, Arguments&&... arguments) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace lossmeta::cuda
#define LOSSMETA_START(...) ::lossmeta::cuda::start(__VA_ARGS__)
#endif

namespace lossmeta::cuda {

// Throws what a launch or another call of the runtime answered. Its own answer, not cudaGetLastError(): there may lie
// the error of another library. A launch answers at once, without waiting for the kernel.
inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it: reported once
  throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace lossmeta::cuda

// LOSSMETA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
// A template-id that contains commas goes in parentheses: LOSSMETA_LAUNCH((kernel<float, 256>), ...).
#define LOSSMETA_LAUNCH(...) ::lossmeta::cuda::check_cuda(LOSSMETA_START(__VA_ARGS__))

// Inside a kernel: `T* name` is its dynamic shared memory.
#define LOSSMETA_DYNAMIC_SHARED(T, name)                                       \
  static_assert(alignof(T) <= 16, "dynamic shared memory is 16-byte aligned"); \
  T* const name = reinterpret_cast<T*>(lossmeta_dynamic_shared)
