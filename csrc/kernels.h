// The CPU kernels behind engine.kernels: plain C++ over raw pointers, no Torch headers, so that the extension is built
// without Torch and one build serves every Torch version. All tensors are row-major and float32 unless a comment says otherwise.
#pragma once
#include <cstdint>

namespace diffpo {

// Weights are packed as [ceil(N / 32)][K][32]: one panel holds 32 output columns, k-major, so that a product streams it
// once from front to back whatever the number of rows.
constexpr int64_t kPanel = 32;
// Positions in one page of the KV cache; equal to the panel width, because a page of K is a panel: [head_dim][32].
constexpr int64_t kPage = 32;

enum class WeightType : int { kFloat32 = 0, kBFloat16 = 1 };

struct LinearArgs {
  const float* x;      // [m, k]
  const void* weight;  // packed [ceil(n / 32)][k][32]
  const float* bias;   // [n] or null
  float* y;            // [m, n]; unused by linear_argmax
  int64_t m, n, k;
  WeightType weight_type;
  int threads;
};

struct ArgmaxArgs {
  float softcap;       // 0: none; else the values compared are softcap * tanh(z / softcap)
  int64_t* index;      // [m], -1 where every value of a row is NaN
  float* value;        // [m]
};

struct AttentionArgs {
  const float* q;            // [tokens, q_stride], heads side by side
  const float* k_cache;      // [pages, kv_heads, head_dim, 32]
  const float* v_cache;      // [pages, kv_heads, 32, v_stride]
  float* out;                // [tokens, heads * head_dim]
  const int32_t* block_table;  // [sequences, table_stride] page numbers
  const int32_t* row_start;    // [sequences + 1] first packed row of each sequence
  const int32_t* first_position;  // [sequences] position of that row
  int64_t sequences, table_stride, q_stride, heads, kv_heads, head_dim, v_stride;
  int64_t window;            // sliding window W: position p sees (p - W, p]; 0: everything before it
  float scale, softcap;      // softcap 0: none
  int threads;
};

struct RopeArgs {
  float* qkv;                // [tokens, (heads + 2 * kv_heads) * head_dim]; q is rotated in place
  const float* rotation;     // [positions, head_dim]: cos of the first half's angles, then sin
  const float* q_norm;       // [head_dim] or null (Qwen3)
  const float* k_norm;
  float* k_cache;            // as in AttentionArgs
  float* v_cache;
  const int64_t* position;   // [tokens]
  const int64_t* slot;       // [tokens] page * 32 + offset
  int64_t tokens, heads, kv_heads, head_dim, v_stride;
  float norm_eps;
  int threads;
};

// One group of rows of the consistency loss: target rows, and the draft rows that they teach.
struct LossArgs {
  const void* target_hidden;   // [m, d]
  const void* draft_hidden;    // [r, d]
  const void* weight;          // [v, d], as the hidden states float32 or bfloat16
  const float* bias;           // [v] or null
  const int64_t* target_rows;  // [targets] rows of target_hidden
  const int64_t* draft_rows;   // [drafts] rows of draft_hidden
  const int64_t* teachers;     // [drafts] indices into target_rows
  const int64_t* labels;       // [targets]
  const float* ce_scale;       // [targets] 0: no cross entropy
  const float* kl_scale;       // [drafts]
  float* cross_entropy;        // [m]; of this and what follows only the group's rows are written
  float* divergence;           // [r]
  void* grad_hidden_target;    // [m, d] or null
  void* grad_hidden_draft;     // [r, d] or null
  void* grad_weight;           // [v, d] or null
  float* grad_bias;            // [v] or null; added to
  float* lse;                  // [m + r] or null, then so are the next two
  float* entropy;              // [m + r]
  bool* agrees;                // [r]
  int64_t m, d, v, targets, drafts;
  int64_t stored_panels;       // panels of 48 rows whose logits are kept between the passes
  float softcap, temperature;  // softcap 0: none
  WeightType weight_type;
  bool accumulate;             // grad_weight is added to (float32 only), else overwritten
  int threads;
};

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*linear_argmax)(const LinearArgs&, const ArgmaxArgs&);
  void (*attention)(const AttentionArgs&);
  void (*rope_kv_write)(const RopeArgs&);
  // out = normalised(x (+ residual, which then holds the sum)) * weight, rows of length d
  void (*rms_norm)(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t d, float eps,
                   int threads);
  // out[r, i] = act(gate_up[r, i]) * gate_up[r, width + i]; gelu: tanh approximation, else SiLU
  void (*gated_activation)(const float* gate_up, float* out, int64_t rows, int64_t width, bool gelu, int threads);
  // Returns the bytes of workspace that it must have, and does no more where that is null.
  int64_t (*consistency_loss)(const LossArgs&, char* workspace);
};

const Kernels* kernels_portable();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif

// Layout changes; not worth a variant per instruction set.
void pack_weight(const void* source, void* packed, int64_t rows, int64_t k, int64_t row_offset, WeightType type, int threads);
void embed(const int64_t* ids, const void* packed, float* out, int64_t count, int64_t k, float scale, WeightType type);

}  // namespace diffpo
