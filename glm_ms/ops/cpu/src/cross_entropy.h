// Cross entropy of one row of scores; its gradient replaces the scores.

// x [count] becomes softmax(x), less 1 at `target`: the gradient of the result, -log softmax(x)[target].
float cross_entropy(float* x, int64_t count, int64_t target) {
    const float picked = x[target];
    Vec largest = set1(x[0]);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) largest = max(load(x + i), largest);
    float top = max_of(largest);
    for (; i < count; ++i) top = x[i] > top ? x[i] : top;
    const Vec shift = set1(top);
    Vec a = zero(), b = zero();
    for (i = 0; i + 2 * LANES <= count; i += 2 * LANES) {
        Vec p = exp(load(x + i) - shift), q = exp(load(x + i + LANES) - shift);
        store(x + i, p);
        store(x + i + LANES, q);
        a = a + p;
        b = b + q;
    }
    for (; i < count; i += LANES) {
        store(x + i, exp(load(x + i, count - i) - shift), count - i);
        a = a + load(x + i, count - i);  // lanes behind the row count as zero
    }
    const float total = sum(a + b);
    const Vec scale = set1(1.0f / total);
    for (i = 0; i < count; i += LANES) store(x + i, load(x + i, count - i) * scale, count - i);
    x[target] -= 1.0f;
    return (float)(std::log((double)total) + ((double)top - (double)picked));
}
