// Threads for the CPU loops. Implemented on torch's thread pool in csrc/ops/parallel.cpp, and serially or with
// std::thread in the native tests, so that this floor needs no torch.
#pragma once

#include <cstdint>

namespace lossmeta {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_for_range(int64_t count, int64_t grain, RangeFunction function, const void* context);

// Calls f(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items where possible.
// The split depends on the number of threads: results must not.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(int64_t(0), count);
  parallel_for_range(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
}

}  // namespace lossmeta
