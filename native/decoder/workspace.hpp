// The memory that a step writes besides logits and caches, and where its time goes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/memory.hpp"
#include "decoder/model.hpp"

namespace matquant {

constexpr int MOST_TOKENS = 1 << 14;  // of a step
constexpr int WIDTH_COUNTS = 16;      // counters of an expert, by width

// Parts of a step, timed on the first thread. `wait` is its time at barriers, including the prefetches it issues there.
enum class Part { norm, quantise, qkv, attention, output, gate_up, activation, down, head, wait };
constexpr int PARTS = 10;
constexpr const char* PART_NAMES[PARTS] = {"norm",    "quantise",   "qkv",  "attention", "o",
                                           "gate_up", "activation", "down", "head",      "wait"};

// Rows sorted by expert, as one thread has them for itself: those of expert e are starts[e] .. starts[e + 1] - 1.
struct Groups {
  int* starts;     // [experts + 1]
  int* tokens;     // [rows]
  float* weights;  // [rows]
};

// Reused from step to step, so that steps allocate nothing. Throws std::invalid_argument for sizes outside 1 ..
// MOST_TOKENS, MOST_CAPACITY or MOST_THREADS, and std::bad_alloc if there is no space.
class Workspace {
 public:
  Workspace(const Model& model, int max_tokens, int capacity, int threads);
  const int max_tokens, capacity, threads;
  float *residual, *normed;                       // [max(max_tokens, threads)][hidden]
  float *query, *key, *value, *attended, *delta;  // [max_tokens][their width]
  float *gate, *up;                               // of all rows of the feed-forward part
  float *cosines, *sines;                         // [ropes][max_tokens][head_dim / 2]
  float* scores;                                  // [threads][MOST_QUERIES][capacity + LANES]
  char* input;                                    // of one Input, or of those of all experts
  // Of layers with experts: what the router and the gate of the shared expert say, each token's experts and weights,
  // and what the experts read and write, a row for each token and expert.
  float *router_scores, *shared_scores;  // [max_tokens][experts], [max_tokens]
  int* chosen;                           // [max(max_tokens, threads)][active]
  float* chosen_weights;                 // likewise
  float* routed;                         // [max_tokens * (active + 1)][hidden]
  // Rows that each expert of the model was used for, by the width of its gate, since the caller last cleared them.
  std::uint32_t* used = nullptr;  // [all_experts][WIDTH_COUNTS]
  std::size_t all_experts = 0;    // of all layers
  Groups groups(int thread) const;
  // Memory for the Inputs of a single token: one for each thread, then one that the threads share.
  char* single_input(int which) const { return single_inputs_ + which * single_input_bytes_; }
  bool profile = false;
  double seconds[PARTS] = {};

 private:
  std::size_t lay_out(const Model& model, char* base);
  char* single_inputs_;
  std::size_t single_input_bytes_;
  Groups groups_;              // of the first thread
  std::size_t starts_, rows_;  // of each thread's groups
  Memory memory_;
};

}  // namespace matquant
