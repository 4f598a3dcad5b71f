#include "model.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <stdexcept>
#include <string_view>
#include <type_traits>

#include "team.hpp"

namespace matquant {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kFetched = 2;  // tiles of keys and values that are called for before the last
constexpr int kGroup = 128;  // inputs that are quantised together, a thread's unit of prepare()
size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// A product of sizes from outside must not wrap round to a small one: more than any machine has is no memory.
size_t times(size_t a, size_t b) {
  size_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > (size_t)1 << 62) throw std::bad_alloc();
  return product;
}

double now_s() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

int in_range(std::int64_t value, std::int64_t most, const char* message) {
  if (value < 1 || value > most) throw std::invalid_argument(message);
  return (int)value;
}

// This thread's share of 0 .. count - 1, cut at multiples of `unit`.
struct Share {
  int start, stop;
};
Share share(int count, int thread, int threads, int unit = 1) {
  const long long units = (count + unit - 1) / unit;
  return {(int)std::min<long long>(count, units * thread / threads * unit),
          (int)std::min<long long>(count, units * (thread + 1) / threads * unit)};
}

// Attention's items in order: [key/value heads][tokens][members], the members being the query heads that share a
// key/value head, or these and that head. So a thread keeps the keys of few heads in its cache, and reads them once for
// several queries.
struct HeadItem {
  int tokens, members, shared, token, member;
  HeadItem(int item, int tokens_, int members_)
      : tokens(tokens_),
        members(members_),
        shared(item / members / tokens),
        token(item / members % tokens),
        member(item % members) {}
  void next() {
    if (++member < members) return;
    member = 0;
    if (++token < tokens) return;
    token = 0;
    ++shared;
  }
};

// One thread's view of a step.
struct Worker {
  const Model& model;
  const std::uint8_t* bits;
  const Activations activations;
  const Row* rows;
  const int tokens;
  Workspace& space;
  const Floats& fn;
  Team& team;
  const int thread;
  const int threads = team.threads();
  double since = 0;

  // A single token's residual, normed row and input made of it are every thread's own: no thread waits for one that
  // makes them for all.
  const int own = tokens == 1 ? thread : 0;
  Share rows_from(int first) const { return tokens == 1 ? Share{first, 1} : share_of(first); }
  Share share_of(int first) const {
    const Share mine = share(tokens - first, thread, threads);
    return {first + mine.start, first + mine.stop};
  }
  float* residual(int t) const { return space.residual + (size_t)(own + t) * model.hidden; }
  float* normed(int t) const { return space.normed + (size_t)(own + t) * model.hidden; }

  // Of a single token, does every thread read only what it wrote, if it wrote its share of `count` values, cut where
  // linear() cuts, and reads its share of whole units of them?
  bool keeps(int count, int unit) const {
    return tokens == 1 && count % threads == 0 && count / threads % kLanes == 0 && count / threads % unit == 0;
  }

  // This thread has done its share of `part`; then, so have all.
  void arrive(Part part) {
    note(part);
    team.arrive(thread);
  }
  void await() {
    team.await(thread);
    note(threads > 1 ? kWait : kNorm);  // one thread has only fetched
  }
  void finish(Part part) {
    arrive(part);
    await();
  }

  // The time since the last call belongs to `part`.
  void note(Part part) {
    if (!space.profile || thread) return;
    const double now = now_s();
    space.seconds[part] += now - since;
    since = now;
  }

  void embed() {
    const Model& m = model;
    const int half = m.head_dim / 2;
    Share mine = rows_from(0);
    for (int t = mine.start; t < mine.stop; ++t) {
      const char* row = (const char*)m.embedding.data + (size_t)rows[t].token * m.hidden * size_of(m.embedding.dtype);
      fn.widen(row, m.embedding.dtype, m.embedding_scale, m.hidden, residual(t));
    }
    mine = share_of(0);
    for (int t = mine.start; t < mine.stop; ++t)
      for (size_t r = 0; r < m.ropes.size(); ++r)
        for (int i = 0; i < half; ++i) {
          const float angle = (float)rows[t].position * m.ropes[r].frequencies[i];
          const size_t at = (r * space.max_tokens + t) * half + i;
          space.cosines[at] = std::cos(angle) * m.ropes[r].scale;
          space.sines[at] = std::sin(angle) * m.ropes[r].scale;
        }
    finish(kNorm);
  }

  // residual += norm(delta), then normed = norm(residual), for rows from `first` on.
  void add_and_norm(bool has_delta, const float* delta_norm, const float* norm, int first = 0) {
    const int n = model.hidden;
    const Share mine = rows_from(first);
    for (int t = mine.start; t < mine.stop; ++t) {
      const float* delta = space.delta + (size_t)t * n;
      if (has_delta && delta_norm) fn.rms_norm(delta, delta_norm, model.norm_eps, n, normed(t));
      if (has_delta) fn.add(residual(t), delta_norm ? normed(t) : delta, n);
      fn.rms_norm(residual(t), norm, model.norm_eps, n, normed(t));
    }
    tokens == 1 ? note(kNorm) : finish(kNorm);
  }

  bool any_nested(const Matrix* first, int count) const {
    return std::any_of(first, first + count, [](const Matrix& m) { return m.nested; });
  }

  // The input that is made of x [rows][cols]. Of a single token's normed row every thread makes its own, and what
  // threads write for the last product of a layer lies apart from what others may still read.
  Input input_of(const float* x, int rows_in, int cols) const {
    const bool single = tokens == 1;
    char* const memory = single && x == normed(0)    ? space.single_input(thread)
                         : single && x == space.gate ? space.single_input(threads)
                                                     : space.input;
    return make_input(memory, rows_in, cols, activations);
  }

  // One input of `count` matrices, quantised once.
  Input quantise(const Matrix* matrices, int count, const float* x, int rows_in) {
    const Input input = input_of(x, rows_in, matrices[0].cols());
    if (!any_nested(matrices, count)) return input;
    const bool own_input = tokens == 1 && x == normed(0);
    own_input ? prepare(input, x) : prepare(input, x, thread, threads);
    own_input ? note(kPrepare) : finish(kPrepare);
    return input;
  }

  // This thread's rows of y_i = matrix_i x for `count` matrices with the input that was made of x.
  void multiply(const Matrix* matrices, const std::uint8_t* widths, int count, const float* x, const Input& input,
                float* const* y) {
    for (int i = 0; i < count; ++i) {
      const Matrix& matrix = matrices[i];
      const int n = matrix.rows();
      const Share mine = share(n, thread, threads, kLanes);
      if (matrix.nested)
        linear(*matrix.nested, widths[i], input, y[i], n, thread, threads);
      else
        fn.dense(matrix.dense, x, input.cols, input.tokens, mine.start, mine.stop, y[i], n);
      for (int t = 0; matrix.bias && t < input.tokens; ++t)
        fn.add(y[i] + (size_t)t * n + mine.start, matrix.bias + mine.start, mine.stop - mine.start);
    }
  }

  void project(const Matrix* matrices, const std::uint8_t* widths, int count, const float* x, int rows_in,
               float* const* y) {
    multiply(matrices, widths, count, x, quantise(matrices, count, x, rows_in), y);
  }

  // x [head_dim] normed, turned to its position and scaled, in place.
  void turn(float* x, const float* norm, const Layer& layer, int t, float scale) {
    const int half = model.head_dim / 2;
    if (norm) fn.rms_norm(x, norm, model.norm_eps, model.head_dim, x);
    const size_t at = ((size_t)layer.rope * space.max_tokens + t) * half;
    if (layer.rope >= 0) fn.rotate(x, space.cosines + at, space.sines + at, half, scale);
    if (layer.rope < 0 && scale != 1) fn.rotate(x, nullptr, nullptr, half, scale);
  }

  // Calls for what is needed next: since it was last, weights have streamed through every cache, and it is too short
  // for the processor to guess.
  static void fetch(const void* data, size_t bytes) {
    for (size_t line = 0; line < bytes; line += kLine) __builtin_prefetch((const char*)data + line);
    asm volatile("");  // GCC takes a function that only fetches for one without effect, and drops its calls
  }
  static void fetch_to_write(void* data, size_t bytes) {
    for (size_t line = 0; line < bytes; line += kLine) __builtin_prefetch((char*)data + line, 1);
    asm volatile("");
  }

  // While others still make the delta of the only token: what the coming norm needs, the input made of it, and this
  // thread's part of the input after that, made of x [cols].
  void fetch_for_norm(const float* norm, const float* x, int cols) {
    if (tokens > 1) return;
    const size_t row = model.hidden * sizeof(float);
    fetch(norm, row);
    fetch(residual(0), row);
    fetch_to_write(normed(0), row);
    fetch_to_write(space.single_input(thread), input_bytes(1, model.hidden, Activations::int8));
    const Share mine = share(cols, thread, threads, kGroup);
    if (const Input input = input_of(x, 1, cols); input.codes)
      fetch_to_write(input.codes + mine.start, mine.stop - mine.start);
  }

  // Keys and values that the only token sees, of this thread's heads: the first ones and the last tile.
  void fetch_tiles(int index) {
    if (tokens > 1) return;
    const Cache& cache = *rows[0].cache;
    const int window = model.layers[index].window, position = rows[0].position;
    const size_t tile = kLanes * model.head_dim * size_of(cache.dtype), last = position / kLanes;
    const size_t start = window && position >= window ? (position + 1 - window) / kLanes : 0;
    const size_t some = std::min<size_t>(last - start, kFetched);
    const Share heads = share(model.kv_heads, thread, threads);
    for (int shared = heads.start; shared < heads.stop; ++shared)
      for (const void* const at : {cache.keys(index, shared), cache.values(index, shared)}) {
        fetch((const char*)at + start * tile, some * tile);
        fetch((const char*)at + last * tile, tile);
      }
  }

  void attend(int index) {
    const Model& m = model;
    const Layer& layer = m.layers[index];
    const int dim = m.head_dim, heads = m.heads, kv = m.kv_heads, group = heads / kv;
    Share mine = share(kv * tokens * (group + 1), thread, threads);
    HeadItem at(mine.start, tokens, group + 1);
    for (int item = mine.start; item < mine.stop; ++item, at.next()) {
      const Row& row = rows[at.token];
      if (at.member < group) {
        float* query = space.query + ((size_t)at.token * heads + at.shared * group + at.member) * dim;
        turn(query, layer.norms.query, layer, at.token, m.attention_scale);
        continue;
      }
      const size_t own = ((size_t)at.token * kv + at.shared) * dim;
      turn(space.key + own, layer.norms.key, layer, at.token, 1);
      fn.store_key(space.key + own, dim, row.position, row.cache->dtype, row.cache->keys(index, at.shared));
      fn.store_value(space.value + own, dim, row.position, row.cache->dtype, row.cache->values(index, at.shared));
    }
    // Unless every thread has whole key/value heads, here and below, and reads only what it wrote itself.
    if (kv % threads) finish(kAttention);
    mine = share(kv * tokens * group, thread, threads);
    at = HeadItem(mine.start, tokens, group);
    for (int item = mine.start; item < mine.stop;) {
      const int shared = at.shared;
      const Cache* cache = rows[at.token].cache;
      Attention a;
      a.keys = cache->keys(index, shared);
      a.values = cache->values(index, shared);
      a.dtype = cache->dtype;
      a.dim = dim;
      a.cap = m.attention_cap;
      a.scores_stride = space.capacity + kLanes;
      a.scores = space.scores + (size_t)thread * kQueries * a.scores_stride;
      for (a.queries = 0; a.queries < kQueries; ++a.queries, ++item, at.next()) {
        if (item == mine.stop || at.shared != shared || rows[at.token].cache != cache) break;
        const size_t own = ((size_t)at.token * heads + shared * group + at.member) * dim;
        a.query[a.queries] = space.query + own;
        a.out[a.queries] = space.attended + own;
        a.stop[a.queries] = rows[at.token].position + 1;
        a.start[a.queries] = layer.window ? std::max(0, rows[at.token].position + 1 - layer.window) : 0;
      }
      fn.attend(a);
    }
    // Does this thread quantise what it wrote?
    const bool own_groups = keeps(heads * dim, dim) && keeps(heads * dim, kGroup);
    own_groups && layer.matrix[kOutput].nested ? note(kAttention) : finish(kAttention);
  }

  void activate(const Matrix& next) {
    const int n = model.intermediate;
    const auto gate_times = model.gelu ? fn.gelu_times : fn.silu_times;
    // All tokens are one long row.
    const long long count = (long long)tokens * n;
    const long long unit = kGroup, units = (count + unit - 1) / unit;
    const long long start = units * thread / threads * unit;
    const long long stop = std::min(count, units * (thread + 1) / threads * unit);
    if (start < stop) gate_times(space.gate + start, space.up + start, (int)(stop - start));
    // Of a single token every thread quantises the groups that it made.
    tokens == 1 && next.nested ? note(kActivation) : finish(kActivation);
  }

  void run(int first_logit, float* logits) {
    const Model& m = model;
    if (space.profile) since = now_s();
    embed();
    for (size_t index = 0; index < m.layers.size(); ++index) {
      const Layer& layer = m.layers[index];
      const float* const next_norm = index + 1 < m.layers.size() ? m.layers[index + 1].norms.input : m.norm;
      const std::uint8_t* widths = bits + index * kProjections;
      add_and_norm(index > 0, index ? m.layers[index - 1].norms.ffn_out : nullptr, layer.norms.input);
      float* const qkv[] = {space.query, space.key, space.value};
      const Input input = quantise(layer.matrix, 3, normed(0), tokens);
      multiply(layer.matrix, widths, 2, normed(0), input, qkv);
      fetch_tiles((int)index);
      multiply(layer.matrix + kValue, widths + kValue, 1, normed(0), input, qkv + kValue);
      keeps(m.kv_heads * m.head_dim, m.head_dim) ? note(kQkv) : finish(kQkv);
      attend((int)index);
      project(layer.matrix + kOutput, widths + kOutput, 1, space.attended, tokens, &space.delta);
      arrive(kAttentionOut);
      fetch_for_norm(layer.norms.ffn, space.gate, m.intermediate);
      await();
      add_and_norm(true, layer.norms.attention_out, layer.norms.ffn);
      float* const gate_up[] = {space.gate, space.up};
      project(layer.matrix + kGate, widths + kGate, 2, normed(0), tokens, gate_up);
      keeps(m.intermediate, kGroup) ? note(kGateUp) : finish(kGateUp);
      activate(layer.matrix[kDown]);
      project(layer.matrix + kDown, widths + kDown, 1, space.gate, tokens, &space.delta);
      arrive(kDownPart);
      fetch_for_norm(next_norm, space.attended, m.heads * m.head_dim);
      await();
    }
    if (first_logit == tokens) return;
    add_and_norm(true, m.layers.back().norms.ffn_out, m.norm, first_logit);
    project(&m.head, bits + m.layers.size() * kProjections, 1, normed(first_logit), tokens - first_logit, &logits);
    finish(kHead);
    if (m.logit_cap == 0) return;
    const Share mine = share(m.vocab, thread, threads, kLanes);
    for (int t = 0; t < tokens - first_logit; ++t)
      fn.soft_cap(logits + (size_t)t * m.vocab + mine.start, m.logit_cap, mine.stop - mine.start);
  }
};

}  // namespace

extern const Floats floats_scalar, floats_avx2, floats_avx512, floats_neon;

const Floats& floats() {
  const std::string_view name = isa();
#if defined(__x86_64__)
  if (name == "avx2") return floats_avx2;
  if (name == "avx512") return floats_avx512;
#elif defined(__aarch64__)
  if (name == "neon") return floats_neon;
#endif
  (void)name;
  return floats_scalar;
}

Reserved::Reserved(size_t bytes) : bytes_(bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = (char*)p;
}

Reserved::~Reserved() { munmap(data_, bytes_); }

Model::Model(std::int64_t hidden_, std::int64_t intermediate_, std::int64_t heads_, std::int64_t kv_heads_,
             std::int64_t head_dim_, std::int64_t vocab_)
    : hidden(in_range(hidden_, kMostValues, "hidden is out of range")),
      intermediate(in_range(intermediate_, kMostValues, "intermediate is out of range")),
      heads(in_range(heads_, kMostHeads, "heads are out of range")),
      kv_heads(in_range(kv_heads_, kMostHeads, "kv_heads are out of range")),
      head_dim(in_range(head_dim_, kMostHeadDim, "head_dim is out of range")),
      vocab(in_range(vocab_, kMostValues, "vocab is out of range")) {
  if (heads % kv_heads || head_dim % 2) throw std::invalid_argument("the sizes do not make a model");
  in_range(heads_ * head_dim_, kMostValues, "heads x head_dim is out of range");
}

Cache::Cache(const Model& model, int capacity_, DType dtype_)
    : capacity(round_to_lanes(in_range(capacity_, kMostCapacity, "the capacity of a cache is out of range"))),
      dtype(dtype_),
      kv_heads_(model.kv_heads),
      key_bytes_(whole_lines(times(times(capacity, model.head_dim), size_of(dtype)))),
      value_bytes_(whole_lines(times(times(capacity, round_to_lanes(model.head_dim)), size_of(dtype)))),
      memory_(times(times(model.layers.size(), kv_heads_), key_bytes_ + value_bytes_)) {}

void* Cache::keys(int layer, int kv_head) const {
  return memory_.data() + ((size_t)layer * kv_heads_ + kv_head) * (key_bytes_ + value_bytes_);
}

void* Cache::values(int layer, int kv_head) const { return (char*)keys(layer, kv_head) + key_bytes_; }

Workspace::Workspace(const Model& model, int max_tokens_, int capacity_, int threads_)
    : max_tokens(in_range(max_tokens_, kMostTokens, "the tokens of a workspace are out of range")),
      capacity(round_to_lanes(in_range(capacity_, kMostCapacity, "the capacity of a workspace is out of range"))),
      threads(in_range(threads_, kMostThreads, "the threads of a workspace are out of range")),
      memory_(lay_out(model, nullptr)) {
  lay_out(model, memory_.data());
}

// Places every array behind `base` and returns the bytes they take.
size_t Workspace::lay_out(const Model& m, char* base) {
  size_t offset = 0;
  const auto place = [&](auto*& array, size_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    if (base) array = (Element*)(base + offset);
    offset += whole_lines(times(count, sizeof(Element)));
    if (offset > (size_t)1 << 62) throw std::bad_alloc();
  };
  const size_t tokens = max_tokens, queries = (size_t)m.heads * m.head_dim, keys = (size_t)m.kv_heads * m.head_dim;
  const size_t copies = std::max(max_tokens, threads);  // a row for every thread if there is one token
  place(residual, copies * m.hidden);
  place(normed, copies * m.hidden);
  place(delta, tokens * m.hidden);
  place(query, tokens * queries);
  place(key, tokens * keys);
  place(value, tokens * keys);
  place(attended, tokens * queries);
  place(gate, tokens * m.intermediate);
  place(up, tokens * m.intermediate);
  place(cosines, m.ropes.size() * tokens * (m.head_dim / 2));
  place(sines, m.ropes.size() * tokens * (m.head_dim / 2));
  place(scores, (size_t)threads * kQueries * (capacity + kLanes));
  const auto input_of = [](int count, int cols) {
    return std::max(input_bytes(count, cols, Activations::int8), input_bytes(count, cols, Activations::exact));
  };
  place(input, input_of(max_tokens, std::max({m.hidden, m.intermediate, m.heads * m.head_dim})));
  single_input_bytes = input_of(1, std::max(m.hidden, m.intermediate));
  place(single_inputs, (threads + 1) * single_input_bytes);
  return offset;
}

void step(const Model& model, const std::uint8_t* bits, Activations activations, const Row* rows, int tokens,
          int first_logit, float* logits, Workspace& workspace) {
  on_threads(workspace.threads, [&, &fn = floats()](Team& team, int thread) {
    Worker{model, bits, activations, rows, tokens, workspace, fn, team, thread}.run(first_logit, logits);
  });
}

}  // namespace matquant
