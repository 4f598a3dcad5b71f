#include "core/width.hpp"

namespace matquant {
namespace {

// The integer of a code on the companded grid; as nest.integer_positions.
constexpr int companded(int bits, int code) {
  if (bits == 7) return (companded(8, 2 * code) + companded(8, 2 * code + 1) - 1) / 2;
  const int from_middle = 2 * code - (1 << bits) + 1, distance = from_middle < 0 ? -from_middle : from_middle;
  const int outside = distance > 1 << (bits - 1) ? distance - (1 << (bits - 1)) : 0;
  const int eighths = from_middle < 0 ? -3 * distance - 2 * outside : 3 * distance + 2 * outside;
  return bits == 8 ? (1024 + eighths) / 8 : 2 * ((1 << bits) - 1) + (eighths - 1) / 2;
}

constexpr bool is_inner(int nibble) { return nibble >= 4 && nibble < 12; }

// Entry i of Tables::by_six[part].
constexpr int by_six(int bits, int part, int i) {
  if (bits <= 2) return companded(bits, (i >> 2 * part & 3) >> (2 - bits));
  if (bits <= 4) return companded(bits, (i & 15) >> (4 - bits));
  const int six = (i & 15) << 2 | i >> 4, ends = (i & 12) << 4 | (i & 3);
  if (bits <= 6) return companded(bits, six >> (6 - bits));
  const auto of_eight = [bits](int label) { return companded(bits, label >> (8 - bits)); };
  return part == 0 ? of_eight(six << 2) : of_eight(ends) - of_eight(ends & ~3);
}

constexpr Tables tables_of(int bits) {
  Tables tables{};
  const int largest = companded(bits, (1 << bits) - 1);
  tables.centre = (largest + 1) / 2;
  tables.range = largest <= 16    ? Range::to_16
                 : largest <= 32  ? Range::to_32
                 : largest <= 64  ? Range::to_64
                 : largest <= 128 ? Range::to_128
                                  : Range::any;
  for (int part = 0; part < 3; ++part)
    for (int i = 0; i < 64; ++i)
      tables.by_six[part][i] = static_cast<std::uint8_t>(by_six(bits, part, i));
  tables.lift = bits >= 6 ? 2 : bits == 5 ? 1 : 0;
  for (int i = 0; i < 16; ++i) {
    const int ends = i >> 2 << 4 | (i & 3);  // six bits: the first two and the last two of i, with zeros between
    int top = 0, rest = 0;
    if (bits <= 2) {
      top = companded(bits, i >> 2 >> (2 - bits));
      rest = companded(bits, (i & 3) >> (2 - bits));
    } else if (bits <= 4) {
      top = companded(bits, i >> (4 - bits));
    } else if (bits <= 6) {
      top = companded(4, i);
      rest = companded(bits, ends >> (6 - bits)) - (companded(4, ends >> 2) << tables.lift);
    } else {
      top = companded(8, 16 * i) >> tables.lift;
      rest = (i + 2) >> 2;
    }
    tables.top[i] = static_cast<std::uint8_t>(top);
    tables.top_lifted[i] = static_cast<std::uint8_t>(top << tables.lift);
    tables.rest[i] = static_cast<std::uint8_t>(rest);
    tables.sign[i] = static_cast<std::uint8_t>(is_inner(i) ? -1 : 1);
    tables.rest_mask[i] = bits == 7 ? 0x0E : 0x0F;
  }
  return tables;
}

constexpr Tables COMPANDED[9] = {{},           tables_of(1), tables_of(2), tables_of(3), tables_of(4),
                                 tables_of(5), tables_of(6), tables_of(7), tables_of(8)};

}  // namespace

int integer_of(int code, int bits, Rule rule, Grid grid) {
  int slice = code >> (8 - bits);
  if (rule != Rule::prefix && bits < 8) {
    slice += code >> (7 - bits) & 1;
    const int cap = rule == Rule::extra ? 1 << bits : (1 << bits) - 1;
    slice = slice < cap ? slice : cap;
  }
  return grid == Grid::companded ? companded(bits, slice) : slice;
}

Width width_of(int bits, Rule rule, Grid grid) {
  const bool rounds = rule != Rule::prefix && bits < 8;
  const int read = bits_read(bits, rule);
  // Position of the lowest bit read within a decoded byte (decode.inl): six bits begin at bit 2.
  const int base = read == 6 ? 2 : 0;
  const int shift = base + read - bits;
  const Tables* const tables = grid == Grid::companded ? &COMPANDED[bits] : nullptr;
  return {bits,
          read,
          rounds || read != bits,
          shift,
          (1 << bits) - 1,
          rounds ? shift - 1 : 0,
          rounds ? 1 : 0,
          rule == Rule::extra ? 1 << bits : (1 << bits) - 1,
          tables,
          tables != nullptr ? tables->centre : 1 << (bits - 1),
          tables != nullptr ? tables->range
          : read <= 4       ? Range::to_16
          : bits < 8        ? Range::to_128
                            : Range::any};
}

}  // namespace matquant
