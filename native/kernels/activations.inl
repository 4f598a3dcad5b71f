// Fills an Input: int8 codes with a scale per token and group, or the floats themselves. Included by kernel.inl.

// Vectors of the registers' size: GCC splits larger ones through memory.
typedef float FloatVector __attribute__((vector_size(NATIVE_BYTES)));
typedef std::int32_t IntVector __attribute__((vector_size(NATIVE_BYTES)));

// Combines the lanes of a vector, one half of it with the other, and so on.
template <class Whole, class Combine>
MATQUANT_INLINE std::int32_t fold(Whole lanes, Combine combine) {
  if constexpr (sizeof lanes == 16) {
    return combine(combine(lanes[0], lanes[2]), combine(lanes[1], lanes[3]));
  } else {
    typedef std::int32_t Half __attribute__((vector_size(sizeof lanes / 2)));
    Half low, high;
    __builtin_memcpy(&low, &lanes, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
    return fold(combine(low, high), combine);
  }
}

// Quantises one group of one token: GROUP floats, padded with 0. Returns the sum of its codes.
template <int GROUP>
std::int32_t quantise_group(const float* x, std::int8_t* codes, float& scale, std::int32_t* sums) {
  // The largest magnitude, compared as bits: NaN ranks above infinity and infinity above all numbers, so neither is
  // lost.
  IntVector largest_lanes{};
  unroll<GROUP / NATIVE_LANES>([&](auto part) MATQUANT_LAMBDA {
    IntVector bits;
    __builtin_memcpy(&bits, x + part * NATIVE_LANES, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest_lanes = bits > largest_lanes ? bits : largest_lanes;
  });
  const std::int32_t largest_bits =
      fold(largest_lanes, [](const auto& a, const auto& b) MATQUANT_LAMBDA { return a > b ? a : b; });
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof largest);
  // Below 2^-119 the reciprocal overflows float32; such a group becomes 0.
  const bool nothing = largest < 0x1p-119f;
  scale = nothing ? 0.0f : largest / 127.0f;
  const float inverse = nothing ? 0.0f : 127.0f / largest;
  constexpr float NEAREST = 0x1.8p23f;  // adding it rounds to the nearest integer, ties to even
  std::int32_t sum = 0;
  for (int tile = 0; tile < GROUP / TILE_INPUTS; ++tile) {
    IntVector tile_lanes{};
    unroll<TILE_INPUTS / LANES>([&](auto some) MATQUANT_LAMBDA {
      const int i = tile * TILE_INPUTS + some * LANES;
      Ints ints;
      unroll<LANES / NATIVE_LANES>([&](auto part) MATQUANT_LAMBDA {
        FloatVector values;
        __builtin_memcpy(&values, x + i + part * NATIVE_LANES, sizeof values);
        IntVector code = ((IntVector)(values * inverse + NEAREST) & 0x007FFFFF) - 0x00400000;
        code = code > 127 ? IntVector{} + 127 : code;
        code = code < -127 ? IntVector{} - 127 : code;
        tile_lanes += code;
        __builtin_memcpy(reinterpret_cast<char*>(&ints) + part * NATIVE_BYTES, &code, sizeof code);
      });
      store_narrow(codes + i, ints);
    });
    sums[tile] = fold(tile_lanes, [](const auto& a, const auto& b) MATQUANT_LAMBDA { return a + b; });
    sum += sums[tile];
  }
  return sum;
}

// Prepares 128 inputs of one token, number `at` of the panel that begins at `panel_start`.
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
  std::int8_t* const to = panel == 1 ? input.codes + start : codes;
  const std::size_t scale = activation_groups(input, start) * panel + at;
  float* const scales = input.scales + scale;
  std::int32_t* const group_sums = input.group_sums + scale;
  if (input.group == ACTIVATION_GROUP) {
    *group_sums = quantise_group<ACTIVATION_GROUP>(values, to, *scales, sums);
  } else {
    constexpr int HALF = LEAST_ACTIVATION_GROUP;
    static_assert(2 * HALF == ACTIVATION_GROUP, "two groups at a time");
    *group_sums = quantise_group<HALF>(values, to, *scales, sums);
    group_sums[panel] = quantise_group<HALF>(values + HALF, to + HALF, scales[panel], sums + HALF / TILE_INPUTS);
  }
  for (int tile = 0; tile < ACTIVATION_TILES; ++tile)
    input.code_sums[(start / TILE_INPUTS + tile) * panel + at] = sums[tile];
  if (panel == 1) return;
  if (panel == WIDE_PANEL) {
    for (int part = 0; part < ACTIVATION_GROUP; part += WIDE_INPUTS)
      __builtin_memcpy(input.codes + (start + part) * WIDE_PANEL + at * WIDE_INPUTS, codes + part, WIDE_INPUTS);
    return;
  }
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
