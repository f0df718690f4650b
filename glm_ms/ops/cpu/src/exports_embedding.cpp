// The custom operator that reads an embedding; glm_ms/ops/cpu/embedding.py calls it.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exports.h"
#include "operators.h"
#include "threads.h"

// Inputs: table bfloat16 [V, H], ids int32 of any shape. Output: rows float32 [..., H]. The status is 1 if an id is not
// in [0, V).
GLM_EXPORT int glm_ms_op_bf16_rows(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const uint16_t* table = operands.at<uint16_t>(0);
    const int32_t* ids = operands.at<int32_t>(1);
    float* rows = operands.at<float>(2);
    const int64_t count = shapes[0][0], width = shapes[0][1];
    std::atomic<bool> outside{false};
    glm::parallel_for(operands.size(1), 16, [&](int64_t begin, int64_t end) {
        for (int64_t place = begin; place < end; ++place) {
            if (ids[place] < 0 || ids[place] >= count) {
                outside = true;
                continue;
            }
            const uint16_t* from = table + ids[place] * width;
            for (int64_t i = 0; i < width; ++i) {
                const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
                std::memcpy(rows + place * width + i, &bits, sizeof bits);
            }
        }
    });
    return outside ? 1 : 0;
}

GLM_EXPORT std::vector<int64_t> glm_ms_op_bf16_rowsInferShape(int* ranks, int64_t** shapes, void*) {
    std::vector<int64_t> shape(shapes[1], shapes[1] + ranks[1]);
    shape.push_back(shapes[0][1]);
    return shape;
}
