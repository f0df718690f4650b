#define GLM_NEON 1
#define GLM_NEON_DOT 1
#define GLM_ISA neondot
#include "isa.h"
