// y = x W^T over packed weights. Every output is one chain of multiply-adds over k (fused where the processor can), cut into
// blocks of `chain` k that are added in order: the same chain for any number of rows, so a row's bits do not depend on the batch.

constexpr int kRows = MAX_ROWS;          // rows of one register tile
constexpr int64_t kBlockM = 22 * kRows;  // rows that pass over a block of the panel before the next one

using Pair = uint32_t;  // two bfloat16, the first in the lower half
#if defined(DIFFPO_PAIR_PRODUCTS)
template <class T>
using RowElement = typename std::conditional<sizeof(T) == 2, Pair, float>::type;
#else
template <class T>
using RowElement = float;
#endif

// Where a tile's columns lie: side by side, in rows of `row`.
struct SideBySide {
  int64_t row;
  int64_t at(int64_t column) const { return column; }
};
// Or 32 of them side by side, the next 32 a `panel` further; pairs count as one. Bits do not depend on a tile's width. A wide one
// keeps the processor busy where rows are few, for each accumulator waits for itself.
struct Panels {
  int64_t row, panel;
  int64_t at(int64_t column) const { return column / kPanel * panel + column % kPanel; }
};

template <int MR, int NV, class Columns>
static inline void put_tile(Vec (&acc)[MR][NV], float* c, Columns place, bool accumulate) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* p = c + r * place.row + place.at(v * W);
      store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
    }
}

// c[r, 0:NV*W] (+)= sum_k a[r * row_stride + k * k_stride] * b[k, 0:NV*W]
template <int MR, int NV, class Columns>
static inline void tile(int64_t k_len, const float* a, int64_t row_stride, int64_t k_stride, const float* b, Columns from,
                        float* c, Columns to, bool accumulate) {
  Vec acc[MR][NV] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < k_len; ++k) {
    Vec bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = load(b + k * from.row + from.at(v * W));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec av = splat(a[r * row_stride + k * k_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
    }
  }
  put_tile(acc, c, to, accumulate);
}

// The same of pairs of bfloat16 weights, b[k / 2][from.row][2]: a vector of pairs is a shift and a mask away from two of floats.
template <int MR, int NV, class Columns>
static inline void tile(int64_t k_len, const float* a, int64_t row_stride, int64_t k_stride, const uint16_t* b, Columns from,
                        float* c, Columns to, bool accumulate) {
  Vec acc[MR][NV] = {};
  for (int64_t k = 0; k < k_len; k += 2)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2 && k + half < k_len; ++half) {
      Vec bv[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const uint16_t* pairs = b + k * from.row + 2 * from.at(v * W);
        bv[v] = half ? second_of_pairs(pairs) : first_of_pairs(pairs);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec av = splat(a[r * row_stride + (k + half) * k_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
    }
  put_tile(acc, c, to, accumulate);
}

#if defined(DIFFPO_PAIR_PRODUCTS)
// Where the processor multiplies pairs of bfloat16, x is rounded to them: a[r * row_stride + k / 2 * k_stride] is one pair, and
// each instruction adds its two products to a float. In assembly because compilers move the accumulators out of the registers.
template <int MR, int NV, class Columns>
static inline void tile(int64_t k_len, const Pair* a, int64_t row_stride, int64_t k_stride, const uint16_t* b, Columns from,
                        float* c, Columns to, bool accumulate) {
  Vec acc[MR][NV] = {};
  for (int64_t k = 0; k < (k_len + 1) / 2; ++k) {
    Vec bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = load_pairs(b + 2 * (k * from.row + from.at(v * W)));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc[r][v]) : "v"(bv[v]), "m"(a[r * row_stride + k * k_stride]));
  }
  put_tile(acc, c, to, accumulate);
}
#endif

// Tiles over `columns` of them, as wide as the registers hold; columns that are no multiple of W are left out.
template <int MR, class A, class T, class Columns>
static inline void tiles(int64_t columns, int64_t k_len, const A* a, int64_t row_stride, int64_t k_stride, const T* b, Columns from,
                         float* c, Columns to, bool accumulate) {
  int64_t col = 0;
#define DIFFPO_WIDTH(NV)\
  if constexpr (NV <= 2 || (MR + 1) * NV < REGISTERS)                                                                 \
    for (; col + NV * W <= columns; col += NV * W)                                                                    \
      tile<MR, NV>(k_len, a, row_stride, k_stride, b + kSideBySide<T> * from.at(col), from, c + to.at(col), to, accumulate);
  DIFFPO_WIDTH(8) DIFFPO_WIDTH(4) DIFFPO_WIDTH(2) DIFFPO_WIDTH(1)
#undef DIFFPO_WIDTH
}

template <class A, class T, class Columns>
static inline void tile_rows(int rows, int64_t columns, int64_t k_len, const A* a, int64_t row_stride, int64_t k_stride, const T* b,
                             Columns from, float* c, Columns to, bool accumulate) {
#define DIFFPO_CASE(R) \
  case R: if constexpr (R <= kRows) tiles<R>(columns, k_len, a, row_stride, k_stride, b, from, c, to, accumulate); break;
  switch (rows) {
    DIFFPO_CASE(1) DIFFPO_CASE(2) DIFFPO_CASE(3) DIFFPO_CASE(4) DIFFPO_CASE(5) DIFFPO_CASE(6) DIFFPO_CASE(7)
    DIFFPO_CASE(8) DIFFPO_CASE(9) DIFFPO_CASE(10) DIFFPO_CASE(11) DIFFPO_CASE(12) DIFFPO_CASE(13) DIFFPO_CASE(14)
  }
#undef DIFFPO_CASE
}

// Rows of x as the tiles read them: elements are floats, or pairs of them in bfloat16, `width` k.
template <class A>
struct Rows {
  static constexpr int64_t width = std::is_same<A, float>::value ? 1 : 2;
  const A* data;
  int64_t k, row_stride, k_stride;
  int64_t tile;  // from one to the next
  const A* at(int64_t row, int64_t k0) const { return data + row / kRows * tile + k0 / width * k_stride; }
};

// Tiles first_tile .. last_tile of x, whose elements lie row_stride and k_stride apart.
static void group_rows(const LinearArgs& a, float* out, int64_t first_tile, int64_t last_tile) {
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t rows = std::min<int64_t>(kRows, a.m - t * kRows);
    float* o = out + t * kRows * a.k;
    const float* in = a.x + t * kRows * a.x_row;
    if (rows == kRows)
      for (int64_t i = 0; i < a.k; ++i)
        for (int64_t r = 0; r < kRows; ++r) o[i * kRows + r] = in[r * a.x_row + i * a.x_k];
    else
      for (int64_t i = 0; i < a.k; ++i)
        for (int64_t r = 0; r < rows; ++r) o[i * kRows + r] = in[r * a.x_row + i * a.x_k];
  }
}

#if defined(DIFFPO_PAIR_PRODUCTS)
// Rounded to pairs; the second of an incomplete one is zero.
static void group_rows(const LinearArgs& a, Pair* out, int64_t first_tile, int64_t last_tile) {
  const int64_t steps = (a.k + 1) / 2;
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t rows = std::min<int64_t>(kRows, a.m - t * kRows);
    Pair* o = out + t * kRows * steps;
    const float* in = a.x + t * kRows * a.x_row;
    if (a.x_row == 1)  // x is the transpose of what lies in memory
      for (int64_t i = 0; i < steps; ++i) {
        const float *first = in + 2 * i * a.x_k, *second = first + a.x_k;
        const bool complete = 2 * i + 1 < a.k;
        for (int64_t r = 0; r < rows; ++r) o[i * kRows + r] = to_pair(first[r], complete ? second[r] : 0.f);
      }
    else
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = in + r * a.x_row;
        for (int64_t i = 0; i < a.k / 2; ++i) o[i * kRows + r] = to_pair(row[2 * i * a.x_k], row[(2 * i + 1) * a.x_k]);
        if (a.k % 2) o[a.k / 2 * kRows + r] = to_pair(row[(a.k - 1) * a.x_k], 0.f);
      }
  }
}
#endif

// c[panel][0:m, 0:32] = rows [row0, row0 + m) times panels that follow each other
template <class A, class T>
static void panel_product(const Rows<A>& x, int64_t row0, int64_t m, const T* weight, int64_t panels, int64_t chain, float* c) {
  const int64_t tiles = (m + kRows - 1) / kRows;
  const Panels from{kPanel, panel_size<T>(x.k) / kSideBySide<T>}, to{kPanel, m * kPanel};
  for (int64_t k0 = 0; k0 < x.k; k0 += chain) {
    const int64_t len = std::min(chain, x.k - k0);
    const char* next = reinterpret_cast<const char*>(weight + (k0 + len) * kPanel);
    const int64_t share = tiles > 1 && panels == 1 ? len * kPanel * (int64_t)sizeof(T) / tiles : 0;
    for (int64_t r = 0; r < m; r += kRows) {
      // weights lie in the order they are read: each tile fetches its share of the next block, which else would start cold
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + r / kRows * share + i, 0, 2);
      tile_rows((int)std::min<int64_t>(kRows, m - r), panels * kPanel, len, x.at(row0 + r, k0), x.row_stride, x.k_stride,
                weight + k0 * kPanel, from, c + r * kPanel, to, k0 > 0);
    }
  }
}

// Calls use(row0, rows, panel index, values [rows][32]) for every block of the product, from all threads; the epilogue.
template <class T, class Use>
static void for_each_block(const LinearArgs& a, const Use& use) {
  using A = RowElement<T>;
  const int64_t panels = (a.n + kPanel - 1) / kPanel, tiles = (a.m + kRows - 1) / kRows;
  const int64_t steps = (a.k + Rows<A>::width - 1) / Rows<A>::width;
  // Up to one tile of floats is read in place; else regrouped, because rows whose stride is a multiple of 4 KB would fall
  // into the same cache sets.
  const bool grouped = a.m > kRows || !std::is_same<A, float>::value;
  std::unique_ptr<A, decltype(&std::free)> buffer(nullptr, &std::free);
  if (grouped) {
    buffer.reset(static_cast<A*>(std::aligned_alloc(64, ((tiles * kRows * steps * 4 + 63) / 64) * 64)));
    if (!buffer) throw std::bad_alloc();
  }
  Rows<A> x{buffer.get(), a.k, 1, kRows, kRows * steps};  // [tile][step][kRows]
  if constexpr (std::is_same<A, float>::value)
    if (!grouped) x = Rows<A>{a.x, a.k, a.x_row, a.x_k, 0};
  const int64_t blocks = (a.m + kBlockM - 1) / kBlockM;
  const int threads = a.m * a.n * a.k < 65536 ? 1 : (int)std::min<int64_t>(a.threads, blocks * panels);
  (void)threads;
  const int64_t last_rows = (a.m - 1) % kRows + 1;
  const int64_t together = a.m <= 2 * kRows && (last_rows + 1) * 4 < REGISTERS ? 4 : 1;  // panels: for the last tile to be wide
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = DIFFPO_TEAM, rank = DIFFPO_RANK;
    if (grouped) {
      group_rows(a, buffer.get(), tiles * rank / team, tiles * (rank + 1) / team);
#pragma omp barrier
    }
    alignas(64) float values[kBlockM * kPanel];
    const int64_t first = blocks * panels * rank / team, last = blocks * panels * (rank + 1) / team;
    for (int64_t i = first, count; i < last; i += count) {
      const int64_t row0 = i / panels * kBlockM, p = i % panels, rows = std::min(kBlockM, a.m - row0);
      count = std::min({together, last - i, panels - p});
      panel_product(x, row0, rows, static_cast<const T*>(a.weight) + p * panel_size<T>(a.k), count, a.chain, values);
      for (int64_t j = 0; j < count; ++j) use(row0, rows, p + j, values + j * rows * kPanel, rank);
    }
  }
}

template <class T>
static void linear_typed(const LinearArgs& a) {
  for_each_block<T>(a, [&](int64_t row0, int64_t rows, int64_t p, const float* values, int64_t) {
    const int64_t col0 = p * kPanel, cols = std::min(kPanel, a.n - col0);
    for (int64_t r = 0; r < rows; ++r) {
      float* y = a.y + (row0 + r) * a.y_row + col0;
      const float* v = values + r * kPanel;
      if (a.accumulate)
        for (int64_t c = 0; c < cols; ++c) y[c] += v[c];
      else if (a.bias)
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
