#include "standard_headers.h"
#define VEC_WIDTH 4
#define REGISTERS 12  // of 16: products need copies without instructions of three operands
#define MAX_ROWS 6
#define DIFFPO_NAME "portable"
#define DIFFPO_ENTRY kernels_portable
#include "instruction_set.h"
