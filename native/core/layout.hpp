// Sizes that the packed weights, the kernels and the decode step agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matquant {

constexpr int LANES = 16;              // floats per vector
constexpr int BLOCK_ROWS = LANES;      // rows of a tile, one per lane; threads share products in this unit
constexpr int TILE_INPUTS = 32;        // inputs of a tile
constexpr int TILE_QUADS = 8;          // a vector of 64 bytes is 16 rows x 4 inputs; a quad is those four inputs
constexpr int VECTOR_BYTES = 64;
constexpr int LINE_BYTES = 64;         // of the processor's caches
constexpr int ACTIVATION_GROUP = 128;  // inputs that share an activation scale, or
constexpr int LEAST_ACTIVATION_GROUP = 64;
constexpr int ACTIVATION_TILES = ACTIVATION_GROUP / TILE_INPUTS;
constexpr int PANEL_TOKENS = 8;        // of a panel of an Input
constexpr int WIDE_PANEL = 16;         // of one for matrix registers
constexpr int WIDE_INPUTS = 64;        // of a token that lie together in a wide panel

constexpr int PLANE_COUNT = 5;
constexpr int PLANE_BITS[PLANE_COUNT] = {2, 1, 1, 2, 2};  // most significant first
constexpr int BITS_UP_TO[PLANE_COUNT] = {2, 3, 4, 6, 8};  // bits in a plane and those before it

// Static: a copy that is not inlined must not be shared between files compiled for different machines.
static constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }
static constexpr int round_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }
static constexpr int tile_bytes(int plane) { return VECTOR_BYTES * PLANE_BITS[plane]; }
static constexpr std::size_t whole_lines(std::size_t bytes) {
  return (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
}

}  // namespace matquant
