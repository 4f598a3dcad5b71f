#include "decoder/experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder/worker.hpp"

namespace matquant {
namespace {

// The rows of one expert: `count` of them from row `first` on, of what the experts read and write.
struct Group {
  const Gated& weights;
  int first, count, width;
  const float* x;    // [count][hidden]
  float* y;          // [count][hidden]
  float *gate, *up;  // [count][width]
};

// Calls visit(group) for every expert that a token uses, in order, then for the shared one.
template <class Visit>
void for_each_group(const Worker& worker, const Experts& experts, Visit visit) {
  const Workspace& space = worker.space;
  const int* const starts = space.groups(worker.thread).starts;
  const auto call = [&](const Gated& weights, int first, int count, std::size_t offset, bool gathered) {
    float* const y = space.routed + static_cast<std::size_t>(first) * worker.model.hidden;
    const float* const x = gathered ? y : worker.normed(0);
    const int width = worker.model.matrices[weights.gate].rows();
    visit(Group{weights, first, count, width, x, y, space.gate + offset, space.up + offset});
  };
  const std::size_t width = worker.model.matrices[experts.each[0].gate].rows();
  for (std::size_t e = 0; e < experts.each.size(); ++e)
    if (starts[e] < starts[e + 1])
      call(experts.each[e], starts[e], starts[e + 1] - starts[e], starts[e] * width, !worker.single);
  const int rows = worker.tokens * experts.active;
  if (experts.shared_gate >= 0) call(experts.shared, rows, worker.tokens, rows * width, false);
}

// Writes a token's experts, those of the largest scores first, and their weights.
void choose(const float* scores, const Experts& experts, int* chosen, float* weights) {
  int found = 0;
  const int count = static_cast<int>(experts.each.size());
  for (int e = 0; e < count; ++e) {
    if (found == experts.active && !(scores[e] > scores[chosen[found - 1]])) continue;
    int at = found < experts.active ? found++ : found - 1;
    for (; at > 0 && scores[e] > scores[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
  const float largest = scores[chosen[0]];
  float total = 0.0f;
  for (int i = 0; i < experts.active; ++i) total += weights[i] = std::exp(scores[chosen[i]] - largest);
  if (!experts.renormalise) {
    total = 0.0f;
    for (int e = 0; e < count; ++e) total += std::exp(scores[e] - largest);
  }
  for (int i = 0; i < experts.active; ++i) weights[i] /= total;
}

// Sorts the rows by expert, for this thread: its groups, with the token and the weight of each row.
void group_rows(const Worker& worker, const Experts& experts) {
  const Workspace& space = worker.space;
  const Groups groups = space.groups(worker.thread);
  const int active = experts.active, rows = worker.tokens * active, count = static_cast<int>(experts.each.size());
  const std::size_t own = worker.own_row(0) * active;
  std::fill(groups.starts, groups.starts + count + 1, 0);
  for (int row = 0; row < rows; ++row) ++groups.starts[space.chosen[own + row] + 1];
  for (int e = 0; e < count; ++e) groups.starts[e + 1] += groups.starts[e];
  for (int row = 0; row < rows; ++row) {
    const int at = groups.starts[space.chosen[own + row]]++;
    groups.tokens[at] = row / active;
    groups.weights[at] = space.chosen_weights[own + row];
  }
  for (int e = count; e > 0; --e) groups.starts[e] = groups.starts[e - 1];  // each had moved to the next
  groups.starts[0] = 0;
  for (int t = 0; t < worker.tokens; ++t) groups.tokens[rows + t] = t;  // of the shared expert
}

// Adds the rows of each expert to those of the width that it is read at.
void count_use(const Worker& worker, const Experts& experts) {
  const int* const starts = worker.space.groups(0).starts;
  for (std::size_t e = 0; e < experts.each.size(); ++e)
    worker.space.used[(experts.first + e) * WIDTH_COUNTS + worker.bits_of(experts.each[e].gate)] +=
        starts[e + 1] - starts[e];
}

void route(Worker& worker, const Experts& experts) {
  const Workspace& space = worker.space;
  const float* const x = worker.normed(0);
  const std::size_t count = experts.each.size();
  worker.multiply({experts.router}, x, worker.input_of(x, worker.tokens, worker.model.hidden), {space.router_scores});
  worker.finish(Part::gate_up);
  const Share mine = worker.own_rows();
  for (std::int64_t t = mine.start; t < mine.stop; ++t) {
    const std::size_t at = worker.own_row(t) * experts.active;
    choose(space.router_scores + t * count, experts, space.chosen + at, space.chosen_weights + at);
  }
  if (!worker.single) worker.finish(Part::gate_up);
  group_rows(worker, experts);
  if (worker.thread == 0) count_use(worker, experts);
}

// Inputs of the groups: of a single token's normed row each thread has one for itself; those of many tokens begin at
// space.input, one after the other.
void prepare_groups(Worker& worker, const Experts& experts) {
  const Workspace& space = worker.space;
  const int hidden = worker.model.hidden;
  if (worker.single) {
    prepare(worker.input_of(worker.normed(0), 1, hidden), worker.normed(0));
    return worker.note(Part::quantise);
  }
  const Groups groups = space.groups(worker.thread);
  const Share mine = share_of(worker.tokens * experts.active, worker.thread, worker.threads);
  for (std::int64_t row = mine.start; row < mine.stop; ++row)
    std::memcpy(space.routed + row * hidden, worker.normed(groups.tokens[row]), hidden * sizeof(float));
  worker.finish(Part::quantise);
  char* memory = space.input;
  for_each_group(worker, experts, [&](const Group& group) {
    prepare(worker.input_at(memory, group.count, hidden), group.x, worker.thread, worker.threads);
  });
  worker.finish(Part::quantise);
}

void project_in(Worker& worker, const Experts& experts) {
  const int hidden = worker.model.hidden;
  char* memory = worker.space.input;
  bool keeps = true;
  for_each_group(worker, experts, [&](const Group& group) {
    const Input input = worker.single ? worker.input_of(worker.normed(0), 1, hidden)
                                      : worker.input_at(memory, group.count, hidden);
    worker.multiply({group.weights.gate, group.weights.up}, group.x, input, {group.gate, group.up});
    if (&group.weights == &experts.shared)
      worker.multiply({experts.shared_gate}, group.x, input, {worker.space.shared_scores});
    keeps = keeps && worker.keeps(group.width, ACTIVATION_GROUP);
  });
  keeps ? worker.note(Part::gate_up) : worker.finish(Part::gate_up);
}

void activate(Worker& worker, const Experts& experts) {
  for_each_group(worker, experts, [&](const Group& group) {
    worker.activate(group.gate, group.up, static_cast<std::int64_t>(group.count) * group.width);
  });
  // Of a single token each thread quantises the groups of inputs that it wrote.
  worker.single ? worker.note(Part::activation) : worker.finish(Part::activation);
}

// Each thread adds up the columns that it has computed.
void project_out(Worker& worker, const Experts& experts) {
  const Workspace& space = worker.space;
  const int hidden = worker.model.hidden;
  const Groups groups = space.groups(worker.thread);
  char* memory = space.input;
  for_each_group(worker, experts, [&](const Group& group) {
    prepare(worker.input_at(memory, group.count, group.width), group.gate, worker.thread, worker.threads);
  });
  worker.finish(Part::quantise);
  const Share mine = share_of(hidden, worker.thread, worker.threads, BLOCK_ROWS);
  const auto columns = static_cast<int>(mine.stop - mine.start);
  for (std::size_t t = 0; t < static_cast<std::size_t>(worker.tokens); ++t) {
    std::fill_n(space.delta + t * hidden + mine.start, columns, 0.0f);
    if (experts.shared_gate >= 0)
      groups.weights[worker.tokens * experts.active + t] = 1.0f / (1.0f + std::exp(-space.shared_scores[t]));
  }
  memory = space.input;
  for_each_group(worker, experts, [&](const Group& group) {
    const Input input = worker.input_at(memory, group.count, group.width);
    worker.multiply({group.weights.down}, group.gate, input, {group.y});
    for (std::size_t row = 0; row < static_cast<std::size_t>(group.count); ++row) {
      float* const sum = space.delta + static_cast<std::size_t>(groups.tokens[group.first + row]) * hidden;
      worker.fn.add_scaled(sum + mine.start, group.y + row * hidden + mine.start, groups.weights[group.first + row],
                           columns);
    }
  });
  worker.arrive(Part::down);
}

}  // namespace

void apply_experts(Worker& worker, const Experts& experts) {
  route(worker, experts);
  prepare_groups(worker, experts);
  project_in(worker, experts);
  activate(worker, experts);
  project_out(worker, experts);
}

}  // namespace matquant
