#include "core/memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "core/layout.hpp"

namespace matquant {
namespace {

constexpr std::size_t HUGE_PAGE = std::size_t{2} << 20;
constexpr std::size_t PAGE = 4096;
constexpr std::size_t REGION_BYTES = std::size_t{64} << 20;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::uint8_t* map(std::size_t bytes, int flags) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::uint8_t*>(start);
}

// Maps 2 MiB more than needed and unmaps what lies before the boundary and after the end.
std::uint8_t* map_huge(std::size_t bytes) {
  std::uint8_t* const start = map(bytes + HUGE_PAGE, MAP_NORESERVE);
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

// Huge pages that several memories lie in, one after the other: most matrices are smaller than a page.
struct Memory::Region {
  explicit Region(std::size_t bytes) : data(map_huge(bytes)), left(bytes), memories(bytes / HUGE_PAGE) {}
  ~Region() { munmap(data, used + left); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  std::uint8_t* const data;
  std::size_t used = 0, left;
  std::mutex mutex;
  std::vector<int> memories;  // that live in each page

  // Counts a memory in the pages it touches. A page that no memory is left in is given back.
  void count(const std::uint8_t* start, std::size_t bytes, int change) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t page = (start - data) / HUGE_PAGE; page * HUGE_PAGE < start - data + bytes; ++page)
      if ((memories[page] += change) == 0) madvise(data + page * HUGE_PAGE, HUGE_PAGE, MADV_DONTNEED);
  }
};

namespace {

// Memory that was given back within a region in which others live.
struct Hole {
  std::weak_ptr<Memory::Region> region;
  std::uint8_t* start;
  std::size_t bytes;
};

// Where the next memory of a pool is taken from: a hole of its size, or the end of the newest region. Planes that come
// and go would otherwise leave more and more pages that are partly used.
struct Pool {
  std::mutex mutex;
  std::weak_ptr<Memory::Region> newest;
  std::vector<Hole> holes;

  // Returns a zeroed hole of this size and its region, null if there is none.
  std::uint8_t* fill_hole(std::size_t bytes, std::shared_ptr<Memory::Region>& region) {
    for (std::size_t i = holes.size(); i-- > 0;) {
      const Hole hole = holes[i];
      if (hole.bytes != bytes && !hole.region.expired()) continue;
      holes[i] = holes.back();
      holes.pop_back();
      region = hole.region.lock();
      if (region == nullptr || hole.bytes != bytes) continue;
      std::memset(hole.start, 0, bytes);
      return hole.start;
    }
    return nullptr;
  }
};

Pool& pool_of(int number) {
  static Pool* const all = new Pool[POOLS];  // never destroyed: memories may outlive them
  return all[number];
}

}  // namespace

Memory::Memory(std::size_t bytes, Pages pages, int pool) : pool_(pool) {
  if (bytes == 0) return;
  if (pages == Pages::on_demand) {
    bytes_ = rounded_up(bytes, PAGE);
    data_ = map(bytes_, MAP_NORESERVE);
    return;
  }
  bytes_ = rounded_up(bytes, LINE_BYTES);
  Pool& shared = pool_of(pool);
  const std::lock_guard<std::mutex> lock(shared.mutex);
  data_ = shared.fill_hole(bytes_, region_);
  if (data_ == nullptr) {
    region_ = shared.newest.lock();
    if (region_ == nullptr || region_->left < bytes_) {
      region_ = std::make_shared<Region>(std::max(REGION_BYTES, rounded_up(bytes_, HUGE_PAGE)));
      shared.newest = region_;
    }
    data_ = region_->data + region_->used;
    region_->used += bytes_;
    region_->left -= bytes_;
  }
  region_->count(data_, bytes_, 1);
}

Memory::~Memory() {
  if (region_ != nullptr) {
    region_->count(data_, bytes_, -1);
    const std::lock_guard<std::mutex> lock(pool_of(pool_).mutex);
    pool_of(pool_).holes.push_back({region_, data_, bytes_});
  } else if (data_ != nullptr) {
    munmap(data_, bytes_);
  }
}

}  // namespace matquant
