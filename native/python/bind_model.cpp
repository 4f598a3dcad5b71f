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
using Vector = std::optional<Floats1>;  // a bias, or the weights of a norm

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
}

Dense dense_of(const Raw2& array, const std::string& dtype) {
  const DType kind = dtype_of(dtype);
  require(array.itemsize() == size_of(kind), "the array's items do not have the size of its dtype");
  constexpr auto most = static_cast<std::size_t>(MOST_VALUES);
  require(array.shape(0) <= most && array.shape(1) <= most, "a matrix is too large");
  return {array.data(), kind, static_cast<int>(array.shape(0)), static_cast<int>(array.shape(1))};
}

void add_bias(HeldMatrix& held, const Vector& bias) {
  if (!bias) return;
  require(bias->shape(0) == static_cast<std::size_t>(held.matrix.rows()), "a bias has the wrong length");
  held.matrix.bias = bias->data();
  held.owners.push_back(nb::cast(*bias));
}

// resident: copied into huge pages, which stream faster than a mapped file; for matrices that every token reads whole.
HeldMatrix dense_matrix(const Raw2& array, const std::string& dtype, const Vector& bias,
                        bool resident) {
  HeldMatrix held;
  held.matrix.dense = dense_of(array, dtype);
  if (resident) {
    const std::size_t bytes = array.nbytes();
    held.memory = std::make_shared<Memory>(bytes, Pages::huge);
    const char* from = static_cast<const char*>(array.data());
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

HeldMatrix nested_matrix(nb::object owner, std::uintptr_t linear, const Vector& bias) {
  HeldMatrix held;
  held.matrix.nested = reinterpret_cast<const Linear*>(linear);
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

std::uint16_t widths_of(const Matrix& matrix) {
  std::uint16_t widths = 0;
  for (int bits = 0; bits < 16; ++bits) widths |= (matrix.nested == nullptr || serves(*matrix.nested, bits)) << bits;
  return widths;
}

// Adds a matrix to the model and returns its id.
int add_matrix(HeldModel& held, const HeldMatrix& matrix) {
  own(held, matrix);
  held.served.push_back(widths_of(matrix.matrix));
  held.narrows.push_back(false);
  return held.model.add(matrix.matrix);
}

const float* keep(HeldModel& held, const Vector& array, int length) {
  if (!array) return nullptr;
  require(array->shape(0) == static_cast<std::size_t>(length), "a vector has the wrong length");
  held.owners.push_back(nb::cast(*array));
  return array->data();
}

// The order in which Python gives the matrices and norms of a layer (architecture.py): query, key, value and output of
// the attention, then gate, up and down; with experts the router, gate, up and down of each expert and of the shared
// one, and its gate.
constexpr int ATTENTION_MATRICES = 4;
enum { ATTENTION_NORM, ATTENTION_OUT_NORM, FFN_NORM, FFN_OUT_NORM, QUERY_NORM, KEY_NORM, NORMS };

// Adds the matrices of a layer, each with the next id.
class Adder {
 public:
  Adder(HeldModel& held, const std::vector<HeldMatrix*>& matrices) : held_(held), matrices_(matrices) {}
  int add(int rows, int cols) {
    check_shape(next(), rows, cols);
    return add_matrix(held_, *matrices_[at_++]);
  }
  // width: of the block; 0: that of its first matrix.
  Gated add_gated(int width = 0) {
    const int hidden = held_.model.hidden, inside = width > 0 ? width : next().rows();
    Gated gated;
    gated.gate = add(inside, hidden);
    gated.up = add(inside, hidden);
    gated.down = add(hidden, inside);
    return gated;
  }
  const Matrix& next() const { return matrices_[at_]->matrix; }

 private:
  HeldModel& held_;
  const std::vector<HeldMatrix*>& matrices_;
  std::size_t at_ = 0;
};

// The numbers of experts and of those that a token uses; 0 experts: a layer without.
struct Routing {
  int experts, active;
  bool renormalise, shared;
};

void check_layer(const std::vector<HeldMatrix*>& matrices, const std::vector<Vector>& norms, const Routing& routing) {
  require(routing.experts >= 0 && routing.experts <= MOST_EXPERTS, "the number of experts is out of range");
  require(routing.experts == 0 || (routing.active >= 1 && routing.active <= routing.experts),
          "the experts of a token are out of range");
  const int gated = routing.experts == 0 ? 1 : routing.experts + routing.shared, gates = routing.shared + 1;
  const int wanted = ATTENTION_MATRICES + 3 * gated + (routing.experts == 0 ? 0 : gates);
  require(matrices.size() == static_cast<std::size_t>(wanted), "a layer has the wrong number of matrices");
  require(norms.size() == NORMS, "a layer needs six norms");
  require(norms[ATTENTION_NORM] && norms[FFN_NORM], "a layer needs the norms before attention and feed-forward");
}

Experts add_experts(HeldModel& held, Adder& adder, const Routing& routing) {
  Experts experts;
  experts.active = routing.active;
  for (const Layer& before : held.model.layers)
    experts.first += static_cast<int>(before.feed_forward.experts.each.size());
  experts.renormalise = routing.renormalise;
  require(adder.next().nested == nullptr, "a router is nested");
  experts.router = adder.add(routing.experts, held.model.hidden);
  const int width = adder.next().rows();
  for (int i = 0; i < routing.experts; ++i) experts.each.push_back(adder.add_gated(width));
  if (!routing.shared) return experts;
  experts.shared = adder.add_gated();
  experts.shared_gate = adder.add(1, held.model.hidden);
  return experts;
}

// Its matrices get the next ids, in their order.
void add_layer(HeldModel& held, const std::vector<HeldMatrix*>& matrices, const std::vector<Vector>& norms, int window,
               int rope, const Vector& sinks, int experts, int active, bool renormalise, bool shared) {
  Model& m = held.model;
  const Routing routing{experts, active, renormalise, shared};
  check_layer(matrices, norms, routing);
  require(window >= 0 && rope >= -1 && rope < static_cast<int>(m.ropes.size()), "window or rope out of range");
  Layer layer{};
  Attention& attention = layer.attention;
  attention.norm = keep(held, norms[ATTENTION_NORM], m.hidden);
  attention.out_norm = keep(held, norms[ATTENTION_OUT_NORM], m.hidden);
  attention.query_norm = keep(held, norms[QUERY_NORM], m.head_dim);
  attention.key_norm = keep(held, norms[KEY_NORM], m.head_dim);
  attention.sinks = keep(held, sinks, m.heads);
  attention.window = window;
  attention.rope = rope;
  FeedForward& ffn = layer.feed_forward;
  ffn.norm = keep(held, norms[FFN_NORM], m.hidden);
  ffn.out_norm = keep(held, norms[FFN_OUT_NORM], m.hidden);
  Adder adder(held, matrices);
  const int queries = m.heads * m.head_dim, keys = m.kv_heads * m.head_dim;
  attention.query = adder.add(queries, m.hidden);
  attention.key = adder.add(keys, m.hidden);
  attention.value = adder.add(keys, m.hidden);
  attention.output = adder.add(m.hidden, queries);
  if (experts == 0)
    ffn.gated = adder.add_gated();
  else
    ffn.experts = add_experts(held, adder, routing);
  m.layers.push_back(layer);
}

// The head, which gets the next id, the embedding, which gets the id after it or is the head if it is null, and the
// norm before the head.
void set_ends(HeldModel& held, const HeldMatrix& head, const HeldMatrix* embedding, const Floats1& norm) {
  Model& m = held.model;
  require(m.head < 0, "the model has its embedding and head already");
  check_shape(head.matrix, m.vocab, m.hidden);
  if (embedding != nullptr) check_shape(embedding->matrix, m.vocab, m.hidden);
  m.norm = keep(held, norm, m.hidden);
  m.head = add_matrix(held, head);
  m.embedding = embedding == nullptr ? m.head : add_matrix(held, *embedding);
}

// From now on steps read these matrices at the widest width in memory, if that is below the requested one.
void narrow(HeldModel& held, const std::vector<std::size_t>& ids) {
  for (const std::size_t id : ids) {
    require(id < held.narrows.size(), "no such matrix");
    held.narrows[id] = true;
  }
}

// Calls `change`, which may add and drop planes of the model's weights, while no step runs.
void change_weights(HeldModel& held, const nb::callable& change) {
  struct Closed {
    explicit Closed(HeldModel& of) : held(of) {
      const nb::gil_scoped_release unlocked;  // the steps that are waited for may need it
      held.gate.close();
    }
    ~Closed() {
      for (std::size_t id = 0; id < held.served.size(); ++id) held.served[id] = widths_of(held.model.matrices[id]);
      held.gate.open();
    }
    HeldModel& held;
  };
  const Closed closed(held);
  change();
}

void make_model(HeldModel* self, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                std::int64_t vocab, float norm_eps, float attention_scale, float embedding_scale, float attention_cap,
                float logit_cap, bool gelu, float gate_alpha, float gate_limit) {
  new (self) HeldModel(Model(hidden, heads, kv_heads, head_dim, vocab));
  Model& m = self->model;
  m.norm_eps = norm_eps, m.attention_scale = attention_scale, m.embedding_scale = embedding_scale;
  m.attention_cap = attention_cap, m.logit_cap = logit_cap, m.gelu = gelu;
  m.gate_alpha = gate_alpha, m.gate_limit = gate_limit;
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
      .def("__init__", &make_model, nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"),
           nb::arg("head_dim"), nb::arg("vocab"), nb::arg("norm_eps"), nb::arg("attention_scale"),
           nb::arg("embedding_scale"), nb::arg("attention_cap"), nb::arg("logit_cap"), nb::arg("gelu"),
           nb::arg("gate_alpha") = 0.0f, nb::arg("gate_limit") = 0.0f)
      .def("add_rope", &add_rope, nb::arg("frequencies"), nb::arg("scale"))
      .def("add_layer", &add_layer, nb::arg("matrices"), nb::arg("norms"), nb::arg("window"), nb::arg("rope"),
           nb::arg("sinks").none() = nb::none(), nb::arg("experts") = 0, nb::arg("active") = 0,
           nb::arg("renormalise") = false, nb::arg("shared") = false)
      .def("narrow", &narrow, nb::arg("ids"))
      .def("change_weights", &change_weights, nb::arg("change"))
      .def("set_ends", &set_ends, nb::arg("head"), nb::arg("embedding").none(), nb::arg("norm"));
}

}  // namespace matquant
