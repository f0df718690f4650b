// Runs the kernels over odd shapes and prints one line for each case: its name and a hash of its result.
//
// Every array is allocated in its exact size, so the address sanitizer sees a read or write outside. Equal lines of two
// builds mean equal bits on two instruction sets.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "threads.h"
#include "training.h"

namespace {

uint64_t state = 1;

uint32_t random_bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

float random_value() { return (float)(int32_t)(random_bits() % 20001 - 10000) * 3e-4f; }

template <class T>
struct Array {
    explicit Array(int64_t count) : size(count), values(new T[count]) {}
    int64_t size;
    std::unique_ptr<T[]> values;
    T* data() { return values.get(); }
};

Array<float> random_array(int64_t count) {
    Array<float> array(count);
    for (int64_t i = 0; i < count; ++i) array.data()[i] = random_value();
    return array;
}

uint64_t hash(const float* values, int64_t count) {
    uint64_t result = 1469598103934665603u;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        if (values[i] != values[i]) bits = 0x7fc00000;  // processors differ in the bits of NaN
        result = (result ^ bits) * 1099511628211u;
    }
    return result;
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A weight of any format in memory of its exact size.
struct Weight {
    Array<uint8_t> data{0}, scale{0};
    glm::Matrix matrix;

    Weight(glm::Format format, int64_t n, int64_t k, int64_t group) {
        int64_t bytes = n * k * 4, scales = 0;
        if (format == glm::Format::BF16 || format == glm::Format::F16) bytes = n * k * 2;
        if (format == glm::Format::INT8) bytes = blocks(n, 16) * blocks(k, 4) * 64, scales = n * 4;
        if (format == glm::Format::INT4)
            bytes = blocks(n, 16) * blocks(k, group) * group * 8, scales = blocks(n, 16) * blocks(k, group) * 32;
        data = Array<uint8_t>(bytes);
        scale = Array<uint8_t>(scales);
        for (int64_t i = 0; i < bytes; ++i) {
            uint8_t value = (uint8_t)random_bits();
            data.data()[i] = format == glm::Format::INT8 && value == 0x80 ? 0 : value;
        }
        if (format == glm::Format::F32)
            for (int64_t i = 0; i < n * k; ++i) {
                float value = random_value();
                std::memcpy(data.data() + 4 * i, &value, 4);
            }
        if (format == glm::Format::BF16 || format == glm::Format::F16)  // exponents near that of 1
            for (int64_t i = 0; i < n * k; ++i) {
                uint8_t& top = data.data()[2 * i + 1];
                top = (uint8_t)((top & 0x83) | (format == glm::Format::BF16 ? 0x3c : 0x38));
            }
        for (int64_t i = 0; i < scales; i += 2) {  // float16 near 1; two of them are a finite float32 too
            uint16_t half = (uint16_t)(0x3800 + random_bits() % 1024);
            std::memcpy(scale.data() + i, &half, 2);
        }
        matrix = {format, data.data(), scale.data(), n, k, group};
    }
};

void product_case(const char* name, glm::Format format, int64_t group, int64_t n, int64_t k, int64_t rows) {
    Weight weight(format, n, k, group);
    Array<float> x = random_array(rows * k), y = random_array(rows * n), bias = random_array(n);
    if (rows == 5 && k > 0) x.data()[2 * k + k / 2] = NAN;
    if (rows == 3) std::memset(x.data(), 0, k * sizeof(float));
    glm::kernels().product(
        weight.matrix, {x.data(), k, rows, y.data(), n, rows % 2 ? bias.data() : nullptr, rows % 3 == 0});
    std::printf("%s n=%d k=%d rows=%d %016llx\n", name, (int)n, (int)k, (int)rows,
                (unsigned long long)hash(y.data(), rows * n));
}

void products() {
    const int64_t shapes[][2] = {{1, 1}, {3, 15}, {16, 32}, {17, 33}, {50, 515}, {49, 1100}, {5, 0}};
    for (auto [n, k] : shapes)
        for (int64_t rows : {0, 1, 2, 3, 4, 5, 9, 14, 50}) {
            product_case("float32", glm::Format::F32, 0, n, k, rows);
            product_case("bfloat16", glm::Format::BF16, 0, n, k, rows);
            product_case("float16", glm::Format::F16, 0, n, k, rows);
            product_case("int8", glm::Format::INT8, 0, n, k, rows);
            product_case("int4-32", glm::Format::INT4, 32, n, k, rows);
            product_case("int4-128", glm::Format::INT4, 128, n, k, rows);
        }
}

void print(const char* name, int64_t size, Array<float>& result) {
    std::printf("%s n=%d %016llx\n", name, (int)size, (unsigned long long)hash(result.data(), result.size));
}

void training() {
    const glm::Kernels& kernels = glm::kernels();
    for (int64_t n : {1, 15, 16, 17, 64, 100, 1003}) {
        Array<float> x = random_array(n), w = random_array(n), m = random_array(n), v = random_array(n), y(n);
        Array<float> pair = random_array(2 * n), of_pair = random_array(2 * n), one = random_array(1);
        if (n == 17) x.data()[16] = NAN;
        for (int64_t i = 0; i < n; ++i) v.data()[i] = v.data()[i] * v.data()[i];
        one.data()[0] = kernels.square_sum(x.data(), n);
        print("square_sum", n, one);
        kernels.rms_norm(x.data(), w.data(), n, 1e-5f, y.data());
        print("rms_norm", n, y);
        kernels.rms_norm_gradient(x.data(), w.data(), m.data(), n, 1e-5f, y.data());
        print("rms_norm_gradient", n, y);
        kernels.rms_norm_weight_gradient(x.data(), m.data(), n, 1e-5f, y.data());
        print("rms_norm_weight_gradient", n, y);
        kernels.swiglu(pair.data(), n, y.data());
        print("swiglu", n, y);
        kernels.swiglu_gradient(pair.data(), x.data(), n, of_pair.data());
        print("swiglu_gradient", n, of_pair);
        kernels.round_to_bf16(x.data(), y.data(), n);
        print("round_to_bf16", n, y);
        Array<uint16_t> halves(n);
        kernels.to_bf16(x.data(), halves.data(), n);
        for (int64_t i = 0; i < n; ++i) y.data()[i] = (float)halves.data()[i];
        print("to_bf16", n, y);
        kernels.attention_softmax(y.data(), w.data(), n, 0.3f);
        print("attention_softmax", n, y);
        kernels.attention_gradient(y.data(), m.data(), n, 0.3f, 0.1f);
        print("attention_gradient", n, y);
        one.data()[0] = kernels.dot_product(w.data(), m.data(), n);
        print("dot_product", n, one);
        kernels.adamw(w.data(), m.data(), v.data(), x.data(), n, {1e-2f, 0.9f, 0.999f, 1e-8f, 0.01f, 0.5f});
        for (Array<float>* result : {&w, &m, &v}) print("adamw", n, *result);
        one.data()[0] = kernels.cross_entropy(x.data(), n, n / 2);
        print("cross_entropy", n, one);
        print("cross_entropy", n, x);
    }
}

void line(const char* name, int64_t width, Array<float>& result) {
    std::printf("%s width=%d %016llx\n", name, (int)width, (unsigned long long)hash(result.data(), result.size));
}

// Kernels of rows of floats, those of the network and of a training step.
void rows_of_floats() {
    const glm::Kernels& kernels = glm::kernels();
    for (int64_t width : {1, 15, 16, 33, 500}) {
        Array<float> x = random_array(width), weight = random_array(width), gradient = random_array(width);
        Array<float> gated = random_array(2 * width), y = random_array(width), of_gated = random_array(2 * width);
        kernels.rms_norm(x.data(), weight.data(), width, 1e-5f, y.data());
        line("rms_norm", width, y);
        kernels.rms_norm_gradient(x.data(), weight.data(), gradient.data(), width, 1e-5f, y.data());
        line("rms_norm_gradient", width, y);
        kernels.rms_norm_weight_gradient(x.data(), gradient.data(), width, 1e-5f, y.data());
        line("rms_norm_weight_gradient", width, y);
        kernels.swiglu(gated.data(), width, y.data());
        line("swiglu", width, y);
        kernels.swiglu_gradient(gated.data(), gradient.data(), width, of_gated.data());
        line("swiglu_gradient", width, of_gated);
        kernels.round_to_bf16(x.data(), y.data(), width);
        line("round_to_bf16", width, y);
        Array<float> sum = random_array(1), m = random_array(width), v = random_array(width);
        sum.data()[0] = kernels.square_sum(x.data(), width);
        line("square_sum", width, sum);
        for (int64_t i = 0; i < width; ++i) v.data()[i] = std::fabs(v.data()[i]);
        kernels.adamw(
            weight.data(), m.data(), v.data(), gradient.data(), width, {1e-2f, 0.9f, 0.95f, 1e-8f, 1e-3f, 0.5f});
        line("adamw weight", width, weight), line("adamw m", width, m), line("adamw v", width, v);
        kernels.cross_entropy(x.data(), width, width / 2);
        line("cross_entropy", width, x);
    }
}

// Sizes of a network and of its cache.
struct Network {
    int64_t heads, groups, dim, hidden;
    glm::Stored stored;

    int64_t page_bytes() const {
        const int64_t padded = blocks(dim, 16) * 16, items[] = {4, 2, 1};
        const int64_t scales = stored == glm::Stored::INT8 ? 2 * glm::PAGE * 4 : 0;
        return groups * (glm::PAGE * (dim + padded) * items[(int64_t)stored] + scales);
    }
};

// Tokens [from, to) of a sequence, which see the keys from `first` on; first < 0: only their own.
struct Sequence {
    int64_t first, from, to;
};

// A layer of attention with random weights, and its cache.
class Attention {
public:
    Attention(const Network& net, int64_t pages, int64_t longest)
        : net_(net), out_((net.heads + 2 * net.groups) * net.dim), cache_(pages * net.page_bytes()), pages_(pages),
          angles_(random_array(longest * (net.dim / 2))), weight_(random_array(out_ * net.hidden)),
          norm_(random_array(net.hidden)) {
        std::memset(cache_.data(), 0, cache_.size);
        for (int64_t i = 0; i < pages; ++i) pages_.data()[i] = (int32_t)(pages - 1 - i);
    }

    // Runs the tokens of all sequences; returns the hash of what they get.
    uint64_t run(const std::vector<Sequence>& sequences) {
        int64_t count = 0, row = 1, page = 0;
        for (const Sequence& one : sequences) count += one.to - one.from;
        Array<glm::Row> table(count + 1);  // the first one is the line of the run
        std::memset((void*)table.data(), 0, table.size * sizeof(glm::Row));
        glm::Run& run = *(glm::Run*)table.data();
        run.count = count, run.cache = cache_.data(), run.stored = net_.stored;
        for (const Sequence& one : sequences) {
            for (int64_t index = one.from; index < one.to; ++index, ++row) {
                glm::Row& to = table.data()[row];
                to.position = to.index = index, to.pages = pages_.data() + page;
                to.first = one.first < 0 ? index : one.first;
            }
            page += blocks(one.to, glm::PAGE);
        }
        Array<float> x = random_array(count * net_.hidden), mixed(count * net_.heads * net_.dim);
        double sizes[] = {0, (double)net_.heads, (double)net_.groups, (double)net_.dim, 0, 1e-5, (double)net_.hidden,
                          (double)out_, 1};
        bool absent = false;
        void* params[] = {table.data(), x.data(), angles_.data(), sizes, norm_.data(), &absent, weight_.data(),
                          &absent, &absent, &absent, &absent, mixed.data()};
        int dims[12] = {};
        int64_t* shapes[12] = {};
        const char* types[12] = {"int64", "float32", "float32", "float64", "float32", "bool", "float32", "bool", "bool",
                                 "bool", "bool", "float32"};
        glm::kernels().attend_rows({params, dims, shapes, types});
        return hash(mixed.data(), mixed.size);
    }

private:
    Network net_;
    int64_t out_;
    Array<char> cache_;
    Array<int32_t> pages_;
    Array<float> angles_, weight_, norm_;
};

// Writes the keys of all tokens, then runs those of the sequences.
void attention_case(const char* name, const Network& net, const std::vector<Sequence>& sequences) {
    std::vector<Sequence> whole;
    int64_t pages = 0, longest = 0;
    for (const Sequence& one : sequences) {
        whole.push_back({-1, 0, one.to});
        pages += blocks(one.to, glm::PAGE), longest = one.to > longest ? one.to : longest;
    }
    Attention layer(net, pages, longest);
    const uint64_t first = layer.run(whole), second = layer.run(sequences);
    std::printf("attention %s %016llx %016llx\n", name, (unsigned long long)first, (unsigned long long)second);
}

// The same bits for any number of threads, which decides how the keys are divided.
void attention() {
    const std::vector<Sequence> one = {{0, 600, 601}}, chunk = {{3, 250, 290}};
    const std::vector<Sequence> several = {{0, 0, 1}, {17, 513, 516}, {0, 40, 41}};
    const uint64_t before = state;
    for (int threads : {1, 2, 5}) {
        glm::set_threads(threads);
        state = before;
        for (glm::Stored stored : {glm::Stored::F32, glm::Stored::BF16, glm::Stored::INT8}) {
            for (const auto* rows : {&one, &chunk, &several}) {
                attention_case("groups of 5", {10, 2, 12, 8, stored}, *rows);
                attention_case("heads", {3, 3, 16, 8, stored}, *rows);
                attention_case("wide", {24, 1, 64, 8, stored}, *rows);
            }
        }
    }
    glm::set_threads(0);
}

// Several threads call kernels at once, while parts of one call are shared by the pool.
void contention() {
    Weight weight(glm::Format::INT8, 64, 256, 0);
    Array<float> x = random_array(256);
    std::vector<std::vector<float>> found(4, std::vector<float>(64));
    std::vector<std::thread> callers;
    for (auto& y : found)
        callers.emplace_back([&] {
            for (int i = 0; i < 200; ++i)
                glm::kernels().product(weight.matrix, {x.data(), 256, 1, y.data(), 64, nullptr, false});
        });
    for (auto& caller : callers) caller.join();
    for (auto& y : found) std::printf("contention %016llx\n", (unsigned long long)hash(y.data(), 64));
}

// Every item once, in parts that begin at multiples of the grain; a call inside a part runs in its thread.
void parts() {
    for (int size : {1, 2, 5}) {
        glm::set_threads(size);
        for (int64_t count : {0, 1, 7, 1000}) {
            std::vector<std::atomic<int>> seen(count);
            glm::parallel_for(count, 3, [&](int64_t begin, int64_t end) {
                glm::parallel_for(end - begin, 1, [&](int64_t from, int64_t to) {
                    for (int64_t i = begin + from; i < begin + to; ++i) ++seen[i];
                });
            });
            int wrong = 0;
            for (auto& times : seen) wrong += times != 1;
            std::printf("parts count=%d wrong=%d\n", (int)count, wrong);
        }
    }
    glm::set_threads(0);
}

}  // namespace

int main() {
    std::fprintf(stderr, "%s\n", glm::kernels().isa);
    products();
    rows_of_floats();
    training();
    attention();
    contention();
    parts();
}
