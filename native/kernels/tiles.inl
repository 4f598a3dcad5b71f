// Decodes whole tiles to memory. Included by kernel.inl.

struct Store {
  MATQUANT_INLINE explicit Store(const Width&) {}
  template <int PIECE>
  MATQUANT_INLINE void piece(std::uint8_t* to, const Piece& bytes) const {
    store_piece<PIECE>(to, bytes);
  }
};

// Writes the integers of so many tiles, [tile][quad][16 rows][4 inputs].
template <class Reading, class STORE>
void decode_tiles(const Streams& from, const Width& width, unsigned tiles, std::uint8_t* out) {
  const Reading reading(width);
  const STORE store(width);
  Streams streams = from;  // copied here: as an argument it goes through memory, and is read before it is there
  for (; tiles > 0; --tiles) {
    prefetch<Reading::read>(streams);
    reading.decode(streams, [&](auto quad, auto, auto piece, const Piece& bytes) MATQUANT_LAMBDA {
      store.template piece<piece.value>(out + quad * VECTOR_BYTES, bytes);
    });
    streams.template advance<Reading::read>();
    out += TILE_QUADS * VECTOR_BYTES;
  }
}

using Decode = void (*)(const Streams&, const Width&, unsigned, std::uint8_t*);

template <template <int, int> class READING, class STORE>
Decode decode_of(int read) {
  switch (read) {
    case 2: return decode_tiles<READING<2, 0>, STORE>;
    case 3: return decode_tiles<READING<3, 0>, STORE>;
    case 4: return decode_tiles<READING<4, 0>, STORE>;
    case 6: return decode_tiles<READING<6, 0>, STORE>;
    default: return decode_tiles<READING<8, 0>, STORE>;
  }
}

// For the codes themselves, whatever the grid.
template <class STORE = Store>
Decode code_decode_of(const Width& width) {
  return width.sliced ? decode_of<Sliced, STORE>(width.read) : decode_of<Unsliced, STORE>(width.read);
}

template <class STORE = Store>
Decode decode_of(const Width& width) {
  return width.tables != nullptr ? decode_of<Companded, STORE>(width.read) : code_decode_of<STORE>(width);
}
