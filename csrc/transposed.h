// Matrices that are stored by columns, brought into the order of their rows and kept while threads decode them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace fi {

// The stored bytes of one matrix, in the order of its rows. Threads that need it at the same time fill it together, a
// slab of columns each.
class TransposedMatrix {
 public:
  TransposedMatrix(std::unique_ptr<char[]> bytes, int64_t slabs) : bytes_(std::move(bytes)), slabs_(slabs) {}

  // Returns when all slabs are filled. fill(slab, to) fills one. Throws what one of them threw.
  const char* filled(const std::function<void(int64_t, char*)>& fill);

 private:
  friend class TransposedMatrices;
  std::unique_ptr<char[]> bytes_;
  const int64_t slabs_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable ended_;
  std::exception_ptr error_;
  int64_t decoded_ = 0;  // elements
};

// The matrices of one tensor that are in use: those that threads decode, at most one more than there are threads. A
// matrix is let go when each of its elements was decoded once.
class TransposedMatrices {
 public:
  // elements, bytes: of one matrix. slabs: in which it is filled.
  TransposedMatrices(int64_t elements, int64_t bytes, int64_t slabs)
      : elements_(elements), bytes_(bytes), slabs_(slabs) {}

  // thread: something that is its own.
  std::shared_ptr<TransposedMatrix> get(int64_t index, const void* thread);
  // `count` elements of it have been decoded.
  void decoded(int64_t index, int64_t count);
  // Lets go of all.
  void release();

 private:
  struct Kept {
    int64_t index;
    std::shared_ptr<TransposedMatrix> matrix;
  };

  const int64_t elements_, bytes_, slabs_;
  std::mutex mutex_;
  std::vector<Kept> kept_;  // the one that was asked for last is the last
  std::vector<const void*> threads_;
  std::vector<std::unique_ptr<char[]>> spare_;  // memory that the system need not clear again
};

}  // namespace fi
