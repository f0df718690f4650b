// 16 floats on every instruction set, with the same bits of every result.
//
// Included once by each isa_*.cpp, inside the namespace of that instruction set. Kernels are written with Vec alone;
// intrinsics are for the packed products.
//
// Rules that make bits equal: a lane never mixes with another but in `sum` and `max_of`, which have one fixed tree;
// a multiplication is joined with an addition only by an explicit `fma`; `max` and `min` return the second argument
// if one of them is NaN, as x86 does.

#if defined(GLM_AVX512)

struct Vec { __m512 v; };

static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline Vec set1(float a) { return {_mm512_set1_ps(a)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
static inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
static inline Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline Vec load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline Vec load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// 2^n for integral n in [-126, 127].
static inline Vec power_of_two(Vec n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}
static inline float sum(Vec a) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#elif defined(GLM_AVX2)

struct Vec { __m256 a, b; };

static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline Vec fma(Vec x, Vec y, Vec z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline Vec sqrt(Vec x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline Vec abs(Vec x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline Vec round(Vec x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
static inline __m256 bf16_half(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Vec load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
static inline Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline Vec load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline __m256 power_of_two_half(__m256 n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
// 2^n for integral n in [-126, 127].
static inline Vec power_of_two(Vec n) { return {power_of_two_half(n.a), power_of_two_half(n.b)}; }
static inline float sum(Vec x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#elif defined(GLM_NEON)

struct Vec { float32x4_t q[4]; };

#define GLM_EACH(expression) \
    Vec r; \
    for (int i = 0; i < 4; ++i) r.q[i] = (expression); \
    return r
static inline Vec load(const float* p) { GLM_EACH(vld1q_f32(p + 4 * i)); }
static inline void store(float* p, Vec a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
static inline Vec set1(float a) { GLM_EACH(vdupq_n_f32(a)); }
static inline Vec operator+(Vec a, Vec b) { GLM_EACH(vaddq_f32(a.q[i], b.q[i])); }
static inline Vec operator-(Vec a, Vec b) { GLM_EACH(vsubq_f32(a.q[i], b.q[i])); }
static inline Vec operator*(Vec a, Vec b) { GLM_EACH(vmulq_f32(a.q[i], b.q[i])); }
static inline Vec operator/(Vec a, Vec b) { GLM_EACH(vdivq_f32(a.q[i], b.q[i])); }
static inline Vec fma(Vec a, Vec b, Vec c) { GLM_EACH(vfmaq_f32(c.q[i], a.q[i], b.q[i])); }
static inline Vec max(Vec a, Vec b) { GLM_EACH(vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
static inline Vec min(Vec a, Vec b) { GLM_EACH(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
static inline Vec sqrt(Vec a) { GLM_EACH(vsqrtq_f32(a.q[i])); }
static inline Vec abs(Vec a) { GLM_EACH(vabsq_f32(a.q[i])); }
static inline Vec round(Vec a) { GLM_EACH(vrndnq_f32(a.q[i])); }
static inline Vec load_bf16(const uint16_t* p) {
    GLM_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
static inline Vec load_f16(const uint16_t* p) {
    GLM_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
static inline Vec load_i8(const int8_t* p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t half[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
    GLM_EACH(vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(half[i / 2]) : vget_low_s16(half[i / 2]))));
}
// 2^n for integral n in [-126, 127].
static inline Vec power_of_two(Vec n) {
    GLM_EACH(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23)));
}
static inline float sum(Vec a) {
    float32x4_t low = vaddq_f32(a.q[0], a.q[2]), high = vaddq_f32(a.q[1], a.q[3]);
    float32x4_t four = vaddq_f32(low, high);
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
#undef GLM_EACH

#else

struct Vec { float v[16]; };

#define GLM_EACH(expression) \
    Vec r; \
    for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
    return r
static inline Vec load(const float* p) { GLM_EACH(p[i]); }
static inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
static inline Vec set1(float a) { GLM_EACH(a); }
static inline Vec operator+(Vec a, Vec b) { GLM_EACH(a.v[i] + b.v[i]); }
static inline Vec operator-(Vec a, Vec b) { GLM_EACH(a.v[i] - b.v[i]); }
static inline Vec operator*(Vec a, Vec b) { GLM_EACH(a.v[i] * b.v[i]); }
static inline Vec operator/(Vec a, Vec b) { GLM_EACH(a.v[i] / b.v[i]); }
static inline Vec fma(Vec a, Vec b, Vec c) { GLM_EACH(std::fma(a.v[i], b.v[i], c.v[i])); }
static inline Vec max(Vec a, Vec b) { GLM_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec min(Vec a, Vec b) { GLM_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec sqrt(Vec a) { GLM_EACH(std::sqrt(a.v[i])); }
static inline Vec abs(Vec a) { GLM_EACH(std::fabs(a.v[i])); }
static inline Vec round(Vec a) { GLM_EACH(std::nearbyint(a.v[i])); }
static inline Vec load_bf16(const uint16_t* p) { GLM_EACH(float_of_bits((uint32_t)p[i] << 16)); }
static inline Vec load_f16(const uint16_t* p) { GLM_EACH(float_of_f16(p[i])); }
static inline Vec load_i8(const int8_t* p) { GLM_EACH((float)p[i]); }
// 2^n for integral n in [-126, 127]; NaN gives any number.
static inline Vec power_of_two(Vec n) {
    GLM_EACH(float_of_bits((uint32_t)((n.v[i] == n.v[i] ? (int32_t)n.v[i] : 0) + 127) << 23));
}
static inline float sum(Vec a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
    return a.v[0];
}
#undef GLM_EACH

#endif

// What follows is the same for every instruction set.

constexpr int LANES = 16;

static inline Vec zero() { return set1(0.0f); }

// Largest lane; NaN may be lost: take it from the data before.
static inline float max_of(Vec a) {
    float lanes[LANES];
    store(lanes, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// The first `count` of 16 values; the lanes behind them are zero, and their memory is not read.
static inline Vec load(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    float lanes[LANES] = {};
    std::memcpy(lanes, p, count * sizeof(float));
    return load(lanes);
}
static inline Vec load_bf16(const uint16_t* p, int64_t count) {
    if (count >= LANES) return load_bf16(p);
    uint16_t lanes[LANES] = {};
    std::memcpy(lanes, p, count * sizeof(uint16_t));
    return load_bf16(lanes);
}
static inline Vec load_f16(const uint16_t* p, int64_t count) {
    if (count >= LANES) return load_f16(p);
    uint16_t lanes[LANES] = {};
    std::memcpy(lanes, p, count * sizeof(uint16_t));
    return load_f16(lanes);
}
static inline Vec load_i8(const int8_t* p, int64_t count) {
    if (count >= LANES) return load_i8(p);
    int8_t lanes[LANES] = {};
    std::memcpy(lanes, p, count);
    return load_i8(lanes);
}
static inline void store(float* p, Vec a, int64_t count) {
    if (count >= LANES) return store(p, a);
    float lanes[LANES];
    store(lanes, a);
    std::memcpy(p, lanes, count * sizeof(float));
}

// bfloat16 of a float, round to nearest even; NaN stays NaN.
static inline uint16_t bf16_of(float value) {
    uint32_t bits = bits_of_float(value);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void store_bf16(uint16_t* p, Vec a, int64_t count = LANES) {
    float lanes[LANES];
    store(lanes, a);
    for (int64_t i = 0; i < (count < LANES ? count : LANES); ++i) p[i] = bf16_of(lanes[i]);
}
// Rounds to nearest even; values outside [-127, 127] become the nearest of them, NaN becomes 0.
static inline void store_i8(int8_t* p, Vec a, int64_t count = LANES) {
    float lanes[LANES];
    store(lanes, round(min(set1(127.0f), max(set1(-127.0f), a))));
    for (int64_t i = 0; i < (count < LANES ? count : LANES); ++i) p[i] = lanes[i] == lanes[i] ? (int8_t)lanes[i] : 0;
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor polynomial of e^r of degree 7 (relative error below 1e-7), times 2^n
// in two exact steps, so that small results round once. -inf gives 0, large x gives inf, NaN gives NaN.
static inline Vec exp(Vec x) {
    x = min(set1(89.0f), max(set1(-105.0f), x));
    Vec n = round(x * set1(1.44269504088896341f));
    Vec r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts; the first has few bits, so n times it is exact
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    Vec half = round(n * set1(0.5f));
    return p * power_of_two(half) * power_of_two(n - half);
}

// x / (1 + e^-x).
static inline Vec silu(Vec x) { return x / (set1(1.0f) + exp(zero() - x)); }
