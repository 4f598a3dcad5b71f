// A decoder-only transformer whose weights are read at any width: one step for a batch of tokens.
//
// Families differ in data, never in code paths named after them: which norms there are, windows, rotary frequencies,
// caps and scales (src/matquant/hf/architecture.py fills the table). Nothing here owns a weight.
//
// A token of the batch is a Row: its id, its position and the Cache of its sequence. So a prompt is many rows with one
// cache, and several sequences decoded together are one row each. What a row gives depends neither on the other rows
// nor on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "floats.hpp"
#include "linear.hpp"

namespace matquant {

// Sizes above these are rejected, so that no index below leaves 32 bits and no product of sizes 64.
constexpr std::int64_t kMostValues = std::int64_t{1} << 28;   // of a row: hidden, intermediate, heads x head_dim, vocab
constexpr std::int64_t kMostHeadDim = std::int64_t{1} << 24;
constexpr std::int64_t kMostHeads = std::int64_t{1} << 15;
constexpr int kMostTokens = 1 << 14;       // of a step
constexpr int kMostCapacity = 0x7FFFFC00;  // tokens of a sequence
constexpr int kMostThreads = 1 << 16;

// A linear of either kind; bias [N] or null.
struct Matrix {
  const Linear* nested = nullptr;  // if null, the dense one is meant
  Dense dense{};
  const float* bias = nullptr;
  int rows() const { return nested ? nested->rows : dense.rows; }
  int cols() const { return nested ? nested->cols : dense.cols; }
};

enum Projection { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kProjections };

// Weights [N] of RMS norms; null where the family has none.
struct Norms {
  const float* input;
  const float* attention_out;  // of the attention's output, before it is added
  const float* ffn;
  const float* ffn_out;
  const float* query;  // [head_dim], per head
  const float* key;
};

struct Layer {
  Matrix matrix[kProjections];
  Norms norms;
  int window;  // positions a token sees, itself included; 0: all before it
  int rope;    // which Rope; -1: none
};

struct Rope {
  const float* frequencies;  // radians per position, [head_dim / 2]
  float scale;               // of sines and cosines
};

struct Model {
  // The sizes, checked. Throws std::invalid_argument if they make no model, or one above the limits.
  Model(std::int64_t hidden, std::int64_t intermediate, std::int64_t heads, std::int64_t kv_heads,
        std::int64_t head_dim, std::int64_t vocab);
  int hidden, intermediate, heads, kv_heads, head_dim, vocab;
  float norm_eps = 0, attention_scale = 1, embedding_scale = 1;
  float attention_cap = 0, logit_cap = 0;  // 0: none
  bool gelu = false;                       // tanh GELU gates, otherwise SiLU
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Dense embedding{};
  Matrix head;
  const float* norm = nullptr;
};

// Anonymous memory that is zero until it is written and takes no space until then. Throws std::bad_alloc.
class Reserved {
 public:
  explicit Reserved(size_t bytes);
  ~Reserved();
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_;
  size_t bytes_;
};

// Keys and values of one sequence: f16, or f32 in exact mode. Space for the whole capacity is reserved, not used.
// Throws std::invalid_argument for a capacity outside 1 .. kMostCapacity, std::bad_alloc where there is no space.
class Cache {
 public:
  Cache(const Model& model, int capacity, DType dtype);
  const int capacity;
  const DType dtype;
  void* keys(int layer, int kv_head) const;
  void* values(int layer, int kv_head) const;

 private:
  const int kv_heads_;
  const size_t key_bytes_, value_bytes_;  // of one head of one layer
  const Reserved memory_;
};

// Where the time of steps goes: the first thread's, in seconds. It waits for the others at barriers, and then also calls
// for memory that it needs next.
enum Part { kNorm, kPrepare, kQkv, kAttention, kAttentionOut, kGateUp, kActivation, kDownPart, kHead, kWait, kParts };
constexpr const char* kPartNames[kParts] = {"norm",    "quantise",   "qkv",  "attention", "o",
                                            "gate_up", "activation", "down", "head",      "wait"};

// Everything a step writes besides logits and caches; reused, so that steps allocate nothing. Throws as Cache does.
class Workspace {
 public:
  Workspace(const Model& model, int max_tokens, int capacity, int threads);
  const int max_tokens, capacity, threads;
  float *residual, *normed;                                   // [max(max_tokens, threads)][hidden]
  float *query, *key, *value, *attended, *gate, *up, *delta;  // [max_tokens][their width]
  float *cosines, *sines;                                     // [ropes][max_tokens][head_dim / 2]
  float* scores;                                              // [threads][kQueries][capacity + 16]
  char* input;                                                // of one Input
  // Memory of one token's Inputs: one of each thread, and one that they share.
  char* single_input(int which) const { return single_inputs + which * single_input_bytes; }
  bool profile = false;
  double seconds[kParts] = {};

 private:
  size_t lay_out(const Model& model, char* base);
  char* single_inputs;
  size_t single_input_bytes;
  Reserved memory_;
};

struct Row {
  int token;     // 0 .. vocab - 1
  int position;  // 0 .. cache->capacity - 1, every smaller one already in the cache or in an earlier row
  const Cache* cache;
};

// One step over rows [tokens]: fills the caches at the rows' positions and writes the logits [tokens - first_logit,
// vocab] of the rows from first_logit on. bits: the width of each matrix, [layers][kProjections] and then the head.
void step(const Model& model, const std::uint8_t* bits, Activations activations, const Row* rows, int tokens,
          int first_logit, float* logits, Workspace& workspace);

}  // namespace matquant
