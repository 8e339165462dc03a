#if defined(__x86_64__)
#include "standard_headers.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VEC_WIDTH 8
#define REGISTERS 16
#define MAX_ROWS 6  // 12 accumulators, 2 columns of weights, 1 broadcast: 15 of 16 registers
#define DIFFPO_NAME "avx2"
#define DIFFPO_ENTRY kernels_avx2
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
