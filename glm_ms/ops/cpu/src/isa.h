// Included once by each isa_*.cpp, which defines GLM_ISA: the kernels in the namespace of that instruction set, and
// their table. Headers of the library come first: kernels may not include any inside the namespace.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(GLM_TRANSLATED) && defined(GLM_AVX512)
#include GLM_TRANSLATED  // a header that translates AVX-512 for other machines, for tests
#elif defined(GLM_AVX512) || defined(GLM_AVX2)
#include <immintrin.h>
#elif defined(GLM_NEON)
#include <arm_neon.h>
#endif

#include "bits.h"
#include "call.h"
#include "dispatch.h"
#include "matrix.h"
#include "threads.h"

#define GLM_TEXT_(name) #name
#define GLM_TEXT(name) GLM_TEXT_(name)

namespace glm {
namespace GLM_ISA {

#include "vec.h"
#include "tile.h"
#include "dense_weight.h"
#include "narrow.h"
#include "dense.h"
#include "activation.h"
#include "int8.h"
#include "int4.h"
#include "product.h"
#include "adamw.h"
#include "attention_row.h"
#include "bf16.h"
#include "cross_entropy.h"
#include "square_sum.h"
#include "rms_norm.h"
#include "swiglu.h"
#include "inputs.h"
#include "norm.h"
#include "rope.h"
#include "pages.h"
#include "attention.h"
#include "lowrank.h"
#include "linear.h"
#include "decoder.h"

extern const Kernels table;
const Kernels table = {
    GLM_TEXT(GLM_ISA),
#define KERNEL(result, name, arguments) name,
#include "kernels.def"
#undef KERNEL
};

}  // namespace GLM_ISA
}  // namespace glm
