#include "decoder/cache.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/checked.hpp"

namespace matquant {

Cache::Cache(const Model& model, int capacity_, DType dtype_)
    : capacity(round_to_lanes(in_range(capacity_, MOST_CAPACITY, "the capacity of a cache is out of range"))),
      dtype(dtype_),
      layers_(static_cast<int>(model.layers.size())),
      kv_heads_(model.kv_heads),
      head_dim_(model.head_dim),
      key_bytes_(whole_lines(times(times(capacity, model.head_dim), size_of(dtype)))),
      value_bytes_(whole_lines(times(times(capacity, round_to_lanes(model.head_dim)), size_of(dtype)))),
      memory_(times(times(model.layers.size(), kv_heads_), key_bytes_ + value_bytes_), Pages::on_demand) {
  if (model.layers.empty()) throw std::invalid_argument("the model has no layers; add them before its caches");
}

void* Cache::keys(int layer, int kv_head) const {
  return memory_.data() + (static_cast<std::size_t>(layer) * kv_heads_ + kv_head) * (key_bytes_ + value_bytes_);
}

void* Cache::values(int layer, int kv_head) const {
  return static_cast<std::uint8_t*>(keys(layer, kv_head)) + key_bytes_;
}

// Each head's keys and values begin on pages that may be shared with what lies before them.
std::size_t Cache::bytes_in_use(int length) const {
  constexpr std::size_t PAGE = 4096;
  const std::size_t tokens = round_to_lanes(std::clamp(length, 0, capacity)), size = size_of(dtype);
  if (tokens == 0) return 0;
  const auto pages = [](std::size_t bytes) { return (bytes + PAGE - 1) / PAGE + 1; };
  const std::size_t of_head = pages(tokens * head_dim_ * size) + pages(tokens * round_to_lanes(head_dim_) * size);
  return std::min(bytes(), static_cast<std::size_t>(layers_) * kv_heads_ * of_head * PAGE);
}

// Keys lie in tiles of LANES positions, so a whole tile is copied; attention does not look at its later positions.
void Cache::copy_prefix(const Cache& from, int length) {
  if (from.dtype != dtype || from.layers_ != layers_ || from.kv_heads_ != kv_heads_ || from.head_dim_ != head_dim_)
    throw std::invalid_argument("the caches are of different models or modes");
  if (length < 0 || length > capacity || length > from.capacity)
    throw std::invalid_argument("the length is beyond one of the caches");
  if (length == 0 || &from == this) return;
  const std::size_t size = size_of(dtype), tokens = round_to_lanes(length);
  for (int layer = 0; layer < layers_; ++layer)
    for (int head = 0; head < kv_heads_; ++head) {
      std::memcpy(keys(layer, head), from.keys(layer, head), tokens * head_dim_ * size);
      std::memcpy(values(layer, head), from.values(layer, head), size * length * round_to_lanes(head_dim_));
    }
}

}  // namespace matquant
