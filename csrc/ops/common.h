// What every operator file shares: argument checks, allocation, the choice of kernel and its registration. The same
// file is compiled into lossmeta._core for the CPU and into the CUDA library for the GPU (LOSSMETA_BACKEND).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "base/kernel.h"

namespace lossmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Part of a message. No streams: they need the locale of the C++ library that happens to be loaded, and a library built
// by another compiler than that one was seen to crash there.
template <class T>
std::string text(const T& part) {
  if constexpr (std::is_integral_v<T>) {
    return std::to_string(part);
  } else if constexpr (std::is_floating_point_v<T>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(part));
    return digits;
  } else {
    return part;
  }
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text(parts)));
}

// The message is put together only when the check fails.
#define LOSSMETA_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::lossmeta::fail(__VA_ARGS__); \
  } while (0)

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// In words.
inline std::string shape(const Tensor& t) {
  std::string words = "[";
  for (int64_t d = 0; d < t.dim(); ++d) words += (d ? ", " : "") + std::to_string(t.size(d));
  return words + ']';
}

inline std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "dtype number " + std::to_string(int(t.scalar_type()));
  }
}

// The kernel's name for the dtype of a floating-point argument.
inline DType float_dtype(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: fail(op, ": ", argument, " must be float32, float64, bfloat16 or float16, got ", dtype_name(t));
  }
}

// Half precision is accumulated and returned in float32.
inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

// As torch writes it, e.g. cuda:1.
inline std::string device_name(const Tensor& t) {
  using torch::headeronly::DeviceType;
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  switch (DeviceType(type)) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return "cuda:" + std::to_string(t.get_device_index());
    case DeviceType::Meta: return "meta";
    default: return "device type " + std::to_string(type) + ":" + std::to_string(t.get_device_index());
  }
}

inline void check_same_device(const Tensor& t, const Tensor& reference, const char* op, const char* argument,
                              const char* reference_argument) {
  int32_t a = 0, b = 0;
  aoti_torch_get_device_type(t.get(), &a);
  aoti_torch_get_device_type(reference.get(), &b);
  LOSSMETA_CHECK(a == b && t.get_device_index() == reference.get_device_index(), op, ": ", argument, " and ",
                 reference_argument, " must be on the same device, got ", device_name(t), " and ",
                 device_name(reference), "; move one with .to()");
}

// Of an expanded tensor several elements are one place in memory.
inline void check_writable(const Tensor& t, const char* op, const char* argument) {
  for (int64_t d = 0; d < t.dim(); ++d)
    LOSSMETA_CHECK(t.size(d) < 2 || t.stride(d) != 0, op, ": ", argument,
                   " is written in place and must not be expanded, got stride 0 in dimension ", d,
                   "; pass a .clone()");
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t` as a contiguous tensor of `dtype`; itself where it is one already.
inline Tensor packed_as(const Tensor& t, ScalarType dtype) {
  return packed(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// An uninitialised contiguous tensor on the device of `like`. Straight to the allocator: a call through the dispatcher
// costs a microsecond more.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, device_index, &handle) != 0)
    fail("out of memory: could not allocate ", stride, " elements");
  Tensor result(handle);
#if defined(__linux__) && !defined(LOSSMETA_BACKEND_CUDA)
  // Fresh memory comes page by page, at a microsecond each, which would cost more than the kernel that fills it.
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(result.data_ptr()) + page - 1) / page * page;
  const int64_t bytes = stride * int64_t(result.element_size());
  if (bytes >= (4 << 20)) madvise(reinterpret_cast<void*>(begin), size_t(bytes) - page, MADV_HUGEPAGE);
#endif
  return result;
}

// Whether some index lies outside [0, size). Without a branch or a comparison: one of the two terms has its sign bit set.
// Every call looks at all its indices.
inline bool any_outside(const int64_t* indices,  // [count]
                        int64_t count, int64_t size) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i)
    signs |= uint64_t(indices[i]) | (uint64_t(size) - 1 - uint64_t(indices[i]));
  return signs >> 63;
}

// Labels in [0, classes) or equal to ignore_index; the first that is neither is named. On CUDA looking would
// synchronise: there the kernels guard themselves (lossmeta.ops.debug() makes the same check).
inline void check_labels(const int64_t* labels,  // [count]
                         int64_t count, int64_t classes, int64_t ignore_index, const char* op) {
#ifndef LOSSMETA_BACKEND_CUDA
  if (!any_outside(labels, count, classes)) return;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t label = labels[i];
    LOSSMETA_CHECK((label >= 0 && label < classes) || label == ignore_index, op, ": labels must lie in [0, ",
                   classes, "), got ", label, " at index ", i);
  }
#else
  (void)labels, (void)count, (void)classes, (void)ignore_index, (void)op;
#endif
}

#ifdef LOSSMETA_BACKEND_CUDA
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != 0) fail("no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// f() on the device of `tensor`. What CUDA answers to a launch that fails becomes the operator's error.
template <class F>
auto on_device(const char* op, const Tensor& tensor, const F& f) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  try {
    return f();
  } catch (const std::runtime_error& error) {
    fail(op, ": CUDA launch failed: ", error.what());
  }
}
// Runs the kernel of the operator `op` on the device and current stream of `tensor`.
#define LOSSMETA_RUN(name, arguments, tensor) \
  ::lossmeta::on_device(                      \
      op, tensor, [&] { return ::lossmeta::cuda::name(arguments, ::lossmeta::current_stream(tensor)); })
#else
#define LOSSMETA_RUN(name, arguments, tensor) ::lossmeta::cpu::name(arguments)
#endif

// Schemas are defined once, by the CPU library; both libraries register their kernels.
#ifdef LOSSMETA_BACKEND_CUDA
#define LOSSMETA_DEFINE(m)                                     \
  [[maybe_unused]] static void C10_CONCATENATE(unused_schema_, \
                                               __LINE__)(torch::stable::detail::StableLibrary & m)
#else
#define LOSSMETA_DEFINE(m) STABLE_TORCH_LIBRARY_FRAGMENT(lossmeta, m)
#endif
#define LOSSMETA_IMPLEMENT_(backend, m) STABLE_TORCH_LIBRARY_IMPL(lossmeta, backend, m)
#define LOSSMETA_IMPLEMENT(m) LOSSMETA_IMPLEMENT_EXPAND(LOSSMETA_BACKEND, m)
#define LOSSMETA_IMPLEMENT_EXPAND(backend, m) LOSSMETA_IMPLEMENT_(backend, m)

}  // namespace lossmeta
