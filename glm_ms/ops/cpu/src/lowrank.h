// Low-rank updates of linear layers: y += scale B A x, of the network or of each row.
//
// Hu et al. 2021, arXiv:2106.09685.

struct Update {
    Array a;  // of the network [r, in], of the rows [adapters, r, in]; absent: there is none
    Array b;  // [out, r], of the rows [adapters, r, out]
    float scale;

    bool of_rows() const { return a.dims == 3; }
};

static inline float dot_as(const Array& array, int64_t at, const float* x, int64_t size) {
    Vec total = zero();
    for (int64_t i = 0; i < size; i += LANES)
        total = fma(load_as(array, at + i, size - i), load(x + i, size - i), total);
    return sum(total);
}

// y [count, out] += the update of x [count, in].
static inline void add_update(const Update& update, const Run& run, const float* x, int64_t in, float* y, int64_t out) {
    if (!update.a) return;
    const int64_t rank = update.a.shape[update.of_rows() ? 1 : 0];
    const Row* rows = run.rows();
    float* down = scratch_of<float>(ADAPTER, run.count * rank);
    parallel_for(run.count * rank, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / rank, number = update.of_rows() ? rows[row].adapter * rank : 0;
            if (update.of_rows() && !rows[row].adapter) continue;
            down[i] = dot_as(update.a, (number + i % rank) * in, x + row * in, in) * update.scale;
        }
    });
    const int64_t parts = (out + 511) / 512;
    parallel_for(run.count * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / parts, start = i % parts * 512, stop = smaller(start + 512, out);
            const float* low = down + row * rank;
            float* to = y + row * out;
            if (!update.of_rows()) {
                for (int64_t o = start; o < stop; ++o) to[o] += dot_as(update.b, o * rank, low, rank);
                continue;
            }
            if (!rows[row].adapter) continue;
            const int64_t number = rows[row].adapter * rank;
            for (int64_t o = start; o < stop; o += LANES) {
                Vec total = load(to + o, stop - o);
                for (int64_t k = 0; k < rank; ++k)
                    total = fma(load_as(update.b, (number + k) * out + o, stop - o), set1(low[k]), total);
                store(to + o, total, stop - o);
            }
        }
    });
}
