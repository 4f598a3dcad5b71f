// What one instruction set provides. linear.cpp chooses among the tables; kernel.inl, compiled once per set, fills them.
#pragma once

#include "linear.hpp"

#define MATQUANT_INLINE inline __attribute__((always_inline))

namespace matquant {

// How large the bytes of a product may be: how many products fit in 16 bits depends on it.
enum class Range { to_16, to_32, to_64, to_128, any };

constexpr int BLOCK_ROWS = 16;   // rows of a tile; the unit of work of a thread
constexpr int TILE_INPUTS = 32;  // inputs of a tile
constexpr int TILE_QUADS = 8;    // a vector of 64 bytes is 16 rows x 4 inputs, "quad" numbers its four inputs
constexpr int VECTOR_BYTES = 64;
constexpr int ACTIVATION_GROUP = 128;
constexpr int ACTIVATION_TILES = ACTIVATION_GROUP / TILE_INPUTS;
constexpr int PANEL_TOKENS = 8;  // widest panel of an Input

// Static: a copy that is not inlined must not be shared between files compiled for different machines.
static constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }
static constexpr int tile_bytes(int plane) { return VECTOR_BYTES * PLANE_BITS[plane]; }

// How the integers of a companded width are looked up, with n = the top four bits of the code, by the bits it reads:
//     2       top[n] for the two bits that are above in a nibble of two codes, rest[n] for those below
//     3, 4    top[n]
//     6       (top[n] << lift) + rest[the top two and the last two of six bits]
//     8       (top[n] << lift) + m +- rest[m], m = the last four bits & rest_mask, by the sign of sign[n]
struct Tables {
  int centre;   // Width has these two as well
  Range range;
  int lift;
  std::uint8_t top[16], top_lifted[16], rest[16], sign[16], rest_mask[16];
};

// How a width is read: the top `read` bits of the code are loaded, then
//     slice = min((top >> shift) & mask) + ((top >> round_shift) & round_mask), cap)
// and what the slices of other grids stand for is looked up.
struct Width {
  int bits;
  int read;
  bool sliced;  // false: the `read` bits are the code
  int shift, mask, round_shift, round_mask, cap;
  const Tables* tables;  // null: the code is the integer
  int centre;            // taken off the integers
  Range range;           // of the integers
};

struct Kernels {
  const char* name;
  void (*prepare)(const Input& input, const float* x, int thread, int threads);
  void (*linear)(const Linear& weight, const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride,
                 int thread, int threads);
  // The r-bit codes as the products read them, [rows, cols].
  void (*codes)(const Linear& weight, const Width& width, std::uint8_t* codes);
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_neon;

Width width_of(int bits, Rule rule, Grid grid = Grid::uniform);

// The table in use, and a table by name (null: as MATQUANT_ISA or the machine says). Throws std::invalid_argument.
const Kernels& kernels();
void use_kernels(const char* name);
bool runs_here(const Kernels& table);

}  // namespace matquant
