// The kernels of the best instruction set of this machine.
#pragma once

#include "call.h"
#include "matrix.h"
#include "training.h"

namespace glm {

struct Kernels {
    const char* isa;
#define KERNEL(result, name, arguments) result(*name) arguments;
#include "kernels.def"
#undef KERNEL
};

// Chosen once: the best that is compiled in and that this processor has. GLM_MS_ISA=avx512|avx2|neon|scalar selects a
// lower one; one that this processor does not have, or an unknown name, is ignored (`requested_isa_is_missing`).
const Kernels& kernels();

// GLM_MS_ISA names an instruction set that is not usable here.
bool requested_isa_is_missing();

}  // namespace glm
