// Results written past the caches: for arrays that no cache holds, whose lines would else be read before they are
// written. Promises that every byte is in memory order once `finish` has run; refuses nothing, any address will do.
// Compiled once per instruction-set level, inside an anonymous namespace; no standard containers.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa/places.hpp"

namespace fastnorm {
namespace {

// One line of 64 bytes; `to` is a multiple of 64.
FASTNORM_INLINE void stream_line(char* to, const char* from) {
  for (int64_t at = 0; at < kLineBytes; at += kVectorBytes) {
    Vector<double, kVectorBytes> part;
    std::memcpy(&part, from + at, sizeof part);
    store_past(to + at, part);
  }
}

// A stretch of an array, written in order in pieces of `size` bytes: fill `piece()`, then `write`. Only whole lines are
// streamed; what is left of a piece waits in the buffer for the next one.
template <int64_t size>
class StreamOut {
  static_assert(size % kLineBytes == 0, "a piece is a whole number of lines");

 public:
  explicit StreamOut(char* to)
      : head_(static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes)),
        line_(to - head_),
        first_(head_ > 0) {}

  // Where the next piece goes; aligned as the array is.
  char* piece() { return buffer_ + head_; }

  void write() {
    int64_t at = 0;
    if (first_) {
      std::memcpy(line_ + head_, buffer_ + head_, static_cast<size_t>(kLineBytes - head_));
      first_ = false;
      at = kLineBytes;
    }
    for (; at < size; at += kLineBytes) stream_line(line_ + at, buffer_ + at);
    std::memcpy(buffer_, buffer_ + size, kLineBytes);
    line_ += size;
  }

  // The next byte of the array; nothing waits any more.
  char* finish() {
    if (!first_) std::memcpy(line_, buffer_, static_cast<size_t>(head_));
    finish_stores();
    return line_ + head_;
  }

 private:
  int64_t head_;  // bytes of the first line that are before the array
  char* line_;
  bool first_;
  alignas(64) char buffer_[size + kLineBytes];
};

// A copy past the caches of an array that is written in order, made as it grows: its lines are near then. `from` and
// `to` are at the same place in their lines.
class CopyOut {
 public:
  CopyOut(void* to, const void* from) : to_(static_cast<char*>(to)), from_(static_cast<const char*>(from)) {}

  // The lines that end before byte `end`.
  FASTNORM_INLINE void up_to(int64_t end) {
    if (done_ == 0) {
      const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to_) % kLineBytes);
      if (end < head) return;
      std::memcpy(to_, from_, static_cast<size_t>(head));
      done_ = head;
    }
    for (; done_ + kLineBytes <= end; done_ += kLineBytes) stream_line(to_ + done_, from_ + done_);
  }

  // The whole array of `size` bytes.
  void finish(int64_t size) {
    up_to(size);
    std::memcpy(to_ + done_, from_ + done_, static_cast<size_t>(size - done_));
    finish_stores();
  }

 private:
  char* to_;
  const char* from_;
  int64_t done_ = 0;
};

}  // namespace
}  // namespace fastnorm
