// Products with weights of float32, bfloat16 and float16, row-major.
//
// The definition of a result: lane l of 16 adds x[k] w[k] for k = l, l + 16, ... in order, one fma each; inputs behind
// the end are zero; `sum` adds the lanes. Both ways below compute it, so a row has the same bits in any number of rows.

struct WeightF32 {
    using Type = float;
    static Vec get(const float* p) { return load(p); }
    static Vec get(const float* p, int64_t count) { return load(p, count); }
};
struct WeightBF16 {
    using Type = uint16_t;
    static Vec get(const uint16_t* p) { return load_bf16(p); }
    static Vec get(const uint16_t* p, int64_t count) { return load_bf16(p, count); }
};
struct WeightF16 {
    using Type = uint16_t;
    static Vec get(const uint16_t* p) { return load_f16(p); }
    static Vec get(const uint16_t* p, int64_t count) { return load_f16(p, count); }
};

static inline void finish(const Rows& rows, int64_t row, int64_t output, float value) {
    float* y = rows.y + row * rows.y_stride + output;
    if (rows.bias) value = value + rows.bias[output];
    *y = rows.add ? *y + value : value;
}

// M rows times R outputs straight from the weight.
template <class W, int M, int R>
static inline void few_outputs(const Matrix& weight, const Rows& rows, int64_t row, int64_t output) {
    const typename W::Type* w = (const typename W::Type*)weight.data + output * weight.k;
    const float* x = rows.x + row * rows.x_stride;
    Vec total[M][R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) total[m][r] = zero();
    int64_t i = 0;
    for (; i + LANES <= weight.k; i += LANES)
        for (int r = 0; r < R; ++r) {
            Vec value = W::get(w + r * weight.k + i);
            for (int m = 0; m < M; ++m) total[m][r] = fma(load(x + m * rows.x_stride + i), value, total[m][r]);
        }
    if (i < weight.k)
        for (int r = 0; r < R; ++r) {
            Vec value = W::get(w + r * weight.k + i, weight.k - i);
            for (int m = 0; m < M; ++m)
                total[m][r] = fma(load(x + m * rows.x_stride + i, weight.k - i), value, total[m][r]);
        }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) finish(rows, row + m, output + r, sum(total[m][r]));
}

// Weight rows that are read at the same time, for M rows.
constexpr int streams(int m) { return m == 1 ? 4 : m == 2 ? 3 : 2; }

template <class W, int M>
static inline void few_rows(const Matrix& weight, const Rows& rows) {
    constexpr int R = streams(M);
    int64_t bytes = weight.k * (int64_t)sizeof(typename W::Type) + 1;
    int64_t grain = R * (1 + (64 << 10) / bytes);
    parallel_for(weight.n, grain, [&](int64_t begin, int64_t end) {
        int64_t output = begin;
        for (; output + R <= end; output += R) few_outputs<W, M, R>(weight, rows, 0, output);
        for (; output < end; ++output) few_outputs<W, M, 1>(weight, rows, 0, output);
    });
}

constexpr int64_t K_BLOCK = 512;      // inputs for which a tile stays in the first cache
constexpr int64_t OUTPUT_BLOCK = 48;  // outputs and rows whose weights, inputs and partial sums fit into the second
constexpr int64_t ROW_BLOCK = 48;
constexpr int64_t NARROW = 24;        // rows up to which the weight is not copied in blocks for several rows
constexpr int64_t SLAB = 8 << 20;  // floats of the copy of x

// Copies rows of `source`, `stride` apart, into [rows][width] of float32 for inputs [begin, begin + width).
template <class W>
static inline void copy_block(
    const typename W::Type* source, int64_t stride, int64_t rows, int64_t begin, int64_t width, int64_t k, float* to) {
    int64_t whole = (begin + width <= k ? width : k - begin) / LANES * LANES;
    for (int64_t row = 0; row < rows; ++row) {
        const typename W::Type* from = source + row * stride + begin;
        for (int64_t i = 0; i < whole; i += LANES) store(to + row * width + i, W::get(from + i));
        if (whole < width) store(to + row * width + whole, W::get(from + whole, k - begin - whole));
    }
}

template <int R>
static inline void tiles(
    const float* x, const float* w, int64_t outputs, int64_t width, float* partial, bool fresh, int64_t rows) {
    constexpr int64_t stride = OUTPUT_BLOCK * LANES;
    for (int64_t output = 0; output < outputs; output += TILE_OUTPUTS)
        for (int64_t row = 0; row < rows; row += R)
            tile<R>(x + row * width, w + output * width, width, partial + row * stride + output * LANES, stride, fresh);
}

// Rows in pairs of tiles: the outputs of a tile are read once from the second cache for both.
static inline void row_tiles(
    const float* x, const float* w, int64_t rows, int64_t outputs, int64_t width, float* partial, bool fresh) {
    constexpr int64_t stride = OUTPUT_BLOCK * LANES;
    int64_t row = 0;
    while (rows - row >= TILE_ROWS) {
        int64_t take = rows - row >= 2 * TILE_ROWS ? 2 * TILE_ROWS : TILE_ROWS;
        tiles<TILE_ROWS>(x + row * width, w, outputs, width, partial + row * stride, fresh, take);
        row += take;
    }
    const float* rest = x + row * width;
    float* to = partial + row * stride;
    if (rows - row == 3) tiles<3>(rest, w, outputs, width, to, fresh, 3);
    if (rows - row == 2) tiles<2>(rest, w, outputs, width, to, fresh, 2);
    if (rows - row == 1) tiles<1>(rest, w, outputs, width, to, fresh, 1);
}

// The rows [0, count) of x in blocks [k / K_BLOCK][count][width], as `blocked` takes them.
static inline void copy_rows(const Rows& rows, int64_t count, int64_t k, int64_t k_padded, float* to) {
    parallel_for(count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < k_padded; first += K_BLOCK) {
            int64_t width = k_padded - first < K_BLOCK ? k_padded - first : K_BLOCK;
            const float* source = rows.x + begin * rows.x_stride;
            float* block = to + first * count + begin * width;
            copy_block<WeightF32>(source, rows.x_stride, end - begin, first, width, k, block);
        }
    });
}

// Asks for the lines of the next piece of the weight, some before each tile: memory works while tiles are computed.
struct Ahead {
    const char* base;
    int64_t stride, bytes, rows;  // of the piece, in bytes
    int64_t lines;                // at each step
    int64_t row = 0, place = 0;

    Ahead(const void* from, int64_t stride_bytes, int64_t row_bytes, int64_t row_count, int64_t steps)
        : base((const char*)from), stride(stride_bytes), bytes(row_bytes), rows(row_bytes > 0 ? row_count : 0),
          lines((row_count * (row_bytes / 64 + 1) + steps - 1) / steps) {}

    void step() {
        for (int64_t i = 0; i < lines && row < rows; ++i) {
            __builtin_prefetch(base + row * stride + place, 0, 3);
            place += 64;
            if (place >= bytes) place = 0, ++row;
        }
    }
};

template <int R>
static inline void narrow_tiles(
    const float* x, const float* w, int64_t rows, int64_t width, float* partial, bool fresh, Ahead& ahead) {
    constexpr int64_t stride = TILE_OUTPUTS * LANES;
    if constexpr (R > 0) {
        int64_t row = 0;
        // Not R rows and then a single one, which would wait for its own sums: rather two smaller tiles.
        for (; row + R <= rows && (R <= 2 || rows - row != R + 1); row += R) {
            ahead.step();
            tile<R>(x + row * width, w, width, partial + row * stride, stride, fresh);
        }
        narrow_tiles<R - 1>(x + row * width, w, rows - row, width, partial + row * stride, fresh, ahead);
    }
}

// TILE_OUTPUTS outputs for all rows: the weight is read once, row by row; x, in blocks, stays in the second cache.
template <class W>
static void narrow_outputs(
    const Matrix& weight, const Rows& rows, const float* x, int64_t k_padded, int64_t output, int64_t outputs,
    int64_t next) {
    const auto* source = (const typename W::Type*)weight.data + output * weight.k;
    constexpr int64_t size = sizeof(*source);
    float* w = scratch_of<float>(WEIGHTS, TILE_OUTPUTS * K_BLOCK);
    float* partial = scratch_of<float>(PARTIALS, rows.count * TILE_OUTPUTS * LANES);
    int64_t steps = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t first = 0; first < k_padded; first += K_BLOCK) {
        int64_t width = k_padded - first < K_BLOCK ? k_padded - first : K_BLOCK;
        copy_block<W>(source, weight.k, outputs, first, width, weight.k, w);
        std::memset(w + outputs * width, 0, (TILE_OUTPUTS - outputs) * width * sizeof(float));
        int64_t left = weight.k - first - width;
        bool last = left <= 0;  // then the first piece of the next outputs
        int64_t ahead_k = last ? weight.k : left;
        Ahead ahead(
            last ? source + outputs * weight.k : source + first + width, weight.k * size,
            (ahead_k < K_BLOCK ? ahead_k : K_BLOCK) * size, last ? next : outputs, steps);
        narrow_tiles<TILE_ROWS>(x + first * rows.count, w, rows.count, width, partial, first == 0, ahead);
    }
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t q = 0; q < outputs; ++q)
            finish(rows, row, output + q, sum(load(partial + (row * TILE_OUTPUTS + q) * LANES)));
}

template <class W>
static void narrow(const Matrix& weight, const Rows& rows) {
    int64_t k_padded = (weight.k + LANES - 1) / LANES * LANES;
    float* x = scratch_of<float>(ACTIVATIONS, rows.count * k_padded);
    copy_rows(rows, rows.count, weight.k, k_padded, x);
    int64_t bytes = TILE_OUTPUTS * weight.k * (int64_t)sizeof(typename W::Type);
    int64_t groups = (weight.n + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    parallel_for(groups, 1 + (128 << 10) / bytes, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            int64_t output = group * TILE_OUTPUTS, left = weight.n - output;
            int64_t outputs = left < TILE_OUTPUTS ? left : TILE_OUTPUTS, next = left - outputs;
            next = group + 1 == end ? 0 : next < TILE_OUTPUTS ? next : TILE_OUTPUTS;
            narrow_outputs<W>(weight, rows, x, k_padded, output, outputs, next);
        }
    });
}

// Outputs [output, output + outputs) for rows [begin, end) of a slab of `count` rows.
template <class W>
static void output_block(
    const Matrix& weight, const Rows& rows, const float* x, int64_t count, int64_t k_padded, int64_t output,
    int64_t outputs, int64_t begin, int64_t end) {
    const auto* source = (const typename W::Type*)weight.data + output * weight.k;
    int64_t padded = (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS * TILE_OUTPUTS;
    bool once = end - begin <= ROW_BLOCK;  // a block of the weight is used once: it need not be kept
    float* w = scratch_of<float>(WEIGHTS, OUTPUT_BLOCK * (once ? K_BLOCK : k_padded));
    float* partial = scratch_of<float>(PARTIALS, ROW_BLOCK * OUTPUT_BLOCK * LANES);
    for (int64_t row = begin; row < end; row += ROW_BLOCK) {
        int64_t height = end - row < ROW_BLOCK ? end - row : ROW_BLOCK;
        for (int64_t first = 0; first < k_padded; first += K_BLOCK) {
            int64_t width = k_padded - first < K_BLOCK ? k_padded - first : K_BLOCK;
            float* block = w + (once ? 0 : first * padded);
            if (row == begin) {
                copy_block<W>(source, weight.k, outputs, first, width, weight.k, block);
                std::memset(block + outputs * width, 0, (padded - outputs) * width * sizeof(float));
            }
            row_tiles(x + first * count + row * width, block, height, padded, width, partial, first == 0);
        }
        for (int64_t r = 0; r < height; ++r)
            for (int64_t q = 0; q < outputs; ++q)
                finish(rows, row + r, output + q, sum(load(partial + (r * OUTPUT_BLOCK + q) * LANES)));
    }
}

template <class W>
static void blocked(const Matrix& weight, const Rows& rows) {
    int64_t k_padded = (weight.k + LANES - 1) / LANES * LANES;
    int64_t slab = SLAB / k_padded > ROW_BLOCK ? SLAB / k_padded / ROW_BLOCK * ROW_BLOCK : ROW_BLOCK;
    for (int64_t start = 0; start < rows.count; start += slab) {
        Rows part = rows;
        part.x += start * rows.x_stride, part.y += start * rows.y_stride;
        part.count = rows.count - start < slab ? rows.count - start : slab;
        float* x = scratch_of<float>(ACTIVATIONS, part.count * k_padded);
        copy_rows(part, part.count, weight.k, k_padded, x);
        int64_t across = (weight.n + OUTPUT_BLOCK - 1) / OUTPUT_BLOCK;
        // With few blocks of outputs, rows are divided too, so that every thread gets some tasks.
        int64_t down = 1, row_blocks = (part.count + ROW_BLOCK - 1) / ROW_BLOCK;
        while (down < row_blocks && across * down < 8 * threads()) ++down;
        int64_t height = (row_blocks + down - 1) / down * ROW_BLOCK;
        parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                int64_t output = task / down * OUTPUT_BLOCK, row = task % down * height;
                int64_t outputs = weight.n - output < OUTPUT_BLOCK ? weight.n - output : OUTPUT_BLOCK;
                int64_t last = part.count - row < height ? part.count : row + height;
                if (row < last)
                    output_block<W>(weight, part, x, part.count, k_padded, output, outputs, row, last);
            }
        });
    }
}

template <class W>
static void dense_product(const Matrix& weight, const Rows& rows) {
    if (rows.count == 1) return few_rows<W, 1>(weight, rows);
    if (rows.count == 2) return few_rows<W, 2>(weight, rows);
    if (rows.count == 3) return few_rows<W, 3>(weight, rows);
    if (weight.k > 0) return rows.count <= NARROW ? narrow<W>(weight, rows) : blocked<W>(weight, rows);
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t output = 0; output < weight.n; ++output) finish(rows, row, output, 0.0f);
}
