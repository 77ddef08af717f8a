// Reads a tensor to which low-rank products are added: those of adapters, W + sum of scale * left @ right.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "decoding.h"
#include "io.h"
#include "ops.h"

namespace fi {

// The tensor consists of `matrices` of rows x columns. What is added is done in order, each to the result of what is
// before it. Factors are read when the first element is, and held as float32 until `release`.
class LowRank {
 public:
  // The stored tensor: elements of `dtype`, or what `decoding` makes of them.
  struct Base {
    int source;
    int64_t offset;  // bytes
    DType dtype;
    std::shared_ptr<Decoding> decoding;
  };
  // A view of a stored tensor: element (matrix, i, k) lies at first + matrix * by_matrix + i * by_index + k * by_rank.
  struct Factor {
    int source;  // -1: all elements are 1
    int64_t offset;
    DType dtype;
    int64_t first, by_matrix, by_index, by_rank;
  };
  // scale * left @ right, i the row of left and the column of right. With a magnitude, each row (or column) is then
  // brought to that length.
  struct Product {
    Factor left, right;
    int64_t rank;
    float scale;
    bool has_magnitude, per_row;
    Factor magnitude;
  };
  // Rows that are replaced, by the rows of a stored tensor: (row, stored row), ascending.
  struct Rows {
    int source;
    int64_t offset;
    DType dtype;
    std::vector<std::pair<int64_t, int64_t>> places;
  };
  struct Change {
    Product product;
    Rows rows;  // if there are places: instead of a product
  };

  LowRank(const Backend& backend, Base base, int64_t matrices, int64_t rows, int64_t columns,
          std::vector<Change> changes);

  // Of one thread, for `read`.
  int64_t scratch_bytes() const;

  // Elements [first, first + count) of the tensor into `to`, float32 of any alignment. From several threads at once,
  // each with its own scratch.
  void read(const std::vector<Source>& sources, int64_t first, int64_t count, void* to, char* scratch,
            std::atomic<int64_t>* bytes_read) const;

  // Asks the kernel to have the stored elements ready soon.
  void prefetch(const std::vector<Source>& sources, int64_t first, int64_t count) const;

  // When nothing is read any more: frees the factors.
  void release() const;

 private:
  struct Held;
  using Bytes = std::atomic<int64_t>*;
  std::shared_ptr<const Held> held(const std::vector<Source>& sources, char* scratch, Bytes bytes_read) const;
  // As `read`, of one matrix, with all changes or the first `changes` of them, and no multiplication after the last.
  void make(const std::vector<Source>& sources, const Held& held, int64_t first, int64_t count, size_t changes,
            float* to, char* scratch, Bytes bytes_read) const;
  void replace_rows(const std::vector<Source>& sources, const Rows& rows, int64_t first, int64_t count, float* to,
                    Bytes bytes_read) const;
  void add_factors(const std::vector<Source>& sources, size_t change, Held* held, char* scratch,
                   Bytes bytes_read) const;

  const Backend& backend_;
  const Base base_;
  const int64_t matrices_, rows_, columns_;
  const std::vector<Change> changes_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Held> held_;
};

}  // namespace fi
