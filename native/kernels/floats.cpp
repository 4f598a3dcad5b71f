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

uint64_t read(const void* data, size_t bytes) {
  const char* p = (const char*)data;
  const size_t ahead = prefetch_within_page ? 4096 : 8192;
  W a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    W w[4];
    std::memcpy(w, p + i, sizeof w);
    for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(p + i + ahead + line);
    a ^= w[0];
    b ^= w[1];
    c ^= w[2];
    d ^= w[3];
  }
  a = (a ^ b) ^ (c ^ d);
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result ^= a[i];
  return result;
}

}  // namespace

extern const FloatKernels MATQUANT_FLOATS;
const FloatKernels MATQUANT_FLOATS = {rms_norm, add,    add_scaled, silu_times, gelu_times, clamped_times, soft_cap,
                                      widen,    rotate, attend,     dense,      store_key,  store_value,   read};

}  // namespace matquant
