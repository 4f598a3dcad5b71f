// The feed-forward part of a layer: down(act(gate(x)) * up(x)). Matrices are ids: indices into Model::matrices.
#pragma once

namespace matquant {

class Worker;

struct FeedForward {
  int gate, up, down;     // matrices
  const float* norm;      // [hidden], before the projections
  const float* out_norm;  // [hidden], on the output before it is added to the residual; null: none
};

// From the worker's normed rows to its delta, which is complete after the next await().
void feed_forward(Worker& worker, const FeedForward& weights);

}  // namespace matquant
