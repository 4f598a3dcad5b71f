// A decoder-only transformer whose weights are read at any width.
//
// Model families differ only in data: which norms exist, windows, rotary frequencies, caps and scales. Python fills the
// table (families.py); nothing here names a family, and nothing here owns a weight.
#pragma once

#include <cstdint>
#include <vector>

#include "core/linear.hpp"
#include "decoder/attention.hpp"
#include "decoder/feed_forward.hpp"
#include "kernels/floats.hpp"

namespace matquant {

// Larger sizes are rejected, so that every index below fits in 32 bits and every product of sizes in 64.
constexpr std::int64_t MOST_VALUES = std::int64_t{1} << 28;  // in a row: hidden, heads x head_dim, vocab and others
constexpr std::int64_t MOST_HEAD_DIM = std::int64_t{1} << 24;
constexpr std::int64_t MOST_HEADS = std::int64_t{1} << 15;
constexpr std::int64_t MOST_EXPERTS = std::int64_t{1} << 15;

// A linear layer, nested or dense.
struct Matrix {
  const Linear* nested = nullptr;  // null: use `dense`
  Dense dense{};
  const float* bias = nullptr;  // [N] or null
  int rows() const { return nested ? nested->rows : dense.rows; }
  int cols() const { return nested ? nested->cols : dense.cols; }
};

struct Layer {
  Attention attention;
  FeedForward feed_forward;
};

struct Rope {
  const float* frequencies;  // radians per position, [head_dim / 2]
  float scale;               // of sines and cosines
};

struct Model {
  // Throws std::invalid_argument if a size is above its limit or the sizes contradict each other.
  Model(std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t vocab);

  // Appends a matrix and returns its id.
  int add(const Matrix& matrix);

  int hidden, heads, kv_heads, head_dim, vocab;
  float norm_eps = 0, attention_scale = 1, embedding_scale = 1;
  float attention_cap = 0, logit_cap = 0;  // 0: none
  bool gelu = false;                       // gates use the tanh form of GELU instead of SiLU
  float gate_alpha = 0, gate_limit = 0;    // of the clamped gate (FloatKernels::clamped_times); limit 0: not clamped
  int activation_group = ACTIVATION_GROUP;  // of all its activations: the least of its weights
  std::vector<Matrix> matrices;            // all that a step multiplies by, the head included; an id is an index
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  int embedding = -1;           // id of a matrix, of which a token reads one row
  int head = -1;                // id of a matrix; the embedding's if they are tied
  const float* norm = nullptr;  // weights [hidden] of the norm before the head
};

}  // namespace matquant
