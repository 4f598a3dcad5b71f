// One step of the model for a batch of tokens.
//
// Each token is a Row: its id, its position and the Cache of its sequence. A prompt is many rows with one cache; when
// several sequences are decoded together, each has one row. The result of a row does not depend on the other rows or on
// the number of threads.
#pragma once

#include <cstdint>

#include "decoder/cache.hpp"
#include "decoder/model.hpp"
#include "decoder/workspace.hpp"

namespace matquant {

struct Row {
  int token;     // 0 .. vocab - 1
  int position;  // 0 .. cache->capacity - 1; all smaller ones are in the cache already or in earlier rows
  const Cache* cache;
};

// Fills the caches at the positions of the rows [tokens] and writes the logits [tokens - first_logit, vocab] of the
// rows from first_logit on; of the others the last layer computes keys and values only. bits: the width of each matrix,
// by id; ignored for dense ones.
void step(const Model& model, const std::uint8_t* bits, Activations activations, const Row* rows, int tokens,
          int first_logit, float* logits, Workspace& workspace);

}  // namespace matquant
