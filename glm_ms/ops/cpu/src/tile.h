// A tile of dot products in registers. A Part is the piece of Vec that one register has; as lanes are independent, the
// parts of a tile are computed one after the other, which needs fewer registers.
//
// A packed operand of a tile has its inputs in the order in which the tile reads them: [part][steps][rows][PART], where
// a step is LANES inputs. So a tile reads two streams, and each address once.

#if defined(GLM_AVX512)
using Part = __m512;
constexpr int PART = 16, TILE_ROWS = 4, TILE_OUTPUTS = 6;
static inline Part part_zero() { return _mm512_setzero_ps(); }
static inline Part part_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void part_store(float* p, Part a) { _mm512_storeu_ps(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
static inline Part part_load_bf16(const uint16_t* p) { return load_bf16(p).v; }
static inline Part part_load_f16(const uint16_t* p) { return load_f16(p).v; }
static inline Part part_of(Vec a, int) { return a.v; }
static inline Vec whole(const float* p, int64_t) { return load(p); }
#elif defined(GLM_AVX2)
using Part = __m256;
constexpr int PART = 8, TILE_ROWS = 3, TILE_OUTPUTS = 4;
static inline Part part_zero() { return _mm256_setzero_ps(); }
static inline Part part_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void part_store(float* p, Part a) { _mm256_storeu_ps(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
static inline Part part_load_bf16(const uint16_t* p) { return bf16_half(p); }
static inline Part part_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline Part part_of(Vec a, int part) { return part ? a.b : a.a; }
static inline Vec whole(const float* p, int64_t stride) { return {part_load(p), part_load(p + stride)}; }
#elif defined(GLM_NEON)
using Part = float32x4_t;
constexpr int PART = 4, TILE_ROWS = 4, TILE_OUTPUTS = 4;
static inline Part part_zero() { return vdupq_n_f32(0.0f); }
static inline Part part_load(const float* p) { return vld1q_f32(p); }
static inline void part_store(float* p, Part a) { vst1q_f32(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
static inline Part part_load_bf16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
static inline Part part_load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline Part part_of(Vec a, int part) { return a.q[part]; }
static inline Vec whole(const float* p, int64_t stride) {
    return {{part_load(p), part_load(p + stride), part_load(p + 2 * stride), part_load(p + 3 * stride)}};
}
#else
using Part = Vec;
constexpr int PART = 16, TILE_ROWS = 2, TILE_OUTPUTS = 2;
static inline Part part_zero() { return zero(); }
static inline Part part_load(const float* p) { return load(p); }
static inline void part_store(float* p, Part a) { store(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return fma(a, b, c); }
static inline Part part_load_bf16(const uint16_t* p) { return load_bf16(p); }
static inline Part part_load_f16(const uint16_t* p) { return load_f16(p); }
static inline Part part_of(Vec a, int) { return a; }
static inline Vec whole(const float* p, int64_t) { return load(p); }
#endif

constexpr int PARTS = LANES / PART;

// Sums of the lanes, as `sum` adds them, of TILE_OUTPUTS outputs [TILE_OUTPUTS][PART]; their parts are `stride` apart.
static inline void sum_outputs(const float* partial, int64_t stride, float* sums) {
#if defined(GLM_AVX2)
    static_assert(TILE_OUTPUTS == 4, "one register of sums");
    __m256 eight[4], four[2];
    for (int q = 0; q < 4; ++q, partial += PART)
        eight[q] = _mm256_add_ps(part_load(partial), part_load(partial + stride));
    for (int q = 0; q < 2; ++q)  // of outputs q and q + 2
        four[q] = _mm256_add_ps(_mm256_permute2f128_ps(eight[q], eight[q + 2], 0x20),
                                _mm256_permute2f128_ps(eight[q], eight[q + 2], 0x31));
    __m256 two = _mm256_add_ps(_mm256_shuffle_ps(four[0], four[1], 0x44), _mm256_shuffle_ps(four[0], four[1], 0xee));
    __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));  // outputs 0 . 1 . 2 . 3 .
    _mm_storeu_ps(sums, _mm_shuffle_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1), 0x88));
#else
    for (int q = 0; q < TILE_OUTPUTS; ++q) sums[q] = sum(whole(partial + q * PART, stride));
#endif
}

// One part of the weights of a tile, packed: [steps][TILE_OUTPUTS][PART].
struct Packed {
    const float* w;
    Part at(int64_t step, int output) const { return part_load(w + (step * TILE_OUTPUTS + output) * PART); }
};

// partial[R][TILE_OUTPUTS][PART] (+)= products of one part of R rows and TILE_OUTPUTS outputs, in order of the steps.
// x [steps][R][PART]. `fresh`: partial has no value yet.
template <int R, class Weights>
static inline void tile(const float* x, const Weights& w, int64_t steps, float* partial, bool fresh) {
    constexpr int Q = TILE_OUTPUTS;
    Part total[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) total[r][q] = fresh ? part_zero() : part_load(partial + (r * Q + q) * PART);
    for (int64_t step = 0; step < steps; ++step) {
        Part a[R];
        for (int r = 0; r < R; ++r) a[r] = part_load(x + (step * R + r) * PART);
        for (int q = 0; q < Q; ++q) {
            Part b = w.at(step, q);
            for (int r = 0; r < R; ++r) total[r][q] = part_fma(a[r], b, total[r][q]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) part_store(partial + (r * Q + q) * PART, total[r][q]);
}

// Rows of the next tile if `left` rows are left: not TILE_ROWS and then a single one, which would wait for its own
// sums, but two smaller tiles.
static inline int64_t tile_rows(int64_t left) {
    if (left < TILE_ROWS) return left;
    return left == TILE_ROWS + 1 && TILE_ROWS > 2 ? TILE_ROWS - 1 : TILE_ROWS;
}

// One part of a tile of `rows` rows, at most TILE_ROWS.
template <class Weights>
static inline void any_tile(
    int64_t rows, const float* x, const Weights& w, int64_t steps, float* partial, bool fresh) {
    if (rows == TILE_ROWS) return tile<TILE_ROWS>(x, w, steps, partial, fresh);
    if (TILE_ROWS > 3 && rows == 3) return tile<3>(x, w, steps, partial, fresh);
    if (TILE_ROWS > 2 && rows == 2) return tile<2>(x, w, steps, partial, fresh);
    tile<1>(x, w, steps, partial, fresh);
}
