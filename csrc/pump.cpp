#include "pump.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <system_error>

#include "cpu/backend.h"

namespace fi {

namespace {

constexpr int64_t kSlack = 64;            // a block may end a few bytes late, at the end of an element
constexpr int64_t kBlockBytes = 2 << 20;  // of one output: what a thread takes at a time
constexpr size_t kPrefetchBlocks = 8;     // how far ahead of the work the kernel is asked to read
constexpr int64_t kMeasureChunks = 16;    // that a thread measures at a time

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int element_bytes(const Step& step) { return step.kind == Step::kSame ? 1 : size_of(step.out_dtype); }

int input_bytes(const Step& step, const Operand& input) { return step.kind == Step::kSame ? 1 : size_of(input.dtype); }

int widest(const Step& step) {
  int bytes = 1;
  for (const Operand& input : step.inputs) bytes = std::max(bytes, input_bytes(step, input));
  return bytes;
}

// One thread's scratch: mapped, so that it goes back to the system and is never mixed with the heap.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(size_t(bytes)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Scratch() { munmap(memory_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* get() { return static_cast<char*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace

Pump::Pump(const Backend& backend, std::vector<Source> sources, std::vector<Sink> sinks, std::vector<Step> steps,
           const PumpOptions& options)
    : backend_(backend),
      sources_(std::move(sources)),
      sinks_(std::move(sinks)),
      steps_(std::move(steps)),
      options_(options) {
  size_t inputs = 1, outputs = 1, measured = 0;
  for (Step& step : steps_) {
    for (size_t k = 0; k < step.rows.size(); ++k) {
      step.rows[k].terms = step.terms[k].data();
      step.rows[k].n_terms = int(step.terms[k].size());
    }
    inputs = std::max(inputs, step.inputs.size());
    outputs = std::max(outputs, step.sinks.size());
    if (step.kind == Step::kMeasure) measured = std::max(measured, step.inputs.size());
  }
  in_bytes_ = round_up(std::max<int64_t>(options_.read_bytes, measured ? kChunk * 8 : 0) + kSlack, 4096);
  out_stride_ = round_up(options_.write_bytes + kSlack, 4096);
  scratch_bytes_ = in_bytes_ * int64_t(inputs) + out_stride_ * int64_t(outputs);
  scratch_bytes_ = std::max(scratch_bytes_, int64_t(inputs) * in_bytes_ + int64_t(measured) * kChunk * 8);
  cut();
}

Pump::~Pump() {
  cancel();
  join();
}

// Blocks end at multiples of kBlockBytes in the output file, so that writes can be aligned; only where an element lies
// across such an edge does a block end a few bytes later.
void Pump::cut() {
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    if (step.kind == Step::kMeasure) {
      cut_measure(int(s));
      continue;
    }
    const int64_t size = element_bytes(step);
    int64_t first = 0;
    while (first < step.numel) {
      const int64_t at = step.offsets[0] + first * size;
      const bool joins = !blocks_.empty() && !steps_[size_t(pieces_.back().step)].sinks.empty() &&
                         blocks_.back().offset + blocks_.back().bytes == at &&
                         steps_[size_t(pieces_.back().step)].sinks == step.sinks &&
                         at % kBlockBytes >= element_bytes(steps_[size_t(pieces_.back().step)]);
      if (!joins) blocks_.push_back({pieces_.size(), pieces_.size(), at, 0});
      Block& block = blocks_.back();
      const int64_t edge = (at / kBlockBytes + 1) * kBlockBytes;
      const int64_t count = std::min(step.numel - first, (edge - at + size - 1) / size);
      pieces_.push_back({int(s), first, count, stats_.size(), 0});
      stats_.resize(stats_.size() + step.rows.size(), RowStats{});
      block.end = pieces_.size();
      block.bytes += count * size;
      first += count;
    }
  }
}

void Pump::cut_measure(int step) {
  const int64_t numel = steps_[size_t(step)].numel, most = kMeasureChunks * kChunk;
  const int n = int(steps_[size_t(step)].inputs.size());
  for (int64_t first = 0; first < numel; first += most) {
    const int64_t count = std::min(most, numel - first), chunks = (count + kChunk - 1) / kChunk;
    blocks_.push_back({pieces_.size(), pieces_.size() + 1, 0, 0});
    pieces_.push_back({step, first, count, sums_.size(), nonzero_.size()});
    sums_.resize(sums_.size() + size_t(chunks * measure_sums(n)));
    nonzero_.resize(nonzero_.size() + size_t(n));
  }
}

void Pump::start() {
  const int threads = std::max(1, options_.threads);
  running_ = threads;  // not the loop's bound: threads that end at once count it down while others are being started
  for (int i = 0; i < threads; ++i) {
    try {
      threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // The system allows no more threads: those that run share the work. None at all is an error.
      const std::lock_guard<std::mutex> lock(mutex_);
      running_ -= threads - i;
      if (i == 0) throw;
      if (running_ == 0) ended_.notify_all();
      return;
    }
  }
}

bool Pump::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return running_ == 0; });
}

void Pump::join() {
  for (std::thread& t : threads_) t.join();
  threads_.clear();
}

void Pump::work() {
  try {
    const FloatEnvironment floats;
    Scratch scratch(scratch_bytes_);
    for (;;) {
      const size_t block = next_++;
      if (block >= blocks_.size() || cancelled_) break;
      if (options_.prefetch) prefetch(block);
      run_block(blocks_[block], scratch.get());
    }
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    cancelled_ = true;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--running_ == 0) ended_.notify_all();
}

// A block is read, combined and written in spans that stay in the second-level cache. A write ends at a multiple of
// write_bytes in the file (or a few bytes later, with its last element), so the page cache gets aligned pages.
void Pump::run_block(const Block& block, char* scratch) {
  const Step& head = steps_[size_t(pieces_[block.begin].step)];
  if (head.kind == Step::kMeasure) return measure(pieces_[block.begin], scratch);
  char* const staged = scratch + scratch_bytes_ - out_stride_ * int64_t(head.sinks.size());
  std::vector<void*> out(head.sinks.size());
  int64_t start = block.offset, at = start;  // what is staged, in the first sink
  for (size_t i = block.begin; i < block.end; ++i) {
    const Piece& piece = pieces_[i];
    const Step& step = steps_[size_t(piece.step)];
    const int64_t size = element_bytes(step), most = options_.read_bytes / widest(step);
    for (int64_t done = 0; done < piece.count && !cancelled_;) {
      const int64_t edge = (start / options_.write_bytes + 1) * options_.write_bytes;
      const int64_t count = std::min({piece.count - done, most, (edge - at + size - 1) / size});
      for (size_t k = 0; k < out.size(); ++k) out[k] = staged + out_stride_ * int64_t(k) + (at - start);
      step.kind == Step::kSame ? compare(piece, done, count, scratch, out) : combine(piece, done, count, scratch, out);
      done += count;
      at += count * size;
      if (at >= edge || (done == piece.count && i + 1 == block.end)) {
        write(head, start, at - start, staged);
        start = at;
      }
    }
  }
}

void Pump::write(const Step& step, int64_t offset, int64_t size, const char* staged) {
  for (size_t k = 0; k < step.sinks.size(); ++k)
    sinks_[size_t(step.sinks[k])].put(offset + step.offsets[k] - step.offsets[0], size,
                                      staged + out_stride_ * int64_t(k));
  bytes_written_ += size * int64_t(step.sinks.size());
}

void Pump::combine(const Piece& piece, int64_t done, int64_t count, char* in, const std::vector<void*>& out) {
  const Step& step = steps_[size_t(piece.step)];
  const size_t n = step.inputs.size(), k = step.rows.size();
  const int64_t first = piece.first + done;
  const auto read = [&](size_t i, void* to) {
    const Operand& input = step.inputs[i];
    const int64_t width = size_of(input.dtype);
    sources_[size_t(input.source)].get(input.offset + first * width, count * width, to);
    bytes_read_ += count * width;
  };
  if (k == 1 && n == 1 && is_copy(step.rows[0]) && step.inputs[0].dtype == step.out_dtype) return read(0, out[0]);
  std::vector<const void*> x(n);
  std::vector<DType> dtypes(n);
  for (size_t i = 0; i < n; ++i) {
    char* const to = in + in_bytes_ * int64_t(i);
    read(i, to);
    x[i] = to;
    dtypes[i] = step.inputs[i].dtype;
  }
  CombineArgs args{};
  args.x = x.data();
  args.in = dtypes.data();
  args.rows = step.rows.data();
  args.out = out.data();
  args.keys = step.keys.data();
  args.n = int(n);
  args.k = int(k);
  args.out_dtype = step.out_dtype;
  args.stochastic = options_.stochastic;
  args.fp8_saturate = options_.fp8_saturate;
  args.stats_every = options_.stats_every;
  args.numel = count;
  args.first = first;
  args.stats = &stats_[piece.stats];
  backend_.combine(args);
}

void Pump::compare(const Piece& piece, int64_t done, int64_t count, char* in, const std::vector<void*>& out) {
  const Step& step = steps_[size_t(piece.step)];
  for (size_t i = 0; i < step.inputs.size(); ++i) {
    const Operand& input = step.inputs[i];
    void* const to = i == 0 ? out[0] : in;
    sources_[size_t(input.source)].get(input.offset + piece.first + done, count, to);
    bytes_read_ += count;
    if (i != 0 && memcmp(in, out[0], size_t(count)) != 0) throw Differs(piece.step, int(i));
  }
  for (size_t k = 1; k < out.size(); ++k) memcpy(out[k], out[0], size_t(count));
}

void Pump::measure(const Piece& piece, char* scratch) {
  const Step& step = steps_[size_t(piece.step)];
  const size_t n = step.inputs.size();
  std::vector<const void*> x(n);
  std::vector<DType> dtypes(n);
  MeasureArgs args{};
  for (size_t i = 0; i < n; ++i) {
    dtypes[i] = step.inputs[i].dtype;
    args.wide = args.wide || dtypes[i] == DType::F64;
  }
  args.x = x.data();
  args.in = dtypes.data();
  args.n = int(n);
  args.deltas = step.deltas;
  args.scratch = scratch + in_bytes_ * int64_t(n);
  args.nonzero = &nonzero_[piece.nonzero];
  for (int64_t chunk = 0; chunk * kChunk < piece.count; ++chunk) {
    const int64_t first = piece.first + chunk * kChunk;
    args.numel = std::min(kChunk, piece.count - chunk * kChunk);
    for (size_t i = 0; i < n; ++i) {
      const Operand& input = step.inputs[i];
      const int64_t width = size_of(input.dtype), size = args.numel * width;
      char* const to = scratch + in_bytes_ * int64_t(i);
      sources_[size_t(input.source)].get(input.offset + first * width, size, to);
      x[i] = to;
      bytes_read_ += size;
    }
    args.sums = &sums_[piece.stats + size_t(chunk * measure_sums(args.n))];
    backend_.measure(args);
  }
}

void Pump::prefetch(size_t block) const {
  // The first block asks for the whole window, every later one for the block that enters it.
  const size_t begin = block == 0 ? 1 : block + kPrefetchBlocks;
  for (size_t b = begin; b < blocks_.size() && b <= block + kPrefetchBlocks; ++b)
    for (size_t i = blocks_[b].begin; i < blocks_[b].end; ++i) {
      const Piece& piece = pieces_[i];
      const Step& step = steps_[size_t(piece.step)];
      for (const Operand& input : step.inputs) {
        const int64_t width = input_bytes(step, input);
        sources_[size_t(input.source)].prefetch(input.offset + piece.first * width, piece.count * width);
      }
    }
}

std::vector<std::vector<RowStats>> Pump::stats() const {
  std::vector<std::vector<RowStats>> all(steps_.size());
  for (size_t s = 0; s < steps_.size(); ++s) all[s].resize(steps_[s].rows.size(), RowStats{});
  for (const Piece& piece : pieces_)
    for (size_t k = 0; k < all[size_t(piece.step)].size(); ++k)
      add(stats_[piece.stats + k], &all[size_t(piece.step)][k]);
  return all;
}

std::vector<Measured> Pump::measured() const {
  std::vector<Measured> all(steps_.size());
  std::vector<std::vector<double>> chunks(steps_.size());  // per step: the sums of its chunks, one after the other
  for (const Piece& piece : pieces_) {
    const Step& step = steps_[size_t(piece.step)];
    if (step.kind != Step::kMeasure) continue;
    const size_t n = step.inputs.size();
    const size_t count = size_t((piece.count + kChunk - 1) / kChunk) * size_t(measure_sums(int(n)));
    std::vector<double>& to = chunks[size_t(piece.step)];
    to.insert(to.end(), sums_.begin() + int64_t(piece.stats), sums_.begin() + int64_t(piece.stats + count));
    all[size_t(piece.step)].nonzero.resize(n);
    for (size_t i = 0; i < n; ++i) all[size_t(piece.step)].nonzero[i] += nonzero_[piece.nonzero + i];
  }
  for (size_t s = 0; s < steps_.size(); ++s) {
    if (steps_[s].kind != Step::kMeasure) continue;
    const size_t width = size_t(measure_sums(int(steps_[s].inputs.size())));
    std::vector<double>& sums = chunks[s];
    sums.resize(std::max(sums.size(), width));  // a tensor without elements sums to 0
    all[s].nonzero.resize(steps_[s].inputs.size());
    for (size_t count = sums.size() / width; count > 1; count = (count + 1) / 2)
      for (size_t c = 0; c < (count + 1) / 2; ++c)
        for (size_t i = 0; i < width; ++i)
          sums[c * width + i] =
              2 * c + 1 < count ? sums[2 * c * width + i] + sums[(2 * c + 1) * width + i] : sums[2 * c * width + i];
    sums.resize(width);
    all[s].sums = std::move(sums);
  }
  return all;
}

}  // namespace fi
