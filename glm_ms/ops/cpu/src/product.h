// y = x W^T + bias for every weight format.

// The definition of the result for row-major weights: lane l of 16 adds x[k] w[k] for k = l, l + 16, ... in order, one
// fma each; inputs behind the end are zero; `sum` adds the lanes.
template <class Load>
static inline float dot(const float* x, int64_t k, Load load_weight) {
    Vec total = zero();
    for (int64_t i = 0; i < k; i += LANES) total = fma(load(x + i, k - i), load_weight(i, k - i), total);
    return sum(total);
}

static inline void finish(const Rows& rows, int64_t row, int64_t output, float value) {
    float* y = rows.y + row * rows.y_stride + output;
    if (rows.bias) value = value + rows.bias[output];
    *y = rows.add ? *y + value : value;
}

void product(const Matrix& weight, const Rows& rows) {
    parallel_for(weight.n, 16, [&](int64_t begin, int64_t end) {
        for (int64_t output = begin; output < end; ++output)
            for (int64_t row = 0; row < rows.count; ++row) {
                const float* w = (const float*)weight.data + output * weight.k;
                auto values = [&](int64_t i, int64_t left) { return load(w + i, left); };
                finish(rows, row, output, dot(rows.x + row * rows.x_stride, weight.k, values));
            }
    });
}
