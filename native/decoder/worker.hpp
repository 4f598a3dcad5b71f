// One thread's part of a step: the threads of a team run the same code and share each piece of work.
//
// What a thread computes for itself it reads without waiting; for what others computed it waits at a barrier, which is
// split into arrive() and await() so that it can prefetch in between. A single token is the common case and has the
// fewest barriers: each thread keeps its own copy of the residual, the normed row and the input made of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "core/layout.hpp"
#include "core/team.hpp"
#include "decoder/model.hpp"
#include "decoder/step.hpp"
#include "decoder/workspace.hpp"

namespace matquant {

// Prefetches what is needed next: weights have streamed through every cache since it was last used, and it is too short
// for the processor's own prefetcher.
inline void fetch(const void* data, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += LINE_BYTES) __builtin_prefetch(static_cast<const char*>(data) + at);
  asm volatile("");  // without it GCC considers a function that only prefetches free of effects, and drops its calls
}
inline void fetch_to_write(void* data, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += LINE_BYTES) __builtin_prefetch(static_cast<char*>(data) + at, 1);
  asm volatile("");
}

class Worker {
 public:
  Worker(const Model& model, const std::uint8_t* bits, Activations activations, const Row* rows, int tokens,
         Workspace& workspace, const FloatKernels& fn, Team& team, int thread);

  const Model& model;
  const Row* rows;
  int tokens;
  const bool single;  // the step has one token
  Workspace& space;
  const FloatKernels& fn;
  const int thread, threads;

  // Leaves out the first `count` tokens from now on; the others are numbered from 0.
  void leave_out(int count) {
    rows += count;
    tokens -= count;
    left_out_ += count;
  }
  Share token_share() const { return share_of(tokens, thread, threads); }
  // This thread's rows: of a single token every thread computes the row itself.
  Share own_rows() const { return single ? Share{0, 1} : token_share(); }
  // Where the workspace has row t: of a single token each thread has a row for itself.
  std::size_t own_row(std::int64_t t) const { return (single ? thread : left_out_) + t; }
  float* residual(std::int64_t t) const { return space.residual + own_row(t) * model.hidden; }
  float* normed(std::int64_t t) const { return space.normed + own_row(t) * model.hidden; }
  float* query(std::int64_t t) const { return space.query + (left_out_ + t) * model.heads * model.head_dim; }

  // True if a thread that wrote its share of `count` values of a single token, cut as linear() cuts rows, has written
  // its whole share in multiples of `unit`: then it need not wait for the others.
  bool keeps(int count, int unit) const {
    return single && count % threads == 0 && count / threads % BLOCK_ROWS == 0 && count / threads % unit == 0;
  }

  // arrive: this thread has done its share of `part`. await: so have all. finish: both.
  void arrive(Part part) {
    note(part);
    team_.arrive(thread);
  }
  void await() {
    team_.await(thread);
    note(threads > 1 ? Part::wait : Part::norm);  // a single thread has only prefetched
  }
  void finish(Part part) {
    arrive(part);
    await();
  }
  // Books the time since the last call on `part`.
  void note(Part part);

  // residual += norm(delta), then normed = norm(residual). delta_norm null: delta as it is.
  void add_and_norm(const float* delta_norm, const float* norm);
  // The same without a delta.
  void norm(const float* norm);

  // out [hidden] = the embedding of a token.
  void look_up(int token, float* out) const;

  int bits_of(int matrix) const { return bits_[matrix]; }
  bool is_nested(int matrix) const { return model.matrices[matrix].nested != nullptr; }
  // The Input made of x [rows][cols], for int8 or exact products; quantise() fills it, once for all `matrices`.
  Input input_of(const float* x, int rows, int cols) const;
  Input quantise(std::initializer_list<int> matrices, const float* x, int rows);
  // An Input at `memory`, which moves on behind it.
  Input input_at(char*& memory, int rows, int cols) const;
  // This thread's rows of y = matrix x for each matrix; input: what quantise() made of x.
  void multiply(std::initializer_list<int> matrices, const float* x, const Input& input,
                std::initializer_list<float*> results);
  void project(std::initializer_list<int> matrices, const float* x, int rows, std::initializer_list<float*> results) {
    multiply(matrices, x, quantise(matrices, x, rows), results);
  }

  // gate = act(gate) * up, for this thread's share of `count` values.
  void activate(float* gate, const float* up, std::int64_t count) const;

  // For a single token, between arrive() and await(): prefetches what the coming norm needs, the input made of it, and
  // this thread's part of the input after that, which is made of x [cols].
  void fetch_for_norm(const float* norm, const float* x, int cols) const;

 private:
  const std::uint8_t* const bits_;
  const Activations activations_;
  Team& team_;
  std::int64_t left_out_ = 0;
  double since_ = 0;
};

}  // namespace matquant
