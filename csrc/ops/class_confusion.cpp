#include "math/class_confusion.h"

#include "ops/common.h"

namespace lossmeta {
namespace {

constexpr const char* op = "class_confusion";

// Checks what both forms share and fills in the problem.
struct Arguments {
  ClassConfusion a{};
  Tensor logits, labels;

  Arguments(const Tensor& logits_, const Tensor& labels_, int64_t ignore_index)
      : logits(logits_), labels(labels_) {
    a.dtype = float_dtype(logits, op, "logits");
    LOSSMETA_CHECK(logits.dim() == 2 && logits.size(1) > 0, op,
                   ": logits must be [N, C] with at least one class, got ", shape(logits));
    a.samples = logits.size(0);
    a.classes = logits.size(1);
    a.ignore_index = ignore_index;
    LOSSMETA_CHECK(labels.scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
                   dtype_name(labels));
    check_same_device(labels, logits, op, "labels", "logits");
    LOSSMETA_CHECK(labels.dim() == 1 && labels.size(0) == a.samples, op, ": labels must be [", a.samples,
                   "], got ", shape(labels));
    labels = packed(labels);
    a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    check_labels(a.labels, a.samples, a.classes, ignore_index, op);
    logits = packed(logits);
    a.logits = logits.const_data_ptr();
  }

  void run(const Tensor& sums, const Tensor& counts, bool accumulate) {
    a.accumulate = accumulate;
    a.sums = static_cast<double*>(sums.mutable_data_ptr());
    a.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
#ifdef LOSSMETA_BACKEND_CUDA
    const Tensor scratch = empty({class_confusion_scratch(a.samples, a.classes)}, ScalarType::Byte, logits);
    a.scratch = scratch.mutable_data_ptr();
#endif
    LOSSMETA_RUN(class_confusion, a, logits);
  }
};

std::tuple<Tensor, Tensor> class_confusion(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  Arguments arguments(logits, labels, ignore_index);
  const int64_t classes = arguments.a.classes;
  Tensor sums = empty({classes, classes}, ScalarType::Double, logits);
  Tensor counts = empty({classes}, ScalarType::Long, logits);
  arguments.run(sums, counts, false);
  return {sums, counts};
}

void class_confusion_(Tensor sums, Tensor counts, const Tensor& logits, const Tensor& labels,
                      int64_t ignore_index) {
  Arguments arguments(logits, labels, ignore_index);
  const int64_t classes = arguments.a.classes;
  LOSSMETA_CHECK(sums.scalar_type() == ScalarType::Double, op, ": sums must be float64, got ",
                 dtype_name(sums));
  LOSSMETA_CHECK(counts.scalar_type() == ScalarType::Long, op, ": counts must be int64, got ",
                 dtype_name(counts));
  check_same_device(sums, logits, op, "sums", "logits");
  check_same_device(counts, logits, op, "counts", "logits");
  LOSSMETA_CHECK(sums.dim() == 2 && sums.size(0) == classes && sums.size(1) == classes, op,
                 ": sums must be [", classes, ", ", classes, "], got ", shape(sums));
  LOSSMETA_CHECK(counts.dim() == 1 && counts.size(0) == classes, op, ": counts must be [", classes, "], got ",
                 shape(counts));
  check_writable(sums, op, "sums");
  check_writable(counts, op, "counts");
  const Tensor dense_sums = packed(sums), dense_counts = packed(counts);
  arguments.run(dense_sums, dense_counts, true);
  if (!sums.is_contiguous()) torch::stable::copy_(sums, dense_sums);
  if (!counts.is_contiguous()) torch::stable::copy_(counts, dense_counts);
}

}  // namespace

LOSSMETA_DEFINE(m) {
  m.def("class_confusion(Tensor logits, Tensor labels, int ignore_index) -> (Tensor sums, Tensor counts)");
  m.def(
      "class_confusion_(Tensor(a!) sums, Tensor(b!) counts, Tensor logits, Tensor labels, int ignore_index) "
      "-> ()");
}

LOSSMETA_IMPLEMENT(m) {
  m.impl("class_confusion", TORCH_BOX(&class_confusion));
  m.impl("class_confusion_", TORCH_BOX(&class_confusion_));
}

}  // namespace lossmeta
