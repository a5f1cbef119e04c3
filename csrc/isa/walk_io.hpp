// Contiguous runs of values out of any memory layout: a pointer into the array where it is contiguous, a copy in a
// small buffer where it is not. This is all that strides, broadcast axes and unaligned data mean to the kernels.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "plan.hpp"

namespace fastnorm {
namespace {

template <class T>
inline bool contiguous(const Walk& walk, bool aligned, int64_t start, int64_t n) {
  if (!aligned) return false;
  if (n == 1 || walk.rank == 0) return true;
  const int inner = walk.rank - 1;
  return walk.stride[inner] == static_cast<int64_t>(sizeof(T)) &&
         (walk.rank == 1 || start % walk.size[inner] + n <= walk.size[inner]);
}

// The offsets of an index and of those after it, without a division for each.
class Offsets {
 public:
  Offsets(const Walk& walk, int64_t first) : walk_(walk), step_(walk.rank ? walk.stride[walk.rank - 1] : 0) {
    start(first);
  }
  int64_t next() {
    if (left_ == 0) start(index_);
    const int64_t offset = offset_;
    offset_ += step_;
    --left_;
    return offset;
  }

 private:
  void start(int64_t index) {
    const int64_t inner = walk_.inner_size();
    offset_ = walk_.offset(index);
    left_ = inner - index % inner;
    index_ = index + left_;
  }

  const Walk& walk_;
  int64_t step_, offset_ = 0, left_ = 0, index_ = 0;  // index_: the first of the next inner walk
};

// visit(i, offset of first + i) for i < count.
template <class Visit>
inline void for_offsets(const Walk& walk, int64_t first, int64_t count, const Visit& visit) {
  if (walk.rank == 1) {
    int64_t offset = walk.offset(first);
    for (int64_t i = 0; i < count; ++i, offset += walk.stride[0]) visit(i, offset);
  } else {
    Offsets offsets(walk, first);
    for (int64_t i = 0; i < count; ++i) visit(i, offsets.next());
  }
}

// visit(i, offset of first + i, n) for the stretches of `count` places that lie at equal distances, those of the
// innermost axis.
template <class Visit>
inline void for_stretches(const Walk& walk, int64_t first, int64_t count, const Visit& visit) {
  if (walk.rank <= 1) return visit(0, walk.offset(first), count);
  const int64_t inner = walk.inner_size();
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i, room = inner - (first + i) % inner, n = room < left ? room : left;
    visit(i, walk.offset(first + i), n);
    i += n;
  }
}

// Do the places follow each other?
inline bool contiguous(const Walk& places) { return places.rank == 0 || (places.rank == 1 && places.stride[0] == 1); }

// The numbers of `count` places, zeros where there are none.
inline void load_numbers(const Walk& places, int64_t first, int64_t count, const double* from, double* to) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(double);
  if (!from) {
    std::memset(to, 0, bytes);
  } else if (contiguous(places)) {
    std::memcpy(to, from + places.offset(first), bytes);
  } else {
    for_offsets(places, first, count, [&](int64_t i, int64_t offset) { to[i] = from[offset]; });
  }
}

// visit(pointer, byte stride, first, count) for the pieces of [start, start + n) that lie along the innermost axis.
template <class Visit>
inline void for_pieces(char* base, const Walk& walk, int64_t start, int64_t n, const Visit& visit) {
  if (walk.rank == 0) {
    visit(base, int64_t{0}, int64_t{0}, n);
    return;
  }
  const int inner = walk.rank - 1;
  // An odometer: dividing once for the first piece, counting for the others.
  int64_t index[kMaxRank];
  char* piece = base;
  for (int axis = inner; axis >= 0; --axis) {
    index[axis] = start % walk.size[axis];
    start /= walk.size[axis];
    piece += index[axis] * walk.stride[axis];
  }
  for (int64_t done = 0;;) {
    const int64_t room = walk.size[inner] - index[inner];
    const int64_t count = n - done < room ? n - done : room;
    visit(piece, walk.stride[inner], done, count);
    done += count;
    if (done >= n) return;
    piece -= index[inner] * walk.stride[inner];
    index[inner] = 0;
    for (int axis = inner - 1; axis >= 0; --axis) {
      piece += walk.stride[axis];
      if (++index[axis] < walk.size[axis]) break;
      piece -= walk.size[axis] * walk.stride[axis];
      index[axis] = 0;
    }
  }
}

template <class T>
inline void gather(const char* base, const Walk& walk, int64_t start, int64_t n, T* to) {
  for_pieces(const_cast<char*>(base), walk, start, n,
             [=](const char* from, int64_t stride, int64_t first, int64_t count) {
               if (stride == static_cast<int64_t>(sizeof(T))) {
                 std::memcpy(to + first, from, static_cast<size_t>(count) * sizeof(T));
               } else {
                 for (int64_t i = 0; i < count; ++i) std::memcpy(to + first + i, from + i * stride, sizeof(T));
               }
             });
}

template <class T>
inline void scatter(char* base, const Walk& walk, int64_t start, int64_t n, const T* from) {
  for_pieces(base, walk, start, n, [=](char* to, int64_t stride, int64_t first, int64_t count) {
    if (stride == static_cast<int64_t>(sizeof(T))) {
      std::memcpy(to, from + first, static_cast<size_t>(count) * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + first + i, sizeof(T));
    }
  });
}

// Reads and writes one operand of a set or segment, block by block.
template <class T>
class Port {
 public:
  Port(char* base, const Walk& walk, bool aligned) : base_(base), walk_(walk), aligned_(aligned) {}

  const T* read(int64_t start, int64_t n, T* buffer) const {
    if (contiguous<T>(walk_, aligned_, start, n)) return at(start);
    gather(base_, walk_, start, n, buffer);
    return buffer;
  }
  // Where to compute n results; `commit` brings them home.
  T* open(int64_t start, int64_t n, T* buffer) const {
    return contiguous<T>(walk_, aligned_, start, n) ? at(start) : buffer;
  }
  void commit(int64_t start, int64_t n, const T* buffer, const T* computed) const {
    if (computed == buffer) scatter(base_, walk_, start, n, buffer);
  }

 private:
  T* at(int64_t start) const { return reinterpret_cast<T*>(base_ + walk_.offset(start)); }

  char* base_;
  const Walk& walk_;
  bool aligned_;
};

// Zeroed workspace that may fail to be had: kernels report that instead of throwing. What a small call needs lies in
// the object (layer norm backward of (64, 256) spent 6 % of its time in malloc).
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count) {
    const size_t wanted = count > 0 ? static_cast<size_t>(count) : 0;
    if (wanted <= sizeof own_ / sizeof(T)) {
      std::memset(own_, 0, wanted * sizeof(T));
    } else {
      allocated_ = std::calloc(wanted, sizeof(T));
      data_ = static_cast<T*>(allocated_);
    }
  }
  ~Workspace() { std::free(allocated_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T& operator[](int64_t i) const { return data_[i]; }
  T* data() const { return data_; }

 private:
  static_assert(alignof(T) <= kLineBytes && std::is_trivially_destructible<T>::value, "plain numbers");
  alignas(kLineBytes) mutable unsigned char own_[8192];  // what a const workspace holds may change
  void* allocated_ = nullptr;
  T* data_ = reinterpret_cast<T*>(own_);
};

// The first whole line of cache from p on, where packs lie in as few lines as can be.
template <class T>
inline T* aligned(T* p) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + kLineBytes - 1) / kLineBytes * kLineBytes);
}

// The first place from p on that lies in its line as `other` does, for what is read along with it.
template <class T>
inline T* in_lines_of(T* p, const void* other) {
  return aligned(p) + reinterpret_cast<uintptr_t>(other) % kLineBytes / sizeof(T);
}

}  // namespace
}  // namespace fastnorm
