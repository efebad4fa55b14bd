// masked_relu: a thread keeps the mask of V neighbouring elements of a sample and walks samples.
#include "columns.h"
#include "masked_relu.h"
#include "sums.h"
#include "traits.cuh"

namespace deepshare::cuda {
namespace {

constexpr int64_t kWidth = 32;  // threads side by side: 512 bytes of a sample
constexpr int64_t kForwardBlocks = 2048;
constexpr int64_t kMostRows = 16;  // samples of a thread in the forward pass
constexpr int64_t kBackwardBlocks = 1024;
constexpr int64_t kMinRows = 32;  // samples of a chunk: its sums stay small beside its dx

template <class T>
struct Masked {
  const T* x;
  const T* grad;  // nullptr forward
  const Wide<T>* mask;
  T* out;         // y or dx
  Wide<T>* sums;  // [chunks, elements], or dmask
  int64_t batch;
  Columns shape;
};

// What a value below 0 is multiplied by; one at or above 0 stays itself.
template <class W, int V>
struct Below {
  int64_t first;  // element
  W factor[V];
};

template <class T, int V>
__device__ Below<Wide<T>, V> below_of(const Masked<T>& a, int64_t first) {
  Below<Wide<T>, V> below;
  below.first = first;
  const Pack<Wide<T>, V> mask = load<V>(a.mask + first);
#pragma unroll
  for (int k = 0; k < V; ++k) below.factor[k] = add(Wide<T>(1), -mask.lane[k]);
  return below;
}

template <class T>
__device__ int64_t first_element(const Masked<T>& a, int64_t chunk, int vector) {
  return ((blockIdx.x - chunk * a.shape.blocks) * a.shape.width + threadIdx.x) * vector;
}

template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void masked_forward(const Masked<T> a) {
  using W = Wide<T>;
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(a.shape.blocks);
  const int64_t first = first_element(a, chunk, V);
  if (first >= a.shape.columns) return;
  const auto below = below_of<T, V>(a, first);
  const int64_t last = min(a.batch, (chunk + 1) * a.shape.rows);
#pragma unroll 1
  for (int64_t row = chunk * a.shape.rows + threadIdx.y; row < last; row += blockDim.y * kUnroll) {
    Pack<T, V> xs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      xs[u] = load_if<V>(row + u * blockDim.y < last, a.x + (row + u * blockDim.y) * a.shape.columns + first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      W out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W x = widen(xs[u].lane[k]);
        out[k] = multiply(x, x >= W(0) ? W(1) : below.factor[k]);
      }
      store_if(row + u * blockDim.y < last, a.out + (row + u * blockDim.y) * a.shape.columns + first,
               narrow_all<T>(out));
    }
  }
}

// dx of a thread's samples, and its sums for dmask.
template <class T, int V>
__device__ void walk(const Masked<T>& a, const Below<Wide<T>, V>& below, int64_t first_row, int64_t last,
                     Wide<T> (&sums)[V]) {
  using W = Wide<T>;
#pragma unroll 1
  for (int64_t row = first_row; row < last; row += blockDim.y * kUnroll) {
    Pack<T, V> xs[kUnroll], grads[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool valid = row + u * blockDim.y < last;
      const int64_t at = (row + u * blockDim.y) * a.shape.columns + below.first;
      xs[u] = load_if<V>(valid, a.x + at);
      grads[u] = load_if<V>(valid, a.grad + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      W out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const W x = widen(xs[u].lane[k]);
        const W grad = widen(grads[u].lane[k]);
        const bool opens = x >= W(0);
        out[k] = multiply(grad, opens ? W(1) : below.factor[k]);
        sums[k] -= opens ? W(0) : grad * x;
      }
      store_if(row + u * blockDim.y < last, a.out + (row + u * blockDim.y) * a.shape.columns + below.first,
               narrow_all<T>(out));
    }
  }
}

// Block (chunk of samples, `width` vectors of elements).
template <class T, int V>
__global__ __launch_bounds__(kThreads, kMinBlocks) void masked_backward(const Masked<T> a) {
  using W = Wide<T>;
  __shared__ __align__(16) W shared[kThreads * V];  // [height][width * V]
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(a.shape.blocks);
  const int64_t first = first_element(a, chunk, V);
  W sums[V] = {};
  if (first < a.shape.columns) {
    const int64_t last = min(a.batch, (chunk + 1) * a.shape.rows);
    walk<T, V>(a, below_of<T, V>(a, first), chunk * a.shape.rows + threadIdx.y, last, sums);
  }
  const int width = a.shape.width * V;
#pragma unroll
  for (int k = 0; k < V; ++k) shared[threadIdx.y * width + threadIdx.x * V + k] = sums[k];
  __syncthreads();
  const int64_t block_first = first - threadIdx.x * V;
  for (int t = threadIdx.y * blockDim.x + threadIdx.x; t < width; t += blockDim.x * blockDim.y) {
    if (block_first + t >= a.shape.columns) return;
    W total = 0;
    for (int y = 0; y < blockDim.y; ++y) total += shared[y * width + t];
    a.sums[chunk * a.shape.columns + block_first + t] = total;
  }
}

Columns forward_shape(int64_t batch, int64_t elements, int64_t vector) {
  Columns shape = columns_of(elements, vector, 1, kWidth, kThreads);
  const int64_t tiles = ceil_div(batch, shape.height) * shape.blocks;
  shape.rows = shape.height * std::clamp<int64_t>(tiles / kForwardBlocks, 1, kMostRows);
  shape.chunks = ceil_div(batch, shape.rows);
  return shape;
}

Columns backward_shape(int64_t batch, int64_t elements, int64_t vector) {
  Columns shape = columns_of(elements, vector, 1, kWidth, kThreads);
  const int64_t chunks = std::clamp<int64_t>(kBackwardBlocks / shape.blocks, 1, ceil_div(batch, kMinRows));
  shape.rows = shape.height * ceil_div(ceil_div(batch, chunks), shape.height);
  shape.chunks = ceil_div(batch, shape.rows);
  return shape;
}

template <class T, int V>
const char* forward(const MaskedForwardArgs& a, cudaStream_t stream) {
  const Columns shape = forward_shape(a.batch, a.elements, V);
  const Masked<T> masked{static_cast<const T*>(a.x),
                         nullptr,
                         static_cast<const Wide<T>*>(a.mask),
                         static_cast<T*>(a.y),
                         nullptr,
                         a.batch,
                         shape};
  return run(masked_forward<T, V>, {shape.chunks * shape.blocks, dim3(shape.width, shape.height)}, stream,
             masked);
}

template <class T, int V>
const char* backward(const MaskedBackwardArgs& a, cudaStream_t stream) {
  const Columns shape = backward_shape(a.batch, a.elements, V);
  void* const sums = shape.chunks == 1 ? a.dmask : a.workspace;
  const Masked<T> masked{static_cast<const T*>(a.x),
                         static_cast<const T*>(a.grad),
                         static_cast<const Wide<T>*>(a.mask),
                         static_cast<T*>(a.dx),
                         static_cast<Wide<T>*>(sums),
                         a.batch,
                         shape};
  const Shape launch{shape.chunks * shape.blocks, dim3(shape.width, shape.height)};
  const char* error = run(masked_backward<T, V>, launch, stream, masked);
  if (error != nullptr || shape.chunks == 1) return error;
  return launch_sums(a.dtype, a.workspace, {a.dmask, nullptr}, 1, shape.chunks, a.elements, stream);
}

}  // namespace

size_t masked_workspace_bytes(Dtype dtype, int64_t batch, int64_t elements) {
  if (batch * elements == 0) return 0;
  const int64_t vector = elements % vector_elements(dtype) == 0 ? vector_elements(dtype) : 1;
  const int64_t chunks =  // a pointer off its alignment takes the other walk
      std::max(backward_shape(batch, elements, vector).chunks, backward_shape(batch, elements, 1).chunks);
  return chunks == 1 ? 0 : static_cast<size_t>(chunks * elements * wide_bytes(dtype));
}

const char* masked_relu_forward(const MaskedForwardArgs& args, void* stream) {
  if (args.batch * args.elements == 0) return nullptr;
  auto* on = static_cast<cudaStream_t>(stream);
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = args.elements % V == 0 && aligned_16(args.x, args.mask, args.y);
    return wide ? forward<T, V>(args, on) : forward<T, 1>(args, on);
  });
}

const char* masked_relu_backward(const MaskedBackwardArgs& args, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  if (args.batch * args.elements == 0) {
    if (args.elements == 0) return nullptr;
    const auto bytes = static_cast<size_t>(args.elements * wide_bytes(args.dtype));
    const cudaError_t status = cudaMemsetAsync(args.dmask, 0, bytes, on);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = Traits<T>::kVector;
    const bool wide = args.elements % V == 0 && aligned_16(args.grad, args.x, args.mask, args.dx);
    return wide ? backward<T, V>(args, on) : backward<T, 1>(args, on);
  });
}

}  // namespace deepshare::cuda
