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
      s0[t] += w0 * load(at);
      s1[t] += w1 * load(at + 16);
      s2[t] += w2 * load(at + 32);
      s3[t] += w3 * load(at + 48);
    }
  }
  for (; k < cols; k += LANES) {
    const int count = cols - k < LANES ? cols - k : LANES;
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
  // Rows that stay in the second-level cache while they are multiplied with all tokens.
  constexpr int DENSE_ROWS = 32;
#ifdef __AVX512F__
  constexpr int DENSE_TOKENS = 4;  // 16 accumulators in 32 registers
#else
  constexpr int DENSE_TOKENS = 1;
#endif
  for (int block = row_start; block < row_stop; block += DENSE_ROWS) {
    const int end = block + DENSE_ROWS < row_stop ? block + DENSE_ROWS : row_stop;
    int t = 0;
    for (; t + DENSE_TOKENS <= tokens; t += DENSE_TOKENS)
      for (int row = block; row < end; ++row)
        dots<DENSE_TOKENS>((const T*)w.data + (size_t)row * w.cols, x + (size_t)t * x_stride, x_stride, w.cols,
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
