// A model as Python holds it, and what the bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/memory.hpp"
#include "decoder/model.hpp"

namespace matquant {

namespace nb = nanobind;

template <class T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Floats1 = Array<const float, 1>;

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// A Matrix and the owners of its memory.
struct HeldMatrix {
  Matrix matrix;
  std::vector<nb::object> owners;
  std::shared_ptr<Memory> memory;
};

// A Model and the owners of the memory it points into.
struct HeldModel {
  explicit HeldModel(Model sizes) : model(std::move(sizes)) {}
  Model model;
  std::vector<nb::object> owners;
  std::vector<std::shared_ptr<Memory>> memories;
  std::vector<std::uint16_t> served;  // by matrix id: bit r is set if width r can be read; all bits if it is dense
};

}  // namespace matquant
