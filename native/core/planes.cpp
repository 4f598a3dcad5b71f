#include "core/planes.hpp"

#include <cstring>

namespace matquant {
namespace {

// A vector of 64 bytes as words, which any machine can shift; masks remove the bits that cross into another byte.
struct Bytes {
  std::uint64_t at[VECTOR_BYTES / 8];
};
constexpr std::uint64_t EACH_BYTE = 0x0101010101010101u;

// The bit at which the field of quad q begins, within a byte of a plane.
constexpr int TWO_BIT_SHIFT[4] = {6, 2, 4, 0};
constexpr int ONE_BIT_SHIFT[2][TILE_QUADS] = {{5, 1, 4, 0, 6, 2, 7, 3}, {4, 0, 5, 1, 6, 2, 7, 3}};

// Copies a tile's codes to quads. Codes past the end are not read and become 0.
void gather(const std::uint8_t* codes, std::ptrdiff_t stride, int rows, int inputs, Bytes (&quads)[TILE_QUADS]) {
  if (rows < BLOCK_ROWS || inputs < TILE_INPUTS) std::memset(quads, 0, sizeof quads);
  for (int row = 0; row < rows; ++row) {
    const std::uint8_t* from = codes + row * stride;
    auto* to = reinterpret_cast<std::uint8_t*>(quads) + 4 * row;
    if (inputs >= TILE_INPUTS)
      for (int quad = 0; quad < TILE_QUADS; ++quad) std::memcpy(to + quad * VECTOR_BYTES, from + 4 * quad, 4);
    else
      for (int input = 0; input < inputs; ++input) to[input / 4 * VECTOR_BYTES + input % 4] = from[input];
  }
}

// Moves a field of BITS bits, `drop` above bit 0, from the codes of the quads to its places in a vector of a plane.
template <int BITS, int QUADS>
void place(const Bytes* quads, int drop, const int (&shifts)[QUADS], std::uint8_t* out) {
  constexpr std::uint64_t FIELD = ((1 << BITS) - 1) * EACH_BYTE;
  Bytes all{};
  for (int quad = 0; quad < QUADS; ++quad)
    for (int i = 0; i < VECTOR_BYTES / 8; ++i) all.at[i] |= (quads[quad].at[i] >> drop & FIELD) << shifts[quad];
  std::memcpy(out, all.at, VECTOR_BYTES);
}

}  // namespace

std::size_t plane_bytes(int rows, int cols, int plane) {
  return static_cast<std::size_t>(ceil_div(rows, BLOCK_ROWS)) * ceil_div(cols, TILE_INPUTS) * tile_bytes(plane);
}

void pack(const std::uint8_t* codes, std::ptrdiff_t stride, int rows, int cols, std::uint8_t* const plane[PLANE_COUNT],
          int thread, int threads) {
  const std::int64_t blocks = ceil_div(rows, BLOCK_ROWS);
  const int tiles = ceil_div(cols, TILE_INPUTS);
  Bytes quads[TILE_QUADS];
  for (std::int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
    const int first_row = static_cast<int>(block) * BLOCK_ROWS;
    const int rows_here = rows - first_row < BLOCK_ROWS ? rows - first_row : BLOCK_ROWS;
    for (int tile = 0; tile < tiles; ++tile) {
      const int inputs = cols - tile * TILE_INPUTS < TILE_INPUTS ? cols - tile * TILE_INPUTS : TILE_INPUTS;
      gather(codes + first_row * stride + tile * TILE_INPUTS, stride, rows_here, inputs, quads);
      const std::size_t at = static_cast<std::size_t>(block) * tiles + tile;
      for (int half = 0; half < 2; ++half) {
        const std::size_t vector = 2 * at + half;
        if (plane[0]) place<2>(quads + 4 * half, 6, TWO_BIT_SHIFT, plane[0] + vector * VECTOR_BYTES);
        if (plane[3]) place<2>(quads + 4 * half, 2, TWO_BIT_SHIFT, plane[3] + vector * VECTOR_BYTES);
        if (plane[4]) place<2>(quads + 4 * half, 0, TWO_BIT_SHIFT, plane[4] + vector * VECTOR_BYTES);
      }
      if (plane[1]) place<1>(quads, 5, ONE_BIT_SHIFT[0], plane[1] + at * VECTOR_BYTES);
      if (plane[2]) place<1>(quads, 4, ONE_BIT_SHIFT[1], plane[2] + at * VECTOR_BYTES);
    }
  }
}

void unpack_tile(const std::uint8_t* const plane[PLANE_COUNT], int cols, int row, int tile, int read,
                 std::uint8_t codes[TILE_INPUTS]) {
  const std::size_t at = static_cast<std::size_t>(row / BLOCK_ROWS) * ceil_div(cols, TILE_INPUTS) + tile;
  for (int input = 0; input < TILE_INPUTS; ++input) {
    const int quad = input / 4, byte = row % BLOCK_ROWS * 4 + input % 4;
    int code = 0, bits = 0;
    for (int p = 0; bits < read; bits += PLANE_BITS[p], ++p) {
      const std::uint8_t* vectors = plane[p] + at * tile_bytes(p);
      const bool two = PLANE_BITS[p] == 2;
      const int field = two ? vectors[quad / 4 * VECTOR_BYTES + byte] >> TWO_BIT_SHIFT[quad % 4] & 3
                            : vectors[byte] >> ONE_BIT_SHIFT[p - 1][quad] & 1;
      code |= field << (8 - bits - PLANE_BITS[p]);
    }
    codes[input] = static_cast<std::uint8_t>(code);
  }
}

}  // namespace matquant
