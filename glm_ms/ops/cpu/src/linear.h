// A linear layer of the network for the rows of a run.

struct Linear {
    Array weight;  // its type is also its layout, see matrix.h
    Array scales;  // of a quantised weight
    Array bias;    // [out]; absent: none
    Update update;
    int64_t in, out;

    Matrix matrix() const {
        int64_t group = weight.type == Type::INT4 ? weight.shape[1] * 8 / scales.shape[1] : 0;
        return {format(), weight.data, scales.data, out, in, group};
    }

private:
    Format format() const {
        switch (weight.type) {
            case Type::F16: return Format::F16;
            case Type::BF16: return Format::BF16;
            case Type::INT8: return Format::INT8;
            case Type::INT4: return Format::INT4;
            default: return Format::F32;
        }
    }
};

// y [count, out] = x [count, in] W^T + bias + update, with `add` added to what is in y.
static inline void apply(const Linear& linear, const Run& run, const float* x, float* y, bool add = false) {
    const int64_t in = linear.in, out = linear.out;
    const float* bias = linear.bias.type == Type::F32 ? (const float*)linear.bias.data : nullptr;
    if (linear.bias && !bias) {
        float* copy = scratch_of<float>(ADAPTER, out);
        for (int64_t o = 0; o < out; o += LANES) store(copy + o, load_as(linear.bias, o, out - o), out - o);
        bias = copy;
    }
    product(linear.matrix(), {x, in, run.count, y, out, bias, add});
    add_update(linear.update, run, x, in, y, out);
}
