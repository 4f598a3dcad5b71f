// The functions of floats.hpp for one instruction set. Compiled once per set; MATQUANT_FLOATS is the name of its table.
// The compiler lowers 16-lane vectors to whatever its flags allow.
#include "kernels/floats.hpp"
#include "kernels/kernels.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace matquant {
namespace {

#include "float_vectors.inl"
#include "float_rows.inl"
#include "float_attention.inl"
#include "float_dense.inl"

// Vectors of 64 bytes would go through memory with AVX2.
typedef uint64_t Words __attribute__((vector_size(32)));

inline Words words_at(const char* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

uint64_t read(const void* data, size_t bytes) {
  const char* p = (const char*)data;
  const size_t ahead = prefetch_within_page ? 4096 : 8192;
  Words a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    __builtin_prefetch(p + i + ahead);
    __builtin_prefetch(p + i + ahead + 64);
    a ^= words_at(p + i);
    b ^= words_at(p + i + 32);
    c ^= words_at(p + i + 64);
    d ^= words_at(p + i + 96);
  }
  a = (a ^ b) ^ (c ^ d);
  return a[0] ^ a[1] ^ a[2] ^ a[3];
}

}  // namespace

extern const FloatKernels MATQUANT_FLOATS;
const FloatKernels MATQUANT_FLOATS = {rms_norm, add,    add_scaled, silu_times, gelu_times, clamped_times, soft_cap,
                                      widen,    rotate, attend,     dense,      store_key,  store_value,   read};

}  // namespace matquant
