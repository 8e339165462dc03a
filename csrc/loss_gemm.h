// Products of the consistency loss. Every operand is cut into panels of 48 columns, [panel][row][48], and one layout serves as
// either factor: a tile broadcasts elements of one and multiplies whole vectors of the other.

constexpr int64_t kStrip = 48;                 // columns of a panel: three vectors of 16, six of 8 or twelve of 4
constexpr int kTileRows = W == 16 ? 8 : 4;     // 24 (12) accumulators, 3 vectors, 1 broadcast: within 32 (16) registers
constexpr int kTileVecs = 3;

// c[r, 0:NV*W] (+)= sum over groups g and k of a[g * group_stride + r * RS + k * KS] * b[k, 0:NV*W], b's rows one after the other
template <int NV, int RS, int KS>
static inline void loss_tile(int64_t k_len, int64_t group_len, int64_t group_stride, const float* a, const float* b, float* c,
                             int64_t ldc, bool accumulate) {
  Vec acc[kTileRows][NV] = {};
  for (; k_len > 0; k_len -= group_len, a += group_stride) {
    const int64_t len = std::min(k_len, group_len);
#pragma GCC unroll 2
    for (int64_t k = 0; k < len; ++k, b += kStrip) {
      if (RS == 1) __builtin_prefetch(a + (k + 24) * KS, 0, 3);  // a strided walk that the hardware follows late
      Vec bv[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec av = splat(a[r * RS + k * KS]);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      // a sum of short sums: one chain over a whole vocabulary would lose three digits
      float* p = c + r * ldc + v * W;
      store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
}

// One factor that is broadcast: element (row, k) of group k / group_len.
struct Broadcast {
  const float* data;
  int64_t group_len, group_stride;  // of k; group_len >= k_len: one group
};

// c[0:rows, 0:width] (+)= a b, rows a multiple of kTileRows, width of 16
template <int RS, int KS>
static void loss_product(int64_t rows, int64_t width, int64_t k_len, Broadcast a, const float* b, float* c, int64_t ldc,
                         bool accumulate) {
  for (int64_t col = 0; col < width; col += kTileVecs * W) {
    const int vecs = (int)std::min<int64_t>(kTileVecs, (width - col) / W);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const float* at = a.data + r * RS;
      float* out = c + r * ldc + col;
      if (vecs == 3) loss_tile<3, RS, KS>(k_len, a.group_len, a.group_stride, at, b + col, out, ldc, accumulate);
      else if (vecs == 2) loss_tile<2, RS, KS>(k_len, a.group_len, a.group_stride, at, b + col, out, ldc, accumulate);
      else loss_tile<1, RS, KS>(k_len, a.group_len, a.group_stride, at, b + col, out, ldc, accumulate);
    }
  }
}

static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // to the nearest, ties to even; a NaN must not round up to infinity
  *out = (uint16_t)(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A row of length d into panels [d / 48][panel_rows][48] at `row`; the rest of the last panel becomes zero.
template <class T>
static void pack_row(const T* in, int64_t d, float* out, int64_t panel_rows, int64_t row) {
  float* o = out + row * kStrip;
  int64_t i = 0;
  for (; i + kStrip <= d; i += kStrip, o += panel_rows * kStrip)
    for (int64_t j = 0; j < kStrip; j += W) store(o + j, load_weight(in + i + j));
  for (int64_t j = 0; i < d && j < kStrip; ++j) o[j] = i + j < d ? widen(in[i + j]) : 0.f;
}
