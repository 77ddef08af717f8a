// The pump: cuts steps into blocks, and on several threads reads, combines and writes them. It knows bytes and offsets,
// not what files mean: names, recipes and the text of errors belong to its caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io.h"
#include "mapped.h"
#include "ops.h"
#include "steps/step.h"

namespace fi {

struct PumpOptions {
  int threads = 1;
  int64_t write_bytes = 128 << 10;  // of one output, per write
  int64_t read_bytes = 64 << 10;    // of one input, per read
  bool stochastic = false, fp8_saturate = true, prefetch = false;
  int ahead = 8;  // blocks that are requested ahead of the work, with prefetch
  int stats_every = 32;
};

// Two inputs that should hold the same bytes.
struct Differs : std::runtime_error {
  Differs(int step_index, int input_index)
      : std::runtime_error("inputs differ"), step(step_index), input(input_index) {}
  int step, input;
};

class Pump {
 public:
  // Blocks are cut from runs of steps that follow each other in the same sinks. All sinks of a step must have the same
  // layout; only their starts may differ.
  Pump(std::vector<Source> sources, std::vector<Sink> sinks, std::vector<Step> steps, const PumpOptions& options);
  ~Pump();  // cancels and joins
  Pump(const Pump&) = delete;
  Pump& operator=(const Pump&) = delete;

  void start();
  // True when all threads have ended, by success, error or cancel. Waits at most `seconds`.
  bool wait(double seconds);
  void cancel() { cancelled_ = true; }
  void join();

  // The first error, to be rethrown; null if there was none.
  std::exception_ptr error() const { return error_; }
  int64_t bytes_read() const { return bytes_read_; }
  int64_t bytes_written() const { return bytes_written_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }  // of one thread
  const std::vector<Step>& steps() const { return steps_; }
  // Per step and output of a sum, folded in the order of the blocks, whatever the threads did.
  std::vector<std::vector<RowStats>> stats() const;

 private:
  struct Piece {
    int step;
    int64_t first, count;
    size_t stats;  // index of its first output in stats_
  };
  struct Block {
    size_t begin, end;      // pieces
    int64_t offset, bytes;  // in the first sink
  };

  void cut();
  void cut_survey(int step);
  void cut_encoded(int step);
  void work();
  // The survey of a block; null if it writes.
  Survey* survey_of(const Block& block) const;
  void run_block(const Block& block, char* scratch);
  // Elements that a step sums at a time: as many as `read_bytes` hold, but whole grains and stored blocks.
  int64_t span_of(const Step& step) const;
  // Pieces of steps that are encoded: their codes and scales. pump_encoded.cpp has all of it.
  struct EncodedPiece;
  static constexpr int64_t kKeptBytes = 1 << 20;
  int64_t kept_of(const Step& step) const;
  int64_t encoding_scratch(const Step& step) const;
  void run_encoded(const Block& block, char* scratch);
  std::vector<ScaleRun> scales_of(const EncodedPiece& piece, int64_t first, int64_t stop, std::vector<const void*>* x);
  void encode_span(const EncodedPiece& piece, int64_t first, int64_t count, int64_t done,
                   const std::vector<const void*>& x, const std::vector<ScaleRun>& scales,
                   const std::vector<void*>& out);
  bool is_sampled(int64_t first, int64_t count) const;
  void write_scales(const Encoding& encoding, size_t output, const ScaleRun& scales, int64_t from, int64_t count);
  // The sums of elements [first, first + count) of a step, into `out`. stats: of each output. Returns the inputs.
  std::vector<const void*> sum(const Inputs& inputs, const Step& step, int64_t first, int64_t count, char* scratch,
                               const std::vector<void*>& out, int stats_every, RowStats* stats);
  // Elements [done, done + count) of a piece, into `out`.
  void combine(const Piece& piece, int64_t done, int64_t count, char* scratch, const std::vector<void*>& out);
  void compare(const Piece& piece, int64_t done, int64_t count, char* scratch, const std::vector<void*>& out);
  bool in_memory(const Step& step) const;  // all its sinks
  void write(const Step& step, int64_t offset, int64_t size, const char* staged);
  void prefetch(size_t block) const;
  // The inputs of a step, for a thread with this scratch.
  Inputs inputs_of(const Step& step, char* scratch) { return inputs_of(step, scratch, &bytes_read_); }
  Inputs inputs_of(const Step& step, char* scratch, std::atomic<int64_t>* bytes_read) const;
  // A piece of the step is done. With the last one, what its decoders hold is freed.
  void finish_piece(int step);
  // After kernels have read: throws IoError, if a page of a mapped file failed. Zeros may be among the results then.
  void refuse_faults() const;

  const std::vector<Source> sources_;
  const std::vector<Sink> sinks_;
  const std::vector<Step> steps_;
  const PumpOptions options_;
  std::vector<Piece> pieces_;
  std::vector<Block> blocks_;
  std::vector<RowStats> stats_;
  bool streamed_ = false;  // outputs in memory are large
  int64_t scratch_bytes_ = 0, in_bytes_ = 0, in_total_ = 0, out_stride_ = 0, decode_bytes_ = 0;
  int64_t encode_at_ = 0;  // in the scratch: sums that are encoded, what they become, and for statistics
  std::vector<std::atomic<int64_t>> left_;  // pieces of each step that are not done

  std::optional<FaultGuard> guard_;  // while threads read mapped files
  int64_t faults_ = 0;               // that were survived before
  std::vector<std::thread> threads_;
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> bytes_read_{0}, bytes_written_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable ended_;
  int running_ = 0;
  std::exception_ptr error_;
};

}  // namespace fi
