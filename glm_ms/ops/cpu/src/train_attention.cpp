#include "train_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "blas.h"
#include "dispatch.h"
#include "threads.h"

namespace glm {

namespace {

// Query rows of one head whose scores are in memory together.
constexpr int64_t BLOCK_ROWS = 128;
// As HIDDEN_SCORE of glm_ms.ops.portable.
constexpr float HIDDEN = std::numeric_limits<float>::lowest();

// One head of one row of the batch.
struct Head {
    const Attention& work;
    const AttentionRow& row;
    int64_t head;

    int64_t stride() const { return work.heads * work.dim; }
    float scale() const { return 1.0f / std::sqrt((float)work.dim); }
    // From token `token` of the row on, in an array [tokens, N, D].
    int64_t at(int64_t token) const { return (row.query + token) * stride() + head * work.dim; }
    // In an array [tokens, G, D].
    int64_t group() const { return (row.key * work.groups + head / (work.heads / work.groups)) * work.dim; }
    // Of the first of the keys of this head, in an array [keys, D] for each head of each row.
    int64_t part() const { return (row.key * work.heads + head * row.keys) * work.dim; }
    const float* bias(int64_t token) const { return row.bias + token * row.stride; }

    // Keys up to the last one that a query of the block sees; the others have weight 0. All keys if a query sees none,
    // because it weighs them alike.
    int64_t visible(int64_t token, int64_t count) const {
        int64_t most = 0;
        for (int64_t i = token; i < token + count; ++i) {
            int64_t last = row.keys;
            while (last > most && bias(i)[last - 1] != 0.0f) --last;
            if (last == most && std::find(bias(i), bias(i) + last, 0.0f) == bias(i) + last) return row.keys;
            most = std::max(most, last);
        }
        return most;
    }

    Operand rows(const float* array, int64_t token) const { return {array + at(token), stride(), false}; }
    Operand keys(const float* array, bool transposed) const {
        return {array + group(), work.groups * work.dim, transposed};
    }

    // scores [count, keys] of a block, by `limit` keys a row.
    bool scores(int64_t token, int64_t count, int64_t limit, float* scores) const {
        return gemm(Number::FLOAT32, count, limit, work.dim, rows(work.query, token), keys(work.key, true), scores,
                    limit, false);
    }
};

template <class F>
bool for_blocks(int64_t length, const F& f) {
    bool good = true;
    for (int64_t token = 0; token < length; token += BLOCK_ROWS)
        good &= f(token, std::min(BLOCK_ROWS, length - token));
    return good;
}

template <class F>
bool for_heads(const Attention& work, const F& f) {
    std::atomic<bool> good{true};
    parallel_for(work.rows.size() * work.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (!f(Head{work, work.rows[i / work.heads], i % work.heads})) good = false;
    });
    return good;
}

// Scores of the largest block of a head.
int64_t block_scores(const Attention& work) {
    int64_t size = 0;
    for (const AttentionRow& row : work.rows) size = std::max(size, std::min(BLOCK_ROWS, row.length) * row.keys);
    return size;
}

// Adds up what the heads of a group give for the keys of a row, [keys, D] each.
void sum_heads(const Head& first, const float* parts, float* result) {
    const Attention& work = first.work;
    const int64_t size = first.row.keys * work.dim;
    for (int64_t i = 0; i < size; ++i) {
        float sum = 0.0f;
        for (int64_t head = 0; head < work.heads / work.groups; ++head) sum += parts[first.part() + head * size + i];
        result[first.group() + i / work.dim * work.groups * work.dim + i % work.dim] = sum;
    }
}

bool forward(const Head& head, float* scores, float* result) {
    const Attention& work = head.work;
    return for_blocks(head.row.length, [&](int64_t token, int64_t count) {
        const int64_t limit = head.visible(token, count);
        if (!head.scores(token, count, limit, scores)) return false;
        for (int64_t i = 0; i < count; ++i)
            kernels().attention_softmax(scores + i * limit, head.bias(token + i), limit, head.scale());
        return gemm(Number::FLOAT32, count, work.dim, limit, {scores, limit, false}, head.keys(work.value, false),
                    result + head.at(token), head.stride(), false);
    });
}

// `weights` and `of_weights` have room for the scores of a block; of_key and of_value [T, D] are added to.
bool backward(
    const Head& head, const AttentionGradients& gradients, float* weights, float* of_weights, float* of_key,
    float* of_value) {
    const Attention& work = head.work;
    return for_blocks(head.row.length, [&](int64_t token, int64_t count) {
        const int64_t limit = head.visible(token, count), dim = work.dim;
        const Operand of_result = head.rows(gradients.of_result, token);
        const Operand value = head.keys(work.value, true), query = head.rows(work.query, token);
        bool good = head.scores(token, count, limit, weights);
        good &= gemm(Number::FLOAT32, count, limit, dim, of_result, value, of_weights, limit, false);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = head.at(token + i);
            const float mean = kernels().dot_product(gradients.of_result + at, gradients.result + at, dim);
            float* row = weights + i * limit;
            kernels().attention_softmax(row, head.bias(token + i), limit, head.scale());
            kernels().attention_gradient(of_weights + i * limit, row, limit, head.scale(), mean);
        }
        // What was the gradient of the weights is that of the scores now.
        good &= gemm(Number::FLOAT32, limit, dim, count, {weights, limit, true}, of_result, of_value, dim, true);
        good &= gemm(Number::FLOAT32, limit, dim, count, {of_weights, limit, true}, query, of_key, dim, true);
        return good && gemm(Number::FLOAT32, count, dim, limit, {of_weights, limit, false}, head.keys(work.key, false),
                            gradients.of_query + head.at(token), head.stride(), false);
    });
}

}  // namespace

PackedRows::PackedRows(const int32_t* numbers, int64_t count) {
    int64_t longest = 0;
    for (int64_t begin = 0, end; begin < count; begin = end) {
        const auto row_of = [&](int64_t token) { return numbers[token] < 0 ? -1 - numbers[token] : numbers[token]; };
        bool padded = false;
        for (end = begin; end < count && row_of(end) == row_of(begin); ++end) padded |= numbers[end] < 0;
        const int64_t length = end - begin;
        _rows.push_back({begin, length, begin, length, nullptr, -1});
        if (!padded) {
            longest = std::max(longest, length);
            continue;
        }
        std::vector<float> bias(length * length);
        for (int64_t i = 0; i < length; ++i)
            for (int64_t j = 0; j < length; ++j)
                bias[i * length + j] = numbers[begin + i] < 0 || (j <= i && numbers[begin + j] >= 0) ? 0.0f : HIDDEN;
        _explicit.push_back(std::move(bias));
        _rows.back().bias = _explicit.back().data();
        _rows.back().stride = length;
    }
    // Query i sees i + 1 keys: its biases begin so many places before the first HIDDEN.
    _causal.assign(2 * longest, 0.0f);
    std::fill(_causal.begin() + longest, _causal.end(), HIDDEN);
    for (AttentionRow& row : _rows)
        if (!row.bias) row.bias = _causal.data() + longest - 1;
}

bool attention(const Attention& work, float* result) {
    const int64_t size = block_scores(work);
    return for_heads(work, [&](const Head& head) { return forward(head, scratch_of<float>(ATTENTION, size), result); });
}

bool attention_gradients(const Attention& work, const AttentionGradients& gradients) {
    const int64_t size = block_scores(work);
    int64_t keys = 0;
    for (const AttentionRow& row : work.rows) keys = std::max(keys, row.key + row.keys);
    // Each head has its summand of the gradients of its group.
    const int64_t parts = keys * work.heads * work.dim;
    const std::unique_ptr<float[]> of_key(new float[parts]()), of_value(new float[parts]());
    const bool good = for_heads(work, [&](const Head& head) {
        float* scores = scratch_of<float>(ATTENTION, 2 * size);
        const int64_t at = head.part();
        return backward(head, gradients, scores, scores + size, of_key.get() + at, of_value.get() + at);
    });
    parallel_for(work.rows.size() * work.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Head first{work, work.rows[i / work.groups], i % work.groups * (work.heads / work.groups)};
            sum_heads(first, of_key.get(), gradients.of_key);
            sum_heads(first, of_value.get(), gradients.of_value);
        }
    });
    return good;
}

}  // namespace glm
