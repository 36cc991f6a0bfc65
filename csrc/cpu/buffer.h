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

}  // namespace lossmeta::LOSSMETA_ISA
