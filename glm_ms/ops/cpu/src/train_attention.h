// Attention of a training step, without memory for the scores of all tokens.
#pragma once

#include <cstdint>

namespace glm {

// softmax(query key^T / sqrt(D) + bias) value: query [B, S, N, D]; key, value [B, T, G, D]; bias [B or 1, 1, S, T], 0
// where a query sees a key, or HIDDEN. Query head n uses group n / (N / G).
struct Attention {
    const float *query, *key, *value, *bias;
    int64_t batch, length, heads, dim, groups, keys;
    bool one_bias;  // for all of the batch
};

// Gradients of what has the same names; `result` is that of `attention`, as `of_result` [B, S, N, D].
struct AttentionGradients {
    const float *result, *of_result;
    float *of_query, *of_key, *of_value;
};

// Both return false if a product failed. Results do not depend on the number of threads.
bool attention(const Attention& work, float* result);
bool attention_gradients(const Attention& work, const AttentionGradients& gradients);

}  // namespace glm
