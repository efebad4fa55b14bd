// masked_relu and its gradients, one pass each: y = x * (1 where x >= 0, else 1 - mask), and
//   dx = g * (1 where x >= 0, else 1 - mask),  dmask = -sum over the batch where not x >= 0 of g * x
#pragma once

#include "plan.h"

namespace deepshare::cpu {
namespace {

// Columns walked down the batch at once, so that their part of the mask stays in the second-level cache, and
// in the backward pass with the running sums in the first.
constexpr int64_t kMaskColumns = 2048;
constexpr int64_t kMaskSumColumns = 1024;
// Rows added up in the accumulation type before their sum is added to the others in double.
constexpr int64_t kMaskRows = 256;
// Pieces of work there should be: some for each thread of a large machine, fixed for equal bits on all.
constexpr int64_t kMaskItems = 64;

// The mask, not the factor, is what is chosen: 1 - 0 is exact, and the loop vectorises without a branch.
template <class A>
void mask_row(const A* x, const A* mask, int64_t count, A* __restrict__ y) {
  for (int64_t i = 0; i < count; ++i) {
    const A closed = x[i] >= A(0) ? A(0) : mask[i];
    y[i] = x[i] * (A(1) - closed);
  }
}

template <class A>
void mask_gradient_row(const A* g, const A* x, const A* mask, int64_t count, A* __restrict__ dx,
                       A* __restrict__ sums) {
  for (int64_t i = 0; i < count; ++i) {
    const A closed = x[i] >= A(0) ? A(0) : mask[i];
    const A product = g[i] * x[i];
    dx[i] = g[i] * (A(1) - closed);
    sums[i] -= x[i] >= A(0) ? A(0) : product;
  }
}

// The batch as rows of the mask. Where samples are short, `repeat` of them make one row under a mask that
// stands there as often; the last row may then be shorter.
struct MaskRows {
  int64_t elements, total, repeat, width, count;

  MaskRows(int64_t batch, int64_t elements_)
      : elements(elements_),
        total(batch * elements_),
        repeat(smaller(batch, divide_up(kPiece, elements_))),
        width(repeat * elements_),
        count(divide_up(batch, repeat)) {}

  // How many of the `wanted` columns from `first` on this row has.
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

  void run() const {
    const int64_t columns = smaller(rows.width, kMaskColumns), blocks = divide_up(rows.width, columns);
    for_ranges(parallel_for, blocks * rows.count, columns, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_x(kPiece), wide_y(kPiece);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item % rows.count, first = item / rows.count * columns;
        const int64_t last = first + rows.length_at(row, first, columns);
        for (int64_t i = first; i < last; i += kPiece) {
          const int64_t at = row * rows.width + i, count = smaller(kPiece, last - i);
          A* out = target(y + at, wide_y.get());
          mask_row(load(x + at, count, wide_x.get()), mask.get() + i, count, out);
          store(out, count, y + at);
        }
      }
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

  void run() const {
    const bool direct = chunks == 1 && rows.repeat == 1;
    const Buffer<A> partials(direct ? 0 : chunks * rows.width);
    A* const sums = direct ? dmask : partials.get();
    for_ranges(parallel_for, chunks * blocks, chunk_rows * columns, [&](int64_t begin, int64_t end) {
      Buffer<A> wide_g(kPiece), wide_x(kPiece), wide_dx(kPiece);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item / blocks, first = item % blocks * columns;
        A* const into = sums + chunk * rows.width;
        for (int64_t i = first; i < smaller(rows.width, first + columns); ++i) into[i] = 0;
        const int64_t last = smaller(rows.count, (chunk + 1) * chunk_rows);
        for (int64_t row = chunk * chunk_rows; row < last; ++row) {
          const int64_t end_column = first + rows.length_at(row, first, columns);
          for (int64_t i = first; i < end_column; i += kPiece) {
            const int64_t at = row * rows.width + i, count = smaller(kPiece, end_column - i);
            A* out = target(dx + at, wide_dx.get());
            mask_gradient_row(load(grad + at, count, wide_g.get()), load(x + at, count, wide_x.get()),
                              mask.get() + i, count, out, into + i);
            store(out, count, dx + at);
          }
        }
      }
    });
    if (!direct) reduce(sums);
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
