// The sparse plan of the consistency loss: what of dL/dlogits carries mass becomes lists of entries, one per row, and the
// two products with the gradient walk these lists. What is left out of a row is bounded by a share of the row's mass.

static inline Vec magnitude(Vec v) { return (Vec)((IVec)v & 0x7fffffff); }
static inline bool any_lane(IVec mask) {
  int32_t found = 0;
  for (int i = 0; i < W; ++i) found |= mask[i];
  return found != 0;
}

// How much of a row's mass lies in entries of which size; a size is an exponent and two bits of the mantissa. A lane has
// sums of its own, so that equal sizes side by side do not wait for each other.
class MassBySize {
 public:
  void clear() { std::memset(mass_, 0, sizeof(mass_)); }
  void add(Vec v) {
    const IVec bits = (IVec)magnitude(v), size = bits >> kShift;
    for (int i = 0; i < W; ++i) mass_[size[i]][i] += ((Vec)bits)[i];
  }
  double total() const {
    double sum = 0;
    for (int size = 0; size < kSizes; ++size) sum += of_size(size);
    return sum;
  }
  // Bits of the smallest magnitude to keep, the largest under which no more than `allowed` lies, and such that this mass
  // times the magnitude, the variance that stand-ins bring, is no more than `variance`. Never the bits of zero.
  int32_t threshold(double allowed, double variance) const {
    int32_t size = 0;
    for (double below = of_size(0); size < kSizes - 1; ++size, below += of_size(size))
      if (!(below <= allowed && below * smallest(size + 1) <= variance)) break;
    return std::max(size << kShift, 1);
  }

 private:
  static constexpr int kShift = 21, kSizes = 1 << 10;
  static float smallest(int32_t size) {
    const int32_t bits = size << kShift;
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    return magnitude;
  }
  double of_size(int size) const {
    double sum = 0;
    for (int i = 0; i < W; ++i) sum += mass_[size][i];
    return sum;
  }
  float mass_[kSizes][W];
};

// What a thread needs to filter its rows; the arrays are as long as a row, padded to whole vectors.
struct FilterSpace {
  explicit FilterSpace(int64_t v)
      : padded((v + W - 1) / W * W), gradient(padded), left_out(padded), left_out_share(padded), values(padded + 1),
        stand_in_values(padded), columns(padded + 1), stand_in_columns(padded) {}
  int64_t padded;
  std::vector<float> gradient, left_out, left_out_share, values, stand_in_values;
  std::vector<int32_t> columns, stand_in_columns;
  MassBySize sizes;
};

// A row's gradient, into the thread's space. The logits lie block by block, [rows, columns of the block] each.
static void row_gradient(const FilterArgs& a, int64_t row, FilterSpace& space) {
  LossArgs one = a.loss;
  one.block = 0;
  for (one.first = 0; one.first < one.v; one.first += a.loss.count) {
    one.count = std::min(a.loss.count, one.v - one.first);
    one.slots = a.loss.slots + one.first * one.rows;
    one.fresh = space.gradient.data() + one.first;
    row < one.targets ? target_gradient(one, row) : draft_gradient(one, row);
  }
}

struct Counts {
  int64_t kept, stand_ins;
};

// Entries of at least a magnitude, in the order of their columns; the others go to the sums of what is left out, and to
// stand-ins: left out entries add up, those above and those below zero apart, and where a sum has reached the smallest
// magnitude kept, the entry that it reached it with stands for all of them. Each lane has sums of its own.
static Counts split_row(const FilterArgs& a, int64_t row, int32_t threshold, float inverse_total, FilterSpace& space) {
  const float* g = space.gradient.data();
  float quantum;
  std::memcpy(&quantum, &threshold, sizeof(quantum));
  Vec mass{}, above{}, below{};
  Counts n{};
  for (int64_t c = 0; c < space.padded; c += W) {
    const Vec v = load(g + c);
    const IVec keep = (IVec)magnitude(v) >= threshold;
    const Vec out = select(keep, Vec{}, v), size = magnitude(out);
    mass += size, above += larger(out, Vec{}), below += larger(-out, Vec{});
    store(&space.left_out[c], load(&space.left_out[c]) + out);
    store(&space.left_out_share[c], load(&space.left_out_share[c]) + size * splat(inverse_total));
    const IVec full_above = above >= splat(quantum), full_below = below >= splat(quantum), full = full_above | full_below;
    if (!any_lane(keep | full)) continue;
    const Vec stand_in = select(full_above, above, Vec{}) - select(full_below, below, Vec{});
    above = select(full_above, Vec{}, above), below = select(full_below, Vec{}, below);
    for (int i = 0; i < W; ++i) {
      space.columns[n.kept] = space.stand_in_columns[n.stand_ins] = static_cast<int32_t>(c + i);
      space.values[n.kept] = v[i], space.stand_in_values[n.stand_ins] = stand_in[i];
      n.kept -= keep[i], n.stand_ins -= full[i];
    }
  }
  a.left_out_of_row[2 * row] = lane_sum(above) - lane_sum(below), a.left_out_of_row[2 * row + 1] = lane_sum(mass);
  return n;
}

static Counts filter_row(const FilterArgs& a, int64_t row, FilterSpace& space) {
  row_gradient(a, row, space);
  a.left_out_of_row[2 * row] = a.left_out_of_row[2 * row + 1] = 0;
  if (a.loss.scale[row] == 0) return {};
  const int64_t label = row < a.loss.targets ? a.loss.labels[row] : -1;
  float of_label = 0;
  if (label >= 0) std::swap(of_label, space.gradient[label]);  // the one-hot part is exact: outside the filter
  space.sizes.clear();
  double squares = double(of_label) * of_label;
  for (int64_t c = 0; c < space.padded; c += 16 * W) {
    Vec part{};
    for (int64_t i = c, end = std::min(space.padded, c + 16 * W); i < end; i += W) {
      const Vec v = load(&space.gradient[i]);
      space.sizes.add(v);
      part += v * v;
    }
    squares += lane_sum(part);
  }
  const double total = space.sizes.total() + std::fabs(of_label);
  // Sums in single precision: a margin far above their rounding. Without a finite mass everything is kept.
  const int32_t threshold = total < INFINITY ? space.sizes.threshold(a.eps * 0.999 * total, a.noise * a.noise * squares) : 1;
  Counts n = split_row(a, row, threshold, total > 0 ? static_cast<float>(1 / total) : 0.f, space);
  if (label >= 0) {
    const int64_t at = std::lower_bound(&space.columns[0], &space.columns[n.kept], label) - &space.columns[0];
    std::memmove(&space.columns[at + 1], &space.columns[at], (n.kept - at) * sizeof(int32_t));
    std::memmove(&space.values[at + 1], &space.values[at], (n.kept - at) * sizeof(float));
    space.columns[at] = static_cast<int32_t>(label), space.values[at] = of_label;
    ++n.kept;
  }
  return n;
}

// Rows are shared out evenly and in a fixed order: the sums over rows of what is left out do not depend on timing.
static void loss_filter(const FilterArgs& a) {
  const int64_t v = a.loss.v;
  const int threads = loss_threads(a.loss);
  std::vector<std::unique_ptr<FilterSpace>> spaces(threads);
  for (auto& space : spaces) space = std::make_unique<FilterSpace>(v);
  int64_t used = 0;
#pragma omp parallel num_threads(threads)
  {
    FilterSpace& space = *spaces[DIFFPO_RANK];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.loss.rows; ++i) {
      const int64_t row = a.order[i];
      const Counts n = filter_row(a, row, space);
      const int64_t count = n.kept + n.stand_ins;
      int64_t at;
#pragma omp atomic capture
      { at = used; used += count; }
      a.begin[row] = at, a.count[row] = n.kept, a.stand_ins[row] = n.stand_ins;
      if (at + count > a.capacity) continue;
      std::memcpy(a.columns + at, space.columns.data(), n.kept * sizeof(int32_t));
      std::memcpy(a.values + at, space.values.data(), n.kept * sizeof(float));
      at += n.kept;
      std::memcpy(a.columns + at, space.stand_in_columns.data(), n.stand_ins * sizeof(int32_t));
      std::memcpy(a.values + at, space.stand_in_values.data(), n.stand_ins * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < v; ++c) {
      a.left_out[c] = a.left_out_share[c] = 0;
      for (const auto& other : spaces) a.left_out[c] += other->left_out[c], a.left_out_share[c] += other->left_out_share[c];
    }
  }
  *a.used = used;
}

// out[0 : N * W] += sum of value * row, over entries; `stride` between rows.
template <int N>
static inline void add_rows(const int32_t* index, const float* value, int64_t count, const float* rows, int64_t stride, float* out) {
  Vec sum[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sum[n] = load(out + n * W);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + index[i] * stride;
    const Vec factor = splat(value[i]);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[n] += factor * load(row + n * W);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) store(out + n * W, sum[n]);
}

constexpr int kHeld = MAX_ROWS > 6 ? 16 : 8;  // vectors of a sum that stay in registers, with room for a factor

// The same for `width` columns.
static void add_rows(const int32_t* index, const float* value, int64_t count, const float* rows, int64_t stride, float* out, int64_t width) {
  int64_t c = 0;
  for (; c + kHeld * W <= width; c += kHeld * W) add_rows<kHeld>(index, value, count, rows + c, stride, out + c);
  for (; c + W <= width; c += W) add_rows<1>(index, value, count, rows + c, stride, out + c);
  for (; c < width; ++c)
    for (int64_t i = 0; i < count; ++i) out[c] += value[i] * rows[index[i] * stride + c];
}

struct Entries {
  const int32_t* index;
  const float* value;
  int64_t count;
};

static Entries entries_of(const SparseArgs& a, int64_t row) {
  const int32_t *first = a.columns + a.begin[row], *last = first + a.count[row];
  const int32_t* from = std::lower_bound(first, last, a.first);
  const int32_t* to = std::lower_bound(from, last, a.first + a.count_columns);
  return {from, a.values + (from - a.columns), to - from};
}

// out [rows, d] += G[:, block] head: one strip of the block's rows of the head after the other, small enough for the cache.
static void loss_sparse_hidden(const SparseArgs& a) {
  std::vector<Entries> entries(a.rows);
  const int64_t strips = (a.d + a.strip - 1) / a.strip;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = a.first_row; row < a.rows; ++row) entries[row] = entries_of(a, row);
#pragma omp for collapse(2) schedule(dynamic, 32)
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t row = a.first_row; row < a.rows; ++row) {
        const int64_t at = strip * a.strip, width = std::min(a.strip, a.d - at);
        const Entries& e = entries[row];
        if (e.count) add_rows(e.index, e.value, e.count, a.dense - a.first * a.d + at, a.d, a.out + row * a.d + at, width);
      }
  }
}

// Entries of the block by column, rows ascending.
struct ByColumn {
  std::vector<int64_t> end;
  std::vector<int32_t> row;
  std::vector<float> value;
  explicit ByColumn(const SparseArgs& a) : end(a.count_columns + 1) {
    std::vector<Entries> entries(a.rows);
    for (int64_t r = 0; r < a.rows; ++r) {
      entries[r] = entries_of(a, r);
      for (int64_t i = 0; i < entries[r].count; ++i) ++end[entries[r].index[i] - a.first + 1];
    }
    for (int64_t c = 0; c < a.count_columns; ++c) end[c + 1] += end[c];
    row.resize(end[a.count_columns]), value.resize(end[a.count_columns]);
    // end[c] is where column c begins; each entry moves it on
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t i = 0; i < entries[r].count; ++i) {
        const int64_t at = end[entries[r].index[i] - a.first]++;
        row[at] = static_cast<int32_t>(r), value[at] = entries[r].value[i];
      }
  }
  int64_t begin_of(int64_t column) const { return column ? end[column - 1] : 0; }
};

// out [count, d] (+)= G[:, block]^T hidden + left_out[block] x mean, and the same of the bias.
static void loss_sparse_head(const SparseArgs& a) {
  const ByColumn by(a);
  const int64_t strips = a.out ? (a.d + a.strip - 1) / a.strip : 0;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for collapse(2) schedule(dynamic, 32)
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t c = 0; c < a.count_columns; ++c) {
        const int64_t at = strip * a.strip, width = std::min(a.strip, a.d - at), begin = by.begin_of(c);
        const float* hidden = a.dense + strip * a.rows * a.strip;
        float* out = a.out + c * a.d + at;
        for (int64_t i = 0; i < width; ++i) out[i] = (a.accumulate ? out[i] : 0.f) + a.left_out[a.first + c] * a.mean[at + i];
        add_rows(&by.row[begin], &by.value[begin], by.end[c] - begin, hidden, a.strip, out, width);
      }
    if (a.bias) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < a.count_columns; ++c) {
        float sum = a.left_out[a.first + c];
        for (int64_t i = by.begin_of(c); i < by.end[c]; ++i) sum += by.value[i];
        a.bias[a.first + c] += sum;
      }
    }
  }
}
