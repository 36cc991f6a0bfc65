#include "math/perturb.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lossmeta::LOSSMETA_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 15;  // below this a thread costs more than it saves
constexpr int64_t tile_bytes =
    1 << 15;  // of base and directions: they stay in the first cache for all points
constexpr int64_t streamed_bytes = 16 << 20;  // a result of this size does not stay in the caches
constexpr int64_t line_bytes = 64;

// theta_b over [begin, end). Streamed, out + begin is aligned to the vector.
template <bool streams, class T>
void combine(const T* base,                        // [P]
             const T* directions,                  // [K, P]
             const accumulate_t<T>* coefficients,  // [K]
             T* out,                               // [P]
             int64_t directions_count, int64_t parameters, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int unroll = 4;
  int64_t p = begin;
  for (; p + unroll * V::size <= end; p += unroll * V::size) {
    V sum[unroll];
    for (int u = 0; u < unroll; ++u) sum[u] = load(base + p + u * V::size);
    for (int64_t k = 0; k < directions_count; ++k)
      for (int u = 0; u < unroll; ++u)
        sum[u] += load(directions + k * parameters + p + u * V::size) * coefficients[k];
    for (int u = 0; u < unroll; ++u) {
      if constexpr (streams)
        stream(out + p + u * V::size, sum[u]);
      else
        store(out + p + u * V::size, sum[u]);
    }
  }
  for (; p < end; p += V::size) {
    const int n = int(end - p < V::size ? end - p : V::size);
    V sum = load_partial(base + p, n, A(0));
    for (int64_t k = 0; k < directions_count; ++k)
      sum += load_partial(directions + k * parameters + p, n, A(0)) * coefficients[k];
    store_partial(out + p, sum, n);
  }
}

template <class T>
void perturb(const Perturb& a) {
  using A = accumulate_t<T>;
  const T* base = static_cast<const T*>(a.base);
  const T* directions = static_cast<const T*>(a.directions);
  const A* coefficients = static_cast<const A*>(a.coefficients);
  T* out = static_cast<T*>(a.out);
  constexpr int64_t line = line_bytes / sizeof(T);
  const int64_t fitting =
      tile_bytes / (int64_t(sizeof(T)) * (1 + a.directions_count)) / (4 * line) * (4 * line);
  const int64_t tile = fitting > 8 * line ? fitting : 8 * line;
  const int64_t tiles = (a.parameters + tile - 1) / tile;
  const bool streams = a.points * a.parameters * int64_t(sizeof(T)) >= streamed_bytes;
  parallel_for(tiles, grain_elements / (tile * (a.points + 1)) + 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t b = 0; b < a.points; ++b) {
        T* row = out + b * a.out_stride;
        // A streamed row's tiles begin at cache lines: each is shifted by what the row's start lacks to a
        // line.
        const int64_t shift =
            streams ? int64_t(-reinterpret_cast<uintptr_t>(row) % line_bytes / sizeof(T)) : 0;
        const auto edge = [&](int64_t tile_index) {
          const int64_t at = tile_index * tile + shift;
          return tile_index == tiles || at > a.parameters ? a.parameters : at;
        };
        const auto run = [&](auto streamed, int64_t begin, int64_t end) {
          combine<decltype(streamed)::value>(base, directions, coefficients + b * a.directions_count, row,
                                             a.directions_count, a.parameters, begin, end);
        };
        if (t == 0 && shift > 0) run(std::false_type(), 0, edge(0));
        if (streams)
          run(std::true_type(), edge(t), edge(t + 1));
        else
          run(std::false_type(), edge(t), edge(t + 1));
      }
    if (streams) stream_fence();
  });
}

}  // namespace

void perturb(const Perturb& a) {
  visit_dtype(a.dtype, [&](auto tag) { perturb<typename decltype(tag)::type>(a); });
}

}  // namespace lossmeta::LOSSMETA_ISA
