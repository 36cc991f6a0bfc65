#include "math/pwl_penalty.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "pwl_penalty";

// Checks the arguments that all forms share and fills in the problem.
struct Arguments {
  PwlPenalty a{};
  Tensor theta, knots, slopes;
  ScalarType accumulated, slope_type;

  Arguments(const Tensor& theta_, const Tensor& knots_, const Tensor& slopes_)
      : theta(theta_), knots(knots_), slopes(slopes_) {
    a.dtype = float_dtype(theta, op, "theta");
    accumulated = accumulation_type(a.dtype);
    slope_type = a.dtype == DType::float16 ? ScalarType::Float : theta.scalar_type();
    LOSSMETA_CHECK(theta.dim() == 1, op, ": theta must be [P], got ", shape(theta), "; pass .flatten()");
    a.parameters = theta.size(0);
    float_dtype(knots, op, "knots");
    check_same_device(knots, theta, op, "knots", "theta");
    LOSSMETA_CHECK(knots.dim() == 1, op, ": knots must be [X], got ", shape(knots));
    LOSSMETA_CHECK(knots.size(0) < INT32_MAX, op, ": knots must be fewer than 2^31, got ", knots.size(0));
    a.knots_count = int32_t(knots.size(0));
    float_dtype(slopes, op, "slopes");
    check_same_device(slopes, theta, op, "slopes", "theta");
    LOSSMETA_CHECK(slopes.dim() == 1 && slopes.size(0) == a.knots_count + 1, op, ": slopes must be [",
                   a.knots_count + 1, "], one more than knots, got ", shape(slopes));
    knots = packed_as(knots, accumulated);
    slopes = packed_as(slopes, accumulated);
    a.knots = knots.const_data_ptr();
    a.slopes = slopes.const_data_ptr();
    if (a.dtype == DType::float64)
      check_table<double>();
    else
      check_table<float>();
  }

  // In the precision in which theta is read. On CUDA looking would synchronise.
  template <class A>
  void check_table() const {
#ifndef LOSSMETA_BACKEND_CUDA
    const A *knot = static_cast<const A*>(a.knots), *slope = static_cast<const A*>(a.slopes);
    for (int64_t k = 0; k < a.knots_count; ++k) {
      LOSSMETA_CHECK(std::isfinite(knot[k]), op, ": knots must be finite in the precision of theta, got ",
                     knot[k], " at index ", k);
      LOSSMETA_CHECK(k == 0 || knot[k - 1] <= knot[k], op, ": knots must be sorted, got ", knot[k],
                     " at index ", k, " after ", knot[k - 1], "; sort them, and the slopes with them");
    }
    for (int64_t k = 0; k <= a.knots_count; ++k)
      LOSSMETA_CHECK(std::isfinite(slope[k]), op, ": slopes must be finite in the precision of theta, got ",
                     slope[k], " at index ", k);
#endif
  }

  // Runs the forward kernel: the slope is written, or added to `gradient`, or neither.
  Tensor run(const Tensor* slope, const Tensor* gradient) {
    const Tensor weights = packed(theta);
    a.theta = weights.const_data_ptr();
    Tensor value = empty({}, accumulated, theta);
    a.value = value.mutable_data_ptr();
    // Of no weights there is no memory, and none is wanted.
    a.slope = slope ? slope->mutable_data_ptr() : nullptr;
    a.gradient = gradient ? gradient->mutable_data_ptr() : nullptr;
#ifdef LOSSMETA_BACKEND_CUDA
    const Tensor scratch = empty({pwl_penalty_scratch(a)}, ScalarType::Byte, theta);
    a.scratch = scratch.mutable_data_ptr();
#endif
    LOSSMETA_RUN(pwl_penalty_forward, a, theta);
    return value;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& theta, const Tensor& knots, const Tensor& slopes,
                                   bool with_slope) {
  Arguments arguments(theta, knots, slopes);
  Tensor slope = empty({with_slope ? arguments.a.parameters : 0}, arguments.slope_type, theta);
  Tensor value = arguments.run(with_slope ? &slope : nullptr, nullptr);
  return {value, slope};
}

Tensor backward(const Tensor& grad, const Tensor& theta, const Tensor& knots, const Tensor& slopes, bool,
                const Tensor& slope_, bool need_theta) {
  Arguments arguments(theta, knots, slopes);
  PwlPenalty& a = arguments.a;
  LOSSMETA_CHECK(grad.dim() == 0, op, ": grad must be a number, got ", shape(grad));
  check_same_device(grad, theta, op, "grad", "theta");
  check_same_device(slope_, theta, op, "slope", "theta");
  if (!need_theta) return empty({0}, theta.scalar_type(), theta);
  Tensor slope = packed(slope_);
  if (slope.numel() == 0) {  // the forward was not asked for it
    slope = empty({a.parameters}, arguments.slope_type, theta);
    arguments.run(&slope, nullptr);
  }
  LOSSMETA_CHECK(
      slope.dim() == 1 && slope.numel() == a.parameters && slope.scalar_type() == arguments.slope_type, op,
      ": slope must be that which the forward returned for this theta");
  const Tensor factor = packed_as(grad, arguments.accumulated);
  Tensor gradient = empty({a.parameters}, theta.scalar_type(), theta);
  a.grad = factor.const_data_ptr();
  a.slope = const_cast<void*>(slope.const_data_ptr());
  a.gradient = gradient.mutable_data_ptr();
  LOSSMETA_RUN(pwl_penalty_backward, a, theta);
  return gradient;
}

// Whether the ranges of memory that hold two tensors [P] meet.
bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto end = [](const Tensor& t) {
    const int64_t last = t.dim() ? (t.size(0) - 1) * t.stride(0) : 0;
    return uintptr_t(t.const_data_ptr()) + uintptr_t((last + 1) * int64_t(t.element_size()));
  };
  return uintptr_t(a.const_data_ptr()) < end(b) && uintptr_t(b.const_data_ptr()) < end(a);
}

Tensor add(Tensor gradient, const Tensor& theta, const Tensor& knots, const Tensor& slopes) {
  Arguments arguments(theta, knots, slopes);
  LOSSMETA_CHECK(gradient.scalar_type() == theta.scalar_type(), op, ": add_to must have the dtype of theta, ",
                 dtype_name(theta), ", got ", dtype_name(gradient));
  check_same_device(gradient, theta, op, "add_to", "theta");
  LOSSMETA_CHECK(gradient.dim() == 1 && gradient.size(0) == arguments.a.parameters, op, ": add_to must be [",
                 arguments.a.parameters, "], as theta, got ", shape(gradient));
  check_writable(gradient, op, "add_to");
  const std::pair<const char*, const Tensor*> inputs[] = {
      {"theta", &theta}, {"knots", &knots}, {"slopes", &slopes}};
  for (const auto& [name, input] : inputs)
    LOSSMETA_CHECK(!overlap(gradient, *input), op, ": add_to must not share memory with ", name,
                   "; pass a tensor of its own");
  const Tensor dense = packed(gradient);
  Tensor value = arguments.run(nullptr, &dense);
  if (!gradient.is_contiguous()) torch::stable::copy_(gradient, dense);
  return value;
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "pwl_penalty(Tensor theta, Tensor knots, Tensor slopes, bool with_slope) -> (Tensor value, Tensor "
      "slope)");
  m.def(
      "pwl_penalty_backward(Tensor grad, Tensor theta, Tensor knots, Tensor slopes, bool with_slope, Tensor "
      "slope, bool need_theta) -> Tensor");
  m.def("pwl_penalty_(Tensor(a!) add_to, Tensor theta, Tensor knots, Tensor slopes) -> Tensor");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("pwl_penalty", TORCH_BOX(&forward));
  m.impl("pwl_penalty_backward", TORCH_BOX(&backward));
  m.impl("pwl_penalty_", TORCH_BOX(&add));
}

}  // namespace lossmeta
