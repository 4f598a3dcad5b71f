#include "core/rows.hpp"

#include <cstring>

#include "core/planes.hpp"
#include "core/width.hpp"

namespace matquant {
namespace {

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_bf16(std::uint16_t bits) { return from_bits(static_cast<std::uint32_t>(bits) << 16); }

float from_f16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7FFF;
  // The exponent's bias is 15 instead of 127: shifted into place, the value is too small by 2^112.
  const float magnitude = from_bits(rest << 13) * from_bits((127 + 112) << 23);
  return (sign != 0 ? -1.0f : 1.0f) * magnitude;  // infinities are never stored
}

struct ScaleAndZero {
  float scale, zero;  // of the integers of a width
};

ScaleAndZero affine_of(const Affine& affine, int groups, int row, int group) {
  const std::size_t index = static_cast<std::size_t>(row / BLOCK_ROWS) * groups + group;
  const std::size_t at = index * (affine.one_zero ? 1 : 2) * BLOCK_ROWS + row % BLOCK_ROWS;
  float scale, zero = affine.zero;
  if (affine.half) {
    const auto* values = static_cast<const std::uint16_t*>(affine.values) + at;
    scale = from_bf16(values[0]);
    if (!affine.one_zero) zero = from_f16(values[BLOCK_ROWS]);
  } else {
    const auto* values = static_cast<const float*>(affine.values) + at;
    scale = values[0];
    if (!affine.one_zero) zero = values[BLOCK_ROWS];
  }
  return {scale * affine.step, (zero - affine.centre) / affine.step};
}

}  // namespace

void read_row(const Linear& weight, int bits, int row, float factor, float* out) {
  const Width width = width_of(bits, weight.rule, weight.grid);
  const int groups = weight.cols / weight.group;
  int group = -1;
  ScaleAndZero affine{};
  for (int first = 0; first < weight.cols; first += TILE_INPUTS) {
    std::uint8_t codes[TILE_INPUTS];
    unpack_tile(weight.plane, weight.cols, row, first / TILE_INPUTS, width.read, codes);
    const int stop = weight.cols - first < TILE_INPUTS ? weight.cols : first + TILE_INPUTS;
    for (int col = first; col < stop; ++col) {
      if (col / weight.group != group) {
        group = col / weight.group;
        affine = affine_of(weight.affine[bits], groups, row, group);
      }
      const auto integer = static_cast<float>(integer_of(codes[col - first], bits, weight.rule, weight.grid));
      out[col] = affine.scale * (integer - affine.zero) * factor;
    }
  }
}

}  // namespace matquant
