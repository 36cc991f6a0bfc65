#include "math/parametric_cross_entropy.h"

#include "ops/common.h"

#include <cmath>

namespace lossmeta {
namespace {

constexpr const char* op = "parametric_cross_entropy";

// Checks the arguments that forward and backward share and fills in the problem.
struct Arguments {
  ParametricCrossEntropy a{};
  Tensor logits, phi;
  std::optional<Tensor> labels, weight;
  ScalarType accumulated;
  std::vector<int64_t> phi_sizes;
  bool batch;

  Arguments(const Tensor& logits_, const std::optional<Tensor>& labels_, const Tensor& phi_,
            const std::optional<Tensor>& weight_, int64_t ignore_index, bool sigmoid, int64_t reduction)
      : logits(logits_), phi(phi_), labels(labels_), weight(weight_) {
    a.dtype = float_dtype(logits, op, "logits");
    accumulated = accumulation_type(a.dtype);
    a.sigmoid = sigmoid;
    a.reduction = Reduction(reduction);
    a.ignore_index = ignore_index;
    batch = labels && phi.dim() == 3;
    LOSSMETA_CHECK(logits.dim() >= 2 && (!batch || logits.dim() == 3), op,
                   ": logits must be [N, C] or [N, C, d...]",
                   batch ? ", and [B, N, C] with phi [B, C, C]" : "", ", got ", shape(logits));
    a.models = batch ? logits.size(0) : 1;
    a.classes = logits.size(batch ? 2 : 1);
    a.inner = 1;
    if (!batch)
      for (int64_t d = 2; d < logits.dim(); ++d) a.inner *= logits.size(d);
    a.samples = (batch ? logits.size(1) : logits.size(0)) * a.inner;
    LOSSMETA_CHECK(a.classes > 0, op, ": logits must have at least one class, got ", shape(logits));
    float_dtype(phi, op, "phi");
    check_same_device(phi, logits, op, "phi", "logits");
    if (labels) {
      LOSSMETA_CHECK(labels->scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
                     dtype_name(*labels));
      check_same_device(*labels, logits, op, "labels", "logits");
      bool fits = labels->dim() == logits.dim() - 1 && labels->size(0) == logits.size(0);
      for (int64_t d = 1; fits && d < labels->dim(); ++d)
        fits = labels->size(d) == logits.size(batch ? d : d + 1);
      LOSSMETA_CHECK(fits, op, ": labels must have the shape of logits without the class dimension, got ",
                     shape(*labels), " for logits ", shape(logits));
      fits = (!batch || phi.size(0) == a.models) && (batch || phi.dim() == 2) &&
             phi.size(-2 + phi.dim()) == a.classes && phi.size(-1 + phi.dim()) == a.classes;
      LOSSMETA_CHECK(fits, op, ": phi must be [", batch ? "B, " : "", "C, C] with C = ", a.classes, ", got ",
                     shape(phi));
      if (weight) {
        float_dtype(*weight, op, "weight");
        check_same_device(*weight, logits, op, "weight", "logits");
        LOSSMETA_CHECK(weight->dim() == 1 && weight->size(0) == a.classes, op, ": weight must be [",
                       a.classes, "], got ", shape(*weight));
        weight = packed_as(*weight, accumulated);
        a.weight = weight->const_data_ptr();
      }
      labels = packed(*labels);
      // An empty tensor has no memory, but it is there: null means without labels.
      static const int64_t no_label = 0;
      a.labels = labels->numel() ? static_cast<const int64_t*>(labels->const_data_ptr()) : &no_label;
      check_labels(a.labels, a.models * a.samples, a.classes, ignore_index, op);
    } else {
      LOSSMETA_CHECK(
          sizes(phi) == sizes(logits), op,
          ": without labels phi holds a row for each sample and must have the shape of logits, got ",
          shape(phi), " for logits ", shape(logits));
    }
    logits = packed(logits);
    // Models that share one phi hand it over expanded: it is not copied.
    const bool shared = batch && a.models > 1 && phi.stride(0) == 0;
    phi_sizes = sizes(phi);
    if (shared) phi = torch::stable::select(phi, 0, 0);
    a.phi_stride = shared ? 0 : a.classes * a.classes;
    phi = packed_as(phi, accumulated);
    a.logits = logits.const_data_ptr();
    a.phi = phi.const_data_ptr();
  }

  // The rows of phi that are used must be finite. The kernel sums them anyway: only where a sum is not finite need one
  // look at the elements, and large finite ones may be the reason.
  void check_phi() const {
#ifndef LOSSMETA_BACKEND_CUDA
    if (accumulated == ScalarType::Double)
      check_phi(Statistics<double>(a).q_sum, static_cast<const double*>(a.phi));
    else
      check_phi(Statistics<float>(a).q_sum, static_cast<const float*>(a.phi));
#endif
  }
  template <class A>
  void check_phi(const A* sums, const A* rows) const {
    for (int64_t i = 0; i < a.models * a.samples; ++i) {
      if (std::isfinite(sums[i])) continue;
      const int64_t label = labels ? a.labels[i] : 0;
      const A* row = labels ? rows + i / a.samples * a.phi_stride + label * a.classes
                            : rows + i / a.inner * a.classes * a.inner + i % a.inner;
      for (int64_t c = 0; c < a.classes; ++c) {
        const A value = row[c * (labels ? 1 : a.inner)];
        if (std::isfinite(value)) continue;
        LOSSMETA_CHECK(!labels, op, ": phi must be finite (and weight, with smoothed targets), got ", value,
                       " in row ", label, ", the row of label ", label);
        fail(op, ": phi, weight and probabilities must be finite, got ", value, " for sample ", i);
      }
    }
  }

  std::vector<int64_t> loss_sizes() const {
    if (a.reduction != Reduction::none)
      return batch ? std::vector<int64_t>{a.models} : std::vector<int64_t>{};
    if (labels) return sizes(*labels);
    std::vector<int64_t> s = sizes(logits);
    s.erase(s.begin() + 1);
    return s;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const std::optional<Tensor>& labels,
                                   const Tensor& phi, const std::optional<Tensor>& weight,
                                   int64_t ignore_index, bool sigmoid, int64_t reduction) {
  Arguments arguments(logits, labels, phi, weight, ignore_index, sigmoid, reduction);
  ParametricCrossEntropy& a = arguments.a;
  Tensor loss = empty(arguments.loss_sizes(), arguments.accumulated, logits);
  Tensor statistics =
      empty({parametric_cross_entropy_statistics(a.models, a.samples)}, arguments.accumulated, logits);
  a.statistics = statistics.mutable_data_ptr();
  (a.reduction == Reduction::none ? a.loss : a.reduced) = loss.mutable_data_ptr();
#ifdef LOSSMETA_BACKEND_CUDA
  const Tensor scratch = empty({parametric_cross_entropy_scratch(a, false)}, ScalarType::Byte, logits);
  a.scratch = scratch.mutable_data_ptr();
#endif
  LOSSMETA_RUN(parametric_cross_entropy_forward, a, logits);
  arguments.check_phi();
  return {loss, statistics};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& logits,
                                    const std::optional<Tensor>& labels, const Tensor& phi,
                                    const std::optional<Tensor>& weight, int64_t ignore_index, bool sigmoid,
                                    int64_t reduction, const Tensor& statistics, bool need_logits,
                                    bool need_phi) {
  Arguments arguments(logits, labels, phi, weight, ignore_index, sigmoid, reduction);
  ParametricCrossEntropy& a = arguments.a;
  std::vector<int64_t> expected = arguments.loss_sizes();
  LOSSMETA_CHECK(sizes(grad) == expected, op, ": grad must have the shape of the loss, got ", shape(grad));
  LOSSMETA_CHECK(statistics.numel() == parametric_cross_entropy_statistics(a.models, a.samples) &&
                     statistics.scalar_type() == arguments.accumulated,
                 op, ": statistics must be those that the forward returned for these logits");
  const Tensor dense_grad = packed_as(grad, arguments.accumulated), kept = packed(statistics);
  a.grad = dense_grad.const_data_ptr();
  a.statistics = const_cast<void*>(kept.const_data_ptr());
  Tensor grad_logits =
      empty(need_logits ? sizes(logits) : std::vector<int64_t>{0}, logits.scalar_type(), logits);
  Tensor grad_phi =
      empty(need_phi ? arguments.phi_sizes : std::vector<int64_t>{0}, arguments.accumulated, logits);
  if (need_logits) a.grad_logits = grad_logits.mutable_data_ptr();
  if (need_phi) a.grad_phi = grad_phi.mutable_data_ptr();
#ifdef LOSSMETA_BACKEND_CUDA
  const bool sorts = need_phi && labels;
  const Tensor scratch =
      empty({sorts ? parametric_cross_entropy_scratch(a, true) : 0}, ScalarType::Byte, logits);
  a.scratch = scratch.mutable_data_ptr();
#endif
  LOSSMETA_RUN(parametric_cross_entropy_backward, a, logits);
  return {grad_logits, grad_phi};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "parametric_cross_entropy(Tensor logits, Tensor? labels, Tensor phi, Tensor? weight, int ignore_index, "
      "bool sigmoid, int reduction) -> (Tensor loss, Tensor statistics)");
  m.def(
      "parametric_cross_entropy_backward(Tensor grad, Tensor logits, Tensor? labels, Tensor phi, Tensor? "
      "weight, "
      "int ignore_index, bool sigmoid, int reduction, Tensor statistics, bool need_logits, bool need_phi) "
      "-> (Tensor grad_logits, Tensor grad_phi)");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("parametric_cross_entropy", TORCH_BOX(&forward));
  m.impl("parametric_cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace lossmeta
