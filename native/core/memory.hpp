// Zeroed anonymous memory, taken from the system and given back to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/layout.hpp"

namespace matquant {

enum class Pages {
  huge,       // at a 64-byte boundary, in huge pages shared with other memories: for weights, read from end to end
  on_demand,  // address space only; a page takes memory once it is written: for caches, which are rarely full
};

// Memories in huge pages share them with those of the same pool only, so that a pool's memories can be given back while
// those of another stay: one for each plane, 1 + its number, and one for all else.
constexpr int POOLS = 1 + PLANE_COUNT;

// Throws std::bad_alloc. Nothing is mapped for zero bytes.
class Memory {
 public:
  Memory(std::size_t bytes, Pages pages, int pool = 0);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }  // whole pages, or whole cache lines if pages are shared

  struct Region;

 private:
  std::shared_ptr<Region> region_;  // null: pages that it has for itself
  std::uint8_t* data_ = nullptr;
  std::size_t bytes_ = 0;
  int pool_;
};

}  // namespace matquant
