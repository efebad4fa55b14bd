// The input of a convolution, copied so that every tap of the kernel reads neighbours for neighbouring
// outputs: padded, and taken apart by stride. Output i reads input i * s + u * d - p at tap u: of the residue
// class (u * d) % s the element i + (u * d) / s. A channel's plane is [class h][class w][row][column], of the
// classes that are read at all.
#pragma once

#include "../../kernels/cuda/ring_conv.h"
#include "plan.h"

namespace deepshare::cpu {
namespace {

using cuda::RingAxis;
using cuda::RingConvArgs;
using Word = uint64_t;

// The residue classes of one direction.
struct Classes {
  const RingAxis& axis;
  Buffer<int64_t> of_tap;   // which class a tap reads: an index into `residue`
  Buffer<int64_t> residue;  // [count]
  int64_t count = 0;
  int64_t length = 0;  // of a class

  explicit Classes(const RingAxis& of) : axis(of), of_tap(of.kernel), residue(of.kernel) {
    for (int64_t tap = 0; tap < axis.kernel; ++tap) {
      const int64_t wanted = tap * axis.dilation % axis.stride;
      int64_t found = 0;
      while (found < count && residue[found] != wanted) ++found;
      if (found == count) residue[count++] = wanted;
      of_tap[tap] = found;
      length = larger(length, axis.outputs + shift(tap));
    }
  }

  int64_t shift(int64_t tap) const { return tap * axis.dilation / axis.stride; }
  // Where element `at` of a class lies in x; outside of it there are zeros.
  int64_t source(int64_t of_class, int64_t at) const {
    return at * axis.stride + residue[of_class] - axis.padding;
  }
  // The elements [first, last) of a class that lie in x.
  int64_t first_inside(int64_t of_class) const {
    const int64_t behind = axis.padding - residue[of_class];
    return behind <= 0 ? 0 : smaller(length, divide_up(behind, axis.stride));
  }
  int64_t last_inside(int64_t of_class) const {
    const int64_t left = axis.size + axis.padding - residue[of_class];
    return left <= 0 ? 0 : smaller(length, divide_up(left, axis.stride));
  }
};

// What the kernel multiplies of a word: itself, or its two signed 32-bit digits, x = high * 2^32 + low.
struct AsWords {
  Word operator()(Word x) const { return x; }
};
struct AsDigits {
  Word operator()(Word x) const {
    constexpr Word kLow = 0xffffffffu;
    return ((x + (Word{1} << 31)) & ~kLow) | (x & kLow);
  }
};

struct Planes {
  const RingConvArgs& args;
  Classes rows, columns;
  int64_t plane;  // words from channel to channel

  explicit Planes(const RingConvArgs& of) : args(of), rows(of.height), columns(of.width) {
    // An odd number of cache lines: planes of a power of two would all fall into the same few sets of a
    // cache.
    constexpr int64_t kLine = 8;
    plane = (divide_up(rows.count * columns.count * rows.length * columns.length, kLine) | 1) * kLine;
  }

  int64_t pitch() const { return columns.length; }

  // From output (0, 0) of a channel to what tap (u, v) of it reads.
  int64_t tap(int64_t u, int64_t v) const {
    const int64_t of_class = rows.of_tap[u] * columns.count + columns.of_tap[v];
    return (of_class * rows.length + rows.shift(u)) * pitch() + columns.shift(v);
  }

  // The plane of one channel of one sample.
  template <class Form>
  void fill(const int64_t* x, Word* to, const Form& form) const {
    for (int64_t h = 0; h < rows.count; ++h) {
      for (int64_t w = 0; w < columns.count; ++w) {
        const int64_t first = rows.first_inside(h), last = rows.last_inside(h);
        for (int64_t row = 0; row < rows.length; ++row, to += pitch()) {
          if (row < first || row >= last) {
            std::memset(to, 0, sizeof(Word) * pitch());
          } else {
            fill_row(x + rows.source(h, row) * args.x_strides[2], w, to, form);
          }
        }
      }
    }
  }

 private:
  template <class Form>
  void fill_row(const int64_t* x, int64_t of_class, Word* to, const Form& form) const {
    const int64_t first = columns.first_inside(of_class), last = larger(first, columns.last_inside(of_class));
    const int64_t step = args.x_strides[3] * args.width.stride;
    const int64_t* from = x + columns.source(of_class, first) * args.x_strides[3];
    std::memset(to, 0, sizeof(Word) * first);
    if (step == 1) {
      for (int64_t i = 0; i < last - first; ++i) to[first + i] = form(static_cast<Word>(from[i]));
    } else {
      for (int64_t i = 0; i < last - first; ++i) to[first + i] = form(static_cast<Word>(from[i * step]));
    }
    std::memset(to + last, 0, sizeof(Word) * (pitch() - last));
  }
};

}  // namespace
}  // namespace deepshare::cpu
