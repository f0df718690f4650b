// Attention of one row over the pages of its sequence, page after page with a running maximum.
//
// Milakov & Gimelshein 2018, arXiv:1805.02867. Every head of a row is computed alone and in the order of the keys, so
// its bits depend neither on other rows nor on how the work is divided.

// Heads whose sums are in registers at a time.
constexpr int64_t HEADS = 4;

// Scores [N][PAGE] of N heads: query [N][dim], keys [dim][PAGE].
template <int N>
static inline void page_scores(const float* query, int64_t dim, const float* keys, float* scores) {
    Vec total[N];
    for (int h = 0; h < N; ++h) total[h] = zero();
    for (int64_t d = 0; d < dim; ++d) {
        const Vec key = load(keys + d * PAGE);
        for (int h = 0; h < N; ++h) total[h] = fma(set1(query[h * dim + d]), key, total[h]);
    }
    for (int h = 0; h < N; ++h) store(scores + h * PAGE, total[h]);
}

// Adds weights [N][PAGE] times values [PAGE][width] of the places from `begin` to `end` to mixed [N][width].
template <int N>
static inline void page_mix(const float* weights, const float* values, int64_t begin, int64_t end, int64_t width,
                     float* mixed) {
    for (int64_t i = 0; i < width; i += LANES) {
        Vec total[N];
        for (int h = 0; h < N; ++h) total[h] = load(mixed + h * width + i);
        for (int64_t t = begin; t < end; ++t) {
            const Vec value = load(values + t * width + i);
            for (int h = 0; h < N; ++h) total[h] = fma(set1(weights[h * PAGE + t]), value, total[h]);
        }
        for (int h = 0; h < N; ++h) store(mixed + h * width + i, total[h]);
    }
}

// Calls f(first head, number of them as a constant) for all heads, HEADS at a time.
template <class F>
static inline void by_heads(int64_t heads, F f) {
    int64_t h = 0;
    for (; h + HEADS <= heads; h += HEADS) f(h, std::integral_constant<int, HEADS>());
    for (; h < heads; ++h) f(h, std::integral_constant<int, 1>());
}

// The softmax of some heads over the pages so far.
struct Softmax {
    float *mixed, *weights, *top, *total;  // [heads][width], [heads][PAGE], [heads], [heads]
    int64_t width;

    // The scores of a page become weights, those outside [begin, end) zero; scales of keys and values or null.
    void weigh(int64_t h, int64_t begin, int64_t end, const float* scales) {
        float* one = weights + h * PAGE;
        if (scales) store(one, load(one) * load(scales));
        float peak = top[h];
        for (int64_t t = begin; t < end; ++t)
            if (one[t] > peak) peak = one[t];
        if (peak > top[h]) {
            if (total[h] != 0) fade(h, peak);
            top[h] = peak;
        }
        store(one, exp(load(one) - set1(peak)));
        for (int64_t t = 0; t < begin; ++t) one[t] = 0;
        for (int64_t t = end; t < PAGE; ++t) one[t] = 0;
        total[h] += sum(load(one));
        if (scales)
            for (int64_t t = begin; t < end; ++t) one[t] *= scales[PAGE + t];
    }

private:
    // What was summed up with the maximum so far, for a new one.
    void fade(int64_t h, float peak) {
        float factor[LANES];
        store(factor, exp(set1(top[h] - peak)));
        total[h] *= factor[0];
        for (int64_t i = 0; i < width; i += LANES) {
            float* part = mixed + h * width + i;
            store(part, load(part) * set1(factor[0]));
        }
    }
};

// Query heads [heads][dim] of one group, scaled and rotated -> [heads][dim].
static inline void attend_heads(const Row& row, const Pages& pages, int64_t group, int64_t heads, int64_t dim,
                         const float* query, float* out) {
    const int64_t width = Pages::padded(dim);
    float* keys_room = scratch_of<float>(ATTENTION, PAGE * (dim + width) + heads * (width + PAGE + 2));
    float *values_room = keys_room + PAGE * dim, *mixed = values_room + PAGE * width, *weights = mixed + heads * width;
    float *top = weights + heads * PAGE, *total = top + heads;
    Softmax softmax = {mixed, weights, top, total, width};
    for (int64_t i = 0; i < heads * width; ++i) mixed[i] = 0;
    for (int64_t h = 0; h < heads; ++h) top[h] = -INFINITY, total[h] = 0;
    for (int64_t number = row.first / PAGE; number <= row.index / PAGE; ++number) {
        const int64_t page = row.pages[number], start = number * PAGE;
        const int64_t begin = row.first > start ? row.first - start : 0;
        const int64_t end = smaller(row.index - start + 1, PAGE);
        const float *keys = pages.keys(page, group, keys_room), *scales = pages.scales(page, group);
        by_heads(heads, [&](int64_t h, auto n) { page_scores<n>(query + h * dim, dim, keys, weights + h * PAGE); });
        for (int64_t h = 0; h < heads; ++h) softmax.weigh(h, begin, end, scales);
        const float* values = pages.values(page, group, values_room);
        by_heads(heads, [&](int64_t h, auto n) {
            page_mix<n>(weights + h * PAGE, values, begin, end, width, mixed + h * width);
        });
    }
    for (int64_t h = 0; h < heads; ++h) {
        const float factor = 1 / total[h];
        for (int64_t d = 0; d < dim; ++d) out[h * dim + d] = mixed[h * width + d] * factor;
    }
}
