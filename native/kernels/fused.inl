// One row block times a panel of M tokens. Codes are multiplied in the registers in which they were decoded. Included
// by kernel.inl.

// Adds the products of a segment to the sums [PLACES][M].
template <class Reading, int M>
MATQUANT_INLINE void add_segment(const Reading& reading, const Streams& streams, const Segment& segment,
                                 const std::int8_t* codes, Sum* sums) {
  for (unsigned tile = segment.first_tile; tile < segment.stop_tile; ++tile, codes += TILE_INPUTS * M) {
    prefetch<Reading::read>(streams, tile);
    reading.decode(streams, tile, [&](auto quad, auto place, auto piece, const Piece& bytes) MATQUANT_LAMBDA {
      constexpr Range RANGE = Reading::template range<place.value>;
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        sums[place * M + token].template add<RANGE, quad.value, piece.value>(bytes, codes + (quad * M + token) * 4);
      });
    });
  }
}

template <class Reading, int M>
void block_of_rows(const Linear& weight, const Width& width, const Input& input, int panel_index, int block, float* y,
                   std::ptrdiff_t y_stride) {
  constexpr int PLACES = Reading::places, BASE = Reading::base;
  const bool whole_tiles = has_whole_tiles(weight);
  const int groups = weight.cols / weight.group;
  constexpr int TAKEN = Sum::taken(Reading::template range<0>);
  static_assert(TAKEN == 0 || PLACES == 1, "only bytes of a single place may have a constant subtracted");
  const int offset = (width.centre << BASE) - TAKEN;
  const Streams streams = streams_of(weight, block);
  const Reading reading(width);
  const Panel<M> panel(input, panel_index);

  Accumulators<M> at;
  at.clear();
  for (Segments segments(weight); segments.more();) {
    const Segment segment = segments.next();
    const SegmentCodes<M> x(panel, segment, whole_tiles);
    Sum sums[PLACES * M];
    unroll<PLACES * M>([&](auto sum) MATQUANT_LAMBDA { sums[sum].clear(); });
    add_segment<Reading, M>(reading, streams, segment, x.codes, sums);
    unroll<M>([&](auto token) MATQUANT_LAMBDA {
      Ints codes_sum = sums[token].total();
      unroll<PLACES - 1>([&](auto place) MATQUANT_LAMBDA {
        constexpr int PLACE = place.value + 1;
        codes_sum = add(codes_sum, reading.template lifted<PLACE>(sums[PLACE * M + token].total()));
      });
      codes_sum = right<BASE>(subtract(codes_sum, offset * x.sums[token]));
      at.dot[token] = add(at.dot[token], multiply(to_floats(codes_sum), broadcast(x.scales[token])));
      at.x_sum[token] += x.scales[token] * static_cast<float>(x.sums[token]);
    });
    if (segment.ends_group) at.end_group(row_affine(weight, width, groups, block, segment.group));
  }
  at.store(weight, input, panel_index * M, block, y, y_stride);
}

using BlockOfRows = void (*)(const Linear&, const Width&, const Input&, int, int, float*, std::ptrdiff_t);

// READING<READ, M>: a Reading for M tokens at a time.
template <template <int, int> class READING, int READ>
BlockOfRows block_of_rows_of(int panel) {
  constexpr int MOST = fused_tokens(READ);
  if constexpr (MOST > 1) {
    if (panel == 2) return block_of_rows<READING<READ, 2>, 2>;
    if (panel == 4) return block_of_rows<READING<READ, 4>, 4>;
  }
  if constexpr (MOST > 4)
    if (panel == 8) return block_of_rows<READING<READ, 8>, 8>;
  static_cast<void>(panel);
  return block_of_rows<READING<READ, 1>, 1>;
}

template <template <int, int> class READING>
BlockOfRows block_of_rows_of(const Width& width, int panel) {
  switch (width.read) {
    case 2: return block_of_rows_of<READING, 2>(panel);
    case 3: return block_of_rows_of<READING, 3>(panel);
    case 4: return block_of_rows_of<READING, 4>(panel);
    case 6: return block_of_rows_of<READING, 6>(panel);
    default: return block_of_rows_of<READING, 8>(panel);
  }
}

BlockOfRows block_of_rows_of(const Width& width, int panel) {
  if (width.tables != nullptr) return block_of_rows_of<Companded>(width, panel);
  return width.sliced ? block_of_rows_of<Sliced>(width, panel) : block_of_rows_of<Unsliced>(width, panel);
}
