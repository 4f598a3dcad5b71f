// Decodes planes to the integers of the companded grid, with tables of sixteen entries. Included by kernel.inl.

// Codes are looked up in tables of sixteen entries (Tables in width.hpp), which each width has for itself. Above four
// bits an integer is the sum of two parts. Where products are summed in 16 bits the parts are multiplied separately
// (SPLIT), because each is small.
template <int READ, int M>
struct Companded {
  static constexpr bool SPLIT = READ >= 6 && FREE_SUMS == 0 && M > 0;
  // As many independent sums as the uniform grid has.
  static constexpr bool APART = READ <= 4 && M > 0 && M * (READ == 2 ? 4 : 2) <= FREE_SUMS;
  static constexpr int read = READ;
  static constexpr int places = SPLIT ? 2 : !APART ? 1 : READ == 2 ? 4 : 2;
  static constexpr int base = 0;
  template <int PLACE>
  static constexpr Range range = READ == 2   ? Range::to_16
                                 : READ == 3 ? Range::to_32
                                 : READ == 4 ? Range::to_64
                                 : !SPLIT    ? Range::any
                                 : PLACE > 0 ? Range::to_64
                                 : READ == 6 ? Range::to_16
                                             : Range::to_32;

  const Table top, rest, sign, rest_mask;
  const int lift;
  MATQUANT_INLINE explicit Companded(const Width& width)
      : top(load_table(SPLIT ? width.tables->top : width.tables->top_lifted)),
        rest(load_table(width.tables->rest)),
        sign(load_table(width.tables->sign)),
        rest_mask(load_table(width.tables->rest_mask)),
        lift(width.tables->lift) {}

  template <int PLACE>
  MATQUANT_INLINE Ints lowered(Ints sum) const {
    return SPLIT && PLACE > 0 ? left(sum, lift) : sum;
  }

  template <class Sink>
  MATQUANT_INLINE void decode(const Streams& streams, Sink&& sink) const {
    if constexpr (READ == 2) {
      unroll<2 * PIECES>([&](auto at) MATQUANT_LAMBDA {
        constexpr int HALF = at.value / PIECES, PIECE = at.value % PIECES;
        const Piece two = plane_piece<0, PIECE>(streams, HALF);
        const Piece high = high_nibbles(two), low = keep<0x0F>(two);
        give<4 * HALF, PIECE>(look_up(top, high), sink);
        give<4 * HALF + 1, PIECE>(look_up(top, low), sink);
        give<4 * HALF + 2, PIECE>(look_up(rest, high), sink);
        give<4 * HALF + 3, PIECE>(look_up(rest, low), sink);
      });
    } else {
      each_pair<READ>(streams, [&](auto pair, auto piece, const Piece& two, const Piece& nibbles) MATQUANT_LAMBDA {
        constexpr int HIGH = 2 * pair.value, LOW = HIGH + 1, PIECE = piece.value;
        const Piece high = high_nibbles(nibbles), low = keep<0x0F>(nibbles);
        if constexpr (READ <= 4) {
          give<HIGH, PIECE>(look_up(top, high), sink);
          give<LOW, PIECE>(look_up(top, low), sink);
        } else if constexpr (READ == 6) {
          // The rest depends only on the top two bits and the last two.
          const Piece six = plane_piece<3, PIECE>(streams, pair / 2);
          const Piece ends = select<0xCC>(two, shift<pair.value % 2 == 1 ? 0 : 2>(six));
          give<HIGH, PIECE>(look_up(top, high), look_up(rest, high_nibbles(ends)), sink);
          give<LOW, PIECE>(look_up(top, low), look_up(rest, keep<0x0F>(ends)), sink);
        } else {
          const Piece four = low_bits<READ, pair.value, PIECE>(streams);
          give<HIGH, PIECE>(look_up(top, high), slope(high, keep(right<4>(four), rest_mask)), sink);
          give<LOW, PIECE>(look_up(top, low), slope(low, keep(four, rest_mask)), sink);
        }
      });
    }
  }

  // The last four bits plus or minus a quarter of them; the top four bits decide the sign.
  MATQUANT_INLINE Piece slope(const Piece& nibbles, const Piece& four) const {
    return add_signed(four, look_up(rest, four), look_up(sign, nibbles));
  }
  template <int QUAD, int PIECE, class Sink>
  MATQUANT_INLINE static void give(const Piece& bytes, Sink&& sink) {
    sink(Index<QUAD>{}, Index<QUAD % places>{}, Index<PIECE>{}, bytes);
  }
  template <int QUAD, int PIECE, class Sink>
  MATQUANT_INLINE static void give(const Piece& above, const Piece& below, Sink&& sink) {
    if constexpr (SPLIT) {
      sink(Index<QUAD>{}, Index<0>{}, Index<PIECE>{}, below);
      sink(Index<QUAD>{}, Index<1>{}, Index<PIECE>{}, above);
    } else {
      give<QUAD, PIECE>(add_bytes(above, below), sink);
    }
  }
};
