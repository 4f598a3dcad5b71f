// The functions of floats.hpp for one instruction set. Compiled once per set; MATQUANT_FLOATS is the name of its table.
#include "kernels/floats.hpp"
#include "kernels/kernels.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace matquant {
namespace {

#include "float_vectors.inl"
#include "float_rows.inl"
#include "float_attention.inl"
#include "float_dense.inl"

uint64_t read(const void* data, size_t bytes) {
  const char* p = (const char*)data;
  const size_t ahead = prefetch_within_page ? 4096 : 8192;
  W a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(p + i + ahead + line);
    const auto* words = (const std::uint64_t*)(p + i);
    a ^= load_as<W>(words);
    b ^= load_as<W>(words + 8);
    c ^= load_as<W>(words + 16);
    d ^= load_as<W>(words + 24);
  }
  a = (a ^ b) ^ (c ^ d);
  uint64_t words[8], result = 0;
  std::memcpy(words, &a, sizeof words);
  for (const uint64_t word : words) result ^= word;
  return result;
}

}  // namespace

extern const FloatKernels MATQUANT_FLOATS;
const FloatKernels MATQUANT_FLOATS = {rms_norm, add,    add_scaled, silu_times, gelu_times, clamped_times, soft_cap,
                                      widen,    rotate, attend,     dense,      store_key,  store_value,   read};

}  // namespace matquant
