// The kernels of one instruction set. Included by kernel_*.cpp after the vectors they define, inside
// namespace matquant and an unnamed namespace, so that no line compiled for one machine is linked into another's.
//
// Tiles are 16 rows x 32 inputs and a vector holds 16 rows x 4 inputs, byte 4 * row + (input & 3): one dot-product
// instruction against four activations gives 16 row sums, without horizontal sums (docs/kernels.md).
//
// A segment is a run of inputs with one activation scale and one weight scale; sums of codes end with it. Everything
// after the integers is 16 floats wide, multiplied before it is added, in the order of the segments.

#define MATQUANT_LAMBDA __attribute__((always_inline))

// unroll<N>(f) calls f(Index<0>{}) .. f(Index<N-1>{}), so that arrays indexed by it stay in registers.
// (Their elements have no constructor: GCC 12 would make a loop of it, and a loop keeps the array on the stack.)
template <int VALUE>
struct Index {
  static constexpr int value = VALUE;
  constexpr operator int() const { return VALUE; }
};

template <int COUNT, int FIRST = 0, class Body>
MATQUANT_INLINE void unroll(Body&& body) {
  if constexpr (FIRST < COUNT) {
    body(Index<FIRST>{});
    unroll<COUNT, FIRST + 1>(body);
  }
}

// The larger of the two is never needed: no std::min, whose one copy could be another instruction set's.
MATQUANT_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Right by COUNT bits, left if that is negative.
template <int COUNT>
MATQUANT_INLINE Piece shift(const Piece& a) {
  if constexpr (COUNT < 0)
    return left<-COUNT>(a);
  else if constexpr (COUNT > 0)
    return right<COUNT>(a);
  else
    return a;
}

#include "decode.inl"

void codes(const Linear& weight, const Width& width, std::uint8_t* out) {
  alignas(64) std::uint8_t tile_codes[TILE_QUADS * VECTOR_BYTES];
  const Decode decode_tile = code_decode_of(width);
  for (int block = 0; block < ceil_div(weight.rows, BLOCK_ROWS); ++block) {
    const Streams streams = streams_of(weight, block);
    const int rows = smaller(BLOCK_ROWS, weight.rows - block * BLOCK_ROWS);
    for (int tile = 0; tile < tiles_of(weight.cols); ++tile) {
      decode_tile(streams, width, tile, tile + 1, tile_codes);
      const int inputs = smaller(TILE_INPUTS, weight.cols - tile * TILE_INPUTS);
      for (int row = 0; row < rows; ++row)
        for (int input = 0; input < inputs; ++input)
          out[static_cast<std::size_t>(block * BLOCK_ROWS + row) * weight.cols + tile * TILE_INPUTS + input] =
              tile_codes[input / 4 * VECTOR_BYTES + row * 4 + input % 4];
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the epilogue

struct RowAffine {
  Floats scale;
  Floats zero;  // of codes less the width's centre
};

MATQUANT_INLINE RowAffine row_affine(const Linear& weight, const Width& width, int groups, int block, unsigned group) {
  const Affine& affine = weight.affine[width.bits];
  const std::size_t at = (static_cast<std::size_t>(block) * groups + group) * 2 * BLOCK_ROWS;
  Floats scale, zero;
  if (affine.half) {
    const auto* values = static_cast<const std::uint16_t*>(affine.values) + at;
    scale = widen_bfloat16(values);
    zero = widen_float16(values + BLOCK_ROWS);
  } else {
    const auto* values = static_cast<const float*>(affine.values) + at;
    scale = load_floats(values);
    zero = load_floats(values + BLOCK_ROWS);
  }
  zero = multiply(subtract(zero, broadcast(affine.centre)), broadcast(1.0f / affine.step));  // a power of two: exact
  return {multiply(scale, broadcast(affine.step)), subtract(zero, broadcast(static_cast<float>(width.centre)))};
}

// total + scale * (dot - zero * x_sum)
MATQUANT_INLINE Floats finish(const RowAffine& affine, Floats total, Floats dot, float x_sum) {
  return add(total, multiply(affine.scale, subtract(dot, multiply(affine.zero, broadcast(x_sum)))));
}

// The 16 sums of a row block for one token; rows past the end are not written.
MATQUANT_INLINE void store_rows(float* y, Floats values, int rows) {
  if (rows >= BLOCK_ROWS) return store_floats(y, values);
  alignas(64) float all[BLOCK_ROWS];
  store_floats(all, values);
  for (int row = 0; row < rows; ++row) y[row] = all[row];
}

// ------------------------------------------------------------------------------------------------------- segments

struct Segment {
  unsigned first, stop;            // inputs
  unsigned first_tile, stop_tile;  // tiles that hold them
  unsigned group;                  // of weights
  bool ends_group;
};

// Walks over the segments of a row. No division: a segment is a few dozen cycles of work at two bits.
struct Segments {
  unsigned group_inputs, inputs, at = 0, group = 0, group_stop;

  MATQUANT_INLINE explicit Segments(const Linear& weight)
      : group_inputs(static_cast<unsigned>(weight.group)),
        inputs(static_cast<unsigned>(weight.cols)),
        group_stop(group_inputs) {}
  MATQUANT_INLINE bool more() const { return at < inputs; }
  MATQUANT_INLINE Segment next() {
    const unsigned activation_stop = (at | (ACTIVATION_GROUP - 1)) + 1;
    const unsigned first = at;
    at = activation_stop < group_stop ? activation_stop : group_stop;
    const Segment segment = {first,       at, first / TILE_INPUTS, (at + TILE_INPUTS - 1) / TILE_INPUTS, group,
                             at == group_stop};
    if (segment.ends_group) {
      ++group;
      group_stop += group_inputs;
    }
    return segment;
  }
};

MATQUANT_INLINE int padded_cols(int cols) { return ceil_div(cols, ACTIVATION_GROUP) * ACTIVATION_GROUP; }

// A panel of activations and what a segment needs of it.
template <int M>
struct Panel {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
  const std::int32_t* group_sums;

  Panel(const Input& input, int panel) {
    const std::size_t padded = static_cast<std::size_t>(padded_cols(input.cols)) * M;
    codes = input.codes + panel * padded;
    scales = input.scales + panel * (padded / ACTIVATION_GROUP);
    sums = input.code_sums + panel * (padded / TILE_INPUTS);
    group_sums = input.group_sums + panel * (padded / ACTIVATION_GROUP);
  }
};

// Codes of a segment: where its first tile's activations lie, and their sums. A segment that begins or ends inside a
// tile (a group of 16, or of 5) gets a copy in which the other inputs are 0.
template <int M>
struct SegmentCodes {
  const std::int8_t* codes;
  int sums[M];
  float scales[M];
  alignas(64) std::int8_t masked[ACTIVATION_GROUP * M];

  MATQUANT_INLINE SegmentCodes(const Panel<M>& panel, const Segment& segment, bool whole_tiles) {
    codes = panel.codes + static_cast<std::size_t>(segment.first_tile) * TILE_INPUTS * M;
    const std::size_t activation_group = segment.first / ACTIVATION_GROUP;
    for (int token = 0; token < M; ++token) {
      scales[token] = panel.scales[activation_group * M + token];
      sums[token] = panel.group_sums[activation_group * M + token];
    }
    if (__builtin_expect(whole_tiles && segment.stop_tile - segment.first_tile == ACTIVATION_TILES, 1)) return;
    for (int token = 0; token < M; ++token) sums[token] = 0;
    if (!whole_tiles) {
      mask(segment);
      return;
    }
    for (unsigned tile = segment.first_tile; tile < segment.stop_tile; ++tile)
      for (int token = 0; token < M; ++token) sums[token] += panel.sums[static_cast<std::size_t>(tile) * M + token];
  }

  void mask(const Segment& segment) {
    const unsigned start = segment.first_tile * TILE_INPUTS;
    for (unsigned input = start; input < segment.stop_tile * TILE_INPUTS; ++input)
      for (int token = 0; token < M; ++token) {
        const unsigned at = ((input - start) / 4 * M + token) * 4 + input % 4;
        masked[at] = input >= segment.first && input < segment.stop ? codes[at] : std::int8_t{0};
        sums[token] += masked[at];
      }
    codes = masked;
  }
};

// -------------------------------------------------------------------------------- one row block, a panel of tokens

template <class Reading, int M>
void block_of_rows(const Linear& weight, const Width& width, const Input& input, int panel_index, int block, float* y,
                   std::ptrdiff_t y_stride) {
  constexpr int PLACES = Reading::places, BASE = Reading::base;
  const bool whole_tiles = weight.group % TILE_INPUTS == 0 || weight.group == weight.cols;
  const int groups = weight.cols / weight.group;
  constexpr int TAKEN = Sum::taken(Reading::template range<0>);
  static_assert(TAKEN == 0 || PLACES == 1, "bytes of one place only may be taken less something");
  const int offset = (width.centre << BASE) - TAKEN;
  const Streams streams = streams_of(weight, block);
  const Reading reading(width);
  const Panel<M> panel(input, panel_index);

  Floats total[M], dot[M];
  float x_sum[M];
  unroll<M>([&](auto token) MATQUANT_LAMBDA {
    total[token] = dot[token] = broadcast(0.0f);
    x_sum[token] = 0.0f;
  });
  for (Segments segments(weight); segments.more();) {
    const Segment segment = segments.next();
    const SegmentCodes<M> x(panel, segment, whole_tiles);
    Sum sums[PLACES * M];
    unroll<PLACES * M>([&](auto sum) MATQUANT_LAMBDA { sums[sum].clear(); });
    const std::int8_t* codes = x.codes;
    for (unsigned tile = segment.first_tile; tile < segment.stop_tile; ++tile, codes += TILE_INPUTS * M) {
      prefetch<Reading::read>(streams, tile);
      reading.decode(streams, tile, [&](auto quad, auto place, auto piece, const Piece& bytes) MATQUANT_LAMBDA {
        constexpr Range RANGE = Reading::template range<place.value>;
        unroll<M>([&](auto token) MATQUANT_LAMBDA {
          sums[place * M + token].template add<RANGE, quad.value, piece.value>(bytes, codes + (quad * M + token) * 4);
        });
      });
    }
    unroll<M>([&](auto token) MATQUANT_LAMBDA {
      Ints codes_sum = sums[token].total();
      unroll<PLACES - 1>([&](auto place) MATQUANT_LAMBDA {
        constexpr int PLACE = place.value + 1;
        codes_sum = add(codes_sum, reading.template lifted<PLACE>(sums[PLACE * M + token].total()));
      });
      codes_sum = right<BASE>(subtract(codes_sum, offset * x.sums[token]));
      dot[token] = add(dot[token], multiply(to_floats(codes_sum), broadcast(x.scales[token])));
      x_sum[token] += x.scales[token] * static_cast<float>(x.sums[token]);
    });
    if (segment.ends_group) {
      const RowAffine affine = row_affine(weight, width, groups, block, segment.group);
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        total[token] = finish(affine, total[token], dot[token], x_sum[token]);
        dot[token] = broadcast(0.0f);
        x_sum[token] = 0.0f;
      });
    }
  }
  const int rows = weight.rows - block * BLOCK_ROWS;
  unroll<M>([&](auto at) MATQUANT_LAMBDA {
    const int token = panel_index * M + at;
    if (token < input.tokens) store_rows(y + token * y_stride + block * BLOCK_ROWS, total[at], rows);
  });
}

using BlockOfRows = void (*)(const Linear&, const Width&, const Input&, int, int, float*, std::ptrdiff_t);

// READING<READ, M>: how M tokens at a time read the planes.
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

// ------------------------------------------------------------------------------------------------ many tokens, GEMM

constexpr int GEMM_TOKENS = 128;  // decoded weights serve this many tokens; their float sums stay in L1 and L2
constexpr int SEGMENT_BYTES = ACTIVATION_TILES * TILE_QUADS * VECTOR_BYTES;  // decoded codes of a segment

// dots[block][token][16] += x_scale * (codes - c) . x_codes for the tokens TOKEN .. TOKEN + TOKENS of a panel of M.
template <Range RANGE, int BLOCKS, int M, int TOKEN, int TOKENS>
MATQUANT_INLINE void multiply_panel(const std::uint8_t* codes, unsigned tiles, int centre, const SegmentCodes<M>& x,
                                    float* dots) {
  Sum sums[BLOCKS * TOKENS];
  unroll<BLOCKS * TOKENS>([&](auto sum) MATQUANT_LAMBDA { sums[sum].clear(); });
  const std::int8_t* x_codes = x.codes + TOKEN * 4;
  for (unsigned tile = 0; tile < tiles; ++tile) {
    unroll<TILE_QUADS>([&](auto quad) MATQUANT_LAMBDA {
      unroll<BLOCKS>([&](auto block) MATQUANT_LAMBDA {
        unroll<PIECES>([&](auto piece) MATQUANT_LAMBDA {
          const Piece bytes = load_piece<piece.value>(codes + block * SEGMENT_BYTES + quad * VECTOR_BYTES);
          unroll<TOKENS>([&](auto token) MATQUANT_LAMBDA {
            sums[block * TOKENS + token].template add<RANGE, quad.value, piece.value>(bytes,
                                                                                      x_codes + (quad * M + token) * 4);
          });
        });
      });
    });
    codes += TILE_QUADS * VECTOR_BYTES;
    x_codes += TILE_INPUTS * M;
  }
  unroll<BLOCKS * TOKENS>([&](auto sum) MATQUANT_LAMBDA {
    constexpr int BLOCK = sum.value / TOKENS, AT = TOKEN + sum.value % TOKENS;
    float* dot = dots + (BLOCK * M + AT) * BLOCK_ROWS;
    const Ints centred = subtract(sums[sum].total(), (centre - Sum::taken(RANGE)) * x.sums[AT]);
    store_floats(dot, add(load_floats(dot), multiply(to_floats(centred), broadcast(x.scales[AT]))));
  });
}

// BLOCKS row blocks for the tokens first_token .. first_token + 128, in panels of M.
template <Range RANGE, int BLOCKS, int M>
void many_tokens(const Linear& weight, const Width& width, const Input& input, int block, int first_token, float* y,
                 std::ptrdiff_t y_stride) {
  alignas(64) std::uint8_t decoded[BLOCKS * SEGMENT_BYTES];
  alignas(64) float dots[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];  // [panel][block][M][16]
  alignas(64) float totals[GEMM_TOKENS * BLOCKS * BLOCK_ROWS];
  float x_sums[GEMM_TOKENS];
  const int tokens = smaller(GEMM_TOKENS, input.tokens - first_token);
  const int panels = ceil_div(tokens, M);
  const bool whole_tiles = weight.group % TILE_INPUTS == 0 || weight.group == weight.cols;
  const int groups = weight.cols / weight.group;
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
      const RowAffine affine = row_affine(weight, width, groups, block + one, segment.group);
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

// ------------------------------------------------------------------------------------------- float activations

// Inputs one after another within a tile, tiles one after another: the order of the sums is the same for every M.
template <int M>
void exact_block(const Linear& weight, const Width& width, const Input& input, int panel, int block, float* y,
                 std::ptrdiff_t y_stride) {
  alignas(64) std::uint8_t decoded[SEGMENT_BYTES];
  const std::size_t padded = static_cast<std::size_t>(padded_cols(input.cols)) * M;
  const float* values = input.values + panel * padded;
  const float* value_sums = input.value_sums + panel * (padded / TILE_INPUTS);
  const bool whole_tiles = weight.group % TILE_INPUTS == 0 || weight.group == weight.cols;
  const int groups = weight.cols / weight.group;
  const Streams streams = streams_of(weight, block);
  const Decode decode_segment = decode_of(width);
  const Floats centre = broadcast(static_cast<float>(width.centre));

  Floats total[M], dot[M];
  float x_sum[M];
  unroll<M>([&](auto token) MATQUANT_LAMBDA {
    total[token] = dot[token] = broadcast(0.0f);
    x_sum[token] = 0.0f;
  });
  for (Segments segments(weight); segments.more();) {
    const Segment segment = segments.next();
    decode_segment(streams, width, segment.first_tile, segment.stop_tile, decoded);
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
        for (int token = 0; token < M; ++token) tile_sum[token] = 0.0f;
        for (int at = 0; at < TILE_INPUTS * M; ++at) {
          const unsigned place = tile * TILE_INPUTS + at / M;
          masked[at] = place >= segment.first && place < segment.stop ? x[at] : 0.0f;
          tile_sum[at % M] += masked[at];
        }
        x = masked;
      }
      for (int quad = 0; quad < TILE_QUADS; ++quad) {
        const Bytes bytes = load(codes + quad * VECTOR_BYTES);
        unroll<4>([&](auto lane) MATQUANT_LAMBDA {
          const Floats code = subtract(to_floats(byte_of<lane.value>(bytes)), centre);
          unroll<M>([&](auto token) MATQUANT_LAMBDA {
            sum[token] = add(sum[token], multiply(code, broadcast(x[(quad * 4 + lane) * M + token])));
          });
        });
      }
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        dot[token] = add(dot[token], sum[token]);
        x_sum[token] += tile_sum[token];
      });
    }
    if (segment.ends_group) {
      const RowAffine affine = row_affine(weight, width, groups, block, segment.group);
      unroll<M>([&](auto token) MATQUANT_LAMBDA {
        total[token] = finish(affine, total[token], dot[token], x_sum[token]);
        dot[token] = broadcast(0.0f);
        x_sum[token] = 0.0f;
      });
    }
  }
  const int row = block * BLOCK_ROWS;
  unroll<M>([&](auto at) MATQUANT_LAMBDA {
    const int token = panel * PANEL_TOKENS + at;
    if (token < input.tokens) store_rows(y + token * y_stride + row, total[at], weight.rows - row);
  });
}

using ExactBlock = void (*)(const Linear&, const Width&, const Input&, int, int, float*, std::ptrdiff_t);

ExactBlock exact_block_of(int panel) {
  return panel == 1 ? exact_block<1> : panel == 2 ? exact_block<2> : panel == 4 ? exact_block<4> : exact_block<8>;
}

// ----------------------------------------------------------------------------------------------------- the shares

void linear_share(const Linear& weight, const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride,
                  int thread, int threads) {
  const std::int64_t blocks = ceil_div(weight.rows, BLOCK_ROWS);
  const int first = static_cast<int>(blocks * thread / threads);
  const int stop = static_cast<int>(blocks * (thread + 1) / threads);
  if (input.activations == Activations::exact) {
    const ExactBlock run = exact_block_of(input.panel);
    for (int block = first; block < stop; ++block)
      for (int panel = 0; panel < ceil_div(input.tokens, input.panel); ++panel)
        run(weight, width, input, panel, block, y, y_stride);
    return;
  }
  if constexpr (fused_tokens(2) > 0)
    if (input.tokens <= fused_tokens(width.read)) {
      // The planes of a block are in the second-level cache when its second panel comes.
      const BlockOfRows run = block_of_rows_of(width, input.panel);
      for (int block = first; block < stop; ++block)
        for (int panel = 0; panel < ceil_div(input.tokens, input.panel); ++panel)
          run(weight, width, input, panel, block, y, y_stride);
      return;
    }
  const ManyTokens one = input.panel == 1   ? many_tokens_of<1, 1>(width)
                         : input.panel == 2 ? many_tokens_of<1, 2>(width)
                         : input.panel == 4 ? many_tokens_of<1, 4>(width)
                                            : many_tokens_of<1, 8>(width);
  const ManyTokens several = input.panel == PANEL_TOKENS ? many_tokens_of<GEMM_BLOCKS, PANEL_TOKENS>(width) : one;
  const int step = input.panel == PANEL_TOKENS ? GEMM_BLOCKS : 1;
  for (int token = 0; token < input.tokens; token += GEMM_TOKENS) {
    int block = first;
    for (; block + step <= stop; block += step) several(weight, width, input, block, token, y, y_stride);
    for (; block < stop; ++block) one(weight, width, input, block, token, y, y_stride);
  }
}

// ------------------------------------------------------------------------------------------------- the activations

// Sixteen lanes, lowered by the compiler to what its flags allow.
typedef float FloatLanes __attribute__((vector_size(64)));
typedef std::int32_t IntLanes __attribute__((vector_size(64)));
typedef std::int8_t ByteLanes __attribute__((vector_size(16)));
constexpr int LANES = 16;

// One group of one token: 128 floats, those past the end 0.
void quantise_group(const float* x, std::int8_t* codes, float& scale, std::int32_t* sums) {
  // The largest magnitude as bits: NaN is above infinity is above all numbers, so neither is lost.
  IntLanes largest_lanes{};
  for (int i = 0; i < ACTIVATION_GROUP; i += LANES) {
    IntLanes bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest_lanes = bits > largest_lanes ? bits : largest_lanes;
  }
  std::int32_t lanes[LANES], largest_bits = 0;
  __builtin_memcpy(lanes, &largest_lanes, sizeof lanes);
  for (int i = 0; i < LANES; ++i) largest_bits = lanes[i] > largest_bits ? lanes[i] : largest_bits;
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof largest);
  // Below 2^-119 the reciprocal would leave float32; such a group is 0.
  const bool nothing = largest < 0x1p-119f;
  scale = nothing ? 0.0f : largest / 127.0f;
  const float inverse = nothing ? 0.0f : 127.0f / largest;
  constexpr float NEAREST = 0x1.8p23f;  // added, it rounds to the nearest integer, ties to even, in every vector unit
  for (int tile = 0; tile < ACTIVATION_TILES; ++tile) {
    IntLanes tile_lanes{};
    for (int i = tile * TILE_INPUTS; i < (tile + 1) * TILE_INPUTS; i += LANES) {
      FloatLanes values;
      __builtin_memcpy(&values, x + i, sizeof values);
      IntLanes code = ((IntLanes)(values * inverse + NEAREST) & 0x007FFFFF) - 0x00400000;
      code = code > 127 ? IntLanes{} + 127 : code;
      code = code < -127 ? IntLanes{} - 127 : code;
      tile_lanes += code;
      const ByteLanes bytes = __builtin_convertvector(code, ByteLanes);
      __builtin_memcpy(codes + i, &bytes, sizeof bytes);
    }
    __builtin_memcpy(lanes, &tile_lanes, sizeof lanes);
    sums[tile] = 0;
    for (int i = 0; i < LANES; ++i) sums[tile] += lanes[i];
  }
}

// One group of one token, which is number `at` of the panel that begins at `panel_start`.
MATQUANT_INLINE void prepare_group(const Input& input, const float* x, int token, int group, std::size_t panel_start,
                                   int at) {
  const int panel = input.panel, first = group * ACTIVATION_GROUP;
  const std::size_t start = panel_start + first;
  const int inside = token < input.tokens ? smaller(ACTIVATION_GROUP, input.cols - first) : 0;
  const float* values = x + static_cast<std::size_t>(token) * input.cols + first;
  alignas(64) float filled[ACTIVATION_GROUP];
  if (inside < ACTIVATION_GROUP) {
    for (int i = 0; i < ACTIVATION_GROUP; ++i) filled[i] = i < inside ? values[i] : 0.0f;
    values = filled;
  }
  if (input.activations == Activations::exact) {
    for (int tile = 0; tile < ACTIVATION_TILES; ++tile) {
      float sum = 0.0f;
      for (int i = 0; i < TILE_INPUTS; ++i) sum += values[tile * TILE_INPUTS + i];
      input.value_sums[(start / TILE_INPUTS + tile) * panel + at] = sum;
    }
    for (int i = 0; i < ACTIVATION_GROUP; ++i) input.values[(start + i) * panel + at] = values[i];
    return;
  }
  alignas(64) std::int8_t codes[ACTIVATION_GROUP];
  std::int32_t sums[ACTIVATION_TILES];
  quantise_group(values, panel == 1 ? input.codes + start : codes, input.scales[start / ACTIVATION_GROUP * panel + at],
                 sums);
  for (int tile = 0; tile < ACTIVATION_TILES; ++tile)
    input.code_sums[(start / TILE_INPUTS + tile) * panel + at] = sums[tile];
  input.group_sums[start / ACTIVATION_GROUP * panel + at] = sums[0] + sums[1] + sums[2] + sums[3];
  if (panel == 1) return;
  for (int quad = 0; quad < ACTIVATION_GROUP / 4; ++quad)
    __builtin_memcpy(input.codes + ((start / 4 + quad) * panel + at) * 4, codes + 4 * quad, 4);
}

void prepare_share(const Input& input, const float* x, int thread, int threads) {
  const int groups = ceil_div(input.cols, ACTIVATION_GROUP), panel = input.panel;
  const std::int64_t pieces = static_cast<std::int64_t>(ceil_div(input.tokens, panel)) * panel * groups;
  const std::int64_t first = pieces * thread / threads, stop = pieces * (thread + 1) / threads;
  // No division: a group is a few dozen cycles of work.
  int token = static_cast<int>(first / groups), group = static_cast<int>(first % groups);
  for (std::int64_t piece = first; piece < stop; ++token, group = 0) {
    const std::size_t panel_start = static_cast<std::size_t>(token / panel) * groups * ACTIVATION_GROUP;
    for (const int at = token % panel; group < groups && piece < stop; ++group, ++piece)
      prepare_group(input, x, token, group, panel_start, at);
  }
}
