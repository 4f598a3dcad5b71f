// Row blocks times panels of M tokens. Codes are multiplied in the registers in which they were decoded. Included by
// kernel.inl.

// Adds the products of the tile that streams and panel are at to the sums [PLACES][M], and its activation codes to
// code_sums [M]. Moves both to the next tile: numbers of tiles would need more registers than there are.
template <class Reading, int M>
MATQUANT_INLINE void add_tile(const Reading& reading, Streams& streams, Panel<M>& panel, Sum* sums, int* code_sums) {
  unroll<M>([&](auto token) MATQUANT_LAMBDA { code_sums[token] += panel.sums[token]; });
  prefetch<Reading::read>(streams);
  reading.decode(streams, [&](auto quad, auto place, auto piece, const Piece& bytes) MATQUANT_LAMBDA {
    constexpr Range RANGE = Reading::template range<place.value>;
    unroll<M>([&](auto token) MATQUANT_LAMBDA {
      sums[place * M + token].template add<RANGE, quad.value, piece.value>(bytes, panel.codes + (quad * M + token) * 4);
    });
  });
  streams.template advance<Reading::read>();
  panel.codes += TILE_INPUTS * M;
  panel.sums += M;
}

// The products of a segment of so many tiles; centre: subtracted from the integers. TILES > 0: their number, of a
// segment that is a whole group.
template <class Reading, int M, int TILES = 0>
MATQUANT_INLINE void add_segment(const Reading& reading, Streams& streams, Panel<M>& panel, unsigned tiles, int centre,
                                 const Affines& affines, std::size_t group, Accumulators<M>& at) {
  constexpr int PLACES = Reading::places;
  Sum sums[PLACES * M];
  int code_sums[M];
  unroll<PLACES * M>([&](auto sum) MATQUANT_LAMBDA { sums[sum].clear(); });
  unroll<M>([&](auto token) MATQUANT_LAMBDA { code_sums[token] = 0; });
  unroll<TILES>([&](auto) MATQUANT_LAMBDA { add_tile<Reading, M>(reading, streams, panel, sums, code_sums); });
  for (; tiles > TILES; --tiles) add_tile<Reading, M>(reading, streams, panel, sums, code_sums);
  const Floats offset = affines.of(group).offset;  // not sooner: the products need the registers
  unroll<M>([&](auto token) MATQUANT_LAMBDA {
    Ints sum = reading.template lowered<0>(sums[token].template total<Reading::template range<0>>());
    unroll<PLACES - 1>([&](auto place) MATQUANT_LAMBDA {
      constexpr int PLACE = place.value + 1;
      constexpr Range RANGE = Reading::template range<PLACE>;
      sum = add(sum, reading.template lowered<PLACE>(sums[PLACE * M + token].template total<RANGE>()));
    });
    sum = subtract(sum, centre * code_sums[token]);
    const float scale = panel.scales[token], x_sum = scale * static_cast<float>(code_sums[token]);
    const Floats before = TILES > 0 ? broadcast(0.0f) : at.group[token];
    at.group[token] = add_products(before, offset, sum, scale, x_sum);
  });
}

// A row block times a panel; group: the number of its first one. No segment begins or ends inside a tile.
template <class Reading, int M>
MATQUANT_INLINE void add_block(const Reading& reading, Streams streams, Panel<M> panel, const Affines& affines,
                               std::size_t group, unsigned tiles, unsigned group_tiles, int centre,
                               Accumulators<M>& at) {
  if constexpr (M == 1)  // groups of 64, without a loop over tiles or a sum over segments
    if (group_tiles == 2) {
      for (; tiles > 0; tiles -= 2) {
        add_segment<Reading, M, 2>(reading, streams, panel, 2, centre, affines, group, at);
        at.end_group(affines.of(group++));
        panel.scales += M;
      }
      return;
    }
  const unsigned within = (1u << panel.group_shift) - 1;  // numbers of the tiles of a group of activations
  unsigned tile = 0;
  for (unsigned group_stop = group_tiles; tile < tiles; group_stop += group_tiles) {
    while (tile < group_stop) {
      const unsigned activation_stop = (tile | within) + 1;
      const unsigned stop = activation_stop < group_stop ? activation_stop : group_stop;
      add_segment<Reading, M>(reading, streams, panel, stop - tile, centre, affines, group, at);
      tile = stop;
      if (tile == activation_stop) panel.scales += M;
    }
    at.end_group(affines.of(group++));
  }
}

// The row blocks first .. stop - 1, for all tokens.
template <class Reading, int M>
void row_blocks(const Linear& weight, const Width& width, const Input& input, int first, int stop, float* y,
                std::ptrdiff_t y_stride) {
  constexpr int TAKEN = Sum::taken(Reading::template range<0>);
  static_assert(TAKEN == 0 || Reading::places == 1, "only bytes of a single place may have a constant subtracted");
  const Reading reading(width);
  const Affines affines(weight, width);
  const int panels = ceil_div(input.tokens, M), centre = width.centre - (TAKEN >> Reading::base);
  const unsigned tiles = tiles_of(weight.cols), group_tiles = tiles_of(weight.group);
  const std::size_t groups = weight.cols / weight.group;
  // The planes of a block are still in the second-level cache for its second panel.
  for (int block = first; block < stop; ++block) {
    const Streams streams(weight, block);
    for (int index = 0; index < panels; ++index) {
      Accumulators<M> at;
      at.clear();
      add_block<Reading, M>(reading, streams, Panel<M>(input, index), affines, block * groups, tiles, group_tiles,
                            centre, at);
      at.store(weight, input, index * M, block, y, y_stride);
    }
  }
}

using RowBlocks = void (*)(const Linear&, const Width&, const Input&, int first, int stop, float*, std::ptrdiff_t);

// READING<READ, M>: a Reading for M tokens at a time.
template <template <int, int> class READING, int READ>
RowBlocks row_blocks_of(int panel) {
  constexpr int MOST = fused_tokens(READ);
  if constexpr (MOST > 1) {
    if (panel == 2) return row_blocks<READING<READ, 2>, 2>;
    if (panel == 4) return row_blocks<READING<READ, 4>, 4>;
  }
  if constexpr (MOST > 4)
    if (panel == 8) return row_blocks<READING<READ, 8>, 8>;
  static_cast<void>(panel);
  return row_blocks<READING<READ, 1>, 1>;
}

template <template <int, int> class READING>
RowBlocks row_blocks_of(const Width& width, int panel) {
  switch (width.read) {
    case 2: return row_blocks_of<READING, 2>(panel);
    case 3: return row_blocks_of<READING, 3>(panel);
    case 4: return row_blocks_of<READING, 4>(panel);
    case 6: return row_blocks_of<READING, 6>(panel);
    default: return row_blocks_of<READING, 8>(panel);
  }
}

RowBlocks row_blocks_of(const Width& width, int panel) {
  if (width.tables != nullptr) return row_blocks_of<Companded>(width, panel);
  return width.sliced ? row_blocks_of<Sliced>(width, panel) : row_blocks_of<Unsliced>(width, panel);
}
