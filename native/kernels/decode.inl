// Decodes planes to the integers of the products, on the uniform grid. Included by kernel.inl.
//
// A Reading decodes the planes of a width for products with M tokens at a time. M = 0 decodes whole integers to memory,
// for many tokens.
//   read                  bits of the code that it reads
//   places                sums that its bytes go to; the integer is the sum over places of lowered(bytes)
//   base                  by which lowered<0> shifts right
//   range<place>          upper bound of the bytes
//   decode(..., sink)     calls sink(quad, place, piece, bytes) once or twice for each of the eight vectors of a tile

// Planes that hold the top READ bits.
constexpr int planes_read(int read) { return read == 2 ? 1 : read == 3 ? 2 : read == 4 ? 3 : read == 6 ? 4 : 5; }

MATQUANT_INLINE int tiles_of(int cols) { return ceil_div(cols, TILE_INPUTS); }

// The planes of one row block, from a tile on.
struct Streams {
  const std::uint8_t* plane[PLANE_COUNT] = {};

  MATQUANT_INLINE Streams(const Linear& weight, int block, unsigned tile = 0) {
    const std::size_t at = static_cast<std::size_t>(block) * tiles_of(weight.cols) + tile;
    for (int of = 0; of < PLANE_COUNT; ++of)
      if (weight.plane[of] != nullptr) plane[of] = weight.plane[of] + at * tile_bytes(of);
  }
  // To the next tile, for READ bits.
  template <int READ>
  MATQUANT_INLINE void advance() {
    unroll<planes_read(READ)>([&](auto of) MATQUANT_LAMBDA { plane[of] += tile_bytes(of); });
  }
};

// Prefetches about 8 KiB ahead, all planes together: a single thread then streams at 0.87-0.99 of the memory's speed
// instead of 0.57-0.85 (Zen 5). With all five planes 4 KiB are 7 % faster. On Intel no plane is prefetched more than
// 3 KiB ahead: int2 and int3 stream 8 to 14 % faster. It may run past the end of a plane, which is harmless.
template <int READ>
MATQUANT_INLINE void prefetch(const Streams& streams) {
  constexpr unsigned MOST = (READ == 8 ? 4096 : 8192) / (VECTOR_BYTES * READ), WITHIN_PAGE = 3072 / tile_bytes(0);
  const std::size_t ahead = prefetch_within_page && WITHIN_PAGE < MOST ? WITHIN_PAGE : MOST;
  unroll<planes_read(READ)>([&](auto plane) MATQUANT_LAMBDA {
    const auto at = reinterpret_cast<std::uintptr_t>(streams.plane[plane]) + ahead * tile_bytes(plane);
    unroll<PLANE_BITS[plane]>([&](auto line) MATQUANT_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const void*>(at + VECTOR_BYTES * line), 0, 3);
    });
  });
}

template <int PLANE, int PIECE>
MATQUANT_INLINE Piece plane_piece(const Streams& streams, int half = 0) {
  return load_piece<PIECE>(streams.plane[PLANE] + VECTOR_BYTES * half);
}

// Calls body(pair, piece, two, nibbles) for the four pairs of quads; quad 2 * pair is in the high nibbles and
// 2 * pair + 1 in the low ones. nibbles: the top four bits of the codes; the fourth is undefined for READ = 3. two: the
// top two bits, in the same places.
template <int READ, class Body>
MATQUANT_INLINE void each_pair(const Streams& streams, Body&& body) {
  unroll<4 * PIECES>([&](auto at) MATQUANT_LAMBDA {
    constexpr int PAIR = at.value / PIECES, PIECE = at.value % PIECES;
    constexpr int THIRD[4] = {0, -1, 1, 2}, FOURTH[4] = {0, 1, 2, 3};
    const Piece two = shift<PAIR % 2 == 1 ? -2 : 0>(plane_piece<0, PIECE>(streams, PAIR / 2));
    const Piece third = shift<THIRD[PAIR]>(plane_piece<1, PIECE>(streams));
    if constexpr (READ == 3) {
      body(Index<PAIR>{}, Index<PIECE>{}, two, select<0xCC>(two, third));
    } else {
      const Piece fourth = shift<FOURTH[PAIR]>(plane_piece<2, PIECE>(streams));
      body(Index<PAIR>{}, Index<PIECE>{}, two, select<0xCC, 0x22>(two, third, fourth));
    }
  });
}

// Calls body(quad, piece, two) for the eight quads; two: the vector of a plane of two bits that holds the quad.
template <int PLANE, class Body>
MATQUANT_INLINE void each_two(const Streams& streams, Body&& body) {
  unroll<2 * PIECES>([&](auto at) MATQUANT_LAMBDA {
    constexpr int HALF = at.value / PIECES, PIECE = at.value % PIECES;
    const Piece two = plane_piece<PLANE, PIECE>(streams, HALF);
    unroll<4>([&](auto quad) MATQUANT_LAMBDA { body(Index<4 * HALF + quad.value>{}, Index<PIECE>{}, two); });
  });
}

// The bits of a quad, its number mod 4, in a vector of `each_two`.
template <int PLACE>
MATQUANT_INLINE Piece two_bits(const Piece& two) {
  constexpr int DOWN[4] = {6, 2, 4, 0};
  return keep<0x03>(shift<DOWN[PLACE]>(two));
}

// The last four bits of the codes of a pair, as nibbles; for READ = 6 the last two are 0.
template <int READ, int PAIR, int PIECE>
MATQUANT_INLINE Piece low_bits(const Streams& streams) {
  constexpr bool ODD = PAIR % 2 == 1;
  const Piece six = plane_piece<3, PIECE>(streams, PAIR / 2);
  if constexpr (READ == 6) return keep<0xCC>(shift<ODD ? -2 : 0>(six));
  const Piece eight = plane_piece<4, PIECE>(streams, PAIR / 2);
  return ODD ? select<0xCC>(left<2>(six), eight) : select<0xCC>(six, right<2>(eight));
}

// ------------------------------------------------------------------------------------------------ the uniform grid

// A decoded byte may keep its code where it is (IN_PLACE): that saves the shift to bit 0, and bytes with codes in
// different places go to different sums. Codes above four bits may be multiplied as two parts (SPLIT): the top four
// bits and the others. SLICED codes are computed from the bits read by a Slicer.
template <int READ, bool SLICED, int M>
struct Uniform {
  static constexpr bool IN_PLACE = !SLICED && READ <= 4 && M > 0 && M * (READ == 2 ? 4 : 2) <= FREE_SUMS;
  static constexpr bool SPLIT = !SLICED && READ >= 6 && PARTS_ARE_FASTER && M > 0;
  static constexpr int read = READ;
  static constexpr int places = SPLIT ? 2 : !IN_PLACE ? 1 : READ == 2 ? 4 : 2;
  static constexpr int base = SPLIT ? 0 : READ == 6 && !SLICED && M > 0 ? 2 : IN_PLACE ? 8 - READ : 0;
  template <int PLACE>
  static constexpr Range range = READ == 2 || (SPLIT && READ == 6 && PLACE == 1) ? Range::to_4
                                 : READ <= 4 || SPLIT                            ? Range::to_16
                                 : SLICED                                        ? Range::to_128
                                                                                 : Range::any;

  const Slicer slicer;
  MATQUANT_INLINE explicit Uniform(const Width& width) : slicer(width) {}

  template <int PLACE>
  MATQUANT_INLINE Ints lowered(Ints sum) const {
    if constexpr (SPLIT) return left<PLACE == 0 ? READ - 4 : 0>(sum);
    constexpr int DROP[4] = {base, base - 4, base - 2, 0};
    return right<DROP[PLACE]>(sum);
  }

  template <class Sink>
  MATQUANT_INLINE void decode(const Streams& streams, Sink&& sink) const {
    const auto give = [&](auto quad, auto place, auto piece, Piece bytes) MATQUANT_LAMBDA {
      if constexpr (SLICED)
        bytes = slicer(bytes);
      else if constexpr (READ == 6 && M == 0)
        bytes = keep<0x3F>(right<2>(bytes));
      sink(quad, Index<place.value % places>{}, piece, bytes);
    };
    if constexpr (READ == 2) {
      each_two<0>(streams, [&](auto quad, auto piece, const Piece& two) MATQUANT_LAMBDA {
        constexpr int PLACE = quad.value % 4, MASKS[4] = {0xC0, 0x0C, 0x30, 0x03};
        give(quad, Index<PLACE>{}, piece, IN_PLACE ? keep<MASKS[PLACE]>(two) : two_bits<PLACE>(two));
      });
    } else if constexpr (SPLIT) {
      decode_parts(streams, sink);
    } else {
      each_pair<READ>(streams, [&](auto pair, auto piece, const Piece&, const Piece& nibbles) MATQUANT_LAMBDA {
        Piece high{}, low{};
        if constexpr (READ == 3) {
          high = IN_PLACE ? keep<0xE0>(nibbles) : keep<0x07>(right<5>(nibbles));
          low = IN_PLACE ? keep<0x0E>(nibbles) : keep<0x07>(right<1>(nibbles));
        } else if constexpr (READ == 4) {
          high = IN_PLACE ? keep<0xF0>(nibbles) : keep<0x0F>(right<4>(nibbles));
          low = keep<0x0F>(nibbles);
        } else {
          const Piece rest = low_bits<READ, pair.value, piece.value>(streams);
          high = select<0xF0>(nibbles, right<4>(rest));
          low = select<0xF0>(left<4>(nibbles), rest);
        }
        give(Index<2 * pair.value>{}, Index<0>{}, piece, high);
        give(Index<2 * pair.value + 1>{}, Index<1>{}, piece, low);
      });
    }
  }

  // Place 0 has the top four bits, place 1 the others.
  template <class Sink>
  MATQUANT_INLINE void decode_parts(const Streams& streams, Sink&& sink) const {
    each_pair<READ>(streams, [&](auto pair, auto piece, const Piece&, const Piece& nibbles) MATQUANT_LAMBDA {
      constexpr Index<2 * pair.value> high{};
      constexpr Index<2 * pair.value + 1> low{};
      sink(high, Index<0>{}, piece, keep<0x0F>(right<4>(nibbles)));
      sink(low, Index<0>{}, piece, keep<0x0F>(nibbles));
      if constexpr (READ == 8) {
        const Piece rest = low_bits<READ, pair.value, piece.value>(streams);
        sink(high, Index<1>{}, piece, keep<0x0F>(right<4>(rest)));
        sink(low, Index<1>{}, piece, keep<0x0F>(rest));
      }
    });
    if constexpr (READ == 6)
      each_two<3>(streams, [&](auto quad, auto piece, const Piece& two) MATQUANT_LAMBDA {
        sink(quad, Index<1>{}, piece, two_bits<quad.value % 4>(two));
      });
  }
};

template <int READ, int M>
using Unsliced = Uniform<READ, false, M>;
template <int READ, int M>
using Sliced = Uniform<READ, true, M>;
