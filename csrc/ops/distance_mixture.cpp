#include "math/distance_mixture.h"

#include "ops/common.h"

#include <cmath>

namespace lossmeta {
namespace {

constexpr const char* op = "distance_mixture";

// Checks the arguments that forward and backward share and fills in the problem.
struct Arguments {
  DistanceMixture a{};
  Tensor embeddings, phi;
  std::optional<Tensor> triplets, labels;
  ScalarType accumulated;
  std::vector<int64_t> loss_sizes, statistics_sizes;

  Arguments(const Tensor& embeddings_, const std::optional<Tensor>& triplets_, const Tensor& phi_,
            const std::optional<Tensor>& labels_, double min_distance, int64_t reduction)
      : embeddings(embeddings_), phi(phi_), triplets(triplets_), labels(labels_) {
    a.dtype = float_dtype(embeddings, op, "embeddings");
    accumulated = accumulation_type(a.dtype);
    a.reduction = Reduction(reduction);
    a.min_distance = min_distance;
    LOSSMETA_CHECK(min_distance > 0 && std::isfinite(min_distance), op,
                   ": min_distance must be positive, got ", min_distance);
    LOSSMETA_CHECK(embeddings.dim() == 2, op, ": embeddings must be [M, D], got ", shape(embeddings));
    a.count = embeddings.size(0);
    a.dims = embeddings.size(1);
    float_dtype(phi, op, "phi");
    check_same_device(phi, embeddings, op, "phi", "embeddings");
    LOSSMETA_CHECK(phi.dim() == 1 && phi.size(0) == 10, op, ": phi must be [10], got ", shape(phi));
    LOSSMETA_CHECK(triplets.has_value() != labels.has_value(), op, ": triplets or labels must be given, got ",
                   triplets ? "both" : "neither");
    if (triplets) {
      LOSSMETA_CHECK(triplets->scalar_type() == ScalarType::Long, op, ": triplets must be int64, got ",
                     dtype_name(*triplets));
      check_same_device(*triplets, embeddings, op, "triplets", "embeddings");
      LOSSMETA_CHECK(triplets->dim() == 2 && triplets->size(1) == 3, op, ": triplets must be [T, 3], got ",
                     shape(*triplets));
      a.triplet_count = triplets->size(0);
      triplets = packed(*triplets);
      a.triplets = static_cast<const int64_t*>(triplets->const_data_ptr());
      check_triplets();
      loss_sizes = {a.triplet_count};
      statistics_sizes = {2 * a.triplet_count};
    } else {
      LOSSMETA_CHECK(labels->scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
                     dtype_name(*labels));
      check_same_device(*labels, embeddings, op, "labels", "embeddings");
      LOSSMETA_CHECK(labels->dim() == 1 && labels->size(0) == a.count, op, ": labels must be [", a.count,
                     "], one for each embedding, got ", shape(*labels));
      labels = packed(*labels);
      // An empty tensor has no memory, but it is there: null means triplets.
      static const int64_t no_label = 0;
      a.labels = a.count ? static_cast<const int64_t*>(labels->const_data_ptr()) : &no_label;
      loss_sizes = {a.count};
      statistics_sizes = {a.count * a.count + 2 * a.count + 1};
    }
    if (a.reduction != Reduction::none) loss_sizes.clear();
    embeddings = packed(embeddings);
    phi = packed_as(phi, accumulated);
    a.embeddings = embeddings.const_data_ptr();
    a.phi = phi.const_data_ptr();
    check_phi();
  }

  // On CUDA looking would synchronise: there a bad index makes its loss NaN and a bad coefficient all of them.
  void check_triplets() const {
#ifndef LOSSMETA_BACKEND_CUDA
    if (!any_outside(a.triplets, 3 * a.triplet_count, a.count)) return;
    for (int64_t i = 0; i < 3 * a.triplet_count; ++i)
      LOSSMETA_CHECK(a.triplets[i] >= 0 && a.triplets[i] < a.count, op, ": triplets must lie in [0, ",
                     a.count, "), got ", a.triplets[i], " at [", i / 3, ", ", i % 3, "]");
#endif
  }

  void check_phi() const {
#ifndef LOSSMETA_BACKEND_CUDA
    for (int i = 0; i < 10; ++i) {
      const double v = accumulated == ScalarType::Double ? static_cast<const double*>(a.phi)[i]
                                                         : double(static_cast<const float*>(a.phi)[i]);
      LOSSMETA_CHECK(std::isfinite(v), op, ": phi must be finite, got ", v, " at index ", i);
    }
#endif
  }
};

// Scratch memory of the CUDA kernels; the CPU kernels have their own.
std::optional<Tensor> workspace([[maybe_unused]] Arguments& arguments) {
#ifdef LOSSMETA_BACKEND_CUDA
  Tensor scratch =
      empty({distance_mixture_workspace(arguments.a)}, arguments.accumulated, arguments.embeddings);
  arguments.a.workspace = scratch.mutable_data_ptr();
  return scratch;
#else
  return std::nullopt;
#endif
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const std::optional<Tensor>& triplets,
                                           const Tensor& phi, const std::optional<Tensor>& labels,
                                           double min_distance, int64_t reduction) {
  Arguments arguments(embeddings, triplets, phi, labels, min_distance, reduction);
  DistanceMixture& a = arguments.a;
  Tensor loss = empty(arguments.loss_sizes, arguments.accumulated, embeddings);
  Tensor terms = empty({10}, arguments.accumulated, embeddings);
  Tensor statistics = empty(arguments.statistics_sizes, arguments.accumulated, embeddings);
  a.loss = loss.mutable_data_ptr();
  a.terms = terms.mutable_data_ptr();
  a.statistics = statistics.mutable_data_ptr();
  const auto scratch = workspace(arguments);
  LOSSMETA_RUN(distance_mixture_forward, a, embeddings);
  return {loss, terms, statistics};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_loss,
                                    const std::optional<Tensor>& grad_terms, const Tensor& embeddings,
                                    const std::optional<Tensor>& triplets, const Tensor& phi,
                                    const std::optional<Tensor>& labels, double min_distance,
                                    int64_t reduction, const Tensor& statistics, bool need_embeddings,
                                    bool need_phi) {
  Arguments arguments(embeddings, triplets, phi, labels, min_distance, reduction);
  DistanceMixture& a = arguments.a;
  std::optional<Tensor> dense_loss, dense_terms;
  if (grad_loss) {
    LOSSMETA_CHECK(sizes(*grad_loss) == arguments.loss_sizes, op,
                   ": grad_loss must have the shape of the loss, got ", shape(*grad_loss));
    check_same_device(*grad_loss, embeddings, op, "grad_loss", "embeddings");
    dense_loss = packed_as(*grad_loss, arguments.accumulated);
    a.grad_loss = dense_loss->const_data_ptr();
  }
  if (grad_terms) {
    LOSSMETA_CHECK(grad_terms->dim() == 1 && grad_terms->size(0) == 10, op, ": grad_terms must be [10], got ",
                   shape(*grad_terms));
    check_same_device(*grad_terms, embeddings, op, "grad_terms", "embeddings");
    dense_terms = packed_as(*grad_terms, arguments.accumulated);
    a.grad_terms = dense_terms->const_data_ptr();
  }
  LOSSMETA_CHECK(statistics.dim() == 1 && statistics.size(0) == arguments.statistics_sizes[0] &&
                     statistics.scalar_type() == arguments.accumulated,
                 op, ": statistics must be those that the forward returned for these embeddings");
  check_same_device(statistics, embeddings, op, "statistics", "embeddings");
  const Tensor kept = packed(statistics);
  a.statistics = const_cast<void*>(kept.const_data_ptr());
  const std::vector<int64_t> none{0};
  Tensor grad_embeddings = empty(need_embeddings ? std::vector<int64_t>{a.count, a.dims} : none,
                                 embeddings.scalar_type(), embeddings);
  Tensor grad_phi = empty(need_phi ? std::vector<int64_t>{10} : none, arguments.accumulated, embeddings);
  if (need_embeddings) a.grad_embeddings = grad_embeddings.mutable_data_ptr();
  if (need_phi) a.grad_phi = grad_phi.mutable_data_ptr();
  const auto scratch = workspace(arguments);
  LOSSMETA_RUN(distance_mixture_backward, a, embeddings);
  return {grad_embeddings, grad_phi};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "distance_mixture(Tensor embeddings, Tensor? triplets, Tensor phi, Tensor? labels, float min_distance, "
      "int reduction) -> (Tensor loss, Tensor terms, Tensor statistics)");
  m.def(
      "distance_mixture_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor embeddings, Tensor? triplets, "
      "Tensor phi, Tensor? labels, float min_distance, int reduction, Tensor statistics, bool "
      "need_embeddings, "
      "bool need_phi) -> (Tensor grad_embeddings, Tensor grad_phi)");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("distance_mixture", TORCH_BOX(&forward));
  m.impl("distance_mixture_backward", TORCH_BOX(&backward));
}

}  // namespace lossmeta
