#include "decoder/cache.hpp"

#include <stdexcept>

#include "core/checked.hpp"

namespace matquant {

Cache::Cache(const Model& model, int capacity_, DType dtype_)
    : capacity(round_to_lanes(in_range(capacity_, MOST_CAPACITY, "the capacity of a cache is out of range"))),
      dtype(dtype_),
      kv_heads_(model.kv_heads),
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

}  // namespace matquant
