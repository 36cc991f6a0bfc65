#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cpu/parallel.h"

namespace lossmeta {
namespace native {

static int threads = 1;
static Isa chosen = Isa::generic;
static thread_local bool inside_parallel_for = false;

void set_threads(int count) { threads = count; }
void set_isa(Isa isa) { chosen = isa; }

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::generic};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      isas.push_back(Isa::avx512);
  }
#endif
  return isas;
}

}  // namespace native

Isa isa() { return native::chosen; }

int64_t thread_count() { return native::threads; }

void parallel_for_range(int64_t count, int64_t grain, RangeFunction function, const void* context) {
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(native::threads, count / std::max<int64_t>(grain, 1)));
  std::vector<std::thread> workers;
  for (int64_t p = 0; p < parts; ++p)
    workers.emplace_back([=] {
      native::inside_parallel_for = true;
      function(context, count * p / parts, count * (p + 1) / parts);
    });
  for (std::thread& worker : workers) worker.join();
}

}  // namespace lossmeta

// The linker puts this in the place of aligned_alloc (CMakeLists.txt). Inside parallel_for nothing may be allocated:
// where memory runs out the exception would end the process. What is read before it is written is NaN.
extern "C" void* __real_aligned_alloc(size_t alignment, size_t size);
extern "C" void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  if (lossmeta::native::inside_parallel_for) {
    std::fputs("a kernel allocates memory inside parallel_for\n", stderr);
    std::abort();
  }
  void* memory = __real_aligned_alloc(alignment, size);
  return memory ? std::memset(memory, 0xff, size) : nullptr;
}
