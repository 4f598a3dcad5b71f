#include "decoder/workspace.hpp"

#include <algorithm>
#include <new>
#include <type_traits>

#include "core/checked.hpp"
#include "core/team.hpp"
#include "decoder/cache.hpp"

namespace matquant {
namespace {

// What any step of some tokens needs for its feed-forward parts.
struct FeedForwardSizes {
  std::size_t values = 0;  // of gate and up
  std::size_t experts = 0, active = 0;
  std::size_t all_experts = 0;  // of all layers
  std::size_t routed_input_bytes = 0;
  int widest = 0;  // of a gated block that all tokens use
};

std::size_t bytes_of_input(int tokens, int cols) {
  return std::max(input_bytes(tokens, cols, Activations::int8), input_bytes(tokens, cols, Activations::exact));
}

FeedForwardSizes sizes_of(const Model& m, int tokens) {
  FeedForwardSizes sizes;
  for (const Layer& layer : m.layers) {
    const Experts& experts = layer.feed_forward.experts;
    const bool routed = !experts.each.empty(), shared = routed && experts.shared_gate >= 0;
    const auto width_of = [&](const Gated& gated) { return m.matrices[gated.gate].rows(); };
    const int common = !routed ? width_of(layer.feed_forward.gated) : shared ? width_of(experts.shared) : 0;
    const int width = routed ? width_of(experts.each[0]) : 0;
    const std::size_t rows = static_cast<std::size_t>(tokens) * experts.active;
    sizes.values = std::max(sizes.values, times(rows, width) + times(tokens, common));
    sizes.all_experts += experts.each.size();
    sizes.experts = std::max(sizes.experts, experts.each.size());
    sizes.active = std::max<std::size_t>(sizes.active, experts.active);
    sizes.widest = std::max(sizes.widest, common);
    if (!routed) continue;
    // Padding to whole panels at most doubles the rows of an Input.
    const std::size_t of_experts = times(2 * rows, bytes_of_input(1, std::max(m.hidden, width)));
    const std::size_t of_shared = shared ? bytes_of_input(tokens, std::max(m.hidden, common)) : 0;
    sizes.routed_input_bytes = std::max(sizes.routed_input_bytes, of_experts + of_shared);
  }
  return sizes;
}

}  // namespace

Workspace::Workspace(const Model& model, int max_tokens_, int capacity_, int threads_)
    : max_tokens(in_range(max_tokens_, MOST_TOKENS, "the tokens of a workspace are out of range")),
      capacity(round_to_lanes(in_range(capacity_, MOST_CAPACITY, "the capacity of a workspace is out of range"))),
      threads(in_range(threads_, MOST_THREADS, "threads must be from 1 to 1024")),
      memory_(lay_out(model, nullptr), Pages::on_demand) {
  lay_out(model, reinterpret_cast<char*>(memory_.data()));
}

// Places every array behind `base` (null: none) and returns the bytes they take.
std::size_t Workspace::lay_out(const Model& m, char* base) {
  std::size_t offset = 0;
  const auto place = [&](auto*& array, std::size_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    if (base) array = reinterpret_cast<Element*>(base + offset);
    offset += whole_lines(times(count, sizeof(Element)));
    if (offset > std::size_t{1} << 62) throw std::bad_alloc();
  };
  const std::size_t tokens = max_tokens, dim = m.head_dim, queries = m.heads * dim, keys = m.kv_heads * dim;
  const std::size_t copies = std::max(max_tokens, threads);  // each thread has its own row of a single token
  place(residual, copies * m.hidden);
  place(normed, copies * m.hidden);
  place(delta, tokens * m.hidden);
  place(query, tokens * queries);
  place(key, tokens * keys);
  place(value, tokens * keys);
  place(attended, tokens * queries);
  const FeedForwardSizes ffn = sizes_of(m, max_tokens);
  place(gate, ffn.values);
  place(up, ffn.values);
  place(cosines, m.ropes.size() * tokens * (dim / 2));
  place(sines, m.ropes.size() * tokens * (dim / 2));
  place(scores, static_cast<std::size_t>(threads) * MOST_QUERIES * (capacity + LANES));
  const int widest = std::max(m.hidden, ffn.widest);
  place(input, std::max(bytes_of_input(max_tokens, std::max(widest, m.heads * m.head_dim)), ffn.routed_input_bytes));
  single_input_bytes_ = bytes_of_input(1, widest);
  place(single_inputs_, (threads + 1) * single_input_bytes_);
  all_experts = ffn.all_experts;
  if (ffn.experts == 0) return offset;
  rows_ = tokens * (ffn.active + 1);
  starts_ = ffn.experts + 1;
  place(router_scores, tokens * ffn.experts);
  place(shared_scores, tokens);
  place(chosen, copies * ffn.active);
  place(chosen_weights, copies * ffn.active);
  place(routed, times(rows_, m.hidden));
  place(groups_.starts, threads * starts_);
  place(groups_.tokens, threads * rows_);
  place(groups_.weights, threads * rows_);
  place(used, all_experts * WIDTH_COUNTS);
  return offset;
}

Groups Workspace::groups(int thread) const {
  const auto at = static_cast<std::size_t>(thread);
  return {groups_.starts + at * starts_, groups_.tokens + at * rows_, groups_.weights + at * rows_};
}

}  // namespace matquant
