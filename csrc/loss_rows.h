// What the consistency loss does to logits between its products. Rows of the batch lie side by side in vectors (48 of them in a
// panel [vocabulary][48]), so every step over the vocabulary is vertical: no lane ever needs its neighbour.

// exp that is zero where it underflows, so that 0 log 0 can be told apart
static inline Vec exp_or_zero(Vec x) { return select(x < splat(-87.3f), Vec{}, vexp(x)); }
static inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// With a soft-cap what is kept is t = tanh(z / cap), not s = cap * t: rounding the product would cost its slope 1 - t^2 what
// few digits it has where the cap saturates.
static inline Vec cap_slope(Vec t, float cap) { return cap > 0 ? (splat(1.f) - t) * (splat(1.f) + t) : splat(1.f); }
static inline float cap_gain(float cap) { return cap > 0 ? cap : 1.f; }

// Of one block of the vocabulary and one row; blocks are merged in their order, whoever computed them.
struct LossPartial {
  float *largest, *sum, *sum_tempered;  // [blocks][lanes]: maximum, sum of exp(s - largest), of exp((s - largest) / temperature)
  int32_t* best;                        // [blocks][lanes] index of the maximum, or null
};

// Bias and the soft-cap's tanh in place, then maximum and sums of exponentials of `count` entries of 16 lanes. z [count][48].
static void loss_statistics(float* z, int64_t count, const float* bias, float cap, float inverse_temperature, int64_t first,
                            float* largest, float* sum, float* sum_tempered, int32_t* best) {
  const Vec gain = splat(cap_gain(cap));
  for (int64_t lane = 0; lane < 16; lane += W) {
    Vec m = splat(-INFINITY);
    IVec at = IVec{} + (int32_t)first;
    for (int64_t v = 0; v < count; ++v) {
      Vec s = load(z + v * kStrip + lane);
      if (bias) s += splat(bias[v]);
      if (cap > 0) s = vtanh(s / splat(cap));
      if (bias || cap > 0) store(z + v * kStrip + lane, s);
      s *= gain;
      if (best) {
        const IVec raised = s > m;
        at = (raised & (IVec{} + (int32_t)(first + v))) | (~raised & at);
      }
      m = larger(s, m);
    }
    const Vec base = select(m == splat(-INFINITY), Vec{}, m);  // -inf - -inf is not a number
    Vec total{}, tempered{};
    for (int64_t v = 0; v < count; ++v) total += exp_or_zero(load(z + v * kStrip + lane) * gain - base);
    if (inverse_temperature != 1.f)
      for (int64_t v = 0; v < count; ++v)
        tempered += exp_or_zero((load(z + v * kStrip + lane) * gain - base) * splat(inverse_temperature));
    else
      tempered = total;
    store(largest + lane, m), store(sum + lane, total), store(sum_tempered + lane, tempered);
    if (best) std::memcpy(best + lane, &at, sizeof at);
  }
}

// Log of a sum of exponentials from its blocks: sums [blocks][lanes] of exp((s - largest) * factor).
static double merge_blocks(const float* largest, const float* sum, int64_t blocks, int64_t lanes, double factor) {
  double m = -INFINITY, total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (std::isnan(sum[b * lanes])) return NAN;
    m = std::max(m, (double)largest[b * lanes]);
  }
  if (m == -INFINITY) return -INFINITY;
  for (int64_t b = 0; b < blocks; ++b)
    if (largest[b * lanes] > -INFINITY) total += sum[b * lanes] * std::exp((largest[b * lanes] - m) * factor);
  return m * factor + std::log(total);
}

// What 16 rows carry through the second pass; arrays of 16.
struct Lanes {
  const float* lse;           // of s
  const float* lse_tempered;  // of s / temperature
  const float* scale;         // of the row's term; 0: no gradient
};

// dL/dz of 16 draft rows in place, and their share of the divergence. teacher(v, lane) gives what is kept of the teacher's logits.
template <class Teacher>
static void loss_draft_gradient(float* z, int64_t count, const Teacher& teacher, Lanes own, const float* teacher_lse,
                                float inverse_temperature, float cap, bool gradients, float* divergence, float* p_log_p) {
  const Vec factor = splat(inverse_temperature), gain = splat(cap_gain(cap));
  for (int64_t lane = 0; lane < 16; lane += W) {
    const Vec lse = load(own.lse_tempered + lane), their_lse = load(teacher_lse + lane);
    const Vec lse_plain = load(own.lse + lane), scale = load(own.scale + lane) / factor;
    const IVec idle = scale == Vec{};
    Vec sum{}, entropy{};
    for (int64_t v = 0; v < count; ++v) {
      const Vec t = load(z + v * kStrip + lane), s = t * gain;
      const Vec log_q = s * factor - lse, log_p = teacher(v, lane) * gain * factor - their_lse;
      const Vec q = exp_or_zero(log_q), p = exp_or_zero(log_p);
      const Vec difference = q - p;
      // q - p adds up to nothing, and makes each term the square of a small number where the streams agree: without it
      // the rounding of the two normalisers would be all there is
      sum += select(p == Vec{}, q, p * (log_p - log_q) + difference);
      if (p_log_p) {
        const Vec e = exp_or_zero(s - lse_plain);
        entropy += select(e == Vec{}, e, e * (s - lse_plain));
      }
      if (!gradients) continue;
      store(z + v * kStrip + lane, select(idle, Vec{}, scale * difference * cap_slope(t, cap)));
    }
    store(divergence + lane, sum);
    if (p_log_p) store(p_log_p + lane, entropy);
  }
}

// dL/dz of 16 target rows in place, but for the label's entry.
static void loss_target_gradient(float* z, int64_t count, Lanes own, float cap, bool gradients, float* p_log_p) {
  const Vec gain = splat(cap_gain(cap));
  for (int64_t lane = 0; lane < 16; lane += W) {
    const Vec lse = load(own.lse + lane), scale = load(own.scale + lane);
    const IVec idle = scale == Vec{};
    Vec entropy{};
    for (int64_t v = 0; v < count; ++v) {
      const Vec t = load(z + v * kStrip + lane), s = t * gain, p = exp_or_zero(s - lse);
      if (p_log_p) entropy += select(p == Vec{}, p, p * (s - lse));
      if (gradients) store(z + v * kStrip + lane, select(idle, Vec{}, scale * p * cap_slope(t, cap)));
    }
    if (p_log_p) store(p_log_p + lane, entropy);
  }
}
