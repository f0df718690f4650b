#include "train_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "blas.h"
#include "dispatch.h"
#include "threads.h"

namespace glm {

namespace {

// Query rows of one head whose scores are in memory together.
constexpr int64_t BLOCK_ROWS = 128;

// One head of one row of the batch.
struct Head {
    const Attention& work;
    int64_t row, head;

    int64_t stride() const { return work.heads * work.dim; }
    float scale() const { return 1.0f / std::sqrt((float)work.dim); }
    // From token `token` on, in an array [B, S, N, D].
    int64_t at(int64_t token) const { return (row * work.length + token) * stride() + head * work.dim; }
    // In an array [B, T, G, D].
    int64_t group() const {
        return (row * work.keys * work.groups + head / (work.heads / work.groups)) * work.dim;
    }
    const float* bias(int64_t token) const {
        return work.bias + ((work.one_bias ? 0 : row) * work.length + token) * work.keys;
    }

    // Keys up to the last one that a query of the block sees; the others have weight 0. All keys if a query sees none,
    // because it weighs them alike.
    int64_t visible(int64_t token, int64_t count) const {
        int64_t most = 0;
        for (int64_t i = token; i < token + count; ++i) {
            int64_t last = work.keys;
            while (last > most && bias(i)[last - 1] != 0.0f) --last;
            if (last == most && std::find(bias(i), bias(i) + last, 0.0f) == bias(i) + last) return work.keys;
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
    parallel_for(work.batch * work.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (!f(Head{work, i / work.heads, i % work.heads}, i)) good = false;
    });
    return good;
}

bool forward(const Head& head, float* scores, float* result) {
    const Attention& work = head.work;
    return for_blocks(work.length, [&](int64_t token, int64_t count) {
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
    return for_blocks(work.length, [&](int64_t token, int64_t count) {
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

bool attention(const Attention& work, float* result) {
    const int64_t size = std::min(BLOCK_ROWS, work.length) * work.keys;
    return for_heads(work, [&](const Head& head, int64_t) {
        return forward(head, scratch_of<float>(ATTENTION, size), result);
    });
}

bool attention_gradients(const Attention& work, const AttentionGradients& gradients) {
    const int64_t size = std::min(BLOCK_ROWS, work.length) * work.keys, part = work.keys * work.dim;
    // Each head has its summand of the gradients of its group.
    const int64_t heads = work.batch * work.heads, per_group = work.heads / work.groups;
    const std::unique_ptr<float[]> of_key(new float[heads * part]()), of_value(new float[heads * part]());
    const bool good = for_heads(work, [&](const Head& head, int64_t i) {
        float* scores = scratch_of<float>(ATTENTION, 2 * size);
        return backward(head, gradients, scores, scores + size, of_key.get() + i * part, of_value.get() + i * part);
    });
    parallel_for(work.batch * work.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = Head{work, group / work.groups, group % work.groups * per_group}.group();
            for (int64_t i = 0; i < part; ++i) {
                float key = 0.0f, value = 0.0f;
                for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
                    key += of_key[head * part + i];
                    value += of_value[head * part + i];
                }
                const int64_t at = first + i / work.dim * work.groups * work.dim + i % work.dim;
                gradients.of_key[at] = key;
                gradients.of_value[at] = value;
            }
        }
    });
    return good;
}

}  // namespace glm
