// A feed-forward part of which each token uses a few experts only. Matrices are ids: indices into Model::matrices.
//
//     p = softmax(router(x)), over all experts
//     y = sum over the token's experts of w_e * expert_e(x)  +  sigmoid(shared_gate(x)) * shared(x)
//
// The token's experts are the `active` ones with the largest p (of equal ones the first), w_e is p_e, divided by the
// sum of those of the token's experts if `renormalise`. The sum runs in the order of the experts.
//
// The rows of a step are grouped by expert: a step reads each expert that one of its tokens uses once, and no other.
#pragma once

#include <vector>

namespace matquant {

class Worker;

// down(act(gate(x)) * up(x))
struct Gated {
  int gate, up, down;  // matrices
};

struct Experts {
  int router = -1;          // matrix [experts, hidden], dense
  int active = 0;           // experts of a token
  int first = 0;            // number of its first expert, counted over all layers
  bool renormalise = false;
  std::vector<Gated> each;  // all of one size; empty: a layer without experts
  Gated shared{};           // used by every token
  int shared_gate = -1;     // matrix [1, hidden]; -1: there is no shared expert
};

// From the worker's normed rows to its delta, which is complete after the next await().
void apply_experts(Worker& worker, const Experts& experts);

}  // namespace matquant
