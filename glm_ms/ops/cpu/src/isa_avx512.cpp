#define GLM_AVX512 1
#define GLM_ISA avx512
#include "isa.h"
