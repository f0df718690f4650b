// Products with weights of float32, bfloat16 and float16: one or two rows, and many; narrow.h has those between.

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
constexpr int streams(int m) { return m == 1 ? (PARTS > 2 ? 4 : 8) : 3; }

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

// Inputs of a block: those of one part of some tiles stay in the first cache.
constexpr int64_t K_BLOCK = PARTS > 1 ? 1024 : 512;
constexpr int64_t GROUP = 2;          // tiles of outputs that share a tile of rows there
constexpr int64_t OUTPUT_BLOCK = 48;  // outputs and rows whose weights, inputs and partial sums fit into the second
constexpr int64_t ROW_BLOCK = 48;
constexpr int64_t SLAB = 8 << 20;   // floats of the copy of x

// The rows of x in blocks of K_BLOCK inputs and of ROW_BLOCK rows: [part][tile of rows].
static inline void copy_rows(const Rows& rows, int64_t count, int64_t k, int64_t k_padded, float* to) {
    int64_t k_blocks = (k_padded + K_BLOCK - 1) / K_BLOCK, row_blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel_for(k_blocks * row_blocks, 1 + 8 / count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t first = i / row_blocks * K_BLOCK, top = i % row_blocks * ROW_BLOCK;
            int64_t height = smaller(count - top, ROW_BLOCK), width = smaller(k_padded - first, K_BLOCK);
            float* block = to + first * count + top * width;
            const float* x = rows.x + top * rows.x_stride;
            for (int64_t row = 0, take; row < height; row += take) {
                take = tile_rows(height - row);
                pack<WeightF32>(x + row * rows.x_stride, rows.x_stride, take, take, first, width, k,
                                block + row * (width / PARTS), height * (width / PARTS));
            }
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

// `group` tiles of outputs for `rows` rows and `width` inputs. x: [part][tile of rows], partial: [part][tile of rows]
// [tile of outputs], weights(part, tile): an operand of `tile`.
template <class F>
static inline void tiles(
    const float* x, int64_t rows, int64_t group, int64_t width, float* partial, bool fresh, Ahead& ahead,
    const F& weights) {
    for (int part = 0; part < PARTS; ++part)
        for (int64_t row = 0, take; row < rows; row += take) {
            take = tile_rows(rows - row);
            for (int64_t i = 0; i < group; ++i, partial += take * TILE_OUTPUTS * PART) {
                ahead.step();
                any_tile(take, x, weights(part, i), width / LANES, partial, fresh);
            }
            x += take * (width / PARTS);
        }
}

// Adds the partial sums of `tiles` and writes the results.
static inline void finish_tiles(
    const Rows& to, int64_t first, int64_t rows, int64_t output, int64_t outputs, int64_t group, const float* partial) {
    const int64_t part_stride = rows * group * TILE_OUTPUTS * PART;
    for (int64_t row = 0, take; row < rows; row += take) {
        take = tile_rows(rows - row);
        for (int64_t i = 0; i < group; ++i)
            for (int64_t r = 0; r < take; ++r, partial += TILE_OUTPUTS * PART) {
                float sums[TILE_OUTPUTS];
                sum_outputs(partial, part_stride, sums);
                for (int64_t q = i * TILE_OUTPUTS; q < smaller((i + 1) * TILE_OUTPUTS, outputs); ++q)
                    finish(to, first + row + r, output + q, sums[q - i * TILE_OUTPUTS]);
            }
    }
}

// Outputs [output, output + outputs) for rows [begin, end) of a slab of `count` rows.
template <class W>
static void output_block(
    const Matrix& weight, const Rows& rows, const float* x, int64_t count, int64_t k_padded, int64_t output,
    int64_t outputs, int64_t begin, int64_t end) {
    constexpr int64_t of_group = GROUP * TILE_OUTPUTS;
    const auto* source = (const typename W::Type*)weight.data + output * weight.k;
    int64_t padded = (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS * TILE_OUTPUTS;
    bool once = end - begin <= ROW_BLOCK;  // a block of the weight is used once: it need not be kept
    float* w = scratch_of<float>(WEIGHTS, OUTPUT_BLOCK * (once ? K_BLOCK : k_padded));
    float* partial = scratch_of<float>(PARTIALS, ROW_BLOCK * OUTPUT_BLOCK * LANES);
    for (int64_t row = begin; row < end; row += ROW_BLOCK) {
        int64_t height = smaller(end - row, ROW_BLOCK);
        for (int64_t first = 0; first < k_padded; first += K_BLOCK) {
            int64_t width = smaller(k_padded - first, K_BLOCK);
            float* block = w + (once ? 0 : first * padded);
            for (int64_t place = 0; place < padded; place += of_group) {
                int64_t group = smaller(padded - place, of_group) / TILE_OUTPUTS;
                for (int64_t i = 0; row == begin && i < group; ++i) {
                    int64_t at = place + i * TILE_OUTPUTS, of_tile = TILE_OUTPUTS * (width / PARTS);
                    pack<W>(source + at * weight.k, weight.k, smaller(outputs - at, TILE_OUTPUTS), TILE_OUTPUTS, first,
                            width, weight.k, block + place * width + i * of_tile, group * of_tile);
                }
                // The weights that are copied next.
                int64_t next = place + of_group < padded ? place + of_group : 0, next_k = next ? first : first + width;
                Ahead ahead(
                    source + next * weight.k + next_k, weight.k * sizeof(*source),
                    smaller(weight.k - next_k, K_BLOCK) * (int64_t)sizeof(*source),
                    row == begin ? smaller(outputs - next, of_group) : 0,
                    group * PARTS * ((height + TILE_ROWS - 1) / TILE_ROWS));
                tiles(x + first * count + row * width, height, group, width, partial + place * height * LANES,
                      first == 0, ahead, [&](int part, int64_t i) {
                          return Packed{block + place * width + (part * group + i) * TILE_OUTPUTS * (width / PARTS)};
                      });
            }
        }
        for (int64_t place = 0; place < padded; place += of_group)
            finish_tiles(rows, row, height, output + place, smaller(outputs - place, of_group),
                         smaller(padded - place, of_group) / TILE_OUTPUTS, partial + place * height * LANES);
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
    if (weight.k > 0) return rows.count <= NARROW ? narrow<W>(weight, rows) : blocked<W>(weight, rows);
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t output = 0; output < weight.n; ++output) finish(rows, row, output, 0.0f);
}
