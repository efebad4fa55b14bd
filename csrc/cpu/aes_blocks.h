// AES-128 on registers of one or four 16-byte blocks, and what the DCF does with such blocks beside it.
// Nothing here branches on or indexes by what is in a block.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace deepshare::cpu {
namespace {

constexpr int kRounds = 10;

// One block a register: AES-NI with SSE4.1. A mask is a block of ones or zeros.
struct OneBlock {
  using Block = __m128i;
  using Mask = __m128i;
  static constexpr int kBlocks = 1;

  static Block constant(uint64_t high, uint64_t low) {
    return _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
  }
  // Each block twice the same word.
  static Block doubled(const uint64_t* words) { return _mm_set1_epi64x(static_cast<int64_t>(words[0])); }
  static Block everywhere(__m128i block) { return block; }
  // Block k is that at `at[k] + offset`.
  static Block load(const uint8_t* const* at, int64_t offset) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[0] + offset));
  }
  static void store(uint8_t* const* at, int64_t offset, Block value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at[0] + offset), value);
  }
  // Blocks that lie one after the other.
  static Block load(const uint64_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static void store(uint64_t* at, Block value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), value); }

  static Block encrypt(Block state, Block key) { return _mm_aesenc_si128(state, key); }
  static Block encrypt_last(Block state, Block key) { return _mm_aesenclast_si128(state, key); }

  static Block bit_xor(Block a, Block b) { return _mm_xor_si128(a, b); }
  static Block bit_and(Block a, Block b) { return _mm_and_si128(a, b); }
  static Block bit_or(Block a, Block b) { return _mm_or_si128(a, b); }
  static Block low_twice(Block a) { return _mm_unpacklo_epi64(a, a); }
  static Block plus(Block a, Block b) { return _mm_add_epi64(a, b); }
  static Block minus(Block a, Block b) { return _mm_sub_epi64(a, b); }
  static Block shift_right(Block a, int64_t count) { return _mm_srl_epi64(a, _mm_cvtsi64_si128(count)); }

  static Mask mask(bool set) { return _mm_set1_epi64x(-static_cast<int64_t>(set)); }
  // Where the low word of a block has the bit that `bit` has in both.
  static Mask has(Block a, Block bit) { return _mm_cmpeq_epi64(_mm_and_si128(low_twice(a), bit), bit); }
  static Block xor_where(Block a, Mask where, Block b) { return _mm_xor_si128(a, _mm_and_si128(where, b)); }
  static Block xor_where_not(Block a, Mask where, Block b) {
    return _mm_xor_si128(a, _mm_andnot_si128(where, b));
  }
};

#if defined(__VAES__) && defined(__AVX512F__)
// Four blocks a register: VAES with AVX-512. A mask has a bit for each word.
struct FourBlocks {
  using Block = __m512i;
  using Mask = __mmask8;
  static constexpr int kBlocks = 4;

  static Block constant(uint64_t high, uint64_t low) { return everywhere(OneBlock::constant(high, low)); }
  static Block doubled(const uint64_t* words) {
    const __m512i four = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), four);
  }
  static Block everywhere(__m128i block) { return _mm512_broadcast_i32x4(block); }
  static Block load(const uint8_t* const* at, int64_t offset) {
    const __m256i low = pair(at, offset), high = pair(at + 2, offset);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static void store(uint8_t* const* at, int64_t offset, Block value) {
    OneBlock::store(at, offset, _mm512_extracti32x4_epi32(value, 0));
    OneBlock::store(at + 1, offset, _mm512_extracti32x4_epi32(value, 1));
    OneBlock::store(at + 2, offset, _mm512_extracti32x4_epi32(value, 2));
    OneBlock::store(at + 3, offset, _mm512_extracti32x4_epi32(value, 3));
  }
  static Block load(const uint64_t* at) { return _mm512_loadu_si512(at); }
  static void store(uint64_t* at, Block value) { _mm512_storeu_si512(at, value); }

  static Block encrypt(Block state, Block key) { return _mm512_aesenc_epi128(state, key); }
  static Block encrypt_last(Block state, Block key) { return _mm512_aesenclast_epi128(state, key); }

  static Block bit_xor(Block a, Block b) { return _mm512_xor_si512(a, b); }
  static Block bit_and(Block a, Block b) { return _mm512_and_si512(a, b); }
  static Block bit_or(Block a, Block b) { return _mm512_or_si512(a, b); }
  static Block low_twice(Block a) { return _mm512_unpacklo_epi64(a, a); }
  static Block plus(Block a, Block b) { return _mm512_add_epi64(a, b); }
  static Block minus(Block a, Block b) { return _mm512_sub_epi64(a, b); }
  static Block shift_right(Block a, int64_t count) { return _mm512_srl_epi64(a, _mm_cvtsi64_si128(count)); }

  static Mask mask(bool set) { return static_cast<Mask>(-static_cast<int>(set)); }
  static Mask has(Block a, Block bit) { return _mm512_test_epi64_mask(low_twice(a), bit); }
  static Block xor_where(Block a, Mask where, Block b) { return _mm512_mask_xor_epi64(a, where, a, b); }
  static Block xor_where_not(Block a, Mask where, Block b) {
    return xor_where(a, static_cast<Mask>(~where), b);
  }

 private:
  static __m256i pair(const uint8_t* const* at, int64_t offset) {
    const auto second = reinterpret_cast<const __m128i*>(at[1] + offset);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(OneBlock::load(at, offset)),
                                   _mm_loadu_si128(second), 1);
  }
};
#endif

// The key schedule of AES-128; the round constant is an immediate of the instruction.
template <int kConstant>
__m128i next_round_key(__m128i key) {
  const __m128i turned = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(key, kConstant), 0xFF);
  key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
  key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
  return _mm_xor_si128(key, turned);
}

// H(x) = AES(K, x) ^ x on kCount registers at once: one AES instruction waits for the one before it in its
// own register alone.
template <class Vector>
class FixedKeyHash {
 public:
  using Block = typename Vector::Block;

  explicit FixedKeyHash(const uint8_t* public_key) {
    __m128i key = _mm_loadu_si128(reinterpret_cast<const __m128i*>(public_key));
    const __m128i all[kRounds + 1] = {
        key,
        key = next_round_key<0x01>(key),
        key = next_round_key<0x02>(key),
        key = next_round_key<0x04>(key),
        key = next_round_key<0x08>(key),
        key = next_round_key<0x10>(key),
        key = next_round_key<0x20>(key),
        key = next_round_key<0x40>(key),
        key = next_round_key<0x80>(key),
        key = next_round_key<0x1B>(key),
        key = next_round_key<0x36>(key),
    };
    for (int round = 0; round <= kRounds; ++round) keys_[round] = Vector::everywhere(all[round]);
  }

  template <int kCount>
  void operator()(const Block (&in)[kCount], Block (&out)[kCount]) const {
    for (int k = 0; k < kCount; ++k) out[k] = Vector::bit_xor(in[k], keys_[0]);
    for (int round = 1; round < kRounds; ++round) {
      for (int k = 0; k < kCount; ++k) out[k] = Vector::encrypt(out[k], keys_[round]);
    }
    for (int k = 0; k < kCount; ++k) {
      out[k] = Vector::bit_xor(Vector::encrypt_last(out[k], keys_[kRounds]), in[k]);
    }
  }

 private:
  Block keys_[kRounds + 1];
};

}  // namespace
}  // namespace deepshare::cpu
