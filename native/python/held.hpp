// A model as Python holds it, and what the bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
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

// Steps run side by side; a change of the weights waits until none runs and keeps new ones out. It is never overtaken.
class Gate {
 public:
  class Step {
   public:
    explicit Step(Gate& gate) : gate_(gate) {
      std::unique_lock<std::mutex> lock(gate.mutex_);
      gate.changed_.wait(lock, [&] { return !gate.closed_; });
      ++gate.steps_;
    }
    ~Step() {
      const std::lock_guard<std::mutex> lock(gate_.mutex_);
      if (--gate_.steps_ == 0) gate_.changed_.notify_all();
    }

   private:
    Gate& gate_;
  };

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !closed_; });
    closed_ = true;
    changed_.wait(lock, [&] { return steps_ == 0; });
  }
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = false;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int steps_ = 0;
  bool closed_ = false;
};

// A Model and the owners of the memory it points into.
struct HeldModel {
  explicit HeldModel(Model sizes) : model(std::move(sizes)) {}
  Model model;
  std::vector<nb::object> owners;
  std::vector<std::shared_ptr<Memory>> memories;
  std::vector<std::uint16_t> served;  // by matrix id: bit r is set if width r can be read; all bits if it is dense
  std::vector<bool> narrows;          // by matrix id: a width that is not held is read as the widest one below it
  mutable Gate gate;                  // for `served` and the planes of the matrices
};

}  // namespace matquant
