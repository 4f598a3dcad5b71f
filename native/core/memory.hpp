// Zeroed anonymous memory, taken from the system and given back to it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matquant {

enum class Pages {
  huge,       // at a 2 MiB boundary, in huge pages where they fit: for weights, which are read from end to end
  on_demand,  // address space only; a page takes memory once it is written: for caches, which are rarely full
};

// Throws std::bad_alloc. Nothing is mapped for zero bytes.
class Memory {
 public:
  Memory(std::size_t bytes, Pages pages);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }  // whole pages

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace matquant
