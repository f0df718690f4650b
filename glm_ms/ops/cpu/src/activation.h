// Rows of x as integers of 16 bits, for products with packed weights.
//
// q = x / scale rounded to nearest even, scale = max|x| / 32512, so |q| <= 32512 = 127 * 256; q = 256 high + low with
// both in [-128, 127]. A row whose largest value is below 1e-33 counts as zero. A row with NaN or infinity gets scale
// NaN, and so NaN in all of its results.

struct Activation {
    int64_t k;  // padded inputs of a row, an odd multiple of 128
    const int16_t* q;  // `in_pairs`: see write_pairs
    const int8_t* high;
    const int8_t* low;
    const int32_t* sums;  // of q, [row][k / 32]; `in_pairs`: see write_pairs
    const float* scale;   // [row]

    const int16_t* q_of(int64_t row) const { return q + row * k; }
    const int8_t* high_of(int64_t row) const { return high + row * k; }
    const int8_t* low_of(int64_t row) const { return low + row * k; }
    const int32_t* sums_of(int64_t row) const { return sums + row * (k / 32); }
};

constexpr int64_t PAIR_ROWS = 6;  // most rows of a tile of pairs of inputs, which AVX2 takes

// Rows of the tile that begins with `row`: all tiles have about the same size, the first ones may have a row more.
static inline int64_t pair_rows(int64_t row, int64_t count) {
    int64_t left = count - row, tiles = (left + PAIR_ROWS - 1) / PAIR_ROWS;
    return (left + tiles - 1) / tiles;
}

// A row of q into [tile][k / 2][rows of the tile][2], where the inputs of each four are in the order 0, 2, 1, 3, and
// its sums times -8 into [tile][k / 32][rows of the tile].
static inline void write_pairs(
    const int16_t* of_row, const int32_t* sums_of_row, int64_t k, int64_t row, int64_t count, int16_t* q,
    int32_t* sums) {
    const int64_t tiles = (count + PAIR_ROWS - 1) / PAIR_ROWS, size = count / tiles;
    const int64_t border = count % tiles * (size + 1);  // the tiles before have a row more
    const int64_t rows = row < border ? size + 1 : size, base = row < border ? 0 : border;
    const int64_t first = base + (row - base) / rows * rows;
    int16_t* to = q + first * k + (row - first) * 2;
    for (int64_t i = 0; i < k; i += 4, of_row += 4, to += 4 * rows) {
        const int16_t pairs[4] = {of_row[0], of_row[2], of_row[1], of_row[3]};
        std::memcpy(to, pairs, 4);
        std::memcpy(to + 2 * rows, pairs + 2, 4);
    }
    for (int64_t i = 0; i < k / 32; ++i) sums[first * (k / 32) + i * rows + row - first] = sums_of_row[i] * -8;
}

// scale, and the factor by which x is multiplied; 0 and 0 for a row that counts as zero.
static inline float activation_scale(const float* x, int64_t k, float* factor) {
    Vec largest = zero(), invalid = zero();
    for (int64_t i = 0; i < k; i += LANES) {
        Vec value = load(x + i, k - i);
        largest = max(abs(value), largest);
        invalid = fma(value, zero(), invalid);  // NaN stays NaN, infinity times 0 is NaN
    }
    float top = max_of(largest), wrong = sum(invalid);
    *factor = wrong == 0.0f && top >= 1e-33f ? 32512.0f / top : 0.0f;
    if (wrong != 0.0f) return wrong;  // only NaN differs from 0 here
    return *factor == 0.0f ? 0.0f : top / 32512.0f;
}

// Integers of 32 values and their bytes; returns their sum.
static inline int32_t split(const Vec values[2], int16_t* q, int8_t* high, int8_t* low) {
#if defined(GLM_AVX2)
    __m256i whole[2], top[2], rest[2];
    for (int half = 0; half < 2; ++half) {  // conversions round to nearest even
        whole[half] = _mm256_packs_epi32(_mm256_cvtps_epi32(values[half].a), _mm256_cvtps_epi32(values[half].b));
        whole[half] = _mm256_permute4x64_epi64(whole[half], 0xd8);
        top[half] = _mm256_srai_epi16(_mm256_add_epi16(whole[half], _mm256_set1_epi16(128)), 8);
        rest[half] = _mm256_sub_epi16(whole[half], _mm256_slli_epi16(top[half], 8));
        _mm256_storeu_si256((__m256i*)(q + half * 16), whole[half]);
    }
    _mm256_storeu_si256((__m256i*)high, _mm256_permute4x64_epi64(_mm256_packs_epi16(top[0], top[1]), 0xd8));
    _mm256_storeu_si256((__m256i*)low, _mm256_permute4x64_epi64(_mm256_packs_epi16(rest[0], rest[1]), 0xd8));
    const __m256i one = _mm256_set1_epi16(1);
    __m256i eight = _mm256_add_epi32(_mm256_madd_epi16(whole[0], one), _mm256_madd_epi16(whole[1], one));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
    float rounded[32];
    store(rounded, round(values[0]));
    store(rounded + 16, round(values[1]));
    int32_t total = 0;
    for (int i = 0; i < 32; ++i) {
        int32_t whole = (int32_t)rounded[i], top = (whole + 128) >> 8;
        q[i] = (int16_t)whole;
        high[i] = (int8_t)top;
        low[i] = (int8_t)(whole - top * 256);
        total += whole;
    }
    return total;
#endif
}

static inline void quantise_row(
    const float* x, int64_t k, int64_t padded, int16_t* q, int8_t* high, int8_t* low, int32_t* sums, float* scale) {
    float factor;
    *scale = activation_scale(x, k, &factor);
    for (int64_t block = 0; block < padded; block += 32) {
        Vec values[2];
        for (int half = 0; half < 2; ++half) {
            int64_t i = block + half * LANES;
            values[half] = i < k && factor != 0.0f ? load(x + i, k - i) * set1(factor) : zero();
        }
        sums[block / 32] = split(values, q + block, high + block, low + block);
    }
}

// Quantises the rows into memory of this thread. The block ends with the next call.
static Activation quantise(const Rows& rows, int64_t k, bool in_pairs = false) {
    Activation to{};
    to.k = ((k + 127) / 128 | 1) * 128;  // odd: rows that are multiples of 4096 apart would share places in the cache
    int64_t values = rows.count * to.k;
    // Multiples of 128 keep every part aligned.
    char* memory = (char*)scratch(ACTIVATIONS, values * 4 + values / 32 * 4 + rows.count * 4);
    auto* q = (int16_t*)memory;
    auto* high = (int8_t*)(memory + values * 2);
    auto* low = high + values;
    auto* sums = (int32_t*)(memory + values * 4);
    auto* scale = (float*)(sums + values / 32);
    to.q = q, to.high = high, to.low = low, to.sums = sums, to.scale = scale;
    parallel_for(rows.count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            int16_t* of_row = q + row * to.k;
            int32_t* sums_of_row = sums + row * (to.k / 32);
            if (in_pairs) {
                of_row = (int16_t*)scratch(BLOCK, to.k * 2 + to.k / 32 * 4);
                sums_of_row = (int32_t*)(of_row + to.k);
            }
            quantise_row(
                rows.x + row * rows.x_stride, k, to.k, of_row, high + row * to.k, low + row * to.k, sums_of_row,
                scale + row);
            if (in_pairs) write_pairs(of_row, sums_of_row, to.k, row, rows.count, q, sums);
        }
    });
    return to;
}
