// Sum of the squares of a gradient.
//
// A block is added up in 4 x 16 lanes of float32, so the order of additions depends on the size alone; the caller adds
// the blocks in double, in their order. An infinity or NaN anywhere makes the sum infinite or NaN.

// x [count] -> sum of squares.
float square_sum(const float* x, int64_t count) {
    Vec a = zero(), b = zero(), c = zero(), d = zero();
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        Vec p = load(x + i), q = load(x + i + LANES), r = load(x + i + 2 * LANES), s = load(x + i + 3 * LANES);
        a = fma(p, p, a);
        b = fma(q, q, b);
        c = fma(r, r, c);
        d = fma(s, s, d);
    }
    for (; i < count; i += LANES) {
        Vec p = load(x + i, count - i);
        a = fma(p, p, a);
    }
    return sum((a + b) + (c + d));
}
