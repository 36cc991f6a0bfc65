// csrc/cpu/parallel.h on torch's thread pool: torch.set_num_threads holds for the kernels too.
#ifndef LOSSMETA_BACKEND_CUDA
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace lossmeta {

int64_t thread_count() { return int64_t(torch::stable::get_num_threads()); }

void parallel_for_range(int64_t count, int64_t grain, RangeFunction function, const void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { function(context, begin, end); });
}

}  // namespace lossmeta
#endif
