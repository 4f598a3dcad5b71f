// The kernels for AVX2. vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits and saturates. The
// bound of the bytes decides how many such sums are added before they are widened: those of a segment for bytes below
// 4, 8 up to 16, 4 up to 32, 2 up to 64, 1 up to 128, as 2 * 128 * 127 = 32512. Larger bytes have 128 subtracted:
// |byte| * (sign of the byte applied to x).
#include "kernels/kernels.hpp"

#include <immintrin.h>

namespace matquant {
namespace {

constexpr bool ANY_BYTE_IS_FREE = false;
constexpr bool PARTS_ARE_FASTER = true;  // codes above four bits are multiplied as two parts, which need no sign
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int read) { return read <= 4 ? 4 : 1; }
constexpr int GEMM_BLOCKS = 1;
// Tokens multiplied at a time, so that sums fit 16 registers. Of Range::any the magnitude is computed for each reading.
constexpr int gemm_step(Range range) { return range == Range::any ? 8 : 4; }

// A vector is decoded in two pieces, rows 0..7 and rows 8..15: there are only sixteen registers.
constexpr int PIECES = 2;
using Piece = __m256i;
struct Bytes {
  Piece low, high;
};
struct Ints {
  __m256i low, high;
};
struct Floats {
  __m256 low, high;
};

MATQUANT_INLINE __m256i all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
MATQUANT_INLINE const __m256i* vectors(const void* from) { return static_cast<const __m256i*>(from); }

MATQUANT_INLINE Bytes load(const std::uint8_t* from) {
  return {_mm256_load_si256(vectors(from)), _mm256_load_si256(vectors(from) + 1)};
}
template <int PIECE>
MATQUANT_INLINE Piece load_piece(const std::uint8_t* from) {
  return _mm256_load_si256(vectors(from) + PIECE);
}
template <int PIECE>
MATQUANT_INLINE void store_piece(std::uint8_t* to, Piece a) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to) + PIECE, a);
}
template <int MASK>
MATQUANT_INLINE Piece keep(Piece a) {
  return _mm256_and_si256(a, all(MASK));
}
template <int MASK>
MATQUANT_INLINE Piece select(Piece a, Piece b) {
  return _mm256_or_si256(_mm256_and_si256(a, all(MASK)), _mm256_andnot_si256(all(MASK), b));
}
// The bits of FIRST from a, of SECOND from b, the others from c.
template <int FIRST, int SECOND>
MATQUANT_INLINE Piece select(Piece a, Piece b, Piece c) {
  return _mm256_or_si256(_mm256_or_si256(keep<FIRST>(a), keep<SECOND>(b)), keep<(0xFF & ~(FIRST | SECOND))>(c));
}
// Shifts move 16-bit lanes: bits cross into other bytes, and the caller masks them away.
template <int COUNT>
MATQUANT_INLINE Piece right(Piece a) {
  return _mm256_srli_epi16(a, COUNT);
}
template <int COUNT>
MATQUANT_INLINE Piece left(Piece a) {
  return _mm256_slli_epi16(a, COUNT);
}

struct Slicer {
  __m128i shift, round_shift;
  __m256i mask, round_mask, cap;
  MATQUANT_INLINE explicit Slicer(const Width& width)
      : shift(_mm_cvtsi32_si128(width.shift)),
        round_shift(_mm_cvtsi32_si128(width.round_shift)),
        mask(all(width.mask)),
        round_mask(all(width.round_mask)),
        cap(all(width.cap)) {}
  MATQUANT_INLINE Piece operator()(Piece a) const {
    const __m256i top = _mm256_and_si256(_mm256_srl_epi16(a, shift), mask);
    const __m256i rounding = _mm256_and_si256(_mm256_srl_epi16(a, round_shift), round_mask);
    return _mm256_min_epu8(_mm256_add_epi8(top, rounding), cap);
  }
};

using Table = __m256i;
MATQUANT_INLINE Table load_table(const std::uint8_t (&bytes)[16]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
MATQUANT_INLINE Piece keep(Piece a, Table mask) { return _mm256_and_si256(a, mask); }
MATQUANT_INLINE Piece high_nibbles(Piece a) { return keep<0x0F>(right<4>(a)); }
// Bytes of `at` are below 16.
MATQUANT_INLINE Piece look_up(Table table, Piece at) { return _mm256_shuffle_epi8(table, at); }
MATQUANT_INLINE Piece add_bytes(Piece a, Piece b) { return _mm256_add_epi8(a, b); }
// a + b where sign is 1, a - b where it is -1
MATQUANT_INLINE Piece add_signed(Piece a, Piece b, Piece sign) { return add_bytes(a, _mm256_sign_epi8(b, sign)); }

MATQUANT_INLINE Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
MATQUANT_INLINE Ints subtract(Ints a, std::int32_t b) {
  const __m256i all_b = _mm256_set1_epi32(b);
  return {_mm256_sub_epi32(a.low, all_b), _mm256_sub_epi32(a.high, all_b)};
}
template <int COUNT>
MATQUANT_INLINE Ints left(Ints a) {
  return {_mm256_slli_epi32(a.low, COUNT), _mm256_slli_epi32(a.high, COUNT)};
}
MATQUANT_INLINE Ints left(Ints a, int count) {
  const __m128i by = _mm_cvtsi32_si128(count);
  return {_mm256_sll_epi32(a.low, by), _mm256_sll_epi32(a.high, by)};
}
template <int COUNT>
MATQUANT_INLINE Ints right(Ints a) {
  return {_mm256_srai_epi32(a.low, COUNT), _mm256_srai_epi32(a.high, COUNT)};
}
template <int LANE>
MATQUANT_INLINE Ints byte_of(Bytes a) {
  const __m256i byte = _mm256_set1_epi32(0xFF);
  return {_mm256_and_si256(_mm256_srli_epi32(a.low, 8 * LANE), byte),
          _mm256_and_si256(_mm256_srli_epi32(a.high, 8 * LANE), byte)};
}

// Sixteen integers within -128 .. 127, as bytes.
MATQUANT_INLINE void store_narrow(std::int8_t* to, Ints a) {
  const __m256i shorts = _mm256_packs_epi32(a.low, a.high), bytes = _mm256_packs_epi16(shorts, shorts);
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(ordered));
}

MATQUANT_INLINE Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
MATQUANT_INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
MATQUANT_INLINE Floats load_floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
MATQUANT_INLINE void store_floats(float* to, Floats a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
MATQUANT_INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
MATQUANT_INLINE Floats subtract(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
MATQUANT_INLINE Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
MATQUANT_INLINE __m128i load_eight(const std::uint16_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
MATQUANT_INLINE __m256 widen_eight(const std::uint16_t* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight(from)), 16));
}
MATQUANT_INLINE Floats widen_bfloat16(const std::uint16_t* from) { return {widen_eight(from), widen_eight(from + 8)}; }
MATQUANT_INLINE Floats widen_float16(const std::uint16_t* from) {
  return {_mm256_cvtph_ps(load_eight(from)), _mm256_cvtph_ps(load_eight(from + 8))};
}

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
