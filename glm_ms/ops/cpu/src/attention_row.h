// Rows of attention weights in training.

// scores [count] become softmax(scores scale + bias).
void attention_softmax(float* scores, const float* bias, int64_t count, float scale) {
    const Vec factor = set1(scale);
    Vec largest = set1(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t rest = count - i;
        const Vec x = fma(load(scores + i, rest), factor, load(bias + i, rest));
        store(scores + i, x, rest);
        if (rest >= LANES) largest = max(x, largest);
    }
    float top = max_of(largest);
    for (int64_t i = count / LANES * LANES; i < count; ++i) top = scores[i] > top ? scores[i] : top;
    const Vec shift = set1(top);
    Vec total = zero();
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t rest = count - i;
        store(scores + i, exp(load(scores + i, rest) - shift), rest);
        total = total + load(scores + i, rest);  // lanes behind the row count as zero
    }
    const Vec part = set1(1.0f / sum(total));
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i, count - i) * part, count - i);
}

// gradient [count], of the weights, becomes that of the unscaled scores: weights (gradient - mean) scale.
void attention_gradient(float* gradient, const float* weights, int64_t count, float scale, float mean) {
    const Vec factor = set1(scale), middle = set1(mean);
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t rest = count - i;
        store(gradient + i, load(weights + i, rest) * (load(gradient + i, rest) - middle) * factor, rest);
    }
}

float dot_product(const float* a, const float* b, int64_t count) {
    Vec total = zero();
    for (int64_t i = 0; i < count; i += LANES) total = fma(load(a + i, count - i), load(b + i, count - i), total);
    return sum(total);
}
