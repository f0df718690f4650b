// Products with int8 weights: exact integer sums, one scale per row and one per output.
//
// `int8_block<R>` adds to total[R][16] the sums over `blocks` blocks of 4 inputs, for R rows and the 16 outputs of a
// panel. The totals are integers in float64, exact up to 2^53: no order changes them.

constexpr int64_t INT8_BLOCK = 512;  // inputs: 512 * 32512 * 127 < 2^31, so sums of 32 bits do not overflow
constexpr int64_t INT8_PANELS = 2;   // many rows: so many panels of a block stay in the first cache for all rows

#if defined(GLM_AVX512)

constexpr int INT8_ROWS = 8;

static inline void add_int32(double* total, __m512i values, double factor) {
    __m512d f = _mm512_set1_pd(factor);
    __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(values));
    __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(values, 1));
    _mm512_storeu_pd(total, _mm512_fmadd_pd(low, f, _mm512_loadu_pd(total)));
    _mm512_storeu_pd(total + 8, _mm512_fmadd_pd(high, f, _mm512_loadu_pd(total + 8)));
}

// Weights become unsigned by adding 128 (a flip of their highest bit); 128 times the sum of x is taken off again.
template <int R>
static inline void int8_block(
    const int8_t* w, const Activation& x, int64_t row, int64_t first, int64_t blocks, double* total) {
    __m512i high[R], low[R];
    for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
    const int8_t* xh = x.high_of(row) + first;
    const int8_t* xl = x.low_of(row) + first;
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int64_t b = 0; b < blocks; ++b) {
        __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(w + b * 64), flip);
        for (int r = 0; r < R; ++r) {
            int32_t h, l;
            std::memcpy(&h, xh + r * x.k + b * 4, 4);
            std::memcpy(&l, xl + r * x.k + b * 4, 4);
            high[r] = _mm512_dpbusd_epi32(high[r], weights, _mm512_set1_epi32(h));
            low[r] = _mm512_dpbusd_epi32(low[r], weights, _mm512_set1_epi32(l));
        }
    }
    for (int r = 0; r < R; ++r) {
        int64_t all = 0;
        const int32_t* sums = x.sums_of(row + r) + first / 32;
        for (int64_t i = 0; i < (blocks * 4 + 31) / 32; ++i) all += sums[i];  // inputs behind the end are zero
        add_int32(total + r * 16, high[r], 256.0);
        add_int32(total + r * 16, low[r], 1.0);
        __m512d off = _mm512_set1_pd(-128.0 * (double)all);
        for (int half = 0; half < 16; half += 8)
            _mm512_storeu_pd(total + r * 16 + half, _mm512_add_pd(_mm512_loadu_pd(total + r * 16 + half), off));
    }
}

#elif defined(GLM_AVX2)

constexpr int INT8_ROWS = 6;

// One or two rows wait for memory: they read pieces of so many inputs of some panels in turn, as several streams arrive
// faster than one, and ask for the next piece of each.
constexpr int64_t INT8_PIECE = 64, INT8_STREAMS = 4;

// The sum as it is. Compilers otherwise compute many products first and add them in a tree, for which there are not
// enough registers.
static inline __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}

// A register has 4 outputs with 2 sums each (inputs 0 + 1, inputs 2 + 3).
template <int R>
static inline void int8_block(
    const int8_t* w, const Activation& x, int64_t row, int64_t first, int64_t blocks, double* total) {
    constexpr int Q = R <= 2 ? 4 : 2;  // registers of outputs at a time
    const int16_t* q16 = x.q_of(row) + first;
    for (int part = 0; part < 4; part += Q) {
        __m256i sums[R][Q];
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) sums[r][q] = _mm256_setzero_si256();
        for (int64_t b = 0; b < blocks; ++b) {
            if (R <= 2) __builtin_prefetch(w + (b + INT8_PIECE / 4) * 64);
            __m256i weights[Q];
            for (int q = 0; q < Q; ++q)
                weights[q] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + b * 64 + (part + q) * 16)));
            for (int r = 0; r < R; ++r) {
                long long four;
                std::memcpy(&four, q16 + r * x.k + b * 4, 8);
                __m256i inputs = _mm256_set1_epi64x(four);
                for (int q = 0; q < Q; ++q)
                    sums[r][q] = in_order(_mm256_add_epi32(sums[r][q], _mm256_madd_epi16(weights[q], inputs)));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; q += 2) {
                __m256i mixed = _mm256_hadd_epi32(sums[r][q], sums[r][q + 1]);  // outputs 0 1 4 5, 2 3 6 7
                __m256i ordered = _mm256_permute4x64_epi64(mixed, 0xd8);
                double* to = total + r * 16 + (part + q) * 4;
                __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(ordered));
                __m256d high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(ordered, 1));
                _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
                _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), high));
            }
    }
}

#elif defined(GLM_NEON)

#if defined(GLM_NEON_DOT)
constexpr int INT8_ROWS = 2;

template <int R>
static inline void int8_block(
    const int8_t* w, const Activation& x, int64_t row, int64_t first, int64_t blocks, double* total) {
    int32x4_t high[R][4], low[R][4];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < 4; ++q) high[r][q] = low[r][q] = vdupq_n_s32(0);
    for (int64_t b = 0; b < blocks; ++b) {
        int8x16_t weights[4];
        for (int q = 0; q < 4; ++q) weights[q] = vld1q_s8(w + b * 64 + q * 16);
        for (int r = 0; r < R; ++r) {
            int32_t h, l;
            std::memcpy(&h, x.high_of(row + r) + first + b * 4, 4);
            std::memcpy(&l, x.low_of(row + r) + first + b * 4, 4);
            int8x16_t xh = vreinterpretq_s8_s32(vdupq_n_s32(h)), xl = vreinterpretq_s8_s32(vdupq_n_s32(l));
            for (int q = 0; q < 4; ++q) {
                high[r][q] = vdotq_s32(high[r][q], weights[q], xh);
                low[r][q] = vdotq_s32(low[r][q], weights[q], xl);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < 4; ++q) {
            int32_t h[4], l[4];
            vst1q_s32(h, high[r][q]);
            vst1q_s32(l, low[r][q]);
            for (int i = 0; i < 4; ++i) total[r * 16 + q * 4 + i] += (double)h[i] * 256.0 + (double)l[i];
        }
}
#else
constexpr int INT8_ROWS = 2;

// A register has 2 outputs with 2 sums each.
template <int R>
static inline void int8_block(
    const int8_t* w, const Activation& x, int64_t row, int64_t first, int64_t blocks, double* total) {
    int32x4_t sums[R][8];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < 8; ++q) sums[r][q] = vdupq_n_s32(0);
    for (int64_t b = 0; b < blocks; ++b)
        for (int q = 0; q < 8; ++q) {
            int16x8_t weights = vmovl_s8(vld1_s8(w + b * 64 + q * 8));
            for (int r = 0; r < R; ++r) {
                int16x4_t inputs = vld1_s16(x.q_of(row + r) + first + b * 4);
                int32x4_t even = vmull_s16(vget_low_s16(weights), inputs);
                int32x4_t odd = vmull_s16(vget_high_s16(weights), inputs);
                sums[r][q] = vaddq_s32(sums[r][q], vpaddq_s32(even, odd));
            }
        }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < 8; ++q) {
            int32_t s[4];
            vst1q_s32(s, sums[r][q]);
            total[r * 16 + q * 2] += (double)s[0] + (double)s[1];
            total[r * 16 + q * 2 + 1] += (double)s[2] + (double)s[3];
        }
}
#endif

#else

constexpr int INT8_ROWS = 1;

template <int R>
static inline void int8_block(
    const int8_t* w, const Activation& x, int64_t row, int64_t first, int64_t blocks, double* total) {
    int32_t sums[16] = {};
    const int16_t* q16 = x.q_of(row) + first;
    for (int64_t b = 0; b < blocks; ++b)
        for (int output = 0; output < 16; ++output)
            for (int i = 0; i < 4; ++i) sums[output] += (int32_t)w[b * 64 + output * 4 + i] * q16[b * 4 + i];
    for (int output = 0; output < 16; ++output) total[output] += (double)sums[output];
}

#endif

#if !defined(GLM_AVX2)
constexpr int64_t INT8_PIECE = INT8_BLOCK, INT8_STREAMS = 1;
#endif

template <int R>
static inline void int8_rows(
    const int8_t* w, const Activation& x, int64_t row, int64_t rows, int64_t first, int64_t blocks, double* total) {
    if constexpr (R > 0) {
        if (rows >= R) return int8_block<R>(w, x, row, first, blocks, total);
        int8_rows<R - 1>(w, x, row, rows, first, blocks, total);
    }
}

// Panels [first, first + panels) of the weight; total has [panels][rows][16] values.
static void int8_panels(
    const Matrix& weight, const Rows& rows, const Activation& x, int64_t first, int64_t panels, double* total) {
    int64_t k_blocks = (weight.k + 3) / 4;
    const int8_t* w = (const int8_t*)weight.data + first * k_blocks * 64;
    std::memset(total, 0, panels * rows.count * 16 * sizeof(double));
    const int64_t step = (rows.count <= 2 ? INT8_PIECE : INT8_BLOCK) / 4;
    for (int64_t begin = 0; begin < k_blocks; begin += step) {
        int64_t blocks = smaller(k_blocks - begin, step);
        for (int64_t row = 0; row < rows.count; row += INT8_ROWS)
            for (int64_t panel = 0; panel < panels; ++panel)
                int8_rows<INT8_ROWS>(
                    w + (panel * k_blocks + begin) * 64, x, row, rows.count - row, begin * 4, blocks,
                    total + (panel * rows.count + row) * 16);
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
        int64_t output = (first + panel) * 16;
        float scale[16];
        store(scale, load((const float*)weight.scale + output, weight.n - output));
        for (int64_t row = 0; row < rows.count; ++row) {
            const double* exact = total + (panel * rows.count + row) * 16;
            float values[16];
            for (int q = 0; q < 16; ++q) values[q] = (float)(exact[q] * ((double)x.scale[row] * (double)scale[q]));
            finish_panel(rows, row, output, weight.n, load(values));
        }
    }
}

static void int8_product(const Matrix& weight, const Rows& rows) {
    Activation x = quantise(rows, weight.k);
    int64_t together = rows.count > INT8_ROWS ? INT8_PANELS : rows.count <= 2 ? INT8_STREAMS : 1;
    int64_t grain = together + (64 << 10) / (16 * weight.k + 1) / together * together;
    parallel_for((weight.n + 15) / 16, grain, [&](int64_t begin, int64_t end) {
        double* total = scratch_of<double>(PARTIALS, together * rows.count * 16);
        for (int64_t panel = begin; panel < end; panel += together)
            int8_panels(weight, rows, x, panel, end - panel < together ? end - panel : together, total);
    });
}
