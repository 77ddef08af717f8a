// Sixteen codes or numbers at a time, in the vectors of the instruction set that a decoder is compiled for. Where there
// are none, loops over arrays do the same.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../dtypes.h"

namespace fi {
namespace FI_ISA {

constexpr int kVector = 16;  // elements

// ---- numbers that stand alone --------------------------------------------------------------------------------------

// Of any alignment.
template <class T>
FI_INLINE T load_at(const void* from, int64_t index) {
  T value;
  memcpy(&value, static_cast<const char*>(from) + index * int64_t(sizeof value), sizeof value);
  return value;
}

// 2^(code - 127): 0 is subnormal, 255 NaN.
FI_INLINE float e8m0(uint8_t code) {
  const uint32_t power = choose(code == 0, 0x00400000u, uint32_t(code) << 23);
  return bit_cast<float>(choose(code == 255, 0x7fc00000u, power));
}

FI_INLINE float widen_f16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  return widen_small<DType::F16>(bits);
#endif
}

// ---- vectors -------------------------------------------------------------------------------------------------------

// Bytes: 16 codes. Floats: 16 numbers.
//   load_bytes, low_nibbles, high_nibbles, interleave_* bytes to codes
//   look_up                                             table[code], codes 0..15
//   widen_e5m2, widen_e4m3, widen_i8, widen_e8m0        codes to numbers, exactly
//   times                                               one rounding
//   put, put_bytes                                      store 16 numbers, each NaN as 7FC00000, or 16 bytes

#if defined(__AVX2__)

using Bytes = __m128i;

FI_INLINE Bytes load_bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
FI_INLINE void put_bytes(void* to, Bytes x) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }
FI_INLINE Bytes low_nibbles(Bytes x) { return _mm_and_si128(x, _mm_set1_epi8(15)); }
FI_INLINE Bytes high_nibbles(Bytes x) { return _mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15)); }
FI_INLINE Bytes interleave_low(Bytes even, Bytes odd) { return _mm_unpacklo_epi8(even, odd); }
FI_INLINE Bytes interleave_high(Bytes even, Bytes odd) { return _mm_unpackhi_epi8(even, odd); }
FI_INLINE Bytes look_up(Bytes table, Bytes codes) { return _mm_shuffle_epi8(table, codes); }

#if defined(__AVX512F__)

using Floats = __m512;

constexpr __mmask16 kAll = 0xffff;  // g++ 12 warns of conversions without a mask

FI_INLINE Floats widen_halves(__m256i halves) { return _mm512_maskz_cvtph_ps(kAll, halves); }
FI_INLINE Floats widen_i8(Bytes codes) {
  return _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, codes));
}
FI_INLINE Floats widen_e8m0(Bytes codes) {
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(kAll, codes);
  const __mmask16 least = _mm512_testn_epi32_mask(wide, wide),
                  nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
  __m512i bits = _mm512_maskz_slli_epi32(kAll, wide, 23);
  bits = _mm512_mask_mov_epi32(bits, least, _mm512_set1_epi32(0x00400000));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}
FI_INLINE Floats times(Floats x, float y) { return x * _mm512_set1_ps(y); }
FI_INLINE Floats times(Floats x, Floats y) { return x * y; }
FI_INLINE void put(float* to, Floats x) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm512_storeu_ps(to, _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))));
}

#else

struct Floats {
  __m256 low, high;
};

FI_INLINE Floats widen_halves(__m256i halves) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
FI_INLINE Floats widen_i8(Bytes codes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
FI_INLINE __m256 powers(__m256i wide) {  // of E8M0
  const __m256i least = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
  const __m256i nan = _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255));
  __m256i bits = _mm256_slli_epi32(wide, 23);
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), least);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan));
}
FI_INLINE Floats widen_e8m0(Bytes codes) {
  return {powers(_mm256_cvtepu8_epi32(codes)), powers(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
}
FI_INLINE Floats times(Floats x, float y) { return {x.low * _mm256_set1_ps(y), x.high * _mm256_set1_ps(y)}; }
FI_INLINE Floats times(Floats x, Floats y) { return {x.low * y.low, x.high * y.high}; }
FI_INLINE __m256 one_nan(__m256 x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
FI_INLINE void put(float* to, Floats x) {
  _mm256_storeu_ps(to, one_nan(x.low));
  _mm256_storeu_ps(to + 8, one_nan(x.high));
}

#endif

// A code of E5M2 is the high byte of an f16 number.
FI_INLINE Floats widen_e5m2(Bytes codes) { return widen_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8)); }

// The bits of an E4M3 number, moved into those of f16, are the number times 2^-8.
FI_INLINE Floats widen_e4m3(Bytes codes) {
  const __m256i wide = _mm256_cvtepu8_epi16(codes), most = _mm256_set1_epi16(0x7f);
  const __m256i mag = _mm256_and_si256(wide, most);
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(most, wide), 8);
  const __m256i halves = _mm256_or_si256(_mm256_slli_epi16(mag, 7), sign);
  const __m256i nan = _mm256_cmpeq_epi16(mag, most);
  return times(widen_halves(_mm256_blendv_epi8(halves, _mm256_set1_epi16(0x7e00), nan)), 256.0f);
}

#elif defined(__aarch64__)

using Bytes = uint8x16_t;
struct Floats {
  float32x4_t part[4];
};

FI_INLINE Bytes load_bytes(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }
FI_INLINE void put_bytes(void* to, Bytes x) { vst1q_u8(static_cast<uint8_t*>(to), x); }
FI_INLINE Bytes low_nibbles(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
FI_INLINE Bytes high_nibbles(Bytes x) { return vshrq_n_u8(x, 4); }
FI_INLINE Bytes interleave_low(Bytes even, Bytes odd) { return vzip1q_u8(even, odd); }
FI_INLINE Bytes interleave_high(Bytes even, Bytes odd) { return vzip2q_u8(even, odd); }
FI_INLINE Bytes look_up(Bytes table, Bytes codes) { return vqtbl1q_u8(table, codes); }

FI_INLINE Floats widen_halves(uint16x8_t low, uint16x8_t high) {
  const float16x8_t a = vreinterpretq_f16_u16(low), b = vreinterpretq_f16_u16(high);
  return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)}};
}
FI_INLINE Floats widen_i8(Bytes codes) {
  const int8x16_t x = vreinterpretq_s8_u8(codes);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
FI_INLINE float32x4_t powers(uint32x4_t wide) {  // of E8M0
  uint32x4_t bits = vshlq_n_u32(wide, 23);
  bits = vbslq_u32(vceqzq_u32(wide), vdupq_n_u32(0x00400000u), bits);
  return vreinterpretq_f32_u32(vbslq_u32(vceqq_u32(wide, vdupq_n_u32(255)), vdupq_n_u32(0x7fc00000u), bits));
}
FI_INLINE Floats widen_e8m0(Bytes codes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
  return {{powers(vmovl_u16(vget_low_u16(low))), powers(vmovl_high_u16(low)), powers(vmovl_u16(vget_low_u16(high))),
           powers(vmovl_high_u16(high))}};
}
FI_INLINE Floats times(Floats x, float y) {
  for (float32x4_t& part : x.part) part = vmulq_n_f32(part, y);
  return x;
}
FI_INLINE Floats times(Floats x, Floats y) {
  for (int i = 0; i < 4; ++i) x.part[i] = vmulq_f32(x.part[i], y.part[i]);
  return x;
}
FI_INLINE void put(float* to, Floats x) {
  const float32x4_t nan = vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000u));
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, vbslq_f32(vceqq_f32(x.part[i], x.part[i]), x.part[i], nan));
}

FI_INLINE Floats widen_e5m2(Bytes codes) {
  return widen_halves(vshll_n_u8(vget_low_u8(codes), 8), vshll_high_n_u8(codes, 8));
}
FI_INLINE uint16x8_t e4m3_halves(uint16x8_t wide) {  // times 2^-8
  const uint16x8_t mag = vandq_u16(wide, vdupq_n_u16(0x7f)), sign = vandq_u16(wide, vdupq_n_u16(0x80));
  const uint16x8_t halves = vorrq_u16(vshlq_n_u16(mag, 7), vshlq_n_u16(sign, 8));
  return vbslq_u16(vceqq_u16(mag, vdupq_n_u16(0x7f)), vdupq_n_u16(0x7e00), halves);
}
FI_INLINE Floats widen_e4m3(Bytes codes) {
  const uint16x8_t low = e4m3_halves(vmovl_u8(vget_low_u8(codes))), high = e4m3_halves(vmovl_high_u8(codes));
  return times(widen_halves(low, high), 256.0f);
}

#else

struct Bytes {
  uint8_t at[kVector];
};
struct Floats {
  float at[kVector];
};
#define FI_EACH for (int i = 0; i < kVector; ++i)

FI_INLINE Bytes load_bytes(const void* from) { return load_at<Bytes>(from, 0); }
FI_INLINE void put_bytes(void* to, Bytes x) { memcpy(to, &x, sizeof x); }
FI_INLINE Bytes low_nibbles(Bytes x) {
  FI_EACH x.at[i] &= 15;
  return x;
}
FI_INLINE Bytes high_nibbles(Bytes x) {
  FI_EACH x.at[i] = uint8_t(x.at[i] >> 4);
  return x;
}
FI_INLINE Bytes interleave_low(Bytes even, Bytes odd) {
  Bytes all;
  FI_EACH all.at[i] = i % 2 ? odd.at[i / 2] : even.at[i / 2];
  return all;
}
FI_INLINE Bytes interleave_high(Bytes even, Bytes odd) {
  Bytes all;
  FI_EACH all.at[i] = i % 2 ? odd.at[8 + i / 2] : even.at[8 + i / 2];
  return all;
}
FI_INLINE Bytes look_up(Bytes table, Bytes codes) {
  FI_EACH codes.at[i] = table.at[codes.at[i]];
  return codes;
}
template <DType D>
FI_INLINE Floats widen_fp8(Bytes codes) {
  uint32_t wide[kVector];
  Floats x;
  FI_EACH wide[i] = codes.at[i];
  FI_EACH x.at[i] = widen_small<D>(wide[i]);
  return x;
}
FI_INLINE Floats widen_e5m2(Bytes codes) { return widen_fp8<DType::F8_E5M2>(codes); }
FI_INLINE Floats widen_e4m3(Bytes codes) { return widen_fp8<DType::F8_E4M3>(codes); }
FI_INLINE Floats widen_i8(Bytes codes) {
  Floats x;
  FI_EACH x.at[i] = float(int8_t(codes.at[i]));
  return x;
}
FI_INLINE Floats widen_e8m0(Bytes codes) {
  Floats x;
  FI_EACH x.at[i] = e8m0(codes.at[i]);
  return x;
}
FI_INLINE Floats times(Floats x, float y) {
  FI_EACH x.at[i] *= y;
  return x;
}
FI_INLINE Floats times(Floats x, Floats y) {
  FI_EACH x.at[i] *= y.at[i];
  return x;
}
FI_INLINE void put(float* to, Floats x) { FI_EACH to[i] = canonical_nan(x.at[i]); }
#undef FI_EACH

#endif

// ---- E2M1 ----------------------------------------------------------------------------------------------------------

// 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same negative, as codes of E5M2.
FI_INLINE Floats widen_e2m1(Bytes codes) {
  static constexpr uint8_t kE5M2[kVector] = {0x00, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46,
                                             0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6};
  return widen_e5m2(look_up(load_bytes(kE5M2), codes));
}

}  // namespace FI_ISA
}  // namespace fi
