// Custom operators of a training step; glm_ms/ops/cpu/training.py calls them.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "dispatch.h"
#include "exports.h"
#include "operators.h"
#include "threads.h"

namespace {

// Elements that are added up together, and that one thread takes at a time. Changing it changes the bits of a sum.
constexpr int64_t BLOCK_SIZE = 16384;

int64_t blocks_of(int64_t count) { return (count + BLOCK_SIZE - 1) / BLOCK_SIZE; }

template <class F>
void for_blocks(int64_t count, const F& f) {
    glm::parallel_for(blocks_of(count), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
            f(block, block * BLOCK_SIZE, std::min(BLOCK_SIZE, count - block * BLOCK_SIZE));
    });
}

}  // namespace

// Inputs: gradients float32 of any shapes. Output: the sum of all squares, float32 scalar.
GLM_EXPORT int glm_ms_op_square_sum(
    int count, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    double total = 0.0;
    for (int i = 0; i + 1 < count; ++i) {
        const float* gradient = operands.at<float>(i);
        const int64_t size = operands.size(i);
        std::unique_ptr<float[]> sums(new float[blocks_of(size)]);
        for_blocks(size, [&](int64_t block, int64_t begin, int64_t length) {
            sums[block] = glm::kernels().square_sum(gradient + begin, length);
        });
        for (int64_t block = 0; block < blocks_of(size); ++block) total += sums[block];
    }
    *operands.at<float>(count - 1) = static_cast<float>(total);
    return 0;
}

// Inputs: weight, m, v (all three are updated), gradient: float32 of one shape; rate, beta1, beta2, eps, decay, scale:
// float32 scalars. Output: nothing of use.
GLM_EXPORT int glm_ms_op_adamw(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    float *weight = operands.at<float>(0), *m = operands.at<float>(1), *v = operands.at<float>(2);
    const float* gradient = operands.at<float>(3);
    const glm::AdamWStep step{operands.scalar(4), operands.scalar(5), operands.scalar(6),
                              operands.scalar(7), operands.scalar(8), operands.scalar(9)};
    for_blocks(operands.size(0), [&](int64_t, int64_t begin, int64_t length) {
        glm::kernels().adamw(weight + begin, m + begin, v + begin, gradient + begin, length, step);
    });
    return 0;
}
