// Scratch memory of a kernel. Not std::vector: its functions would be shared between instruction sets.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace lossmeta::LOSSMETA_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (size_t(size > 0 ? size : 1) * sizeof(T) + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// `size` elements for each worker of a loop, in whole pages: the prefetcher of one core leaves the others' alone.
template <class T>
class WorkerBuffer {
 public:
  WorkerBuffer(int64_t workers, int64_t size)
      : stride_((size * int64_t(sizeof(T)) + page - 1) / page * page / int64_t(sizeof(T))),
        data_(workers * stride_) {}
  T* operator[](int64_t worker) const { return data_.data() + worker * stride_; }

 private:
  static constexpr int64_t page = 4096;
  int64_t stride_;
  Buffer<T> data_;
};

}  // namespace lossmeta::LOSSMETA_ISA
