// Row blocks times many tokens with the matrix registers of AMX, bit for bit like gemm.inl. Included by
// kernel_avx512vbmi.cpp.
//
// A register holds 16 rows of 64 bytes. One instruction multiplies 16 tokens x 64 inputs by 64 inputs x 16 rows, which
// is 256 times vpdpbusd in the time of 16. Decoded codes have the layout it needs for the second factor; WIDE_PANEL
// tokens are interleaved by 64 inputs for the first.

constexpr int STEP_INPUTS = WIDE_INPUTS, STEP_TILES = STEP_INPUTS / TILE_INPUTS, STEP_BYTES = STEP_INPUTS * BLOCK_ROWS;
constexpr int AMX_FROM = 9;    // tokens
static_assert(AMX_FROM > PANEL_TOKENS, "workspaces of fewer tokens have no room for a wide panel");
constexpr int AMX_BLOCKS = 4;  // whose float sums of 128 tokens stay in L1
constexpr int MOST_PANELS = GEMM_TOKENS / WIDE_PANEL;
constexpr int SQUARE = WIDE_PANEL * BLOCK_ROWS;  // products of a panel and a row block, [token][row]

struct AmxConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Holds the configuration of this thread's matrix registers. (GCC 12's own functions do not say which memory they
// read, and stores before them are lost.)
struct AmxRegisters {
  MATQUANT_INLINE AmxRegisters() {
    alignas(64) static constexpr AmxConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  MATQUANT_INLINE ~AmxRegisters() { __asm__ volatile("tilerelease" ::); }
};

template <int REGISTER>
MATQUANT_INLINE void amx_clear() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}
template <int REGISTER>
MATQUANT_INLINE void amx_load(const void* from) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(std::ptrdiff_t{64}), "i"(REGISTER) : "memory");
}
template <int REGISTER>
MATQUANT_INLINE void amx_store(void* to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::ptrdiff_t{64}), "i"(REGISTER) : "memory");
}
// SUM += A . B, signed bytes
template <int SUM, int A, int B>
MATQUANT_INLINE void amx_multiply() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Signed bytes, as the registers multiply them: integers minus the centre.
struct StoreCentred {
  const Bytes centre;
  MATQUANT_INLINE explicit StoreCentred(const Width& width) : centre(all(width.centre)) {}
  template <int PIECE>
  MATQUANT_INLINE void piece(std::uint8_t* to, const Bytes& bytes) const {
    store_piece<PIECE>(to, _mm512_sub_epi8(bytes, centre));
  }
};

// A segment in whole steps of 64 inputs: codes minus the centre, 0 outside the segment, [block][step][16 quads][64].
template <int BLOCKS>
struct StepCodes {
  int steps;
  alignas(64) std::int8_t codes[BLOCKS * SEGMENT_BYTES];

  MATQUANT_INLINE void decode(const Linear& weight, const Width& width, Decode decode_segment, int block,
                              const Segment& segment, bool whole_tiles) {
    const int first = static_cast<int>(segment.first_tile) / STEP_TILES;
    steps = ceil_div(static_cast<int>(segment.stop_tile), STEP_TILES) - first;
    const int before = static_cast<int>(segment.first_tile) % STEP_TILES, stop = segment.stop_tile - first * STEP_TILES;
    constexpr int TILE_BYTES = TILE_QUADS * VECTOR_BYTES;
    for (int one = 0; one < BLOCKS; ++one) {
      auto* const to = reinterpret_cast<std::uint8_t*>(codes + one * SEGMENT_BYTES);
      decode_segment(Streams(weight, block + one, segment.first_tile), width, segment.tiles(),
                     to + before * TILE_BYTES);
      if (before > 0) __builtin_memset(to, 0, TILE_BYTES);
      if (stop % STEP_TILES > 0) __builtin_memset(to + stop * TILE_BYTES, 0, TILE_BYTES);
      if (!whole_tiles) mask(codes + one * SEGMENT_BYTES, segment, first * STEP_INPUTS);
    }
  }

  void mask(std::int8_t* to, const Segment& segment, int start) const {
    for (int input = 0; input < steps * STEP_INPUTS; ++input) {
      const unsigned at = static_cast<unsigned>(start + input);
      if (at >= segment.first && at < segment.stop) continue;
      for (int row = 0; row < BLOCK_ROWS; ++row) to[input / 4 * VECTOR_BYTES + row * 4 + input % 4] = 0;
    }
  }
};

// The activations of a segment: by panel the codes and by token the scale and what its products end with.
struct WideTokens {
  const std::int8_t* codes[MOST_PANELS];  // [step][16 tokens][64]
  const float* scales[MOST_PANELS];
  alignas(64) float x_sums[GEMM_TOKENS];   // scales times sums of codes
  alignas(64) float offsets[GEMM_TOKENS];  // the offset times these, if it is the same for all rows

  MATQUANT_INLINE void read(const Input& input, int panel, int first_panel, const Segment& segment, bool whole_tiles,
                            Floats offset) {
    const std::size_t padded = static_cast<std::size_t>(padded_cols(input.cols)) * WIDE_PANEL;
    const std::int8_t* const x = input.codes + (first_panel + panel) * padded;
    codes[panel] = x + segment.first_tile / STEP_TILES * WIDE_PANEL * STEP_INPUTS;
    scales[panel] = input.scales + activation_groups(input, (first_panel + panel) * padded) +
                    activation_groups(input, segment.first) * WIDE_PANEL;
    Ints sums{_mm512_setzero_si512()};
    if (whole_tiles) {
      const std::int32_t* const tile_sums = input.code_sums + (first_panel + panel) * (padded / TILE_INPUTS);
      for (unsigned tile = segment.first_tile; tile < segment.stop_tile; ++tile)
        sums = add(sums, {_mm512_loadu_si512(tile_sums + tile * WIDE_PANEL)});
    } else {
      alignas(64) std::int32_t each[WIDE_PANEL] = {};
      for (unsigned at = segment.first; at < segment.stop; ++at)
        for (int token = 0; token < WIDE_PANEL; ++token)
          each[token] += x[(at / STEP_INPUTS * WIDE_PANEL + token) * STEP_INPUTS + at % STEP_INPUTS];
      sums = {_mm512_load_si512(each)};
    }
    const Floats x_sum = multiply(load_floats(scales[panel]), to_floats(sums));
    store_floats(x_sums + panel * WIDE_PANEL, x_sum);
    store_floats(offsets + panel * WIDE_PANEL, multiply(offset, x_sum));
  }
};

// The products of a segment for panels of tokens and BLOCKS row blocks, at most two. Panels alternate between two SETs
// of registers, because these are not renamed.
template <int BLOCKS>
struct AmxProducts {
  const std::int8_t* codes;  // of the first block
  int steps;

  template <int BLOCK>
  MATQUANT_INLINE void load_codes(int step) const {
    amx_load<6 + BLOCK>(codes + BLOCK * SEGMENT_BYTES + step * STEP_BYTES);
  }
  // Codes of a single step stay in their registers for all panels.
  MATQUANT_INLINE AmxProducts(const std::int8_t* codes_, int steps_) : codes(codes_), steps(steps_) {
    if (steps == 1) unroll<BLOCKS>([&](auto block) MATQUANT_LAMBDA { load_codes<block.value>(0); });
  }
  template <int SET>
  MATQUANT_INLINE void multiply(const std::int8_t* x) const {
    unroll<BLOCKS>([&](auto block) MATQUANT_LAMBDA { amx_clear<2 * SET + block.value>(); });
    for (int step = 0; step < steps; ++step) {
      amx_load<4 + SET>(x + step * (WIDE_PANEL * STEP_INPUTS));
      unroll<BLOCKS>([&](auto block) MATQUANT_LAMBDA {
        if (steps > 1) load_codes<block.value>(step);
        amx_multiply<2 * SET + block.value, 4 + SET, 6 + block.value>();
      });
    }
  }
};

// Ends a segment for the squares of a panel in the COUNT row blocks from `first` on. WHOLE: the segment is a whole
// group. ONE_ZERO: all rows have the same zero-point.
template <bool WHOLE, bool ONE_ZERO, int COUNT, int BLOCKS>
MATQUANT_INLINE void end_squares(const std::int32_t* products, const WideTokens& x, int panel, int first,
                                 const GroupPart<BLOCKS>& part, FloatSums<BLOCKS>& sums) {
  const float *const scales = x.scales[panel], *const of_x = (ONE_ZERO ? x.offsets : x.x_sums) + panel * WIDE_PANEL;
  const RowAffine* const affine = part.affine + first;
  float* const totals = sums.totals + (first * MOST_PANELS + panel) * SQUARE;
  float* const groups = sums.groups + (first * MOST_PANELS + panel) * SQUARE;
  for (int four = 0; four < WIDE_PANEL; four += 4)
    unroll<4 * COUNT>([&](auto one) MATQUANT_LAMBDA {
      constexpr int BLOCK = one.value % COUNT;
      const int token = four + one.value / COUNT, at = token * BLOCK_ROWS, out = BLOCK * MOST_PANELS * SQUARE + at;
      const Ints of_token{_mm512_load_si512(products + BLOCK * SQUARE + at)};
      const Floats before = WHOLE || part.begins ? broadcast(0.0f) : load_floats(groups + out);
      const Floats group = ONE_ZERO
                               ? multiply_add(to_floats(of_token), broadcast(scales[token]), broadcast(of_x[token]))
                               : add_products(before, affine[BLOCK].offset, of_token, scales[token], of_x[token]);
      if (!WHOLE && !part.ends) return store_floats(groups + out, group);
      store_floats(totals + out, multiply_add(affine[BLOCK].scale, group, load_floats(totals + out)));
    });
}

// A segment for all panels and for COUNT of the BLOCKS row blocks, from `first` on.
template <int COUNT, int BLOCKS>
MATQUANT_INLINE void amx_segment(const StepCodes<BLOCKS>& codes, const WideTokens& x, int panels, int first,
                                 const GroupPart<BLOCKS>& part, bool one_zero, FloatSums<BLOCKS>& sums) {
  alignas(64) std::int32_t squares[COUNT * SQUARE];
  const AmxProducts<COUNT> products(codes.codes + first * SEGMENT_BYTES, codes.steps);
  const auto end = [&](auto set, int panel) MATQUANT_LAMBDA {
    unroll<COUNT>([&](auto one) MATQUANT_LAMBDA { amx_store<2 * set.value + one.value>(squares + one * SQUARE); });
    if (!part.begins || !part.ends)
      end_squares<false, false, COUNT>(squares, x, panel, first, part, sums);
    else if (one_zero)
      end_squares<true, true, COUNT>(squares, x, panel, first, part, sums);
    else
      end_squares<true, false, COUNT>(squares, x, panel, first, part, sums);
  };
  products.template multiply<0>(x.codes[0]);
  for (int panel = 0; panel < panels; panel += 2) {
    if (panel + 1 < panels) products.template multiply<1>(x.codes[panel + 1]);
    end(Index<0>{}, panel);
    if (panel + 2 < panels) products.template multiply<0>(x.codes[panel + 2]);
    if (panel + 1 < panels) end(Index<1>{}, panel + 1);
  }
}

// BLOCKS row blocks times the tokens first_token .. first_token + 127.
template <int BLOCKS>
void amx_tokens(const Linear& weight, const Width& width, const Input& input, int block, int first_token, float* y,
                std::ptrdiff_t y_stride) {
  constexpr int AT_ONCE = smaller(2, BLOCKS);  // as many as there are registers for
  StepCodes<BLOCKS> codes;
  WideTokens x;
  FloatSums<BLOCKS> sums;  // [block][panel][token][row]
  const int tokens = smaller(GEMM_TOKENS, input.tokens - first_token), panels = ceil_div(tokens, WIDE_PANEL);
  float* const out = y + first_token * y_stride + block * BLOCK_ROWS;
  const bool whole_tiles = has_whole_tiles(weight);
  const std::size_t groups = weight.cols / weight.group;
  const Affines affines(weight, width);
  const Decode decode_segment = decode_of<StoreCentred>(width);
  for (int one = 0; one < BLOCKS; ++one)
    for (int at = 0; at < panels * SQUARE; ++at) sums.totals[one * MOST_PANELS * SQUARE + at] = 0.0f;

  GroupPart<BLOCKS> part;
  part.ends = true;
  for (Segments segments(weight, input); segments.more();) {
    const Segment segment = segments.next();
    part.begins = part.ends;
    part.ends = segment.ends_group;
    for (int one = 0; one < BLOCKS; ++one)
      if (part.begins) part.affine[one] = affines.of((block + one) * groups + segment.group);
    codes.decode(weight, width, decode_segment, block, segment, whole_tiles);
    for (int panel = 0; panel < panels; ++panel)
      x.read(input, panel, first_token / WIDE_PANEL, segment, whole_tiles, broadcast(affines.offset));
    if (!segments.more())  // the lines of the results are mostly not in the caches
      for (int token = 0; token < tokens; ++token)
        unroll<BLOCKS>([&](auto one) MATQUANT_LAMBDA {
          __builtin_prefetch(out + token * y_stride + one * BLOCK_ROWS, 1);
        });
    for (int first = 0; first < BLOCKS; first += AT_ONCE)
      amx_segment<AT_ONCE>(codes, x, panels, first, part, affines.one_zero, sums);
  }
  for (int token = 0; token < tokens; ++token)
    for (int one = 0; one < BLOCKS; ++one)
      store_rows(out + token * y_stride + one * BLOCK_ROWS,
                 load_floats(sums.totals + (one * GEMM_TOKENS + token) * BLOCK_ROWS),
                 weight.rows - (block + one) * BLOCK_ROWS);
}

void amx_share(const Linear& weight, const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride,
               int thread, int threads) {
  if (input.panel != WIDE_PANEL) return linear_share(weight, width, input, y, y_stride, thread, threads);
  const AmxRegisters configured;
  linear_blocks(Blocks(weight, thread, threads), amx_tokens<AMX_BLOCKS>, AMX_BLOCKS, amx_tokens<1>, weight, width,
                input, y, y_stride);
}
