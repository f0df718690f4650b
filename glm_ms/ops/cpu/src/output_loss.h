// Output layer and loss of a training step in one: the scores of all tokens are never in memory together.
#pragma once

#include <cstdint>

#include "blas.h"

namespace glm {

// hidden [rows, width], weight [vocabulary, width], targets [rows] in [0, vocabulary) or IGNORED. The operands of all
// products, gradients too, are rounded to `number`.
struct OutputLoss {
    Number number;
    const float* hidden;
    const float* weight;
    const int32_t* targets;
    int64_t rows, width, vocabulary;
    float* hidden_gradient;  // [rows, width]
    float* weight_gradient;  // [vocabulary, width], or null if nobody needs it
};

constexpr int32_t IGNORED = -100;

// Adds up the cross entropy of all rows that are not ignored, in `loss`, and writes its gradients. False if a target is
// out of range or a product failed. The result does not depend on the number of threads.
bool output_loss(const OutputLoss& work, float* loss);

}  // namespace glm
