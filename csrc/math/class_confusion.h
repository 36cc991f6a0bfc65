// Class confusion (ALA, Eq. 7): sums[i, j] = sum over the samples of class i of -log softmax(x)_j, and their number.
// With m the maximum of a row, -log f_j = log sum exp(x - m) + (m - x_j): no term is negative, so nothing cancels.
#pragma once

#include "base/kernel.h"

namespace lossmeta {

struct ClassConfusion {
  DType dtype;      // of logits
  bool accumulate;  // adds to sums and counts; else overwrites them
  int64_t samples;  // N
  int64_t classes;  // C
  int64_t ignore_index;
  const void* logits;     // [N, C]
  const int64_t* labels;  // [N]
  double* sums;           // [C, C]
  int64_t* counts;        // [C]
  void* scratch;          // on the GPU, of class_confusion_scratch(N, C) bytes
};

// On the GPU few classes are summed in several parts, lest most of the device be idle.
inline int64_t class_confusion_parts(int64_t samples, int64_t classes) {
  const int64_t wanted = (512 + classes - 1) / classes, chunks = (samples + 255) / 256;
  return wanted < chunks ? wanted : chunks > 0 ? chunks : 1;
}

// Per part sums [C, C] and counts [C]; per class a counter; per sample a key and its place.
inline int64_t class_confusion_scratch(int64_t samples, int64_t classes) {
  const int64_t parts = class_confusion_parts(samples, classes);
  return (parts > 1 ? parts * classes * (classes + 1) * 8 : 0) + classes * 4 + samples * 6;
}

namespace math {

// Other labels are left out. On the GPU those are the bad ones too, which nobody has looked at before.
LOSSMETA_HD bool counts_label(int64_t label, int64_t classes, int64_t ignore_index) {
  return uint64_t(label) < uint64_t(classes) && label != ignore_index;
}

}  // namespace math
}  // namespace lossmeta

LOSSMETA_DECLARE_KERNEL(class_confusion, ClassConfusion)
