// Norms and activations of a row. Included by floats.cpp.

// e^x to 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then the polynomial of Cephes' expf.
inline V exponential(V x) {
  x = select(x < -87.0f, splat(-87.0f), x);
  x = select(x > 88.0f, splat(88.0f), x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = multiply_add(1.44269504088896341f, x, splat(shift)) - shift;
  const V r = multiply_add(2.12194440e-4f, n, multiply_add(-0.693359375f, n, x));
  V p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p * r, r, r) + 1.0f;
  return p * power_of_two(n);
}

inline V hyperbolic_tangent(V x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  V squares{};
  int i = 0;
  const auto add_square = [&](V a) { squares = multiply_add(a, a, squares); };
  for (; i + LANES <= n; i += LANES) add_square(load(x + i));
  if (i < n) add_square(load_some(x + i, n - i));
  const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  map(x, weight, n, out, [scale](V a, V w) { return a * scale * w; });
}

void add(float* x, const float* y, int n) {
  map(x, y, n, x, [](V a, V b) { return a + b; });
}

void add_scaled(float* x, const float* y, float factor, int n) {
  map(x, y, n, x, [factor](V a, V b) { return multiply_add(factor, b, a); });
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

void clamped_times(float* gate, const float* up, float alpha, float limit, int n) {
  map(gate, up, n, gate, [alpha, limit](V g, V u) {
    g = select(g > limit, splat(limit), g);
    u = select(u > limit, splat(limit), select(u < -limit, splat(-limit), u));
    return g / (1.0f + exponential(-alpha * g)) * (u + 1.0f);
  });
}

void soft_cap(float* x, float cap, int n) {
  map(x, x, n, x, [cap](V a, V) { return cap * hyperbolic_tangent(a / cap); });
}

template <class T>
void widen_row(const T* row, float scale, int n, float* out) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(row + i) * scale);
  if (i < n) store_some(out + i, load_some(row + i, n - i) * scale, n - i);
}

void widen(const void* row, DType dtype, float scale, int n, float* out) {
  if (dtype == DType::f32) widen_row((const float*)row, scale, n, out);
  if (dtype == DType::bf16) widen_row((const Brain*)row, scale, n, out);
  if (dtype == DType::f16) widen_row((const Half*)row, scale, n, out);
}
