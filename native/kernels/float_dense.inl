// Products with dense weights. Included by floats.cpp.

// Dot products of `Tokens` inputs with one row. The order of additions is the same for every `Tokens`.
template <int Tokens, class T>
inline void dots(const T* row, const float* x, int x_stride, int cols, float* y, int y_stride) {
  V s0[Tokens] = {}, s1[Tokens] = {}, s2[Tokens] = {}, s3[Tokens] = {};
  int k = 0;
  for (; k + 4 * LANES <= cols; k += 4 * LANES) {
    const V w0 = load(row + k), w1 = load(row + k + 16), w2 = load(row + k + 32), w3 = load(row + k + 48);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const float* at = x + (size_t)t * x_stride + k;
      s0[t] = multiply_add(w0, load(at), s0[t]);
      s1[t] = multiply_add(w1, load(at + 16), s1[t]);
      s2[t] = multiply_add(w2, load(at + 32), s2[t]);
      s3[t] = multiply_add(w3, load(at + 48), s3[t]);
    }
  }
  for (; k < cols; k += LANES) {
    const int count = cols - k < LANES ? cols - k : LANES;
    const V w = load_some(row + k, count);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      s0[t] = multiply_add(w, load_some(x + (size_t)t * x_stride + k, count), s0[t]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) y[(size_t)t * y_stride] = sum((s0[t] + s1[t]) + (s2[t] + s3[t]));
}

constexpr int TILE = NATIVE_BYTES == 64 ? 4 : 2;  // rows and tokens of a tile, whose sums stay in registers

#ifdef __AVX512F__
// Lanes of two vectors: 0 .. 15 are those of a, 16 .. 31 those of b.
inline V pick(V a, V b, I lanes) { return (V)_mm512_permutex2var_ps((__m512)a, (__m512i)lanes, (__m512)b); }

// Sums of the lanes of 16 vectors, each in the order of `sum`: halves of two vectors are added at once.
inline void sums_of(const V* v, float* found) {
  V pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const V a = v[i], b = v[i + 8];
    pairs[i] = pick(a, b, I{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               pick(a, b, I{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V a = pairs[i], b = pairs[i + 4];
    fours[i] = pick(a, b, I{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
               pick(a, b, I{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const V a = fours[i], b = fours[i + 2];
    eights[i] = pick(a, b, I{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
                pick(a, b, I{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  }
  const V a = eights[0], b = eights[1];
  store(found, pick(a, b, I{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
                   pick(a, b, I{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}));
}
#else
inline void sums_of(const V* v, float* found) {
  for (int i = 0; i < TILE * TILE; ++i) found[i] = sum(v[i]);
}
#endif

// Adds columns k, k + step, ... of TILE rows times TILE tokens to sums[token * TILE + row]; Load: whole vectors or some.
template <class T, class Load>
inline void add_columns(const T* rows, const float* x, int x_stride, int cols, int k, int stop, int step, V* sums,
                        Load from) {
  V s[TILE * TILE];
#pragma GCC unroll 16
  for (int i = 0; i < TILE * TILE; ++i) s[i] = sums[i];
  for (; k < stop; k += step) {
    V w[TILE];
#pragma GCC unroll 4
    for (int row = 0; row < TILE; ++row) w[row] = from(rows + (size_t)row * cols + k);
#pragma GCC unroll 4
    for (int t = 0; t < TILE; ++t) {
      const V at = from(x + (size_t)t * x_stride + k);
#pragma GCC unroll 4
      for (int row = 0; row < TILE; ++row) s[t * TILE + row] = multiply_add(w[row], at, s[t * TILE + row]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE * TILE; ++i) sums[i] = s[i];
}

// `dots` of TILE rows and TILE tokens, with the same additions in the same order.
template <class T>
inline void tile_of_dots(const T* rows, const float* x, int x_stride, int cols, float* y, int y_stride) {
  const int whole = cols / (4 * LANES) * 4 * LANES;
  V s[4][TILE * TILE] = {};
  const auto vector = [](const auto* p) { return load(p); };
  for (int part = 0; part < 4; ++part)
    add_columns(rows, x, x_stride, cols, part * LANES, whole, 4 * LANES, s[part], vector);
  const int vectors = cols / LANES * LANES;
  add_columns(rows, x, x_stride, cols, whole, vectors, LANES, s[0], vector);
  if (vectors < cols)
    add_columns(rows, x, x_stride, cols, vectors, cols, LANES, s[0],
                [&](const auto* p) { return load_some(p, cols - vectors); });
#pragma GCC unroll 16
  for (int i = 0; i < TILE * TILE; ++i) s[0][i] = (s[0][i] + s[1][i]) + (s[2][i] + s[3][i]);
  float found[TILE * TILE];
  sums_of(s[0], found);
  for (int t = 0; t < TILE; ++t) std::memcpy(y + (size_t)t * y_stride, found + t * TILE, sizeof(float) * TILE);
}

template <class T>
void dense_as(const Dense& w, const float* x, int x_stride, int tokens, int row_start, int row_stop, float* y,
              int y_stride) {
  // Rows that stay in the second-level cache while they are multiplied with all tokens.
  constexpr int DENSE_ROWS = 32;
  for (int block = row_start; block < row_stop; block += DENSE_ROWS) {
    const int end = block + DENSE_ROWS < row_stop ? block + DENSE_ROWS : row_stop;
    int t = 0;
    for (; t + TILE <= tokens; t += TILE) {
      int row = block;
      for (; row + TILE <= end; row += TILE)
        tile_of_dots((const T*)w.data + (size_t)row * w.cols, x + (size_t)t * x_stride, x_stride, w.cols,
                     y + (size_t)t * y_stride + row, y_stride);
      for (; row < end; ++row)
        dots<TILE>((const T*)w.data + (size_t)row * w.cols, x + (size_t)t * x_stride, x_stride, w.cols,
                y + (size_t)t * y_stride + row, y_stride);
    }
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
