#if defined(__x86_64__)
#include "standard_headers.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define VEC_WIDTH 16
#define REGISTERS 32
#define MAX_ROWS 12  // 24 accumulators, 2 columns of weights, 1 broadcast: 27 of 32 registers
#define DIFFPO_NAME "avx512"
#define DIFFPO_ENTRY kernels_avx512
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
