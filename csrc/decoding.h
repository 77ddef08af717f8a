// Reads an encoded tensor and decodes it: what stands between its bytes and the kernels.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "io.h"
#include "transposed.h"

namespace fi {

// A decoder, with what it needs to know of one tensor. Small companions are read when the first element is, and held
// until `release`; of large ones each span reads what it needs. Matrices that are stored by columns are held while
// they are decoded.
class Decoding {
 public:
  struct Companion {
    int source;
    int64_t offset, bytes;
  };
  // numel, columns: of the tensor.
  // Throws std::invalid_argument, if companions or parameters are not those that the decoder takes.
  Decoding(const Decoder& decoder, int64_t numel, int64_t columns, std::vector<Companion> companions,
           std::vector<double> parameters);

  // (offset, bytes) of the whole blocks, or whole matrices stored by columns, in which elements [first, first + count)
  // lie, from the tensor's beginning.
  std::pair<int64_t, int64_t> stored(int64_t first, int64_t count) const;

  // Of one thread, for `read`.
  int64_t scratch_bytes() const;

  // Decodes elements [first, first + count) of the tensor that begins at `offset` of a source, into `to`, float32 of
  // any alignment. From several threads at once, each with its own scratch.
  void read(const std::vector<Source>& sources, int source, int64_t offset, int64_t first, int64_t count, void* to,
            char* scratch, std::atomic<int64_t>* bytes_read) const;

  // When nothing is read any more: frees what is held.
  void release() const;

 private:
  struct Held;
  void check() const;
  DecodeArgs args_of(int64_t first, int64_t count) const;
  bool is_held(int companion) const;
  std::shared_ptr<const Held> held(const std::vector<Source>& sources, std::atomic<int64_t>* bytes_read) const;
  void read_ranges(const std::vector<Source>& sources, DecodeArgs* args, std::vector<const void*>* at, char* scratch,
                   std::atomic<int64_t>* bytes_read) const;
  // Of a matrix that is stored by columns.
  int64_t matrix_elements() const { return int64_t(parameters_[0]) * columns_; }
  int64_t column_bytes() const;                   // of codes
  int64_t companion_column(int companion) const;  // bytes of a companion
  int64_t slab_columns() const;                   // that are transposed at a time
  void fill_slab(const std::vector<Source>& sources, int source, int64_t offset, int64_t matrix, int64_t slab, char* to,
                 char* scratch, std::atomic<int64_t>* bytes_read) const;
  void read_transposed(const std::vector<Source>& sources, int source, int64_t offset, int64_t first, int64_t count,
                       char* to, char* scratch, std::atomic<int64_t>* bytes_read) const;

  const Decoder decoder_;
  const int64_t numel_, columns_;
  const int64_t most_;  // elements that are decoded at a time, whole blocks
  const std::vector<Companion> companions_;
  const std::vector<double> parameters_;
  std::vector<int64_t> companion_bytes_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Held> held_;
  std::unique_ptr<TransposedMatrices> matrices_;  // null, if none is stored by columns
};

}  // namespace fi
