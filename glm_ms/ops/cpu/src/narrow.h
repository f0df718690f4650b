// Products of a few rows with a dense weight, which is read once, row by row, and not copied.
//
// The rows are divided into tiles of about the same size. Their inputs are copied to [block of inputs][part][tile]
// [step][row][PART], where a step is LANES inputs, so that a tile reads them as one stream. Some outputs run through all
// tiles of a block: their weights come from memory for the first tile, from the first cache for the others. The processor
// itself reads ahead in rows of float32; of 16-bit rows, half as long, each tile asks for a share of the next block.

#if defined(GLM_AVX512) || defined(GLM_NEON)
constexpr int NARROW_TILE = 8;  // most rows of a tile: sums, weights and an input fit into 32 registers
#else
constexpr int NARROW_TILE = 4;  // 16 registers
#endif
constexpr int NARROW_OUTPUTS = 3;    // of a tile
constexpr int64_t NARROW_K = 512;    // inputs of a block, a multiple of those of a line of the cache
constexpr int64_t NARROW = 24;       // rows from which on a copy of the weight is worth its time

// Rows of the tile that begins with `row`.
static inline int64_t narrow_rows(int64_t row, int64_t count) {
    int64_t left = count - row, tiles = (left + NARROW_TILE - 1) / NARROW_TILE;
    return (left + tiles - 1) / tiles;
}

// Weights of NARROW_OUTPUTS outputs, `stride` apart, for a block of inputs.
template <class W>
struct NarrowBlock {
    const typename W::Type* w;
    int64_t stride, steps;
    int64_t ahead;  // where the weights of the next block are, from `w`

    static constexpr bool FETCH = sizeof(typename W::Type) < 4;
    // Steps after which a part asks for the next lines. All parts together read a line in so many of them.
    static constexpr int64_t PERIOD = 64 / (int64_t)(LANES * sizeof(typename W::Type)) * PARTS;
};

// sums[R][NARROW_OUTPUTS][PART] += products of one part of R rows, in order of the steps. x [steps][R][PART].
// `fetch`: asks for those lines of the next block that fall to this part.
template <class W, int R, bool fetch>
static inline void narrow_tile(const float* x, const NarrowBlock<W>& block, int part, float* sums) {
    constexpr int Q = NARROW_OUTPUTS;
    constexpr int64_t period = fetch ? NarrowBlock<W>::PERIOD : 1, size = sizeof(typename W::Type);
    const int64_t steps = block.steps, stride = block.stride;
    const auto* w = block.w + part * PART;
    const char* ahead = (const char*)block.w + (block.ahead + part * (period / PARTS) * LANES) * size;
    Part total[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) total[r][q] = part_load(sums + (r * Q + q) * PART);
    for (int64_t step = 0; step < steps; step += period) {
        for (int q = 0; fetch && q < Q; ++q) __builtin_prefetch(ahead + (step * LANES + q * stride) * size);
#pragma GCC unroll 8
        for (int64_t i = step; i < step + period; ++i) {
            Part weights[Q];
            for (int q = 0; q < Q; ++q) weights[q] = W::part(w + q * stride + i * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Part input = part_load(x + (i * R + r) * PART);
                for (int q = 0; q < Q; ++q) total[r][q] = part_fma(input, weights[q], total[r][q]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) part_store(sums + (r * Q + q) * PART, total[r][q]);
}

// All parts of a tile of `rows` rows. x: [part][steps][rows][PART], parts are `of_part` floats apart; sums [part][rows]
// [NARROW_OUTPUTS][PART]. Parts [from, to) ask for the next block.
template <class W, int R = NARROW_TILE>
static inline void narrow_parts(
    int64_t rows, const float* x, int64_t of_part, const NarrowBlock<W>& block, int64_t from, int64_t to, float* sums) {
    if (R > 1 && rows < R) return narrow_parts<W, (R > 1 ? R - 1 : 1)>(rows, x, of_part, block, from, to, sums);
    for (int part = 0; part < PARTS; ++part, x += of_part, sums += R * NARROW_OUTPUTS * PART)
        if (NarrowBlock<W>::FETCH && from <= part && part < to)
            narrow_tile<W, R, NarrowBlock<W>::FETCH>(x, block, part, sums);
        else
            narrow_tile<W, R, false>(x, block, part, sums);
}

// All tiles of a block. x: [part][tile][steps][rows][PART], sums [tile][part][rows][NARROW_OUTPUTS][PART].
template <class W>
static inline void narrow_block(const float* x, int64_t rows, const NarrowBlock<W>& block, float* sums) {
    const int64_t of_part = rows * block.steps * PART;
    const int64_t tiles = block.steps % block.PERIOD == 0 ? (rows + NARROW_TILE - 1) / NARROW_TILE : 0;
    for (int64_t row = 0, tile = 0, take; row < rows; row += take, ++tile) {
        take = narrow_rows(row, rows);
        int64_t from = tiles ? tile * PARTS / tiles : 0, to = tiles ? (tile + 1) * PARTS / tiles : 0;
        narrow_parts<W>(take, x + row * block.steps * PART, of_part, block, from, to,
                        sums + row * NARROW_OUTPUTS * LANES);
    }
}

// Adds the lanes and writes the results.
static inline void finish_narrow(const Rows& rows, int64_t output, int64_t outputs, const float* sums) {
    for (int64_t row = 0, take; row < rows.count; row += take, sums += take * NARROW_OUTPUTS * LANES) {
        take = narrow_rows(row, rows.count);
        const int64_t of_part = take * NARROW_OUTPUTS * PART;
        for (int64_t r = 0; r < take; ++r)
            for (int64_t q = 0; q < outputs; ++q)
                finish(rows, row + r, output + q, sum(whole(sums + (r * NARROW_OUTPUTS + q) * PART, of_part)));
    }
}

// `followed`: the next outputs come next.
template <class W>
static void narrow_outputs(
    const Matrix& weight, const Rows& rows, const float* x, int64_t k_padded, int64_t output, bool followed) {
    const auto* w = (const typename W::Type*)weight.data + output * weight.k;
    const int64_t outputs = smaller(weight.n - output, NARROW_OUTPUTS);
    float* sums = scratch_of<float>(PARTIALS, rows.count * NARROW_OUTPUTS * LANES);
    std::memset(sums, 0, rows.count * NARROW_OUTPUTS * LANES * sizeof(float));
    for (int64_t first = 0; first < k_padded; first += NARROW_K) {
        const int64_t width = smaller(k_padded - first, NARROW_K), steps = width / LANES;
        const float* of_x = x + first * rows.count;
        if (outputs == NARROW_OUTPUTS && first + width <= weight.k) {
            int64_t ahead = first + width < weight.k ? width : followed ? NARROW_OUTPUTS * weight.k - first : 0;
            narrow_block<W>(of_x, rows.count, {w + first, weight.k, steps, ahead}, sums);
            continue;
        }
        float* copy = scratch_of<float>(WEIGHTS, NARROW_OUTPUTS * NARROW_K);  // a border, with zeros behind it
        for (int64_t q = 0; q < NARROW_OUTPUTS; ++q)
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t count = q < outputs ? smaller(weight.k - first - i, LANES) : 0;
                store(copy + q * NARROW_K + i, count > 0 ? W::get(w + q * weight.k + first + i, count) : zero());
            }
        narrow_block<WeightF32>(of_x, rows.count, {copy, NARROW_K, steps, 0}, sums);
    }
    finish_narrow(rows, output, outputs, sums);
}

// The rows as `narrow_block` takes them, block after block.
static inline void copy_narrow_rows(const Rows& rows, int64_t k, int64_t k_padded, float* to) {
    parallel_for((k_padded + NARROW_K - 1) / NARROW_K, 2, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * NARROW_K; first < smaller(end * NARROW_K, k_padded); first += NARROW_K) {
            const int64_t width = smaller(k_padded - first, NARROW_K), of_row = width / PARTS;
            for (int64_t row = 0, take; row < rows.count; row += take) {
                take = narrow_rows(row, rows.count);
                pack<WeightF32>(rows.x + row * rows.x_stride, rows.x_stride, take, take, first, width, k,
                                to + first * rows.count + row * of_row, rows.count * of_row);
            }
        }
    });
}

template <class W>
static void narrow(const Matrix& weight, const Rows& rows) {
    const int64_t k_padded = (weight.k + LANES - 1) / LANES * LANES;
    float* x = scratch_of<float>(ACTIVATIONS, rows.count * k_padded);
    copy_narrow_rows(rows, weight.k, k_padded, x);
    const int64_t bytes = NARROW_OUTPUTS * weight.k * (int64_t)sizeof(typename W::Type);
    const int64_t groups = (weight.n + NARROW_OUTPUTS - 1) / NARROW_OUTPUTS;
    parallel_for(groups, 1 + (128 << 10) / bytes, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group)
            narrow_outputs<W>(weight, rows, x, k_padded, group * NARROW_OUTPUTS, group + 1 < end);
    });
}
