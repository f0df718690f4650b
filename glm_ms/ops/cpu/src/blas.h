// Matrix products by the oneDNN that MindSpore brings along. Each call of `gemm` runs in the calling thread.
#pragma once

#include <cstdint>

namespace glm {

// Type of the operands of a product; sums are float32 always.
enum class Number { FLOAT32, BFLOAT16 };

// Looks for the functions in a shared library; false if it is not there or has others. Call it before the others.
bool open_blas(const char* file);

// Whether this processor multiplies bfloat16. If not, bfloat16 operands are float32 in memory, of the same values, and
// a product of them costs as much as one of float32.
bool native_bf16();

// Bytes of one element of an operand.
int64_t size_of(Number number);

// Writes count values as operands of a product.
void convert(Number number, const float* from, void* to, int64_t count);

// A matrix stored row-major, rows `stride` elements apart; `transposed`: its transpose is meant.
struct Operand {
    const void* data;
    int64_t stride;
    bool transposed;
};

// C [m, n] = A B, or with `add` C + A B, for A [m, k] and B [k, n]; rows of C are `stride` apart. False if it failed.
bool gemm(Number number, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t stride, bool add);

// As `gemm`, by all threads, of float32 matrices without gaps between rows; A and B are rounded to `number`. The result
// does not depend on the number of threads.
bool product_of(
    Number number, int64_t m, int64_t n, int64_t k, const float* a, bool a_transposed, const float* b,
    bool b_transposed, float* c);

}  // namespace glm
