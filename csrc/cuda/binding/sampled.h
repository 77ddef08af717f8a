// The statistics of pieces that write masked sums or sums by group.
#pragma once

#include "../tasks.h"
#include "pieces.h"

namespace fi {
namespace cuda {

OutputTask output_of(const ParsedPiece& piece, size_t k);

class SampledOutputs : public Pending {
 public:
  explicit SampledOutputs(const ParsedPiece& piece);

  // Makes room on the device, if statistics are wanted; then where those of output k go.
  void prepare(Queue* queue);
  OutputStats of(size_t k) const;
  // When all launches are in the queue.
  void fetch(Queue* queue);

  pybind11::list stats() const override;

 private:
  int64_t bytes_of_output() const;

  const size_t outputs_;
  OutputStats chunks_{};
  std::unique_ptr<Scratch> device_;
  std::shared_ptr<const char> fetched_;  // null: nothing was counted
};

}  // namespace cuda
}  // namespace fi
