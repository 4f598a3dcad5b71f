// Vectors of 64 bytes in a register of AVX-512, and sums with VNNI: 64 weights per vpdpbusd, which takes any byte, so
// codes need no shift to bit 0. Included by kernel_avx512.cpp and kernel_avx512vbmi.cpp.

constexpr int FREE_SUMS = 16;  // of products with any byte, at no cost: a register each
constexpr bool PARTS_ARE_FASTER = false;
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int) { return 24; }
constexpr int GEMM_BLOCKS = 3;  // 3 x 8 sums in registers
constexpr int gemm_step(Range) { return 8; }

using Bytes = __m512i;
struct Ints {
  __m512i at;
};
using Floats = __m512;

MATQUANT_INLINE Bytes all(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
MATQUANT_INLINE Bytes load(const std::uint8_t* from) { return _mm512_load_si512(from); }
constexpr int PIECES = 1;  // a vector is decoded in one piece
using Piece = Bytes;
template <int>
MATQUANT_INLINE Piece load_piece(const std::uint8_t* from) {
  return load(from);
}
template <int>
MATQUANT_INLINE void store_piece(std::uint8_t* to, Piece bytes) {
  _mm512_store_si512(to, bytes);
}
template <int MASK>
MATQUANT_INLINE Bytes keep(Bytes a) {
  return _mm512_and_si512(a, all(MASK));
}
template <int MASK>
MATQUANT_INLINE Bytes select(Bytes a, Bytes b) {
  return _mm512_ternarylogic_epi32(all(MASK), a, b, 0xCA);  // mask ? a : b
}
// The bits of FIRST from a, of SECOND from b, the others from c.
template <int FIRST, int SECOND>
MATQUANT_INLINE Bytes select(Bytes a, Bytes b, Bytes c) {
  return select<FIRST>(a, select<SECOND>(b, c));
}
// Shifts move 16-bit lanes: bits cross into other bytes, and the caller masks them away.
template <int COUNT>
MATQUANT_INLINE Bytes right(Bytes a) {
  return _mm512_srli_epi16(a, COUNT);
}
template <int COUNT>
MATQUANT_INLINE Bytes left(Bytes a) {
  return _mm512_slli_epi16(a, COUNT);
}

struct Slicer {
  __m128i shift, round_shift;
  __m512i mask, round_mask, cap;
  MATQUANT_INLINE explicit Slicer(const Width& width)
      : shift(_mm_cvtsi32_si128(width.shift)),
        round_shift(_mm_cvtsi32_si128(width.round_shift)),
        mask(all(width.mask)),
        round_mask(all(width.round_mask)),
        cap(all(width.cap)) {}
  MATQUANT_INLINE Bytes operator()(Bytes a) const {
    const Bytes top = _mm512_and_si512(_mm512_srl_epi16(a, shift), mask);
    const Bytes half = _mm512_and_si512(_mm512_srl_epi16(a, round_shift), round_mask);
    return _mm512_min_epu8(_mm512_add_epi8(top, half), cap);
  }
};

using Table = __m512i;
MATQUANT_INLINE Table load_table(const std::uint8_t (&bytes)[16]) {
  return _mm512_maskz_broadcast_i32x4(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
MATQUANT_INLINE Bytes keep(Bytes a, Table mask) { return _mm512_and_si512(a, mask); }
MATQUANT_INLINE Bytes high_nibbles(Bytes a) { return keep<0x0F>(right<4>(a)); }
// Bytes of `at` are below 16.
MATQUANT_INLINE Bytes look_up(Table table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
MATQUANT_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
// a + b where sign is 1, a - b where it is -1
MATQUANT_INLINE Bytes add_signed(Bytes a, Bytes b, Bytes sign) {
  return _mm512_mask_sub_epi8(_mm512_add_epi8(a, b), _mm512_movepi8_mask(sign), a, b);
}

MATQUANT_INLINE Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.at, b.at)}; }
MATQUANT_INLINE Ints subtract(Ints a, std::int32_t b) { return {_mm512_sub_epi32(a.at, _mm512_set1_epi32(b))}; }
template <int COUNT>
MATQUANT_INLINE Ints left(Ints a) {
  return {_mm512_slli_epi32(a.at, COUNT)};
}
MATQUANT_INLINE Ints left(Ints a, int count) {
  return {_mm512_maskz_sll_epi32(0xFFFF, a.at, _mm_cvtsi32_si128(count))};
}
template <int COUNT>
MATQUANT_INLINE Ints right(Ints a) {
  return {_mm512_srai_epi32(a.at, COUNT)};
}
template <int LANE>
MATQUANT_INLINE Ints byte_of(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a, 8 * LANE), _mm512_set1_epi32(0xFF))};
}

// Sixteen integers within -128 .. 127, as bytes.
MATQUANT_INLINE void store_narrow(std::int8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xFFFF, a.at));
}

MATQUANT_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
MATQUANT_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a.at); }
MATQUANT_INLINE Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
MATQUANT_INLINE void store_floats(float* to, Floats a) { _mm512_storeu_ps(to, a); }
MATQUANT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
MATQUANT_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
MATQUANT_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MATQUANT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
MATQUANT_INLINE __m256i load_half(const std::uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
MATQUANT_INLINE Floats widen_bfloat16(const std::uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from)), 16));
}
MATQUANT_INLINE Floats widen_float16(const std::uint16_t* from) { return _mm512_cvtph_ps(load_half(from)); }

struct Sum {
  static constexpr Range alike(Range) { return Range::any; }
  static constexpr int taken(Range) { return 0; }
  __m512i ints;
  MATQUANT_INLINE void clear() { ints = _mm512_setzero_si512(); }
  template <Range, int, int>
  MATQUANT_INLINE void add(Bytes bytes, const std::int8_t* x) {
    std::int32_t four;
    __builtin_memcpy(&four, x, 4);
    ints = _mm512_dpbusd_epi32(ints, bytes, _mm512_set1_epi32(four));
  }
  template <Range>
  MATQUANT_INLINE Ints total() const {
    return {ints};
  }
};
