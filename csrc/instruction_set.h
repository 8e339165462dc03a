// The body of one instruction set's translation unit; see kernels_avx512.cpp. The standard headers come before the
// target pragma: an inline function of theirs compiled for AVX-512 could be the copy the linker keeps for everyone.
namespace diffpo {
namespace {
#if defined(_OPENMP)
#define DIFFPO_TEAM omp_get_num_threads()
#define DIFFPO_RANK omp_get_thread_num()
#else
#define DIFFPO_TEAM 1
#define DIFFPO_RANK 0
#endif
#include "vec.h"
#include "gemm.h"
#include "attention.h"
#include "pointwise.h"
#include "loss_rows.h"
#include "loss_sparse.h"
}  // namespace

const Kernels* DIFFPO_ENTRY() {
  static const Kernels table{DIFFPO_NAME,      linear,          linear_argmax, attention,   rope_kv_write,      rms_norm,
                             gated_activation, loss_statistics, loss_gradient, loss_filter, loss_sparse_hidden, loss_sparse_head};
  return &table;
}
}  // namespace diffpo
