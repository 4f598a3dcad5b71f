// The kernels for AVX2. vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits and saturates. The
// bound of the bytes decides how many such sums are added before they are widened: those of a segment for bytes below
// 4, 8 up to 16, 4 up to 32, 2 up to 64, 1 up to 128, as 2 * 128 * 127 = 32512. Larger bytes have 128 subtracted:
// |byte| * (sign of the byte applied to x).
#include "kernels/kernels.hpp"

#include <immintrin.h>

namespace matquant {
namespace {

constexpr int FREE_SUMS = 0;  // of products with any byte, at no cost: none
constexpr bool PARTS_ARE_FASTER = true;  // codes above four bits are multiplied as two parts, which need no sign
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int read) { return read <= 4 ? 4 : 1; }
constexpr int GEMM_BLOCKS = 1;
// Tokens multiplied at a time, so that sums fit 16 registers. Of Range::any the magnitude is computed for each reading.
constexpr int gemm_step(Range range) { return range == Range::any ? 8 : 4; }

#include "avx2.inl"

// Sums stay in registers: without this GCC makes many products first, keeps them in memory and adds them afterwards.
MATQUANT_INLINE void settle(__m256i& sum) { asm("" : "+x"(sum)); }

struct Sum {
  Ints ints, shorts;
  // The range whose code a range can share: fewer ranges mean less to compile.
  static constexpr Range alike(Range range) { return range; }
  // The constant that is subtracted from the bytes.
  static constexpr int taken(Range range) { return range == Range::any ? 128 : 0; }
  // Quads whose products are summed in 16 bits.
  static constexpr int run(Range range) {
    return range == Range::to_16 ? 8 : range == Range::to_32 ? 4 : range == Range::to_64 ? 2 : 1;
  }
  MATQUANT_INLINE void clear() {
    ints = shorts = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  template <Range RANGE>
  MATQUANT_INLINE static __m256i pairs(Piece bytes, __m256i x) {
    if constexpr (RANGE == Range::any) {
      const __m256i centred = _mm256_xor_si256(bytes, all(0x80));
      return _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(x, centred));
    }
    return _mm256_maddubs_epi16(bytes, x);
  }
  template <Range RANGE, int QUAD, int PIECE>
  MATQUANT_INLINE void add(Piece bytes, const std::int8_t* x) {
    constexpr int RUN = run(RANGE);
    constexpr bool WHOLE = RANGE == Range::to_4;
    std::int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m256i two = pairs<RANGE>(bytes, _mm256_set1_epi32(four));
    __m256i& sum = PIECE == 0 ? ints.low : ints.high;
    __m256i& run_sum = PIECE == 0 ? shorts.low : shorts.high;
    if constexpr (!WHOLE && QUAD % RUN == 0)
      run_sum = two;
    else
      run_sum = _mm256_add_epi16(run_sum, two);
    if constexpr (!WHOLE && QUAD % RUN == RUN - 1) {
      sum = _mm256_add_epi32(sum, widened(run_sum));
      settle(sum);
    } else {
      settle(run_sum);
    }
  }
  MATQUANT_INLINE static __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
  // Of a segment whose bytes were all added with RANGE.
  template <Range RANGE>
  MATQUANT_INLINE Ints total() const {
    if constexpr (RANGE == Range::to_4) return {widened(shorts.low), widened(shorts.high)};
    return ints;
  }
};

#include "kernel.inl"

}  // namespace

const Kernels kernels_avx2 = {"avx2", NEVER, prepare_share, linear_share, codes, &float_kernels_avx2};

}  // namespace matquant
