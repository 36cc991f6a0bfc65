#include "math/class_confusion.h"

#include "cuda/group.cuh"

namespace lossmeta::cuda {
namespace {

// Grid: (class, part). A block takes the samples of its class, a batch of rows at a time: first each row's maximum and
// log sum exp, then, while the rows are still in cache, the sum of log sum exp + (m - x) of each column.
template <class T, int threads, int width>
__global__ __launch_bounds__(block_threads, sizeof(accumulate_t<T>) == 8 ? 1 : 3) void sum_class(
    const T* logits,  // [N, C]
    SortedLabels sorted, int64_t classes, bool accumulate,
    double* sums,             // [C, C]
    int64_t* counts,          // [C]
    double* partial_sums,     // [parts, C, C] where parts > 1
    int64_t* partial_counts,  // [parts, C]
    unsigned* counters) {     // [C], zero
  using A = accumulate_t<T>;
  constexpr int rows = block_threads / threads;     // of a batch
  constexpr int columns = threads < 32 ? 32 : 256;  // threads along the columns; the others take other rows
  constexpr int slices = block_threads / columns, rows_per_thread = rows / slices;
  __shared__ A maxima[rows], log_sums[rows];
  const int t = int(threadIdx.x), slice = t / columns;
  const int64_t k = blockIdx.x, part = blockIdx.y, parts = gridDim.y, chunks = chunk_count(sorted.samples);
  const bool direct = parts == 1;
  double* out = (direct ? sums : partial_sums + part * classes * classes) + k * classes;
  bool overwrite = !(direct && accumulate);

  const int64_t count = for_each_batch<rows>(
      sorted, int32_t(k), chunks * part / parts, chunks * (part + 1) / parts, [&](const int64_t* ids, int n) {
        const int r = t / threads;
        const RowSums<A, false> row = row_sums<threads, width, false>(
            logits + ids[r < n ? r : 0] * classes, static_cast<const A*>(nullptr), r < n ? classes : 0);
        if (t % threads == 0) maxima[r] = row.maximum, log_sums[r] = row.log_sum();
        __syncthreads();
        for (int64_t c = t % columns * width; c - t % columns * width < classes; c += columns * width) {
          double total[width] = {};
          if (c < classes) {
            for (int j = 0; j < rows_per_thread; j += 2) {
              // Two rows are added before they are widened: their terms have one sign.
              A pair[width] = {};
              for (int i = j; i < j + 2 && i < rows_per_thread; ++i) {
                const int at = slice + slices * i;
                A x[width];
                load_pack<width>(logits + ids[at < n ? at : 0] * classes + c, x);
                for (int w = 0; w < width; ++w) pair[w] += at < n ? maxima[at] - x[w] : A(0);
              }
              for (int w = 0; w < width; ++w) total[w] += double(pair[w]);
            }
            for (int at = slice; at < n; at += slices)
              for (int w = 0; w < width; ++w) total[w] += double(log_sums[at]);
          }
          if constexpr (slices > 1) {
            __shared__ double shares[slices][columns];
            shares[slice][t % columns] = total[0];
            __syncthreads();
            for (int s = 1; s < slices; ++s) total[0] += shares[s][t % columns];
          }
          if (slice == 0 && c < classes)
            for (int w = 0; w < width; ++w) out[c + w] = overwrite ? total[w] : out[c + w] + total[w];
        }
        overwrite = false;
      });

  if (overwrite)
    for (int64_t c = t; c < classes; c += block_threads) out[c] = 0;
  if (direct) {
    if (t == 0) counts[k] = accumulate ? counts[k] + count : count;
    return;
  }
  if (t == 0) partial_counts[part * classes + k] = count;
  if (!is_last_block(counters + k, unsigned(parts))) return;
  for (int64_t c = t; c < classes; c += block_threads) {
    double total = accumulate ? sums[k * classes + c] : 0;
    for (int64_t p = 0; p < parts; ++p)
      total += static_cast<const volatile double*>(partial_sums)[(p * classes + k) * classes + c];
    sums[k * classes + c] = total;
  }
  if (t == 0) {
    int64_t total = accumulate ? counts[k] : 0;
    for (int64_t p = 0; p < parts; ++p)
      total += static_cast<const volatile int64_t*>(partial_counts)[p * classes + k];
    counts[k] = total;
  }
}

template <class T>
void launch(const ClassConfusion& a, cudaStream_t stream) {
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t parts = class_confusion_parts(a.samples, a.classes), chunks = chunk_count(a.samples);
  double* partial_sums = static_cast<double*>(a.scratch);
  int64_t* partial_counts =
      reinterpret_cast<int64_t*>(partial_sums + (parts > 1 ? parts * a.classes * a.classes : 0));
  unsigned* counters = reinterpret_cast<unsigned*>(partial_counts + (parts > 1 ? parts * a.classes : 0));
  int32_t* keys = reinterpret_cast<int32_t*>(counters + a.classes);
  const SortedLabels sorted{keys, reinterpret_cast<uint16_t*>(keys + a.samples), a.samples};
  if (chunks > 0)
    LOSSMETA_LAUNCH(sort_labels, chunks, block_threads, 0, stream, a.labels, a.classes, a.ignore_index,
                    sorted, counters, a.classes);
  const auto run = [&](auto kernel) {
    LOSSMETA_LAUNCH(kernel, dim3(unsigned(a.classes), unsigned(parts)), block_threads, 0, stream, logits,
                    sorted, a.classes, a.accumulate, a.sums, a.counts, partial_sums, partial_counts,
                    counters);
  };
  // A block per row where a class has too few rows to occupy a block's warps.
  constexpr int width = pack_width<T>;
  const bool few = a.samples < 4 * a.classes && a.classes > 1024, packed = packable(logits, a.classes);
  if (a.classes <= 32)
    run(sum_class<T, 4, 1>);
  else if (few)
    packed ? run(sum_class<T, 256, width>) : run(sum_class<T, 256, 1>);
  else
    packed ? run(sum_class<T, 32, width>) : run(sum_class<T, 32, 1>);
}

}  // namespace

void class_confusion(const ClassConfusion& a, cudaStream_t stream) {
  visit_dtype(a.dtype, [&](auto tag) { launch<typename decltype(tag)::type>(a, stream); });
}

}  // namespace lossmeta::cuda
