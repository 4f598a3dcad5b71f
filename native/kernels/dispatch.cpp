// Chooses the instruction set.
#include "kernels/floats.hpp"
#include "kernels/kernels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace matquant {
namespace {

// Best first.
const Kernels* const TABLES[] = {
#if defined(__x86_64__)
    &kernels_amx,
    &kernels_avx512vbmi,
    &kernels_avx512,
#if defined(MATQUANT_AVXVNNI)
    &kernels_avxvnni,
#endif
    &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_scalar,
};

std::atomic<const Kernels*> in_use{nullptr};

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Extended features of the processor that not every compiler has names for.
struct Features {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Features(unsigned part) { __get_cpuid_count(7, part, &eax, &ebx, &ecx, &edx); }
};

bool has_avx_vnni() { return (Features(1).eax & 1u << 4) != 0; }

// True where the processor has AMX and the system lets this process use its registers, for which it has to be asked.
bool has_amx() {
#if defined(__linux__)
  constexpr int REQUEST_PERMISSION = 0x1023, REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned TILE_AND_INT8 = 3u << 24;
  static const bool granted = (Features(0).edx & TILE_AND_INT8) == TILE_AND_INT8 &&
                              syscall(SYS_arch_prctl, REQUEST_PERMISSION, REGISTERS) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

bool runs_here(const Kernels& table) {
  if (&table == &kernels_scalar) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2 || &table == &kernels_avx2) return avx2;
#if defined(MATQUANT_AVXVNNI)
  if (&table == &kernels_avxvnni) return has_avx_vnni();
#endif
  if (&table == &kernels_amx && !has_amx()) return false;
  if (&table != &kernels_avx512 && !__builtin_cpu_supports("avx512vbmi")) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long DOT_PRODUCT = 1UL << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & DOT_PRODUCT) != 0;
#else
  return true;  // every Apple silicon has the dot product
#endif
}

}  // namespace

const bool prefetch_within_page = is_intel();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* table : TABLES)
    if (runs_here(*table)) names.emplace_back(table->name);
  return names;
}

void use_kernels(const char* name) {
  if (name == nullptr) name = std::getenv("MATQUANT_ISA");
  const bool any = name == nullptr || *name == '\0';
  for (const Kernels* table : TABLES)
    if ((any || std::strcmp(table->name, name) == 0) && runs_here(*table)) {
      in_use.store(table, std::memory_order_release);
      return;
    }
  std::string known;
  for (const std::string& one : isas()) known += (known.empty() ? "" : ", ") + one;
  throw std::invalid_argument("MATQUANT_ISA=" + std::string(name) +
                              " is not an instruction set of this machine; use one of " + known);
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

const FloatKernels& float_kernels() { return *kernels().floats; }

}  // namespace matquant
