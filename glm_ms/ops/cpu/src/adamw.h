// One update of AdamW in place, all in one pass over weight, moments and gradient.

// weight, m, v and gradient [count]. The moments take the gradient times `scale`:
//     g = gradient scale, m += (g - m) (1 - beta1), v += (g^2 - v) (1 - beta2),
//     weight -= rate (m / (sqrt(v) + eps) + decay weight)
void adamw(float* weight, float* m, float* v, const float* gradient, int64_t count, const AdamWStep& step) {
    const Vec scale = set1(step.scale), part1 = set1(1.0f - step.beta1), part2 = set1(1.0f - step.beta2);
    const Vec rate = set1(-step.rate), eps = set1(step.eps), decay = set1(step.decay);
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t rest = count - i;
        Vec g = load(gradient + i, rest) * scale;
        Vec first = load(m + i, rest), second = load(v + i, rest), w = load(weight + i, rest);
        first = fma(g - first, part1, first);
        second = fma(fma(g, g, zero() - second), part2, second);
        w = fma(fma(decay, w, first / (sqrt(second) + eps)), rate, w);
        store(m + i, first, rest);
        store(v + i, second, rest);
        store(weight + i, w, rest);
    }
}
