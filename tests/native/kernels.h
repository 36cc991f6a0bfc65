// What the tests of the kernels share: the runtime around them, and the dtype that names an element type.
#pragma once

#include <type_traits>

#include "check.h"
#include "runtime.h"

namespace lossmeta {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, double>     ? DType::float64
                           : std::is_same_v<T, bfloat16> ? DType::bfloat16
                           : std::is_same_v<T, float16>  ? DType::float16
                                                         : DType::float32;

}  // namespace lossmeta
