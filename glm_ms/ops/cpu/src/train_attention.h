// Attention of a training step, without memory for the scores of all tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace glm {

// A row of a batch: `length` queries from token `query` on, `keys` keys from token `key` on. The bias of query i is
// bias[i * stride + j], 0 where it sees key j, or HIDDEN.
struct AttentionRow {
    int64_t query, length, key, keys;
    const float* bias;
    int64_t stride;
};

// softmax(query key^T / sqrt(D) + bias) value: query [tokens, N, D]; key, value [tokens, G, D]. Query head n uses group
// n / (N / G).
struct Attention {
    const float *query, *key, *value;
    int64_t heads, dim, groups;
    std::vector<AttentionRow> rows;
};

// Rows of tokens that follow one another without padding between them.
class PackedRows {
public:
    // numbers [count]: the number of the row of each token, or -1 - number if it is padding. A token sees those of its
    // row up to itself that are not padding; padding sees its whole row.
    PackedRows(const int32_t* numbers, int64_t count);

    const std::vector<AttentionRow>& rows() const { return _rows; }

private:
    std::vector<AttentionRow> _rows;
    std::vector<float> _causal;                // zeros, then HIDDEN: the biases of all rows without padding
    std::vector<std::vector<float>> _explicit;  // biases [length, length] of rows with padding
};

// Gradients of what has the same names; `result` is that of `attention`, as `of_result` [tokens, N, D].
struct AttentionGradients {
    const float *result, *of_result;
    float *of_query, *of_key, *of_value;
};

// Both return false if a product failed. Results do not depend on the number of threads.
bool attention(const Attention& work, float* result);
bool attention_gradients(const Attention& work, const AttentionGradients& gradients);

}  // namespace glm
