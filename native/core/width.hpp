// How the kernels read a width from the planes: which bits, how they are sliced, which integers they stand for.
#pragma once

#include "core/linear.hpp"

namespace matquant {

// Upper bound of the bytes of a product; it decides how many products fit in 16 bits.
enum class Range { to_4, to_16, to_32, to_64, to_128, any };

// Lookup tables for the integers of a companded width. With n the top four bits of the code, by the bits read:
//     2       top[n] for the upper two bits of a nibble that holds two codes, rest[n] for the lower two
//     3, 4    top[n]
//     6       (top[n] << lift) + rest[the first two and the last two of the six bits]
//     8       (top[n] << lift) + m +- rest[m], with m = the last four bits & rest_mask and the sign of sign[n]
// or, by an index i of six bits,
//     2       by_six[j][i] for the code in the bits 2j and 2j + 1 of i
//     3, 4    by_six[0][i], n = the last four bits of i
//     6       by_six[0][i], n = the last four bits of i, the last two of the code = the first two of i
//     8       by_six[0][i] for the first six bits, in the order of 6, + by_six[1][i], where the last four bits of i are
//             the first two and the last two of the code
struct Tables {
  int centre;   // copied to Width, as is the range
  Range range;
  int lift;
  std::uint8_t top[16], top_lifted[16], rest[16], sign[16], rest_mask[16];
  std::uint8_t by_six[3][64];
};

// The top `read` bits of the code are loaded. On the uniform grid
//     slice = min(((top >> shift) & mask) + ((top >> round_shift) & round_mask), cap)
// On other grids the integer is looked up in `tables`.
struct Width {
  int bits;
  int read;
  bool sliced;  // false: the `read` bits are the code
  int shift, mask, round_shift, round_mask, cap;
  const Tables* tables;  // null: the code is the integer
  int centre;            // subtracted from the integers
  Range range;           // of the integers
};

// The integer that an 8-bit code, of which the bits read are given, stands for at a width.
int integer_of(int code, int bits, Rule rule, Grid grid);

Width width_of(int bits, Rule rule, Grid grid = Grid::uniform);

}  // namespace matquant
