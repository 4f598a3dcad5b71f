// Arithmetic on sizes that come from outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>

namespace matquant {

// `value` as an int; std::invalid_argument(message) unless 1 <= value <= most.
inline int in_range(std::int64_t value, std::int64_t most, const char* message) {
  if (value < 1 || value > most) throw std::invalid_argument(message);
  return static_cast<int>(value);
}

// a * b, which must not wrap around to a small number. std::bad_alloc above 2^62: no machine has that much memory.
inline std::size_t times(std::size_t a, std::size_t b) {
  std::size_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > std::size_t{1} << 62) throw std::bad_alloc();
  return product;
}

}  // namespace matquant
