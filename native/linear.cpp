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

Width width_of(int bits, Rule rule) {
  const bool rounds = rule != Rule::prefix && bits < 8;
  const int read = bits_read(bits, rule);
  // Where the lowest bit read lies in a decoded byte (kernel.inl): six bits come two higher than bit 0.
  const int base = read == 6 ? 2 : 0;
  const int shift = base + read - bits;
  return {bits,
          read,
          rounds || read != bits,
          shift,
          (1 << bits) - 1,
          rounds ? shift - 1 : 0,
          rounds ? 1 : 0,
          rule == Rule::extra ? 1 << bits : (1 << bits) - 1};
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
  kernels().linear(weight, width_of(bits, weight.rule), input, y, y_stride, thread, threads);
}

}  // namespace matquant
