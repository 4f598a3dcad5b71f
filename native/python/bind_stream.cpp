// The speed of memory, for benchmarks.
#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>

#include "core/memory.hpp"
#include "core/team.hpp"
#include "kernels/floats.hpp"

namespace nb = nanobind;

namespace matquant {
namespace {

// Memory that is only read: the speed at which weights could stream at best.
class Stream {
 public:
  explicit Stream(std::size_t bytes) : bytes_(bytes / CHUNK_BYTES * CHUNK_BYTES), memory_(bytes_, Pages::huge) {
    for (std::size_t i = 0; i < bytes_; i += LINE_BYTES) memory_.data()[i] = static_cast<std::uint8_t>(i / LINE_BYTES);
  }

  // Seconds that `threads` threads take to read it once.
  double read(int threads) const {
    using namespace std::chrono;
    std::atomic<std::uint64_t> sum{0};
    const auto start = steady_clock::now();
    on_threads(threads, [&](Team& team, int thread) {
      const Share mine = share_of(bytes_ / CHUNK_BYTES, thread, team.threads());
      sum ^= float_kernels().read(memory_.data() + mine.start * CHUNK_BYTES, (mine.stop - mine.start) * CHUNK_BYTES);
    });
    const double seconds = duration<double>(steady_clock::now() - start).count();
    volatile std::uint64_t used = sum;  // or the reads are optimised away
    static_cast<void>(used);
    return seconds;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr std::size_t CHUNK_BYTES = 4096;
  const std::size_t bytes_;
  const Memory memory_;
};

}  // namespace

void bind_stream(nb::module_& module) {
  nb::class_<Stream>(module, "Stream")
      .def(nb::init<std::size_t>(), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>())
      .def("read", &Stream::read, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", &Stream::bytes);
}

}  // namespace matquant
