// Row blocks times many tokens: a segment is decoded to memory once and then multiplied with every panel. Included by
// kernel.inl.

constexpr int GEMM_TOKENS = 128;  // that share a decoded segment; their float sums stay in L1 and L2

// dots[block][token][16] += x_scale * (codes - c) . x_codes for the tokens TOKEN .. TOKEN + TOKENS - 1 of a panel of M.
template <Range RANGE, int BLOCKS, int M, int TOKEN, int TOKENS>
MATQUANT_INLINE void multiply_panel(const std::uint8_t* codes, unsigned tiles, int centre, const SegmentCodes<M>& x,
                                    float* dots) {
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
  unroll<BLOCKS * TOKENS>([&](auto sum) MATQUANT_LAMBDA {
    constexpr int BLOCK = sum.value / TOKENS, AT = TOKEN + sum.value % TOKENS;
    float* dot = dots + (BLOCK * M + AT) * BLOCK_ROWS;
    const Ints centred = subtract(sums[sum].total(), (centre - Sum::taken(RANGE)) * x.sums[AT]);
    store_floats(dot, add(load_floats(dot), multiply(to_floats(centred), broadcast(x.scales[AT]))));
  });
}

// BLOCKS row blocks times the tokens first_token .. first_token + 127, in panels of M.
template <Range RANGE, int BLOCKS, int M>
void many_tokens(const Linear& weight, const Width& width, const Input& input, int block, int first_token, float* y,
                 std::ptrdiff_t y_stride) {
  alignas(64) std::uint8_t decoded[BLOCKS * SEGMENT_BYTES];
  alignas(64) float dots[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];  // [panel][block][M][16]
  alignas(64) float totals[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];
  float x_sums[GEMM_TOKENS];
  const int tokens = smaller(GEMM_TOKENS, input.tokens - first_token);
  const int panels = ceil_div(tokens, M);
  const bool whole_tiles = has_whole_tiles(weight);
  const std::size_t groups = weight.cols / weight.group;
  const Affines affines(weight, width);
  const Decode decode_segment = decode_of(width);
  for (int at = 0; at < panels * BLOCKS * M * BLOCK_ROWS; ++at) dots[at] = totals[at] = 0.0f;
  for (int token = 0; token < panels * M; ++token) x_sums[token] = 0.0f;
  const auto sums_of = [&](int one, int token) { return ((token / M * BLOCKS + one) * M + token % M) * BLOCK_ROWS; };

  for (Segments segments(weight); segments.more();) {
    const Segment segment = segments.next();
    for (int one = 0; one < BLOCKS; ++one)
      decode_segment(streams_of(weight, block + one), width, segment.first_tile, segment.stop_tile,
                     decoded + one * SEGMENT_BYTES);
    for (int panel = 0; panel < panels; ++panel) {
      const SegmentCodes<M> x(Panel<M>(input, first_token / M + panel), segment, whole_tiles);
      constexpr int STEP = M < GEMM_STEP ? M : GEMM_STEP;
      unroll<M / STEP>([&](auto step) MATQUANT_LAMBDA {
        multiply_panel<RANGE, BLOCKS, M, step.value * STEP, STEP>(decoded, segment.stop_tile - segment.first_tile,
                                                                  width.centre, x,
                                                                  dots + panel * BLOCKS * M * BLOCK_ROWS);
      });
      for (int token = 0; token < M; ++token)
        x_sums[panel * M + token] += x.scales[token] * static_cast<float>(x.sums[token]);
    }
    if (!segment.ends_group) continue;
    for (int one = 0; one < BLOCKS; ++one) {
      const RowAffine affine = affines.of((block + one) * groups + segment.group);
      for (int token = 0; token < panels * M; ++token) {
        float* total = totals + sums_of(one, token);
        float* dot = dots + sums_of(one, token);
        store_floats(total, finish(affine, load_floats(total), load_floats(dot), x_sums[token]));
        store_floats(dot, broadcast(0.0f));
      }
    }
    for (int token = 0; token < panels * M; ++token) x_sums[token] = 0.0f;
  }
  for (int one = 0; one < BLOCKS; ++one)
    for (int token = 0; token < tokens; ++token) {
      const int row = (block + one) * BLOCK_ROWS;
      store_rows(y + (first_token + token) * y_stride + row, load_floats(totals + sums_of(one, token)),
                 weight.rows - row);
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
