#include "math/adjusted_cross_entropy.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "adjusted_cross_entropy";

// Checks the arguments that forward and backward share and fills in the problem.
struct Arguments {
  AdjustedCrossEntropy a{};
  Tensor logits, labels;
  std::optional<Tensor> shift, exponent, smoothing;
  ScalarType accumulated, slope_type;
  std::vector<int64_t> batch;  // [B] or []

  Arguments(const Tensor& logits_, const Tensor& labels_, const std::optional<Tensor>& shift_,
            const std::optional<Tensor>& exponent_, const std::optional<Tensor>& smoothing_,
            int64_t ignore_index)
      : logits(logits_), labels(labels_), shift(shift_), exponent(exponent_), smoothing(smoothing_) {
    a.dtype = float_dtype(logits, op, "logits");
    accumulated = accumulation_type(a.dtype);
    slope_type = a.dtype == DType::float16 ? ScalarType::Float : logits.scalar_type();
    a.ignore_index = ignore_index;
    LOSSMETA_CHECK(logits.dim() == 2 || logits.dim() == 3, op, ": logits must be [N, C] or [B, N, C], got ",
                   shape(logits));
    const bool models = logits.dim() == 3;
    if (models) batch = {logits.size(0)};
    a.models = models ? logits.size(0) : 1;
    a.samples = logits.size(models ? 1 : 0);
    a.classes = logits.size(models ? 2 : 1);
    LOSSMETA_CHECK(a.classes > 0, op, ": logits must have at least one class, got ", shape(logits));
    LOSSMETA_CHECK(labels.scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
                   dtype_name(labels));
    check_same_device(labels, logits, op, "labels", "logits");
    LOSSMETA_CHECK(labels.dim() == 1 && labels.size(0) == a.samples, op, ": labels must be [", a.samples,
                   "], one for each sample, got ", shape(labels));
    a.shift = parameter(shift, "shift", true);
    a.exponent = parameter(exponent, "exponent", false);
    a.smoothing = parameter(smoothing, "smoothing", false);
    labels = packed(labels);
    a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    check_labels(a.labels, a.samples, a.classes, ignore_index, op);
    check_fractions(a.exponent, "exponent");
    check_fractions(a.smoothing, "smoothing");
    logits = packed(logits);
    a.logits = logits.const_data_ptr();
  }

  const void* parameter(std::optional<Tensor>& t, const char* name, bool per_class) {
    if (!t) return nullptr;
    float_dtype(*t, op, name);
    check_same_device(*t, logits, op, name, "logits");
    std::vector<int64_t> expected = batch;
    if (per_class) expected.push_back(a.classes);
    if (sizes(*t) != expected) {
      std::string words;
      for (int64_t size : expected) words += (words.empty() ? "" : ", ") + std::to_string(size);
      fail(op, ": ", name, " must be [", words, "], got ", shape(*t));
    }
    t = packed_as(*t, accumulated);
    return t->const_data_ptr();
  }

  // On CUDA looking would synchronise: there one outside makes its model's loss NaN.
  void check_fractions([[maybe_unused]] const void* values, [[maybe_unused]] const char* name) const {
#ifndef LOSSMETA_BACKEND_CUDA
    for (int64_t b = 0; values && b < a.models; ++b) {
      const double v = accumulated == ScalarType::Double ? static_cast<const double*>(values)[b]
                                                         : double(static_cast<const float*>(values)[b]);
      LOSSMETA_CHECK(v >= 0 && v <= 1, op, ": ", name, " must lie in [0, 1], got ", v, " at index ", b);
    }
#endif
  }

  std::vector<int64_t> derivatives_sizes() const {
    std::vector<int64_t> s{2};
    s.insert(s.end(), batch.begin(), batch.end());
    return s;
  }

  // Fills in the results of the forward pass.
  void run(const Tensor& loss, const Tensor* slope, const Tensor& derivatives) {
    a.loss = loss.mutable_data_ptr();
    a.slope = slope ? slope->mutable_data_ptr() : nullptr;
    a.derivatives = derivatives.mutable_data_ptr();
#ifdef LOSSMETA_BACKEND_CUDA
    const Tensor scratch = empty({adjusted_cross_entropy_scratch(a, false)}, ScalarType::Byte, logits);
    a.scratch = scratch.mutable_data_ptr();
#endif
    LOSSMETA_RUN(adjusted_cross_entropy_forward, a, logits);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels,
                                           const std::optional<Tensor>& shift,
                                           const std::optional<Tensor>& exponent,
                                           const std::optional<Tensor>& smoothing, int64_t ignore_index,
                                           bool with_slope) {
  Arguments arguments(logits, labels, shift, exponent, smoothing, ignore_index);
  Tensor loss = empty(arguments.batch, arguments.accumulated, logits);
  Tensor slope = empty(with_slope ? sizes(logits) : std::vector<int64_t>{0}, arguments.slope_type, logits);
  Tensor derivatives = empty(arguments.derivatives_sizes(), arguments.accumulated, logits);
  arguments.run(loss, with_slope ? &slope : nullptr, derivatives);
  return {loss, slope, derivatives};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& shift,
    const std::optional<Tensor>& exponent, const std::optional<Tensor>& smoothing, int64_t ignore_index, bool,
    const Tensor& slope_, const Tensor& derivatives_, bool need_logits, bool need_shift, bool need_exponent,
    bool need_smoothing) {
  Arguments arguments(logits, labels, shift, exponent, smoothing, ignore_index);
  AdjustedCrossEntropy& a = arguments.a;
  const ScalarType accumulated = arguments.accumulated;
  LOSSMETA_CHECK(sizes(grad) == arguments.batch, op, ": grad must have the shape of the loss, got ",
                 shape(grad));
  check_same_device(grad, logits, op, "grad", "logits");
  Tensor slope = packed(slope_), derivatives = packed(derivatives_);
  if ((need_logits || need_shift) && slope.numel() == 0) {  // the forward was not asked for it
    slope = empty(sizes(logits), arguments.slope_type, logits);
    derivatives = empty(arguments.derivatives_sizes(), accumulated, logits);
    arguments.run(empty(arguments.batch, accumulated, logits), &slope, derivatives);
  }
  LOSSMETA_CHECK((slope.numel() == 0 || slope.numel() == logits.numel()) &&
                     slope.scalar_type() == arguments.slope_type &&
                     sizes(derivatives) == arguments.derivatives_sizes() &&
                     derivatives.scalar_type() == accumulated,
                 op, ": slope and derivatives must be those that the forward returned for these logits");
  const Tensor dense_grad = packed_as(grad, accumulated);
  a.grad = dense_grad.const_data_ptr();
  a.slope = const_cast<void*>(slope.const_data_ptr());
  a.derivatives = const_cast<void*>(derivatives.const_data_ptr());
  const std::vector<int64_t> none{0};
  std::vector<int64_t> shift_sizes = arguments.batch;
  shift_sizes.push_back(a.classes);
  Tensor grad_logits = empty(need_logits ? sizes(logits) : none, logits.scalar_type(), logits);
  Tensor grad_shift = empty(need_shift ? shift_sizes : none, accumulated, logits);
  Tensor grad_exponent = empty(need_exponent ? arguments.batch : none, accumulated, logits);
  Tensor grad_smoothing = empty(need_smoothing ? arguments.batch : none, accumulated, logits);
  if (need_logits) a.grad_logits = grad_logits.mutable_data_ptr();
  if (need_shift) a.grad_shift = grad_shift.mutable_data_ptr();
  if (need_exponent) a.grad_exponent = grad_exponent.mutable_data_ptr();
  if (need_smoothing) a.grad_smoothing = grad_smoothing.mutable_data_ptr();
#ifdef LOSSMETA_BACKEND_CUDA
  const Tensor scratch = empty({adjusted_cross_entropy_scratch(a, true)}, ScalarType::Byte, logits);
  a.scratch = scratch.mutable_data_ptr();
#endif
  LOSSMETA_RUN(adjusted_cross_entropy_backward, a, logits);
  return {grad_logits, grad_shift, grad_exponent, grad_smoothing};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "adjusted_cross_entropy(Tensor logits, Tensor labels, Tensor? shift, Tensor? exponent, Tensor? "
      "smoothing, int ignore_index, bool with_slope) -> (Tensor loss, Tensor slope, Tensor derivatives)");
  m.def(
      "adjusted_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? shift, Tensor? "
      "exponent, Tensor? smoothing, int ignore_index, bool with_slope, Tensor slope, Tensor derivatives, "
      "bool need_logits, bool need_shift, bool need_exponent, bool need_smoothing) "
      "-> (Tensor grad_logits, Tensor grad_shift, Tensor grad_exponent, Tensor grad_smoothing)");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("adjusted_cross_entropy", TORCH_BOX(&forward));
  m.impl("adjusted_cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace lossmeta
