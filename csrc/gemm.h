// y = x W^T over packed weights. Every output is one chain of multiply-adds over k (fused where the processor can), cut into blocks of kBlockK that
// are added in order: the same chain for any number of rows, so a row's bits do not depend on the batch it is in.

constexpr int kCols = 2 * W;         // columns of one register tile
constexpr int kRows = MAX_ROWS;      // rows of one register tile
constexpr int64_t kBlockK = 384;     // 48 KB of a panel, 18 KB of a tile of x: between the L1 and the L2 cache
constexpr int64_t kBlockM = 22 * kRows;  // rows that pass over a block of the panel before the next one: 264 or 132

template <int MR, int NV>
static inline void put_tile(Vec (&acc)[MR][NV], float* c, int64_t ldc, bool accumulate) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* p = c + r * ldc + v * W;
      store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
}

// c[r, 0:NV*W] (+)= sum_k a[r * row_stride + k * k_stride] * b[k * ldb + 0:NV*W]
template <int MR, int NV>
static inline void tile(int64_t k_len, const float* a, int64_t row_stride, int64_t k_stride, const float* b, int64_t ldb,
                        float* c, int64_t ldc, bool accumulate) {
  Vec acc[MR][NV] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < k_len; ++k) {
    Vec bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec av = splat(a[r * row_stride + k * k_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
    }
  }
  put_tile<MR, NV>(acc, c, ldc, accumulate);
}

// The same of pairs of bfloat16 weights, b[k / 2][ldb][2]: a vector of pairs is a shift and a mask away from two of floats.
template <int MR, int NV>
static inline void tile(int64_t k_len, const float* a, int64_t row_stride, int64_t k_stride, const uint16_t* b, int64_t ldb,
                        float* c, int64_t ldc, bool accumulate) {
  Vec acc[MR][NV] = {};
  for (int64_t k = 0; k < k_len; k += 2)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2 && k + half < k_len; ++half) {
      Vec bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const uint16_t* pairs = b + k * ldb + 2 * v * W;
        bv[v] = half ? second_of_pairs(pairs) : first_of_pairs(pairs);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec av = splat(a[r * row_stride + (k + half) * k_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
    }
  put_tile<MR, NV>(acc, c, ldc, accumulate);
}

template <int NV, class T>
static inline void tile_rows(int rows, int64_t k_len, const float* a, int64_t row_stride, int64_t k_stride, const T* b,
                             int64_t ldb, float* c, int64_t ldc, bool accumulate) {
#define DIFFPO_CASE(R) \
  case R: if constexpr (R <= kRows) tile<R, NV>(k_len, a, row_stride, k_stride, b, ldb, c, ldc, accumulate); break;
  switch (rows) {
    DIFFPO_CASE(1) DIFFPO_CASE(2) DIFFPO_CASE(3) DIFFPO_CASE(4) DIFFPO_CASE(5) DIFFPO_CASE(6)
    DIFFPO_CASE(7) DIFFPO_CASE(8) DIFFPO_CASE(9) DIFFPO_CASE(10) DIFFPO_CASE(11) DIFFPO_CASE(12)
  }
#undef DIFFPO_CASE
}

// Rows of x, seen by the tiles: in place for up to one tile of rows, else regrouped as [tile][k][kRows], because rows
// whose stride is a multiple of 4 KB would fall into the same cache sets.
struct Rows {
  const float* data;
  int64_t m, k;
  bool grouped;
  const float* at(int64_t row, int64_t k0) const {
    return grouped ? data + (row / kRows) * kRows * k + k0 * kRows : data + row * k + k0;
  }
  int64_t row_stride() const { return grouped ? 1 : k; }
  int64_t k_stride() const { return grouped ? kRows : 1; }
};

static void group_rows(const float* x, int64_t m, int64_t k, float* out, int64_t first_tile, int64_t last_tile) {
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t rows = std::min<int64_t>(kRows, m - t * kRows);
    float* o = out + t * kRows * k;
    const float* in = x + t * kRows * k;
    if (rows == kRows)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t r = 0; r < kRows; ++r) o[i * kRows + r] = in[r * k + i];
    else
      for (int64_t i = 0; i < k; ++i)
        for (int64_t r = 0; r < rows; ++r) o[i * kRows + r] = in[r * k + i];
  }
}

// c[0:m, 0:32] = rows [row0, row0 + m) times one panel
template <class T>
static void panel_product(const Rows& x, int64_t row0, int64_t m, const T* panel, float* c, int64_t ldc) {
  const int64_t tiles = (m + kRows - 1) / kRows;
  for (int64_t k0 = 0; k0 < x.k; k0 += kBlockK) {
    const int64_t len = std::min(kBlockK, x.k - k0);
    const char* next = reinterpret_cast<const char*>(panel + (k0 + len) * kPanel);
    const int64_t share = tiles > 1 ? len * kPanel * (int64_t)sizeof(T) / tiles : 0;
    for (int64_t r = 0; r < m; r += kRows) {
      // weights lie in the order they are read: each tile fetches its share of the next block, which else would start cold
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + r / kRows * share + i, 0, 2);
      for (int64_t col = 0; col < kPanel; col += kCols)
        tile_rows<2>((int)std::min<int64_t>(kRows, m - r), len, x.at(row0 + r, k0), x.row_stride(), x.k_stride(),
                     panel + k0 * kPanel + kSideBySide<T> * col, kPanel, c + r * ldc + col, ldc, k0 > 0);
    }
  }
}

// Calls use(row0, rows, panel index, values [rows][32]) for every block of the product, from all threads; the epilogue.
template <class T, class Use>
static void for_each_block(const LinearArgs& a, const Use& use) {
  const int64_t panels = (a.n + kPanel - 1) / kPanel, tiles = (a.m + kRows - 1) / kRows;
  const bool grouped = a.m > kRows;
  std::unique_ptr<float, decltype(&std::free)> buffer(nullptr, &std::free);
  if (grouped) {
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, ((tiles * kRows * a.k * 4 + 63) / 64) * 64)));
    if (!buffer) throw std::bad_alloc();
  }
  const Rows x{grouped ? buffer.get() : a.x, a.m, a.k, grouped};
  const int64_t blocks = (a.m + kBlockM - 1) / kBlockM;
  const int threads = a.m * a.n * a.k < 65536 ? 1 : (int)std::min<int64_t>(a.threads, blocks * panels);
  (void)threads;
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = DIFFPO_TEAM, rank = DIFFPO_RANK;
    if (grouped) {
      group_rows(a.x, a.m, a.k, buffer.get(), tiles * rank / team, tiles * (rank + 1) / team);
#pragma omp barrier
    }
    alignas(64) float values[kBlockM * kPanel];
    const int64_t first = blocks * panels * rank / team, last = blocks * panels * (rank + 1) / team;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row0 = i / panels * kBlockM, p = i % panels, rows = std::min(kBlockM, a.m - row0);
      panel_product(x, row0, rows, static_cast<const T*>(a.weight) + p * panel_size<T>(a.k), values, kPanel);
      use(row0, rows, p, values, rank);
    }
  }
}

template <class T>
static void linear_typed(const LinearArgs& a) {
  for_each_block<T>(a, [&](int64_t row0, int64_t rows, int64_t p, const float* values, int64_t) {
    const int64_t col0 = p * kPanel, cols = std::min(kPanel, a.n - col0);
    for (int64_t r = 0; r < rows; ++r) {
      float* y = a.y + (row0 + r) * a.n + col0;
      const float* v = values + r * kPanel;
      if (a.bias)
        for (int64_t c = 0; c < cols; ++c) y[c] = v[c] + a.bias[col0 + c];
      else
        std::memcpy(y, v, cols * sizeof(float));
    }
  });
}

struct Best {
  float raw = -INFINITY, value = -INFINITY;  // before and after the soft-cap
  int64_t index = -1;
};

template <class T>
static void linear_argmax_typed(const LinearArgs& a, const ArgmaxArgs& out) {
  std::vector<Best> best(a.threads * a.m);
  for_each_block<T>(a, [&](int64_t row0, int64_t rows, int64_t p, const float* values, int64_t rank) {
    const int64_t col0 = p * kPanel, cols = std::min(kPanel, a.n - col0);
    for (int64_t r = 0; r < rows; ++r) {
      Best& b = best[rank * a.m + row0 + r];
      const float* v = values + r * kPanel;
      int better = b.index < 0;  // one vector comparison settles nearly every block: the maximum is rarely raised
      for (int64_t c = 0; c < kPanel; ++c) better |= v[c] > b.raw;
      if (!better && !a.bias) continue;
      for (int64_t c = 0; c < cols; ++c) {
        const float z = a.bias ? v[c] + a.bias[col0 + c] : v[c];
        // The cap is monotonic: only a larger raw value can win, and after rounding it can tie, where the lower index stays.
        if (b.index >= 0 ? !(z > b.raw) : std::isnan(z)) continue;
        const float capped = out.softcap > 0 ? out.softcap * std::tanh(z / out.softcap) : z;
        if (b.index < 0 || capped > b.value) b = Best{z, capped, col0 + c};
      }
    }
  });
  for (int64_t r = 0; r < a.m; ++r) {
    Best top = best[r];
    for (int64_t t = 1; t < a.threads; ++t) {
      const Best& b = best[t * a.m + r];
      if (b.index < 0) continue;
      if (top.index < 0 || b.value > top.value || (b.value == top.value && b.index < top.index)) top = b;
    }
    out.index[r] = top.index;
    out.value[r] = top.index < 0 ? NAN : top.value;
  }
}

static void linear(const LinearArgs& a) {
  a.weight_type == WeightType::kFloat32 ? linear_typed<float>(a) : linear_typed<uint16_t>(a);
}
static void linear_argmax(const LinearArgs& a, const ArgmaxArgs& out) {
  a.weight_type == WeightType::kFloat32 ? linear_argmax_typed<float>(a, out) : linear_argmax_typed<uint16_t>(a, out);
}
