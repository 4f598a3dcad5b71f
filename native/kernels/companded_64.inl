// Decodes planes to the integers of the companded grid where one instruction looks up six bits of a byte. Included by
// kernel.inl instead of companded.inl.

// The bits of a code may stand in any order in the index, and the tables repeat for the bits that are not part of it,
// so most vectors need neither a shift nor a mask.
template <int READ, int M>
struct Companded {
  static constexpr bool APART = READ <= 4 && M > 0 && M * (READ == 2 ? 4 : 2) <= FREE_SUMS;
  static constexpr int read = READ;
  static constexpr int places = !APART ? 1 : READ == 2 ? 4 : 2;
  static constexpr int base = 0;
  template <int PLACE>
  static constexpr Range range = Range::any;

  const Table64 first, second, third;
  MATQUANT_INLINE explicit Companded(const Width& width)
      : first(load_table(width.tables->by_six[0])),
        second(load_table(width.tables->by_six[1])),
        third(load_table(width.tables->by_six[2])) {}

  template <int PLACE>
  MATQUANT_INLINE Ints lowered(Ints sum) const {
    return sum;
  }

  template <class Sink>
  MATQUANT_INLINE void decode(const Streams& streams, Sink&& sink) const {
    if constexpr (READ == 2) {
      each_two<0>(streams, [&](auto quad, auto piece, const Piece& two) MATQUANT_LAMBDA {
        constexpr int PLACE = quad.value % 4;  // at bits 6, 2, 4 and 0
        const Piece index = shift<PLACE == 0 ? 2 : 0>(two);
        const Table64& table = PLACE == 3 ? first : PLACE == 1 ? second : third;
        sink(quad, Index<PLACE % places>{}, piece, look_up_six(table, index));
      });
    } else {
      each_pair<READ>(streams, [&](auto pair, auto piece, const Piece& two, const Piece& nibbles) MATQUANT_LAMBDA {
        const auto give = [&](const Piece& high, const Piece& low) MATQUANT_LAMBDA {
          sink(Index<2 * pair.value>{}, Index<0>{}, piece, high);
          sink(Index<2 * pair.value + 1>{}, Index<1 % places>{}, piece, low);
        };
        if constexpr (READ <= 4) {
          give(look_up_six(first, right<4>(nibbles)), look_up_six(first, nibbles));
        } else {  // bits five and six of the code go to bits 4 and 5 of the index
          constexpr bool ODD = pair.value % 2 == 1;
          const Piece six = plane_piece<3, piece.value>(streams, pair / 2);
          const Piece high = look_up_six(first, select<0x0F>(right<4>(nibbles), shift<ODD ? 0 : 2>(six)));
          const Piece low = look_up_six(first, select<0x0F>(nibbles, shift<ODD ? -4 : -2>(six)));
          if constexpr (READ == 6) return give(high, low);
          const Piece eight = plane_piece<4, piece.value>(streams, pair / 2);
          const Piece ends = select<0xCC>(two, shift<ODD ? 0 : 2>(eight));
          give(add_bytes(high, look_up_six(second, right<4>(ends))), add_bytes(low, look_up_six(second, ends)));
        }
      });
    }
  }
};
