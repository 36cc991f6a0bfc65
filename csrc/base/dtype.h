// The element types of the kernels and their accumulation types: half precision is read as it is and accumulated
// in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/portable.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace lossmeta {

enum class DType : int8_t { float32, float64, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

// In which a derivative is kept for the backward pass: a float16 has too small a range for it.
template <class T>
using slope_t = std::conditional_t<std::is_same_v<T, float16>, float, T>;

namespace math {

LOSSMETA_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
LOSSMETA_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LOSSMETA_HD float load(const float* p) { return *p; }
LOSSMETA_HD double load(const double* p) { return *p; }
LOSSMETA_HD float load(const bfloat16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
LOSSMETA_HD float load(const float16* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#else
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16, magnitude = p->bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent is rebiased by a product, which treats subnormals correctly: 2^112 = 2^(127-15).
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e33f));
#endif
}

LOSSMETA_HD void store(float* p, float x) { *p = x; }
LOSSMETA_HD void store(double* p, double x) { *p = x; }
LOSSMETA_HD void store(bfloat16* p, float x) {
  const uint32_t bits = float_to_bits(x);
  // Round to nearest even; a NaN stays a (quiet) NaN.
  p->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
LOSSMETA_HD void store(float16* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    p->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x47800000) {  // 65536 and above
    p->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: the sum with 0.5 aligns and rounds the subnormal
    p->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    p->bits = uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
  }
#endif
}

}  // namespace math
}  // namespace lossmeta
