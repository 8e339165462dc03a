// Cross entropy of target rows + KL of draft rows and all gradients, for one group of rows (arXiv 2503.04240). Two passes over the
// vocabulary: logits and their statistics, then gradients. Logits of the first `stored` panels of rows are kept between the
// passes, those of the others are computed again: what is kept decides the memory, and 6 units of work become up to 8.

constexpr int64_t kSub = 128;         // vocabulary rows of one task
constexpr int64_t kLossBlock = 1024;  // vocabulary rows whose gradients are complete before the next ones start
constexpr int64_t kDepth = 4;         // panels (of 48) of the inner dimension between two visits of a result

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes, and where everything lies in the workspace.
struct LossPlan {
  int64_t target_lanes, lanes, panels, stored, strips, block, blocks, subs, threads;
  float *h_by_row, *h_by_column, *w, *kept, *fresh, *dh, *stats, *rows;
  int64_t bytes;

  LossPlan(const LossArgs& a, char* base) {
    target_lanes = ceil_div(a.targets, 16) * 16;
    lanes = target_lanes + ceil_div(a.drafts, 16) * 16;
    panels = ceil_div(lanes, kStrip), stored = std::min(a.stored_panels, panels), strips = ceil_div(a.d, kStrip);
    block = ceil_div(ceil_div(a.v, ceil_div(a.v, kLossBlock)), 8) * 8;
    blocks = ceil_div(a.v, block), subs = ceil_div(block, kSub), threads = a.threads;
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      float* p = reinterpret_cast<float*>(base + at);
      at += ceil_div(floats * 4, 256) * 256;
      return p;
    };
    const bool gradients = a.grad_hidden_target || a.grad_hidden_draft || a.grad_weight;
    const int64_t two_blocks = std::max(2 * block, threads * kSub);
    h_by_row = take(panels * a.d * kStrip);
    h_by_column = take(a.grad_weight ? strips * panels * kStrip * kStrip : 0);
    w = take(strips * (gradients || stored < panels ? two_blocks : threads * kSub) * kStrip);
    kept = take(blocks * stored * block * kStrip);
    fresh = take((panels - stored) * two_blocks * kStrip);
    dh = take(gradients ? panels * kStrip * strips * kStrip : 0);
    stats = take(4 * blocks * subs * panels * kStrip);
    rows = take(8 * panels * kStrip);
    bytes = at;
  }
  int64_t width(int64_t panel) const { return std::min(kStrip, lanes - panel * kStrip); }
};

template <class T>
class LossPass {
 public:
  LossPass(const LossArgs& a, char* workspace) : a_(a), p_(a, workspace) {
    const int64_t n = p_.panels * kStrip;
    lse_ = p_.rows, lse_tempered_ = lse_ + n, scale_ = lse_tempered_ + n, teacher_lse_ = scale_ + n, picked_ = teacher_lse_ + n;
    const int64_t cells = p_.blocks * p_.subs * n;
    partial_ = {p_.stats, p_.stats + cells, p_.stats + 2 * cells, a.entropy ? (int32_t*)(p_.stats + 3 * cells) : nullptr};
    tempered_ = a.temperature != 1.f;
    gradients_ = a.grad_hidden_target || a.grad_hidden_draft || a.grad_weight || a.grad_bias;
  }

  void run() {
    for (int64_t i = 0; i < p_.panels * kStrip; ++i) scale_[i] = 0, teacher_lse_[i] = 0, picked_[i] = 0;
    for (int64_t i = 0; i < a_.targets; ++i) scale_[i] = a_.ce_scale[i];
    for (int64_t i = 0; i < a_.drafts; ++i) scale_[p_.target_lanes + i] = a_.kl_scale[i];
    std::vector<int64_t> counters(p_.blocks + 5, 0);
    const int64_t tasks = p_.blocks * p_.subs;
#pragma omp parallel num_threads(a_.threads)
    {
      const int64_t rank = DIFFPO_RANK;
      each(counters[0], p_.panels, [&](int64_t t) { pack_hidden(t); });
#pragma omp barrier
      each(counters[1], tasks, [&](int64_t t) { first_pass(t / p_.subs, t % p_.subs, rank); });
#pragma omp barrier
      each(counters[2], p_.panels, [&](int64_t t) { merge(t); });
#pragma omp barrier
      each(counters[3], 1, [&](int64_t) { find_teachers(); });
      if (gradients_ && (a_.grad_hidden_target || a_.grad_hidden_draft))
        for (int64_t i = p_.panels * rank / DIFFPO_TEAM * kStrip; i < p_.panels * (rank + 1) / DIFFPO_TEAM * kStrip; ++i)
          std::memset(p_.dh + i * p_.strips * kStrip, 0, p_.strips * kStrip * 4);
#pragma omp barrier
      for (int64_t b = 0; b <= p_.blocks; ++b) {
        second_pass(b, counters[4 + b]);
#pragma omp barrier
      }
    }
    finish();
  }

 private:
  template <class Task>
  static void each(int64_t& counter, int64_t count, const Task& task) {
    // tasks write to places of their own: who takes which changes nothing but the time
    for (int64_t t; (t = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED)) < count;) task(t);
  }

  const T* hidden(int64_t lane) const {
    if (lane < p_.target_lanes)
      return lane < a_.targets ? static_cast<const T*>(a_.target_hidden) + a_.target_rows[lane] * a_.d : nullptr;
    const int64_t i = lane - p_.target_lanes;
    return i < a_.drafts ? static_cast<const T*>(a_.draft_hidden) + a_.draft_rows[i] * a_.d : nullptr;
  }

  void pack_hidden(int64_t panel) {
    float* out = p_.h_by_row + panel * a_.d * kStrip;
    for (int64_t j = 0; j < kStrip; ++j) {
      const int64_t lane = panel * kStrip + j;
      const T* in = lane < p_.lanes ? hidden(lane) : nullptr;
      for (int64_t i = 0; i < a_.d; ++i) out[i * kStrip + j] = in ? widen(in[i]) : 0.f;
      if (!a_.grad_weight) continue;
      if (in) pack_row(in, a_.d, p_.h_by_column, p_.panels * kStrip, lane);
      else
        for (int64_t q = 0; q < p_.strips; ++q)
          std::memset(p_.h_by_column + (q * p_.panels * kStrip + lane) * kStrip, 0, kStrip * 4);
    }
  }

  int64_t block_rows(int64_t b) const { return std::min(p_.block, a_.v - b * p_.block); }

  void pack_weight_rows(int64_t first, int64_t count, float* out, int64_t panel_rows) {
    for (int64_t i = 0; i < count; ++i)
      pack_row(static_cast<const T*>(a_.weight) + (first + i) * a_.d, a_.d, out, panel_rows, i);
  }

  // Logits [rows rounded up to tiles][48] of one panel of rows of the batch.
  void logits(int64_t panel, int64_t rows, const float* w, int64_t panel_rows, float* z) {
    const float* h = p_.h_by_row + panel * a_.d * kStrip;
    for (int64_t q = 0; q < p_.strips; q += kDepth) {
      const int64_t k = std::min(a_.d - q * kStrip, kDepth * kStrip);
      loss_product<kStrip, 1>(ceil_div(rows, kTileRows) * kTileRows, p_.width(panel), k,
                              Broadcast{w + q * panel_rows * kStrip, kStrip, panel_rows * kStrip}, h + q * kStrip * kStrip, z,
                              kStrip, q > 0);
    }
  }

  float* kept(int64_t b, int64_t panel) { return p_.kept + (b * p_.stored + panel) * p_.block * kStrip; }
  float* second_pass_logits(int64_t b, int64_t panel) {
    if (panel < p_.stored) return kept(b, panel);
    return p_.fresh + ((b % 2) * (p_.panels - p_.stored) + panel - p_.stored) * p_.block * kStrip;
  }
  float* second_pass_weight(int64_t b) { return p_.w + (b % 2) * p_.strips * p_.block * kStrip; }
  int64_t cell(int64_t b, int64_t sub, int64_t panel) const { return ((b * p_.subs + sub) * p_.panels + panel) * kStrip; }

  void first_pass(int64_t b, int64_t sub, int64_t rank) {
    const int64_t start = sub * kSub, rows = std::min(kSub, block_rows(b) - start), first = b * p_.block + start;
    if (rows <= 0) {
      for (int64_t i = cell(b, sub, 0); i < cell(b, sub, p_.panels); ++i)
        partial_.largest[i] = -INFINITY, partial_.sum[i] = partial_.sum_tempered[i] = 0;
      return;
    }
    float* w = p_.w + rank * p_.strips * kSub * kStrip;
    pack_weight_rows(first, rows, w, kSub);
    for (int64_t panel = 0; panel < p_.panels; ++panel) {
      float* z = panel < p_.stored ? kept(b, panel) + start * kStrip : p_.fresh + rank * kSub * kStrip;
      logits(panel, rows, w, kSub, z);
      for (int64_t lane = 0; lane < p_.width(panel); lane += 16) {
        const int64_t at = cell(b, sub, panel) + lane;
        loss_statistics(z + lane, rows, a_.bias ? a_.bias + first : nullptr, a_.softcap, 1 / a_.temperature, first,
                        partial_.largest + at, partial_.sum + at, partial_.sum_tempered + at,
                        partial_.best ? partial_.best + at : nullptr);
      }
      for (int64_t lane = panel * kStrip; lane < std::min(a_.targets, (panel + 1) * kStrip); ++lane)
        if (a_.labels[lane] >= first && a_.labels[lane] < first + rows)
          picked_[lane] = z[(a_.labels[lane] - first) * kStrip + lane - panel * kStrip];
    }
  }

  void merge(int64_t panel) {
    const int64_t n = p_.panels * kStrip, blocks = p_.blocks * p_.subs;
    for (int64_t lane = panel * kStrip; lane < panel * kStrip + p_.width(panel); ++lane) {
      lse_[lane] = (float)merge_blocks(partial_.largest + lane, partial_.sum + lane, blocks, n, 1.0);
      lse_tempered_[lane] = tempered_ ? (float)merge_blocks(partial_.largest + lane, partial_.sum_tempered + lane, blocks, n,
                                                            1.0 / a_.temperature) : lse_[lane];
      if (!partial_.best) continue;
      int64_t best = lane;  // of the blocks: the first one with the largest value
      for (int64_t i = lane; i < blocks * n; i += n)
        if (partial_.largest[i] > partial_.largest[best]) best = i;
      best_[lane] = partial_.best[best];
    }
  }

  // Once all rows are merged. The blocks' statistics are used up: their place takes the second pass's sums.
  void find_teachers() {
    for (int64_t i = 0; i < a_.drafts; ++i) teacher_lse_[p_.target_lanes + i] = lse_tempered_[a_.teachers[i]];
  }

  void second_pass(int64_t b, int64_t& counter) {
    // The block before is consumed while this one is prepared: threads wait for each other once per block.
    const bool consume = b > 0 && gradients_, prepare = b < p_.blocks;
    const int64_t columns = consume && (a_.grad_hidden_target || a_.grad_hidden_draft) ? p_.strips : 0;
    const int64_t outer = consume && a_.grad_weight ? p_.subs : 0, fresh = prepare ? p_.subs : 0;
    each(counter, columns + outer + fresh, [&](int64_t t) {
      if (t < outer) weight_gradient(b - 1, t);
      else if (t < outer + columns) hidden_gradient(b - 1, t - outer);
      else prepare_block(b, t - outer - columns);
    });
  }

  void prepare_block(int64_t b, int64_t sub) {
    const int64_t start = sub * kSub, rows = std::min(kSub, block_rows(b) - start), first = b * p_.block + start;
    if (rows <= 0) return;
    const bool again = p_.stored < p_.panels;
    float* w = second_pass_weight(b) + start * kStrip;
    if (again || (gradients_ && (a_.grad_hidden_target || a_.grad_hidden_draft))) pack_weight_rows(first, rows, w, p_.block);
    for (int64_t panel = p_.stored; panel < p_.panels; ++panel) {
      float* z = second_pass_logits(b, panel) + start * kStrip;
      logits(panel, rows, w, p_.block, z);
      if (a_.bias || a_.softcap > 0) cap_logits(z, rows, p_.width(panel), a_.bias ? a_.bias + first : nullptr);
    }
    for (int64_t lane = p_.target_lanes; lane < p_.lanes; lane += 16) draft_lanes(b, start, rows, lane, cell(b, sub, 0));
    if (gradients_ || partial_.best)
      for (int64_t lane = 0; lane < p_.target_lanes; lane += 16) target_lanes(b, start, rows, lane, cell(b, sub, 0));
    if (a_.grad_bias) bias_gradient(b, start, rows, first);
  }

  void cap_logits(float* z, int64_t rows, int64_t width, const float* bias) {
    for (int64_t v = 0; v < rows; ++v)
      for (int64_t lane = 0; lane < width; lane += W) {
        float* at = z + v * kStrip + lane;
        Vec s = load(at);
        if (bias) s += splat(bias[v]);
        if (a_.softcap > 0) s = vtanh(s / splat(a_.softcap));
        store(at, s);
      }
  }

  const float* at(int64_t b, int64_t start, int64_t lane) {
    return second_pass_logits(b, lane / kStrip) + start * kStrip + lane % kStrip;
  }

  Lanes lanes(int64_t lane) const { return Lanes{lse_ + lane, lse_tempered_ + lane, scale_ + lane}; }

  void draft_lanes(int64_t b, int64_t start, int64_t rows, int64_t lane, int64_t cells) {
    const int64_t i = lane - p_.target_lanes, count = std::min<int64_t>(16, a_.drafts - i);
    const float* source[16];
    bool side_by_side = true;
    for (int64_t j = 0; j < 16; ++j) {
      source[j] = at(b, start, a_.teachers[i + std::min(j, count - 1)]);
      side_by_side &= j >= count || source[j] == source[0] + j;
    }
    side_by_side &= a_.teachers[i] % kStrip <= kStrip - 16;
    float* z = const_cast<float*>(at(b, start, lane));
    float* divergence = partial_.sum + cells + lane;
    float* entropy = partial_.best ? partial_.sum_tempered + cells + lane : nullptr;
    const auto call = [&](const auto& teacher) {
      loss_draft_gradient(z, rows, teacher, lanes(lane), teacher_lse_ + lane, 1 / a_.temperature, a_.softcap, gradients_,
                          divergence, entropy);
    };
    if (side_by_side) call([&](int64_t v, int64_t l) { return load(source[0] + v * kStrip + l); });
    else
      call([&](int64_t v, int64_t l) {
        Vec s;
        for (int64_t j = 0; j < W; ++j) s[j] = source[l + j][v * kStrip];
        return s;
      });
  }

  void target_lanes(int64_t b, int64_t start, int64_t rows, int64_t lane, int64_t cells) {
    float* z = const_cast<float*>(at(b, start, lane));
    loss_target_gradient(z, rows, lanes(lane), a_.softcap, gradients_,
                         partial_.best ? partial_.sum_tempered + cells + lane : nullptr);
    const int64_t first = b * p_.block + start;
    for (int64_t i = lane; gradients_ && i < std::min(a_.targets, lane + 16); ++i) {
      if (a_.labels[i] < first || a_.labels[i] >= first + rows || scale_[i] == 0) continue;
      z[(a_.labels[i] - first) * kStrip + i - lane] -= scale_[i] * cap_slope(splat(picked_[i]), a_.softcap)[0];
    }
  }

  void bias_gradient(int64_t b, int64_t start, int64_t rows, int64_t first) {
    for (int64_t v = 0; v < rows; ++v) {
      Vec sum{};
      for (int64_t lane = 0; lane < p_.lanes; lane += W) sum += load(at(b, start + v, lane));
      a_.grad_bias[first + v] += lane_sum(sum);
    }
  }

  // grad_weight[rows of the block] (+)= G^T h for 128 rows: complete over the batch, so rounded once.
  void weight_gradient(int64_t b, int64_t sub) {
    const int64_t start = sub * kSub, rows = std::min(kSub, block_rows(b) - start);
    if (rows <= 0) return;
    alignas(64) float sum[kSub * kStrip];
    T* out = static_cast<T*>(a_.grad_weight) + (b * p_.block + start) * a_.d;
    const int64_t padded = ceil_div(rows, kTileRows) * kTileRows;
    for (int64_t q = 0; q < p_.strips; ++q) {
      const int64_t width = std::min(kStrip, a_.d - q * kStrip);
      if (a_.accumulate)
        for (int64_t v = 0; v < rows; ++v)
          for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(out + v * a_.d + q * kStrip + i, 1, 2);
      const float* h = p_.h_by_column + q * p_.panels * kStrip * kStrip;
      for (int64_t panel = 0; panel < p_.panels;) {
        const int64_t end = std::min(panel < p_.stored ? p_.stored : p_.panels, panel + kDepth);
        const int64_t k = std::min(end * kStrip, p_.lanes) - panel * kStrip;
        loss_product<kStrip, 1>(padded, ceil_div(width, 16) * 16, k,
                                Broadcast{second_pass_logits(b, panel) + start * kStrip, kStrip, p_.block * kStrip},
                                h + panel * kStrip * kStrip, sum, kStrip, panel > 0);
        panel = end;
      }
      for (int64_t v = 0; v < rows; ++v) add_row(sum + v * kStrip, width, out + v * a_.d + q * kStrip);
    }
  }

  void add_row(const float* sum, int64_t width, float* out) const {
    if (a_.accumulate)
      for (int64_t i = 0; i < width; ++i) out[i] += sum[i];
    else
      std::memcpy(out, sum, width * 4);
  }
  void add_row(const float* sum, int64_t width, uint16_t* out) const {
    for (int64_t i = 0; i < width; ++i) narrow(sum[i], out + i);
  }

  // dh[:, 48 columns] += G W over the rows of one block.
  void hidden_gradient(int64_t b, int64_t q) {
    const int64_t rows = block_rows(b), width = ceil_div(std::min(kStrip, a_.d - q * kStrip), 16) * 16;
    const int64_t ld = p_.strips * kStrip, first = a_.grad_hidden_target ? 0 : p_.target_lanes;
    const int64_t last = a_.grad_hidden_draft ? p_.lanes : p_.target_lanes;
    const float* w = second_pass_weight(b) + q * p_.block * kStrip;
    for (int64_t v = 0; v < rows; v += kDepth * kStrip) {
      const int64_t k = std::min(rows - v, kDepth * kStrip);
      for (int64_t lane = first; lane < last;) {
        const int64_t end = std::min(last, (lane / kStrip + 1) * kStrip);
        loss_product<1, kStrip>(end - lane, width, k, Broadcast{at(b, v, lane), k, 0}, w + v * kStrip,
                                p_.dh + lane * ld + q * kStrip, ld, true);
        lane = end;
      }
    }
  }

  void finish() {
    const int64_t n = p_.panels * kStrip, blocks = p_.blocks * p_.subs;
    for (int64_t lane = 0; lane < p_.lanes; ++lane) {
      const bool target = lane < p_.target_lanes;
      const int64_t i = target ? lane : lane - p_.target_lanes;
      if (i >= (target ? a_.targets : a_.drafts)) continue;
      const int64_t row = target ? a_.target_rows[i] : a_.draft_rows[i], place = target ? row : a_.m + row;
      if (target) a_.cross_entropy[row] = scale_[lane] != 0 ? lse_[lane] - picked_[lane] * cap_gain(a_.softcap) : 0.f;
      else a_.divergence[row] = (float)(total(partial_.sum + lane, blocks, n) * a_.temperature * a_.temperature);
      if (a_.entropy) {
        a_.lse[place] = lse_[lane], a_.entropy[place] = (float)-total(partial_.sum_tempered + lane, blocks, n);
        if (!target) a_.agrees[row] = best_[lane] == best_[a_.teachers[i]];
      }
      void* grad = target ? a_.grad_hidden_target : a_.grad_hidden_draft;
      if (!grad) continue;
      const float* from = p_.dh + lane * p_.strips * kStrip;
      T* to = static_cast<T*>(grad) + row * a_.d;
      for (int64_t k = 0; k < a_.d; ++k) narrow(from[k], to + k);
    }
  }

  static double total(const float* values, int64_t count, int64_t stride) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i * stride];
    return sum;
  }

  const LossArgs& a_;
  const LossPlan p_;
  LossPartial partial_;
  float *lse_, *lse_tempered_, *scale_, *teacher_lse_, *picked_;
  std::vector<int32_t> best_ = std::vector<int32_t>(p_.panels * kStrip);
  bool tempered_, gradients_;
};

// Panels are walked across many pages at a time: with small ones translations miss. Only a wish, where it is known at all.
static void prefer_large_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, first = ((uintptr_t)start + page - 1) & ~(page - 1);
  if (bytes > (1 << 22)) madvise(reinterpret_cast<void*>(first), ((uintptr_t)start + bytes - first) & ~(page - 1), MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

// With a null workspace: only the bytes that it must have.
static int64_t consistency_loss(const LossArgs& a, char* workspace) {
  const int64_t bytes = LossPlan(a, nullptr).bytes;
  if (!workspace) return bytes;
  prefer_large_pages(workspace, bytes);
  if (a.grad_weight && !a.accumulate)
    prefer_large_pages(a.grad_weight, a.v * a.d * (a.weight_type == WeightType::kFloat32 ? 4 : 2));
  a.weight_type == WeightType::kFloat32 ? LossPass<float>(a, workspace).run() : LossPass<uint16_t>(a, workspace).run();
  return bytes;
}
