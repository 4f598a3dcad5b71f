// Vectors of 64 bytes in two registers of AVX2. Included by kernel_avx2.cpp and kernel_avxvnni.cpp.

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
MATQUANT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
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
