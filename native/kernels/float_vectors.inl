// Vectors of 16 floats: loads, stores and sums. Included by floats.cpp.

template <class E, int BYTES>
struct Raw {
  typedef E type __attribute__((vector_size(BYTES)));
};

// A vector larger than the registers is two halves: GCC passes its own 64-byte vectors through memory on AVX2.
template <class E, int BYTES>
struct Halves;
template <class E, int BYTES>
using Vector = typename std::conditional<(BYTES > NATIVE_BYTES), Halves<E, BYTES>, Raw<E, BYTES>>::type::type;

template <class E, int BYTES>
struct Halves {
  using type = Halves;
  static constexpr int HALF_LANES = BYTES / 2 / sizeof(E);
  Vector<E, BYTES / 2> low, high;
};

#define MATQUANT_OPERATOR(SIGN)                                                             \
  template <class E, int B>                                                                 \
  MATQUANT_INLINE Halves<E, B> operator SIGN(Halves<E, B> a, Halves<E, B> b) {              \
    return {a.low SIGN b.low, a.high SIGN b.high};                                          \
  }                                                                                         \
  template <class E, int B>                                                                 \
  MATQUANT_INLINE Halves<E, B> operator SIGN(Halves<E, B> a, E b) {                         \
    return {a.low SIGN b, a.high SIGN b};                                                   \
  }                                                                                         \
  template <class E, int B>                                                                 \
  MATQUANT_INLINE Halves<E, B> operator SIGN(E a, Halves<E, B> b) {                         \
    return {a SIGN b.low, a SIGN b.high};                                                   \
  }
#define MATQUANT_COMPARISON(SIGN)                                                           \
  template <class E, int B>                                                                 \
  MATQUANT_INLINE Halves<std::int32_t, B> operator SIGN(Halves<E, B> a, Halves<E, B> b) {   \
    return {a.low SIGN b.low, a.high SIGN b.high};                                          \
  }                                                                                         \
  template <class E, int B>                                                                 \
  MATQUANT_INLINE Halves<std::int32_t, B> operator SIGN(Halves<E, B> a, E b) {              \
    return {a.low SIGN b, a.high SIGN b};                                                   \
  }
MATQUANT_OPERATOR(+)
MATQUANT_OPERATOR(-)
MATQUANT_OPERATOR(*)
MATQUANT_OPERATOR(/)
MATQUANT_OPERATOR(&)
MATQUANT_OPERATOR(^)
MATQUANT_COMPARISON(<)
MATQUANT_COMPARISON(>)
MATQUANT_COMPARISON(>=)
MATQUANT_COMPARISON(==)
#undef MATQUANT_OPERATOR
#undef MATQUANT_COMPARISON
template <class E, int B>
MATQUANT_INLINE Halves<E, B> operator-(Halves<E, B> a) {
  return {-a.low, -a.high};
}
template <class E, int B>
MATQUANT_INLINE void operator+=(Halves<E, B>& a, Halves<E, B> b) {
  a = a + b;
}
template <class E, int B>
MATQUANT_INLINE void operator^=(Halves<E, B>& a, Halves<E, B> b) {
  a = a ^ b;
}

using V = Vector<float, 64>;
using I = Vector<std::int32_t, 64>;
using W = Vector<std::uint64_t, 64>;
using RawV = Raw<float, NATIVE_BYTES>::type;
using RawI = Raw<std::int32_t, NATIVE_BYTES>::type;
using RawU = Raw<std::uint32_t, NATIVE_BYTES>::type;
using RawW = Raw<std::uint64_t, NATIVE_BYTES>::type;
using RawH = Raw<std::uint16_t, NATIVE_BYTES / 2>::type;
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

// Minus 0 is folded away, plus 0 is not.
MATQUANT_INLINE V splat(float value) { return value - V{}; }

MATQUANT_INLINE RawV select(RawI mask, RawV yes, RawV no) { return mask ? yes : no; }
template <int B>
MATQUANT_INLINE Halves<float, B> select(Halves<std::int32_t, B> mask, Halves<float, B> yes, Halves<float, B> no) {
  return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
}

// a * b + c, rounded once, on every instruction set.
MATQUANT_INLINE RawV multiply_add(RawV a, RawV b, RawV c) {
#if defined(__AVX512F__)
  return (RawV)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (RawV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (RawV)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int lane = 0; lane < NATIVE_LANES; ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
  return c;
#endif
}
template <int B>
MATQUANT_INLINE Halves<float, B> multiply_add(Halves<float, B> a, Halves<float, B> b, Halves<float, B> c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
MATQUANT_INLINE V multiply_add(float a, V b, V c) { return multiply_add(splat(a), b, c); }
MATQUANT_INLINE V multiply_add(V a, V b, float c) { return multiply_add(a, b, splat(c)); }

// 2^n of integers n.
MATQUANT_INLINE RawV power_of_two(RawV n) { return (RawV)((__builtin_convertvector(n, RawI) + 127) << 23); }
template <int B>
MATQUANT_INLINE Halves<float, B> power_of_two(Halves<float, B> n) {
  return {power_of_two(n.low), power_of_two(n.high)};
}

MATQUANT_INLINE RawV load_raw(const float* p) {
  RawV v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MATQUANT_INLINE RawW load_raw(const std::uint64_t* p) {
  RawW w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
MATQUANT_INLINE RawV load_raw(const Brain* p) {
  RawH h;
  std::memcpy(&h, p, sizeof h);
  return (RawV)(__builtin_convertvector(h, RawU) << 16);
}
MATQUANT_INLINE RawV load_raw(const Half* p) {
#if defined(__AVX512F__)
  return (RawV)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (RawV)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  RawH h;
  std::memcpy(&h, p, sizeof h);
  const RawU wide = __builtin_convertvector(h, RawU);
  const RawV magnitude = (RawV)((wide & 0x7fffu) << 13) * 0x1p112f;  // moves the exponent; exact, subnormals included
  return (RawV)((RawU)magnitude | ((wide & 0x8000u) << 16));
#endif
}

template <class R, class T>
MATQUANT_INLINE R load_as(const T* p) {
  if constexpr (sizeof(R) == NATIVE_BYTES) {
    return load_raw(p);
  } else {
    using Part = decltype(R::low);
    return {load_as<Part>(p), load_as<Part>(p + R::HALF_LANES)};
  }
}
template <class T>
MATQUANT_INLINE V load(const T* p) {
  return load_as<V>(p);
}

template <class T>
inline V load_some(const T* p, int count) {  // the first `count` lanes, then zeros
  if (count == LANES) return load(p);
  T lanes[LANES] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

MATQUANT_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline void store_some(float* p, V v, int count) {
  if (count == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, count * sizeof(float));
}

MATQUANT_INLINE void store_half(RawV v, Half* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const RawU sign = (RawU)v & 0x80000000u, magnitude = (RawU)v & 0x7fffffffu;
  const RawU normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // After adding 1/2 the last bit is worth 2^-24, as the last bit of a subnormal f16.
  const RawU small = (RawU)((RawV)magnitude + 0.5f) - 0x3f000000u;
  const RawI is_small = (RawV)magnitude < 0x1p-14f;
  const RawH half = __builtin_convertvector((RawU)select(is_small, (RawV)small, (RawV)normal) | sign >> 16, RawH);
  std::memcpy(p, &half, sizeof half);
#endif
}
template <int B>
MATQUANT_INLINE void store_half(Halves<float, B> v, Half* p) {
  store_half(v.low, p);
  store_half(v.high, p + Halves<float, B>::HALF_LANES);
}
// Rounds to the nearest f16, ties to even; saturates.
MATQUANT_INLINE void store(Half* p, V v) {
  v = select(v > 65504.0f, splat(65504.0f), v);
  store_half(select(v < -65504.0f, splat(-65504.0f), v), p);
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
