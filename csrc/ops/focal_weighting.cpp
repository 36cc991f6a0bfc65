#include "math/focal_weighting.h"

#include "ops/common.h"

#include <cmath>

namespace lossmeta {
namespace {

constexpr const char* op = "focal_weighting";

// Checks the arguments that forward and backward share and fills in the problem.
struct Arguments {
  FocalWeighting a{};
  Tensor embeddings, labels, phi;
  ScalarType accumulated;
  std::vector<int64_t> loss_sizes;
  int64_t statistics_size;

  Arguments(const Tensor& embeddings_, const Tensor& labels_, const Tensor& phi_, double offset,
            int64_t reduction)
      : embeddings(embeddings_), labels(labels_), phi(phi_) {
    a.dtype = float_dtype(embeddings, op, "embeddings");
    accumulated = accumulation_type(a.dtype);
    a.reduction = Reduction(reduction);
    a.offset = offset;
    LOSSMETA_CHECK(std::isfinite(offset), op, ": offset must be finite, got ", offset);
    LOSSMETA_CHECK(embeddings.dim() == 2, op, ": embeddings must be [M, D], got ", shape(embeddings));
    a.count = embeddings.size(0);
    a.dims = embeddings.size(1);
    LOSSMETA_CHECK(labels.scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
                   dtype_name(labels));
    check_same_device(labels, embeddings, op, "labels", "embeddings");
    LOSSMETA_CHECK(labels.dim() == 1 && labels.size(0) == a.count, op, ": labels must be [", a.count,
                   "], one for each embedding, got ", shape(labels));
    float_dtype(phi, op, "phi");
    check_same_device(phi, embeddings, op, "phi", "embeddings");
    LOSSMETA_CHECK(phi.dim() == 1 && phi.size(0) == 2, op, ": phi must be [2], got ", shape(phi));
    if (a.reduction == Reduction::none) loss_sizes = {a.count};
    statistics_size = a.count * a.count + 4 * a.count;
    embeddings = packed(embeddings);
    labels = packed(labels);
    phi = packed_as(phi, accumulated);
    a.embeddings = embeddings.const_data_ptr();
    a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    a.phi = phi.const_data_ptr();
    check_phi();
  }

  // On CUDA looking would synchronise: there a bad coefficient makes every loss NaN.
  void check_phi() const {
#ifndef LOSSMETA_BACKEND_CUDA
    for (int i = 0; i < 2; ++i) {
      const double v = accumulated == ScalarType::Double ? static_cast<const double*>(a.phi)[i]
                                                         : double(static_cast<const float*>(a.phi)[i]);
      LOSSMETA_CHECK(v > 0 && std::isfinite(v), op, ": phi must be positive and finite, got ", v,
                     " at index ", i);
    }
#endif
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels, const Tensor& phi,
                                   double offset, int64_t reduction) {
  Arguments arguments(embeddings, labels, phi, offset, reduction);
  FocalWeighting& a = arguments.a;
  Tensor loss = empty(arguments.loss_sizes, arguments.accumulated, embeddings);
  Tensor statistics = empty({arguments.statistics_size}, arguments.accumulated, embeddings);
  a.loss = loss.mutable_data_ptr();
  a.statistics = statistics.mutable_data_ptr();
  LOSSMETA_RUN(focal_weighting_forward, a, embeddings);
  return {loss, statistics};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& embeddings, const Tensor& labels,
                                    const Tensor& phi, double offset, int64_t reduction,
                                    const Tensor& statistics, bool need_embeddings, bool need_phi) {
  Arguments arguments(embeddings, labels, phi, offset, reduction);
  FocalWeighting& a = arguments.a;
  LOSSMETA_CHECK(sizes(grad) == arguments.loss_sizes, op, ": grad must have the shape of the loss, got ",
                 shape(grad));
  check_same_device(grad, embeddings, op, "grad", "embeddings");
  LOSSMETA_CHECK(statistics.dim() == 1 && statistics.size(0) == arguments.statistics_size &&
                     statistics.scalar_type() == arguments.accumulated,
                 op, ": statistics must be those that the forward returned for these embeddings");
  check_same_device(statistics, embeddings, op, "statistics", "embeddings");
  const Tensor dense_grad = packed_as(grad, arguments.accumulated), kept = packed(statistics);
  a.grad = dense_grad.const_data_ptr();
  a.statistics = const_cast<void*>(kept.const_data_ptr());
  const std::vector<int64_t> none{0};
  Tensor grad_embeddings = empty(need_embeddings ? std::vector<int64_t>{a.count, a.dims} : none,
                                 embeddings.scalar_type(), embeddings);
  Tensor grad_phi = empty(need_phi ? std::vector<int64_t>{2} : none, arguments.accumulated, embeddings);
  if (need_embeddings) a.grad_embeddings = grad_embeddings.mutable_data_ptr();
  if (need_phi) a.grad_phi = grad_phi.mutable_data_ptr();
  LOSSMETA_RUN(focal_weighting_backward, a, embeddings);
  return {grad_embeddings, grad_phi};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "focal_weighting(Tensor embeddings, Tensor labels, Tensor phi, float offset, int reduction) "
      "-> (Tensor loss, Tensor statistics)");
  m.def(
      "focal_weighting_backward(Tensor grad, Tensor embeddings, Tensor labels, Tensor phi, float offset, "
      "int reduction, Tensor statistics, bool need_embeddings, bool need_phi) "
      "-> (Tensor grad_embeddings, Tensor grad_phi)");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("focal_weighting", TORCH_BOX(&forward));
  m.impl("focal_weighting_backward", TORCH_BOX(&backward));
}

}  // namespace lossmeta
