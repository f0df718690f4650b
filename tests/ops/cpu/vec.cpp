// Every function of vec.h over many values, one line each: its name and a hash of the results. `-DGLM_AVX2` and the
// like select the instruction set. The last lines are errors of `exp` and `silu` against float64.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#if defined(GLM_TRANSLATED)
#include GLM_TRANSLATED
#elif defined(GLM_AVX512) || defined(GLM_AVX2)
#include <immintrin.h>
#elif defined(GLM_NEON)
#include <arm_neon.h>
#endif

#include "bits.h"

namespace glm {
#include "vec.h"
}

using namespace glm;

namespace {

struct Hash {
    uint64_t value = 1469598103934665603u;
    void add(uint32_t bits) { value = (value ^ bits) * 1099511628211u; }
    void add(float number) { add(number != number ? 0x7fc00000u : bits_of_float(number)); }
    void add(Vec v) {
        float lanes[LANES];
        store(lanes, v);
        for (float lane : lanes) add(lane);
    }
    void print(const char* name) const { std::printf("%s %016llx\n", name, (unsigned long long)value); }
};

// Floats of every size and sign: bits in equal steps, also NaN, infinities and subnormals. A multiple of 16.
std::vector<float> all_sizes() {
    std::vector<float> values;
    for (uint64_t bits = 0; bits < (1ull << 32); bits += 20011) values.push_back(float_of_bits((uint32_t)bits));
    while (values.size() % LANES) values.push_back(INFINITY);
    return values;
}

template <class F>
void one(const char* name, const std::vector<float>& x, F f) {
    Hash hash;
    for (size_t i = 0; i < x.size(); i += LANES) hash.add(f(load(x.data() + i)));
    hash.print(name);
}

template <class F>
void two(const char* name, const std::vector<float>& x, F f) {
    Hash hash;
    for (size_t i = 0; i + 48 < x.size(); i += LANES)
        for (size_t step : {16, 33, 48}) {
            hash.add(f(load(x.data() + i), load(x.data() + x.size() - LANES - i)));
            hash.add(f(load(x.data() + i), load(x.data() + (i * 7 + step) % (x.size() - LANES))));
        }
    hash.print(name);
}

void conversions() {
    Hash bf16, f16, i8;
    for (uint32_t base = 0; base < 65536; base += LANES) {
        uint16_t values[LANES];
        int8_t bytes[LANES];
        for (uint32_t i = 0; i < LANES; ++i) values[i] = (uint16_t)(base + i), bytes[i] = (int8_t)(base + i);
        bf16.add(load_bf16(values)), f16.add(load_f16(values)), i8.add(load_i8(bytes));
        for (int64_t count : {0, 1, 15}) {
            bf16.add(load_bf16(values, count)), f16.add(load_f16(values, count)), i8.add(load_i8(bytes, count));
        }
    }
    bf16.print("load_bf16"), f16.print("load_f16"), i8.print("load_i8");
}

void stores(const std::vector<float>& x) {
    Hash bf16, i8;
    for (size_t i = 0; i < x.size(); i += LANES) {
        uint16_t halves[LANES] = {};
        int8_t bytes[LANES] = {};
        store_bf16(halves, load(x.data() + i), i % 48 ? 16 : 9);
        store_i8(bytes, load(x.data() + i), i % 48 ? 16 : 9);
        for (int j = 0; j < LANES; ++j) {
            bf16.add((halves[j] & 0x7fff) > 0x7f80 ? 0u : (uint32_t)halves[j]);  // NaN: 0
            i8.add((uint32_t)(uint8_t)bytes[j]);
        }
    }
    bf16.print("store_bf16"), i8.print("store_i8");
}

// Largest error in units of the last place of the right value, where that is a normal number.
template <class F, class G>
void error(const char* name, F f, G right) {
    double worst = 0;
    for (float base = -87.0f; base < 88.0f; base += 0.0103f) {
        float x[LANES], y[LANES];
        for (int i = 0; i < LANES; ++i) x[i] = base + (float)i * 6.1e-4f;
        store(y, f(load(x)));
        for (int i = 0; i < LANES; ++i) {
            double exact = right((double)x[i]);
            double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
            worst = std::fmax(worst, std::fabs((double)y[i] - exact) / ulp);
        }
    }
    std::printf("error %s %.3f\n", name, worst);
}

}  // namespace

int main() {
    std::vector<float> x = all_sizes();
    conversions();
    stores(x);
    two("add", x, [](Vec a, Vec b) { return a + b; });
    two("subtract", x, [](Vec a, Vec b) { return a - b; });
    two("multiply", x, [](Vec a, Vec b) { return a * b; });
    two("divide", x, [](Vec a, Vec b) { return a / b; });
    two("fma", x, [](Vec a, Vec b) { return fma(a, b, b); });
    two("max", x, [](Vec a, Vec b) { return max(a, b); });
    two("min", x, [](Vec a, Vec b) { return min(a, b); });
    one("sqrt", x, [](Vec a) { return sqrt(a); });
    one("abs", x, [](Vec a) { return abs(a); });
    one("round", x, [](Vec a) { return round(a); });
    one("sum", x, [](Vec a) { return sum(a); });
    one("max_of", x, [](Vec a) { return max_of(a); });
    one("exp", x, [](Vec a) { return exp(a); });
    one("silu", x, [](Vec a) { return silu(a); });
    float limits[LANES] = {-INFINITY, INFINITY, NAN, -1e30f, 1e30f, 0.0f, -103.0f, 88.8f}, results[LANES];
    store(results, exp(load(limits)));
    for (int i = 0; i < 8; ++i) std::printf("exp(%g) = %g\n", limits[i], results[i] != results[i] ? NAN : results[i]);
    error("exp", [](Vec a) { return exp(a); }, [](double a) { return std::exp(a); });
    error("silu", [](Vec a) { return silu(a); }, [](double a) { return a / (1 + std::exp(-a)); });
}
