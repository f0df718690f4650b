// AVX-512 by SIMDe, so that its kernels run on any x86 machine: for tests. Functions that SIMDe 0.7 lacks follow.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

namespace translated {

template <class To, class From, class Convert>
inline To each(From from, Convert convert) {
    To to;
    convert(reinterpret_cast<const char*>(&from), reinterpret_cast<char*>(&to));
    return to;
}

inline __m512d cvtepi32_pd(__m256i a) {
    return each<__m512d>(a, [](const char* in, char* out) {
        for (int i = 0; i < 2; ++i) {
            __m256d half = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i*)(in + 16 * i)));
            _mm256_storeu_pd((double*)(out + 32 * i), half);
        }
    });
}
inline __m512 cvtepi32_ps(__m512i a) {
    return each<__m512>(a, [](const char* in, char* out) {
        for (int i = 0; i < 64; i += 32)
            _mm256_storeu_ps((float*)(out + i), _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(in + i))));
    });
}
inline __m512i cvtps_epi32(__m512 a) {
    return each<__m512i>(a, [](const char* in, char* out) {
        for (int i = 0; i < 64; i += 32)
            _mm256_storeu_si256((__m256i*)(out + i), _mm256_cvtps_epi32(_mm256_loadu_ps((const float*)(in + i))));
    });
}
inline __m512i cvtepi8_epi32(__m128i a) {
    return each<__m512i>(a, [](const char* in, char* out) {
        for (int i = 0; i < 2; ++i)
            _mm256_storeu_si256(
                (__m256i*)(out + 32 * i), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(in + 8 * i))));
    });
}
inline __m512i cvtepu16_epi32(__m256i a) {
    return each<__m512i>(a, [](const char* in, char* out) {
        for (int i = 0; i < 2; ++i)
            _mm256_storeu_si256(
                (__m256i*)(out + 32 * i), _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(in + 16 * i))));
    });
}
inline __m512 cvtph_ps(__m256i a) {
    return each<__m512>(a, [](const char* in, char* out) {
        for (int i = 0; i < 2; ++i)
            _mm256_storeu_ps((float*)(out + 32 * i), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + 16 * i))));
    });
}

}  // namespace translated

#define _mm512_cvtepi32_pd translated::cvtepi32_pd
#define _mm512_cvtepi32_ps translated::cvtepi32_ps
#define _mm512_cvtps_epi32 translated::cvtps_epi32
#define _mm512_cvtepi8_epi32 translated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 translated::cvtepu16_epi32
#define _mm512_cvtph_ps translated::cvtph_ps
