// The operators of the decoder: embedding, three for each layer, output layer. See glm_ms/ops/cpu/operators.py.
//
// All run over rows, each a token of a sequence (call.h). What a row gets depends on its sequence alone: not on other
// rows, their number, threads or instruction set.

static inline Norm read_norm(Inputs& inputs, Numbers& numbers) {
    Norm norm;
    norm.weight = inputs.next();
    norm.bias = inputs.next();
    norm.eps = numbers.real();
    return norm;
}

static inline Linear read_linear(Inputs& inputs, Numbers& numbers) {
    Linear linear;
    linear.weight = inputs.next();
    linear.scales = inputs.next();
    linear.bias = inputs.next();
    linear.update.a = inputs.next();
    linear.update.b = inputs.next();
    linear.in = numbers.integer();
    linear.out = numbers.integer();
    linear.update.scale = numbers.real();
    return linear;
}

static inline void normalize_rows(const Norm& norm, int64_t count, const float* x, float* y, int64_t size) {
    parallel_for(count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) normalize(norm, x + row * size, y + row * size, size);
    });
}

// The residual branch: y = x, or with `after_norm` y = norm(x), for rows of `size`.
static inline void begin_residual(bool after_norm, const Norm& norm, int64_t count, const float* x, float* y,
                                  int64_t size) {
    if (after_norm)
        normalize_rows(norm, count, x, y, size);
    else
        std::memcpy(y, x, count * size * sizeof(float));
}

// Rows, numbers (H), table [V, H] -> x [R, H].
int embed_rows(const Call& call) {
    Inputs inputs(call);
    const Run& run = *inputs.data<const Run>();
    Numbers numbers(inputs.data<const double>());
    const Array table = inputs.next();
    const int64_t size = numbers.integer();
    float* y = inputs.data<float>();
    for (int64_t row = 0; row < run.count; ++row)
        for (int64_t i = 0; i < size; i += LANES)
            store(y + row * size + i, load_as(table, run.rows()[row].token * size + i, size - i), size - i);
    return 0;
}

// Sizes of the attention of a network.
struct AttentionSizes {
    int64_t layer, heads, groups, dim;
    bool interleaved;  // rows of qkv are [head, (q, k, v), D], else [all q | all k | all v]

    // Where the query, key or value (part 0, 1, 2) of a head or group begins in a row of qkv.
    int64_t place(int part, int64_t head) const {
        if (interleaved) return (head * 3 + part) * dim;
        return (part == 0 ? head : heads + (part - 1) * groups + head) * dim;
    }
};

// Rotates and scales the queries of a row, and stores its keys and values. The heads of a group follow one another in
// `query`, whose groups are `step` apart.
static inline void store_row(const AttentionSizes& sizes, const Row& row, const float* table, float* qkv, float* query,
                             int64_t step, const Pages& pages) {
    const int64_t dim = sizes.dim, per_group = sizes.heads / sizes.groups;
    const float scale = (float)(1.0 / std::sqrt((double)dim));
    for (int64_t head = 0; head < sizes.heads; ++head) {
        float* from = qkv + sizes.place(0, head);
        rotate(from, table, dim);
        float* to = query + head / per_group * step + head % per_group * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * scale;
    }
    for (int64_t group = 0; group < sizes.groups; ++group) {
        float* key = qkv + sizes.place(1, group);
        rotate(key, table, dim);
        pages.write(row.pages[row.index / PAGE], group, row.index % PAGE, key, qkv + sizes.place(2, group));
    }
}

// Rows, x [R, H], cosines and sines [positions, 2, D / 4], numbers, norm, qkv layer -> mixed values [R, heads * D].
int attend_rows(const Call& call) {
    Inputs inputs(call);
    const Run& run = *inputs.data<const Run>();
    const float *x = inputs.data<const float>(), *angles = inputs.data<const float>();
    Numbers numbers(inputs.data<const double>());
    AttentionSizes sizes;
    sizes.layer = numbers.integer();
    sizes.heads = numbers.integer();
    sizes.groups = numbers.integer();
    sizes.dim = numbers.integer();
    sizes.interleaved = numbers.flag();
    const Norm norm = read_norm(inputs, numbers);
    const Linear linear = read_linear(inputs, numbers);
    float* mixed = inputs.data<float>();

    const int64_t count = run.count, dim = sizes.dim, width = sizes.heads * dim;
    if (count == 0) return 0;
    float* normed = scratch_of<float>(OPERATOR, count * (linear.in + linear.out + width));
    float *qkv = normed + count * linear.in, *query = qkv + count * linear.out;
    normalize_rows(norm, count, x, normed, linear.in);
    apply(linear, run, normed, qkv);
    const Pages pages(run, sizes.layer, sizes.groups, dim);
    int64_t* places = scratch_of<int64_t>(ROWS, 2 * count);
    Tiles tiles = {run.rows(), places, places + count, 0, sizes.heads / sizes.groups, sizes.groups, dim, query};
    divide_rows(count, tiles);
    parallel_for(tiles.count, 1 + 3 * tiles.count / count, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tiles.first[tile], size = tiles.size[tile], step = tiles.heads * dim;
            for (int64_t i = 0; i < size; ++i) {
                const Row& row = tiles.rows[first + i];
                store_row(sizes, row, angles + row.position * (dim / 2), qkv + (first + i) * linear.out,
                          query + first * width + i * step, size * step, pages);
            }
        }
    });
    attend_tiles(tiles, pages, mixed);
    return 0;
}

// Rows, mixed [R, heads * D], x [R, H], numbers, norm, output projection -> x + projection [R, H].
int project_rows(const Call& call) {
    Inputs inputs(call);
    const Run& run = *inputs.data<const Run>();
    const float *mixed = inputs.data<const float>(), *x = inputs.data<const float>();
    Numbers numbers(inputs.data<const double>());
    const bool after_norm = numbers.flag();
    const Norm norm = read_norm(inputs, numbers);
    const Linear linear = read_linear(inputs, numbers);
    float* y = inputs.data<float>();
    begin_residual(after_norm, norm, run.count, x, y, linear.out);
    apply(linear, run, mixed, y, true);
    return 0;
}

// Rows, x [R, H], numbers, norm, the two layers of the MLP -> x + MLP [R, H].
int mlp_rows(const Call& call) {
    Inputs inputs(call);
    const Run& run = *inputs.data<const Run>();
    const float* x = inputs.data<const float>();
    Numbers numbers(inputs.data<const double>());
    const bool after_norm = numbers.flag();
    const Norm norm = read_norm(inputs, numbers);
    const Linear up = read_linear(inputs, numbers), down = read_linear(inputs, numbers);
    float* y = inputs.data<float>();

    const int64_t count = run.count;
    float* normed = scratch_of<float>(OPERATOR, count * (up.in + up.out + down.in));
    float *wide = normed + count * up.in, *gated = wide + count * up.out;
    normalize_rows(norm, count, x, normed, up.in);
    apply(up, run, normed, wide);
    constexpr int64_t block = 1024;
    const int64_t parts = (down.in + block - 1) / block;
    parallel_for(count * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float *gate = wide + i / parts * up.out, *factor = gate + down.in;
            float* to = gated + i / parts * down.in;
            const int64_t start = i % parts * block, stop = smaller(start + block, down.in);
            for (int64_t f = start; f < stop; f += LANES)
                store(to + f, silu(load(gate + f, stop - f)) * load(factor + f, stop - f), stop - f);
        }
    });
    begin_residual(after_norm, norm, count, x, y, down.out);
    apply(down, run, gated, y, true);
    return 0;
}

static inline bool all_finite(const float* x, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
        if (!std::isfinite(x[i])) return false;
    return true;
}

// Logits of the rows of `run` from normed [count, in]. They may lie anywhere: side by side they need no copy.
static inline void write_logits(const Linear& linear, const Run& run, const float* normed, float* room) {
    const Row* rows = run.rows();
    bool side_by_side = true;
    for (int64_t i = 1; i < run.count; ++i) side_by_side &= rows[i].logits == rows[i - 1].logits + linear.out;
    float* logits = side_by_side ? rows[0].logits : room;
    apply(linear, run, normed, logits);
    for (int64_t i = 0; i < run.count && !side_by_side; ++i)
        std::memcpy(rows[i].logits, logits + i * linear.out, linear.out * sizeof(float));
}

// Rows, x [R, H], numbers, norm, output layer -> int32 [1], rows with logits. Logits go where each row says.
int output_rows(const Call& call) {
    Inputs inputs(call);
    const Run& run = *inputs.data<const Run>();
    const float* x = inputs.data<const float>();
    Numbers numbers(inputs.data<const double>());
    const Norm norm = read_norm(inputs, numbers);
    const Linear linear = read_linear(inputs, numbers);
    int32_t* asked = inputs.data<int32_t>();

    constexpr int64_t most = 16;  // rows at a time; any number gives the same bits
    struct {
        Run run;
        Row rows[most];
    } some;
    some.run = run;
    some.run.count = 0;
    float* normed = scratch_of<float>(OPERATOR, most * (linear.in + linear.out));
    *asked = 0;
    for (int64_t row = 0; row < run.count; ++row) {
        const float* from = x + row * linear.in;
        run.finite[row] = all_finite(from, linear.in);
        if (!run.rows()[row].logits) continue;
        float* to = normed + some.run.count * linear.in;
        if (norm.weight)
            normalize(norm, from, to, linear.in);
        else
            std::memcpy(to, from, linear.in * sizeof(float));
        some.rows[some.run.count++] = run.rows()[row];
        ++*asked;
        if (some.run.count == most) {
            write_logits(linear, some.run, normed, normed + most * linear.in);
            some.run.count = 0;
        }
    }
    if (some.run.count) write_logits(linear, some.run, normed, normed + most * linear.in);
    return 0;
}
