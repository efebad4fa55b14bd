// ring_conv2d: an implicit matrix product, weight [O/G, K] by the patches of x [K, pixels of all samples], K
// the products of a sum. A block computes a tile of output channels and pixels from pieces of both in shared
// memory. Words are unsigned: they wrap around. Sums mod 2^64 are the same in every order, so that long ones
// may be cut among blocks which add atomically: the same bits on every run all the same.
#include "fast_div.h"
#include "launch.h"
#include "ring_conv.h"

namespace deepshare::cuda {
namespace {

using Word = unsigned long long;

constexpr int kSide = 16;     // threads of a block: kSide by kSide
constexpr int kFilters = 64;  // output channels of a tile, kFilters / kSide of them a thread's
constexpr int kDepth = 16;    // steps of the sums in shared memory at once
// Blocks that keep a big GPU busy (132 multiprocessors with a few each): sums are cut until there are as
// many.
constexpr int64_t kWantedBlocks = 512;
constexpr int64_t kLeastSteps = 128;  // of a cut sum
// With fewer output channels in a group, a thread computes one output by itself.
constexpr int64_t kFewFilters = 8;

struct Conv {
  RingConvArgs of;
  int64_t depth, filters, taps, steps;  // of a group; steps: products of a sum
  int64_t image, pixels;                // outputs of a channel, in one sample and in all
  int64_t filter_tiles, pixel_tiles, cuts, cut;
  FastDiv by_taps, by_kernel_width, by_image, by_width;

  explicit Conv(const RingConvArgs& args)
      : of(args),
        depth(args.channels / args.groups),
        filters(args.out_channels / args.groups),
        taps(args.height.kernel * args.width.kernel),
        steps(depth * taps),
        image(args.height.outputs * args.width.outputs),
        pixels(args.batch * image),
        filter_tiles(ceil_div(filters, kFilters)),
        pixel_tiles(1),
        cuts(1),
        cut(steps),
        by_taps(taps),
        by_kernel_width(args.width.kernel),
        by_image(image),
        by_width(args.width.outputs) {}

  int64_t blocks() const { return of.groups * filter_tiles * pixel_tiles * cuts; }
};

// Where the patch of an output pixel lies in x.
struct Patch {
  const int64_t* x;  // of its sample and group
  int64_t row, column;

  __device__ Patch(const Conv& a, int64_t pixel, int64_t group) {
    const int64_t n = a.by_image.quotient(pixel), at = pixel - n * a.image, i = a.by_width.quotient(at);
    x = a.of.x + n * a.of.x_strides[0] + group * a.depth * a.of.x_strides[1];
    row = i * a.of.height.stride - a.of.height.padding;
    column = (at - i * a.of.width.outputs) * a.of.width.stride - a.of.width.padding;
  }

  __device__ Word operator()(const Conv& a, int64_t step) const {
    const int64_t c = a.by_taps.quotient(step), tap = step - c * a.taps, u = a.by_kernel_width.quotient(tap);
    const int64_t i = row + u * a.of.height.dilation;
    const int64_t j = column + (tap - u * a.of.width.kernel) * a.of.width.dilation;
    if (i < 0 || i >= a.of.height.size || j < 0 || j >= a.of.width.size) return 0;
    return static_cast<Word>(
        __ldg(x + c * a.of.x_strides[1] + i * a.of.x_strides[2] + j * a.of.x_strides[3]));
  }
};

__device__ inline Word* output(const Conv& a, int64_t channel, int64_t pixel) {
  const int64_t n = a.by_image.quotient(pixel);
  return reinterpret_cast<Word*>(a.of.y) + (n * a.of.out_channels + channel) * a.image +
         (pixel - n * a.image);
}

// kPixels: of a tile, 64, or 16 where there are few.
template <int kPixels>
__global__ __launch_bounds__(kThreads, 2) void ring_tiles(const Conv a) {
  static_assert(kSide * kSide == kThreads && kPixels % kSide == 0);
  constexpr int kOwnFilters = kFilters / kSide, kOwnPixels = kPixels / kSide;
  constexpr int kFetched = kDepth * kPixels / kThreads;  // words of x that a thread brings
  __shared__ Word weights[kDepth][kFilters + 2];         // padded: neighbours in a column in different banks
  __shared__ Word patches[kDepth][kPixels];

  int64_t rest = blockIdx.x;
  const int64_t first_step = rest % a.cuts * a.cut;
  rest /= a.cuts;
  const int64_t first_pixel = rest % a.pixel_tiles * kPixels;
  rest /= a.pixel_tiles;
  const int64_t first_filter = rest % a.filter_tiles * kFilters, group = rest / a.filter_tiles;
  const int64_t end = min(first_step + a.cut, a.steps);

  const int thread = threadIdx.x;
  const int fetched_pixel = thread % kPixels, fetched_step = thread / kPixels * kFetched;
  const int64_t pixel = first_pixel + fetched_pixel;
  const bool has_pixel = pixel < a.pixels;
  const Patch patch(a, has_pixel ? pixel : 0, group);
  constexpr int kWeights = kDepth * kFilters / kThreads;
  const int fetched_filter = thread / (kDepth / kWeights),
            weight_step = thread % (kDepth / kWeights) * kWeights;
  const bool has_filter = first_filter + fetched_filter < a.filters;
  const int64_t* weight =
      a.of.weight + (group * a.filters + (has_filter ? first_filter + fetched_filter : 0)) * a.steps;

  Word sums[kOwnFilters][kOwnPixels] = {};
  const int own_filter = thread / kSide * kOwnFilters, own_pixel = thread % kSide;
  for (int64_t step = first_step; step < end; step += kDepth) {
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const int64_t at = step + weight_step + k;
      weights[weight_step + k][fetched_filter] =
          has_filter && at < end ? static_cast<Word>(__ldg(weight + at)) : 0;
    }
#pragma unroll
    for (int k = 0; k < kFetched; ++k) {
      const int64_t at = step + fetched_step + k;
      patches[fetched_step + k][fetched_pixel] = has_pixel && at < end ? patch(a, at) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Word w[kOwnFilters], x[kOwnPixels];
#pragma unroll
      for (int f = 0; f < kOwnFilters; ++f) w[f] = weights[k][own_filter + f];
#pragma unroll
      for (int p = 0; p < kOwnPixels; ++p) x[p] = patches[k][own_pixel + p * kSide];
#pragma unroll
      for (int f = 0; f < kOwnFilters; ++f) {
#pragma unroll
        for (int p = 0; p < kOwnPixels; ++p) sums[f][p] += w[f] * x[p];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int f = 0; f < kOwnFilters; ++f) {
#pragma unroll
    for (int p = 0; p < kOwnPixels; ++p) {
      const int64_t filter = first_filter + own_filter + f, at = first_pixel + own_pixel + p * kSide;
      if (filter >= a.filters || at >= a.pixels) continue;
      Word* y = output(a, group * a.filters + filter, at);
      if (a.cuts == 1) {
        *y = sums[f][p];
      } else {
        atomicAdd(y, sums[f][p]);
      }
    }
  }
}

// One thread an output: depthwise convolutions, and others of few channels a group.
__global__ __launch_bounds__(kThreads, kMinBlocks) void ring_outputs(const Conv a) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= a.pixels * a.of.out_channels) return;
  const int64_t image = a.by_image.quotient(item), at = item - image * a.image;
  const int64_t n = image / a.of.out_channels, channel = image - n * a.of.out_channels;
  const Patch patch(a, n * a.image + at, channel / a.filters);
  const int64_t* weight = a.of.weight + channel * a.steps;
  Word sum = 0;
  for (int64_t step = 0; step < a.steps; ++step)
    sum += static_cast<Word>(__ldg(weight + step)) * patch(a, step);
  a.of.y[item] = static_cast<int64_t>(sum);
}

template <int kPixels>
const char* launch_tiles(Conv a, cudaStream_t stream) {
  a.pixel_tiles = ceil_div(a.pixels, kPixels);
  const int64_t wanted = kWantedBlocks / a.blocks(), most = a.steps / kLeastSteps;
  a.cut = ceil_div(ceil_div(a.steps, std::max<int64_t>(1, std::min(wanted, most))), kDepth) * kDepth;
  a.cuts = ceil_div(a.steps, a.cut);
  if (a.cuts > 1) {
    const auto bytes = static_cast<size_t>(a.pixels * a.of.out_channels) * sizeof(Word);
    const cudaError_t status = cudaMemsetAsync(a.of.y, 0, bytes, stream);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  return run(ring_tiles<kPixels>, {a.blocks(), kThreads}, stream, a);
}

}  // namespace

const char* ring_conv2d(const RingConvArgs& args, void* stream) {
  const Conv a(args);
  auto* on = static_cast<cudaStream_t>(stream);
  if (a.pixels * args.out_channels == 0) return nullptr;
  if (a.filters < kFewFilters)
    return run(ring_outputs, {ceil_div(a.pixels * args.out_channels, kThreads), kThreads}, on, a);
  return a.pixels < 64 ? launch_tiles<16>(a, on) : launch_tiles<64>(a, on);
}

}  // namespace deepshare::cuda
