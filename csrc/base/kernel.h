// How the floors of an operator meet. csrc/math/x.h defines the argument structure of each kernel and declares the
// kernel with LOSSMETA_DECLARE_KERNEL; csrc/cpu/x.cpp defines it once per instruction set and csrc/cuda/x.cu for the
// GPU; csrc/ops/x.cpp fills in the structure and calls it.
#pragma once

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace lossmeta {

enum class Isa : int8_t { generic, avx2, avx512 };

enum class Reduction : int8_t { none, mean, sum };

// The instruction set that kernels run on: the best that the processor has, or LOSSMETA_CPU_ISA.
Isa isa();

}  // namespace lossmeta

#if defined(__x86_64__)
#define LOSSMETA_DECLARE_KERNEL(name, Arguments) \
  namespace lossmeta {                           \
  namespace generic {                            \
  void name(const Arguments&);                   \
  }                                              \
  namespace avx2 {                               \
  void name(const Arguments&);                   \
  }                                              \
  namespace avx512 {                             \
  void name(const Arguments&);                   \
  }                                              \
  namespace cuda {                               \
  void name(const Arguments&, cudaStream_t);     \
  }                                              \
  namespace cpu {                                \
  inline void name(const Arguments& a) {         \
    switch (isa()) {                             \
      case Isa::avx512: return avx512::name(a);  \
      case Isa::avx2: return avx2::name(a);      \
      default: return generic::name(a);          \
    }                                            \
  }                                              \
  }                                              \
  }
#else
#define LOSSMETA_DECLARE_KERNEL(name, Arguments)                    \
  namespace lossmeta {                                              \
  namespace generic {                                               \
  void name(const Arguments&);                                      \
  }                                                                 \
  namespace cuda {                                                  \
  void name(const Arguments&, cudaStream_t);                        \
  }                                                                 \
  namespace cpu {                                                   \
  inline void name(const Arguments& a) { return generic::name(a); } \
  }                                                                 \
  }
#endif

namespace lossmeta {

template <class T>
struct type_tag {
  using type = T;
};

// Calls f(type_tag<T>{}) with the element type that `dtype` names.
template <class F>
void visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(type_tag<float>{});
    case DType::float64: return f(type_tag<double>{});
    case DType::bfloat16: return f(type_tag<bfloat16>{});
    case DType::float16: return f(type_tag<float16>{});
  }
}

}  // namespace lossmeta
