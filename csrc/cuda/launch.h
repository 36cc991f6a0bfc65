// Lets nvcc compile a kernel file for the GPU, and with -DLOSSMETA_SIMT a C++ compiler for tests.
#pragma once

#ifdef LOSSMETA_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

// One symbol of one type for all kernels of a file: `extern __shared__` arrays of other types would clash.
extern __shared__ __align__(16) unsigned char lossmeta_dynamic_shared[];

// LOSSMETA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
// A template-id that contains commas goes in parentheses: LOSSMETA_LAUNCH((kernel<float, 256>), ...).
#define LOSSMETA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

// Inside a kernel: `T* name` is its dynamic shared memory.
#define LOSSMETA_DYNAMIC_SHARED(T, name)                                       \
  static_assert(alignof(T) <= 16, "dynamic shared memory is 16-byte aligned"); \
  T* const name = reinterpret_cast<T*>(lossmeta_dynamic_shared)
