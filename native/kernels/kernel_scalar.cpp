// The kernels for any machine, in plain C++; the other sets are tested equal to this one.
#include "kernels/kernels.hpp"

#include <cmath>
#include <cstring>

namespace matquant {
namespace {

#define MATQUANT_EACH(count) for (int i = 0; i < (count); ++i)

constexpr int FREE_SUMS = 0;  // of products with any byte, at no cost: none
constexpr bool PARTS_ARE_FASTER = false;
// Up to this many tokens are multiplied with codes in the registers in which these were decoded (docs/kernels.md).
constexpr int fused_tokens(int) { return 0; }
constexpr int GEMM_BLOCKS = 1;
constexpr int gemm_step(Range) { return 8; }

struct Bytes {
  alignas(16) std::uint8_t at[64];
};
struct Ints {
  std::int32_t at[16];
};
struct Floats {
  float at[16];
};

inline Bytes load(const std::uint8_t* from) {
  Bytes out;
  std::memcpy(out.at, from, 64);
  return out;
}
constexpr int PIECES = 1;  // a vector is decoded in one piece
using Piece = Bytes;
template <int>
inline Piece load_piece(const std::uint8_t* from) {
  return load(from);
}
template <int>
inline void store_piece(std::uint8_t* to, const Piece& bytes) {
  std::memcpy(to, bytes.at, 64);
}
template <int MASK>
inline Bytes keep(Bytes a) {
  MATQUANT_EACH(64) a.at[i] &= MASK;
  return a;
}
template <int MASK>
inline Bytes select(Bytes a, const Bytes& b) {
  MATQUANT_EACH(64) a.at[i] = static_cast<std::uint8_t>((a.at[i] & MASK) | (b.at[i] & ~MASK));
  return a;
}
// The bits of FIRST from a, of SECOND from b, the others from c.
template <int FIRST, int SECOND>
inline Bytes select(const Bytes& a, const Bytes& b, const Bytes& c) {
  return select<FIRST>(a, select<SECOND>(b, c));
}
template <int COUNT>
inline Bytes right(Bytes a) {
  MATQUANT_EACH(64) a.at[i] = static_cast<std::uint8_t>(a.at[i] >> COUNT);
  return a;
}
template <int COUNT>
inline Bytes left(Bytes a) {
  MATQUANT_EACH(64) a.at[i] = static_cast<std::uint8_t>(a.at[i] << COUNT);
  return a;
}

struct Slicer {
  const Width width;
  explicit Slicer(const Width& of) : width(of) {}
  Bytes operator()(Bytes a) const {
    MATQUANT_EACH(64) {
      const int code = (a.at[i] >> width.shift & width.mask) + (a.at[i] >> width.round_shift & width.round_mask);
      a.at[i] = static_cast<std::uint8_t>(code < width.cap ? code : width.cap);
    }
    return a;
  }
};

struct Table {
  std::uint8_t at[16];
};
inline Table load_table(const std::uint8_t (&bytes)[16]) {
  Table table;
  std::memcpy(table.at, bytes, 16);
  return table;
}
inline Bytes keep(Bytes a, const Table& mask) {
  MATQUANT_EACH(64) a.at[i] &= mask.at[i % 16];
  return a;
}
inline Bytes high_nibbles(const Bytes& a) { return right<4>(a); }
inline Bytes look_up(const Table& table, Bytes at) {
  MATQUANT_EACH(64) at.at[i] = table.at[at.at[i]];
  return at;
}
inline Bytes add_bytes(Bytes a, const Bytes& b) {
  MATQUANT_EACH(64) a.at[i] = static_cast<std::uint8_t>(a.at[i] + b.at[i]);
  return a;
}
// a + b where sign is 1, a - b where it is -1
inline Bytes add_signed(Bytes a, const Bytes& b, const Bytes& sign) {
  MATQUANT_EACH(64) a.at[i] = static_cast<std::uint8_t>(sign.at[i] == 1 ? a.at[i] + b.at[i] : a.at[i] - b.at[i]);
  return a;
}

inline Ints add(Ints a, const Ints& b) {
  MATQUANT_EACH(16) a.at[i] += b.at[i];
  return a;
}
inline Ints subtract(Ints a, std::int32_t b) {
  MATQUANT_EACH(16) a.at[i] -= b;
  return a;
}
template <int COUNT>
inline Ints left(Ints a) {
  MATQUANT_EACH(16) a.at[i] *= 1 << COUNT;
  return a;
}
inline Ints left(Ints a, int count) {
  MATQUANT_EACH(16) a.at[i] *= 1 << count;
  return a;
}
template <int COUNT>
inline Ints right(Ints a) {
  MATQUANT_EACH(16) a.at[i] >>= COUNT;
  return a;
}
template <int LANE>
inline Ints byte_of(const Bytes& a) {
  Ints out;
  MATQUANT_EACH(16) out.at[i] = a.at[4 * i + LANE];
  return out;
}

// Sixteen integers within -128 .. 127, as bytes.
inline void store_narrow(std::int8_t* to, const Ints& a) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(a.at[i]);
}

inline Floats broadcast(float value) {
  Floats out;
  MATQUANT_EACH(16) out.at[i] = value;
  return out;
}
inline Floats to_floats(const Ints& a) {
  Floats out;
  MATQUANT_EACH(16) out.at[i] = static_cast<float>(a.at[i]);
  return out;
}
inline Floats load_floats(const float* from) {
  Floats out;
  std::memcpy(out.at, from, sizeof out);
  return out;
}
inline void store_floats(float* to, const Floats& a) { std::memcpy(to, a.at, sizeof a); }
inline Floats add(Floats a, const Floats& b) {
  MATQUANT_EACH(16) a.at[i] += b.at[i];
  return a;
}
inline Floats subtract(Floats a, const Floats& b) {
  MATQUANT_EACH(16) a.at[i] -= b.at[i];
  return a;
}
inline Floats multiply(Floats a, const Floats& b) {
  MATQUANT_EACH(16) a.at[i] *= b.at[i];
  return a;
}
inline Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
  MATQUANT_EACH(16) c.at[i] = std::fma(a.at[i], b.at[i], c.at[i]);
  return c;
}
inline Floats widen_bfloat16(const std::uint16_t* from) {
  Floats out;
  MATQUANT_EACH(16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
    std::memcpy(&out.at[i], &bits, 4);
  }
  return out;
}
// For finite numbers: a multiplication moves the exponent, which is exact even for subnormal numbers.
inline Floats widen_float16(const std::uint16_t* from) {
  Floats out;
  MATQUANT_EACH(16) {
    const std::uint32_t magnitude = (from[i] & 0x7FFFu) << 13, sign = (from[i] & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&out.at[i], &bits, 4);
  }
  return out;
}

struct Sum {
  static constexpr Range alike(Range) { return Range::any; }
  static constexpr int taken(Range) { return 0; }  // the constant that is subtracted from the bytes
  Ints ints;
  void clear() { ints = {}; }
  template <Range, int, int>
  void add(const Bytes& bytes, const std::int8_t* x) {
    MATQUANT_EACH(16)
    ints.at[i] += bytes.at[4 * i] * x[0] + bytes.at[4 * i + 1] * x[1] + bytes.at[4 * i + 2] * x[2] +
                  bytes.at[4 * i + 3] * x[3];
  }
  template <Range>
  Ints total() const {
    return ints;
  }
};

#include "kernel.inl"

}  // namespace

const Kernels kernels_scalar = {"scalar", NEVER, prepare_share, linear_share, codes, &float_kernels_scalar};

}  // namespace matquant
