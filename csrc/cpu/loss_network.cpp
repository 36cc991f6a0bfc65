#include "math/loss_network.h"

#include "cpu/loss_network_elements.h"
#include "cpu/loss_network_rows.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 512;   // below this a thread costs more than it saves
constexpr int64_t chunk_elements = 1024;  // least for a partial sum of the weights' gradients
constexpr int64_t max_chunks = 256;

template <class T>
void forward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  if (table_accepted<A>(a)) return;
  const NetworkWeights<A> weights(a);
  const Rows<T> p{a};
  const int64_t workers = worker_count(a.samples, grain_elements / a.classes + 1);
  const WorkerBuffer<Vec<A>> scratch(workers, NetworkForward<A>::scratch_size(weights));
  parallel_for_workers(a.samples, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const NetworkForward<A> network(weights, scratch[worker]);
    forward_rows(p, begin, end, [&](const Tile<A>& tile, A* values, A* slopes) {
      network(tile.f, tile.y, tile.count, values, slopes);
    });
  });
}

template <class T, bool tangent, bool need_weights>
void backward(const LossNetwork& a) {
  using A = accumulate_t<T>;
  using Network = NetworkBackward<A, tangent, need_weights>;
  const NetworkWeights<A> weights(a);
  const Rows<T> p{a};
  const Chunks chunks(a.samples, a.classes, chunk_elements, max_chunks);
  const int64_t size = weights.gradient_size();
  const bool long_rows = a.classes > tile_elements && a.grad_pred;
  const int64_t workers = worker_count(chunks.count, 1);
  const Buffer<A> partials(need_weights ? chunks.count * size : 0);
  const WorkerBuffer<Vec<A>> of_network(workers, Network::scratch_size(weights));
  const WorkerBuffer<A> of_rows(workers, long_rows ? a.classes : 0);
  parallel_for_workers(chunks.count, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Network network(weights, of_network[worker]);
    RowsBackward<T> rows(p, of_rows[worker]);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * chunks.rows,
                    last = first + chunks.rows < a.samples ? first + chunks.rows : a.samples;
      if (c > begin) network.clear();
      rows(first, last, [&](const Tile<A>& tile, A* u, A* v, A* r, A* slopes) {
        network(tile.f, tile.y, u, v, tile.count, r, slopes);
      });
      if (need_weights) network.gradients(partials.data() + c * size);
    }
  });
  if (need_weights) store_weight_gradients(a, partials.data(), chunks.count, size);
}

template <class T>
void backward(const LossNetwork& a) {
  if (table_accepted<accumulate_t<T>>(a)) return;
  if (!a.grad_input_weight) return backward<T, true, false>(a);
  if (!a.grad_pred && !a.grad_slope) return backward<T, false, true>(a);
  return backward<T, true, true>(a);
}

}  // namespace

void loss_network_forward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(a); });
}

void loss_network_backward(const LossNetwork& a) {
  visit_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
