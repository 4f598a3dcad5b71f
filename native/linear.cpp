// Which kernels run, how a width is read, and how an Input lies in its workspace.
#include "kernels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace matquant {
namespace {

// Best first.
const Kernels* const TABLES[] = {
#if defined(__x86_64__)
    &kernels_avx512,
    &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_scalar,
};

std::atomic<const Kernels*> in_use{nullptr};

std::size_t in_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

int panel_of(int tokens) { return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : PANEL_TOKENS; }

// nest.integer_positions: the integer that a code of the companded grid stands for.
constexpr int companded(int bits, int code) {
  if (bits == 7) return (companded(8, 2 * code) + companded(8, 2 * code + 1) - 1) / 2;
  const int from_middle = 2 * code - (1 << bits) + 1, distance = from_middle < 0 ? -from_middle : from_middle;
  const int outside = distance > 1 << (bits - 1) ? distance - (1 << (bits - 1)) : 0;
  const int eighths = from_middle < 0 ? -3 * distance - 2 * outside : 3 * distance + 2 * outside;
  return bits == 8 ? (1024 + eighths) / 8 : 2 * ((1 << bits) - 1) + (eighths - 1) / 2;
}

constexpr bool is_inner(int nibble) { return nibble >= 4 && nibble < 12; }

constexpr Tables tables_of(int bits) {
  Tables tables{};
  const int largest = companded(bits, (1 << bits) - 1);
  tables.centre = (largest + 1) / 2;
  tables.range = largest <= 16    ? Range::to_16
                 : largest <= 32  ? Range::to_32
                 : largest <= 64  ? Range::to_64
                 : largest <= 128 ? Range::to_128
                                  : Range::any;
  tables.lift = bits >= 6 ? 2 : bits == 5 ? 1 : 0;
  for (int i = 0; i < 16; ++i) {
    const int ends = i >> 2 << 4 | (i & 3);  // six bits: the first two and the last two of i, zeros between them
    int top = 0, rest = 0;
    if (bits <= 2) {
      top = companded(bits, i >> 2 >> (2 - bits));
      rest = companded(bits, (i & 3) >> (2 - bits));
    } else if (bits <= 4) {
      top = companded(bits, i >> (4 - bits));
    } else if (bits <= 6) {
      top = companded(4, i);
      rest = companded(bits, ends >> (6 - bits)) - (companded(4, ends >> 2) << tables.lift);
    } else {
      top = companded(8, 16 * i) >> tables.lift;
      rest = (i + 2) >> 2;
    }
    tables.top[i] = static_cast<std::uint8_t>(top);
    tables.top_lifted[i] = static_cast<std::uint8_t>(top << tables.lift);
    tables.rest[i] = static_cast<std::uint8_t>(rest);
    tables.sign[i] = static_cast<std::uint8_t>(is_inner(i) ? -1 : 1);
    tables.rest_mask[i] = bits == 7 ? 0x0E : 0x0F;
  }
  return tables;
}

constexpr Tables COMPANDED[9] = {{},           tables_of(1), tables_of(2), tables_of(3), tables_of(4),
                                 tables_of(5), tables_of(6), tables_of(7), tables_of(8)};

// Tokens filled to whole panels times inputs filled to whole groups.
std::size_t padded_values(int tokens, int cols) {
  const int panel = panel_of(tokens);
  return static_cast<std::size_t>(ceil_div(tokens, panel)) * panel * ceil_div(cols, ACTIVATION_GROUP) * ACTIVATION_GROUP;
}

}  // namespace

bool runs_here(const Kernels& table) {
  if (&table == &kernels_scalar) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return false;
  if (&table == &kernels_avx2) return true;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long DOT_PRODUCT = 1UL << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & DOT_PRODUCT) != 0;
#else
  return true;  // every Apple silicon has the dot product
#endif
}

void use_kernels(const char* name) {
  if (name == nullptr) name = std::getenv("MATQUANT_ISA");
  const bool any = name == nullptr || *name == '\0';
  std::string known;
  for (const Kernels* table : TABLES) {
    if (any ? runs_here(*table) : std::strcmp(table->name, name) == 0 && runs_here(*table)) {
      in_use.store(table, std::memory_order_release);
      return;
    }
    if (runs_here(*table)) known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("MATQUANT_ISA=" + std::string(name) + " is not an instruction set of this machine; use one of " +
                              known);
}

const Kernels& kernels() {
  const Kernels* table = in_use.load(std::memory_order_acquire);
  if (table == nullptr) {
    use_kernels(nullptr);
    table = in_use.load(std::memory_order_acquire);
  }
  return *table;
}

const char* isa() { return kernels().name; }

int bits_read(int bits, Rule rule) {
  const int needed = rule == Rule::prefix || bits == 8 ? bits : bits + 1;
  return needed <= 2 ? 2 : needed <= 4 ? needed : needed <= 6 ? 6 : 8;
}

bool serves(const Linear& weight, int bits) {
  return bits >= 1 && bits <= 8 && weight.affine[bits].values != nullptr &&
         bits_read(bits, weight.rule) <= weight.resident_bits;
}

Width width_of(int bits, Rule rule, Grid grid) {
  const bool rounds = rule != Rule::prefix && bits < 8;
  const int read = bits_read(bits, rule);
  // Where the lowest bit read lies in a decoded byte (kernel.inl): six bits come two higher than bit 0.
  const int base = read == 6 ? 2 : 0;
  const int shift = base + read - bits;
  const Tables* const tables = grid == Grid::companded ? &COMPANDED[bits] : nullptr;
  return {bits,
          read,
          rounds || read != bits,
          shift,
          (1 << bits) - 1,
          rounds ? shift - 1 : 0,
          rounds ? 1 : 0,
          rule == Rule::extra ? 1 << bits : (1 << bits) - 1,
          tables,
          tables != nullptr ? tables->centre : 1 << (bits - 1),
          tables != nullptr ? tables->range
          : read <= 4       ? Range::to_16
          : bits < 8        ? Range::to_128
                            : Range::any};
}

Input make_input(void* workspace, int tokens, int cols, Activations activations) {
  const std::size_t padded = padded_values(tokens, cols);
  auto* at = static_cast<char*>(workspace);
  Input input{tokens, cols, activations, panel_of(tokens), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (activations == Activations::exact) {
    input.values = reinterpret_cast<float*>(at);
    input.value_sums = reinterpret_cast<float*>(at + in_lines(padded * sizeof(float)));
  } else {
    input.codes = reinterpret_cast<std::int8_t*>(at);
    at += in_lines(padded);
    input.scales = reinterpret_cast<float*>(at);
    at += in_lines(padded / ACTIVATION_GROUP * sizeof(float));
    input.code_sums = reinterpret_cast<std::int32_t*>(at);
    at += in_lines(padded / TILE_INPUTS * sizeof(std::int32_t));
    input.group_sums = reinterpret_cast<std::int32_t*>(at);
  }
  return input;
}

std::size_t input_bytes(int tokens, int cols, Activations activations) {
  const std::size_t padded = padded_values(tokens, cols);
  const std::size_t sums = in_lines(padded / TILE_INPUTS * 4);
  if (activations == Activations::exact) return in_lines(padded * sizeof(float)) + sums;
  return in_lines(padded) + 2 * in_lines(padded / ACTIVATION_GROUP * sizeof(float)) + sums;
}

void prepare(const Input& input, const float* x, int thread, int threads) {
  kernels().prepare(input, x, thread, threads);
}

void linear(const Linear& weight, int bits, const Input& input, float* y, std::ptrdiff_t y_stride, int thread,
            int threads) {
  kernels().linear(weight, width_of(bits, weight.rule, weight.grid), input, y, y_stride, thread, threads);
}

}  // namespace matquant
