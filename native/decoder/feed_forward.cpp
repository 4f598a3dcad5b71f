#include "decoder/feed_forward.hpp"

#include "decoder/worker.hpp"

namespace matquant {
namespace {

// gate = act(gate) * up
void activate(Worker& worker, const FeedForward& weights) {
  const Workspace& space = worker.space;
  const auto gate_times = worker.model.gelu ? worker.fn.gelu_times : worker.fn.silu_times;
  const std::int64_t count = static_cast<std::int64_t>(worker.tokens) * worker.model.intermediate;  // as one long row
  const Share mine = share_of(count, worker.thread, worker.threads, ACTIVATION_GROUP);
  if (mine.start < mine.stop)
    gate_times(space.gate + mine.start, space.up + mine.start, static_cast<int>(mine.stop - mine.start));
  // Of a single token each thread quantises the groups that it wrote.
  const bool waits = worker.tokens > 1 || !worker.is_nested(weights.down);
  waits ? worker.finish(Part::activation) : worker.note(Part::activation);
}

}  // namespace

void feed_forward(Worker& worker, const FeedForward& weights) {
  Workspace& space = worker.space;
  worker.project({weights.gate, weights.up}, worker.normed(0), worker.tokens, {space.gate, space.up});
  const bool keeps = worker.keeps(worker.model.intermediate, ACTIVATION_GROUP);
  keeps ? worker.note(Part::gate_up) : worker.finish(Part::gate_up);
  activate(worker, weights);
  worker.project({weights.down}, space.gate, worker.tokens, {space.delta});
  worker.arrive(Part::down);
}

}  // namespace matquant
