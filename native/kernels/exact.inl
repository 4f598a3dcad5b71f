// One row block times a panel of M tokens of float activations. Included by kernel.inl.
//
// Inputs are summed one after another within a tile, and tiles one after another: the order is the same for every M.

// Copies the inputs of a tile [32][M] that belong to the segment, zeros for the others, and sums them.
template <int M>
MATQUANT_INLINE void mask_tile(const Segment& segment, unsigned tile, const float* x, float* masked, float* sums) {
  for (int token = 0; token < M; ++token) sums[token] = 0.0f;
  for (int at = 0; at < TILE_INPUTS * M; ++at) {
    const unsigned place = tile * TILE_INPUTS + at / M;
    masked[at] = place >= segment.first && place < segment.stop ? x[at] : 0.0f;
    sums[at % M] += masked[at];
  }
}

// sum[token] += (codes - centre) . x for the 32 inputs of a tile.
template <int M>
MATQUANT_INLINE void multiply_tile(const std::uint8_t* codes, Floats centre, const float* x, Floats* sum) {
  for (int quad = 0; quad < TILE_QUADS; ++quad) {
    const Bytes bytes = load(codes + quad * VECTOR_BYTES);
    unroll<4>([&](auto lane) MATQUANT_LAMBDA {
      const Floats code = subtract(to_floats(byte_of<lane.value>(bytes)), centre);
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        sum[token] = multiply_add(code, broadcast(x[(quad * 4 + lane) * M + token]), sum[token]);
      });
    });
  }
}

template <int M>
void exact_block(const Linear& weight, const Width& width, const Input& input, int panel, int block, float* y,
                 std::ptrdiff_t y_stride) {
  alignas(64) std::uint8_t decoded[SEGMENT_BYTES];
  const std::size_t padded = static_cast<std::size_t>(padded_cols(input.cols)) * M;
  const float* values = input.values + panel * padded;
  const float* value_sums = input.value_sums + panel * (padded / TILE_INPUTS);
  const bool whole_tiles = has_whole_tiles(weight);
  const std::size_t groups = weight.cols / weight.group;
  const Affines affines(weight, width);
  const Decode decode_segment = decode_of(width);
  const Floats centre = broadcast(static_cast<float>(width.centre));

  Accumulators<M> at;
  at.clear();
  for (Segments segments(weight, input); segments.more();) {
    const Segment segment = segments.next();
    decode_segment(Streams(weight, block, segment.first_tile), width, segment.tiles(), decoded);
    const RowAffine affine = affines.of(block * groups + segment.group);
    const std::uint8_t* codes = decoded;
    for (unsigned tile = segment.first_tile; tile < segment.stop_tile; ++tile, codes += TILE_QUADS * VECTOR_BYTES) {
      alignas(64) float masked[TILE_INPUTS * M];
      const float* x = values + static_cast<std::size_t>(tile) * TILE_INPUTS * M;
      Floats sum[M];
      float tile_sum[M];
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        sum[token] = broadcast(0.0f);
        tile_sum[token] = value_sums[static_cast<std::size_t>(tile) * M + token];
      });
      if (!whole_tiles) {
        mask_tile<M>(segment, tile, x, masked, tile_sum);
        x = masked;
      }
      multiply_tile<M>(codes, centre, x, sum);
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        at.group[token] = add(sum[token], multiply_add(affine.offset, broadcast(tile_sum[token]), at.group[token]));
      });
    }
    if (segment.ends_group) at.end_group(affine);
  }
  at.store(weight, input, panel * PANEL_TOKENS, block, y, y_stride);
}

using ExactBlock = void (*)(const Linear&, const Width&, const Input&, int, int, float*, std::ptrdiff_t);

ExactBlock exact_block_of(int panel) {
  return panel == 1 ? exact_block<1> : panel == 2 ? exact_block<2> : panel == 4 ? exact_block<4> : exact_block<8>;
}
