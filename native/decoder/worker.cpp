#include "decoder/worker.hpp"

#include <algorithm>
#include <chrono>

#include "core/rows.hpp"

namespace matquant {
namespace {

double now_s() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Worker::Worker(const Model& model_, const std::uint8_t* bits, Activations activations, const Row* rows_, int tokens_,
               Workspace& workspace, const FloatKernels& fn_, Team& team, int thread_)
    : model(model_),
      rows(rows_),
      tokens(tokens_),
      single(tokens_ == 1),
      space(workspace),
      fn(fn_),
      thread(thread_),
      threads(team.threads()),
      bits_(bits),
      activations_(activations),
      team_(team) {
  if (space.profile) since_ = now_s();
}

void Worker::note(Part part) {
  if (!space.profile || thread) return;
  const double now = now_s();
  space.seconds[static_cast<int>(part)] += now - since_;
  since_ = now;
}

void Worker::add_and_norm(const float* delta_norm, const float* norm) {
  const int n = model.hidden;
  const Share mine = own_rows();
  for (std::int64_t t = mine.start; t < mine.stop; ++t) {
    const float* delta = space.delta + t * n;
    if (delta_norm) fn.rms_norm(delta, delta_norm, model.norm_eps, n, normed(t));
    fn.add(residual(t), delta_norm ? normed(t) : delta, n);
    fn.rms_norm(residual(t), norm, model.norm_eps, n, normed(t));
  }
  single ? note(Part::norm) : finish(Part::norm);
}

void Worker::norm(const float* norm) {
  const Share mine = own_rows();
  for (std::int64_t t = mine.start; t < mine.stop; ++t)
    fn.rms_norm(residual(t), norm, model.norm_eps, model.hidden, normed(t));
  single ? note(Part::norm) : finish(Part::norm);
}

void Worker::look_up(int token, float* out) const {
  const Matrix& embedding = model.matrices[model.embedding];
  if (embedding.nested) {
    read_row(*embedding.nested, bits_[model.embedding], token, model.embedding_scale, out);
    return;
  }
  const std::size_t row_bytes = model.hidden * size_of(embedding.dense.dtype);
  const char* row = static_cast<const char*>(embedding.dense.data) + token * row_bytes;
  fn.widen(row, embedding.dense.dtype, model.embedding_scale, model.hidden, out);
}

// Of a single token's normed row every thread makes an input for itself. What threads write for the last product of a
// layer lies apart from what others may still be reading.
Input Worker::input_of(const float* x, int rows_in, int cols) const {
  char* const memory = single && x == normed(0)    ? space.single_input(thread)
                       : single && x == space.gate ? space.single_input(threads)
                                                   : space.input;
  return make_input(memory, rows_in, cols, activations_, model.activation_group);
}

Input Worker::input_at(char*& memory, int rows_in, int cols) const {
  const Input input = make_input(memory, rows_in, cols, activations_, model.activation_group);
  memory += input_bytes(rows_in, cols, activations_);
  return input;
}

Input Worker::quantise(std::initializer_list<int> matrices, const float* x, int rows_in) {
  const Input input = input_of(x, rows_in, model.matrices[*matrices.begin()].cols());
  if (std::none_of(matrices.begin(), matrices.end(), [&](int id) { return is_nested(id); })) return input;
  if (single && x == normed(0)) {
    prepare(input, x);
    note(Part::quantise);
  } else {
    prepare(input, x, thread, threads);
    finish(Part::quantise);
  }
  return input;
}

void Worker::multiply(std::initializer_list<int> matrices, const float* x, const Input& input,
                      std::initializer_list<float*> results) {
  float* const* result = results.begin();
  for (const int id : matrices) {
    const Matrix& matrix = model.matrices[id];
    float* const y = *result++;
    const int n = matrix.rows();
    const Share mine = share_of(n, thread, threads, BLOCK_ROWS);
    if (matrix.nested)
      linear(*matrix.nested, bits_[id], input, y, n, thread, threads);
    else
      fn.dense(matrix.dense, x, input.cols, input.tokens, mine.start, mine.stop, y, n);
    for (int t = 0; matrix.bias && t < input.tokens; ++t)
      fn.add(y + static_cast<std::size_t>(t) * n + mine.start, matrix.bias + mine.start, mine.stop - mine.start);
  }
}

void Worker::activate(float* gate, const float* up, std::int64_t count) const {
  const Share mine = share_of(count, thread, threads, ACTIVATION_GROUP);
  const auto values = static_cast<int>(mine.stop - mine.start);
  if (values == 0) return;
  gate += mine.start, up += mine.start;
  if (model.gate_limit > 0) return fn.clamped_times(gate, up, model.gate_alpha, model.gate_limit, values);
  (model.gelu ? fn.gelu_times : fn.silu_times)(gate, up, values);
}

void Worker::fetch_for_norm(const float* norm, const float* x, int cols) const {
  if (!single) return;
  const std::size_t row = model.hidden * sizeof(float);
  fetch(norm, row);
  fetch(residual(0), row);
  fetch_to_write(normed(0), row);
  fetch_to_write(space.single_input(thread), input_bytes(1, model.hidden, Activations::int8));
  const Share mine = share_of(cols, thread, threads, ACTIVATION_GROUP);
  if (const Input input = input_of(x, 1, cols); input.codes)
    fetch_to_write(input.codes + mine.start, mine.stop - mine.start);
}

}  // namespace matquant
