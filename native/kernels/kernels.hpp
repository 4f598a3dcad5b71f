// The functions that one instruction set provides. kernel.inl and floats.cpp, compiled once per set, fill the tables;
// dispatch.cpp chooses among them.
#pragma once

#include "core/width.hpp"

#include <limits>

#define MATQUANT_INLINE inline __attribute__((always_inline))

namespace matquant {

// Size of the registers that the file is compiled for.
#if defined(__AVX512F__)
constexpr int NATIVE_BYTES = 64;
#elif defined(__AVX2__)
constexpr int NATIVE_BYTES = 32;
#else
constexpr int NATIVE_BYTES = 16;
#endif
constexpr int NATIVE_LANES = NATIVE_BYTES / 4;

constexpr int NEVER = std::numeric_limits<int>::max();

struct FloatKernels;  // floats.hpp
extern const FloatKernels float_kernels_scalar;
extern const FloatKernels float_kernels_avx2;
extern const FloatKernels float_kernels_avx512;
extern const FloatKernels float_kernels_neon;

struct Kernels {
  const char* name;
  int wide_from;  // the tokens from which an int8 Input has panels of 16
  void (*prepare)(const Input& input, const float* x, int thread, int threads);
  void (*linear)(const Linear& weight, const Width& width, const Input& input, float* y, std::ptrdiff_t y_stride,
                 int thread, int threads);
  // The r-bit codes as the products read them, [rows, cols].
  void (*codes)(const Linear& weight, const Width& width, std::uint8_t* codes);
  const FloatKernels* floats;
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avxvnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vbmi;
extern const Kernels kernels_amx;  // avx512vbmi but for many tokens
extern const Kernels kernels_neon;

// The table in use. The first call chooses it: MATQUANT_ISA, else the best one of the machine.
const Kernels& kernels();
// Chooses a table by name (null: as the first call would). Throws std::invalid_argument.
void use_kernels(const char* name);

// True where prefetching a stream less than a page of 4 KiB ahead is faster than further ahead: on Intel's processors,
// whose own prefetchers work within a page.
extern const bool prefetch_within_page;

}  // namespace matquant
