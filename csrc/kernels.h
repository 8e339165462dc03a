// The CPU kernels behind engine.kernels: plain C++ over raw pointers, no Torch headers, so that the extension is built
// without Torch and one build serves every Torch version. All tensors are row-major and float32 unless a comment says otherwise.
#pragma once
#include <cstdint>

namespace diffpo {

// Weights are packed as [ceil(N / 32)][K][32]: one panel holds 32 output columns, k-major, so that a product streams it
// once from front to back whatever the number of rows. bfloat16 weights are packed in pairs of k,
// [ceil(N / 32)][ceil(K / 2)][32][2]: a pair is split into floats by a shift and a mask, less work than widening single weights.
constexpr int64_t kPanel = 32;
// Of type T: how many k lie side by side, and how long a panel is; an incomplete pair is filled up with a zero.
template <class T>
constexpr int64_t kSideBySide = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int64_t panel_size(int64_t k) {
  return (k + kSideBySide<T> - 1) / kSideBySide<T> * kSideBySide<T> * kPanel;
}
// Products that are added up in a row: 48 KB of a panel of floats, 18 KB of a tile of x, between the L1 and the L2 cache.
constexpr int64_t kChain = 384;
// Positions in one page of the KV cache; equal to the panel width, because a page of K is a panel: [head_dim][32].
constexpr int64_t kPage = 32;

enum class WeightType : int { kFloat32 = 0, kBFloat16 = 1 };

struct LinearArgs {
  const float* x;      // [m, k]
  const void* weight;  // packed, see kPanel
  const float* bias;   // [n] or null
  float* y;            // [m, n]; unused by linear_argmax
  int64_t m, n, k;
  int64_t x_row, x_k;  // from one row of x to the next, from one k to the next
  int64_t y_row;
  bool accumulate;     // y +=, without a bias
  int64_t chain;       // even; shorter ones round less
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
  const int64_t* slot;       // [tokens] page * 32 + offset; -1: not stored
  int64_t tokens, heads, kv_heads, head_dim, v_stride;
  float norm_eps;
  int threads;
};

// What a row of the consistency loss carries from block to block of the vocabulary; a line of the cache each.
struct alignas(64) LossState {
  double largest, sum, sum_tempered;  // logit; sums of exp(s - largest) and of exp((s - largest) / temperature)
  double picked;                      // what is kept of the label's logit
  double best;                        // index of the largest logit
  double divergence, entropy;         // of the second pass
  double unused;
};

// One block of logits of one group of rows: target rows, then the draft rows that they teach.
struct LossArgs {
  float* slots;             // [slot_rows, count] logits of the first rows, in the block's part of the head's gradient
  float* kept;              // [kept_rows - slot_rows, v] logits of the next rows
  float* fresh;             // [rows, block] of the last rows logits, in the second pass again as the product leaves them;
                            // after it of all rows the gradient
  const float* bias;        // [v] or null
  const int64_t* labels;    // [targets]
  const int64_t* teachers;  // [rows - targets] rows of the group; a row without a teacher, or equal to it, is its own
  const float* scale;       // [rows] of the row's term; 0: no gradient
  LossState* state;         // [rows]
  int64_t rows, targets, slot_rows, kept_rows, v, block;
  int64_t first, count;     // the block's columns
  float softcap, temperature;  // softcap 0: none
  bool gradients, stats;
  int threads;
};

// A group's logits, and the lists of entries to make of their gradient.
struct FilterArgs {
  LossArgs loss;            // its slots hold all logits, block by block of `count` columns
  const int64_t* order;     // [rows] in which rows are worked on: a draft next to its teacher, for the cache
  float eps;                // the share of a row's mass that may be left out
  float noise;              // what stand-ins may deviate from what they stand for, of the row's Euclidean norm
  int32_t* columns;         // [capacity] entries, those of a row side by side in ascending order
  float* values;
  int64_t capacity;
  int64_t* used;            // [1] entries of all rows; where that is more than the capacity, not all were stored
  int64_t* begin;           // [rows]
  int64_t* count;           // [rows] entries kept; behind them lie
  int64_t* stand_ins;       // [rows] entries that stand for those left out, where rows are not added up
  float* left_out_of_row;   // [rows, 2] sum of what is left out and not stood for; magnitudes of all that is left out
  float* left_out;          // [v] sum over rows of what is left out
  float* left_out_share;    // [v] of magnitudes, each relative to its row's mass
};

// A product of one block of the gradient's entries: with the head (gives the rows' gradient) or with the hidden states.
struct SparseArgs {
  const int32_t* columns;   // as in FilterArgs
  const float* values;
  const int64_t* begin;
  const int64_t* count;
  const float* dense;       // [count_columns, d] the block's rows of the head, or [strips, rows, strip] hidden states
  float* out;               // [rows, d] to add to, or [count_columns, d]; null in the second product: only the bias
  const float* left_out;    // [v], second product only; so are the rest of the pointers
  const float* mean;        // [d] hidden state that stands for all of which something was left out
  float* bias;              // [v] to add to, or null
  int64_t first_row, rows, d, strip;
  int64_t first, count_columns;  // the block's columns
  bool accumulate;
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
  void (*loss_statistics)(const LossArgs&);
  void (*loss_gradient)(const LossArgs&);
  void (*loss_filter)(const FilterArgs&);
  void (*loss_sparse_hidden)(const SparseArgs&);
  void (*loss_sparse_head)(const SparseArgs&);
};

const Kernels* kernels_portable();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#if __clang_major__ >= 9 || (!defined(__clang__) && __GNUC__ >= 10)
#define DIFFPO_AVX512_BF16 1
const Kernels* kernels_avx512_bf16();
#endif
#endif

// Layout changes; not worth a variant per instruction set.
void pack_weight(const void* source, void* packed, int64_t rows, int64_t k, int64_t row_offset, WeightType type, int threads);
// [k, n] -> the packed layout of its transpose
void pack_transposed(const void* source, void* packed, int64_t k, int64_t n, WeightType type, int threads);
void embed(const int64_t* ids, const void* packed, float* out, int64_t count, int64_t k, float scale, WeightType type);

}  // namespace diffpo
