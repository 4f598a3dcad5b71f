#include "decoder/attention.hpp"

#include <algorithm>
#include <cmath>

#include "decoder/worker.hpp"

namespace matquant {
namespace {

constexpr std::size_t FETCHED_TILES = 2;  // of keys and of values, besides the last tile

// The order in which heads are shared out: [key/value heads][tokens][members]. The members are the query heads that
// share a key/value head, or these and the key/value head itself. So a thread keeps the keys of few heads in its cache
// and reads them once for several queries.
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

// Prefetches the keys and values of this thread's heads that a single token sees: the first tiles and the last.
void fetch_tiles(const Worker& worker, const Attention& weights, int index) {
  if (!worker.single) return;
  const Cache& cache = *worker.rows[0].cache;
  const int window = weights.window, position = worker.rows[0].position;
  const std::size_t tile = LANES * worker.model.head_dim * size_of(cache.dtype), last = position / LANES;
  const std::size_t start = window && position >= window ? (position + 1 - window) / LANES : 0;
  const std::size_t some = std::min<std::size_t>(last - start, FETCHED_TILES);
  const Share heads = share_of(worker.model.kv_heads, worker.thread, worker.threads);
  for (std::int64_t shared = heads.start; shared < heads.stop; ++shared)
    for (const void* const at : {cache.keys(index, shared), cache.values(index, shared)}) {
      fetch(static_cast<const char*>(at) + start * tile, some * tile);
      fetch(static_cast<const char*>(at) + last * tile, tile);
    }
}

void project_in(Worker& worker, const Attention& weights, int index) {
  const Model& m = worker.model;
  Workspace& space = worker.space;
  const float* const x = worker.normed(0);
  const Input input = worker.quantise({weights.query, weights.key, weights.value}, x, worker.tokens);
  worker.multiply({weights.query, weights.key}, x, input, {space.query, space.key});
  fetch_tiles(worker, weights, index);
  worker.multiply({weights.value}, x, input, {space.value});
  worker.keeps(m.kv_heads * m.head_dim, m.head_dim) ? worker.note(Part::qkv) : worker.finish(Part::qkv);
}

// Normalises x [head_dim], rotates it to its position and scales it, in place.
void turn(const Worker& worker, float* x, const float* norm, int rope, int t, float scale) {
  const Model& m = worker.model;
  const int half = m.head_dim / 2;
  if (norm) worker.fn.rms_norm(x, norm, m.norm_eps, m.head_dim, x);
  if (rope >= 0) {
    const std::size_t at = (static_cast<std::size_t>(rope) * worker.space.max_tokens + t) * half;
    worker.fn.rotate(x, worker.space.cosines + at, worker.space.sines + at, half, scale);
  } else if (scale != 1) {
    worker.fn.rotate(x, nullptr, nullptr, half, scale);
  }
}

// Turns queries and keys, and stores keys and values in the caches.
void turn_and_store(const Worker& worker, const Attention& weights, int index) {
  const Model& m = worker.model;
  const Workspace& space = worker.space;
  const int dim = m.head_dim, kv = m.kv_heads, group = m.heads / kv;
  const Share mine = share_of(kv * worker.tokens * (group + 1), worker.thread, worker.threads);
  HeadItem at(mine.start, worker.tokens, group + 1);
  for (std::int64_t item = mine.start; item < mine.stop; ++item, at.next()) {
    const Row& row = worker.rows[at.token];
    if (at.member < group) {
      float* const query = worker.query(at.token) + (at.shared * group + at.member) * dim;
      turn(worker, query, weights.query_norm, weights.rope, at.token, m.attention_scale);
      continue;
    }
    const std::size_t own = (static_cast<std::size_t>(at.token) * kv + at.shared) * dim;
    const Cache& cache = *row.cache;
    turn(worker, space.key + own, weights.key_norm, weights.rope, at.token, 1);
    worker.fn.store_key(space.key + own, dim, row.position, cache.dtype, cache.keys(index, at.shared));
    worker.fn.store_value(space.value + own, dim, row.position, cache.dtype, cache.values(index, at.shared));
  }
}

// Softmax of the scores times the values, for up to MOST_QUERIES queries of one key/value head and cache at a time.
void mix_values(const Worker& worker, const Attention& weights, int index) {
  const Model& m = worker.model;
  const Workspace& space = worker.space;
  const int dim = m.head_dim, group = m.heads / m.kv_heads;
  const Share mine = share_of(m.kv_heads * worker.tokens * group, worker.thread, worker.threads);
  HeadItem at(mine.start, worker.tokens, group);
  for (std::int64_t item = mine.start; item < mine.stop;) {
    const int shared = at.shared;
    const Cache* const cache = worker.rows[at.token].cache;
    HeadQueries a;
    a.keys = cache->keys(index, shared);
    a.values = cache->values(index, shared);
    a.dtype = cache->dtype;
    a.dim = dim;
    a.cap = m.attention_cap;
    a.scores_stride = static_cast<std::size_t>(space.capacity) + LANES;
    a.scores = space.scores + static_cast<std::size_t>(worker.thread) * MOST_QUERIES * a.scores_stride;
    for (a.queries = 0; a.queries < MOST_QUERIES; ++a.queries, ++item, at.next()) {
      const Row& row = worker.rows[at.token];
      if (item == mine.stop || at.shared != shared || row.cache != cache) break;
      const int head = shared * group + at.member;
      a.query[a.queries] = worker.query(at.token) + head * dim;
      a.out[a.queries] = space.attended + (static_cast<std::size_t>(at.token) * m.heads + head) * dim;
      a.stop[a.queries] = row.position + 1;
      a.sink[a.queries] = weights.sinks ? weights.sinks[head] : -INFINITY;
      a.start[a.queries] = weights.window ? std::max(0, row.position + 1 - weights.window) : 0;
    }
    worker.fn.attend(a);
  }
}

}  // namespace

void store_keys_and_values(Worker& worker, int index) {
  const Attention& weights = worker.model.layers[index].attention;
  project_in(worker, weights, index);
  turn_and_store(worker, weights, index);
}

void attend(Worker& worker, int index) {
  const Model& m = worker.model;
  const Attention& weights = m.layers[index].attention;
  const int width = m.heads * m.head_dim;
  // A thread that has whole key/value heads reads only what it wrote.
  if (m.kv_heads % worker.threads) worker.finish(Part::attention);
  mix_values(worker, weights, index);
  // A thread that quantises exactly the values it wrote need not wait either.
  const bool keeps = worker.keeps(width, m.head_dim) && worker.keeps(width, ACTIVATION_GROUP);
  keeps && worker.is_nested(weights.output) ? worker.note(Part::attention) : worker.finish(Part::attention);
  worker.project({weights.output}, worker.space.attended, worker.tokens, {worker.space.delta});
  worker.arrive(Part::output);
}

}  // namespace matquant
