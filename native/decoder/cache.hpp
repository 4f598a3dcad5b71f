// Keys and values of one sequence.
#pragma once

#include <cstddef>

#include "core/memory.hpp"
#include "decoder/model.hpp"

namespace matquant {

constexpr int MOST_CAPACITY = 0x7FFFFC00;  // tokens of a sequence

// f16, or f32 in exact mode. Address space for the whole capacity is reserved; memory is used as tokens come. Throws
// std::invalid_argument for a capacity outside 1 .. MOST_CAPACITY or a model without layers, and std::bad_alloc if
// there is no space.
class Cache {
 public:
  Cache(const Model& model, int capacity, DType dtype);
  const int capacity;
  const DType dtype;
  void* keys(int layer, int kv_head) const;
  void* values(int layer, int kv_head) const;

  // Bytes of address space: what the cache takes when it is full.
  std::size_t bytes() const { return memory_.bytes(); }
  // At most so many bytes of memory are in use once positions 0 .. length - 1 are written.
  std::size_t bytes_in_use(int length) const;
  // Copies positions 0 .. length - 1 of another cache of the same model. Throws std::invalid_argument if the caches
  // differ in kind or one of them is shorter.
  void copy_prefix(const Cache& from, int length);

 private:
  const int layers_, kv_heads_, head_dim_;
  const std::size_t key_bytes_, value_bytes_;  // of one head of one layer
  const Memory memory_;
};

}  // namespace matquant
