// The functions of floats.hpp for one instruction set: compiled once per set, each time with another MATQUANT_FLOATS, the
// name of the table. The compiler lowers 16-lane vectors to whatever its flags allow.
#include "floats.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace matquant {
namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint64_t W __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

// ---------------------------------------------------------------------------------------------------- loads, stores

inline V splat(float value) { return V{} + value; }
inline V select(I mask, V yes, V no) { return (V)(((I)yes & mask) | ((I)no & ~mask)); }

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline V load(const Brain* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return (V)(__builtin_convertvector(h, U) << 16);
}

inline V load(const Half* p) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
  V v;
  std::memcpy(&v, &low, 32);
  std::memcpy((char*)&v + 32, &high, 32);
  return v;
#else
  H h;
  std::memcpy(&h, p, sizeof h);
  const U wide = __builtin_convertvector(h, U);
  const V magnitude = (V)((wide & 0x7fffu) << 13) * 0x1p112f;  // moves the exponent; exact, subnormals included
  return (V)((U)magnitude | ((wide & 0x8000u) << 16));
#endif
}

template <class T>
inline V load_some(const T* p, int count) {  // the first `count` lanes, zeros behind
  if (count == kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline void store_some(float* p, V v, int count) {
  if (count == kLanes)
    store(p, v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}

// To the nearest f16, ties to even; what is too large becomes the largest.
inline H to_half(V v) {
  v = select(v > 65504.0f, splat(65504.0f), select(v < -65504.0f, splat(-65504.0f), v));
#if defined(__AVX512F__)
  return (H)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  __m256 parts[2];
  std::memcpy(parts, &v, sizeof v);
  const __m128i half[2] = {_mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT)};
  H h;
  std::memcpy(&h, half, sizeof h);
  return h;
#else
  const U sign = (U)v & 0x80000000u, magnitude = (U)v & 0x7fffffffu;
  const U normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Adding 1/2 leaves as the last bit 2^-24, which is the last one of a subnormal f16.
  const U small = (U)((V)magnitude + 0.5f) - 0x3f000000u;
  const I is_small = (V)magnitude < 0x1p-14f;
  return __builtin_convertvector((U)select(is_small, (V)small, (V)normal) | sign >> 16, H);
#endif
}

// Lanes 0-7 with 8-15, of these 0-3 with 4-7, and so on.
template <class F>
inline float fold(V v, F f) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 8
  for (int lane = 0; lane < 8; ++lane) lanes[lane] = f(lanes[lane], lanes[lane + 8]);
#pragma GCC unroll 4
  for (int lane = 0; lane < 4; ++lane) lanes[lane] = f(lanes[lane], lanes[lane + 4]);
  return f(f(lanes[0], lanes[2]), f(lanes[1], lanes[3]));
}

inline float sum(V v) {
  return fold(v, [](float a, float b) { return a + b; });
}

// out[i] = f(a[i], b[i]); lanes behind the end see zeros.
template <class F>
inline void map(const float* a, const float* b, int n, float* out, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(a + i), load(b + i)));
  if (i < n) store_some(out + i, f(load_some(a + i, n - i), load_some(b + i, n - i)), n - i);
}

// ---------------------------------------------------------------------------------------------------------- functions

// e^x to 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then the polynomial of Cephes' expf.
inline V exponential(V x) {
  x = select(x < -87.0f, splat(-87.0f), x);
  x = select(x > 88.0f, splat(88.0f), x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * 1.44269504088896341f + shift) - shift;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

inline V hyperbolic_tangent(V x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  V squares{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) squares += load(x + i) * load(x + i);
  if (i < n) squares += load_some(x + i, n - i) * load_some(x + i, n - i);
  const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  map(x, weight, n, out, [scale](V a, V w) { return a * scale * w; });
}

void add(float* x, const float* y, int n) {
  map(x, y, n, x, [](V a, V b) { return a + b; });
}

void silu_times(float* gate, const float* up, int n) {
  map(gate, up, n, gate, [](V g, V u) { return g / (1.0f + exponential(-g)) * u; });
}

void gelu_times(float* gate, const float* up, int n) {
  map(gate, up, n, gate, [](V g, V u) {
    const V inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
    return 0.5f * g * (1.0f + hyperbolic_tangent(inner)) * u;
  });
}

void soft_cap(float* x, float cap, int n) {
  map(x, x, n, x, [cap](V a, V) { return cap * hyperbolic_tangent(a / cap); });
}

template <class T>
void widen_row(const T* row, float scale, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i) * scale);
  if (i < n) store_some(out + i, load_some(row + i, n - i) * scale, n - i);
}

void widen(const void* row, DType dtype, float scale, int n, float* out) {
  if (dtype == DType::f32) widen_row((const float*)row, scale, n, out);
  if (dtype == DType::bf16) widen_row((const Brain*)row, scale, n, out);
  if (dtype == DType::f16) widen_row((const Half*)row, scale, n, out);
}

// ---------------------------------------------------------------------------------------------------------- attention

void rotate(float* x, const float* cosines, const float* sines, int half, float scale) {
  for (int i = 0; i < half; i += kLanes) {
    const int count = half - i < kLanes ? half - i : kLanes;
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
// does not see have weight 0; even and odd positions are summed apart.
template <int Queries, int Vectors, class T>
inline void mix(const Attention& a, int query, const T* values, int start, int stop, int d, const float* inverse) {
  const int stride = round_to_lanes(a.dim);
  const float* weights = a.scores + query * a.scores_stride;
  V even[Queries][Vectors] = {}, odd[Queries][Vectors] = {};
  for (int position = start; position < stop; position += 2)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const T* at = values + (size_t)position * stride + d + v * kLanes;
      const V first = load(at), second = load(at + stride);
#pragma GCC unroll 4
      for (int q = 0; q < Queries; ++q) {
        even[q][v] += weights[q * a.scores_stride + position - start] * first;
        odd[q][v] += weights[q * a.scores_stride + position + 1 - start] * second;
      }
    }
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int left = a.dim - d - v * kLanes;
      store_some(a.out[query + q] + d + v * kLanes, (even[q][v] + odd[q][v]) * inverse[q],
                 left < kLanes ? left : kLanes);
    }
}

template <int Queries, class T>
void attend_some(const Attention& a, int query) {
  const T* keys = (const T*)a.keys;
  int start = a.start[query], stop = a.stop[query];
  for (int q = 1; q < Queries; ++q) {
    start = a.start[query + q] < start ? a.start[query + q] : start;
    stop = a.stop[query + q] > stop ? a.stop[query + q] : stop;
  }
  const int last = (stop + 1) / 2 * 2;  // behind it all weights are 0
  start = start / kLanes * kLanes;      // whole tiles
  stop = round_to_lanes(stop);
  const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const V never = splat(-std::numeric_limits<float>::infinity());
  V largest[Queries];
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q) largest[q] = never;
  for (int position = start; position < stop; position += kLanes) {
    const T* tile = keys + (size_t)position * a.dim;
    V even[Queries] = {}, odd[Queries] = {};
    for (int d = 0; d < a.dim; d += 2) {
      const V first = load(tile + d * kLanes), second = load(tile + (d + 1) * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < Queries; ++q) {
        even[q] += a.query[query + q][d] * first;
        odd[q] += a.query[query + q][d + 1] * second;
      }
    }
    const I at = lane + position;
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) {
      V score = even[q] + odd[q];
      if (a.cap != 0) score = a.cap * hyperbolic_tangent(score / a.cap);
      score = select((at >= a.start[query + q]) & (at < a.stop[query + q]), score, never);
      largest[q] = select(score > largest[q], score, largest[q]);
      store(a.scores + (query + q) * a.scores_stride + position - start, score);
    }
  }
  float inverse[Queries];
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q) {
    const float top = fold(largest[q], [](float a, float b) { return b > a ? b : a; });
    float* scores = a.scores + (query + q) * a.scores_stride;
    V total{};
    for (int i = 0; i < stop - start; i += kLanes) {
      const V score = load(scores + i);
      const V weight = select(score == never, V{}, exponential(score - top));
      store(scores + i, weight);
      total += weight;
    }
    inverse[q] = 1.0f / sum(total);
  }
  const T* values = (const T*)a.values;
  constexpr int kColumns = Queries == 1 ? 4 : 2;  // vectors at a time, so that the sums stay in registers
  const int columns = round_to_lanes(a.dim);
  int d = 0;
  for (; d + kColumns * kLanes <= columns; d += kColumns * kLanes)
    mix<Queries, kColumns>(a, query, values, start, last, d, inverse);
  for (; d < columns; d += kLanes) mix<Queries, 1>(a, query, values, start, last, d, inverse);
}

template <class T>
void attend_as(const Attention& a) {
  int query = 0;
#ifdef __AVX512F__  // the others have too few registers
  for (; query + kQueries <= a.queries; query += kQueries) attend_some<kQueries, T>(a, query);
#endif
  for (; query < a.queries; ++query) attend_some<1, T>(a, query);
}

void attend(const Attention& a) { a.dtype == DType::f32 ? attend_as<float>(a) : attend_as<Half>(a); }

void store_key(const float* key, int dim, int position, DType dtype, void* keys) {
  const size_t at = (size_t)(position / kLanes) * kLanes * dim + position % kLanes;
  for (int d = 0; d < dim; d += kLanes) {
    const int count = dim - d < kLanes ? dim - d : kLanes;
    if (dtype == DType::f32) {
      for (int i = 0; i < count; ++i) ((float*)keys)[at + (d + i) * kLanes] = key[d + i];
      continue;
    }
    const H half = to_half(load_some(key + d, count));
    for (int i = 0; i < count; ++i) ((Half*)keys)[at + (d + i) * kLanes] = {half[i]};
  }
}

void store_value(const float* value, int dim, int position, DType dtype, void* values) {
  const size_t at = (size_t)position * round_to_lanes(dim);
  for (int d = 0; d < dim; d += kLanes) {
    const V v = load_some(value + d, dim - d < kLanes ? dim - d : kLanes);
    if (dtype == DType::f32) {
      store((float*)values + at + d, v);
    } else {
      const H half = to_half(v);
      std::memcpy((Half*)values + at + d, &half, sizeof half);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- dense products

// Dot products of `Tokens` inputs with one row. The order of additions is the same for every `Tokens`.
template <int Tokens, class T>
inline void dots(const T* row, const float* x, int x_stride, int cols, float* y, int y_stride) {
  V s0[Tokens] = {}, s1[Tokens] = {}, s2[Tokens] = {}, s3[Tokens] = {};
  int k = 0;
  for (; k + 4 * kLanes <= cols; k += 4 * kLanes) {
    const V w0 = load(row + k), w1 = load(row + k + 16), w2 = load(row + k + 32), w3 = load(row + k + 48);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const float* at = x + (size_t)t * x_stride + k;
      s0[t] += w0 * load(at);
      s1[t] += w1 * load(at + 16);
      s2[t] += w2 * load(at + 32);
      s3[t] += w3 * load(at + 48);
    }
  }
  for (; k < cols; k += kLanes) {
    const int count = cols - k < kLanes ? cols - k : kLanes;
    const V w = load_some(row + k, count);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) s0[t] += w * load_some(x + (size_t)t * x_stride + k, count);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) y[(size_t)t * y_stride] = sum((s0[t] + s1[t]) + (s2[t] + s3[t]));
}

template <class T>
void dense_as(const Dense& w, const float* x, int x_stride, int tokens, int row_start, int row_stop, float* y,
              int y_stride) {
  // Blocks of rows that stay in the second-level cache while all tokens pass.
  constexpr int kBlock = 32;
#ifdef __AVX512F__
  constexpr int kTokens = 4;  // 16 accumulators in 32 registers
#else
  constexpr int kTokens = 1;
#endif
  for (int block = row_start; block < row_stop; block += kBlock) {
    const int end = block + kBlock < row_stop ? block + kBlock : row_stop;
    int t = 0;
    for (; t + kTokens <= tokens; t += kTokens)
      for (int row = block; row < end; ++row)
        dots<kTokens>((const T*)w.data + (size_t)row * w.cols, x + (size_t)t * x_stride, x_stride, w.cols,
                y + (size_t)t * y_stride + row, y_stride);
    for (; t < tokens; ++t)
      for (int row = block; row < end; ++row)
        dots<1>((const T*)w.data + (size_t)row * w.cols, x + (size_t)t * x_stride, x_stride, w.cols,
                y + (size_t)t * y_stride + row, y_stride);
  }
}

void dense(const Dense& w, const float* x, int x_stride, int tokens, int row_start, int row_stop, float* y,
           int y_stride) {
  if (w.dtype == DType::f32) dense_as<float>(w, x, x_stride, tokens, row_start, row_stop, y, y_stride);
  if (w.dtype == DType::bf16) dense_as<Brain>(w, x, x_stride, tokens, row_start, row_stop, y, y_stride);
  if (w.dtype == DType::f16) dense_as<Half>(w, x, x_stride, tokens, row_start, row_stop, y, y_stride);
}

uint64_t read(const void* data, size_t bytes) {
  const char* p = (const char*)data;
  W a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    W w[4];
    std::memcpy(w, p + i, sizeof w);
    __builtin_prefetch(p + i + 8192);
    a ^= w[0];
    b ^= w[1];
    c ^= w[2];
    d ^= w[3];
  }
  a = (a ^ b) ^ (c ^ d);
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result ^= a[i];
  return result;
}

}  // namespace

extern const Floats MATQUANT_FLOATS;
const Floats MATQUANT_FLOATS = {rms_norm, add,    silu_times, gelu_times, soft_cap,    widen,
                                rotate,   attend, dense,      store_key,  store_value, read};

}  // namespace matquant
