// Segments of a row, their activations, and the float arithmetic on their sums. Included by kernel.inl.

struct Segment {
  unsigned first, stop;            // inputs
  unsigned first_tile, stop_tile;  // tiles that contain them
  unsigned group;                  // of weights
  bool ends_group;

  MATQUANT_INLINE unsigned tiles() const { return stop_tile - first_tile; }
};

// Walks over the segments of a row. No division: a segment is a few dozen cycles of work at two bits.
struct Segments {
  unsigned group_inputs, activation_inputs, inputs, at = 0, group = 0, group_stop;

  MATQUANT_INLINE Segments(const Linear& weight, const Input& input)
      : group_inputs(static_cast<unsigned>(weight.group)),
        activation_inputs(static_cast<unsigned>(input.group)),
        inputs(static_cast<unsigned>(weight.cols)),
        group_stop(group_inputs) {}
  MATQUANT_INLINE bool more() const { return at < inputs; }
  MATQUANT_INLINE Segment next() {
    const unsigned activation_stop = (at | (activation_inputs - 1)) + 1;
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

// True if no group begins or ends inside a tile.
MATQUANT_INLINE bool has_whole_tiles(const Linear& weight) {
  return weight.group % TILE_INPUTS == 0 || weight.group == weight.cols;
}

MATQUANT_INLINE int padded_cols(int cols) { return ceil_div(cols, ACTIVATION_GROUP) * ACTIVATION_GROUP; }

// Tiles of a group of activations are 1 << group_shift.
MATQUANT_INLINE unsigned group_shift_of(const Input& input) { return input.group == LEAST_ACTIVATION_GROUP ? 1 : 2; }

// The groups of activations in whole groups of inputs, without a division.
MATQUANT_INLINE std::size_t activation_groups(const Input& input, std::size_t inputs) {
  return inputs / TILE_INPUTS >> group_shift_of(input);
}

// Where a panel of activations lies in an Input.
template <int M>
struct Panel {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;
  const std::int32_t* group_sums;
  unsigned group_shift;

  Panel(const Input& input, int panel) : group_shift(group_shift_of(input)) {
    const std::size_t padded = static_cast<std::size_t>(padded_cols(input.cols)) * M;
    const std::size_t groups = activation_groups(input, padded);
    codes = input.codes + panel * padded;
    scales = input.scales + panel * groups;
    sums = input.code_sums + panel * (padded / TILE_INPUTS);
    group_sums = input.group_sums + panel * groups;
  }
};

// The activation codes of a segment, from its first tile on, their sums, and the scales times these. A segment that
// begins or ends inside a tile (groups of 16, or of 5) gets a copy in which the other inputs are 0.
template <int M>
struct SegmentCodes {
  const std::int8_t* codes;
  int sums[M];
  float scales[M], x_sums[M];
  alignas(64) std::int8_t masked[ACTIVATION_GROUP * M];

  MATQUANT_INLINE SegmentCodes(const Panel<M>& panel, const Segment& segment, bool whole_tiles) {
    codes = panel.codes + static_cast<std::size_t>(segment.first_tile) * TILE_INPUTS * M;
    const std::size_t activation_group = segment.first_tile >> panel.group_shift;
    for (int token = 0; token < M; ++token) {
      scales[token] = panel.scales[activation_group * M + token];
      sums[token] = panel.group_sums[activation_group * M + token];
    }
    if (!whole_tiles || segment.tiles() != 1u << panel.group_shift) {
      for (int token = 0; token < M; ++token) sums[token] = 0;
      if (whole_tiles)
        add_tiles(panel, segment);
      else
        mask(segment);
    }
    for (int token = 0; token < M; ++token) x_sums[token] = scales[token] * static_cast<float>(sums[token]);
  }

  MATQUANT_INLINE void add_tiles(const Panel<M>& panel, const Segment& segment) {
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

// ---------------------------------------------------------------------------------------------------- the epilogue

struct RowAffine {
  Floats scale;
  Floats offset;  // the width's centre minus the zero-point
};

// Scales and zero-points of a width, by row block and group: [blocks * groups].
struct Affines {
  const void* values;
  bool half, one_zero;
  float step, inverse, centre, middle, offset;

  MATQUANT_INLINE Affines(const Linear& weight, const Width& width)
      : values(weight.affine[width.bits].values),
        half(weight.affine[width.bits].half),
        one_zero(weight.affine[width.bits].one_zero),
        step(weight.affine[width.bits].step),
        inverse(1.0f / step),  // of a power of two: exact
        centre(weight.affine[width.bits].centre),
        middle(static_cast<float>(width.centre)),
        offset(middle - (weight.affine[width.bits].zero - centre) * inverse) {}

  MATQUANT_INLINE RowAffine of(std::size_t index) const {
    const std::size_t at = index * (one_zero ? 1 : 2) * BLOCK_ROWS;
    const auto* const halves = static_cast<const std::uint16_t*>(values) + at;
    const auto* const floats = static_cast<const float*>(values) + at;
    const Floats scale = multiply(half ? widen_bfloat16(halves) : load_floats(floats), broadcast(step));
    if (one_zero) return {scale, broadcast(offset)};
    const Floats stored = half ? widen_float16(halves + BLOCK_ROWS) : load_floats(floats + BLOCK_ROWS);
    const Floats zero = multiply(subtract(stored, broadcast(centre)), broadcast(inverse));
    return {scale, subtract(broadcast(middle), zero)};
  }
};

// A group's sum with one more segment: group + offset * x_sum + products * x_scale
MATQUANT_INLINE Floats add_products(Floats group, Floats offset, Ints products, float x_scale, float x_sum) {
  return multiply_add(to_floats(products), broadcast(x_scale), multiply_add(offset, broadcast(x_sum), group));
}

// The 16 sums of a row block for one token; rows past the end are not written.
MATQUANT_INLINE void store_rows(float* y, Floats values, int rows) {
  if (rows >= BLOCK_ROWS) return store_floats(y, values);
  alignas(64) float all[BLOCK_ROWS];
  store_floats(all, values);
  for (int row = 0; row < rows; ++row) y[row] = all[row];
}

// What a row block and M tokens accumulate: the result and the current group.
template <int M>
struct Accumulators {
  Floats total[M], group[M];

  MATQUANT_INLINE void clear() {
    unroll<M>([&](auto token) MATQUANT_LAMBDA { total[token] = group[token] = broadcast(0.0f); });
  }
  MATQUANT_INLINE void end_group(const RowAffine& affine) {
    unroll<M>([&](auto token) MATQUANT_LAMBDA {
      total[token] = multiply_add(affine.scale, group[token], total[token]);
      group[token] = broadcast(0.0f);
    });
  }
  // Writes the results of tokens first_token .. first_token + M - 1; those past the last token are padding.
  MATQUANT_INLINE void store(const Linear& weight, const Input& input, int first_token, int block, float* y,
                             std::ptrdiff_t y_stride) const {
    const int row = block * BLOCK_ROWS;
    unroll<M>([&](auto at) MATQUANT_LAMBDA {
      const int token = first_token + at;
      if (token < input.tokens) store_rows(y + token * y_stride + row, total[at], weight.rows - row);
    });
  }
};
