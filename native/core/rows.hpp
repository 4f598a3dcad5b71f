// One row of a nested weight as floats: what an embedding looks up.
#pragma once

#include "core/linear.hpp"

namespace matquant {

// Writes weight[row] [cols] at `bits` bits, times `factor`. Requires serves(weight, bits). Equal to
// NestedTensor.read(bits)[row] * factor in float32, bit for bit, on every machine.
void read_row(const Linear& weight, int bits, int row, float factor, float* out);

}  // namespace matquant
