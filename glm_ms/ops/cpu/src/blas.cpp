#include "blas.h"

#include <dlfcn.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "threads.h"

namespace glm {

namespace {

// dnnl_threadpool_interop_sgemm and _gemm_bf16bf16f32 of oneDNN 3: row-major; without a pool of threads they run in the
// caller; 0: success.
template <class T>
using Function = int (*)(
    char transpose_a, char transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const T* a, int64_t stride_a,
    const T* b, int64_t stride_b, float beta, float* c, int64_t stride_c, void* pool);

Function<float> sgemm = nullptr;
Function<uint16_t> bf16_gemm = nullptr;

template <class T>
bool call(
    Function<T> function, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t stride, bool add) {
    return function && function(
        a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', m, n, k, 1.0f, (const T*)a.data, a.stride,
        (const T*)b.data, b.stride, add ? 1.0f : 0.0f, c, stride, nullptr) == 0;
}

// AVX512_BF16 or AMX, which implies it.
bool processor_has_bf16() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
    return false;
#endif
}

// One product both ways: the functions are those of another project, whose layout is not checked by the compiler.
bool agrees() {
    constexpr int64_t m = 5, n = 19, k = 37;
    float x[m * k], w[n * k], exact[m * n], found[m * n];
    uint16_t x16[m * k], w16[n * k];
    for (int64_t i = 0; i < m * k; ++i) x[i] = (float)(i * 7 % 31 - 15);
    for (int64_t i = 0; i < n * k; ++i) w[i] = (float)(i * 5 % 29 - 14);
    kernels().to_bf16(x, x16, m * k);
    kernels().to_bf16(w, w16, n * k);
    if (!call(sgemm, m, n, k, {x, k, false}, {w, k, true}, exact, n, false)) return false;
    if (!call(bf16_gemm, m, n, k, {x16, k, false}, {w16, k, true}, found, n, false)) return false;
    return std::equal(exact, exact + m * n, found);  // small integers: every sum is exact
}

}  // namespace

bool open_blas(const char* file) {
    void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL);  // stays open: MindSpore has opened it as well
    if (!library) return false;
    sgemm = reinterpret_cast<Function<float>>(dlsym(library, "dnnl_threadpool_interop_sgemm"));
    bf16_gemm = reinterpret_cast<Function<uint16_t>>(dlsym(library, "dnnl_threadpool_interop_gemm_bf16bf16f32"));
    return sgemm != nullptr;
}

bool native_bf16() {
    static const bool native = processor_has_bf16() && agrees();
    return native;
}

int64_t size_of(Number number) { return number == Number::BFLOAT16 && native_bf16() ? 2 : 4; }

void convert(Number number, const float* from, void* to, int64_t count) {
    if (number == Number::FLOAT32)
        std::memcpy(to, from, count * sizeof(float));
    else if (native_bf16())
        kernels().to_bf16(from, static_cast<uint16_t*>(to), count);
    else
        kernels().round_to_bf16(from, static_cast<float*>(to), count);
}

bool gemm(Number number, int64_t m, int64_t n, int64_t k, Operand a, Operand b, float* c, int64_t stride, bool add) {
    if (size_of(number) == 2) return call(bf16_gemm, m, n, k, a, b, c, stride, add);
    return call(sgemm, m, n, k, a, b, c, stride, add);
}

namespace {

// Elements that one thread converts at a time, and rows and columns of a result that it computes at a time.
// oneDNN needs half as long again for float32 tiles of 512 x 512 if the first matrix is transposed.
constexpr int64_t CONVERTED = 1 << 15, TILE = 512, TRANSPOSED_ROWS = 1024;

// An operand of a product: the matrix itself, or rounded.
class Converted {
public:
    Converted(Number number, const float* from, int64_t count) : data_(from) {
        if (number == Number::FLOAT32) return;
        const int64_t size = size_of(number);
        memory_.reset(new char[count * size]);
        parallel_for((count + CONVERTED - 1) / CONVERTED, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * CONVERTED, last = std::min(end * CONVERTED, count);
            convert(number, from + first, memory_.get() + first * size, last - first);
        });
        data_ = memory_.get();
    }
    // From an element on.
    const void* at(int64_t offset, Number number) const {
        return static_cast<const char*>(data_) + offset * size_of(number);
    }

private:
    const void* data_;
    std::unique_ptr<char[]> memory_;
};

}  // namespace

bool product_of(
    Number number, int64_t m, int64_t n, int64_t k, const float* a, bool a_transposed, const float* b,
    bool b_transposed, float* c) {
    if (m == 0 || n == 0) return true;
    if (k == 0) {
        std::fill_n(c, m * n, 0.0f);
        return true;
    }
    const Converted first(number, a, m * k), second(number, b, k * n);
    const int64_t a_stride = a_transposed ? m : k, b_stride = b_transposed ? k : n;
    const int64_t height = a_transposed && size_of(number) == 4 ? TRANSPOSED_ROWS : TILE;
    const int64_t rows = (m + height - 1) / height, columns = (n + TILE - 1) / TILE;
    std::atomic<bool> good{true};
    parallel_for(rows * columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t row = tile / columns * height, column = tile % columns * TILE;
            const Operand left{first.at(a_transposed ? row : row * k, number), a_stride, a_transposed};
            const Operand right{second.at(b_transposed ? column * k : column, number), b_stride, b_transposed};
            if (!gemm(number, std::min(height, m - row), std::min(TILE, n - column), k, left, right,
                      c + row * n + column, n, false))
                good = false;
        }
    });
    return good;
}

}  // namespace glm
