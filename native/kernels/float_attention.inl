// Rotary positions, attention of one head, and writes to a cache. Included by floats.cpp.

void rotate(float* x, const float* cosines, const float* sines, int half, float scale) {
  for (int i = 0; i < half; i += LANES) {
    const int count = half - i < LANES ? half - i : LANES;
    V a = load_some(x + i, count), b = load_some(x + half + i, count);
    if (cosines) {
      const V cosine = load_some(cosines + i, count), sine = load_some(sines + i, count), first = a;
      a = a * cosine - b * sine;
      b = b * cosine + first * sine;
    }
    store_some(x + i, a * scale, count);
    store_some(x + half + i, b * scale, count);
  }
}

// Columns d .. d + 16 * Vectors - 1 of the weighted sums of values, for queries from `query` on. Positions that a query
// does not see have weight 0. Even and odd positions are summed separately.
template <int Queries, int Vectors, class T>
inline void mix(const HeadQueries& a, int query, const T* values, int start, int stop, int d, const float* inverse) {
  const int stride = round_to_lanes(a.dim);
  const float* weights = a.scores + query * a.scores_stride;
  V even[Queries][Vectors] = {}, odd[Queries][Vectors] = {};
  for (int position = start; position < stop; position += 2)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const T* at = values + (size_t)position * stride + d + v * LANES;
      const V first = load(at), second = load(at + stride);
#pragma GCC unroll 8
      for (int q = 0; q < Queries; ++q) {
        const float* const weight = weights + q * a.scores_stride + position - start;
        even[q][v] = multiply_add(weight[0], first, even[q][v]);
        odd[q][v] = multiply_add(weight[1], second, odd[q][v]);
      }
    }
#pragma GCC unroll 8
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int left = a.dim - d - v * LANES;
      store_some(a.out[query + q] + d + v * LANES, (even[q][v] + odd[q][v]) * inverse[q],
                 left < LANES ? left : LANES);
    }
}

// Positions that at least one query sees, in whole tiles.
struct Span {
  int start, stop;
};

// Scores the positions of the span for the queries from `query` on; `never`, -infinity, where a query does not see one.
// largest [Queries]: the largest score of each lane.
template <int Queries, class T>
inline void score(const HeadQueries& a, int query, Span span, V never, V* largest) {
  const T* keys = (const T*)a.keys;
  static const std::int32_t COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  I lane;
  std::memcpy(&lane, COUNT, sizeof lane);
#pragma GCC unroll 8
  for (int q = 0; q < Queries; ++q) largest[q] = never;
  for (int position = span.start; position < span.stop; position += LANES) {
    const T* tile = keys + (size_t)position * a.dim;
    V even[Queries] = {}, odd[Queries] = {};
    for (int d = 0; d < a.dim; d += 2) {
      const V first = load(tile + d * LANES), second = load(tile + (d + 1) * LANES);
#pragma GCC unroll 8
      for (int q = 0; q < Queries; ++q) {
        even[q] = multiply_add(a.query[query + q][d], first, even[q]);
        odd[q] = multiply_add(a.query[query + q][d + 1], second, odd[q]);
      }
    }
    const I at = lane + position;
#pragma GCC unroll 8
    for (int q = 0; q < Queries; ++q) {
      V score = even[q] + odd[q];
      if (a.cap != 0) score = a.cap * hyperbolic_tangent(score / a.cap);
      score = select((at >= a.start[query + q]) & (at < a.stop[query + q]), score, never);
      largest[q] = select(score > largest[q], score, largest[q]);
      store(a.scores + (query + q) * a.scores_stride + position - span.start, score);
    }
  }
}

// Replaces `count` scores by weights e^(score - largest) and returns 1 / the sum of the weights and the sink's.
inline float weigh(float* scores, int count, V never, V largest, float sink) {
  const float top = fold(select(largest > sink, largest, splat(sink)), [](float a, float b) { return b > a ? b : a; });
  V total{};
  for (int i = 0; i < count; i += LANES) {
    const V score = load(scores + i);
    const V weight = select(score == never, V{}, exponential(score - top));
    store(scores + i, weight);
    total += weight;
  }
  if (sink == -std::numeric_limits<float>::infinity()) return 1.0f / sum(total);
  float sinks[LANES];
  store(sinks, exponential(splat(sink - top)));
  return 1.0f / (sum(total) + sinks[0]);
}

constexpr bool MANY_REGISTERS = NATIVE_BYTES == 64;
constexpr int TOGETHER = MANY_REGISTERS ? MOST_QUERIES : 2;  // queries for which a key or value is read once, at most

template <int Queries, class T>
void attend_some(const HeadQueries& a, int query) {
  int start = a.start[query], stop = a.stop[query];
  for (int q = 1; q < Queries; ++q) {
    start = a.start[query + q] < start ? a.start[query + q] : start;
    stop = a.stop[query + q] > stop ? a.stop[query + q] : stop;
  }
  const int last = (stop + 1) / 2 * 2;  // all weights after it are 0
  const Span span = {start / LANES * LANES, round_to_lanes(stop)};
  const V never = splat(-std::numeric_limits<float>::infinity());
  V largest[Queries];
  score<Queries, T>(a, query, span, never, largest);
  float inverse[Queries];
#pragma GCC unroll 8
  for (int q = 0; q < Queries; ++q)
    inverse[q] = weigh(a.scores + (query + q) * a.scores_stride, span.stop - span.start, never, largest[q],
                       a.sink[query + q]);
  const T* values = (const T*)a.values;
  // Vectors at a time, so that the sums stay in registers.
  constexpr int MOST = MANY_REGISTERS ? 4 : 2, COLUMNS = TOGETHER / Queries < MOST ? TOGETHER / Queries : MOST;
  const int columns = round_to_lanes(a.dim);
  int d = 0;
  for (; d + COLUMNS * LANES <= columns; d += COLUMNS * LANES)
    mix<Queries, COLUMNS>(a, query, values, span.start, last, d, inverse);
  for (; d < columns; d += LANES) mix<Queries, 1>(a, query, values, span.start, last, d, inverse);
}

// The queries from `query` on: as many together as can be, then half as many.
template <int Queries, class T>
void attend_by(const HeadQueries& a, int query) {
  for (; query + Queries <= a.queries; query += Queries) attend_some<Queries, T>(a, query);
  if constexpr (Queries > 1) attend_by<Queries / 2, T>(a, query);
}

void attend(const HeadQueries& a) {
  a.dtype == DType::f32 ? attend_by<TOGETHER, float>(a, 0) : attend_by<TOGETHER, Half>(a, 0);
}

void store_key(const float* key, int dim, int position, DType dtype, void* keys) {
  const size_t at = (size_t)(position / LANES) * LANES * dim + position % LANES;
  for (int d = 0; d < dim; d += LANES) {
    const int count = dim - d < LANES ? dim - d : LANES;
    if (dtype == DType::f32) {
      for (int i = 0; i < count; ++i) ((float*)keys)[at + (d + i) * LANES] = key[d + i];
      continue;
    }
    Half half[LANES];
    store(half, load_some(key + d, count));
    for (int i = 0; i < count; ++i) ((Half*)keys)[at + (d + i) * LANES] = half[i];
  }
}

void store_value(const float* value, int dim, int position, DType dtype, void* values) {
  const size_t at = (size_t)position * round_to_lanes(dim);
  for (int d = 0; d < dim; d += LANES) {
    const V v = load_some(value + d, dim - d < LANES ? dim - d : LANES);
    if (dtype == DType::f32)
      store((float*)values + at + d, v);
    else
      store((Half*)values + at + d, v);
  }
}
