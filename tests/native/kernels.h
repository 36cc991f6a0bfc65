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

// Calls f(isa) for each instruction set of this processor, with one thread and with three.
template <class F>
void on_every_cpu(const F& f) {
  for (Isa isa : native::supported_isas())
    for (int threads : {1, 3}) {
      native::set_isa(isa);
      native::set_threads(threads);
      f(int(isa));
    }
}

}  // namespace lossmeta
