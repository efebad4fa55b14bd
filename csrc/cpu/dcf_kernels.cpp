// The DCF gate for one instruction set. Compiled once per DEEPSHARE_AES (CMakeLists.txt), each time with
// other flags. Gates go in groups of a block each in kRegisters registers, so that their AES chains overlap;
// a last group that is not full does its last gate several times over.
#include "aes_blocks.h"
#include "dcf.h"

#define DEEPSHARE_TEXT_OF(name) #name
#define DEEPSHARE_TEXT(name) DEEPSHARE_TEXT_OF(name)

namespace deepshare::cpu {
namespace {

// Registers: as many blocks at once as hide the latency of an AES instruction. Seen on a Zen 4 core, 6,024
// gates: evaluation with 2, 4, 6, 8 registers of four blocks 0.68, 0.45, 0.40, 0.42 ms; generation, with four
// blocks in each, 1, 2, 3 registers 1.79, 1.46, 1.47 ms, and of one block 1, 2, 3, 4
// registers 5.7, 3.6, 3.5, 5.0 ms.
#if defined(__VAES__) && defined(__AVX512F__)
using V = FourBlocks;
constexpr int kEvaluateRegisters = 6;
#else
using V = OneBlock;
constexpr int kEvaluateRegisters = 8;
#endif
constexpr int kGenerateRegisters = 2;

using Block = V::Block;
using Hash = FixedKeyHash<V>;
constexpr int64_t kGrain = 480;  // gates a thread takes at least, about 0.1 ms

// The low three bits of a block: control bit of a left child, of a right child, value. The rest is the seed.
constexpr uint64_t kAll = ~uint64_t{0};
inline Block seed_of(Block block) { return V::bit_and(block, V::constant(kAll, ~uint64_t{7})); }
inline Block ones() { return V::constant(1, 1); }
// What hashes a seed to its leaf; 0 and 1 hash it to its children.
inline Block for_leaf(Block seed) { return V::bit_or(seed, V::constant(0, 2)); }

// Bit `place` of each word.
inline Block bit_at(Block words, int64_t place) { return V::bit_and(V::shift_right(words, place), ones()); }

// Of the child on the side of `bit` (0 or 1 in both words): whether its control bit is set.
inline V::Mask control_bit(Block child, Block bit) { return V::has(child, V::plus(bit, ones())); }

// a where a word of `where` is all ones, else b.
inline Block choose(Block where, Block a, Block b) {
  return V::bit_xor(b, V::bit_and(where, V::bit_xor(a, b)));
}

// The gates of one group.
template <int kRegisters>
struct Group {
  static constexpr int kGates = kRegisters * V::kBlocks;
  int64_t first, count;

  Group(int64_t number, int64_t gates)
      : first(number * kGates), count(gates - first < kGates ? gates - first : kGates) {}

  int64_t gate(int k) const { return first + (k < count ? k : count - 1); }

  template <class Byte>
  void rows(Byte* base, int64_t stride, Byte* (&at)[kGates]) const {
    for (int k = 0; k < kGates; ++k) at[k] = base + gate(k) * stride;
  }
  void words(const int64_t* values, uint64_t (&to)[kGates]) const {
    for (int k = 0; k < kGates; ++k) to[k] = static_cast<uint64_t>(values[gate(k)]);
  }
};

// One party's walk from its roots along the points of a group's gates.
struct Evaluation {
  static constexpr int kRegisters = kEvaluateRegisters;
  using Gates = Group<kRegisters>;
  using Args = DcfEvaluateArgs;
  static constexpr int kGates = Gates::kGates;
  static_assert(kGates % 8 == 0, "a byte of shares belongs to one group, and so to one thread");

  const Args& args;
  const Hash& hash;
  const Gates group;
  const uint8_t* keys[kGates];
  uint64_t points[kGates];
  Block block[kRegisters], value[kRegisters], u[kRegisters];
  V::Mask taken[kRegisters];  // where this party's control bit is set

  Evaluation(const Args& args_, const Hash& hash_, int64_t number)
      : args(args_), hash(hash_), group(number, args.gates) {
    const uint8_t* roots[kGates];
    group.rows(args.keys, dcf_key_bytes(args.bits), keys);
    group.rows(args.roots, kBlockBytes, roots);
    group.words(args.points, points);
    for (int k = 0; k < kRegisters; ++k) {
      block[k] = V::load(roots + k * V::kBlocks, 0);
      u[k] = V::doubled(points + k * V::kBlocks);
      value[k] = V::constant(0, 0);
      taken[k] = V::mask(args.party == 1);
    }
  }

  void run() {
    const int64_t levels = args.bits - kLeafLevels;
    for (int64_t level = 0; level < levels; ++level) descend(level);
    for (int k = 0; k < kRegisters; ++k) block[k] = for_leaf(seed_of(block[k]));
    correct(levels);
    finish();
  }

  // block = H(block), corrected by word `word` of the key where the control bit is set.
  void correct(int64_t word) {
    Block hashed[kRegisters];
    hash(block, hashed);
    for (int k = 0; k < kRegisters; ++k) {
      block[k] = V::xor_where(hashed[k], taken[k], V::load(keys + k * V::kBlocks, word * kBlockBytes));
    }
  }

  void descend(int64_t level) {
    Block bit[kRegisters];
    for (int k = 0; k < kRegisters; ++k) {
      bit[k] = bit_at(u[k], args.bits - 1 - level);
      block[k] = V::bit_or(seed_of(block[k]), V::bit_and(bit[k], V::constant(0, 1)));
    }
    correct(level);
    for (int k = 0; k < kRegisters; ++k) {
      value[k] = V::bit_xor(value[k], block[k]);
      taken[k] = control_bit(block[k], bit[k]);
    }
  }

  // value ^ bit (u mod 128) of the leaf, packed.
  void finish() {
    uint64_t leaves[kGates][2], values[kGates][2];
    for (int k = 0; k < kRegisters; ++k) {
      V::store(leaves[k * V::kBlocks], block[k]);
      V::store(values[k * V::kBlocks], value[k]);
    }
    for (int k = 0; k < group.count; k += 8) {
      uint64_t byte = 0;
      for (int j = 0; j < 8 && k + j < group.count; ++j) {
        const uint64_t point = points[k + j], half = leaves[k + j][point >> 6 & 1];
        byte |= ((values[k + j][0] >> 2 ^ half >> (point & 63)) & 1) << j;
      }
      args.shares[(group.first + k) / 8] = static_cast<uint8_t>(byte);
    }
  }
};

// A block whose bit j is [j < alpha mod 128].
inline void below(uint64_t alpha, uint64_t* block) {
  const uint64_t upper = ~(alpha >> 6 & 1) + 1, part = (uint64_t{1} << (alpha & 63)) - 1;
  block[0] = part | upper;
  block[1] = part & upper;
}

// Both parties' walk along the alphas of a group's gates, which makes the correction words.
struct Generation {
  static constexpr int kRegisters = kGenerateRegisters;
  using Gates = Group<kRegisters>;
  using Args = DcfGenerateArgs;
  static constexpr int kGates = Gates::kGates;

  const Args& args;
  const Hash& hash;
  const Gates group;
  uint8_t* keys[kGates];
  uint64_t alphas[kGates];
  Block seed[2 * kRegisters];  // party 0's, then party 1's, for each register
  Block alpha[kRegisters], value[kRegisters];
  V::Mask taken[kRegisters];  // where party 0's control bit is set, and party 1's is not

  Generation(const Args& args_, const Hash& hash_, int64_t number)
      : args(args_), hash(hash_), group(number, args.gates) {
    const uint8_t* roots[2][kGates];
    group.rows(args.keys, dcf_key_bytes(args.bits), keys);
    group.words(args.alphas, alphas);
    for (int party = 0; party < 2; ++party) group.rows(args.roots[party], kBlockBytes, roots[party]);
    for (int k = 0; k < kRegisters; ++k) {
      for (int party = 0; party < 2; ++party) {
        seed[2 * k + party] = seed_of(V::load(roots[party] + k * V::kBlocks, 0));
      }
      alpha[k] = V::doubled(alphas + k * V::kBlocks);
      value[k] = V::constant(0, 0);
      taken[k] = V::mask(false);
    }
  }

  void run() {
    const int64_t levels = args.bits - kLeafLevels;
    for (int64_t level = 0; level < levels; ++level) descend(level);
    end(levels);
  }

  void descend(int64_t level) {
    Block children[4 * kRegisters], hashed[4 * kRegisters];  // left and right, of each seed
    for (int i = 0; i < 2 * kRegisters; ++i) {
      children[2 * i] = seed[i];
      children[2 * i + 1] = V::bit_or(seed[i], V::constant(0, 1));
    }
    hash(children, hashed);
    for (int k = 0; k < kRegisters; ++k) {
      const Block *first = hashed + 4 * k, *second = first + 2;
      const Block bit = bit_at(alpha[k], args.bits - 1 - level), right = V::minus(V::constant(0, 0), bit);
      const Block correction =
          correction_word(V::bit_xor(first[0], second[0]), V::bit_xor(first[1], second[1]), right, value[k]);
      V::store(keys + k * V::kBlocks, level * kBlockBytes, correction);
      const Block next_0 = V::xor_where(choose(right, first[1], first[0]), taken[k], correction);
      const Block next_1 = V::xor_where_not(choose(right, second[1], second[0]), taken[k], correction);
      value[k] = V::bit_xor(value[k], V::bit_xor(next_0, next_1));
      taken[k] = control_bit(next_0, bit);
      seed[2 * k] = seed_of(next_0);
      seed[2 * k + 1] = seed_of(next_1);
    }
  }

  // From the xor of both parties' left and right children; `right` is all ones where alpha goes right.
  static Block correction_word(Block left_child, Block right_child, Block right, Block value) {
    const Block bit_0 = V::constant(0, 1), bit_1 = V::constant(0, 2), bit_2 = V::constant(0, 4);
    Block word = V::bit_and(choose(right, left_child, right_child), V::constant(kAll, ~uint64_t{3}));
    word = V::bit_xor(word, V::bit_xor(V::bit_and(left_child, bit_0), V::bit_and(right_child, bit_1)));
    word = V::bit_xor(word, V::bit_xor(V::bit_and(value, bit_2), bit_0));
    return V::bit_xor(word, V::bit_and(right, V::constant(0, 7)));
  }

  // The leaf's word.
  void end(int64_t word) {
    uint64_t steps[kGates][2];
    Block ends[2 * kRegisters], leaves[2 * kRegisters];
    for (int k = 0; k < kGates; ++k) below(alphas[k], steps[k]);
    for (int i = 0; i < 2 * kRegisters; ++i) ends[i] = for_leaf(seed[i]);
    hash(ends, leaves);
    for (int k = 0; k < kRegisters; ++k) {
      const Block value_bit = bit_at(V::low_twice(value[k]), 2);
      const Block above = V::bit_xor(V::minus(V::constant(0, 0), value_bit), V::load(steps[k * V::kBlocks]));
      const Block correction = V::bit_xor(V::bit_xor(leaves[2 * k], leaves[2 * k + 1]), above);
      V::store(keys + k * V::kBlocks, word * kBlockBytes, correction);
    }
  }
};

template <class Walk>
void in_groups(const typename Walk::Args& args, ParallelFor parallel_for) {
  struct Context {
    const typename Walk::Args& args;
    const Hash hash;
  };
  const Context context{args, Hash(args.public_key)};
  const RangeBody body = [](int64_t first, int64_t last, void* given) {
    const auto& at = *static_cast<const Context*>(given);
    for (int64_t number = first; number < last; ++number) Walk(at.args, at.hash, number).run();
  };
  void* given = const_cast<void*>(static_cast<const void*>(&context));
  parallel_for(0, (args.gates + Walk::kGates - 1) / Walk::kGates, kGrain / Walk::kGates, body, given);
}

}  // namespace

namespace DEEPSHARE_AES {
extern const DcfKernels dcf;
const DcfKernels dcf = {DEEPSHARE_TEXT(DEEPSHARE_AES), in_groups<Evaluation>, in_groups<Generation>};
}  // namespace DEEPSHARE_AES
}  // namespace deepshare::cpu
