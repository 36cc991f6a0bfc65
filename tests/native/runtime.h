// What the kernels need around them in the native tests: threads and the choice of instruction set.
#pragma once

#include <vector>

#include "base/kernel.h"

namespace lossmeta::native {

void set_threads(int count);
void set_isa(Isa isa);
std::vector<Isa> supported_isas();

}  // namespace lossmeta::native
