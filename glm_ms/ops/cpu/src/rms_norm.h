// RMS norm of a row, y = x r weight with r = 1 / sqrt(mean(x^2) + eps), and its gradients.

static inline float dot_of_three(const float* a, const float* b, const float* c, int64_t width) {
    Vec total = zero();
    for (int64_t i = 0; i < width; i += LANES)
        total = fma(load(a + i, width - i) * load(b + i, width - i), load(c + i, width - i), total);
    return sum(total);
}

static inline float inverse_rms(const float* x, int64_t width, float eps) {
    return 1.0f / std::sqrt(square_sum(x, width) / (float)width + eps);
}

// x, weight [width] -> y [width].
void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* y) {
    const Vec r = set1(inverse_rms(x, width, eps));
    for (int64_t i = 0; i < width; i += LANES)
        store(y + i, load(x + i, width - i) * r * load(weight + i, width - i), width - i);
}

// gradient of y [width] -> gradient of x [width]: r weight dy - x r^3 / width sum(weight dy x).
void rms_norm_gradient(
    const float* x, const float* weight, const float* gradient, int64_t width, float eps, float* of_x) {
    const float inverse = inverse_rms(x, width, eps), along = dot_of_three(x, weight, gradient, width);
    const Vec r = set1(inverse), back = set1(-(inverse * inverse * (along / (float)width)));
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t rest = width - i;
        Vec scaled = load(weight + i, rest) * load(gradient + i, rest);
        store(of_x + i, fma(load(x + i, rest), back, scaled) * r, rest);
    }
}

// Adds the summand of one row, x r dy, to the gradient of the weight [width].
void rms_norm_weight_gradient(const float* x, const float* gradient, int64_t width, float eps, float* of_weight) {
    const Vec r = set1(inverse_rms(x, width, eps));
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t rest = width - i;
        store(of_weight + i, fma(load(x + i, rest) * r, load(gradient + i, rest), load(of_weight + i, rest)), rest);
    }
}
