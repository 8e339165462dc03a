// Attention of packed query windows over a paged KV cache: causal, grouped-query, soft-capped, sliding window.
// A page of K is a packed panel, so both products are register tiles of gemm.h. Pages are visited in order from the
// first one, with an online softmax per row: what a row computes does not depend on the rows beside it.

struct AttentionTile {
  int64_t sequence, kv_head, row0, rows;  // rows count (position, head of the group) pairs, position-major
};

static std::vector<AttentionTile> attention_tiles(const AttentionArgs& a) {
  const int64_t group = a.heads / a.kv_heads;
  std::vector<AttentionTile> tiles;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t rows = (a.row_start[s + 1] - a.row_start[s]) * group;
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t r = 0; r < rows; r += kRows) tiles.push_back({s, h, r, std::min<int64_t>(kRows, rows - r)});
  }
  return tiles;
}

struct SoftmaxState {
  float* scores;       // [kRows][32]; becomes the unnormalised probabilities
  float max[kRows], sum[kRows];
};

// Turns one page's scores of a row into probabilities and returns the factor by which the row's earlier sums shrink.
static inline float softmax_page(SoftmaxState& st, int r, float softcap, int64_t first_valid, int64_t end_valid) {
  float* s = st.scores + r * kPage;
  alignas(64) static const int32_t lanes[kPage] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  if (end_valid <= first_valid) {
    std::memset(s, 0, kPage * sizeof(float));
    return 1.f;
  }
  Vec top = splat(-INFINITY);
  IVec keep[kPage / W];
  for (int64_t c = 0; c < kPage / W; ++c) {
    const IVec lane = *reinterpret_cast<const IVec*>(lanes + c * W);
    keep[c] = (IVec)(lane >= (int32_t)first_valid) & (IVec)(lane < (int32_t)end_valid);
    Vec v = load(s + c * W);
    if (softcap > 0) v = splat(softcap) * vtanh(v / splat(softcap));
    v = select(keep[c], v, splat(-INFINITY));
    top = select(v > top, v, top);
    store(s + c * W, v);
  }
  const float old_max = st.max[r], new_max = std::max(old_max, lane_max(top));
  Vec total = {};
  for (int64_t c = 0; c < kPage / W; ++c) {
    const Vec p = select(keep[c], vexp(load(s + c * W) - splat(new_max)), Vec{});
    total += p;
    store(s + c * W, p);
  }
  const float shrink = old_max == new_max ? 1.f : std::isinf(old_max) ? 0.f : vexp(splat(old_max - new_max))[0];
  st.max[r] = new_max;
  st.sum[r] = st.sum[r] * shrink + lane_sum(total);
  return shrink;
}

static void attend_tile(const AttentionArgs& a, const AttentionTile& t, float* q_tile, float* out_tile) {
  const int64_t group = a.heads / a.kv_heads, d = a.head_dim, dv = a.v_stride;
  const int64_t first_row = a.row_start[t.sequence], base = a.first_position[t.sequence];
  const int rows = (int)t.rows;
  alignas(64) float scores[kRows * kPage];
  SoftmaxState st{scores, {}, {}};
  int64_t position[kRows];
  const float* head_of[kRows];
  for (int r = 0; r < rows; ++r) {
    const int64_t token = (t.row0 + r) / group, head = t.kv_head * group + (t.row0 + r) % group;
    position[r] = base + token;
    head_of[r] = a.q + (first_row + token) * a.q_stride + head * d;
    for (int64_t i = 0; i < d; ++i) q_tile[i * kRows + r] = head_of[r][i] * a.scale;
    st.max[r] = -INFINITY;
  }
  std::memset(out_tile, 0, kRows * dv * sizeof(float));
  const int64_t last = position[rows - 1];
  const int64_t begin = a.window > 0 ? std::max<int64_t>(0, position[0] - a.window + 1) / kPage : 0;
  for (int64_t page = begin; page <= last / kPage; ++page) {
    const int64_t start = page * kPage, block = a.block_table[t.sequence * a.table_stride + page];
    const float* k_page = a.k_cache + (block * a.kv_heads + t.kv_head) * d * kPage;
    const float* v_page = a.v_cache + (block * a.kv_heads + t.kv_head) * kPage * dv;
    tile_rows(rows, kPage, d, q_tile, 1, kRows, k_page, SideBySide{kPage}, scores, SideBySide{kPage}, false);
    for (int r = 0; r < rows; ++r) {
      const int64_t first = a.window > 0 ? std::max<int64_t>(0, position[r] - a.window + 1 - start) : 0;
      const float shrink = softmax_page(st, r, a.softcap, first, std::min<int64_t>(kPage, position[r] + 1 - start));
      if (shrink != 1.f)
        for (int64_t i = 0; i < dv; i += W) store(out_tile + r * dv + i, load(out_tile + r * dv + i) * splat(shrink));
    }
    // A row takes V up to its own position: behind it lie guesses and what nobody has written, and 0 * NaN is NaN.
    for (int r = 0, end; r < rows; r = end) {
      const int64_t used = std::min<int64_t>(kPage, position[r] + 1 - start);
      for (end = r + 1; end < rows && std::min<int64_t>(kPage, position[end] + 1 - start) == used;) ++end;
      if (used <= 0) continue;
      const SideBySide place{dv};
      tile_rows(end - r, dv, used, scores + r * kPage, kPage, 1, v_page, place, out_tile + r * dv, place, true);
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* o = a.out + (head_of[r] - a.q) / a.q_stride * a.heads * d + (t.kv_head * group + (t.row0 + r) % group) * d;
    for (int64_t i = 0; i < d; ++i) o[i] = out_tile[r * dv + i] / st.sum[r];
  }
}

static void attention(const AttentionArgs& a) {
  const std::vector<AttentionTile> tiles = attention_tiles(a);
  const int64_t count = (int64_t)tiles.size();
  const int threads = count < 2 ? 1 : (int)std::min<int64_t>(a.threads, count);
  // allocated out here: an exception must not leave a parallel region
  const int64_t scratch = (a.head_dim + a.v_stride) * kRows;
  std::vector<float> buffers(threads * scratch);
#pragma omp parallel num_threads(threads)
  {
    float* q_tile = buffers.data() + DIFFPO_RANK * scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) attend_tile(a, tiles[i], q_tile, q_tile + a.head_dim * kRows);
  }
}
