#define GLM_AVX2 1
#define GLM_ISA avx2
#include "isa.h"
