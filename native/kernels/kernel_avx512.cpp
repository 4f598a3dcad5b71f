// The kernels for AVX-512 with VNNI.
#include "kernels/kernels.hpp"

#include <immintrin.h>

namespace matquant {
namespace {

#include "avx512.inl"

#include "kernel.inl"

}  // namespace

const Kernels kernels_avx512 = {"avx512", NEVER, prepare_share, linear_share, codes, &float_kernels_avx512};

}  // namespace matquant
