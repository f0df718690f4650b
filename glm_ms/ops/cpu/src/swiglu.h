// silu(gate) up of a row [gate | up], and its gradient.

// x [2 width] -> y [width].
void swiglu(const float* x, int64_t width, float* y) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t rest = width - i;
        store(y + i, silu(load(x + i, rest)) * load(x + width + i, rest), rest);
    }
}

// gradient of y [width] -> gradient of x [2 width].
void swiglu_gradient(const float* x, const float* gradient, int64_t width, float* of_x) {
    const Vec one = set1(1.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t rest = width - i;
        const Vec gate = load(x + i, rest), up = load(x + width + i, rest), g = load(gradient + i, rest);
        const Vec sigmoid = one / (one + exp(zero() - gate));
        const Vec activated = gate * sigmoid;
        store(of_x + i, g * up * fma(activated, one - sigmoid, sigmoid), rest);
        store(of_x + width + i, g * activated, rest);
    }
}
