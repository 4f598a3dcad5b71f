// The decode step for Python: checks every argument, then runs without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <vector>

#include "decoder/step.hpp"
#include "python/held.hpp"

namespace matquant {
namespace {

// A workspace with room for the rows of a step and the logits of one row: a call allocates nothing else.
struct HeldWorkspace {
  Workspace workspace;
  std::vector<Row> rows;
  std::vector<float> logits;
  std::vector<std::uint8_t> bits;  // by matrix id
  HeldWorkspace(const HeldModel& held, int max_tokens, int capacity, int threads)
      : workspace(held.model, max_tokens, capacity, threads), rows(max_tokens), logits(held.model.vocab),
        bits(held.served.size()) {}
};

// Writes the width that each matrix is read at to the workspace.
void fill_widths(const HeldModel& held, const Array<const std::uint8_t, 1>& bits, HeldWorkspace& space) {
  const std::size_t count = held.served.size();
  require(bits.shape(0) == count && space.bits.size() == count, "one width per matrix");
  for (std::size_t id = 0; id < count; ++id) {
    int width = bits(id);
    require(width < 16, "a width is not held in memory");
    if (held.narrows[id])
      while (width > 0 && !(held.served[id] >> width & 1)) --width;
    require(held.served[id] >> width & 1, "a width is not held in memory");
    space.bits[id] = static_cast<std::uint8_t>(width);
  }
}

// Checks tokens, positions and caches, and writes them to the workspace.
void fill_rows(const Model& m, const nb::list& tokens, const nb::list& positions, const nb::list& caches,
               HeldWorkspace& space) {
  const Cache* cache = nullptr;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    if (t < caches.size()) cache = nb::cast<const Cache*>(caches[t]);
    const int token = nb::cast<int>(tokens[t]), position = nb::cast<int>(positions[t]);
    require(token >= 0 && token < m.vocab, "a token is not in the vocabulary");
    require(position >= 0 && position < cache->capacity && cache->capacity <= space.workspace.capacity,
            "a position is beyond the cache");
    space.rows[t] = {token, position, cache};
  }
}

// tokens: one per row. positions: likewise. caches: likewise, or one for all. logits: null for those of a single row,
// which stay in the workspace.
void run_step(const HeldModel& held, Array<const std::uint8_t, 1> bits, bool exact, const nb::list& tokens,
              const nb::list& positions, const nb::list& caches, int first_logit,
              const std::optional<Array<float, 2>>& logits, HeldWorkspace& space) {
  const Model& m = held.model;
  require(tokens.size() <= MOST_TOKENS, "more tokens than a step takes");
  const int count = static_cast<int>(tokens.size());
  require(!m.layers.empty() && m.norm, "the model is not complete");
  require(count > 0 && count <= space.workspace.max_tokens, "more tokens than the workspace has room for");
  require(positions.size() == tokens.size() && (caches.size() == 1 || caches.size() == tokens.size()),
          "one position per token, and one cache for all or per token");
  const std::size_t room = logits ? logits->shape(0) : 1, width = logits ? logits->shape(1) : space.logits.size();
  require(first_logit >= 0 && first_logit <= count && room >= static_cast<std::size_t>(count - first_logit) &&
              width == static_cast<std::size_t>(m.vocab),
          "the logits have the wrong shape");
  fill_rows(m, tokens, positions, caches, space);
  const nb::gil_scoped_release unlocked;
  const Gate::Step entered(held.gate);
  fill_widths(held, bits, space);
  step(m, space.bits.data(), exact ? Activations::exact : Activations::int8, space.rows.data(), count, first_logit,
       logits ? logits->data() : space.logits.data(), space.workspace);
}

nb::dict seconds_by_part(const HeldWorkspace& space) {
  nb::dict result;
  for (int part = 0; part < PARTS; ++part) result[PART_NAMES[part]] = space.workspace.seconds[part];
  return result;
}

}  // namespace

void bind_step(nb::module_& module) {
  nb::class_<Cache>(module, "Cache")
      .def(
          "__init__",
          [](Cache* self, const HeldModel& held, int capacity, bool exact) {
            new (self) Cache(held.model, capacity, exact ? DType::f32 : DType::f16);
          },
          nb::arg("model"), nb::arg("capacity"), nb::arg("exact"))
      .def("copy_prefix", &Cache::copy_prefix, nb::arg("source"), nb::arg("length"),
           nb::call_guard<nb::gil_scoped_release>())
      .def("bytes_in_use", &Cache::bytes_in_use, nb::arg("length"))
      .def_prop_ro("bytes", &Cache::bytes)
      .def_ro("capacity", &Cache::capacity);

  nb::class_<HeldWorkspace>(module, "Workspace")
      .def(nb::init<const HeldModel&, int, int, int>(), nb::arg("model"), nb::arg("max_tokens"), nb::arg("capacity"),
           nb::arg("threads"))
      .def_prop_rw(
          "profile", [](const HeldWorkspace& space) { return space.workspace.profile; },
          [](HeldWorkspace& space, bool profile) {
            space.workspace.profile = profile;
            std::fill(std::begin(space.workspace.seconds), std::end(space.workspace.seconds), 0.0);
          })
      .def_prop_ro("logits",
                   [](HeldWorkspace& space) {
                     return nb::ndarray<nb::numpy, float, nb::ndim<1>>(space.logits.data(), {space.logits.size()},
                                                                       nb::find(space));
                   })
      .def_prop_ro("used",
                   [](HeldWorkspace& space) {
                     const Workspace& of = space.workspace;
                     return nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<2>>(
                         of.used, {of.all_experts, std::size_t{WIDTH_COUNTS}}, nb::find(space));
                   })
      .def("seconds", &seconds_by_part);

  module.def("step", &run_step, nb::arg("model"), nb::arg("bits"), nb::arg("exact"), nb::arg("tokens"),
             nb::arg("positions"), nb::arg("caches"), nb::arg("first_logit"), nb::arg("logits").none(),
             nb::arg("workspace"));
}

}  // namespace matquant
