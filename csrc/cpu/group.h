// Samples by class: what makes sums per class deterministic, parallel over classes and free of a C x C scratch.
#pragma once

#include "cpu/buffer.h"

namespace lossmeta::LOSSMETA_ISA {

// order[offsets[c] .. offsets[c + 1]) are the samples of class c, ascending. Labels outside [0, classes) are left out.
struct Groups {
  Buffer<int64_t> offsets, order;

  Groups(const int64_t* labels,  // [count]
         int64_t count, int64_t classes)
      : offsets(classes + 1), order(count) {
    for (int64_t c = 0; c <= classes; ++c) offsets[c] = 0;
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] >= 0 && labels[i] < classes) ++offsets[labels[i]];
    for (int64_t c = 0, start = 0; c <= classes; ++c) {
      const int64_t size = offsets[c];
      offsets[c] = start;
      start += size;
    }
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] >= 0 && labels[i] < classes) order[offsets[labels[i]]++] = i;
    // Each offset now stands at the end of its class: the start of the next.
    for (int64_t c = classes; c > 0; --c) offsets[c] = offsets[c - 1];
    offsets[0] = 0;
  }
};

}  // namespace lossmeta::LOSSMETA_ISA
