// CUDA's names for kernel source that runs on the CPU: one fiber per thread of a block, blocks one after
// another, all on one OS thread.
//
// A fiber runs until it synchronises or does an atomic; which fiber runs next, and which block, is drawn from
// a seed (simt::set_seed), so a missing barrier shows as a result that changes with the seed. Not shown: a
// plain `x += 1` by many threads (nothing interrupts a fiber between its load and its store), and weak memory
// ordering. Blocks cannot wait for one another.
// A block that cannot go on (divergent barrier, absent lanes) is described on stderr, and the process aborts. A launch
// that the hardware would refuse answers with an error, as there.
//
// What the hardware leaves undefined is all ones (NaN, -1): dynamic shared memory at the start of a block,
// and what a shuffle reads from a lane that takes no part. `__shared__` variables are `static`: they start as
// zeros and keep what the block before left. __activemask() names the calling lane alone, the least that CUDA
// promises. As in CUDA, lanes that returned or do not exist are not waited for even if a mask names them.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "simt_machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __noinline__  // not an attribute: the standard library spells one with this very name
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

namespace simt {

// Smaller integers are promoted to int, as by CUDA's overloads.
template <class T>
auto shuffle(Operation operation, unsigned mask, T value, unsigned operand, int width) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles take arithmetic types of up to 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s: width must be a power of two up to 32, got %d", operation_names[operation], width);
  unsigned lane = running_thread(operation).linear % 32, source = lane;
  unsigned first = lane & ~unsigned(width - 1), last = first + unsigned(width) - 1;
  if (operation == shfl) source = first + operand % unsigned(width);
  if (operation == shfl_up && operand <= lane - first) source = lane - operand;
  if (operation == shfl_down && operand <= last - lane) source = lane + operand;
  if (operation == shfl_xor && (lane ^ operand) <= last) source = lane ^ operand;  // or in an earlier segment
  std::conditional_t<sizeof(T) < 4, int, T> word = value;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &word, sizeof word);
  bits = meet_in_warp(operation, mask, bits, source);
  std::memcpy(&word, &bits, sizeof word);
  return word;
}

template <class T>
using Value = std::common_type_t<T>;  // T, but takes no part in deduction

// The result of CUDA's min(A, B): both floating, or integers that have one size after promotion.
template <class A, class B>
using MinMax = std::enable_if_t<std::is_floating_point_v<A> == std::is_floating_point_v<B> &&
                                    (std::is_floating_point_v<A> || sizeof(+A()) == sizeof(+B())),
                                std::common_type_t<decltype(+A()), decltype(+B())>>;

template <class T, class... Allowed>
inline constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
  else
    return a + b;
}

template <class T, class Update>
T atomic(T* address, Update update) {
  interleave();
  T old = *address;
  *address = update(old);
  return old;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace simt

// ---- Device functions. ----

inline void __syncthreads() { simt::meet_in_block(simt::syncthreads, 0); }
inline int __syncthreads_or(int vote) { return simt::meet_in_block(simt::syncthreads_or, vote); }
inline int __syncthreads_and(int vote) { return simt::meet_in_block(simt::syncthreads_and, vote); }
inline int __syncthreads_count(int vote) { return simt::meet_in_block(simt::syncthreads_count, vote); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::meet_in_warp(simt::syncwarp, mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  return unsigned(simt::meet_in_warp(simt::ballot, mask, vote != 0));
}
inline int __any_sync(unsigned mask, int vote) { return simt::meet_in_warp(simt::any, mask, vote != 0) != 0; }
inline int __all_sync(unsigned mask, int vote) { return simt::meet_in_warp(simt::all, mask, vote == 0) == 0; }
inline unsigned __activemask() { return 1u << (simt::current ? simt::current->linear % 32 : 0); }

template <class T>
auto __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return simt::shuffle(simt::shfl, mask, value, unsigned(source), width);
}
template <class T>
auto __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::shuffle(simt::shfl_up, mask, value, delta, width);
}
template <class T>
auto __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::shuffle(simt::shfl_down, mask, value, delta, width);
}
template <class T>
auto __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return simt::shuffle(simt::shfl_xor, mask, value, unsigned(lane_mask), width);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }

// Atomics and min/max accept the types that CUDA's overloads do. Integer sums wrap.
#define SIMT_ATOMIC(name, result, ...)                                \
  template <class T>                                                  \
  T name(T* address, simt::Value<T> value) {                          \
    static_assert(simt::is_one_of<T, __VA_ARGS__>);                   \
    return simt::atomic(address, [=](T old) -> T { return result; }); \
  }
SIMT_ATOMIC(atomicAdd, simt::wrapping_sum(old, value), int, unsigned, unsigned long long, float, double)
SIMT_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicMax, value > old ? value : old, int, unsigned, long long, unsigned long long)
SIMT_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicExch, (void(old), value), int, unsigned, unsigned long long, float)
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* address, simt::Value<T> compare, simt::Value<T> value) {
  static_assert(simt::is_one_of<T, int, unsigned, unsigned long long>);
  return simt::atomic(address, [=](T old) { return old == compare ? value : old; });
}

template <class A, class B, class T = simt::MinMax<A, B>>
T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class T = simt::MinMax<A, B>>
T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, simt::Value<T> value) {
  *address = value;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// Vector loads read memory of any type, as in device code, and need their alignment.
using uint = unsigned;
#define SIMT_VECTOR2(T)                                                       \
  struct __attribute__((may_alias, aligned(2 * sizeof(T)))) T##2 { T x, y; }; \
  inline T##2 make_##T##2(T x, T y) { return {x, y}; }
#define SIMT_VECTOR4(T)                                                             \
  struct __attribute__((may_alias, aligned(4 * sizeof(T)))) T##4 { T x, y, z, w; }; \
  inline T##4 make_##T##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR2(float)
SIMT_VECTOR2(double)
SIMT_VECTOR2(int)
SIMT_VECTOR2(uint)
SIMT_VECTOR4(float)
SIMT_VECTOR4(int)
SIMT_VECTOR4(uint)
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

// ---- The runtime calls that launchers make; every stream is the host's own order. ----

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

// Says more than CUDA does: why the last call that failed did so.
inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? simt::last_failure.c_str() : "no error";
}
inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::devices)
    return simt::refuse(cudaErrorInvalidValue, "no device %d", device);
  simt::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = int(simt::max_shared_bytes[device]);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* target, int byte, std::size_t bytes, cudaStream_t = nullptr) {
  if (simt::broken) return simt::refuse(simt::broken, "cudaMemsetAsync fails");
  if (bytes) std::memset(target, byte, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes) std::memcpy(target, source, bytes);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || std::size_t(bytes) > simt::max_shared_bytes[simt::device])
    return simt::refuse(cudaErrorInvalidValue, "a block may have at most %zu bytes of shared memory, got %d",
                        simt::max_shared_bytes[simt::device], bytes);
  std::size_t& limit = simt::shared_limits()[reinterpret_cast<const void*>(kernel)];
  limit = std::size_t(bytes) > simt::default_shared_bytes ? std::size_t(bytes) : simt::default_shared_bytes;
  return cudaSuccess;
}
