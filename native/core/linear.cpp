#include "core/linear.hpp"

#include "core/width.hpp"
#include "kernels/kernels.hpp"

namespace matquant {
namespace {

int panel_of(int tokens, Activations activations) {
  if (activations == Activations::int8 && tokens >= kernels().wide_from) return WIDE_PANEL;
  return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : PANEL_TOKENS;
}

// Tokens rounded up to whole panels, of either width, times inputs rounded up to whole groups.
std::size_t padded_values(int tokens, int cols) {
  const int panel = tokens <= PANEL_TOKENS ? panel_of(tokens, Activations::exact) : WIDE_PANEL;
  const int groups = ceil_div(cols, ACTIVATION_GROUP);
  return static_cast<std::size_t>(ceil_div(tokens, panel)) * panel * groups * ACTIVATION_GROUP;
}

}  // namespace

int bits_read(int bits, Rule rule) {
  const int needed = rule == Rule::prefix || bits == 8 ? bits : bits + 1;
  return needed <= 2 ? 2 : needed <= 4 ? needed : needed <= 6 ? 6 : 8;
}

bool serves(const Linear& weight, int bits) {
  return bits >= 1 && bits <= 8 && weight.affine[bits].values != nullptr &&
         bits_read(bits, weight.rule) <= weight.resident_bits;
}

int activation_group(const Linear& weight) {
  return weight.group <= LEAST_ACTIVATION_GROUP ? LEAST_ACTIVATION_GROUP : ACTIVATION_GROUP;
}

Input make_input(void* workspace, int tokens, int cols, Activations activations, int group) {
  const std::size_t padded = padded_values(tokens, cols);
  auto* at = static_cast<char*>(workspace);
  const int panel = panel_of(tokens, activations);
  Input input{tokens, cols, activations, group, panel, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (activations == Activations::exact) {
    input.values = reinterpret_cast<float*>(at);
    input.value_sums = reinterpret_cast<float*>(at + whole_lines(padded * sizeof(float)));
  } else {
    input.codes = reinterpret_cast<std::int8_t*>(at);
    at += whole_lines(padded);
    input.scales = reinterpret_cast<float*>(at);
    at += whole_lines(padded / LEAST_ACTIVATION_GROUP * sizeof(float));
    input.code_sums = reinterpret_cast<std::int32_t*>(at);
    at += whole_lines(padded / TILE_INPUTS * sizeof(std::int32_t));
    input.group_sums = reinterpret_cast<std::int32_t*>(at);
  }
  return input;
}

int padded_tokens(int tokens, Activations activations) {
  const int panel = panel_of(tokens, activations);
  return ceil_div(tokens, panel) * panel;
}

std::size_t input_bytes(int tokens, int cols, Activations activations) {
  const std::size_t padded = padded_values(tokens, cols);
  const std::size_t sums = whole_lines(padded / TILE_INPUTS * 4);
  if (activations == Activations::exact) return whole_lines(padded * sizeof(float)) + sums;
  return whole_lines(padded) + 2 * whole_lines(padded / LEAST_ACTIVATION_GROUP * sizeof(float)) + sums;
}

void prepare(const Input& input, const float* x, int thread, int threads) {
  kernels().prepare(input, x, thread, threads);
}

void linear(const Linear& weight, int bits, const Input& input, float* y, std::ptrdiff_t y_stride, int thread,
            int threads) {
  kernels().linear(weight, width_of(bits, weight.rule, weight.grid), input, y, y_stride, thread, threads);
}

}  // namespace matquant
