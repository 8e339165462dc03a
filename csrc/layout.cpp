#include "standard_headers.h"

namespace diffpo {

namespace {
// Where the weight of row r (of a panel's 32) and column i lies in the panel.
template <class T>
inline int64_t place(int64_t r, int64_t i) {
  return (i / kSideBySide<T> * kPanel + r) * kSideBySide<T> + i % kSideBySide<T>;
}

// What lies side by side at a time, and a cache line of each row at a time: the loss packs its weights anew in each pass.
template <class T>
void pack(const T* source, T* packed, int64_t rows, int64_t k, int64_t row_offset, int threads) {
  (void)threads;
  constexpr int64_t side = kSideBySide<T>;
  const int64_t first = row_offset / kPanel, last = (row_offset + rows + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = first; p < last; ++p) {
    const int64_t begin = std::max(p * kPanel, row_offset), end = std::min((p + 1) * kPanel, row_offset + rows);
    T* panel = packed + p * panel_size<T>(k);
    for (int64_t i = 0; i < k; i += kPanel) {
      const int64_t columns = std::min(kPanel, k - i), steps = columns / side;
      for (int64_t row = begin; row < end; ++row) {
        const T* s = source + (row - row_offset) * k + i;
        T* out = panel + place<T>(row % kPanel, i);
        for (int64_t j = 0; j < steps; ++j) std::memcpy(out + j * side * kPanel, s + side * j, side * sizeof *s);
        if (side * steps < columns) out[steps * side * kPanel] = s[side * steps], out[steps * side * kPanel + 1] = 0;
      }
    }
  }
}

// One step of a panel from as many rows of [k, n] as lie side by side; a missing second one is zeros.
void interleave(const float* first, const float*, float* out, int64_t columns) {
  std::memcpy(out, first, columns * sizeof *out);
}
void interleave(const uint16_t* first, const uint16_t* second, uint16_t* out, int64_t columns) {
  uint32_t pairs[kPanel] = {};
  if (second)
    for (int64_t c = 0; c < columns; ++c) pairs[c] = first[c] | (uint32_t)second[c] << 16;
  else
    for (int64_t c = 0; c < columns; ++c) pairs[c] = first[c];
  std::memcpy(out, pairs, sizeof pairs);
}

template <class T>
void pack_columns(const T* source, T* packed, int64_t k, int64_t n, int threads) {
  (void)threads;
  constexpr int64_t side = kSideBySide<T>;
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    T* out = packed + p * panel_size<T>(k);
    for (int64_t i = 0; i < k; i += side, out += side * kPanel) {
      const T* first = source + i * n + p * kPanel;
      interleave(first, i + 1 < k ? first + n : nullptr, out, std::min(kPanel, n - p * kPanel));
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
}  // namespace

void pack_transposed(const void* source, void* packed, int64_t k, int64_t n, WeightType type, int threads) {
  if (type == WeightType::kFloat32)
    pack_columns(static_cast<const float*>(source), static_cast<float*>(packed), k, n, threads);
  else
    pack_columns(static_cast<const uint16_t*>(source), static_cast<uint16_t*>(packed), k, n, threads);
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
