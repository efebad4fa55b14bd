// masked_relu and its gradients, one pass each: y = x * (1 where x >= 0, else 1 - mask), and
//   dx = g * (1 where x >= 0, else 1 - mask),  dmask = -sum over the batch where not x >= 0 of g * x
#pragma once

#include "operands.h"

namespace deepshare::cpu {
namespace {

// Columns walked down the batch at once: forward their part of the mask stays in the second-level cache
// (fewer columns in a small batch, for the threads), backward the part and the sums in the first, while each
// row still gives a page.
constexpr int64_t kMaskColumns = 65536;
constexpr int64_t kMaskFewColumns = 16384;
constexpr int64_t kMaskSumColumns = 1024;
// Rows added up in the accumulation type before their sum is added to the others in double.
constexpr int64_t kMaskRows = 256;
// Pieces of work there should be: some for each thread of a large machine, and the same on all for equal
// bits.
constexpr int64_t kMaskItems = 64;
// Shorter samples than this are taken several at a time.
constexpr int64_t kMaskWidth = 1024;

// The batch as rows of the mask. Where samples are short, `repeat` of them make one row under a mask that
// stands there as often; the last row may then be shorter.
struct MaskRows {
  int64_t elements, total, repeat, width, count;

  MaskRows(int64_t batch, int64_t elements_)
      : elements(elements_),
        total(batch * elements_),
        repeat(smaller(batch, divide_up(kMaskWidth, elements_))),
        width(repeat * elements_),
        count(divide_up(batch, repeat)) {}

  // How many of the `wanted` columns from `first` on this row has, or less than 1.
  int64_t length_at(int64_t row, int64_t first, int64_t wanted) const {
    return smaller(smaller(wanted, width - first), total - row * width - first);
  }
};

template <class A>
class RepeatedMask {
 public:
  RepeatedMask(const void* mask, const MaskRows& rows)
      : mask_(static_cast<const A*>(mask)), copy_(rows.repeat > 1 ? rows.width : 0) {
    if (rows.repeat == 1) return;
    for (int64_t i = 0; i < rows.width; ++i) copy_[i] = mask_[i % rows.elements];
    mask_ = copy_.get();
  }
  const A* get() const { return mask_; }

 private:
  const A* mask_;
  Buffer<A> copy_;
};

// 1 where the bit is 1, else 1 - mask.
template <class A, class Extent>
Lanes<A> mask_factor(uint32_t open, const A* mask, Extent extent) {
  const Lanes<A> one = Lanes<A>::all(1);
  return select(open, one, one - load(mask, extent));
}

template <class T>
struct MaskedForward {
  using A = Accum<T>;

  const T* x;
  T* y;
  MaskRows rows;
  RepeatedMask<A> mask;
  ParallelFor parallel_for;

  MaskedForward(const MaskedForwardArgs& args, ParallelFor parallel)
      : x(static_cast<const T*>(args.x)),
        y(static_cast<T*>(args.y)),
        rows(args.batch, args.elements),
        mask(args.mask, rows),
        parallel_for(parallel) {}

  void run() const { streams(y, rows.count, rows.width) ? run_as<true>() : run_as<false>(); }

  template <bool kStream>
  void run_as() const {
    const int64_t most = rows.count < kMaskItems ? kMaskFewColumns : kMaskColumns;
    const int64_t columns = smaller(rows.width, most), blocks = divide_up(rows.width, columns);
    for_ranges(parallel_for, blocks * rows.count, columns, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item % rows.count, first = item / rows.count * columns;
        const int64_t at = row * rows.width + first;
        const A* weights = mask.get() + first;
        each_group(rows.length_at(row, first, columns), [&](int64_t i, auto extent) {
          const Lanes<A> values = load(x + at + i, extent);
          const Lanes<A> factor = mask_factor(non_negative(values), weights + i, extent);
          put<kStream>(values * factor, y + at + i, extent);
        });
      }
      if constexpr (kStream) end_streams();
    });
  }
};

template <class T>
struct MaskedBackward {
  using A = Accum<T>;

  const T* grad;
  const T* x;
  T* dx;
  A* dmask;
  MaskRows rows;
  RepeatedMask<A> mask;
  ParallelFor parallel_for;
  int64_t columns, blocks;     // of columns
  int64_t chunk_rows, chunks;  // of the batch

  MaskedBackward(const MaskedBackwardArgs& args, ParallelFor parallel)
      : grad(static_cast<const T*>(args.grad)),
        x(static_cast<const T*>(args.x)),
        dx(static_cast<T*>(args.dx)),
        dmask(static_cast<A*>(args.dmask)),
        rows(args.batch, args.elements),
        mask(args.mask, rows),
        parallel_for(parallel),
        columns(smaller(rows.width, kMaskSumColumns)),
        blocks(divide_up(rows.width, columns)) {
    const int64_t for_items = divide_up(rows.count * blocks, kMaskItems),
                  for_grain = divide_up(kGrain, columns);
    chunk_rows = smaller(smaller(larger(for_items, for_grain), kMaskRows), rows.count);
    chunks = divide_up(rows.count, chunk_rows);
  }

  void run() const { streams(dx, rows.count, rows.width) ? run_as<true>() : run_as<false>(); }

  template <bool kStream>
  void run_as() const {
    const bool direct = chunks == 1 && rows.repeat == 1;
    const Buffer<A> partials(direct ? 0 : chunks * rows.width);
    A* const sums = direct ? dmask : partials.get();
    for_ranges(parallel_for, chunks * blocks, chunk_rows * columns, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item / blocks, first = item % blocks * columns;
        A* const into = sums + chunk * rows.width + first;
        for (int64_t i = 0; i < smaller(columns, rows.width - first); ++i) into[i] = 0;
        const int64_t last = smaller(rows.count, (chunk + 1) * chunk_rows);
        for (int64_t row = chunk * chunk_rows; row < last; ++row) add_row<kStream>(row, first, into);
      }
      if constexpr (kStream) end_streams();
    });
    if (!direct) reduce(sums);
  }

  template <bool kStream>
  void add_row(int64_t row, int64_t first, A* sums) const {
    const int64_t at = row * rows.width + first;
    const A* weights = mask.get() + first;
    each_group(rows.length_at(row, first, columns), [&](int64_t i, auto extent) {
      const Lanes<A> g = load(grad + at + i, extent), values = load(x + at + i, extent);
      const uint32_t open = non_negative(values);
      put<kStream>(g * mask_factor(open, weights + i, extent), dx + at + i, extent);
      store(load(sums + i, extent) - select(open, Lanes<A>::all(0), g * values), sums + i, extent);
    });
  }

  // The chunks' sums in their order, each of a row's repeats in turn, in double.
  void reduce(const A* sums) const {
    for_ranges(parallel_for, rows.elements, chunks * rows.repeat, [&](int64_t begin, int64_t end) {
      Buffer<double> wide(end - begin);
      for (int64_t i = begin; i < end; ++i) wide[i - begin] = 0;
      for (int64_t part = 0; part < chunks * rows.repeat; ++part) {
        const A* from = sums + part * rows.elements;
        for (int64_t i = begin; i < end; ++i) wide[i - begin] += from[i];
      }
      for (int64_t i = begin; i < end; ++i) dmask[i] = static_cast<A>(wide[i - begin]);
    });
  }
};

}  // namespace
}  // namespace deepshare::cpu
