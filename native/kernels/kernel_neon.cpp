// The kernels for Arm with the dot product (ARMv8.2, all Apple silicon). sdot multiplies signed bytes, so bytes that
// may exceed 127 have 128 subtracted.
#include "kernels/kernels.hpp"

#include <arm_neon.h>

namespace matquant {
namespace {

constexpr int FREE_SUMS = 0;  // of products with any byte, at no cost: none
constexpr bool PARTS_ARE_FASTER = false;
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int) { return 1; }
constexpr int GEMM_BLOCKS = 1;
constexpr int gemm_step(Range) { return 4; }  // 4 tokens x 4 registers of sums, out of 32 registers

#define MATQUANT_FOUR(expression) \
  { {[&](int i) { return (expression); }(0), [&](int i) { return (expression); }(1), \
     [&](int i) { return (expression); }(2), [&](int i) { return (expression); }(3)} }

// Rows 0..3, 4..7, 8..11, 12..15.
struct Bytes {
  uint8x16_t at[4];
};
struct Ints {
  int32x4_t at[4];
};
struct Floats {
  float32x4_t at[4];
};

MATQUANT_INLINE Bytes load(const std::uint8_t* from) { return MATQUANT_FOUR(vld1q_u8(from + 16 * i)); }
constexpr int PIECES = 1;  // a vector is decoded in one piece
using Piece = Bytes;
template <int>
MATQUANT_INLINE Piece load_piece(const std::uint8_t* from) {
  return load(from);
}
template <int>
MATQUANT_INLINE void store_piece(std::uint8_t* to, Piece a) {
  for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, a.at[i]);
}
template <int MASK>
MATQUANT_INLINE Bytes keep(Bytes a) {
  return MATQUANT_FOUR(vandq_u8(a.at[i], vdupq_n_u8(MASK)));
}
template <int MASK>
MATQUANT_INLINE Bytes select(Bytes a, Bytes b) {
  return MATQUANT_FOUR(vbslq_u8(vdupq_n_u8(MASK), a.at[i], b.at[i]));
}
// The bits of FIRST from a, of SECOND from b, the others from c.
template <int FIRST, int SECOND>
MATQUANT_INLINE Bytes select(Bytes a, Bytes b, Bytes c) {
  return select<FIRST>(a, select<SECOND>(b, c));
}
template <int COUNT>
MATQUANT_INLINE Bytes right(Bytes a) {
  return MATQUANT_FOUR(vshrq_n_u8(a.at[i], COUNT));
}
template <int COUNT>
MATQUANT_INLINE Bytes left(Bytes a) {
  return MATQUANT_FOUR(vshlq_n_u8(a.at[i], COUNT));
}

struct Slicer {
  int8x16_t shift, round_shift;  // to the left, so negative
  uint8x16_t mask, round_mask, cap;
  MATQUANT_INLINE explicit Slicer(const Width& width)
      : shift(vdupq_n_s8(static_cast<std::int8_t>(-width.shift))),
        round_shift(vdupq_n_s8(static_cast<std::int8_t>(-width.round_shift))),
        mask(vdupq_n_u8(static_cast<std::uint8_t>(width.mask))),
        round_mask(vdupq_n_u8(static_cast<std::uint8_t>(width.round_mask))),
        cap(vdupq_n_u8(static_cast<std::uint8_t>(width.cap))) {}
  MATQUANT_INLINE uint8x16_t quarter(uint8x16_t a) const {
    const uint8x16_t top = vandq_u8(vshlq_u8(a, shift), mask);
    return vminq_u8(vaddq_u8(top, vandq_u8(vshlq_u8(a, round_shift), round_mask)), cap);
  }
  MATQUANT_INLINE Bytes operator()(Bytes a) const { return MATQUANT_FOUR(quarter(a.at[i])); }
};

using Table = uint8x16_t;
MATQUANT_INLINE Table load_table(const std::uint8_t (&bytes)[16]) { return vld1q_u8(bytes); }
MATQUANT_INLINE Bytes keep(Bytes a, Table mask) { return MATQUANT_FOUR(vandq_u8(a.at[i], mask)); }
MATQUANT_INLINE Bytes high_nibbles(Bytes a) { return right<4>(a); }
// Bytes of `at` are below 16.
MATQUANT_INLINE Bytes look_up(Table table, Bytes at) { return MATQUANT_FOUR(vqtbl1q_u8(table, at.at[i])); }
MATQUANT_INLINE Bytes add_bytes(Bytes a, Bytes b) { return MATQUANT_FOUR(vaddq_u8(a.at[i], b.at[i])); }
// a + b where sign is 1, a - b where it is -1
MATQUANT_INLINE Bytes add_signed(Bytes a, Bytes b, Bytes sign) {
  return MATQUANT_FOUR(vmlaq_u8(a.at[i], b.at[i], sign.at[i]));
}

MATQUANT_INLINE Ints add(Ints a, Ints b) { return MATQUANT_FOUR(vaddq_s32(a.at[i], b.at[i])); }
MATQUANT_INLINE Ints subtract(Ints a, std::int32_t b) { return MATQUANT_FOUR(vsubq_s32(a.at[i], vdupq_n_s32(b))); }
template <int COUNT>
MATQUANT_INLINE Ints left(Ints a) {
  return MATQUANT_FOUR(vshlq_n_s32(a.at[i], COUNT));
}
MATQUANT_INLINE Ints left(Ints a, int count) { return MATQUANT_FOUR(vshlq_s32(a.at[i], vdupq_n_s32(count))); }
template <int COUNT>
MATQUANT_INLINE Ints right(Ints a) {
  if constexpr (COUNT == 0)
    return a;
  else
    return MATQUANT_FOUR(vshrq_n_s32(a.at[i], COUNT));
}
template <int LANE>
MATQUANT_INLINE int32x4_t byte_of_quarter(uint8x16_t a) {
  uint32x4_t words = vreinterpretq_u32_u8(a);
  if constexpr (LANE > 0) words = vshrq_n_u32(words, 8 * LANE);
  return vreinterpretq_s32_u32(vandq_u32(words, vdupq_n_u32(0xFF)));
}
template <int LANE>
MATQUANT_INLINE Ints byte_of(Bytes a) {
  return MATQUANT_FOUR(byte_of_quarter<LANE>(a.at[i]));
}

// Sixteen integers within -128 .. 127, as bytes.
MATQUANT_INLINE void store_narrow(std::int8_t* to, Ints a) {
  const int16x8_t first = vcombine_s16(vmovn_s32(a.at[0]), vmovn_s32(a.at[1]));
  const int16x8_t last = vcombine_s16(vmovn_s32(a.at[2]), vmovn_s32(a.at[3]));
  vst1q_s8(to, vcombine_s8(vmovn_s16(first), vmovn_s16(last)));
}

MATQUANT_INLINE Floats broadcast(float value) {
  const float32x4_t all = vdupq_n_f32(value);
  return {{all, all, all, all}};
}
MATQUANT_INLINE Floats to_floats(Ints a) { return MATQUANT_FOUR(vcvtq_f32_s32(a.at[i])); }
MATQUANT_INLINE Floats load_floats(const float* from) { return MATQUANT_FOUR(vld1q_f32(from + 4 * i)); }
MATQUANT_INLINE void store_floats(float* to, Floats a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.at[i]);
}
MATQUANT_INLINE Floats add(Floats a, Floats b) { return MATQUANT_FOUR(vaddq_f32(a.at[i], b.at[i])); }
MATQUANT_INLINE Floats subtract(Floats a, Floats b) { return MATQUANT_FOUR(vsubq_f32(a.at[i], b.at[i])); }
MATQUANT_INLINE Floats multiply(Floats a, Floats b) { return MATQUANT_FOUR(vmulq_f32(a.at[i], b.at[i])); }
MATQUANT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return MATQUANT_FOUR(vfmaq_f32(c.at[i], a.at[i], b.at[i]));
}
MATQUANT_INLINE Floats widen_bfloat16(const std::uint16_t* from) {
  return MATQUANT_FOUR(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)));
}
MATQUANT_INLINE Floats widen_float16(const std::uint16_t* from) {
  return MATQUANT_FOUR(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))));
}

struct Sum {
  static constexpr Range alike(Range range) { return taken(range) == 0 ? Range::to_16 : Range::any; }
  static constexpr int taken(Range range) { return range == Range::to_128 || range == Range::any ? 128 : 0; }
  Ints ints;
  MATQUANT_INLINE void clear() {
    const int32x4_t none = vdupq_n_s32(0);
    ints = {{none, none, none, none}};
  }
  template <Range RANGE>
  MATQUANT_INLINE static int8x16_t centred(uint8x16_t bytes) {
    if constexpr (taken(RANGE) == 0) return vreinterpretq_s8_u8(bytes);
    return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
  }
  template <Range RANGE, int, int>
  MATQUANT_INLINE void add(Bytes bytes, const std::int8_t* x) {
    std::int32_t four;
    __builtin_memcpy(&four, x, 4);
    const int8x16_t fours = vreinterpretq_s8_s32(vdupq_n_s32(four));
    ints = MATQUANT_FOUR(vdotq_s32(ints.at[i], centred<RANGE>(bytes.at[i]), fours));
  }
  template <Range>
  MATQUANT_INLINE Ints total() const {
    return ints;
  }
};

#include "kernel.inl"

}  // namespace

const Kernels kernels_neon = {"neon", NEVER, prepare_share, linear_share, codes, &float_kernels_neon};

}  // namespace matquant
