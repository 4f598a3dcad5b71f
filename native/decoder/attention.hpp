// The attention of a layer. Matrices are ids: indices into Model::matrices.
#pragma once

namespace matquant {

class Worker;

// Weights of RMS norms are null where the family has none, the input norm aside.
struct Attention {
  int query, key, value, output;  // matrices
  const float* norm;              // [hidden], before the projections
  const float* out_norm;          // [hidden], on the output before it is added to the residual
  const float* query_norm;        // [head_dim], per head
  const float* key_norm;          // [head_dim], per head
  const float* sinks;             // [heads], a score of each head that no position has; null: none
  int window;                     // positions that a token sees, itself included; 0: all up to itself
  int rope;                       // index into Model::ropes; -1: none
};

// From the worker's normed rows to queries, and to keys and values in the caches. index: of the layer.
void store_keys_and_values(Worker& worker, int index);
// From there to the worker's delta, which is complete after the next await().
void attend(Worker& worker, int index);

}  // namespace matquant
