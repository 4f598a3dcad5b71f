#include "decoder/workspace.hpp"

#include <algorithm>
#include <new>
#include <type_traits>

#include "core/checked.hpp"
#include "core/team.hpp"
#include "decoder/cache.hpp"

namespace matquant {

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
  place(gate, tokens * m.intermediate);
  place(up, tokens * m.intermediate);
  place(cosines, m.ropes.size() * tokens * (dim / 2));
  place(sines, m.ropes.size() * tokens * (dim / 2));
  place(scores, static_cast<std::size_t>(threads) * MOST_QUERIES * (capacity + LANES));
  const auto bytes_of = [](int count, int cols) {
    return std::max(input_bytes(count, cols, Activations::int8), input_bytes(count, cols, Activations::exact));
  };
  place(input, bytes_of(max_tokens, std::max({m.hidden, m.intermediate, m.heads * m.head_dim})));
  single_input_bytes_ = bytes_of(1, std::max(m.hidden, m.intermediate));
  place(single_inputs_, (threads + 1) * single_input_bytes_);
  return offset;
}

}  // namespace matquant
