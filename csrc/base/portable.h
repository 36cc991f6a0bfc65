// What lets one formula compile for the CPU, for its SIMD vectors and for the GPU.
#pragma once

#if defined(__CUDACC__)
#define LOSSMETA_HD __host__ __device__ __forceinline__
#else
#define LOSSMETA_HD inline __attribute__((always_inline))
#endif

#include <cmath>

namespace lossmeta::math {

// Scalar overloads; csrc/cpu/simd.h adds the vector ones, found by argument-dependent lookup.
// Formulas call these unqualified on a template argument T.
LOSSMETA_HD float exp(float x) { return ::expf(x); }
LOSSMETA_HD double exp(double x) { return ::exp(x); }
LOSSMETA_HD float expm1(float x) { return ::expm1f(x); }
LOSSMETA_HD double expm1(double x) { return ::expm1(x); }
LOSSMETA_HD float log(float x) { return ::logf(x); }
LOSSMETA_HD double log(double x) { return ::log(x); }
LOSSMETA_HD float log1p(float x) { return ::log1pf(x); }
LOSSMETA_HD double log1p(double x) { return ::log1p(x); }
LOSSMETA_HD float log1p_unit(float x) { return ::log1pf(x); }  // for x in [0, 1]
LOSSMETA_HD double log1p_unit(double x) { return ::log1p(x); }
LOSSMETA_HD float reciprocal(float x) { return 1.f / x; }  // for normal 1/x: vectors approximate and refine
LOSSMETA_HD double reciprocal(double x) { return 1. / x; }
LOSSMETA_HD float sqrt(float x) { return ::sqrtf(x); }
LOSSMETA_HD double sqrt(double x) { return ::sqrt(x); }
LOSSMETA_HD float abs(float x) { return ::fabsf(x); }
LOSSMETA_HD double abs(double x) { return ::fabs(x); }
template <class T>
LOSSMETA_HD T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

}  // namespace lossmeta::math
