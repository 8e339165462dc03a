#include "standard_headers.h"
#define VEC_WIDTH 4
#define MAX_ROWS 6
#define DIFFPO_NAME "portable"
#define DIFFPO_ENTRY kernels_portable
#include "instruction_set.h"
