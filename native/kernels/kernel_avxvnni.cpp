// The kernels for AVX2 with AVX-VNNI, of Intel's processors since 2021 that have no AVX-512: 32 weights per vpdpbusd,
// which takes any byte, so codes need no shift to bit 0. Float parts are those of AVX2.
#include "kernels/kernels.hpp"

#include <immintrin.h>

namespace matquant {
namespace {

constexpr int FREE_SUMS = 4;  // of products with any byte, at no cost: two registers each
constexpr bool PARTS_ARE_FASTER = false;
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int) { return 4; }
constexpr int GEMM_BLOCKS = 2;  // 2 x 4 sums in registers
constexpr int gemm_step(Range) { return 4; }

#include "avx2.inl"

struct Sum {
  static constexpr Range alike(Range) { return Range::any; }
  static constexpr int taken(Range) { return 0; }
  Ints ints;
  MATQUANT_INLINE void clear() { ints = {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <Range, int, int PIECE>
  MATQUANT_INLINE void add(Piece bytes, const std::int8_t* x) {
    std::int32_t four;
    __builtin_memcpy(&four, x, 4);
    __m256i& sum = PIECE == 0 ? ints.low : ints.high;
    sum = _mm256_dpbusd_avx_epi32(sum, bytes, _mm256_set1_epi32(four));
  }
  template <Range>
  MATQUANT_INLINE Ints total() const {
    return ints;
  }
};

#include "kernel.inl"

}  // namespace

const Kernels kernels_avxvnni = {"avxvnni", NEVER, prepare_share, linear_share, codes, &float_kernels_avx2};

}  // namespace matquant
