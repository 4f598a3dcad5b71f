// The kernels of one instruction set. kernel_*.cpp include this after defining their vectors, inside an unnamed
// namespace, so that the linker never replaces a function by its copy for another instruction set.
//
// Tiles are 16 rows x 32 inputs and a vector holds 16 rows x 4 inputs, byte 4 * row + (input & 3): one dot-product
// instruction against four activations gives 16 row sums, without horizontal sums (docs/kernels.md).
//
// A segment is a run of inputs with one activation scale and one weight scale; integer sums end with it. Everything
// after them is 16 floats wide, with fused multiply-adds on every instruction set, in the order of the segments.

#define MATQUANT_LAMBDA __attribute__((always_inline))

// unroll<N>(f) calls f(Index<0>{}) .. f(Index<N-1>{}), so that arrays indexed by it stay in registers.
// (Their elements have no constructor: GCC 12 compiles it to a loop, which keeps the array on the stack.)
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

// Not std::min: the linker could keep a copy compiled for another instruction set.
constexpr MATQUANT_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Shifts right by COUNT bits, or left if COUNT is negative.
template <int COUNT>
MATQUANT_INLINE Piece shift(const Piece& a) {
  if constexpr (COUNT < 0)
    return left<-COUNT>(a);
  else if constexpr (COUNT > 0)
    return right<COUNT>(a);
  else
    return a;
}

constexpr int SEGMENT_BYTES = ACTIVATION_TILES * TILE_QUADS * VECTOR_BYTES;  // of a decoded segment

#include "decode.inl"
#if defined(__AVX512VBMI__)
#include "companded_64.inl"
#else
#include "companded.inl"
#endif
#include "tiles.inl"
#include "segments.inl"
#include "fused.inl"
#include "gemm.inl"
#include "exact.inl"
#include "activations.inl"

void codes(const Linear& weight, const Width& width, std::uint8_t* out) {
  alignas(64) std::uint8_t tile_codes[TILE_QUADS * VECTOR_BYTES];
  const Decode decode_tile = code_decode_of(width);
  for (int block = 0; block < ceil_div(weight.rows, BLOCK_ROWS); ++block) {
    const int rows = smaller(BLOCK_ROWS, weight.rows - block * BLOCK_ROWS);
    for (int tile = 0; tile < tiles_of(weight.cols); ++tile) {
      decode_tile(Streams(weight, block, tile), width, 1, tile_codes);
      const int inputs = smaller(TILE_INPUTS, weight.cols - tile * TILE_INPUTS);
      for (int row = 0; row < rows; ++row)
        for (int input = 0; input < inputs; ++input)
          out[static_cast<std::size_t>(block * BLOCK_ROWS + row) * weight.cols + tile * TILE_INPUTS + input] =
              tile_codes[input / 4 * VECTOR_BYTES + row * 4 + input % 4];
    }
  }
}

// The row blocks of a thread.
struct Blocks {
  int first, stop;
  MATQUANT_INLINE Blocks(const Linear& weight, int thread, int threads) {
    const std::int64_t blocks = ceil_div(weight.rows, BLOCK_ROWS);
    first = static_cast<int>(blocks * thread / threads);
    stop = static_cast<int>(blocks * (thread + 1) / threads);
  }
};

// Multiplies these with all tokens: `step` blocks at a time by `several`, the last ones by `one`.
void linear_blocks(const Blocks& blocks, ManyTokens several, int step, ManyTokens one, const Linear& weight,
                   const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride) {
  for (int token = 0; token < input.tokens; token += GEMM_TOKENS) {
    int block = blocks.first;
    for (; block + step <= blocks.stop; block += step) several(weight, width, input, block, token, y, y_stride);
    for (; block < blocks.stop; ++block) one(weight, width, input, block, token, y, y_stride);
  }
}

void linear_share(const Linear& weight, const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride,
                  int thread, int threads) {
  const Blocks blocks(weight, thread, threads);
  if (input.activations == Activations::exact) {
    const ExactBlock run = exact_block_of(input.panel);
    for (int block = blocks.first; block < blocks.stop; ++block)
      for (int panel = 0; panel < ceil_div(input.tokens, input.panel); ++panel)
        run(weight, width, input, panel, block, y, y_stride);
    return;
  }
  if constexpr (fused_tokens(2) > 0)
    if (input.tokens <= fused_tokens(width.read) && has_whole_tiles(weight))
      return row_blocks_of(width, input.panel)(weight, width, input, blocks.first, blocks.stop, y, y_stride);
  const ManyTokens one = input.panel == 1   ? many_tokens_of<1, 1>(width)
                         : input.panel == 2 ? many_tokens_of<1, 2>(width)
                         : input.panel == 4 ? many_tokens_of<1, 4>(width)
                                            : many_tokens_of<1, 8>(width);
  const ManyTokens several = input.panel == PANEL_TOKENS ? many_tokens_of<GEMM_BLOCKS, PANEL_TOKENS>(width) : one;
  const int step = input.panel == PANEL_TOKENS ? GEMM_BLOCKS : 1;
  linear_blocks(blocks, several, step, one, weight, width, input, y, y_stride);
}
