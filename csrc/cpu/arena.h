// A thread's block of memory, cut into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heteroakd::cpu::HAKD_ISA {

// Cuts a block of memory into arrays; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    // apart by a line, which is as long as a vector of pixels
    used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace heteroakd::cpu::HAKD_ISA
