// Matrix products with nested weights: y = x W_r^T, the weights read at r bits from bit planes, the width an argument.
//
// A weight is scale_r * (p_r - zero_r), p_r an integer: the code sliced from the stored one by a rule of nest.py, or what
// the grid gives for it (nest.integer_positions). Activations are int8 per token and group of 128 inputs (dynamic,
// symmetric), or float ("exact"). Per token, row and group of inputs
//
//     y += scale_r * (sum_segments x_scale * (sum (p_r - c) * x_code)  -  (zero_r - c) * sum_segments x_scale * sum x_code)
//
// with c the middle of the integers, 2^(r-1) of codes, their sums in integers and everything outside them in float32,
// multiplied before it is added, in one order. So a result depends neither on the instruction set nor on the number of threads nor on the other
// tokens of the batch. The exact mode has x instead of x_scale * x_code, in float32.
//
// Nothing here allocates, locks, or opens a parallel region. Every thread of a team calls prepare() and linear() with
// the same arguments and its own number, and does its share; the barriers (after prepare, before y is read or the input
// is written again) are the caller's. Outside a team the defaults do all of the work.
#pragma once

#include "core/layout.hpp"

namespace matquant {

enum class Rule : int { prefix, round, extra };
enum class Grid : int { uniform, companded };
enum class Activations : int { int8, exact };

// Scales and zeros of one width: scale_r = scale * step, zero_r = (zero - centre) / step. The step is a power of two.
struct Affine {
  const void* values;  // [ceil(rows / 16)][groups][2][16]: 16 scales, then 16 zeros; null if the width is not served
  bool half;           // scales in bfloat16 and zeros in float16, otherwise both in float32
  float step;
  float centre;
};

// One nested weight [rows, cols]. Owns nothing.
struct Linear {
  int rows;
  int cols;
  int group;          // inputs per scale: a divisor of cols, cols itself when per channel
  Rule rule;
  Grid grid;          // other than uniform: of rule prefix
  int resident_bits;  // top bits held in planes: 2, 3, 4, 6 or 8
  const std::uint8_t* plane[PLANE_COUNT];  // most significant first, null beyond resident_bits (planes.hpp)
  Affine affine[9];   // by width 1..8
};

// Top bits of the code that a width reads: 2, 3, 4, 6 or 8. `round` and `extra` also need bit r + 1.
int bits_read(int bits, Rule rule);
// Whether the planes and the affine that `bits` needs are there.
bool serves(const Linear& weight, int bits);

// The activations of some tokens, made once for all weights that read them. A view of a caller's workspace.
struct Input {
  int tokens;
  int cols;
  Activations activations;
  int panel;                 // tokens interleaved: 1, 2, 4 or 8 (padded with zeros)
  std::int8_t* codes;        // [panels][padded / 4][panel][4]
  float* scales;             // [panels][padded / 128][panel]
  std::int32_t* code_sums;   // [panels][padded / 32][panel]
  std::int32_t* group_sums;  // [panels][padded / 128][panel]
  float* values;             // [panels][padded][panel]    (exact)
  float* value_sums;         // [panels][padded / 32][panel]    (exact)
};

// Bytes of the workspace of an Input, a multiple of 64. Monotone in tokens and cols.
std::size_t input_bytes(int tokens, int cols, Activations activations);
// The view; `workspace` is 64-byte aligned and has input_bytes(tokens, cols, activations). Costs nothing.
Input make_input(void* workspace, int tokens, int cols, Activations activations);
// Fill it from x [tokens, cols]. A token with NaN or infinity gives NaN or infinity.
void prepare(const Input& input, const float* x, int thread = 0, int threads = 1);

// y[token * y_stride + row] for all rows of the weight. Requires serves(weight, bits) and input.cols == weight.cols.
void linear(const Linear& weight, int bits, const Input& input, float* y, std::ptrdiff_t y_stride, int thread = 0,
            int threads = 1);

// The instruction set that serves, "scalar", "avx2", "avx512" or "neon": the best one of the machine, or the one that
// MATQUANT_ISA names. Throws std::invalid_argument if that one is unknown or cannot run here.
const char* isa();

}  // namespace matquant
