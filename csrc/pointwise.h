// Row-wise kernels: normalisation, rotary embedding with the KV write, gated activations.

static inline float sum_of_squares(const float* x, int64_t d) {
  Vec acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W)
    for (int j = 0; j < 4; ++j) acc[j] += load(x + i + j * W) * load(x + i + j * W);
  for (; i + W <= d; i += W) acc[0] += load(x + i) * load(x + i);
  float s = lane_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < d; ++i) s += x[i] * x[i];
  return s;
}

static void normalise(const float* x, const float* weight, float* out, int64_t d, float eps) {
  const float scale = 1.f / std::sqrt(sum_of_squares(x, d) / (float)d + eps);
  for (int64_t i = 0; i < d; ++i) out[i] = x[i] * scale * weight[i];
}

static void rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t d, float eps,
                     int threads) {
  threads = rows * d < 32768 ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * d;
    if (residual) {
      float* sum = residual + r * d;
      for (int64_t i = 0; i < d; ++i) sum[i] += row[i];
      row = sum;
    }
    normalise(row, weight, out + r * d, d, eps);
  }
}

static void rotate(float* x, const float* rotation, int64_t d) {
  const int64_t half = d / 2;
  const float *cos = rotation, *sin = rotation + half;
  for (int64_t i = 0; i < half; ++i) {
    const float lo = x[i], hi = x[half + i];
    x[i] = lo * cos[i] - hi * sin[i];
    x[half + i] = hi * cos[i] + lo * sin[i];
  }
}

static void rope_kv_write(const RopeArgs& a) {
  const int64_t d = a.head_dim, stride = (a.heads + 2 * a.kv_heads) * d;
  const int threads = a.tokens * stride < 32768 ? 1 : a.threads;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < a.tokens; ++t) {
    float* row = a.qkv + t * stride;
    const float* rotation = a.rotation + a.position[t] * d;
    for (int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
      float* x = row + h * d;
      const float* norm = h < a.heads ? a.q_norm : a.k_norm;
      if (norm) normalise(x, norm, x, d, a.norm_eps);
      rotate(x, rotation, d);
    }
    if (a.slot[t] < 0) continue;
    const int64_t page = a.slot[t] / kPage, offset = a.slot[t] % kPage;
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const float* k = row + (a.heads + h) * d;
      float* k_page = a.k_cache + (page * a.kv_heads + h) * d * kPage;
      for (int64_t i = 0; i < d; ++i) k_page[i * kPage + offset] = k[i];
      std::memcpy(a.v_cache + ((page * a.kv_heads + h) * kPage + offset) * a.v_stride,
                  row + (a.heads + a.kv_heads + h) * d, d * sizeof(float));
    }
  }
}

static inline Vec silu(Vec x) { return x / (splat(1.f) + vexp(-x)); }
static inline Vec gelu_tanh(Vec x) {
  const Vec inner = splat(0.79788456080286535588f) * (x + splat(0.044715f) * x * x * x);
  return splat(0.5f) * x * (splat(1.f) + vtanh(inner));
}

template <Vec (*Activation)(Vec)>
static void gate_row(const float* gate, const float* up, float* out, int64_t width) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(out + i, Activation(load(gate + i)) * load(up + i));
  for (; i < width; ++i) out[i] = Activation(splat(gate[i]))[0] * up[i];
}

static void gated_activation(const float* gate_up, float* out, int64_t rows, int64_t width, bool gelu, int threads) {
  threads = rows * width < 16384 ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = gate_up + r * 2 * width;
    gelu ? gate_row<gelu_tanh>(gate, gate + width, out + r * width, width)
         : gate_row<silu>(gate, gate + width, out + r * width, width);
  }
}
