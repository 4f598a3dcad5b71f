// Matrices and models for Python: every argument is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/team.hpp"
#include "python/held.hpp"

namespace matquant {
namespace {

using Raw2 = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, or 16 bits as uint16
using Norm = std::optional<Floats1>;

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
}

Dense dense_of(const Raw2& array, const std::string& dtype) {
  const DType kind = dtype_of(dtype);
  require(array.itemsize() == size_of(kind), "the array's items do not have the size of its dtype");
  require(array.shape(0) <= (size_t)MOST_VALUES && array.shape(1) <= (size_t)MOST_VALUES, "a matrix is too large");
  return {array.data(), kind, (int)array.shape(0), (int)array.shape(1)};
}

void add_bias(HeldMatrix& held, const std::optional<Floats1>& bias) {
  if (!bias) return;
  require(bias->shape(0) == static_cast<std::size_t>(held.matrix.rows()), "a bias has the wrong length");
  held.matrix.bias = bias->data();
  held.owners.push_back(nb::cast(*bias));
}

// resident: copied into huge pages, which stream faster than a mapped file; for matrices that every token reads whole.
HeldMatrix dense_matrix(const Raw2& array, const std::string& dtype, const std::optional<Floats1>& bias,
                        bool resident) {
  HeldMatrix held;
  held.matrix.dense = dense_of(array, dtype);
  if (resident) {
    const size_t bytes = array.nbytes();
    held.memory = std::make_shared<Memory>(bytes, Pages::huge);
    const char* from = (const char*)array.data();
    const nb::gil_scoped_release unlocked;
    on_threads(default_threads(), [&](Team& team, int thread) {
      const Share mine = share_of(bytes, thread, team.threads());
      std::memcpy(held.memory->data() + mine.start, from + mine.start, mine.stop - mine.start);
    });
    held.matrix.dense.data = held.memory->data();
  } else {
    held.owners.push_back(nb::cast(array));
  }
  add_bias(held, bias);
  return held;
}

HeldMatrix nested_matrix(nb::object owner, std::uintptr_t linear, const std::optional<Floats1>& bias) {
  HeldMatrix held;
  held.matrix.nested = (const Linear*)linear;
  held.owners.push_back(owner);
  add_bias(held, bias);
  return held;
}

void own(HeldModel& held, const HeldMatrix& matrix) {
  held.owners.insert(held.owners.end(), matrix.owners.begin(), matrix.owners.end());
  held.memories.push_back(matrix.memory);
}

void check_shape(const Matrix& matrix, int rows, int cols) {
  require(matrix.rows() == rows && matrix.cols() == cols, "a matrix has the wrong shape");
}

// Adds a matrix to the model and returns its id.
int add_matrix(HeldModel& held, const HeldMatrix& matrix) {
  std::uint16_t widths = 0;
  const Linear* const nested = matrix.matrix.nested;
  for (int bits = 0; bits < 16; ++bits) widths |= (nested == nullptr || serves(*nested, bits)) << bits;
  own(held, matrix);
  held.served.push_back(widths);
  return held.model.add(matrix.matrix);
}

const float* keep(HeldModel& held, const Norm& array, int length) {
  if (!array) return nullptr;
  require(array->shape(0) == static_cast<std::size_t>(length), "a vector has the wrong length");
  held.owners.push_back(nb::cast(*array));
  return array->data();
}

// The seven matrices and six norms of a layer, in this order; the matrices get the next seven ids.
struct LayerArguments {
  enum { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, MATRICES };
  enum { INPUT, ATTENTION_OUT, FFN, FFN_OUT, QUERY_NORM, KEY_NORM, NORMS };
};

void check_layer(const Model& m, const std::vector<HeldMatrix*>& matrices, const std::vector<Norm>& norms) {
  using A = LayerArguments;
  require(matrices.size() == A::MATRICES && norms.size() == A::NORMS, "a layer has seven matrices and six norms");
  require(norms[A::INPUT] && norms[A::FFN], "a layer needs the norms before attention and feed-forward");
  const int queries = m.heads * m.head_dim, keys = m.kv_heads * m.head_dim;
  const int rows[A::MATRICES] = {queries, keys, keys, m.hidden, m.intermediate, m.intermediate, m.hidden};
  const int cols[A::MATRICES] = {m.hidden, m.hidden, m.hidden, queries, m.hidden, m.hidden, m.intermediate};
  for (int i = 0; i < A::MATRICES; ++i) check_shape(matrices[i]->matrix, rows[i], cols[i]);
}

void add_layer(HeldModel& held, const std::vector<HeldMatrix*>& matrices, const std::vector<Norm>& norms, int window,
               int rope) {
  using A = LayerArguments;
  Model& m = held.model;
  check_layer(m, matrices, norms);
  require(window >= 0 && rope >= -1 && rope < static_cast<int>(m.ropes.size()), "window or rope out of range");
  Layer layer{};
  Attention& attention = layer.attention;
  attention.norm = keep(held, norms[A::INPUT], m.hidden);
  attention.out_norm = keep(held, norms[A::ATTENTION_OUT], m.hidden);
  attention.query_norm = keep(held, norms[A::QUERY_NORM], m.head_dim);
  attention.key_norm = keep(held, norms[A::KEY_NORM], m.head_dim);
  attention.window = window;
  attention.rope = rope;
  FeedForward& ffn = layer.feed_forward;
  ffn.norm = keep(held, norms[A::FFN], m.hidden);
  ffn.out_norm = keep(held, norms[A::FFN_OUT], m.hidden);
  attention.query = add_matrix(held, *matrices[A::QUERY]);
  attention.key = add_matrix(held, *matrices[A::KEY]);
  attention.value = add_matrix(held, *matrices[A::VALUE]);
  attention.output = add_matrix(held, *matrices[A::OUTPUT]);
  ffn.gate = add_matrix(held, *matrices[A::GATE]);
  ffn.up = add_matrix(held, *matrices[A::UP]);
  ffn.down = add_matrix(held, *matrices[A::DOWN]);
  m.layers.push_back(layer);
}

// The embedding, the head, which gets the next id, and the norm before the head.
void set_ends(HeldModel& held, const HeldMatrix& embedding, const HeldMatrix& head, const Floats1& norm) {
  Model& m = held.model;
  require(m.head < 0, "the model has its embedding and head already");
  require(!embedding.matrix.nested, "the embedding must not be quantised");
  check_shape(embedding.matrix, m.vocab, m.hidden);
  check_shape(head.matrix, m.vocab, m.hidden);
  own(held, embedding);
  m.embedding = embedding.matrix.dense;
  m.norm = keep(held, norm, m.hidden);
  m.head = add_matrix(held, head);
}

void make_model(HeldModel* self, std::int64_t hidden, std::int64_t intermediate, std::int64_t heads, std::int64_t kv_heads,
   std::int64_t head_dim, std::int64_t vocab, float norm_eps, float attention_scale, float embedding_scale,
   float attention_cap, float logit_cap, bool gelu) {
  new (self) HeldModel(Model(hidden, intermediate, heads, kv_heads, head_dim, vocab));
  Model& m = self->model;
  m.norm_eps = norm_eps, m.attention_scale = attention_scale, m.embedding_scale = embedding_scale;
  m.attention_cap = attention_cap, m.logit_cap = logit_cap, m.gelu = gelu;
}

void add_rope(HeldModel& held, const Floats1& frequencies, float scale) {
  held.model.ropes.push_back({keep(held, frequencies, held.model.head_dim / 2), scale});
}

}  // namespace

void bind_model(nb::module_& module) {
  nb::class_<HeldMatrix>(module, "Matrix");
  module.def("dense_matrix", &dense_matrix, nb::arg("data"), nb::arg("dtype"), nb::arg("bias").none(),
             nb::arg("resident"));
  module.def("nested_matrix", &nested_matrix, nb::arg("owner"), nb::arg("linear"), nb::arg("bias").none());

  nb::class_<HeldModel>(module, "Model")
      .def("__init__", &make_model, nb::kw_only(), nb::arg("hidden"), nb::arg("intermediate"), nb::arg("heads"), nb::arg("kv_heads"),
          nb::arg("head_dim"), nb::arg("vocab"), nb::arg("norm_eps"), nb::arg("attention_scale"),
          nb::arg("embedding_scale"), nb::arg("attention_cap"), nb::arg("logit_cap"), nb::arg("gelu"))
      .def("add_rope", &add_rope, nb::arg("frequencies"), nb::arg("scale"))
      .def("add_layer", &add_layer, nb::arg("matrices"), nb::arg("norms"), nb::arg("window"), nb::arg("rope"))
      .def("set_ends", &set_ends, nb::arg("embedding"), nb::arg("head"), nb::arg("norm"));
}

}  // namespace matquant
