#include "standard_headers.h"

namespace diffpo {

namespace {
// Where the weight of row r (of a panel's 32) and column i lies in the panel.
template <class T>
inline int64_t place(int64_t r, int64_t i) {
  return (i / kSideBySide<T> * kPanel + r) * kSideBySide<T> + i % kSideBySide<T>;
}

template <class T>
void pack(const T* source, T* packed, int64_t rows, int64_t k, int64_t row_offset, int threads) {
  (void)threads;
  const int64_t first = row_offset / kPanel, last = (row_offset + rows + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = first; p < last; ++p)
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t row = p * kPanel + c - row_offset;
      if (row < 0 || row >= rows) continue;
      const T* s = source + row * k;
      T* out = packed + p * panel_size<T>(k);
      for (int64_t i = 0; i < k; ++i) out[place<T>(c, i)] = s[i];
    }
}

// The same of 16 bits, a pair at a time and a cache line of each row at a time: the loss packs its weights anew in each pass.
void pack(const uint16_t* source, uint16_t* packed, int64_t rows, int64_t k, int64_t row_offset, int threads) {
  (void)threads;
  const int64_t first = row_offset / kPanel, last = (row_offset + rows + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = first; p < last; ++p) {
    const int64_t begin = std::max(p * kPanel, row_offset), end = std::min((p + 1) * kPanel, row_offset + rows);
    uint16_t* panel = packed + p * panel_size<uint16_t>(k);
    for (int64_t i = 0; i < k; i += kPanel) {
      const int64_t pairs = std::min(kPanel, k - i) / 2;
      for (int64_t row = begin; row < end; ++row) {
        const uint16_t* s = source + (row - row_offset) * k + i;
        uint16_t* out = panel + place<uint16_t>(row % kPanel, i);
        for (int64_t j = 0; j < pairs; ++j) std::memcpy(out + j * 2 * kPanel, s + 2 * j, 2 * sizeof *s);
        if (i + 2 * pairs + 1 == k) out[pairs * 2 * kPanel] = s[2 * pairs], out[pairs * 2 * kPanel + 1] = 0;
      }
    }
  }
}

inline float widen(float v) { return v; }
inline float widen(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
void gather(const int64_t* ids, const T* packed, float* out, int64_t count, int64_t k, float scale) {
  for (int64_t r = 0; r < count; ++r) {
    const T* s = packed + ids[r] / kPanel * panel_size<T>(k);
    for (int64_t i = 0; i < k; ++i) out[r * k + i] = widen(s[place<T>(ids[r] % kPanel, i)]) * scale;
  }
}
inline uint32_t interleaved(const uint16_t* first, const uint16_t* second) { return *first | (uint32_t)*second << 16; }
}  // namespace

static void pack_transposed(const float* source, float* packed, int64_t k, int64_t n, int threads) {
  (void)threads;
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t columns = std::min(kPanel, n - p * kPanel);
    float* out = packed + p * panel_size<float>(k);
    for (int64_t i = 0; i < k; ++i, out += kPanel) std::memcpy(out, source + i * n + p * kPanel, columns * sizeof *out);
  }
}

static void pack_transposed(const uint16_t* source, uint16_t* packed, int64_t k, int64_t n, int threads) {
  (void)threads;
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t columns = std::min(kPanel, n - p * kPanel);
    uint16_t* out = packed + p * panel_size<uint16_t>(k);
    for (int64_t i = 0; i < k; i += 2, out += 2 * kPanel) {
      const uint16_t* first = source + i * n + p * kPanel;
      uint32_t pairs[kPanel] = {};
      if (i + 1 < k)
        for (int64_t c = 0; c < columns; ++c) pairs[c] = interleaved(first + c, first + n + c);
      else
        for (int64_t c = 0; c < columns; ++c) pairs[c] = first[c];
      std::memcpy(out, pairs, sizeof pairs);
    }
  }
}

void pack_transposed(const void* source, void* packed, int64_t k, int64_t n, WeightType type, int threads) {
  if (type == WeightType::kFloat32)
    pack_transposed(static_cast<const float*>(source), static_cast<float*>(packed), k, n, threads);
  else
    pack_transposed(static_cast<const uint16_t*>(source), static_cast<uint16_t*>(packed), k, n, threads);
}

void pack_weight(const void* source, void* packed, int64_t rows, int64_t k, int64_t row_offset, WeightType type,
                 int threads) {
  if (type == WeightType::kFloat32)
    pack(static_cast<const float*>(source), static_cast<float*>(packed), rows, k, row_offset, threads);
  else
    pack(static_cast<const uint16_t*>(source), static_cast<uint16_t*>(packed), rows, k, row_offset, threads);
}

void embed(const int64_t* ids, const void* packed, float* out, int64_t count, int64_t k, float scale, WeightType type) {
  if (type == WeightType::kFloat32)
    gather(ids, static_cast<const float*>(packed), out, count, k, scale);
  else
    gather(ids, static_cast<const uint16_t*>(packed), out, count, k, scale);
}

}  // namespace diffpo
