// A tile of dot products in registers. A Part is the piece of Vec that one register has; as lanes are independent, the
// parts of a tile are computed one after the other, which needs fewer registers.

#if defined(GLM_AVX512)
using Part = __m512;
constexpr int PART = 16, TILE_ROWS = 4, TILE_OUTPUTS = 6;
static inline Part part_zero() { return _mm512_setzero_ps(); }
static inline Part part_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void part_store(float* p, Part a) { _mm512_storeu_ps(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(GLM_AVX2)
using Part = __m256;
constexpr int PART = 8, TILE_ROWS = 3, TILE_OUTPUTS = 4;
static inline Part part_zero() { return _mm256_setzero_ps(); }
static inline Part part_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void part_store(float* p, Part a) { _mm256_storeu_ps(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(GLM_NEON)
using Part = float32x4_t;
constexpr int PART = 4, TILE_ROWS = 4, TILE_OUTPUTS = 4;
static inline Part part_zero() { return vdupq_n_f32(0.0f); }
static inline Part part_load(const float* p) { return vld1q_f32(p); }
static inline void part_store(float* p, Part a) { vst1q_f32(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
#else
using Part = Vec;
constexpr int PART = 16, TILE_ROWS = 2, TILE_OUTPUTS = 2;
static inline Part part_zero() { return zero(); }
static inline Part part_load(const float* p) { return load(p); }
static inline void part_store(float* p, Part a) { store(p, a); }
static inline Part part_fma(Part a, Part b, Part c) { return fma(a, b, c); }
#endif

// partial[r][q][16] (+)= x[r][i] w[q][i] for R rows and TILE_OUTPUTS outputs, in order of i; `width` is a multiple of
// 16 and the distance of rows. `fresh`: partial has no value yet. `stride`: distance of rows of partial.
template <int R>
static inline void tile(const float* x, const float* w, int64_t width, float* partial, int64_t stride, bool fresh) {
    constexpr int Q = TILE_OUTPUTS;
    for (int part = 0; part < LANES; part += PART) {
        Part total[R][Q];
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q)
                total[r][q] = fresh ? part_zero() : part_load(partial + r * stride + q * LANES + part);
        for (int64_t i = part; i < width; i += LANES) {
            Part a[R];
            for (int r = 0; r < R; ++r) a[r] = part_load(x + r * width + i);
            for (int q = 0; q < Q; ++q) {
                Part b = part_load(w + q * width + i);
                for (int r = 0; r < R; ++r) total[r][q] = part_fma(a[r], b, total[r][q]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) part_store(partial + r * stride + q * LANES + part, total[r][q]);
    }
}
