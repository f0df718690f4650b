// Custom operators of a training step; glm_ms/ops/cpu/training.py calls them.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "blas.h"
#include "dispatch.h"
#include "exports.h"
#include "operators.h"
#include "output_loss.h"
#include "threads.h"
#include "train_attention.h"

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

// Looks for the matrix products of oneDNN in a shared library; 1 if it has them.
GLM_EXPORT int glm_ms_open_blas(const char* file) { return glm::open_blas(file); }

// Whether this processor multiplies bfloat16 faster than float32; call glm_ms_open_blas before.
GLM_EXPORT int glm_ms_native_bf16() { return glm::native_bf16(); }

// MindSpore asks a function "<operator>InferShape" for the shapes of the outputs in a graph where those of the inputs
// are not known before it runs; then sizes are -1 at first.
using Shape = std::vector<int64_t>;

namespace {

// Status of an operator: 1 if `work` returns false, or the memory does not suffice.
template <class F>
int status(const F& work) {
    try {
        return work() ? 0 : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

int output_loss(glm::Number number, int count, const glm::Operands& operands) {
    const int64_t *hidden = operands.shapes[0], *weight = operands.shapes[1];
    const glm::OutputLoss work{
        number, operands.at<float>(0), operands.at<float>(1), operands.at<int32_t>(2), hidden[0], hidden[1], weight[0],
        operands.at<float>(4), count > 5 ? operands.at<float>(5) : nullptr};
    return status([&] { return glm::output_loss(work, operands.at<float>(3)); });
}

}  // namespace

// Inputs: hidden float32 [N, H], weight float32 [V, H], targets int32 [N]. Outputs: loss float32 scalar, gradient of
// hidden, and, unless the name ends in _frozen, gradient of weight. The status is 1 if a target is out of range.
#define GLM_OUTPUT_LOSS(name, number, ...) \
    GLM_EXPORT int name(int count, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) { \
        return output_loss(number, count, {data, ranks, shapes}); \
    } \
    GLM_EXPORT std::vector<Shape> name##InferShape(int*, int64_t** shapes, void*) { \
        const Shape hidden{shapes[0][0], shapes[0][1]}, weight{shapes[1][0], shapes[1][1]}; \
        return {{1}, __VA_ARGS__}; \
    }
GLM_OUTPUT_LOSS(glm_ms_op_output_loss, glm::Number::FLOAT32, hidden, weight)
GLM_OUTPUT_LOSS(glm_ms_op_output_loss_frozen, glm::Number::FLOAT32, hidden)
GLM_OUTPUT_LOSS(glm_ms_op_output_loss_bf16, glm::Number::BFLOAT16, hidden, weight)
GLM_OUTPUT_LOSS(glm_ms_op_output_loss_bf16_frozen, glm::Number::BFLOAT16, hidden)
#undef GLM_OUTPUT_LOSS

// Products of matrices float32 that are rounded to bfloat16, with sums of float32. Inputs: x [N, K], weight [M, K].
// Output: x weight^T [N, M].
GLM_EXPORT int glm_ms_op_bf16_product(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const float *x = operands.at<float>(0), *weight = operands.at<float>(1);
    return status([&] {
        return glm::product_of(
            glm::Number::BFLOAT16, shapes[0][0], shapes[1][0], shapes[0][1], x, false, weight, true,
            operands.at<float>(2));
    });
}

GLM_EXPORT Shape glm_ms_op_bf16_productInferShape(int*, int64_t** shapes, void*) {
    return {shapes[0][0], shapes[1][0]};
}

// Inputs: gradient of the result [N, M], weight [M, K]. Output: gradient of x [N, K].
GLM_EXPORT int glm_ms_op_bf16_input_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const float *gradient = operands.at<float>(0), *weight = operands.at<float>(1);
    return status([&] {
        return glm::product_of(
            glm::Number::BFLOAT16, shapes[0][0], shapes[1][1], shapes[0][1], gradient, false, weight, false,
            operands.at<float>(2));
    });
}

GLM_EXPORT Shape glm_ms_op_bf16_input_gradientInferShape(int*, int64_t** shapes, void*) {
    return {shapes[0][0], shapes[1][1]};
}

// Inputs: gradient of the result [N, M], x [N, K]. Output: gradient of the weight [M, K].
GLM_EXPORT int glm_ms_op_bf16_weight_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const float *gradient = operands.at<float>(0), *x = operands.at<float>(1);
    return status([&] {
        return glm::product_of(
            glm::Number::BFLOAT16, shapes[0][1], shapes[1][1], shapes[0][0], gradient, true, x, false,
            operands.at<float>(2));
    });
}

GLM_EXPORT Shape glm_ms_op_bf16_weight_gradientInferShape(int*, int64_t** shapes, void*) {
    return {shapes[0][1], shapes[1][1]};
}

// Inputs: x float32 of any shape, multiplied in place by the second, a float32 scalar. Output: nothing of use.
GLM_EXPORT int glm_ms_op_scale(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    float* x = operands.at<float>(0);
    const float factor = operands.scalar(1);
    if (factor == 1.0f) return 0;
    for_blocks(operands.size(0), [&](int64_t, int64_t begin, int64_t length) {
        for (int64_t i = begin; i < begin + length; ++i) x[i] *= factor;
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_scaleInferShape(int*, int64_t**, void*) { return {1}; }

namespace {

// Rows that one thread takes at a time; also the rows whose part of a weight's gradient is added up together.
constexpr int64_t ROWS = 16;

// Calls f(row) for all rows of an operand, whose last axis is not counted.
template <class F>
void for_rows(const glm::Operands& operands, int index, const F& f) {
    const int64_t width = operands.shapes[index][operands.ranks[index] - 1];
    glm::parallel_for(width ? operands.size(index) / width : 0, ROWS, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) f(row);
    });
}

Shape shape_of(int* ranks, int64_t** shapes, int index) { return Shape(shapes[index], shapes[index] + ranks[index]); }

}  // namespace

// Inputs: x float32 [..., H], weight float32 [H], eps float32 scalar. Output: the RMS norm [..., H].
GLM_EXPORT int glm_ms_op_rms_norm(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[1][0];
    for_rows(operands, 0, [&](int64_t row) {
        const int64_t at = row * width;
        glm::kernels().rms_norm(
            operands.at<float>(0) + at, operands.at<float>(1), width, operands.scalar(2), operands.at<float>(3) + at);
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_rms_normInferShape(int* ranks, int64_t** shapes, void*) {
    return shape_of(ranks, shapes, 0);
}

// Inputs: x, weight, eps as before, gradient of the norm [..., H]. Output: gradient of x.
GLM_EXPORT int glm_ms_op_rms_norm_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[1][0];
    for_rows(operands, 0, [&](int64_t row) {
        const int64_t at = row * width;
        glm::kernels().rms_norm_gradient(
            operands.at<float>(0) + at, operands.at<float>(1), operands.at<float>(3) + at, width, operands.scalar(2),
            operands.at<float>(4) + at);
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_rms_norm_gradientInferShape(int* ranks, int64_t** shapes, void*) {
    return shape_of(ranks, shapes, 0);
}

// Inputs: as before. Output: gradient of the weight [H], the sum over blocks of rows in their order.
GLM_EXPORT int glm_ms_op_rms_norm_weight_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[1][0], rows = width ? operands.size(0) / width : 0, blocks = (rows + ROWS - 1) / ROWS;
    const std::unique_ptr<float[]> sums(new float[blocks * width]());
    glm::parallel_for(rows, ROWS, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            glm::kernels().rms_norm_weight_gradient(
                operands.at<float>(0) + row * width, operands.at<float>(3) + row * width, width, operands.scalar(2),
                sums.get() + row / ROWS * width);
    });
    float* total = operands.at<float>(4);
    std::fill_n(total, width, 0.0f);
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < width; ++i) total[i] += sums[block * width + i];
    return 0;
}

GLM_EXPORT Shape glm_ms_op_rms_norm_weight_gradientInferShape(int*, int64_t** shapes, void*) { return {shapes[1][0]}; }

// Input: x float32 [..., 2F], gate and up. Output: silu(gate) up [..., F].
GLM_EXPORT int glm_ms_op_swiglu(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[0][ranks[0] - 1] / 2;
    for_rows(operands, 0, [&](int64_t row) {
        glm::kernels().swiglu(operands.at<float>(0) + 2 * row * width, width, operands.at<float>(1) + row * width);
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_swigluInferShape(int* ranks, int64_t** shapes, void*) {
    Shape shape = shape_of(ranks, shapes, 0);
    if (shape.back() > 0) shape.back() /= 2;
    return shape;
}

// Inputs: x as before, gradient of the result [..., F]. Output: gradient of x.
GLM_EXPORT int glm_ms_op_swiglu_gradient(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[0][ranks[0] - 1] / 2;
    for_rows(operands, 0, [&](int64_t row) {
        glm::kernels().swiglu_gradient(
            operands.at<float>(0) + 2 * row * width, operands.at<float>(1) + row * width, width,
            operands.at<float>(2) + 2 * row * width);
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_swiglu_gradientInferShape(int* ranks, int64_t** shapes, void*) {
    return shape_of(ranks, shapes, 0);
}

// Inputs: x float32 [N, M], bias float32 [M]. Output: x + bias.
GLM_EXPORT int glm_ms_op_add_bias(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    const int64_t width = shapes[1][0];
    const float* bias = operands.at<float>(1);
    for_rows(operands, 0, [&](int64_t row) {
        const float* x = operands.at<float>(0) + row * width;
        float* y = operands.at<float>(2) + row * width;
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] + bias[i];
    });
    return 0;
}

GLM_EXPORT Shape glm_ms_op_add_biasInferShape(int* ranks, int64_t** shapes, void*) {
    return shape_of(ranks, shapes, 0);
}

namespace {

// Turns the pairs of neighbouring channels of all heads by the angles of their token, or back.
int rotary(const glm::Operands& operands, bool back) {
    const int64_t heads = operands.shapes[0][2], dim = operands.shapes[0][3];
    for_rows(operands, 0, [&](int64_t row) {
        const float *x = operands.at<float>(0) + row * dim, *cosines = operands.at<float>(1) + row / heads * dim;
        const float* sines = operands.at<float>(2) + row / heads * dim;
        float* y = operands.at<float>(3) + row * dim;
        for (int64_t i = 0; i < dim; i += 2) {
            const float first = back ? x[i + 1] * sines[i + 1] : -x[i + 1] * sines[i];
            const float second = back ? -x[i] * sines[i] : x[i] * sines[i + 1];
            y[i] = x[i] * cosines[i] + first;
            y[i + 1] = x[i + 1] * cosines[i + 1] + second;
        }
    });
    return 0;
}

}  // namespace

// Inputs: x float32 [B, S, N, D], cosines and sines float32 [B, S, 1, D] of its tokens. Output: x rotated.
GLM_EXPORT int glm_ms_op_rotary(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    return rotary({data, ranks, shapes}, false);
}

GLM_EXPORT Shape glm_ms_op_rotaryInferShape(int* ranks, int64_t** shapes, void*) { return shape_of(ranks, shapes, 0); }

// Inputs: gradient of the rotated x, cosines and sines as before. Output: gradient of x.
GLM_EXPORT int glm_ms_op_rotary_gradient(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    return rotary({data, ranks, shapes}, true);
}

GLM_EXPORT Shape glm_ms_op_rotary_gradientInferShape(int* ranks, int64_t** shapes, void*) {
    return shape_of(ranks, shapes, 0);
}

namespace {

// Operands query [B, S, N, D], key and value [B, T, G, D], bias [B or 1, 1, S, T].
glm::Attention attention_of(const glm::Operands& operands) {
    const int64_t *query = operands.shapes[0], *key = operands.shapes[1];
    const int64_t length = query[1], keys = key[1], step = operands.shapes[3][0] == 1 ? 0 : length * keys;
    glm::Attention work{
        operands.at<float>(0), operands.at<float>(1), operands.at<float>(2), query[2], query[3], key[2], {}};
    for (int64_t row = 0; row < query[0]; ++row)
        work.rows.push_back({row * length, length, row * keys, keys, operands.at<float>(3) + row * step, keys});
    return work;
}

// Operands query [T, 1, N, D], key and value [T, 1, G, D].
glm::Attention attention_of(const glm::Operands& operands, const glm::PackedRows& rows) {
    return {operands.at<float>(0), operands.at<float>(1), operands.at<float>(2), operands.shapes[0][2],
            operands.shapes[0][3], operands.shapes[1][2], rows.rows()};
}

// Operands after the four of an attention: the result, its gradient, gradients of query, key and value.
glm::AttentionGradients gradients_of(const glm::Operands& operands) {
    return {operands.at<float>(4), operands.at<float>(5), operands.at<float>(6), operands.at<float>(7),
            operands.at<float>(8)};
}

std::vector<Shape> attention_gradient_shapes(int* ranks, int64_t** shapes) {
    return {shape_of(ranks, shapes, 0), shape_of(ranks, shapes, 1), shape_of(ranks, shapes, 2)};
}

}  // namespace

// Inputs: query float32 [B, S, N, D], key and value float32 [B, T, G, D], bias float32 [B or 1, 1, S, T]. Output: the
// attention [B, S, N * D].
GLM_EXPORT int glm_ms_op_attention(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    return status([&] { return glm::attention(attention_of(operands), operands.at<float>(4)); });
}

GLM_EXPORT Shape glm_ms_op_attentionInferShape(int*, int64_t** shapes, void*) {
    return {shapes[0][0], shapes[0][1], shapes[0][2] * shapes[0][3]};
}

// Inputs: as before, the attention and its gradient. Outputs: gradients of query, key and value.
GLM_EXPORT int glm_ms_op_attention_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    return status([&] { return glm::attention_gradients(attention_of(operands), gradients_of(operands)); });
}

GLM_EXPORT std::vector<Shape> glm_ms_op_attention_gradientInferShape(int* ranks, int64_t** shapes, void*) {
    return attention_gradient_shapes(ranks, shapes);
}

// Inputs: query float32 [T, 1, N, D], key and value float32 [T, 1, G, D] of tokens of packed rows, their numbers int32
// [T] (see glm::PackedRows). Output: the attention [T, 1, N * D].
GLM_EXPORT int glm_ms_op_packed_attention(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    return status([&] {
        const glm::PackedRows rows(operands.at<int32_t>(3), shapes[3][0]);
        return glm::attention(attention_of(operands, rows), operands.at<float>(4));
    });
}

GLM_EXPORT Shape glm_ms_op_packed_attentionInferShape(int*, int64_t** shapes, void*) {
    return {shapes[0][0], shapes[0][1], shapes[0][2] * shapes[0][3]};
}

// Inputs: as before, the attention and its gradient. Outputs: gradients of query, key and value.
GLM_EXPORT int glm_ms_op_packed_attention_gradient(
    int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {
    const glm::Operands operands{data, ranks, shapes};
    return status([&] {
        const glm::PackedRows rows(operands.at<int32_t>(3), shapes[3][0]);
        return glm::attention_gradients(attention_of(operands, rows), gradients_of(operands));
    });
}

GLM_EXPORT std::vector<Shape> glm_ms_op_packed_attention_gradientInferShape(int* ranks, int64_t** shapes, void*) {
    return attention_gradient_shapes(ranks, shapes);
}
