// What the consistency loss does to a block of the vocabulary between its products (arXiv 2503.04240): logits become
// statistics of their rows, later gradients in place. A row's sums are taken in one order, whatever its neighbours are.

// exp that is zero where it underflows, so that 0 log 0 can be told apart
static inline Vec exp_or_zero(Vec x) { return select(x < splat(-87.3f), Vec{}, vexp(x)); }
static inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// With a soft-cap what is kept is t = tanh(z / cap), not s = cap * t: rounding the product would cost its slope 1 - t^2 what
// few digits it has where the cap saturates.
static inline Vec cap_slope(Vec t, float cap) { return cap > 0 ? (splat(1.f) - t) * (splat(1.f) + t) : splat(1.f); }
static inline float cap_gain(float cap) { return cap > 0 ? cap : 1.f; }

// The first `count` lanes of a vector; the others have probability 0.
static inline Vec load_logits(const float* p, int64_t count) {
  if (count >= W) return load(p);
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < count ? p[i] : -INFINITY;
  return load(lanes);
}
static inline void store_some(float* p, int64_t count, Vec v) {
  if (count >= W) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// Sum of term(first column, columns left), a vector per step; in short chains: one over a whole block would lose digits.
template <class Term>
static inline double sum_columns(int64_t count, const Term& term) {
  double sum = 0;
  for (int64_t start = 0; start < count; start += 16 * W) {
    Vec part{};
    for (int64_t c = start, end = std::min(count, start + 16 * W); c < end; c += W) part += term(c, count - c);
    sum += lane_sum(part);
  }
  return sum;
}

static inline float* gradient_of(const LossArgs& a, int64_t row) { return a.fresh + row * a.block; }
static inline float* logits_of(const LossArgs& a, int64_t row) {
  if (row < a.slot_rows) return a.slots + row * a.count;
  return row < a.kept_rows ? a.kept + (row - a.slot_rows) * a.v + a.first : a.fresh + row * a.block;
}

// Bias and the soft-cap's tanh, in place.
static void finish_logits(const LossArgs& a, int64_t row) {
  if (!a.bias && !(a.softcap > 0)) return;
  float* z = logits_of(a, row);
  for (int64_t c = 0; c < a.count; c += W) {
    Vec s = load_logits(z + c, a.count - c);
    if (a.bias) s += load_logits(a.bias + a.first + c, a.count - c);
    if (a.softcap > 0) s = vtanh(s / splat(a.softcap));
    store_some(z + c, a.count - c, s);
  }
}

static void row_statistics(const LossArgs& a, int64_t row) {
  finish_logits(a, row);
  const float* z = logits_of(a, row);
  LossState& state = a.state[row];
  if (row < a.targets && a.labels[row] >= a.first && a.labels[row] < a.first + a.count)
    state.picked = z[a.labels[row] - a.first];
  const float gain = cap_gain(a.softcap);
  Vec top = splat(-INFINITY);
  for (int64_t c = 0; c < a.count; c += W) top = larger(load_logits(z + c, a.count - c), top);
  const float kept_most = lane_max(top), most = kept_most * gain;
  if (a.stats && most > state.largest) state.best = (double)(a.first + (std::find(z, z + a.count, kept_most) - z));
  const float base = most == -INFINITY ? 0.f : most;  // -inf - -inf is not a number
  const auto sum = [&](float factor) {
    return sum_columns(a.count, [&](int64_t c, int64_t left) {
      return exp_or_zero((load_logits(z + c, left) * splat(gain) - splat(base)) * splat(factor));
    });
  };
  const double largest = std::max(state.largest, (double)most);
  const auto merged = [&](double before, double now, double factor) {
    if (largest == -INFINITY) return before + now;
    return before * (state.largest == -INFINITY ? 1 : std::exp((state.largest - largest) * factor)) +
           now * (most == -INFINITY ? 1 : std::exp((most - largest) * factor));
  };
  const float factor = 1 / a.temperature;
  state.sum = merged(state.sum, sum(1.f), 1);
  state.sum_tempered = factor == 1.f ? state.sum : merged(state.sum_tempered, sum(factor), factor);
  state.largest = largest;
}

// Log of a probability in two steps: one rounded normaliser of the size of the logits would cost a digit.
struct LogSoftmax {
  Vec gain, largest, factor, log_sum;
  LogSoftmax(const LossArgs& a, double top, double sum, float inverse_temperature)
      : gain(splat(cap_gain(a.softcap))), largest(splat(top == -INFINITY ? 0.f : (float)top)),
        factor(splat(inverse_temperature)), log_sum(splat((float)std::log(sum))) {}
  Vec operator()(Vec kept) const { return (kept * gain - largest) * factor - log_sum; }
};

static double row_entropy(const LossArgs& a, int64_t row) {
  const float* z = logits_of(a, row);
  const LogSoftmax log_softmax(a, a.state[row].largest, a.state[row].sum, 1.f);
  return -sum_columns(a.count, [&](int64_t c, int64_t left) {
    const Vec log_p = log_softmax(load_logits(z + c, left)), p = exp_or_zero(log_p);
    return select(p == Vec{}, p, p * log_p);
  });
}

// dL/dz of a draft row, and the block's share of its divergence.
static void draft_gradient(const LossArgs& a, int64_t row) {
  const int64_t teacher = a.teachers[row - a.targets];
  const LossState& theirs = a.state[teacher];
  LossState& own = a.state[row];
  if (a.stats) own.entropy += row_entropy(a, row);
  const float* z = logits_of(a, row);
  const float* z_teacher = logits_of(a, teacher);
  float* g = gradient_of(a, row);
  const float inverse = 1 / a.temperature;
  const LogSoftmax student(a, own.largest, own.sum_tempered, inverse), taught(a, theirs.largest, theirs.sum_tempered, inverse);
  const Vec scale = splat(a.scale[row] * a.temperature);
  const bool idle = a.scale[row] == 0;
  own.divergence += sum_columns(a.count, [&](int64_t c, int64_t left) {
    const Vec t = load_logits(z + c, left);
    const Vec log_q = student(t), log_p = taught(load_logits(z_teacher + c, left));
    const Vec q = exp_or_zero(log_q), p = exp_or_zero(log_p), difference = q - p;
    if (a.gradients) store_some(g + c, left, idle ? Vec{} : scale * difference * cap_slope(t, a.softcap));
    // q - p adds up to nothing, and makes each term the square of a small number where the streams agree: without it
    // the rounding of the two normalisers would be all there is
    return select(p == Vec{}, q, p * (log_p - log_q) + difference);
  });
}

static void target_gradient(const LossArgs& a, int64_t row) {
  LossState& own = a.state[row];
  if (a.stats) own.entropy += row_entropy(a, row);
  if (!a.gradients) return;
  const float* z = logits_of(a, row);
  float* g = gradient_of(a, row);
  if (a.scale[row] == 0) {  // no gradient, whatever the logits are
    std::memset(g, 0, a.count * sizeof(float));
    return;
  }
  const LogSoftmax log_softmax(a, own.largest, own.sum, 1.f);
  const Vec scale = splat(a.scale[row]);
  for (int64_t c = 0; c < a.count; c += W) {
    const Vec t = load_logits(z + c, a.count - c);
    store_some(g + c, a.count - c, scale * exp_or_zero(log_softmax(t)) * cap_slope(t, a.softcap));
  }
  const int64_t label = a.labels[row] - a.first;
  if (label >= 0 && label < a.count) g[label] -= a.scale[row] * cap_slope(splat((float)own.picked), a.softcap)[0];
}

static int loss_threads(const LossArgs& a) { return a.rows * a.count < 16384 ? 1 : a.threads; }

static void loss_statistics(const LossArgs& a) {
#pragma omp parallel for num_threads(loss_threads(a)) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) row_statistics(a, row);
}

// Draft rows first: a gradient may take the place of its row's logits, and they read their teachers' logits.
static void loss_gradient(const LossArgs& a) {
#pragma omp parallel num_threads(loss_threads(a))
  {
#pragma omp for schedule(static)
    for (int64_t row = a.kept_rows; row < a.rows; ++row) finish_logits(a, row);
#pragma omp for schedule(static)
    for (int64_t row = a.targets; row < a.rows; ++row) draft_gradient(a, row);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.targets; ++row) target_gradient(a, row);
  }
}
