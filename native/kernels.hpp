// What one instruction set provides. linear.cpp chooses among the tables; kernel.inl, compiled once per set, fills them.
#pragma once

#include "linear.hpp"

#define MATQUANT_INLINE inline __attribute__((always_inline))

namespace matquant {

// How large codes may be: 15, 128 or any byte.
enum class Range { nibble, narrow, wide };

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

// How a width is read: the top `read` bits of the code are loaded, then
//     slice = min((top >> shift) & mask) + ((top >> round_shift) & round_mask), cap)
struct Width {
  int bits;
  int read;
  bool sliced;  // false: the `read` bits are the code
  int shift, mask, round_shift, round_mask, cap;
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

Width width_of(int bits, Rule rule);

// The table in use, and a table by name (null: as MATQUANT_ISA or the machine says). Throws std::invalid_argument.
const Kernels& kernels();
void use_kernels(const char* name);
bool runs_here(const Kernels& table);

}  // namespace matquant
