// Vectors of floats through the compilers' vector extension: the same source gives AVX-512, AVX2, SSE2 or NEON code.
// Included once per instruction set, after its target pragma, inside an anonymous namespace: nothing here may be shared.

typedef float Vec __attribute__((vector_size(VEC_WIDTH * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(VEC_WIDTH * 4), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(VEC_WIDTH * 4), aligned(2), may_alias));
constexpr int W = VEC_WIDTH;

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
static inline Vec splat(float v) { return v - Vec{}; }
static inline Vec select(IVec mask, Vec a, Vec b) { return (Vec)((mask & (IVec)a) | (~mask & (IVec)b)); }

// Of W pairs of bfloat16 the first ones, and the second ones.
static inline Vec first_of_pairs(const uint16_t* p) { return (Vec)(*reinterpret_cast<const UVec*>(p) << 16); }
static inline Vec second_of_pairs(const uint16_t* p) { return (Vec)(*reinterpret_cast<const UVec*>(p) & 0xffff0000u); }

static inline Vec load_pairs(const uint16_t* p) { return (Vec)*reinterpret_cast<const UVec*>(p); }

// Rounded to the nearest, ties to even, as PyTorch does.
static inline uint32_t bfloat16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
static inline uint32_t to_pair(float first, float second) { return bfloat16_bits(first) | bfloat16_bits(second) << 16; }

// Sums and maxima go over the lanes in one fixed order: a row's result never depends on its neighbours.
static inline float lane_sum(Vec v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}
static inline float lane_max(Vec v) {
  float s = v[0];
  for (int i = 1; i < W; ++i) s = v[i] > s ? v[i] : s;
  return s;
}

// exp to about 2 ulp for -87.3 < x < 88.3, clamped below, inf above (range reduction by ln 2 in two parts, degree-6 polynomial as in Cephes' expf).
static inline Vec vexp(Vec x) {
  x = select(x < splat(-87.3f), splat(-87.3f), x);
  x = select(x > splat(88.7f), splat(88.7f), x);
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec n = (x * splat(1.44269504088896341f) + magic) - magic;
  Vec r = x - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.f);
  IVec e = (__builtin_convertvector(n, IVec) + 127) << 23;
  return p * (Vec)e;
}

// tanh: odd Taylor polynomial near zero, where 1 - exp(-2x) cancels; through exp elsewhere.
static inline Vec vtanh(Vec x) {
  Vec a = (Vec)((IVec)x & 0x7fffffff);
  Vec e = vexp(a * splat(-2.f));
  Vec big = splat(1.f) - (e + e) / (splat(1.f) + e);  // near 1 only the subtraction rounds: 1 - tanh^2 has digits left
  Vec s = a * a;
  Vec p = splat(-1382.f / 155925.f);
  p = p * s + splat(62.f / 2835.f);
  p = p * s + splat(-17.f / 315.f);
  p = p * s + splat(2.f / 15.f);
  p = p * s + splat(-1.f / 3.f);
  Vec small = a + a * s * p;
  Vec t = select(a < splat(0.3f), small, big);
  return (Vec)((IVec)t | ((IVec)x & (int32_t)0x80000000));
}
