// Arguments of the products y = x W^T + bias; glm_ms/ops/packing.py defines the packed formats.
#pragma once

#include <cstdint>

namespace glm {

enum class Format : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

// A weight of `n` outputs and `k` inputs.
//   F32, BF16, F16: row-major [n, k], not packed; `scale` is not used.
//   INT8: panels [n/16][k/4][16][4] of int8, scale float32 [n].
//   INT4: panels [n/16][k/8][16][4] of bytes, scale float16 [n/16][k/group][16].
// Panels are padded: n to 16, k to 4 (INT8) or to `group` (INT4); padded values are zero.
struct Matrix {
    Format format;
    const void* data;
    const void* scale;
    int64_t n, k, group;
};

// y[row, output] = sum + bias[output], or with `add`, y[row, output] + (sum + bias[output]); `bias` may be null.
// x: `count` rows of k floats, `x_stride` floats apart. y: rows of n floats, `y_stride` apart.
struct Rows {
    const float* x;
    int64_t x_stride, count;
    float* y;
    int64_t y_stride;
    const float* bias;
    bool add;
};

}  // namespace glm
