// RMSNorm and LayerNorm of rows, in float32.

struct Norm {
    Array weight;  // [H]; absent: there is no norm
    Array bias;    // [H]; absent: RMSNorm
    float eps;
};

// Source: Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
static inline void normalize(const Norm& norm, const float* x, float* y, int64_t size) {
    float mean = 0;
    if (norm.bias) {
        Vec total = zero();
        for (int64_t i = 0; i < size; i += LANES) total = total + load(x + i, size - i);
        mean = sum(total) / static_cast<float>(size);
    }
    Vec squares = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec away = first_lanes(load(x + i, size - i) - set1(mean), size - i);
        squares = fma(away, away, squares);
    }
    const Vec scale = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + norm.eps));
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t left = size - i;
        Vec one = (load(x + i, left) - set1(mean)) * scale * load_as(norm.weight, i, left);
        if (norm.bias) one = one + load_as(norm.bias, i, left);
        store(y + i, one, left);
    }
}
