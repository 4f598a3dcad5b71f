#include "decoder/step.hpp"

#include <cmath>

#include "decoder/worker.hpp"

namespace matquant {
namespace {

// Residuals from the embedding, and the angles of the positions.
void embed(Worker& worker) {
  const Model& m = worker.model;
  const Workspace& space = worker.space;
  const int half = m.head_dim / 2;
  Share mine = worker.own_rows();
  for (std::int64_t t = mine.start; t < mine.stop; ++t) worker.look_up(worker.rows[t].token, worker.residual(t));
  mine = worker.token_share();
  for (std::int64_t t = mine.start; t < mine.stop; ++t)
    for (std::size_t r = 0; r < m.ropes.size(); ++r)
      for (int i = 0; i < half; ++i) {
        const float angle = static_cast<float>(worker.rows[t].position) * m.ropes[r].frequencies[i];
        const std::size_t at = (r * space.max_tokens + t) * half + i;
        space.cosines[at] = std::cos(angle) * m.ropes[r].scale;
        space.sines[at] = std::sin(angle) * m.ropes[r].scale;
      }
  worker.finish(Part::norm);
}

// Leaves the delta of the last layer to be added. Of the tokens without logits the last layer has keys and values only.
void run_layers(Worker& worker, int first_logit) {
  const Model& m = worker.model;
  const Workspace& space = worker.space;
  for (std::size_t index = 0; index < m.layers.size(); ++index) {
    const Attention& attention = m.layers[index].attention;
    const FeedForward& ffn = m.layers[index].feed_forward;
    if (index == 0)
      worker.norm(attention.norm);
    else
      worker.add_and_norm(m.layers[index - 1].feed_forward.out_norm, attention.norm);
    store_keys_and_values(worker, static_cast<int>(index));
    const bool is_last = index + 1 == m.layers.size();
    if (is_last) worker.leave_out(first_logit);
    if (worker.tokens == 0) return;
    attend(worker, static_cast<int>(index));
    const int width = ffn.experts.each.empty() ? m.matrices[ffn.gated.gate].rows() : 0;  // which experts: not known yet
    worker.fetch_for_norm(ffn.norm, space.gate, width);
    worker.await();
    worker.add_and_norm(attention.out_norm, ffn.norm);
    feed_forward(worker, ffn);
    worker.fetch_for_norm(is_last ? m.norm : m.layers[index + 1].attention.norm, space.attended, m.heads * m.head_dim);
    worker.await();
  }
}

void write_logits(Worker& worker, float* logits) {
  const Model& m = worker.model;
  if (worker.tokens == 0) return;
  worker.add_and_norm(m.layers.back().feed_forward.out_norm, m.norm);
  worker.project({m.head}, worker.normed(0), worker.tokens, {logits});
  worker.finish(Part::head);
  if (m.logit_cap == 0) return;
  const Share mine = share_of(m.vocab, worker.thread, worker.threads, BLOCK_ROWS);
  for (int t = 0; t < worker.tokens; ++t)
    worker.fn.soft_cap(logits + static_cast<std::size_t>(t) * m.vocab + mine.start, m.logit_cap,
                       static_cast<int>(mine.stop - mine.start));
}

}  // namespace

void step(const Model& model, const std::uint8_t* bits, Activations activations, const Row* rows, int tokens,
          int first_logit, float* logits, Workspace& workspace) {
  on_threads(workspace.threads, [&, &fn = float_kernels()](Team& team, int thread) {
    Worker worker(model, bits, activations, rows, tokens, workspace, fn, team, thread);
    embed(worker);
    run_layers(worker, first_logit);
    write_logits(worker, logits);
  });
}

}  // namespace matquant
