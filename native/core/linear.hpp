// Matrix products with nested weights: y = x W_r^T, with the weights read at r bits from bit planes; r is an argument.
//
// A weight is scale_r * (p_r - zero_r). The integer p_r is the slice of the stored code by a rule of nest.py, or the
// position of that slice on the grid (nest.integer_positions). Activations are int8 per token and group of 128 inputs
// (dynamic, symmetric), or of 64 where the groups of the weights are no larger, or float ("exact"). For each token, row
// and group of inputs
//
//     y += scale_r * sum_segments (x_scale * (sum (p_r - c) * x_code) + (c - zero_r) * x_scale * sum x_code)
//
// where c is the middle of the integers, 2^(r-1) for codes. The inner sums are integers. Everything else is float32
// with fused multiply-adds in a fixed order: results do not depend on the instruction set, the number of threads or the
// other tokens of the batch. The exact mode has x in place of x_scale * x_code, in float32.
//
// Nothing here allocates, locks or starts threads. Every thread of a team calls prepare() and linear() with the same
// arguments and its own number, and does its share. The caller provides the barriers: after prepare(), and before y is
// read or the input is written again. With the defaults a single thread does all of the work.
#pragma once

#include <string>
#include <vector>

#include "core/layout.hpp"

namespace matquant {

enum class Rule : int { prefix, round, extra };
enum class Grid : int { uniform, companded };
enum class Activations : int { int8, exact };

// Scales and zero-points of a width: scale_r = scale * step, zero_r = (zero - centre) / step. The step is a power of
// two.
struct Affine {
  const void* values;  // [ceil(rows / 16)][groups][2][16]: 16 scales, 16 zero-points; null: the width is not available
  bool half;           // scales in bfloat16 and zero-points in float16, otherwise both in float32
  float step;
  float centre;
  bool one_zero;  // all zero-points are `zero`, and values has none: [ceil(rows / 16)][groups][16]
  float zero;
};

// A nested weight [rows, cols]. It owns none of its memory.
struct Linear {
  int rows;
  int cols;
  int group;          // inputs per scale: a divisor of cols; cols itself is per-channel
  Rule rule;
  Grid grid;          // grids other than uniform need the rule prefix
  int resident_bits;  // top bits held in planes: 2, 3, 4, 6 or 8
  const std::uint8_t* plane[PLANE_COUNT];  // most significant first, null beyond resident_bits (planes.hpp)
  Affine affine[9];   // by width 1..8
};

// Top bits of the code that a width reads: 2, 3, 4, 6 or 8. `round` and `extra` also need bit r + 1.
int bits_read(int bits, Rule rule);
// True if the planes and the affine that `bits` needs are in memory.
bool serves(const Linear& weight, int bits);

// The activations of some tokens, prepared once for all weights that read them. A view of the caller's workspace.
struct Input {
  int tokens;
  int cols;
  Activations activations;
  int group;                 // inputs that share a scale: 64 or 128
  int panel;                 // tokens interleaved: 1, 2, 4, 8 or, for matrix registers, 16 (padded with zeros)
  std::int8_t* codes;        // [panels][padded / 4][panel][4]; [panels][padded / 64][16][64]
  float* scales;             // [panels][padded / group][panel]
  std::int32_t* code_sums;   // [panels][padded / 32][panel]
  std::int32_t* group_sums;  // [panels][padded / group][panel]
  float* values;             // [panels][padded][panel]    (exact)
  float* value_sums;         // [panels][padded / 32][panel]    (exact)
};

// The group of the activations that a weight is multiplied with: groups of 64 have half the error of 128, and cost
// nothing where sums end with every 64 inputs anyway.
int activation_group(const Linear& weight);
// Tokens rounded up to whole panels, which take as long.
int padded_tokens(int tokens, Activations activations);
// Workspace bytes of an Input, a multiple of 64. Monotone in tokens and cols.
std::size_t input_bytes(int tokens, int cols, Activations activations);
// Returns the view. `workspace` is 64-byte aligned and has input_bytes(tokens, cols, activations). group: 64 or 128.
Input make_input(void* workspace, int tokens, int cols, Activations activations, int group);
// Fills it from x [tokens, cols]. NaN and infinity in a token reach its results.
void prepare(const Input& input, const float* x, int thread = 0, int threads = 1);

// Writes y[token * y_stride + row] for all rows of the weight. Requires serves(weight, bits) and input.cols ==
// weight.cols.
void linear(const Linear& weight, int bits, const Input& input, float* y, std::ptrdiff_t y_stride, int thread = 0,
            int threads = 1);

// The instruction set in use. It is the best of the machine unless MATQUANT_ISA names another. Throws
// std::invalid_argument if that name is unknown or the machine lacks the instructions.
const char* isa();
// The instruction sets of this machine, best first.
std::vector<std::string> isas();

}  // namespace matquant
