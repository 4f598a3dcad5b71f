// Planes and products for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/memory.hpp"
#include "core/planes.hpp"
#include "core/rows.hpp"
#include "core/team.hpp"
#include "kernels/kernels.hpp"

namespace nb = nanobind;

namespace matquant {
namespace {

template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::device::cpu>;  // any strides
template <class T>
using Contiguous = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

template <class T>
Result<T> new_matrix(std::size_t rows, std::size_t cols, std::unique_ptr<T[]> values) {
  T* data = values.release();
  nb::capsule owner(data, [](void* at) noexcept { delete[] static_cast<T*>(at); });
  return Result<T>(data, {rows, cols}, owner);
}

// A Linear and the memory it points to, which each plane has for itself.
class Weight {
 public:
  Weight(const Matrix<std::uint8_t>& codes, int resident_bits, int rule, int group, int grid) {
    linear_.rows = size(codes.shape(0));
    linear_.cols = size(codes.shape(1));
    if (group < 1) throw std::invalid_argument("a group needs at least one input");
    linear_.group = group;
    linear_.rule = static_cast<Rule>(rule);
    linear_.grid = static_cast<Grid>(grid);
    add_planes(codes, resident_bits);
    hold(resident_bits);
  }

  // Packs those of the planes with the top `bits` bits that are not in memory. Products do not see them before hold().
  void add_planes(const Matrix<std::uint8_t>& codes, int bits) {
    if (size(codes.shape(0)) != linear_.rows || size(codes.shape(1)) != linear_.cols)
      throw std::invalid_argument("the codes are not [rows, cols]");
    if (codes.shape(1) > 1 && codes.stride(1) != 1)
      throw std::invalid_argument("the codes of a row are not contiguous");
    std::unique_ptr<Memory> added[PLANE_COUNT];
    std::uint8_t* to[PLANE_COUNT] = {};
    for (int plane = 0; plane < count_planes(bits); ++plane) {
      if (planes_[plane] != nullptr) continue;
      added[plane] = std::make_unique<Memory>(plane_bytes(linear_.rows, linear_.cols, plane), Pages::huge, 1 + plane);
      to[plane] = added[plane]->data();
    }
    const nb::gil_scoped_release released;
    on_threads(default_threads(), [&](Team& team, int thread) {
      pack(codes.data(), codes.stride(0), linear_.rows, linear_.cols, to, thread, team.threads());
    });
    for (int plane = 0; plane < PLANE_COUNT; ++plane)
      if (added[plane] != nullptr) planes_[plane] = std::move(added[plane]);
  }

  // Makes the top `bits` bits available and gives the memory of the others back. No product may run meanwhile.
  void hold(int bits) {
    const int count = count_planes(bits);
    for (int plane = 0; plane < count; ++plane)
      if (planes_[plane] == nullptr) throw std::invalid_argument("a plane is not in memory");
    for (int plane = 0; plane < PLANE_COUNT; ++plane) {
      if (plane >= count) planes_[plane].reset();
      linear_.plane[plane] = plane < count ? planes_[plane]->data() : nullptr;
    }
    linear_.resident_bits = bits;
  }

  // scale, zero: [rows, groups] as float32, or as the bits of bfloat16 and float16. Returns an index for set_affine;
  // several widths may share it.
  template <class T>
  std::size_t add_values(const Contiguous<T>& scale, const Contiguous<T>& zero) {
    add({&scale, &zero}, 0.0f);
    return affines_.size() - 1;
  }
  // The same with one zero-point for all.
  template <class T>
  std::size_t add_scales(const Contiguous<T>& scale, float zero) {
    add({&scale}, zero);
    return affines_.size() - 1;
  }

  void set_affine(int bits, std::size_t values, float step, float centre) {
    if (bits < 1 || bits > 8 || values >= affines_.size()) throw std::invalid_argument("no such width or values");
    const Values& from = affines_[values];
    linear_.affine[bits] = {from.memory->data(), from.half, step, centre, from.one_zero, from.zero};
  }
  // Bytes of a width's scales and zero-points.
  std::size_t affine_bytes(int bits) const {
    if (bits < 1 || bits > 8) throw std::invalid_argument("no such width");
    for (const Values& values : affines_)
      if (values.memory->data() == linear_.affine[bits].values) return values.bytes;
    throw std::invalid_argument("that width has no scales");
  }

  const Linear& linear() const { return linear_; }
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& plane : planes_) total += plane == nullptr ? 0 : plane->bytes();
    for (const Values& values : affines_) total += values.memory->bytes();
    return total;
  }

 private:
  struct Values {
    std::unique_ptr<Memory> memory;
    std::size_t bytes;  // without what fills up a page
    bool half, one_zero;
    float zero;
  };

  // Scales [rows, groups] and zero-points of the same shape, or scales alone.
  template <class T>
  void add(std::initializer_list<const Contiguous<T>*> parts, float zero) {
    const int groups = linear_.cols / linear_.group;
    const std::size_t count = parts.size(), blocks = static_cast<std::size_t>(ceil_div(linear_.rows, BLOCK_ROWS));
    for (const auto* values : parts)
      if (size(values->shape(0)) != linear_.rows || size(values->shape(1)) != groups)
        throw std::invalid_argument("scale and zero are not [rows, groups]");
    const std::size_t bytes = sizeof(T) * count * BLOCK_ROWS * groups * blocks;
    auto memory = std::make_unique<Memory>(bytes, Pages::huge);
    T* const out = reinterpret_cast<T*>(memory->data());
    std::size_t part = 0;
    for (const auto* values : parts) {
      for (int row = 0; row < linear_.rows; ++row)
        for (int group = 0; group < groups; ++group) {
          const std::size_t index = static_cast<std::size_t>(row / BLOCK_ROWS) * groups + group;
          out[(index * count + part) * BLOCK_ROWS + row % BLOCK_ROWS] =
              values->data()[static_cast<std::size_t>(row) * groups + group];
        }
      ++part;
    }
    affines_.push_back({std::move(memory), bytes, sizeof(T) == 2, count == 1, zero});
  }

  static int size(std::size_t value) {
    if (value > 0x7FFFFF00) throw std::invalid_argument("a weight has at most 2^31 rows and columns");
    return static_cast<int>(value);
  }

  static int count_planes(int bits) {
    for (int plane = 0; plane < PLANE_COUNT; ++plane)
      if (BITS_UP_TO[plane] == bits) return plane + 1;
    throw std::invalid_argument("planes hold 2, 3, 4, 6 or 8 bits");
  }

  Linear linear_{};
  std::unique_ptr<Memory> planes_[PLANE_COUNT];
  std::vector<Values> affines_;
};

Result<std::uint8_t> read_codes(const Weight& weight, int bits, int rule) {
  Linear linear = weight.linear();
  linear.rule = static_cast<Rule>(rule);
  if (bits < 1 || bits > 8 || bits_read(bits, linear.rule) > linear.resident_bits)
    throw std::invalid_argument("that width is not resident");
  const auto rows = static_cast<std::size_t>(linear.rows), cols = static_cast<std::size_t>(linear.cols);
  auto codes = std::make_unique<std::uint8_t[]>(rows * cols);
  {
    const nb::gil_scoped_release released;
    kernels().codes(linear, width_of(bits, linear.rule), codes.get());
  }
  return new_matrix(rows, cols, std::move(codes));
}

// Copies a plane: [row blocks, bytes of a block].
Result<std::uint8_t> copy_plane(const Weight& weight, int plane) {
  const Linear& linear = weight.linear();
  if (plane < 0 || plane >= PLANE_COUNT || linear.plane[plane] == nullptr)
    throw std::invalid_argument("that plane is not resident");
  const auto blocks = static_cast<std::size_t>(ceil_div(linear.rows, BLOCK_ROWS));
  const auto bytes = static_cast<std::size_t>(ceil_div(linear.cols, TILE_INPUTS)) * tile_bytes(plane);
  auto copy = std::make_unique<std::uint8_t[]>(blocks * bytes);
  std::memcpy(copy.get(), linear.plane[plane], blocks * bytes);
  return new_matrix(blocks, bytes, std::move(copy));
}

// y [tokens, rows] = x [tokens, cols] W^T on a team of threads. Runs without the interpreter lock.
void multiply(const Linear& weight, const float* x, int tokens, float* y, int bits, Activations kind, int threads) {
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(64, input_bytes(tokens, weight.cols, kind)), &std::free);
  if (workspace == nullptr) throw std::bad_alloc();
  const Input input = make_input(workspace.get(), tokens, weight.cols, kind, activation_group(weight));
  on_threads(threads == 0 ? default_threads() : threads, [&](Team& team, int thread) {
    prepare(input, x, thread, team.threads());
    team.barrier(thread);
    linear(weight, bits, input, y, weight.rows, thread, team.threads());
  });
}

Result<float> matmul(const Weight& weight, Contiguous<float> x, int bits, int activations, int threads) {
  const Linear& linear_weight = weight.linear();
  if (!serves(linear_weight, bits)) throw std::invalid_argument("that width is not resident");
  if (x.shape(1) != static_cast<std::size_t>(linear_weight.cols))
    throw std::invalid_argument("x is not [tokens, cols]");
  const auto rows = static_cast<std::size_t>(linear_weight.rows);
  if (x.shape(0) > 0x7FFFFF00) throw std::invalid_argument("a product has at most 2^31 tokens");
  auto y = std::make_unique<float[]>(x.shape(0) * rows);
  if (x.shape(0) > 0) {
    const nb::gil_scoped_release released;
    multiply(linear_weight, x.data(), static_cast<int>(x.shape(0)), y.get(), bits,
             static_cast<Activations>(activations), threads);
  }
  return new_matrix(x.shape(0), rows, std::move(y));
}

// The same for addresses of contiguous float32 arrays of any library: passing an array as an object costs 2 us, an
// address 0.2.
void matmul_at(const Weight& weight, std::uintptr_t x, std::uintptr_t y, int tokens, int bits, int activations,
               int threads) {
  if (!serves(weight.linear(), bits)) throw std::invalid_argument("that width is not resident");
  if (tokens <= 0) return;
  const nb::gil_scoped_release released;
  multiply(weight.linear(), reinterpret_cast<const float*>(x), tokens, reinterpret_cast<float*>(y), bits,
           static_cast<Activations>(activations), threads);
}

// out [tokens, cols], float32: the rows of these tokens, int64, at addresses of contiguous arrays.
void rows_at(const Weight& weight, std::uintptr_t tokens, std::uintptr_t out, int count, int bits) {
  const Linear& linear = weight.linear();
  if (!serves(linear, bits)) throw std::invalid_argument("that width is not resident");
  const auto* ids = reinterpret_cast<const std::int64_t*>(tokens);
  for (int i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= linear.rows) throw std::invalid_argument("a token is not in the vocabulary");
  const nb::gil_scoped_release released;
  for (int i = 0; i < count; ++i)
    read_row(linear, bits, static_cast<int>(ids[i]), 1.0f,
             reinterpret_cast<float*>(out) + static_cast<std::size_t>(i) * linear.cols);
}

// Of the planes with the top `bits` bits of codes [rows, cols].
std::size_t planes_bytes(int rows, int cols, int bits) {
  std::size_t total = 0;
  for (int plane = 0; plane < PLANE_COUNT; ++plane)
    if (BITS_UP_TO[plane] <= bits) total += plane_bytes(rows, cols, plane);
  return total;
}

}  // namespace

void bind_linear(nb::module_& module) {
  nb::class_<Weight>(module, "Weight", "Planes and affines of a nested weight; planes.py checks the arguments.")
      .def(nb::init<const Matrix<std::uint8_t>&, int, int, int, int>(), nb::arg("codes").noconvert(),
           nb::arg("resident_bits"), nb::arg("rule"), nb::arg("group"), nb::arg("grid") = 0)
      .def("add_planes", &Weight::add_planes, nb::arg("codes").noconvert(), nb::arg("bits"))
      .def("hold", &Weight::hold, nb::arg("bits"))
      .def("add_values", &Weight::add_values<float>, nb::arg("scale").noconvert(), nb::arg("zero").noconvert())
      .def("add_values", &Weight::add_values<std::uint16_t>, nb::arg("scale").noconvert(), nb::arg("zero").noconvert())
      .def("add_scales", &Weight::add_scales<float>, nb::arg("scale").noconvert(), nb::arg("zero"))
      .def("add_scales", &Weight::add_scales<std::uint16_t>, nb::arg("scale").noconvert(), nb::arg("zero"))
      .def("affine_bytes", &Weight::affine_bytes, nb::arg("bits"))
      .def("set_affine", &Weight::set_affine, nb::arg("bits"), nb::arg("values"), nb::arg("step"), nb::arg("centre"))
      .def("codes", read_codes, nb::arg("bits"), nb::arg("rule"))
      .def("plane", copy_plane, nb::arg("plane"))
      .def("matmul", matmul, nb::arg("x").noconvert(), nb::arg("bits"), nb::arg("activations"), nb::arg("threads"))
      .def("matmul_at", matmul_at, nb::arg("x"), nb::arg("y"), nb::arg("tokens"), nb::arg("bits"),
           nb::arg("activations"), nb::arg("threads"))
      .def("rows_at", rows_at, nb::arg("tokens"), nb::arg("out"), nb::arg("count"), nb::arg("bits"))
      .def_prop_ro("pointer", [](const Weight& weight) { return reinterpret_cast<std::uintptr_t>(&weight.linear()); })
      .def_prop_ro("bytes", &Weight::bytes);
  module.def("planes_bytes", &planes_bytes, nb::arg("rows"), nb::arg("cols"), nb::arg("bits"));
  module.def("padded_tokens", [](int tokens, bool exact) {
    return padded_tokens(tokens, exact ? Activations::exact : Activations::int8);
  });
  module.def("isa", isa);
  module.def("isas", isas);
  // An empty name: MATQUANT_ISA, else the best of the machine.
  module.def("use_isa", [](const char* name) { use_kernels(*name == '\0' ? nullptr : name); });
}

}  // namespace matquant
