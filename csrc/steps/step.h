// Steps, the pump's units of work, each one tensor; and the interfaces of what a step does with the elements: a sum
// writes them, a survey only reads them.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "../decoding.h"
#include "../encoding.h"
#include "../io.h"
#include "../low_rank.h"
#include "../ops.h"

namespace fi {

// Locations of the rows of a gathered operand, in the order of the output.
struct RowMap {
  // Some whole rows that lie one behind the other in a source.
  struct Part {
    int source;
    int64_t offset;                      // bytes
    std::shared_ptr<Decoding> decoding;  // of codes, which begin at `offset`; null: the bytes are elements
  };
  struct Location {
    int part;        // -1: a row of zeros
    int64_t offset;  // bytes from the part's beginning; of codes, as if they were decoded
  };
  std::vector<Part> parts;
  std::vector<Location> rows;
  int64_t row_bytes;
};

// One input tensor of a step: where its bytes are, and how they become elements.
struct Operand {
  int source;
  int64_t offset;                                    // bytes
  DType dtype;                                       // of the elements that kernels read
  int width;                                         // bytes of such an element; 1 where a step only compares bytes
  std::shared_ptr<const RowMap> gathered = nullptr;  // instead of source and offset
  std::shared_ptr<Decoding> decoding = nullptr;      // of bytes that are not elements of `dtype`, which is F32 then
  std::shared_ptr<LowRank> low_rank = nullptr;       // instead of both: with products added; `dtype` is F32
};

class Counts;
class Survey;
class Sum;

// One tensor: what to read, what to make of it, where it goes.
struct Step {
  std::vector<Operand> inputs;
  std::shared_ptr<Survey> survey;  // of a step that writes nothing
  std::shared_ptr<const Sum> sum;  // of a step that writes sums; neither: bytes that must be equal in every input
  std::vector<int> sinks;          // one per output
  std::vector<int64_t> offsets;    // bytes, one per output
  DType out_dtype = DType::F32;
  std::shared_ptr<const Encoding> encoding = nullptr;  // of sums that are not stored as elements of out_dtype: of F32
  int64_t numel = 0;                                   // elements; bytes where they are only compared
  std::vector<uint64_t> keys;                          // one per output
};

// The inputs of one step, to be read by elements.
class Inputs {
 public:
  // scratch: of one thread, decoding_scratch(step) bytes.
  Inputs(const std::vector<Source>& sources, const Step& step, std::atomic<int64_t>* bytes_read, char* scratch)
      : sources_(sources), step_(step), bytes_read_(bytes_read), scratch_(scratch) {}

  // Elements [first, first + count) of an input: where they lie, if that is memory, else `to`, into which they are
  // read.
  const void* get(size_t input, int64_t first, int64_t count, void* to) const;
  // Reads the elements into `to` in any case.
  void read(size_t input, int64_t first, int64_t count, void* to) const;
  // Asks the kernel to have them ready soon.
  void prefetch(size_t input, int64_t first, int64_t count) const;

 private:
  const std::vector<Source>& sources_;
  const Step& step_;
  std::atomic<int64_t>* bytes_read_;
  char* scratch_;
};

// Bytes that one thread needs to decode an input of the step; 0, if none is to be decoded.
int64_t decoding_scratch(const Step& step);

// When nothing of a step is read any more: frees what its inputs hold.
void release_held(const Step& step);

// Computes outputs from inputs, a span of elements at a time.
class Sum {
 public:
  virtual ~Sum() = default;
  // Makes one span of elements: x, in, out, n, k and everything else but `rows` are filled in. From several threads at
  // once.
  virtual void run(const CombineArgs& args, char* scratch) const = 0;
  // Bytes of scratch for a span of `most` elements.
  virtual int64_t scratch_bytes(int64_t most) const {
    (void)most;
    return 0;
  }
  // Spans begin and end at multiples of so many elements. numel is a multiple, too.
  virtual int64_t grain() const { return 1; }
  // The input that an output is compared with, to tell how much of the change arrived; -1 of a copy.
  virtual int pivot(size_t output) const = 0;
  // Whether the only output is the only input, bit for bit, if their dtypes agree.
  virtual bool copies() const { return false; }
};

// The result of a survey: numbers, in an order that each survey defines.
struct Answer {
  std::vector<double> reals;
  std::vector<int64_t> counts;
  std::vector<std::shared_ptr<Counts>> histograms = {};
};

constexpr int64_t kRawBytes = kChunk * 8 + 4096;  // of one input, that a survey reads at a time

// Elements that a survey reads at a time, whole chunks: as many as fit kRawBytes, and a second-level cache with all
// inputs, since fewer and larger reads cost less.
int64_t read_span(const std::vector<DType>& dtypes);

// A read of the inputs that writes nothing. A thread takes a piece of the tensor at a time.
class Survey {
 public:
  virtual ~Survey() = default;
  // Elements of a piece: piece i begins at element i * piece(), and only the last one may be shorter.
  virtual int64_t piece() const = 0;
  virtual int64_t scratch_bytes() const = 0;  // of one thread
  // Whether every element is looked at, so that reading ahead of the work helps.
  virtual bool reads_all() const { return true; }
  // A thread calls begin, run for the pieces that it takes, and finish, always with the same scratch, which nothing
  // else uses meanwhile.
  virtual void begin(char*) const {}
  virtual void finish(char*) {}
  // Looks at the elements [first, first + count), one piece. From several threads at once, in any order, each piece
  // once.
  virtual void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) = 0;
  // When all threads have finished.
  virtual Answer answer() const = 0;
};

}  // namespace fi
