#define GLM_NEON 1
#define GLM_ISA neon
#include "isa.h"
