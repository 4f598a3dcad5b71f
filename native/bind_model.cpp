// Python's view of the decode step. Checks every argument, then runs without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "model.hpp"
#include "planes.hpp"
#include "team.hpp"

namespace nb = nanobind;

namespace matquant {
namespace {

template <class T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Floats1 = Array<const float, 1>;
using Raw2 = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, or 16 bits as uint16

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
}

Dense dense_of(const Raw2& array, const std::string& dtype) {
  const DType kind = dtype_of(dtype);
  require(array.itemsize() == size_of(kind), "the array's items do not have the size of its dtype");
  require(array.shape(0) <= (size_t)kMostValues && array.shape(1) <= (size_t)kMostValues, "a matrix is too large");
  return {array.data(), kind, (int)array.shape(0), (int)array.shape(1)};
}

// A Matrix with what owns its memory.
struct HeldMatrix {
  Matrix matrix;
  std::vector<nb::object> owners;
  std::shared_ptr<Memory> memory;

  void add_bias(const std::optional<Floats1>& bias) {
    if (!bias) return;
    require(bias->shape(0) == (size_t)matrix.rows(), "a bias has the wrong length");
    matrix.bias = bias->data();
    owners.push_back(nb::cast(*bias));
  }
};

// A Model with the Python objects whose memory it points into.
struct Held {
  explicit Held(Model sizes) : model(std::move(sizes)) {}
  Model model;
  std::vector<nb::object> owners;
  std::vector<std::shared_ptr<Memory>> memories;
  std::vector<std::uint16_t> served;  // [layers][kProjections]: bit r if width r is; all bits if the matrix is dense
  std::uint16_t served_by_head = 0;

  const Matrix& keep(const HeldMatrix& held) {
    owners.insert(owners.end(), held.owners.begin(), held.owners.end());
    memories.push_back(held.memory);
    return held.matrix;
  }

  const float* keep(const std::optional<Floats1>& array, int length) {
    if (!array) return nullptr;
    require(array->shape(0) == (size_t)length, "a vector has the wrong length");
    owners.push_back(nb::cast(*array));
    return array->data();
  }
};

std::uint16_t served_widths(const Matrix& matrix) {
  std::uint16_t widths = 0;
  for (int bits = 0; bits < 16; ++bits) widths |= (!matrix.nested || serves(*matrix.nested, bits)) << bits;
  return widths;
}

// resident: copied into huge pages, where it streams faster than from a mapped file; for what every token reads whole.
HeldMatrix dense_matrix(const Raw2& array, const std::string& dtype, const std::optional<Floats1>& bias,
                        bool resident) {
  HeldMatrix held;
  held.matrix.dense = dense_of(array, dtype);
  if (resident) {
    const size_t bytes = array.nbytes();
    held.memory = std::make_shared<Memory>(bytes);
    const char* from = (const char*)array.data();
    const nb::gil_scoped_release unlocked;
    on_threads(default_threads(), [&](Team& team, int thread) {
      const Chunk mine = chunk_of(bytes, thread, team.threads());
      std::memcpy(held.memory->data() + mine.start, from + mine.start, mine.stop - mine.start);
    });
    held.matrix.dense.data = held.memory->data();
  } else {
    held.owners.push_back(nb::cast(array));
  }
  held.add_bias(bias);
  return held;
}

HeldMatrix nested_matrix(nb::object owner, std::uintptr_t linear, const std::optional<Floats1>& bias) {
  HeldMatrix held;
  held.matrix.nested = (const Linear*)linear;
  held.owners.push_back(owner);
  held.add_bias(bias);
  return held;
}

void check_shape(const Matrix& matrix, int rows, int cols) {
  require(matrix.rows() == rows && matrix.cols() == cols, "a matrix has the wrong shape");
}

void add_layer(Held& held, const std::vector<HeldMatrix*>& matrices, const std::vector<std::optional<Floats1>>& norms,
               int window, int rope) {
  Model& m = held.model;
  require(matrices.size() == kProjections && norms.size() == 6, "a layer has seven matrices and six norms");
  require(window >= 0 && rope >= -1 && rope < (int)m.ropes.size(), "window or rope out of range");
  Layer layer{};
  for (int i = 0; i < kProjections; ++i) layer.matrix[i] = held.keep(*matrices[i]);
  for (const Matrix& matrix : layer.matrix) held.served.push_back(served_widths(matrix));
  const int queries = m.heads * m.head_dim, keys = m.kv_heads * m.head_dim;
  check_shape(layer.matrix[kQuery], queries, m.hidden);
  check_shape(layer.matrix[kKey], keys, m.hidden);
  check_shape(layer.matrix[kValue], keys, m.hidden);
  check_shape(layer.matrix[kOutput], m.hidden, queries);
  check_shape(layer.matrix[kGate], m.intermediate, m.hidden);
  check_shape(layer.matrix[kUp], m.intermediate, m.hidden);
  check_shape(layer.matrix[kDown], m.hidden, m.intermediate);
  require(norms[0] && norms[2], "a layer needs the norms before attention and feed-forward");
  layer.norms = {held.keep(norms[0], m.hidden), held.keep(norms[1], m.hidden),   held.keep(norms[2], m.hidden),
                 held.keep(norms[3], m.hidden), held.keep(norms[4], m.head_dim), held.keep(norms[5], m.head_dim)};
  layer.window = window;
  layer.rope = rope;
  m.layers.push_back(layer);
}

void set_ends(Held& held, const HeldMatrix& embedding, const HeldMatrix& head, const Floats1& norm) {
  Model& m = held.model;
  require(!embedding.matrix.nested, "the embedding is quantised");
  check_shape(embedding.matrix, m.vocab, m.hidden);
  check_shape(head.matrix, m.vocab, m.hidden);
  m.embedding = held.keep(embedding).dense;
  m.head = held.keep(head);
  held.served_by_head = served_widths(m.head);
  m.norm = held.keep(norm, m.hidden);
}

int checked_threads(int threads) {
  require(threads >= 1 && threads <= MOST_THREADS, "threads must be from 1 to 1024");
  return threads;
}

// A workspace with the rows of the step it is used for, and the logits of one: nothing else is needed per call.
struct HeldWorkspace {
  Workspace workspace;
  std::vector<Row> rows;
  std::vector<float> logits;
  HeldWorkspace(const Held& held, int max_tokens, int capacity, int threads)
      : workspace(held.model, max_tokens, capacity, checked_threads(threads)), rows(max_tokens), logits(held.model.vocab) {}
};

void run_step(const Held& held, Array<const std::uint8_t, 1> bits, bool exact, const nb::list& tokens,
              const nb::list& positions, const nb::list& caches, int first_logit,
              const std::optional<Array<float, 2>>& logits, HeldWorkspace& space) {
  const Model& m = held.model;
  require(tokens.size() <= (size_t)kMostTokens, "more tokens than a step takes");
  const int count = (int)tokens.size();
  require(!m.layers.empty() && m.norm, "the model is not complete");
  require(count > 0 && count <= space.workspace.max_tokens, "more tokens than the workspace has room for");
  require(positions.size() == (size_t)count && (caches.size() == 1 || caches.size() == (size_t)count),
          "one position per token, and one cache for all or per token");
  require(first_logit >= 0 && first_logit <= count && (logits ? logits->shape(0) : 1) >= (size_t)(count - first_logit) &&
              (logits ? logits->shape(1) : space.logits.size()) == (size_t)m.vocab,
          "the logits have the wrong shape");
  require(bits.shape(0) == m.layers.size() * kProjections + 1, "one width per matrix");
  for (size_t i = 0; i < bits.shape(0); ++i) {
    const std::uint16_t widths = i < held.served.size() ? held.served[i] : held.served_by_head;
    require(bits(i) < 16 && (widths >> bits(i) & 1), "a width is not held in memory");
  }
  const Cache* cache = nullptr;
  for (int t = 0; t < count; ++t) {
    if (t < (int)caches.size()) cache = nb::cast<const Cache*>(caches[t]);
    const int token = nb::cast<int>(tokens[t]), position = nb::cast<int>(positions[t]);
    require(token >= 0 && token < m.vocab, "a token is not in the vocabulary");
    require(position >= 0 && position < cache->capacity && cache->capacity <= space.workspace.capacity,
            "a position is beyond the cache");
    space.rows[t] = {token, position, cache};
  }
  nb::gil_scoped_release unlocked;
  step(m, bits.data(), exact ? Activations::exact : Activations::int8, space.rows.data(), count, first_logit,
       logits ? logits->data() : space.logits.data(), space.workspace);
}

nb::dict seconds_by_part(const HeldWorkspace& space) {
  nb::dict result;
  for (int part = 0; part < kParts; ++part) result[kPartNames[part]] = space.workspace.seconds[part];
  return result;
}

// Memory to read for nothing: how fast weights could stream at best.
class Stream {
 public:
  explicit Stream(size_t bytes) : bytes_(bytes / kChunk * kChunk), memory_(bytes_) {
    for (size_t i = 0; i < bytes_; i += 64) memory_.data()[i] = (std::uint8_t)(i / 64);
  }

  // Seconds that `threads` threads take to read it once.
  double read(int threads) const {
    using namespace std::chrono;
    std::atomic<std::uint64_t> sum{0};
    const auto start = steady_clock::now();
    on_threads(threads, [&](Team& team, int thread) {
      const Chunk mine = chunk_of(bytes_ / kChunk, thread, team.threads());
      sum ^= floats().read(memory_.data() + mine.start * kChunk, (mine.stop - mine.start) * kChunk);
    });
    const double seconds = duration<double>(steady_clock::now() - start).count();
    volatile std::uint64_t used = sum;  // or the reads are optimised away
    (void)used;
    return seconds;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kChunk = 4096;
  const size_t bytes_;
  const Memory memory_;
};

}  // namespace

void bind_model(nb::module_& module) {
  nb::class_<HeldMatrix>(module, "Matrix");
  module.def("dense_matrix", &dense_matrix, nb::arg("data"), nb::arg("dtype"), nb::arg("bias").none(),
             nb::arg("resident"));
  module.def("nested_matrix", &nested_matrix, nb::arg("owner"), nb::arg("linear"), nb::arg("bias").none());

  nb::class_<Held>(module, "Model")
      .def(
          "__init__",
          [](Held* self, std::int64_t hidden, std::int64_t intermediate, std::int64_t heads, std::int64_t kv_heads,
             std::int64_t head_dim, std::int64_t vocab, float norm_eps, float attention_scale, float embedding_scale,
             float attention_cap, float logit_cap, bool gelu) {
            new (self) Held(Model(hidden, intermediate, heads, kv_heads, head_dim, vocab));
            Model& m = self->model;
            m.norm_eps = norm_eps, m.attention_scale = attention_scale, m.embedding_scale = embedding_scale;
            m.attention_cap = attention_cap, m.logit_cap = logit_cap, m.gelu = gelu;
          },
          nb::kw_only(), nb::arg("hidden"), nb::arg("intermediate"), nb::arg("heads"), nb::arg("kv_heads"),
          nb::arg("head_dim"), nb::arg("vocab"), nb::arg("norm_eps"), nb::arg("attention_scale"),
          nb::arg("embedding_scale"), nb::arg("attention_cap"), nb::arg("logit_cap"), nb::arg("gelu"))
      .def(
          "add_rope",
          [](Held& held, const Floats1& frequencies, float scale) {
            held.model.ropes.push_back({held.keep(frequencies, held.model.head_dim / 2), scale});
          },
          nb::arg("frequencies"), nb::arg("scale"))
      .def("add_layer", &add_layer, nb::arg("matrices"), nb::arg("norms"), nb::arg("window"), nb::arg("rope"))
      .def("set_ends", &set_ends, nb::arg("embedding"), nb::arg("head"), nb::arg("norm"));

  nb::class_<Cache>(module, "Cache")
      .def(
          "__init__",
          [](Cache* self, const Held& held, int capacity, bool exact) {
            new (self) Cache(held.model, capacity, exact ? DType::f32 : DType::f16);
          },
          nb::arg("model"), nb::arg("capacity"), nb::arg("exact"))
      .def_ro("capacity", &Cache::capacity);

  nb::class_<HeldWorkspace>(module, "Workspace")
      .def(nb::init<const Held&, int, int, int>(), nb::arg("model"), nb::arg("max_tokens"), nb::arg("capacity"),
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
      .def("seconds", &seconds_by_part);

  module.def("step", &run_step, nb::arg("model"), nb::arg("bits"), nb::arg("exact"), nb::arg("tokens"),
             nb::arg("positions"), nb::arg("caches"), nb::arg("first_logit"), nb::arg("logits").none(),
             nb::arg("workspace"));

  nb::class_<Stream>(module, "Stream")
      .def(nb::init<size_t>(), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>())
      .def("read", &Stream::read, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", &Stream::bytes);
}

}  // namespace matquant
