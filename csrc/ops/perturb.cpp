#include "math/perturb.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "perturb";

// Checks the inputs and fills in the problem.
struct Arguments {
  Perturb a{};
  Tensor base, directions, coefficients;

  Arguments(const Tensor& base_, const Tensor& directions_, const Tensor& coefficients_)
      : base(base_), directions(directions_), coefficients(coefficients_) {
    a.dtype = float_dtype(base, op, "base");
    LOSSMETA_CHECK(base.dim() == 1, op, ": base must be [P], got ", shape(base));
    LOSSMETA_CHECK(directions.scalar_type() == base.scalar_type(), op,
                   ": directions must have the dtype of base, ", dtype_name(base), ", got ",
                   dtype_name(directions));
    float_dtype(coefficients, op, "coefficients");
    check_same_device(directions, base, op, "directions", "base");
    check_same_device(coefficients, base, op, "coefficients", "base");
    a.parameters = base.size(0);
    LOSSMETA_CHECK(directions.dim() == 2 && directions.size(1) == a.parameters, op,
                   ": directions must be [K, ", a.parameters, "], got ", shape(directions));
    a.directions_count = directions.size(0);
    LOSSMETA_CHECK(coefficients.dim() == 2 && coefficients.size(1) == a.directions_count, op,
                   ": coefficients must be [B, ", a.directions_count, "], got ", shape(coefficients));
    a.points = coefficients.size(0);
    base = packed(base);
    directions = packed(directions);
    coefficients = packed_as(coefficients, accumulation_type(a.dtype));
    a.base = base.const_data_ptr();
    a.directions = directions.const_data_ptr();
    a.coefficients = coefficients.const_data_ptr();
  }
};

Tensor perturb(const Tensor& base, const Tensor& directions, const Tensor& coefficients) {
  Arguments arguments(base, directions, coefficients);
  Perturb& a = arguments.a;
  Tensor out = empty({a.points, a.parameters}, base.scalar_type(), base);
  a.out = out.mutable_data_ptr();
  a.out_stride = a.parameters;
  LOSSMETA_RUN(perturb, a, base);
  return out;
}

// Whether a row of out shares memory with the smallest range that holds the input.
bool overlaps(const Tensor& out, const Tensor& input) {
  if (out.numel() == 0 || input.numel() == 0) return false;
  const auto begin = uintptr_t(input.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < input.dim(); ++d) last += (input.size(d) - 1) * input.stride(d);
  const auto end = begin + uintptr_t((last + 1) * input.element_size());
  const auto row = uintptr_t(out.const_data_ptr());
  const auto row_bytes = uintptr_t(out.size(1) * out.element_size());
  const auto step = uintptr_t(out.stride(0) * out.element_size());
  for (int64_t b = 0; b < out.size(0); ++b)
    if (row + b * step < end && begin < row + b * step + row_bytes) return true;
  return false;
}

void perturb_out(const Tensor& base, const Tensor& directions, const Tensor& coefficients, Tensor out) {
  Arguments arguments(base, directions, coefficients);
  Perturb& a = arguments.a;
  LOSSMETA_CHECK(out.scalar_type() == base.scalar_type(), op, ": out must have the dtype of base, ",
                 dtype_name(base), ", got ", dtype_name(out));
  check_same_device(out, base, op, "out", "base");
  LOSSMETA_CHECK(out.dim() == 2 && out.size(0) == a.points && out.size(1) == a.parameters, op,
                 ": out must be [", a.points, ", ", a.parameters, "], got ", shape(out));
  LOSSMETA_CHECK(
      (a.parameters <= 1 || out.stride(1) == 1) && (a.points <= 1 || out.stride(0) >= a.parameters), op,
      ": the rows of out must be contiguous and apart, got strides [", out.stride(0), ", ", out.stride(1),
      "]");
  const std::pair<const char*, const Tensor*> inputs[] = {
      {"base", &base}, {"directions", &directions}, {"coefficients", &coefficients}};
  for (const auto& [name, input] : inputs)
    LOSSMETA_CHECK(!overlaps(out, *input), op, ": out must not share memory with ", name,
                   "; pass a tensor of its own");
  a.out = out.mutable_data_ptr();
  a.out_stride = a.points <= 1 ? a.parameters : out.stride(0);
  LOSSMETA_RUN(perturb, a, base);
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def("perturb(Tensor base, Tensor directions, Tensor coefficients) -> Tensor");
  m.def("perturb_out(Tensor base, Tensor directions, Tensor coefficients, Tensor(a!) out) -> ()");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_out", TORCH_BOX(&perturb_out));
}

}  // namespace lossmeta
