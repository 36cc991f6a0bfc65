#include "math/loss_network.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "loss_network";
enum Link : int64_t { identity, softmax, sigmoid };  // as LINKS of lossmeta/ops/loss_network.py

// Checks the arguments that forward and backward share and fills in the problem.
struct Arguments {
  LossNetwork a{};
  Tensor pred, target, weights[3];
  ScalarType accumulated;

  Arguments(const Tensor& pred_, const Tensor& target_, const Tensor& input_weight,
            const Tensor& hidden_weight, const Tensor& output_weight, int64_t link, bool smooth, double leak,
            double smoothness, bool softplus, int64_t ignore_index, int64_t table_size)
      : pred(pred_), target(target_), weights{input_weight, hidden_weight, output_weight} {
    a.dtype = float_dtype(pred, op, "pred");
    accumulated = accumulation_type(a.dtype);
    LOSSMETA_CHECK(link >= identity && link <= sigmoid, op, ": link must be 0, 1 or 2, got ", link);
    a.softmax = link == softmax;
    a.sigmoid = link == sigmoid;
    a.smooth = smooth;
    a.softplus = softplus;
    a.leak = leak;
    a.smoothness = smoothness;
    a.ignore_index = ignore_index;
    LOSSMETA_CHECK(pred.dim() == 2 && pred.size(1) > 0, op,
                   ": pred must be [N, C] with at least one column, got ", shape(pred));
    // A label on its own is a row.
    a.samples = a.sigmoid ? pred.size(0) * pred.size(1) : pred.size(0);
    a.classes = a.sigmoid ? 1 : pred.size(1);
    check_same_device(target, pred, op, "target", "pred");
    const bool indices = target.scalar_type() == ScalarType::Long;
    if (indices && a.sigmoid) {
      LOSSMETA_CHECK(sizes(target) == sizes(pred), op, ": labels must have the shape of pred, ", shape(pred),
                     ", got ", shape(target));
    } else if (indices) {
      LOSSMETA_CHECK(target.dim() == 1 && target.size(0) == a.samples, op, ": class indices must be [",
                     a.samples, "], got ", shape(target));
    } else {
      LOSSMETA_CHECK(is_float(target), op, ": target must be class indices (int64) or floating-point, got ",
                     dtype_name(target));
      LOSSMETA_CHECK(sizes(target) == sizes(pred), op, ": a dense target must have the shape of pred, ",
                     shape(pred), ", got ", shape(target));
    }
    static const char* const names[] = {"input_weight", "hidden_weight", "output_weight"};
    for (int k = 0; k < 3; ++k) {
      float_dtype(weights[k], op, names[k]);
      check_same_device(weights[k], pred, op, names[k], "pred");
    }
    LOSSMETA_CHECK(input_weight.dim() == 2 && input_weight.size(1) == 2 && input_weight.size(0) > 0, op,
                   ": input_weight must be [H, 2], got ", shape(input_weight));
    a.width = input_weight.size(0);
    LOSSMETA_CHECK(
        hidden_weight.dim() == 2 && hidden_weight.size(0) == a.width && hidden_weight.size(1) == a.width, op,
        ": hidden_weight must be [H, H] with H = ", a.width, ", got ", shape(hidden_weight));
    LOSSMETA_CHECK(output_weight.dim() == 2 && output_weight.size(0) == 1 && output_weight.size(1) == a.width,
                   op, ": output_weight must be [1, H] with H = ", a.width, ", got ", shape(output_weight));
    pred = packed(pred);
    a.pred = pred.const_data_ptr();
    if (indices) {
      target = packed(target);
      a.labels = static_cast<const int64_t*>(target.const_data_ptr());
      check_labels(a.labels, a.samples, a.sigmoid ? 2 : a.classes, ignore_index, op);
    } else {
      target = packed_as(target, accumulated);
      a.target = target.const_data_ptr();
    }
    for (Tensor& weight : weights) weight = packed_as(weight, accumulated);
    a.input_weight = weights[0].const_data_ptr();
    a.hidden_weight = weights[1].const_data_ptr();
    a.output_weight = weights[2].const_data_ptr();
#ifdef LOSSMETA_BACKEND_CUDA
    LOSSMETA_CHECK(a.width <= loss_network_cuda_width(a.dtype), op, ": on CUDA the width H must be at most ",
                   loss_network_cuda_width(a.dtype), ", got ", a.width);
#endif
    LOSSMETA_CHECK(table_size == 0 ||
                       (table_size >= loss_network_min_intervals && table_size <= loss_network_max_intervals),
                   op, ": table_size must lie in [", loss_network_min_intervals, ", ",
                   loss_network_max_intervals, "], got ", table_size);
    const bool tabulates =
        table_size > 0 && indices && link != identity && smooth &&
        a.samples * a.classes >= loss_network_elements_per_node * loss_network_nodes(table_size);
    a.intervals = tabulates ? table_size : 0;
#ifdef LOSSMETA_BACKEND_CUDA
    if (!a.intervals) return;
    const int64_t fitting = on_device(op, pred, [&] { return cuda::loss_network_intervals(a.dtype); });
    LOSSMETA_CHECK(a.intervals <= fitting, op, ": on this device table_size must be at most ", fitting,
                   " for ", dtype_name(pred), ", got ", table_size);
#endif
  }

  // Of the loss.
  std::vector<int64_t> rows() const { return a.sigmoid ? sizes(pred) : std::vector<int64_t>{a.samples}; }

  std::vector<int64_t> table_sizes() const {
    return {a.intervals ? loss_network_table_size(a.intervals) : 0};
  }

  // A table that an earlier forward returned; what is returned here must live as long as it is read.
  Tensor take_table(const Tensor& table, const char* name) {
    LOSSMETA_CHECK(
        table.dim() == 1 && table.size(0) == table_sizes()[0] && table.scalar_type() == accumulated, op, ": ",
        name, " must be the one that the forward returned for these arguments");
    check_same_device(table, pred, op, name, "pred");
    Tensor kept = packed(table);
    if (a.intervals) a.table = const_cast<void*>(kept.const_data_ptr());
    return kept;
  }

  static bool is_float(const Tensor& t) {
    const ScalarType s = t.scalar_type();
    return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 ||
           s == ScalarType::Half;
  }
};

// Scratch of the CUDA kernels; the CPU kernels have their own.
std::optional<Tensor> workspace([[maybe_unused]] LossNetwork& a, [[maybe_unused]] ScalarType accumulated,
                                [[maybe_unused]] const Tensor& like) {
#ifdef LOSSMETA_BACKEND_CUDA
  const int64_t size = on_device(op, like, [&] { return cuda::loss_network_workspace(a); });
  if (!size) return std::nullopt;
  Tensor scratch = empty({size}, accumulated, like);
  a.workspace = scratch.mutable_data_ptr();
  return scratch;
#else
  return std::nullopt;
#endif
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& pred, const Tensor& target,
                                           const Tensor& input_weight, const Tensor& hidden_weight,
                                           const Tensor& output_weight,
                                           const std::optional<Tensor>& kept_table, int64_t link, bool smooth,
                                           double leak, double smoothness, bool softplus,
                                           int64_t ignore_index, int64_t table_size) {
  Arguments arguments(pred, target, input_weight, hidden_weight, output_weight, link, smooth, leak,
                      smoothness, softplus, ignore_index, table_size);
  LossNetwork& a = arguments.a;
  Tensor loss = empty(arguments.rows(), arguments.accumulated, pred);
  Tensor slope = empty(sizes(pred), arguments.accumulated, pred);
  const bool tabulates = a.intervals && !kept_table;
  Tensor table =
      empty(tabulates ? arguments.table_sizes() : std::vector<int64_t>{0}, arguments.accumulated, pred);
  a.loss = loss.mutable_data_ptr();
  a.slope = slope.mutable_data_ptr();
  const auto scratch = workspace(a, arguments.accumulated, pred);
  std::optional<Tensor> kept;
  if (kept_table) kept = arguments.take_table(*kept_table, "kept_table");
  if (tabulates) {
    a.table = table.mutable_data_ptr();
    LOSSMETA_RUN(loss_network_tabulate, a, pred);
  }
  if (a.intervals) LOSSMETA_RUN(loss_network_table_forward, a, pred);
  LOSSMETA_RUN(loss_network_forward, a, pred);
  return {loss, slope, table};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_slope, const Tensor& pred,
    const Tensor& target, const Tensor& input_weight, const Tensor& hidden_weight,
    const Tensor& output_weight, const std::optional<Tensor>& kept_table, int64_t link, bool smooth,
    double leak, double smoothness, bool softplus, int64_t ignore_index, int64_t table_size,
    const Tensor& table, bool need_pred, bool need_input_weight, bool need_hidden_weight,
    bool need_output_weight) {
  Arguments arguments(pred, target, input_weight, hidden_weight, output_weight, link, smooth, leak,
                      smoothness, softplus, ignore_index, table_size);
  LossNetwork& a = arguments.a;
  const ScalarType accumulated = arguments.accumulated;
  std::optional<Tensor> dense_loss, dense_slope;
  if (grad_loss) {
    LOSSMETA_CHECK(sizes(*grad_loss) == arguments.rows(), op,
                   ": grad_loss must have the shape of the loss, got ", shape(*grad_loss));
    dense_loss = packed_as(*grad_loss, accumulated);
    a.grad_loss = dense_loss->const_data_ptr();
  }
  if (grad_slope) {
    LOSSMETA_CHECK(sizes(*grad_slope) == sizes(pred), op, ": grad_slope must have the shape of pred, ",
                   shape(pred), ", got ", shape(*grad_slope));
    dense_slope = packed_as(*grad_slope, accumulated);
    a.grad_slope = dense_slope->const_data_ptr();
  }
  const Tensor kept =
      kept_table ? arguments.take_table(*kept_table, "kept_table") : arguments.take_table(table, "table");

  const bool need_weights = need_input_weight || need_hidden_weight || need_output_weight;
  const auto none = std::vector<int64_t>{0};
  Tensor grad_pred = empty(need_pred ? sizes(pred) : none, pred.scalar_type(), pred);
  Tensor grads[] = {empty(need_weights ? std::vector<int64_t>{a.width, 2} : none, accumulated, pred),
                    empty(need_weights ? std::vector<int64_t>{a.width, a.width} : none, accumulated, pred),
                    empty(need_weights ? std::vector<int64_t>{1, a.width} : none, accumulated, pred)};
  if (need_pred) a.grad_pred = grad_pred.mutable_data_ptr();
  if (need_weights) {
    a.grad_input_weight = grads[0].mutable_data_ptr();
    a.grad_hidden_weight = grads[1].mutable_data_ptr();
    a.grad_output_weight = grads[2].mutable_data_ptr();
  }
  if (need_pred || need_weights) {
    const auto scratch = workspace(a, accumulated, pred);
    if (a.intervals) LOSSMETA_RUN(loss_network_table_backward, a, pred);
    LOSSMETA_RUN(loss_network_backward, a, pred);
  }
  // The kernels give all three or none; what was not asked for is not returned.
  const bool need[] = {need_input_weight, need_hidden_weight, need_output_weight};
  for (int k = 0; k < 3; ++k)
    if (need_weights && !need[k]) grads[k] = empty(none, accumulated, pred);
  return {grad_pred, grads[0], grads[1], grads[2]};
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def(
      "loss_network(Tensor pred, Tensor target, Tensor input_weight, Tensor hidden_weight, Tensor "
      "output_weight, "
      "Tensor? kept_table, int link, bool smooth, float leak, float smoothness, bool softplus, int "
      "ignore_index, int "
      "table_size) "
      "-> (Tensor loss, Tensor slope, Tensor table)");
  m.def(
      "loss_network_backward(Tensor? grad_loss, Tensor? grad_slope, Tensor pred, Tensor target, Tensor "
      "input_weight, "
      "Tensor hidden_weight, Tensor output_weight, Tensor? kept_table, int link, bool smooth, float leak, "
      "float smoothness, "
      "bool softplus, int ignore_index, int table_size, Tensor table, bool need_pred, bool "
      "need_input_weight, "
      "bool need_hidden_weight, bool need_output_weight) "
      "-> (Tensor grad_pred, Tensor grad_input_weight, Tensor grad_hidden_weight, Tensor "
      "grad_output_weight)");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("loss_network", TORCH_BOX(&forward));
  m.impl("loss_network_backward", TORCH_BOX(&backward));
}

}  // namespace lossmeta
