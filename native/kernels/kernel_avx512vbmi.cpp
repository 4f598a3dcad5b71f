// The kernels for AVX-512 with VNNI and VBMI, of Intel's processors since 2019 and AMD's since 2022: one instruction
// looks up six bits of 64 bytes, which the companded grid needs. Float parts are those of AVX-512. With AMX for many
// tokens, whose processors have VBMI as well.
#include "kernels/kernels.hpp"

#include <immintrin.h>

namespace matquant {
namespace {

#include "avx512.inl"

using Table64 = __m512i;
MATQUANT_INLINE Table64 load_table(const std::uint8_t (&bytes)[64]) { return _mm512_loadu_si512(bytes); }
// By the low six bits of each byte.
MATQUANT_INLINE Bytes look_up_six(Table64 table, Bytes at) { return _mm512_permutexvar_epi8(at, table); }

#include "kernel.inl"
#include "amx.inl"

}  // namespace

const Kernels kernels_avx512vbmi = {"avx512vbmi", NEVER, prepare_share, linear_share, codes, &float_kernels_avx512};
const Kernels kernels_amx = {"amx", AMX_FROM, prepare_share, amx_share, codes, &float_kernels_avx512};

}  // namespace matquant
