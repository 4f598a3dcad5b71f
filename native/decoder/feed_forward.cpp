#include "decoder/feed_forward.hpp"

#include "decoder/worker.hpp"

namespace matquant {

void feed_forward(Worker& worker, const FeedForward& weights) {
  if (!weights.experts.each.empty()) return apply_experts(worker, weights.experts);
  Workspace& space = worker.space;
  const Gated& gated = weights.gated;
  const int width = worker.model.matrices[gated.gate].rows();
  worker.project({gated.gate, gated.up}, worker.normed(0), worker.tokens, {space.gate, space.up});
  worker.keeps(width, ACTIVATION_GROUP) ? worker.note(Part::gate_up) : worker.finish(Part::gate_up);
  worker.activate(space.gate, space.up, static_cast<std::int64_t>(worker.tokens) * width);
  // Of a single token each thread quantises the groups that it wrote.
  const bool waits = !worker.single || !worker.is_nested(gated.down);
  waits ? worker.finish(Part::activation) : worker.note(Part::activation);
  worker.project({gated.down}, space.gate, worker.tokens, {space.delta});
  worker.arrive(Part::down);
}

}  // namespace matquant
