// Weights of float32, bfloat16 and float16, row-major, and what all their products have.
//
// The definition of a result: lane l of 16 adds x[k] w[k] for k = l, l + 16, ... in order, one fma each; inputs behind
// the end are zero; `sum` adds the lanes. All ways compute it, so a row has the same bits in any number of rows.

struct WeightF32 {
    using Type = float;
    static Vec get(const float* p) { return load(p); }
    static Vec get(const float* p, int64_t count) { return load(p, count); }
    static Part part(const float* p) { return part_load(p); }
};
struct WeightBF16 {
    using Type = uint16_t;
    static Vec get(const uint16_t* p) { return load_bf16(p); }
    static Vec get(const uint16_t* p, int64_t count) { return load_bf16(p, count); }
    static Part part(const uint16_t* p) { return part_load_bf16(p); }
};
struct WeightF16 {
    using Type = uint16_t;
    static Vec get(const uint16_t* p) { return load_f16(p); }
    static Vec get(const uint16_t* p, int64_t count) { return load_f16(p, count); }
    static Part part(const uint16_t* p) { return part_load_f16(p); }
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void finish(const Rows& rows, int64_t row, int64_t output, float value) {
    float* y = rows.y + row * rows.y_stride + output;
    if (rows.bias) value = value + rows.bias[output];
    *y = rows.add ? *y + value : value;
}

// 16 outputs of a row, the first of which is `output`; those behind the last one are padding.
static inline void finish_panel(const Rows& rows, int64_t row, int64_t output, int64_t outputs, Vec values) {
    float* y = rows.y + row * rows.y_stride + output;
    const int64_t count = smaller(outputs - output, LANES);
    if (rows.bias) values = values + load(rows.bias + output, count);
    store(y, rows.add ? load(y, count) + values : values, count);
}

// Inputs [begin, begin + width) of `rows` rows, `stride` apart, as an operand of a tile that has `of` rows; the last
// `of - rows` are zero, and so are inputs from k on. Parts are `part_stride` apart.
template <class W>
static inline void pack(
    const typename W::Type* source, int64_t stride, int64_t rows, int64_t of, int64_t begin, int64_t width, int64_t k,
    float* to, int64_t part_stride) {
    const int64_t steps = width / LANES, known = smaller(width, k - begin) / LANES;
    const auto put = [&](int64_t row, int64_t step, Vec value) {
        for (int part = 0; part < PARTS; ++part)
            part_store(to + part * part_stride + (step * of + row) * PART, part_of(value, part));
    };
    for (int64_t row = 0; row < of; ++row) {
        const typename W::Type* from = source + row * stride + begin;
        int64_t step = 0;
        if (row < rows) {
            for (; step < known; ++step) put(row, step, W::get(from + step * LANES));
            if (step < steps) put(row, step, W::get(from + step * LANES, k - begin - step * LANES)), ++step;
        }
        for (; step < steps; ++step) put(row, step, zero());
    }
}
