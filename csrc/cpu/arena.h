// Memory for the length of a call: cut from a piece that each thread keeps, because at CIFAR's sizes a
// handful of allocations takes as long as the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace deepshare::cpu {
namespace {

constexpr size_t kArenaBytes = size_t{1} << 20;
constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

struct Arena {
  char* base = static_cast<char*>(::operator new(kArenaBytes, std::align_val_t{kAlignment}));
  size_t used = 0;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { ::operator delete(base, std::align_val_t{kAlignment}); }

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
};

// Uninitialised, aligned memory that gives itself back; what does not fit the arena is allocated. Buffers end
// in the opposite order of their making and on the thread that made them, as scopes and members do.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t lines = (sizeof(T) * static_cast<size_t>(count) + kAlignment - 1) / kAlignment;
    bytes_ = (lines > 0 ? lines : 1) * kAlignment;
    Arena& arena = Arena::of_this_thread();
    in_arena_ = bytes_ <= kArenaBytes - arena.used;
    if (in_arena_) {
      data_ = reinterpret_cast<T*>(arena.base + arena.used);
      arena.used += bytes_;
    } else {
      data_ = static_cast<T*>(::operator new(bytes_, std::align_val_t{kAlignment}));
    }
  }
  ~Buffer() {
    if (in_arena_) {
      Arena::of_this_thread().used -= bytes_;
    } else {
      ::operator delete(data_, std::align_val_t{kAlignment});
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t bytes_;
  bool in_arena_;
};

}  // namespace
}  // namespace deepshare::cpu
