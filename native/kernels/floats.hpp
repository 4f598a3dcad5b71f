// The float parts of a decode step: norms, activations, attention of one head, and products with dense weights.
//
// floats.cpp is compiled once per instruction set. Every function computes each output in a fixed order, so results do
// not depend on the instruction set, the number of threads or the batch.
//
// N out features, K in features, T tokens, D head dimension, C capacity of a cache.
#pragma once

#include "core/layout.hpp"

namespace matquant {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
static inline size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A dense weight matrix as it is stored: data [N][K].
struct Dense {
  const void* data;
  DType dtype;
  int rows, cols;
};

constexpr int MOST_QUERIES = 8;  // in one HeadQueries

// Queries that share the cached keys and values of a head and sequence; query i sees positions start[i] .. stop[i] - 1.
struct HeadQueries {
  int queries;                       // 1 .. MOST_QUERIES
  const float* query[MOST_QUERIES];  // [D], already scaled
  int start[MOST_QUERIES], stop[MOST_QUERIES];
  float sink[MOST_QUERIES];  // a further score, of no value; -infinity: none
  float* out[MOST_QUERIES];  // [D]
  float* scores;             // scratch [MOST_QUERIES][scores_stride]
  size_t scores_stride;      // at least the largest stop, rounded up to whole tiles
  const void* keys;          // [C / 16][D][16]: tiles of 16 positions, so that 16 scores are one vector
  const void* values;        // [C][round_to_lanes(D)]
  DType dtype;               // of keys and values: f32 or f16
  int dim;                   // D
  float cap;                 // scores become cap * tanh(score / cap); 0: no cap
};

struct FloatKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight; out may be x
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*add)(float* x, const float* y, int n);
  void (*add_scaled)(float* x, const float* y, float factor, int n);  // x += factor * y
  void (*silu_times)(float* gate, const float* up, int n);  // gate = silu(gate) * up
  void (*gelu_times)(float* gate, const float* up, int n);  // the tanh form of GELU
  // gate = g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit) and u = up within +-limit
  void (*clamped_times)(float* gate, const float* up, float alpha, float limit, int n);
  void (*soft_cap)(float* x, float cap, int n);             // x = cap * tanh(x / cap)
  void (*widen)(const void* row, DType dtype, float scale, int n, float* out);  // out = scale * row
  // Rotates pairs (x[i], x[i + half]) by the angles of the cosines and sines, then scales; cosines null: only scales.
  void (*rotate)(float* x, const float* cosines, const float* sines, int half, float scale);
  void (*attend)(const HeadQueries&);
  // y[t][row] = x[t] . weight[row] for rows row_start .. row_stop - 1
  void (*dense)(const Dense&, const float* x, int x_stride, int tokens, int row_start, int row_stop, float* y,
                int y_stride);
  // key[d] -> keys[position / 16][d][position % 16], value[d] -> values[position][d]; f16 saturates
  void (*store_key)(const float* key, int dim, int position, DType dtype, void* keys);
  void (*store_value)(const float* value, int dim, int position, DType dtype, void* values);
  uint64_t (*read)(const void* data, size_t bytes);  // reads every byte: the cost of streaming alone
};

// The table of the instruction set in use.
const FloatKernels& float_kernels();

}  // namespace matquant
