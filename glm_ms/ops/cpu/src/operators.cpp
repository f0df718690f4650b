// The operators of the decoder, as MindSpore calls them (func_type "aot").
#include "call.h"
#include "dispatch.h"
#include "exports.h"

#define OPERATOR(name) \
    GLM_EXPORT int glm_ms_##name( \
        int, void** params, int* dims, int64_t** shapes, const char** types, void*, void*) { \
        return glm::kernels().name({params, dims, shapes, types}); \
    }

OPERATOR(embed_rows)
OPERATOR(attend_rows)
OPERATOR(project_rows)
OPERATOR(mlp_rows)
OPERATOR(output_rows)
