// Functions for ctypes; glm_ms/ops/cpu/library.py declares their arguments.
#include "exports.h"

#include <cstdint>

#include "dispatch.h"
#include "threads.h"

// SHA-256 of the sources, told by the build: library.py looks for this text, and so finds a library that is older.
GLM_EXPORT const char* glm_ms_sources() { return "sources " GLM_MS_SOURCES; }

GLM_EXPORT const char* glm_ms_isa() { return glm::kernels().isa; }

GLM_EXPORT int glm_ms_requested_isa_is_missing() { return glm::requested_isa_is_missing(); }

GLM_EXPORT int glm_ms_threads() { return glm::threads(); }

GLM_EXPORT void glm_ms_set_threads(int count) { glm::set_threads(count); }

GLM_EXPORT void glm_ms_product(
    int32_t format, const void* data, const void* scale, int64_t n, int64_t k, int64_t group, const float* x,
    int64_t x_stride, int64_t count, float* y, int64_t y_stride, const float* bias, int32_t add) {
    glm::kernels().product(
        {(glm::Format)format, data, scale, n, k, group}, {x, x_stride, count, y, y_stride, bias, add != 0});
}
