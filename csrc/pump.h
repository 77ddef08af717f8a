// The pump: cuts steps into blocks, and on several threads reads, combines and writes them. It knows bytes and places,
// not files' meaning: names, recipes and errors in words belong to its caller.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io.h"
#include "ops.h"

namespace fi {

struct Operand {
  int source;
  int64_t offset;  // bytes
  DType dtype;
};

// One tensor: what to read, what to make of it, where it goes.
struct Step {
  enum Kind {
    kCombine,
    kSame,     // bytes that must be equal in every input, copied from the first
    kMeasure,  // sums over the inputs, or over their deltas from the first; nothing is written
  };
  Kind kind = kCombine;
  std::vector<Operand> inputs;
  std::vector<Row> rows;                 // one per output; their terms live in `terms`
  std::vector<std::vector<Term>> terms;  // one list per row
  std::vector<int> sinks;                // one per output
  std::vector<int64_t> offsets;          // bytes, one per output
  DType out_dtype = DType::F32;
  int64_t numel = 0;           // elements; bytes for kSame
  std::vector<uint64_t> keys;  // one per output
  bool deltas = false;         // of kMeasure
};

// What a kMeasure step found: see MeasureArgs.
struct Measured {
  std::vector<double> sums;
  std::vector<int64_t> nonzero;
};

struct PumpOptions {
  int threads = 1;
  int64_t write_bytes = 128 << 10;  // of one output, per write
  int64_t read_bytes = 64 << 10;    // of one input, per read
  bool stochastic = false, fp8_saturate = true, prefetch = false;
  int stats_every = 32;
};

// Two inputs of a kSame step that differ.
struct Differs : std::runtime_error {
  Differs(int step_index, int input_index)
      : std::runtime_error("inputs differ"), step(step_index), input(input_index) {}
  int step, input;
};

class Pump {
 public:
  // Blocks are cut from runs of steps that follow each other in the same sinks. All sinks of a step must have the same
  // layout; only their starts may differ.
  Pump(const Backend& backend, std::vector<Source> sources, std::vector<Sink> sinks, std::vector<Step> steps,
       const PumpOptions& options);
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
  // Per step and row, folded in the order of the blocks, whatever the threads did.
  std::vector<std::vector<RowStats>> stats() const;
  // Per step; empty for those of another kind. Chunks fold pairwise in the order of the tensor.
  std::vector<Measured> measured() const;

 private:
  struct Piece {
    int step;
    int64_t first, count;
    size_t stats;  // index of its first row in stats_, or of its first sum in sums_ and count in nonzero_
    size_t nonzero;
  };
  struct Block {
    size_t begin, end;      // pieces
    int64_t offset, bytes;  // in the first sink
  };

  void cut();
  void cut_measure(int step);
  void work();
  void run_block(const Block& block, char* scratch);
  // Elements [done, done + count) of a piece, into `out`.
  void combine(const Piece& piece, int64_t done, int64_t count, char* in, const std::vector<void*>& out);
  void compare(const Piece& piece, int64_t done, int64_t count, char* in, const std::vector<void*>& out);
  void write(const Step& step, int64_t offset, int64_t size, const char* staged);
  void measure(const Piece& piece, char* scratch);
  void prefetch(size_t block) const;

  const Backend& backend_;
  const std::vector<Source> sources_;
  const std::vector<Sink> sinks_;
  std::vector<Step> steps_;
  const PumpOptions options_;
  std::vector<Piece> pieces_;
  std::vector<Block> blocks_;
  std::vector<RowStats> stats_;
  std::vector<double> sums_;
  std::vector<int64_t> nonzero_;
  int64_t scratch_bytes_ = 0, in_bytes_ = 0, out_stride_ = 0;

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
