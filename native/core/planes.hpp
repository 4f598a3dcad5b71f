// Codes as bit planes in memory: [2][1][1][2][2] bits, most significant first. Each plane is a contiguous stream.
//
// A tile is 16 rows x 32 inputs. The tiles of a row block follow each other, and so do row blocks. A vector of 64 bytes
// holds 16 rows x 4 inputs, in byte 4 * row + (input & 3). Quad q of a tile is its inputs 4q .. 4q + 3.
//   2-bit planes: 128 bytes per tile; vector v has quad 4v in bits 7:6, 4v + 1 in 3:2, 4v + 2 in 5:4, 4v + 3 in 1:0.
//   1-bit planes: 64 bytes per tile; quads 0..7 in bits 5 1 4 0 6 2 7 3 of the first (bit 5 of the code),
//                 in bits 4 0 5 1 6 2 7 3 of the second (bit 4).
// docs/kernels.md has the reasons and an example. Rows and inputs past the end have code 0.
#pragma once

#include "core/layout.hpp"

namespace matquant {

// Bytes of a plane of codes [rows, cols].
std::size_t plane_bytes(int rows, int cols, int plane);

// Packs codes [rows, cols], row r at codes + r * stride, into the planes that are not null: this thread's share. Reads
// no byte past a row.
void pack(const std::uint8_t* codes, std::ptrdiff_t stride, int rows, int cols, std::uint8_t* const plane[PLANE_COUNT],
          int thread = 0, int threads = 1);

// Reads the top `read` bits (2, 3, 4, 6 or 8) of the 32 codes of a row in a tile; their other bits are 0.
void unpack_tile(const std::uint8_t* const plane[PLANE_COUNT], int cols, int row, int tile, int read,
                 std::uint8_t codes[TILE_INPUTS]);

}  // namespace matquant
