// Samples by class on the GPU: chunks of labels are sorted, and a block gathers the samples of its class from them in
// ascending order. No atomics on what is summed, so every sum over a class has one fixed order.
#pragma once

#include "cuda/row.cuh"

namespace lossmeta::cuda {
namespace {

constexpr int chunk_samples = block_threads;

LOSSMETA_HD int64_t chunk_count(int64_t samples) { return (samples + chunk_samples - 1) / chunk_samples; }

// Labels sorted within each chunk, and where they came from. Those that do not count follow behind.
struct SortedLabels {
  int32_t* keys;    // [N]
  uint16_t* order;  // [N], within the chunk
  int64_t samples;  // N
};

// A block per chunk of each batch of N labels. Equal labels keep their order: the rank of a label is the number of labels before it.
__global__ __launch_bounds__(block_threads) void sort_labels(const int64_t* labels,  // [batches, N]
                                                             int64_t classes, int64_t ignore_index,
                                                             SortedLabels sorted,  // [batches, N]
                                                             unsigned* counters,   // set to zero
                                                             int64_t counter_count) {
  __shared__ int32_t chunk[chunk_samples];
  const int64_t chunks = chunk_count(sorted.samples), first = blockIdx.x % chunks * chunk_samples;
  const int64_t begin = blockIdx.x / chunks * sorted.samples + first, left = sorted.samples - first;
  const int count = int(left < chunk_samples ? left : chunk_samples), t = int(threadIdx.x);
  for (int64_t i = int64_t(blockIdx.x) * block_threads + t; i < counter_count;
       i += int64_t(gridDim.x) * block_threads)
    counters[i] = 0;
  int32_t key = 0;
  if (t < count) {
    const int64_t label = labels[begin + t];
    key = label >= 0 && label < classes && label != ignore_index ? int32_t(label) : int32_t(classes);
    chunk[t] = key;
  }
  __syncthreads();
  if (t >= count) return;
  int rank = 0;
  for (int j = 0; j < count; ++j) rank += chunk[j] < key || (chunk[j] == key && j < t);
  sorted.keys[begin + rank] = key;
  sorted.order[begin + rank] = uint16_t(t);
}

__device__ __forceinline__ int first_not_below(const int32_t* keys, int count, int32_t key) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (keys[low + half] < key)
      low += half + 1, count -= half + 1;
    else
      count = half;
  }
  return low;
}

// Calls visit(ids, count) with the next `rows` or fewer samples of class k from the chunks [first, last), ascending, in
// shared memory; returns how many there were. All threads of the block take part.
template <int rows, class Visit>
__device__ int64_t for_each_batch(const SortedLabels& sorted, int32_t k, int64_t first, int64_t last,
                                  const Visit& visit) {
  __shared__ int64_t ids[rows];
  __shared__ int warp_totals[block_threads / 32];
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;
  int64_t total = 0;
  for (int64_t round = first; round < last; round += block_threads) {
    // The samples of this thread's chunk stand at [start, start + count) of the round.
    const int64_t chunk = round + t, begin = chunk * chunk_samples;
    int low = 0, count = 0;
    if (chunk < last) {
      const int64_t left = sorted.samples - begin;
      const int size = int(left < chunk_samples ? left : chunk_samples);
      low = first_not_below(sorted.keys + begin, size, k);
      count = first_not_below(sorted.keys + begin + low, size - low, k + 1);
    }
    int end = count;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(whole_warp, end, offset);
      if (lane >= offset) end += before;
    }
    __syncthreads();
    if (lane == 31) warp_totals[warp] = end;
    __syncthreads();
    int round_total = 0;
    for (int w = 0; w < block_threads / 32; ++w) {
      if (w == warp) end += round_total;
      round_total += warp_totals[w];
    }
    const int start = end - count;
    for (int batch = 0; batch < round_total; batch += rows) {
      __syncthreads();
      for (int i = start > batch ? start : batch; i < end && i < batch + rows; ++i)
        ids[i - batch] = begin + sorted.order[begin + low + i - start];
      __syncthreads();
      visit(ids, round_total - batch < rows ? round_total - batch : rows);
    }
    total += round_total;
  }
  return total;
}

}  // namespace
}  // namespace lossmeta::cuda
