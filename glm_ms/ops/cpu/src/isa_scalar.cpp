#define GLM_SCALAR 1
#define GLM_ISA scalar
#include "isa.h"
