// A nested weight with its definition in plain loops, and random numbers: what the native tests share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.hpp"
#include "core/planes.hpp"
#include "kernels/kernels.hpp"

namespace matquant {

inline std::uint32_t state = 1;
inline std::uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }
inline float draw_float() { return static_cast<float>(draw() % 20001) / 10000.0f - 1.0f; }

// nest.py
inline int slice(int code, int bits, Rule rule) {
  if (bits == 8) return code;
  const int top = code >> (8 - bits);
  if (rule == Rule::prefix) return top;
  const int rounded = top + (code >> (7 - bits) & 1);
  return rule == Rule::extra || rounded < 1 << bits ? rounded : (1 << bits) - 1;
}

// nest.position_table
inline double position(int code, int bits, Grid grid) {
  if (grid == Grid::uniform) return code;
  if (bits == 7) return (position(2 * code, 8, grid) + position(2 * code + 1, 8, grid) - 1) / 4;
  const double middle = ((1 << bits) - 1) / 2.0, distance = std::fabs(2 * (code - middle));
  const double bent = (3 * distance + 2 * std::fmax(0.0, distance - (1 << (bits - 1)))) / 8;
  const double exact = middle + (code < middle ? -bent : bent);
  return bits == 8 ? std::floor(exact + 0.5) : exact;
}

struct Case {
  int rows, cols, group, tokens;
};

struct Fixture {
  Case shape;
  Rule rule;
  std::vector<std::uint8_t> codes;
  std::vector<float> scale, zero, values, x;
  std::unique_ptr<Memory> memory[PLANE_COUNT];
  Linear linear{};

  Fixture(Case of, Rule by, Grid on = Grid::uniform) : shape(of), rule(by) {
    const int groups = shape.cols / shape.group, blocks = ceil_div(shape.rows, BLOCK_ROWS);
    codes.resize(static_cast<std::size_t>(shape.rows) * shape.cols);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(i < 256 ? i : draw());
    scale.resize(static_cast<std::size_t>(shape.rows) * groups);
    zero.resize(scale.size());
    values.resize(static_cast<std::size_t>(blocks) * groups * 2 * BLOCK_ROWS);
    for (int row = 0; row < shape.rows; ++row)
      for (int group = 0; group < groups; ++group) {
        const std::size_t at = static_cast<std::size_t>(row) * groups + group;
        scale[at] = 1.5f + draw_float();
        zero[at] = static_cast<float>(draw() % 256);
        float* to = &values[(static_cast<std::size_t>(row / BLOCK_ROWS) * groups + group) * 2 * BLOCK_ROWS];
        to[row % BLOCK_ROWS] = scale[at];
        to[BLOCK_ROWS + row % BLOCK_ROWS] = zero[at];
      }
    x.resize(static_cast<std::size_t>(shape.tokens) * shape.cols);
    for (float& value : x) value = draw_float();
    linear.rows = shape.rows;
    linear.cols = shape.cols;
    linear.group = shape.group;
    linear.rule = rule;
    linear.grid = on;
  }

  void pack_for(int bits, int threads) {
    linear.resident_bits = bits_read(bits, rule);
    std::uint8_t* plane[PLANE_COUNT] = {};
    for (int at = 0; at < PLANE_COUNT && BITS_UP_TO[at] <= linear.resident_bits; ++at) {
      memory[at] = std::make_unique<Memory>(plane_bytes(shape.rows, shape.cols, at), Pages::huge, at + 1);
      plane[at] = memory[at]->data();
    }
    for (int thread = 0; thread < threads; ++thread)
      pack(codes.data(), shape.cols, shape.rows, shape.cols, plane, thread, threads);
    std::copy(plane, plane + PLANE_COUNT, linear.plane);
    const float step = static_cast<float>(1 << (8 - bits));
    const float centre = rule == Rule::prefix ? (step - 1) / 2 : 0.0f;
    // nest.integer_positions: position = unit * integer + offset
    const bool codes = linear.grid == Grid::uniform || bits == 8;
    const float unit = codes ? 1.0f : bits == 7 ? 0.5f : 0.25f, offset = codes || bits == 7 ? 0.0f : 0.125f;
    for (Affine& affine : linear.affine) affine = {};
    linear.affine[bits] = {values.data(), false, step * unit, centre + step * offset, false, 0.0f};
  }
};

}  // namespace matquant
