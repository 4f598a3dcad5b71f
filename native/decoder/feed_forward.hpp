// The feed-forward part of a layer: one gated block for all tokens, or experts. Matrices are ids: indices into
// Model::matrices.
#pragma once

#include "decoder/experts.hpp"

namespace matquant {

struct FeedForward {
  Gated gated;            // of a layer without experts
  Experts experts;
  const float* norm;      // [hidden], before the projections
  const float* out_norm;  // [hidden], on the output before it is added to the residual; null: none
};

// From the worker's normed rows to its delta, which is complete after the next await().
void feed_forward(Worker& worker, const FeedForward& weights);

}  // namespace matquant
