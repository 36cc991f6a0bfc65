// The Python module lossmeta._core: what was built, and the instruction set that the kernels run on.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "base/kernel.h"
#include "math/loss_network.h"
#include "math/parametric_cross_entropy.h"

namespace lossmeta {
namespace {

constexpr const char* names[] = {"generic", "avx2", "avx512"};

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose() {
  const char* wanted = std::getenv("LOSSMETA_CPU_ISA");
  if (!wanted || !*wanted) return best();
  for (int i = 0; i < 3; ++i) {
    if (std::string(wanted) != names[i]) continue;
    if (Isa(i) > best())
      throw std::runtime_error(std::string("LOSSMETA_CPU_ISA=") + wanted + ": this processor supports " +
                               names[int(best())] + " at most; choose that or less, or unset the variable");
    return Isa(i);
  }
  throw std::runtime_error(std::string("LOSSMETA_CPU_ISA must be generic, avx2 or avx512, got ") + wanted);
}

Isa chosen = Isa::generic;

}  // namespace

Isa isa() { return chosen; }

}  // namespace lossmeta

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of lossmeta: importing it registers the CPU operators with torch.";
  lossmeta::chosen = lossmeta::choose();
  m.def("isa", [] { return lossmeta::names[int(lossmeta::isa())]; }, "The instruction set in use.");
  m.def(
      "best_isa", [] { return lossmeta::names[int(lossmeta::best())]; }, "The best one this processor has.");
  m.attr("LOSS_NETWORK_MIN_INTERVALS") = lossmeta::loss_network_min_intervals;
  m.attr("LOSS_NETWORK_MAX_INTERVALS") = lossmeta::loss_network_max_intervals;
  m.attr("LOSS_NETWORK_ELEMENTS_PER_NODE") = lossmeta::loss_network_elements_per_node;
  m.attr("PARAMETRIC_CROSS_ENTROPY_STATISTICS_PER_SAMPLE") =
      lossmeta::parametric_cross_entropy_statistics_per_sample;
}
