// Threads for the CPU loops. Implemented on torch's thread pool in csrc/ops/parallel.cpp, and serially or with
// std::thread in the native tests, so that this floor needs no torch.
#pragma once

#include <cstdint>

namespace lossmeta {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);
int64_t thread_count();
void parallel_for_range(int64_t count, int64_t grain, RangeFunction function, const void* context);

// Calls f(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items where possible.
// The split depends on the number of threads: results must not. f must not throw, so it allocates nothing: an exception
// would end the process.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(int64_t(0), count);
  parallel_for_range(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
}

// Into how many ranges of at least `grain` items [0, count) is worth dividing: so many are in work at once.
inline int64_t worker_count(int64_t count, int64_t grain) {
  const int64_t most = (count + grain - 1) / grain, threads = thread_count();
  return most < threads ? most : threads;
}

// Calls f(worker, begin, end) for `workers` ranges that cover [0, count): each worker has scratch of its own.
template <class F>
void parallel_for_workers(int64_t count, int64_t workers, const F& f) {
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) f(w, count * w / workers, count * (w + 1) / workers);
  });
}

}  // namespace lossmeta
