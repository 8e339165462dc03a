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
