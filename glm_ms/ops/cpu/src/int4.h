// Products with int4 weights: exact integer sums in each group, which are added as float32 in order of the groups:
// total = fma(float(sum of the group), scale of the group, total), then total * scale of the row.
//
// `int4_groups<R>` does so for R rows and the 16 outputs of a panel: total[R][16].

#if defined(GLM_AVX512)

constexpr int INT4_ROWS = 6;

template <int R>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t groups, int64_t group,
    float* total) {
    __m512 sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < groups; ++g) {
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

constexpr int INT4_ROWS = 2;

static inline __m256i broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

static inline __m256i add_pairs(__m256i sum, __m256i nibbles, __m256i inputs) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(nibbles, inputs)));
}

// Sums of 16 bits over 32 inputs: 16 products of at most 15 * 128 a lane. Then 32 bits: 256 high + low.
template <int R>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t groups, int64_t group,
    float* total) {
    const __m256i mask = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), big = _mm256_set1_epi16(256);
    __m256 sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
        __m256i exact[R][2];
        for (int r = 0; r < R; ++r) exact[r][0] = exact[r][1] = _mm256_setzero_si256();
        for (int64_t part = g * group; part < (g + 1) * group; part += 32) {
            __m256i high[R][2], low[R][2];
            for (int r = 0; r < R; ++r)
                for (int q = 0; q < 2; ++q) high[r][q] = low[r][q] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int64_t i = part; i < part + 32; i += 8)
                for (int half = 0; half < 2; ++half) {
                    __m256i nibbles[2];
                    for (int q = 0; q < 2; ++q) {
                        __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + i * 8 + q * 32));
                        nibbles[q] = _mm256_and_si256(half ? _mm256_srli_epi16(bytes, 4) : bytes, mask);
                    }
                    for (int r = 0; r < R; ++r) {
                        __m256i h = broadcast4(x.high_of(row + r) + i + half * 4);
                        for (int q = 0; q < 2; ++q) high[r][q] = add_pairs(high[r][q], nibbles[q], h);
                        __m256i l = broadcast4(x.low_of(row + r) + i + half * 4);
                        for (int q = 0; q < 2; ++q) low[r][q] = add_pairs(low[r][q], nibbles[q], l);
                    }
                }
            for (int r = 0; r < R; ++r) {
                __m256i off = _mm256_set1_epi32(x.sums_of(row + r)[part / 32] * 8);
                for (int q = 0; q < 2; ++q) {
                    __m256i both = _mm256_madd_epi16(high[r][q], big);
                    both = _mm256_add_epi32(both, _mm256_madd_epi16(low[r][q], one));
                    exact[r][q] = _mm256_add_epi32(exact[r][q], _mm256_sub_epi32(both, off));
                }
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

template <int R>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t groups, int64_t group,
    float* total) {
    Vec sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
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

template <int R>
static inline void int4_groups(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t groups, int64_t group,
    float* total) {
    const int16_t* q16 = x.q_of(row);
    Vec sum_of_groups = zero();
    for (int64_t g = 0; g < groups; ++g) {
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

template <int R>
static inline void int4_rows(
    const uint8_t* w, const uint16_t* scale, const Activation& x, int64_t row, int64_t rows, int64_t groups,
    int64_t group, float* total) {
    if constexpr (R > 0) {
        if (rows >= R) return int4_groups<R>(w, scale, x, row, groups, group, total);
        int4_rows<R - 1>(w, scale, x, row, rows, groups, group, total);
    }
}

static void int4_panel(const Matrix& weight, const Rows& rows, const Activation& x, int64_t panel) {
    int64_t groups = (weight.k + weight.group - 1) / weight.group;
    const uint8_t* w = (const uint8_t*)weight.data + panel * groups * weight.group * 8;
    const uint16_t* scale = (const uint16_t*)weight.scale + panel * groups * 16;
    int64_t outputs = weight.n - panel * 16 < 16 ? weight.n - panel * 16 : 16;
    for (int64_t row = 0; row < rows.count; row += INT4_ROWS) {
        float total[INT4_ROWS * 16];
        int64_t height = rows.count - row < INT4_ROWS ? rows.count - row : INT4_ROWS;
        int4_rows<INT4_ROWS>(w, scale, x, row, height, groups, weight.group, total);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t output = 0; output < outputs; ++output)
                finish(rows, row + r, panel * 16 + output, total[r * 16 + output] * x.scale[row + r]);
    }
}

static void int4_product(const Matrix& weight, const Rows& rows) {
    Activation x = quantise(rows, weight.k);
    int64_t grain = 1 + (64 << 10) / (8 * weight.k + 1);
    parallel_for((weight.n + 15) / 16, grain, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) int4_panel(weight, rows, x, panel);
    });
}
