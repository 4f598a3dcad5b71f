#include "core/memory.hpp"

#include <sys/mman.h>

#include <new>

namespace matquant {
namespace {

constexpr std::size_t HUGE_PAGE = std::size_t{2} << 20;
constexpr std::size_t PAGE = 4096;

std::uint8_t* map(std::size_t bytes, int flags) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::uint8_t*>(start);
}

// Maps 2 MiB more than needed and unmaps what lies before the boundary and after the end.
std::uint8_t* map_huge(std::size_t bytes) {
  std::uint8_t* const start = map(bytes + HUGE_PAGE, 0);
  const std::size_t before = (HUGE_PAGE - reinterpret_cast<std::uintptr_t>(start) % HUGE_PAGE) % HUGE_PAGE;
  std::uint8_t* const data = start + before;
  if (before > 0) munmap(start, before);
  if (before < HUGE_PAGE) munmap(data + bytes, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // may fail: that only costs speed
#endif
  return data;
}

}  // namespace

Memory::Memory(std::size_t bytes, Pages pages) : bytes_((bytes + PAGE - 1) / PAGE * PAGE) {
  if (bytes_ == 0) return;
  data_ = pages == Pages::huge ? map_huge(bytes_) : map(bytes_, MAP_NORESERVE);
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace matquant
