// What soft kernels run along: a tile's rows, one for each channel, in the accumulation type. Where memory
// keeps a channel's positions together (NCHW) they are read and written in place, else (NHWC) through a
// transposed copy.
#pragma once

#include "operands.h"

namespace deepshare::cpu {
namespace {

// Elements of a transposed tile: the copies of all operands stay in the second-level cache.
constexpr int64_t kTransposed = 16384;

// So many values in one vector, and the square of so many that is transposed in registers.
template <class A>
constexpr int kSquare = Native<A>::kWidth < 8 ? Native<A>::kWidth : 8;

template <class A>
struct Square {
  typedef A Row __attribute__((vector_size(kSquare<A> * sizeof(A))));
  typedef decltype(Row{} < Row{}) Places;
  Row rows[kSquare<A>];

  // Rows r and r + kDistance, r without that bit, exchange the elements whose place has another such bit than
  // r.
  template <int kDistance>
  void exchange() {
    Places first, second;
    for (int i = 0; i < kSquare<A>; ++i) {
      const bool high = (i & kDistance) != 0;
      first[i] = high ? kSquare<A> + i - kDistance : i;
      second[i] = high ? kSquare<A> + i : i + kDistance;
    }
    for (int r = 0; r < kSquare<A>; ++r) {
      if ((r & kDistance) != 0) continue;
      const Row above = rows[r], below = rows[r + kDistance];
      rows[r] = __builtin_shuffle(above, below, first);
      rows[r + kDistance] = __builtin_shuffle(above, below, second);
    }
  }
};

template <class A>
void transpose_square(const A* in, int64_t in_stride, A* out, int64_t out_stride) {
  Square<A> square;
  for (int r = 0; r < kSquare<A>; ++r)
    std::memcpy(&square.rows[r], in + r * in_stride, sizeof square.rows[r]);
  square.template exchange<1>();
  if constexpr (kSquare<A> > 2) square.template exchange<2>();
  if constexpr (kSquare<A> > 4) square.template exchange<4>();
  for (int c = 0; c < kSquare<A>; ++c)
    std::memcpy(out + c * out_stride, &square.rows[c], sizeof square.rows[c]);
}

// out[c * out_stride + r] = in[r * in_stride + c] for r < rows, c < columns.
template <class A>
void transpose(const A* in, int64_t in_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride) {
  const int64_t whole_rows = rows / kSquare<A> * kSquare<A>,
                whole_columns = columns / kSquare<A> * kSquare<A>;
  for (int64_t r = 0; r < whole_rows; r += kSquare<A>) {
    for (int64_t c = 0; c < whole_columns; c += kSquare<A>)
      transpose_square(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      out[c * out_stride + r] = in[r * in_stride + c];
  }
}

// Tensors [outer, width, inner] whose rows are at least kShortRow long: a tile is at most kSoftPiece
// positions of one outer index.
template <class T>
struct StoredRows {
  using A = Accum<T>;

  static Spans spans(const Geometry& geometry, const Channels<A>&) { return Spans(geometry, kSoftPiece); }

  // One thread's view of a tensor it reads.
  class Input {
   public:
    Input(WideInput<T> from, int64_t width, int64_t, const Spans& spans)
        : from_(from), width_(width), inner_(spans.inner), buffer_(spans.piece) {}

    void move_to(int64_t outer, int64_t first, int64_t count) {
      at_ = outer * width_ * inner_ + first;
      count_ = count;
    }
    // Until the next call.
    const A* row(int64_t c) const { return from_.row(at_ + c * inner_, count_, buffer_.get()); }

   private:
    WideInput<T> from_;
    int64_t width_, inner_, at_ = 0, count_ = 0;
    Buffer<A> buffer_;
  };

  // The same of one it writes.
  class Output {
   public:
    Output(T* to, int64_t width, const Spans& spans)
        : to_(to), width_(width), inner_(spans.inner), buffer_(spans.piece) {}

    void move_to(int64_t outer, int64_t first, int64_t count) {
      at_ = outer * width_ * inner_ + first;
      count_ = count;
    }
    // Where to write row c; keep(c) is to follow before the next.
    A* row(int64_t c) const { return target(to_ + at_ + c * inner_, buffer_.get()); }
    void keep(int64_t c) const { store(row(c), count_, to_ + at_ + c * inner_); }
    void end() const {}

   private:
    T* to_;
    int64_t width_, inner_, at_ = 0, count_ = 0;
    Buffer<A> buffer_;
  };
};

// Tensors [positions, width]: a tile is so many positions that it holds about kTransposed elements.
template <class T>
struct TransposedRows {
  using A = Accum<T>;

  static Spans spans(const Geometry& geometry, const Channels<A>& channels) {
    Geometry flat = geometry;
    flat.outer = 1;
    flat.inner = geometry.outer;
    flat.channels = channels.count;
    const int64_t fit = kTransposed / channels.count / kLanes * kLanes;
    return Spans(flat, smaller(kSoftPiece, larger(kLanes, fit)));
  }

  // Rows lie this far apart: were it a power of two, they would fall on few lines of the first-level cache.
  static int64_t stride(const Spans& spans) { return whole_groups(spans.piece) + kLanes; }

  class Input {
   public:
    // `rows`: how many of the `width` are asked for.
    Input(WideInput<T> from, int64_t width, int64_t rows, const Spans& spans)
        : from_(from),
          width_(width),
          rows_(rows),
          stride_(stride(spans)),
          wide_(width * spans.piece),
          transposed_(rows * stride_) {}

    void move_to(int64_t, int64_t first, int64_t count) {
      const A* values = from_.row(first * width_, count * width_, wide_.get());
      transpose(values, width_, count, rows_, transposed_.get(), stride_);
    }
    const A* row(int64_t c) const { return transposed_.get() + c * stride_; }

   private:
    WideInput<T> from_;
    int64_t width_, rows_, stride_;
    Buffer<A> wide_, transposed_;
  };

  class Output {
   public:
    Output(T* to, int64_t width, const Spans& spans)
        : to_(to),
          width_(width),
          stride_(stride(spans)),
          wide_(width * spans.piece),
          transposed_(width * stride_) {}

    void move_to(int64_t, int64_t first, int64_t count) {
      first_ = first;
      count_ = count;
    }
    A* row(int64_t c) const { return transposed_.get() + c * stride_; }
    void keep(int64_t) const {}
    void end() const {
      T* const to = to_ + first_ * width_;
      A* const values = target(to, wide_.get());
      transpose(transposed_.get(), stride_, width_, count_, values, width_);
      store(values, count_ * width_, to);
    }

   private:
    T* to_;
    int64_t width_, stride_, first_ = 0, count_ = 0;
    Buffer<A> wide_, transposed_;
  };
};

}  // namespace
}  // namespace deepshare::cpu
