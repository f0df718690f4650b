#include "output_loss.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace glm {

namespace {

// Rows whose scores are in memory together. Parts of the vocabulary that one thread takes at a time, in both
// directions; none depends on the number of threads, so results do not either.
constexpr int64_t MOST_ROWS = 512, FORWARD_PART = 1024, BACKWARD_PART = 4096;

int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// Calls f(part, begin, length) for all parts of [0, count); true if all calls return true.
template <class F>
bool for_parts(int64_t count, int64_t part, const F& f) {
    std::atomic<bool> good{true};
    parallel_for(parts_of(count, part), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (!f(i, i * part, std::min(part, count - i * part))) good = false;
    });
    return good;
}

// The rows `places[0 .. count)` of the work; `input` has them as operands of products.
struct Chunk {
    const OutputLoss& work;
    const int64_t* places;
    int64_t count;
    bool first;
    char* input;
    float *scores, *partials, *losses;

    void gather() const {
        const int64_t row_bytes = work.width * size_of(work.number);
        for (int64_t row = 0; row < count; ++row)
            convert(work.number, work.hidden + places[row] * work.width, input + row * row_bytes, work.width);
    }

    // Rows `begin` to `begin + length` of the weight as operands.
    const void* weight(int64_t begin, int64_t length) const {
        const float* rows = work.weight + begin * work.width;
        if (work.number == Number::FLOAT32) return rows;
        char* memory = scratch_of<char>(WEIGHTS, length * work.width * size_of(work.number));
        convert(work.number, rows, memory, length * work.width);
        return memory;
    }

    bool forward() const {
        const bool good = for_parts(work.vocabulary, FORWARD_PART, [&](int64_t, int64_t begin, int64_t length) {
            return gemm(
                work.number, count, length, work.width, {input, work.width, false},
                {weight(begin, length), work.width, true}, scores + begin, work.vocabulary, false);
        });
        return for_parts(count, 1, [&](int64_t row, int64_t, int64_t) {
            float* x = scores + row * work.vocabulary;
            losses[row] = kernels().cross_entropy(x, work.vocabulary, work.targets[places[row]]);
            return true;
        }) && good;
    }

    // Columns `begin` to `begin + length` of the gradient of the scores as an operand.
    Operand gradient(int64_t begin, int64_t length) const {
        if (work.number == Number::FLOAT32) return {scores + begin, work.vocabulary, false};
        const int64_t row_bytes = length * size_of(work.number);
        char* memory = scratch_of<char>(GRADIENT, count * row_bytes);
        for (int64_t row = 0; row < count; ++row)
            convert(work.number, scores + row * work.vocabulary + begin, memory + row * row_bytes, length);
        return {memory, length, false};
    }

    // Each part of the vocabulary gives its part of the weight's gradient and a summand of the input's.
    bool backward() const {
        return for_parts(work.vocabulary, BACKWARD_PART, [&](int64_t part, int64_t begin, int64_t length) {
            Operand of_scores = gradient(begin, length);
            float* partial = partials + part * count * work.width;
            bool good = gemm(
                work.number, count, work.width, length, of_scores, {weight(begin, length), work.width, false}, partial,
                work.width, false);
            if (work.weight_gradient) {
                of_scores.transposed = true;
                good &= gemm(
                    work.number, length, work.width, count, of_scores, {input, work.width, false},
                    work.weight_gradient + begin * work.width, work.width, !first);
            }
            return good;
        });
    }

    void add_partials() const {
        const int64_t parts = parts_of(work.vocabulary, BACKWARD_PART), size = count * work.width;
        parallel_for(count, 8, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                float* sum = work.hidden_gradient + places[row] * work.width;
                for (int64_t part = 0; part < parts; ++part) {
                    const float* summand = partials + part * size + row * work.width;
                    for (int64_t i = 0; i < work.width; ++i) sum[i] += summand[i];
                }
            }
        });
    }
};

}  // namespace

bool output_loss(const OutputLoss& work, float* loss) {
    std::vector<int64_t> places;
    for (int64_t row = 0; row < work.rows; ++row) {
        if (work.targets[row] == IGNORED) continue;
        if (work.targets[row] < 0 || work.targets[row] >= work.vocabulary) return false;
        places.push_back(row);
    }
    const int64_t total = (int64_t)places.size(), width = work.width;
    std::fill_n(work.hidden_gradient, work.rows * width, 0.0f);
    *loss = 0.0f;
    if (total == 0) {
        if (work.weight_gradient) std::fill_n(work.weight_gradient, work.vocabulary * width, 0.0f);
        return true;
    }
    const int64_t size = parts_of(total, parts_of(total, MOST_ROWS));
    // Not `scratch`: they are large, and the rest of the step needs the memory.
    const std::unique_ptr<char[]> input(new char[size * width * size_of(work.number)]);
    const std::unique_ptr<float[]> scores(new float[size * work.vocabulary]);
    const std::unique_ptr<float[]> partials(new float[parts_of(work.vocabulary, BACKWARD_PART) * size * width]);
    std::vector<float> losses(total);
    double sum = 0.0;
    for (int64_t begin = 0; begin < total; begin += size) {
        const int64_t count = std::min(size, total - begin);
        const Chunk chunk{work, &places[begin], count, begin == 0, input.get(), scores.get(), partials.get(),
                          &losses[begin]};
        chunk.gather();
        if (!chunk.forward() || !chunk.backward()) return false;
        chunk.add_partials();
    }
    for (float value : losses) sum += value;
    *loss = (float)sum;
    return true;
}

}  // namespace glm
