// Rows of x as integers of 16 bits, for products with packed weights.
//
// q = x / scale rounded to nearest even, scale = max|x| / 32512, so |q| <= 32512 = 127 * 256; q = 256 high + low with
// both in [-128, 127]. A row whose largest value is below 1e-33 counts as zero. A row with NaN or infinity gets scale
// NaN, and so NaN in all of its results.

struct Activation {
    int64_t k;  // padded inputs of a row, an odd multiple of 128
    const int16_t* q;
    const int8_t* high;
    const int8_t* low;
    const int32_t* sums;  // of q, [row][k / 32]
    const float* scale;   // [row]

    const int16_t* q_of(int64_t row) const { return q + row * k; }
    const int8_t* high_of(int64_t row) const { return high + row * k; }
    const int8_t* low_of(int64_t row) const { return low + row * k; }
    const int32_t* sums_of(int64_t row) const { return sums + row * (k / 32); }
};

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

static inline void quantise_row(
    const float* x, int64_t k, int64_t padded, int16_t* q, int8_t* high, int8_t* low, int32_t* sums, float* scale) {
    float factor;
    *scale = activation_scale(x, k, &factor);
    for (int64_t block = 0; block < padded; block += 32) {
        float values[32];
        for (int half = 0; half < 32; half += LANES) {
            Vec value = block + half < k ? load(x + block + half, k - block - half) : zero();
            store(values + half, factor == 0.0f ? zero() : round(value * set1(factor)));
        }
        int32_t total = 0;
        for (int i = 0; i < 32; ++i) {
            int32_t whole = (int32_t)values[i];
            int32_t top = (whole + 128) >> 8;
            q[block + i] = (int16_t)whole;
            high[block + i] = (int8_t)top;
            low[block + i] = (int8_t)(whole - top * 256);
            total += whole;
        }
        sums[block / 32] = total;
    }
}

// Quantises the rows into memory of this thread. The block ends with the next call.
static Activation quantise(const Rows& rows, int64_t k) {
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
        for (int64_t row = begin; row < end; ++row)
            quantise_row(
                rows.x + row * rows.x_stride, k, to.k, q + row * to.k, high + row * to.k, low + row * to.k,
                sums + row * (to.k / 32), scale + row);
    });
    return to;
}
