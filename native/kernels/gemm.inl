// Row blocks times many tokens: a segment is decoded to memory once and then multiplied with every panel. Included by
// kernel.inl.

constexpr int GEMM_TOKENS = 128;  // that share a decoded segment; their float sums stay in L1 and L2

// The float sums of BLOCKS row blocks and 128 tokens, [panel][block][M][16].
template <int BLOCKS>
struct FloatSums {
  alignas(64) float totals[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];
  alignas(64) float groups[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];  // of a group that has begun
};

// What a segment is to its group, and the group's scales and zero-points in each row block.
template <int BLOCKS>
struct GroupPart {
  bool begins, ends;
  RowAffine affine[BLOCKS];
};

// Adds (codes - c) . x_codes for the tokens TOKEN .. TOKEN + TOKENS - 1 of a panel of M to its sums.
template <Range RANGE, int BLOCKS, int M, int TOKEN, int TOKENS>
MATQUANT_INLINE void multiply_panel(const std::uint8_t* codes, unsigned tiles, int centre, const SegmentCodes<M>& x,
                                    const GroupPart<BLOCKS>& part, float* totals, float* groups) {
  const int taken = centre - Sum::taken(RANGE);
  Sum sums[BLOCKS * TOKENS];
  unroll<BLOCKS * TOKENS>([&](auto sum) MATQUANT_LAMBDA { sums[sum].clear(); });
  // Piece by piece: AVX2 has registers for the sums of one.
  unroll<PIECES>([&](auto piece) MATQUANT_LAMBDA {
    const std::uint8_t* tile_codes = codes;
    const std::int8_t* x_codes = x.codes + TOKEN * 4;
    for (unsigned tile = 0; tile < tiles; ++tile) {
      unroll<TILE_QUADS>([&](auto quad) MATQUANT_LAMBDA {
        unroll<BLOCKS>([&](auto block) MATQUANT_LAMBDA {
          const Piece bytes = load_piece<piece.value>(tile_codes + block * SEGMENT_BYTES + quad * VECTOR_BYTES);
          unroll<TOKENS>([&](auto token) MATQUANT_LAMBDA {
            sums[block * TOKENS + token].template add<RANGE, quad.value, piece.value>(bytes,
                                                                                      x_codes + (quad * M + token) * 4);
          });
        });
      });
      tile_codes += TILE_QUADS * VECTOR_BYTES;
      x_codes += TILE_INPUTS * M;
    }
  });
  const auto add_to = [&](Floats group, auto block, auto token) MATQUANT_LAMBDA {
    constexpr int AT = TOKEN + token.value;
    const Ints centred = subtract(sums[block * TOKENS + token].template total<RANGE>(), x.sums[AT] * taken);
    return add_products(group, part.affine[block].offset, centred, x.scales[AT], x.x_sums[AT]);
  };
  unroll<BLOCKS * TOKENS>([&](auto sum) MATQUANT_LAMBDA {
    constexpr Index<sum.value / TOKENS> block{};
    constexpr Index<sum.value % TOKENS> token{};
    const int at = (block * M + TOKEN + token) * BLOCK_ROWS;
    const auto end = [&](Floats group) MATQUANT_LAMBDA {
      store_floats(totals + at, multiply_add(part.affine[block].scale, group, load_floats(totals + at)));
    };
    // Most groups are a segment, and 1 to 2 % faster without the tests below.
    if (part.begins && part.ends) return end(add_to(broadcast(0.0f), block, token));
    const Floats group = add_to(part.begins ? broadcast(0.0f) : load_floats(groups + at), block, token);
    part.ends ? end(group) : store_floats(groups + at, group);
  });
}

// BLOCKS row blocks times the tokens first_token .. first_token + 127, in panels of M.
template <Range RANGE, int BLOCKS, int M>
void many_tokens(const Linear& weight, const Width& width, const Input& input, int block, int first_token, float* y,
                 std::ptrdiff_t y_stride) {
  constexpr int STEP = smaller(M, gemm_step(RANGE)), PANEL_SUMS = BLOCKS * M * BLOCK_ROWS;
  alignas(64) std::uint8_t decoded[BLOCKS * SEGMENT_BYTES];
  FloatSums<BLOCKS> sums;
  const int tokens = smaller(GEMM_TOKENS, input.tokens - first_token);
  const int panels = ceil_div(tokens, M);
  const bool whole_tiles = has_whole_tiles(weight);
  const std::size_t groups = weight.cols / weight.group;
  const Affines affines(weight, width);
  const Decode decode_segment = decode_of(width);
  for (int at = 0; at < panels * PANEL_SUMS; ++at) sums.totals[at] = 0.0f;

  GroupPart<BLOCKS> part;
  part.ends = true;
  for (Segments segments(weight, input); segments.more();) {
    const Segment segment = segments.next();
    part.begins = part.ends;
    part.ends = segment.ends_group;
    for (int one = 0; one < BLOCKS; ++one) {
      if (part.begins) part.affine[one] = affines.of((block + one) * groups + segment.group);
      decode_segment(Streams(weight, block + one, segment.first_tile), width, segment.tiles(),
                     decoded + one * SEGMENT_BYTES);
    }
    for (int panel = 0; panel < panels; ++panel) {
      const SegmentCodes<M> x(Panel<M>(input, first_token / M + panel), segment, whole_tiles);
      unroll<M / STEP>([&](auto step) MATQUANT_LAMBDA {
        multiply_panel<RANGE, BLOCKS, M, step.value * STEP, STEP>(
            decoded, segment.tiles(), width.centre, x, part, sums.totals + panel * PANEL_SUMS,
            sums.groups + panel * PANEL_SUMS);
      });
    }
  }
  for (int one = 0; one < BLOCKS; ++one)
    for (int token = 0; token < tokens; ++token) {
      const int row = (block + one) * BLOCK_ROWS;
      const float* total = sums.totals + token / M * PANEL_SUMS + (one * M + token % M) * BLOCK_ROWS;
      store_rows(y + (first_token + token) * y_stride + row, load_floats(total), weight.rows - row);
    }
}

using ManyTokens = void (*)(const Linear&, const Width&, const Input&, int, int, float*, std::ptrdiff_t);

template <int BLOCKS, int M>
ManyTokens many_tokens_of(const Width& width) {
  switch (width.range) {
    case Range::to_16: return many_tokens<Sum::alike(Range::to_16), BLOCKS, M>;
    case Range::to_32: return many_tokens<Sum::alike(Range::to_32), BLOCKS, M>;
    case Range::to_64: return many_tokens<Sum::alike(Range::to_64), BLOCKS, M>;
    case Range::to_128: return many_tokens<Sum::alike(Range::to_128), BLOCKS, M>;
    default: return many_tokens<Range::any, BLOCKS, M>;
  }
}
