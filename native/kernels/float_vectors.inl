// Vectors of 16 floats: loads, stores and sums. Included by floats.cpp.

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

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
inline V load_some(const T* p, int count) {  // the first `count` lanes, then zeros
  if (count == LANES) return load(p);
  T lanes[LANES] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline void store_some(float* p, V v, int count) {
  if (count == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}

// Rounds to the nearest f16, ties to even; saturates.
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
  // After adding 1/2 the last bit is worth 2^-24, as the last bit of a subnormal f16.
  const U small = (U)((V)magnitude + 0.5f) - 0x3f000000u;
  const I is_small = (V)magnitude < 0x1p-14f;
  return __builtin_convertvector((U)select(is_small, (V)small, (V)normal) | sign >> 16, H);
#endif
}

// Combines lanes 0-7 with 8-15, then 0-3 with 4-7, and so on.
template <class F>
inline float fold(V v, F f) {
  float lanes[LANES];
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

// out[i] = f(a[i], b[i]); lanes past the end are zeros.
template <class F>
inline void map(const float* a, const float* b, int n, float* out, F f) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, f(load(a + i), load(b + i)));
  if (i < n) store_some(out + i, f(load_some(a + i, n - i), load_some(b + i, n - i)), n - i);
}
