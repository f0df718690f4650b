// Products with int4 weights: exact integer sums in each group, which are added as float32 in order of the groups:
// total = fma(float(sum of the group), scale of the group, total), then total * scale of the row.
//
// `int4_groups<R, group>` adds groups [begin, end) to total[R][16], for R rows and the 16 outputs of a panel.

// Many rows: the weights of so many inputs and panels stay in the first cache for all rows.
constexpr int64_t INT4_BLOCK = 512, INT4_PANELS = 4;

#if defined(GLM_AVX512)

constexpr int INT4_ROWS = 6;

template <int R, int group>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    __m512 sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm512_loadu_ps(total + r * 16);
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t g = begin; g < end; ++g) {
        __m512i high[R], low[R];
        for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
        for (int64_t i = g * group; i < (g + 1) * group; i += 8) {
            __m512i bytes = _mm512_loadu_si512(w + i * 8);
            __m512i nibbles[2] = {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
            for (int r = 0; r < R; ++r)
                for (int half = 0; half < 2; ++half) {
                    int32_t h, l;
                    std::memcpy(&h, x.high_of(row + r) + i + half * 4, 4);
                    std::memcpy(&l, x.low_of(row + r) + i + half * 4, 4);
                    high[r] = _mm512_dpbusd_epi32(high[r], nibbles[half], _mm512_set1_epi32(h));
                    low[r] = _mm512_dpbusd_epi32(low[r], nibbles[half], _mm512_set1_epi32(l));
                }
        }
        __m512 factor = load_f16(scale + g * 16).v;
        for (int r = 0; r < R; ++r) {
            int32_t all = 0;
            for (int64_t i = g * group / 32; i < (g + 1) * group / 32; ++i) all += x.sums_of(row + r)[i];
            __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
            exact = _mm512_sub_epi32(exact, _mm512_set1_epi32(all * 8));
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, sums[r]);
        }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(total + r * 16, sums[r]);
}

#elif defined(GLM_AVX2)

constexpr int INT4_ROWS = PAIR_ROWS;

// One row waits for memory: pieces of two panels in turn, see int8.h.
constexpr int64_t INT4_PIECE = INT4_BLOCK, INT4_STREAMS = 2;
constexpr bool INT4_IN_PAIRS = true;  // three rows and more
constexpr int64_t INT4_FEW = 12;      // rows up to which panels are read as a whole

static inline __m256i broadcast4(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// Products of 32 inputs of a row: bytes of x, high and low, times nibbles. Two sums of 16 bits for 8 outputs each, which
// do not overflow: 16 products of at most 15 * 128 a lane.
struct ByteSums {
    __m256i high[2], low[2];

    // `first`: the sums have no value yet.
    void add(__m256i nibbles0, __m256i nibbles1, const int8_t* xh, const int8_t* xl, bool first) {
        const __m256i nibbles[2] = {nibbles0, nibbles1};
        const __m256i h = broadcast4(xh), l = broadcast4(xl);
        for (int q = 0; q < 2; ++q) {
            __m256i of_high = _mm256_maddubs_epi16(nibbles[q], h), of_low = _mm256_maddubs_epi16(nibbles[q], l);
            high[q] = first ? of_high : in_order(_mm256_add_epi16(high[q], of_high));
            low[q] = first ? of_low : in_order(_mm256_add_epi16(low[q], of_low));
        }
    }

    // 256 high + low, 32 bits.
    __m256i whole(int q) const {
        __m256i of_high = _mm256_madd_epi16(high[q], _mm256_set1_epi16(256));
        return _mm256_add_epi32(of_high, _mm256_madd_epi16(low[q], _mm256_set1_epi16(1)));
    }
};

// One or two rows. Not inline: compilers find registers for it only as a function of its own.
template <int R, int group>
__attribute__((noinline)) static void int4_bytes(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    const __m256i mask = _mm256_set1_epi8(15);
    const int8_t *xh[R], *xl[R];
    const int32_t* off[R];  // sums of x: the 8 in each weight adds so much
    __m256 sums[R][2];
    for (int r = 0; r < R; ++r) {
        xh[r] = x.high_of(row + r) + begin * group, xl[r] = x.low_of(row + r) + begin * group;
        off[r] = x.sums_of(row + r) + begin * (group / 32);
        for (int q = 0; q < 2; ++q) sums[r][q] = _mm256_loadu_ps(total + r * 16 + q * 8);
    }
    w += begin * group * 8;
    for (int64_t g = begin; g < end; ++g) {
        __m256i exact[R][2];
#pragma GCC unroll 1
        for (int part = 0; part < group / 32; ++part, w += 256) {
            ByteSums products[R];
            for (int line = 0; R == 1 && line < 4; ++line) __builtin_prefetch(w + INT4_PIECE * 8 + line * 64);
#pragma GCC unroll 4
            for (int i = 0; i < 32; i += 8) {
                const auto* from = (const __m256i*)(w + i * 8);
                // Each is loaded once: `in_order` keeps compilers from a second load.
                const __m256i a = in_order(_mm256_loadu_si256(from)), b = in_order(_mm256_loadu_si256(from + 1));
                const __m256i a0 = _mm256_and_si256(a, mask), b0 = _mm256_and_si256(b, mask);
                for (int r = 0; r < R; ++r) products[r].add(a0, b0, xh[r] + i, xl[r] + i, i == 0);
                const __m256i a1 = _mm256_and_si256(_mm256_srli_epi16(a, 4), mask);
                const __m256i b1 = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
                for (int r = 0; r < R; ++r) products[r].add(a1, b1, xh[r] + i + 4, xl[r] + i + 4, false);
            }
            for (int r = 0; r < R; ++r) {
                const __m256i eights = _mm256_slli_epi32(broadcast4(off[r]), 3);
                for (int q = 0; q < 2; ++q) {
                    __m256i both = _mm256_sub_epi32(products[r].whole(q), eights);
                    exact[r][q] = part ? _mm256_add_epi32(exact[r][q], both) : both;
                }
                xh[r] += 32, xl[r] += 32, ++off[r];
            }
        }
        for (int q = 0; q < 2; ++q) {
            __m256 factor = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scale + g * 16 + q * 8)));
            for (int r = 0; r < R; ++r)
                sums[r][q] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[r][q]), factor, sums[r][q]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < 2; ++q) _mm256_storeu_ps(total + r * 16 + q * 8, sums[r][q]);
}

// Weights of outputs 0 to 7 and 8 to 15 as 16 bits: inputs 0 and 2 of each four, or 1 and 3. In this order nibbles
// become 16 bits by a mask and a shift; x has it too.
struct Pairs {
    __m256i low, high;
};

static inline __m256i pair_of(__m256i bytes, int pair) {
    const __m256i mask = _mm256_set1_epi16(15);
    if (pair == 0) return _mm256_and_si256(bytes, mask);
    if (pair == 1) return _mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask);
    if (pair == 2) return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    return _mm256_srli_epi16(bytes, 12);
}

// w + 8 of the inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7 of a block of 8.
static inline Pairs weights_of(const uint8_t* block, int pair) {
    const auto* from = (const __m256i*)block;
    return {pair_of(_mm256_loadu_si256(from), pair), pair_of(_mm256_loadu_si256(from + 1), pair)};
}

// sum + two products of 16 bits in each lane. As one piece: compilers otherwise move sums between registers.
static inline __m256i plus_products(__m256i sum, __m256i weights, __m256i inputs) {
    __m256i products;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(weights), "x"(inputs));
    return sum;
}

// Sums of a tile of R rows with 16 outputs.
template <int R>
struct PairSums {
    __m256i low[R], high[R];

    // Adds the products of two inputs of each row, at `q`.
    void add(const Pairs& weights, const int16_t* q) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, q + r * 2, 4);
            __m256i inputs = _mm256_set1_epi32(two);
            low[r] = plus_products(low[r], weights.low, inputs);
            high[r] = plus_products(high[r], weights.high, inputs);
        }
    }
};

// More rows: sums of 32 bits, which begin with what the 8 in each weight adds too much.
template <int R, int group>
static inline void int4_pairs(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    constexpr int64_t parts = group / 32;
    const int16_t* q = x.q_of(row) + begin * group * R;
    const int32_t* off = x.sums_of(row) + begin * parts * R;
    for (int64_t g = begin; g < end; ++g, off += parts * R) {
        PairSums<R> sums;
        for (int r = 0; r < R; ++r) {
            __m256i all = _mm256_set1_epi32(off[r]);
            for (int64_t i = 1; i < parts; ++i) all = _mm256_add_epi32(all, _mm256_set1_epi32(off[i * R + r]));
            sums.low[r] = sums.high[r] = all;
        }
        for (int64_t b = g * group / 8; b < (g + 1) * group / 8; ++b)
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; ++pair, q += 2 * R) sums.add(weights_of(w + b * 64, pair), q);
        Vec factor = load_f16(scale + g * 16);
        for (int r = 0; r < R; ++r) {
            Vec exact = {_mm256_cvtepi32_ps(sums.low[r]), _mm256_cvtepi32_ps(sums.high[r])};
            store(total + r * 16, fma(exact, factor, load(total + r * 16)));
        }
        asm("" ::: "memory");  // no copy of the totals elsewhere: there are no registers for them
    }
}

template <int R, int group>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    if constexpr (R <= 2)
        int4_bytes<R, group>(w, scale, x, row, begin, end, total);
    else
        int4_pairs<R, group>(w, scale, x, row, begin, end, total);
}

#elif defined(GLM_NEON)

constexpr int INT4_ROWS = 2;

// acc[output] += 4 products of each output: 4 outputs a register.
static inline int32x4_t dot4(int32x4_t sum, int8x16_t weights, int8x16_t inputs) {
#if defined(GLM_NEON_DOT)
    return vdotq_s32(sum, weights, inputs);
#else
    int16x8_t first = vmull_s8(vget_low_s8(weights), vget_low_s8(inputs));  // |product| <= 15 * 128
    int16x8_t second = vmull_s8(vget_high_s8(weights), vget_high_s8(inputs));
    return vpadalq_s16(sum, vpaddq_s16(first, second));
#endif
}

static inline int8x16_t broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int R, int group>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    Vec sums[R];
    for (int r = 0; r < R; ++r) sums[r] = load(total + r * 16);
    for (int64_t g = begin; g < end; ++g) {
        int32x4_t high[R][4], low[R][4];
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < 4; ++q) high[r][q] = low[r][q] = vdupq_n_s32(0);
        for (int64_t i = g * group; i < (g + 1) * group; i += 8)
            for (int q = 0; q < 4; ++q) {
                uint8x16_t bytes = vld1q_u8(w + i * 8 + q * 16);
                int8x16_t nibbles[2] = {
                    vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4))};
                for (int r = 0; r < R; ++r)
                    for (int half = 0; half < 2; ++half) {
                        high[r][q] = dot4(high[r][q], nibbles[half], broadcast4(x.high_of(row + r) + i + half * 4));
                        low[r][q] = dot4(low[r][q], nibbles[half], broadcast4(x.low_of(row + r) + i + half * 4));
                    }
            }
        Vec factor = load_f16(scale + g * 16);
        for (int r = 0; r < R; ++r) {
            int32_t all = 0;
            for (int64_t i = g * group / 32; i < (g + 1) * group / 32; ++i) all += x.sums_of(row + r)[i];
            for (int q = 0; q < 4; ++q) {
                int32x4_t exact = vaddq_s32(vshlq_n_s32(high[r][q], 8), low[r][q]);
                exact = vsubq_s32(exact, vdupq_n_s32(all * 8));
                sums[r].q[q] = vfmaq_f32(sums[r].q[q], vcvtq_f32_s32(exact), factor.q[q]);
            }
        }
    }
    for (int r = 0; r < R; ++r) store(total + r * 16, sums[r]);
}

#else

constexpr int INT4_ROWS = 1;

template <int R, int group>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t begin, int64_t end,
    float* total) {
    const int16_t* q16 = x.q_of(row);
    Vec sum_of_groups = load(total);
    for (int64_t g = begin; g < end; ++g) {
        float exact[16];
        for (int output = 0; output < 16; ++output) {
            int32_t sum_of_group = 0;
            for (int64_t i = g * group; i < (g + 1) * group; i += 8)
                for (int64_t j = 0; j < 4; ++j) {
                    int32_t byte = w[i * 8 + output * 4 + j];
                    sum_of_group += ((byte & 15) - 8) * q16[i + j] + ((byte >> 4) - 8) * q16[i + j + 4];
                }
            exact[output] = (float)sum_of_group;
        }
        sum_of_groups = fma(load(exact), load_f16(scale + g * 16), sum_of_groups);
    }
    store(total, sum_of_groups);
}

#endif

#if !defined(GLM_AVX2)
constexpr int64_t INT4_PIECE = INT4_BLOCK, INT4_STREAMS = 1;
constexpr bool INT4_IN_PAIRS = false;
constexpr int64_t INT4_FEW = INT4_ROWS;
#endif

// Rows of the tile that begins with `row`.
static inline int64_t int4_tile(int64_t row, int64_t rows) {
    return INT4_IN_PAIRS ? pair_rows(row, rows) : smaller(rows - row, INT4_ROWS);
}

template <int R>
static inline void int4_rows(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t rows, int64_t begin, int64_t end,
    int64_t group, float* total) {
    if constexpr (R > 0) {
        if (rows >= R && group == 32) return int4_groups<R, 32>(w, scale, x, row, begin, end, total);
        if (rows >= R && group == 64) return int4_groups<R, 64>(w, scale, x, row, begin, end, total);
        if (rows >= R) return int4_groups<R, 128>(w, scale, x, row, begin, end, total);
        int4_rows<R - 1>(w, scale, x, row, rows, begin, end, group, total);
    }
}

// Panels [first, first + panels) of the weight; total has [panels][rows][16] values.
static void int4_panels(
    const Matrix& weight, const Rows& rows, const Activation& x, int64_t first, int64_t panels, float* total) {
    int64_t groups = (weight.k + weight.group - 1) / weight.group, bytes = groups * weight.group * 8;
    int64_t step = groups;
    if (rows.count > INT4_FEW) step = INT4_BLOCK / weight.group;
    if (rows.count == 1 && INT4_STREAMS > 1) step = INT4_PIECE / weight.group;
    const uint8_t* w = (const uint8_t*)weight.data + first * bytes;
    const uint16_t* scale = (const uint16_t*)weight.scale + first * groups * 16;
    std::memset(total, 0, panels * rows.count * 16 * sizeof(float));
    for (int64_t begin = 0; begin < groups; begin += step) {
        int64_t end = begin + step < groups ? begin + step : groups;
        for (int64_t row = 0, take; row < rows.count; row += take) {
            take = int4_tile(row, rows.count);
            for (int64_t panel = 0; panel < panels; ++panel)
                int4_rows<INT4_ROWS>(
                    w + panel * bytes, scale + panel * groups * 16, x, row, take, begin, end, weight.group,
                    total + (panel * rows.count + row) * 16);
        }
    }
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t row = 0; row < rows.count; ++row)
            finish_panel(rows, row, (first + panel) * 16, weight.n,
                         load(total + (panel * rows.count + row) * 16) * set1(x.scale[row]));
}

static void int4_product(const Matrix& weight, const Rows& rows) {
    Activation x = quantise(rows, weight.k, INT4_IN_PAIRS && rows.count > 2);
    int64_t together = rows.count > INT4_FEW ? INT4_PANELS : rows.count == 1 ? INT4_STREAMS : 1;
    int64_t grain = together + (64 << 10) / (8 * weight.k + 1) / together * together;
    parallel_for((weight.n + 15) / 16, grain, [&](int64_t begin, int64_t end) {
        float* total = scratch_of<float>(PARTIALS, together * rows.count * 16);
        for (int64_t panel = begin; panel < end; panel += together)
            int4_panels(weight, rows, x, panel, end - panel < together ? end - panel : together, total);
    });
}
