// Arguments of the kernels of a training step.
#pragma once

namespace glm {

// One update of AdamW: `scale` is a factor of the gradient; rate, eps and decay contain the bias correction.
struct AdamWStep {
    float rate, beta1, beta2, eps, decay, scale;
};

}  // namespace glm
