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

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int element_bytes(const Step& step) { return step.sum ? size_of(step.out_dtype) : 1; }

int64_t grain(const Step& step) { return step.sum ? step.sum->grain() : 1; }

int64_t grain_bytes(const Step& step) { return grain(step) * element_bytes(step); }

int widest(const Step& step) {
  int bytes = 1;
  for (const Operand& input : step.inputs) bytes = std::max(bytes, input.width);
  return bytes;
}

std::vector<Source> ended_by(std::vector<Source> sources, const std::atomic<bool>* cancelled) {
  for (Source& source : sources) source.end_with(cancelled);
  return sources;
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

Pump::Pump(std::vector<Source> sources, std::vector<Sink> sinks, std::vector<Step> steps, const PumpOptions& options)
    : sources_(ended_by(std::move(sources), &cancelled_)),
      sinks_(std::move(sinks)),
      steps_(std::move(steps)),
      options_(options),
      left_(steps_.size()) {
  size_t inputs = 1, outputs = 1;
  int64_t stored = 0;                                             // bytes, in memory
  int64_t read = options_.read_bytes, late = 0, sum_scratch = 0;  // late: how far beyond its edge a write may end
  int64_t encoding = 0;
  for (const Step& step : steps_) {
    decode_bytes_ = std::max(decode_bytes_, round_up(decoding_scratch(step), 4096));
    if (step.survey) {
      scratch_bytes_ = std::max(scratch_bytes_, round_up(step.survey->scratch_bytes(), 4096));
    } else {
      inputs = std::max(inputs, step.inputs.size());
      outputs = std::max(outputs, step.sinks.size());
    }
    if (step.sum) {
      const int64_t whole = grain(step), most = std::max(options_.read_bytes / widest(step), whole);
      sum_scratch = std::max(sum_scratch, step.sum->scratch_bytes(most));
      if (whole > 1) read = std::max(read, whole * widest(step));
      if (step.encoding) {
        encoding = std::max(encoding, encoding_scratch(step));
        late = std::max(late, step.encoding->codes(0, span_of(step)).second);
      } else {
        if (in_memory(step)) stored += step.numel * element_bytes(step) * int64_t(step.sinks.size());
        if (whole > 1) late = std::max(late, grain_bytes(step));
      }
    }
  }
  streamed_ = worth_streaming(stored);
  in_bytes_ = round_up(read + kSlack, 4096);
  in_total_ = in_bytes_ * int64_t(inputs);
  out_stride_ = round_up(options_.write_bytes + late + kSlack, 4096);
  encode_at_ = in_total_ + round_up(sum_scratch, 4096);
  scratch_bytes_ = std::max(scratch_bytes_, encode_at_ + round_up(encoding, 4096) + out_stride_ * int64_t(outputs));
  scratch_bytes_ += decode_bytes_;
  cut();
  for (const Piece& piece : pieces_) ++left_[size_t(piece.step)];
}

Pump::~Pump() {
  cancel();
  join();
}

// Blocks end at multiples of kBlockBytes in the output file, so that writes can be aligned; only where an element, or a
// row that must be whole, lies across such an edge does a block end later.
void Pump::cut() {
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    if (step.survey) {
      cut_survey(int(s));
      continue;
    }
    if (step.encoding) {
      cut_encoded(int(s));
      continue;
    }
    const int64_t size = element_bytes(step);
    int64_t first = 0;
    while (first < step.numel) {
      const int64_t at = step.offsets[0] + first * size;
      const bool joins = !blocks_.empty() && !steps_[size_t(pieces_.back().step)].sinks.empty() &&
                         !steps_[size_t(pieces_.back().step)].encoding &&
                         blocks_.back().offset + blocks_.back().bytes == at &&
                         steps_[size_t(pieces_.back().step)].sinks == step.sinks &&
                         at % kBlockBytes >= grain_bytes(steps_[size_t(pieces_.back().step)]);
      if (!joins) blocks_.push_back({pieces_.size(), pieces_.size(), at, 0});
      Block& block = blocks_.back();
      const int64_t edge = (at / kBlockBytes + 1) * kBlockBytes;
      const int64_t count = std::min(step.numel - first, round_up((edge - at + size - 1) / size, grain(step)));
      pieces_.push_back({int(s), first, count, stats_.size()});
      if (step.sum) stats_.resize(stats_.size() + step.sinks.size(), RowStats{});
      block.end = pieces_.size();
      block.bytes += count * size;
      first += count;
    }
  }
}

void Pump::cut_survey(int step) {
  const int64_t numel = steps_[size_t(step)].numel, most = steps_[size_t(step)].survey->piece();
  for (int64_t first = 0; first < numel; first += most) {
    blocks_.push_back({pieces_.size(), pieces_.size() + 1, 0, 0});
    pieces_.push_back({step, first, std::min(most, numel - first), 0});
  }
}

// Blocks are whole bands, and of one step: their codes and scales go to different places.
void Pump::cut_encoded(int step_index) {
  const Step& step = steps_[size_t(step_index)];
  for (int64_t first = 0; first < step.numel;) {
    const int64_t count = step.encoding->end_of_bands(first, kBlockBytes) - first;
    const auto [offset, bytes] = step.encoding->codes(first, count);
    blocks_.push_back({pieces_.size(), pieces_.size() + 1, step.offsets[0] + offset, bytes});
    pieces_.push_back({step_index, first, count, stats_.size()});
    stats_.resize(stats_.size() + step.sinks.size(), RowStats{});
    first += count;
  }
}

void Pump::start() {
  const int threads = std::max(1, options_.threads);
  if (std::any_of(sources_.begin(), sources_.end(), [](const Source& s) { return s.is_mapped(); })) guard_.emplace();
  faults_ = survived_faults();
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
  guard_.reset();
}

void Pump::work() {
  try {
    const FloatEnvironment floats;
    if (guard_) let_faults_through();
    Scratch scratch(scratch_bytes_);
    Survey* survey = nullptr;  // that this thread has begun
    for (;;) {
      const size_t block = next_++;
      const bool end = block >= blocks_.size() || cancelled_;
      Survey* const next = end ? nullptr : survey_of(blocks_[block]);
      if (next != survey) {
        if (survey) survey->finish(scratch.get());
        if (next) next->begin(scratch.get());
        survey = next;
      }
      if (end) break;
      if (options_.prefetch) prefetch(block);
      MappedReads::begin();
      run_block(blocks_[block], scratch.get());
      MappedReads::refuse_cut();
    }
  } catch (...) {
    std::exception_ptr error = std::current_exception();
    try {
      refuse_faults();  // the reason, where zeros led to it
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = error;
    cancelled_ = true;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--running_ == 0) ended_.notify_all();
}

Survey* Pump::survey_of(const Block& block) const { return steps_[size_t(pieces_[block.begin].step)].survey.get(); }

// A block is read, combined and written in spans that stay in the second-level cache. A write ends at a multiple of
// write_bytes in the file (or a few bytes later, with its last element), so the page cache gets aligned pages.
void Pump::run_block(const Block& block, char* scratch) {
  const Piece& whole = pieces_[block.begin];
  const Step& head = steps_[size_t(whole.step)];
  if (head.survey) {
    head.survey->run(inputs_of(head, scratch), whole.first, whole.count, scratch);
    refuse_faults();
    return finish_piece(whole.step);
  }
  if (head.encoding) {
    run_encoded(block, scratch);
    return finish_piece(whole.step);
  }
  char* const staged = scratch + scratch_bytes_ - decode_bytes_ - out_stride_ * int64_t(head.sinks.size());
  std::vector<void*> out(head.sinks.size());
  int64_t start = block.offset, at = start;  // what is staged, in the first sink
  for (size_t i = block.begin; i < block.end; ++i) {
    const Piece& piece = pieces_[i];
    const Step& step = steps_[size_t(piece.step)];
    const int64_t size = element_bytes(step), whole = grain(step), most = span_of(step);
    for (int64_t done = 0; done < piece.count && !cancelled_;) {
      const int64_t edge = (start / options_.write_bytes + 1) * options_.write_bytes;
      const int64_t count = std::min({piece.count - done, most, round_up((edge - at + size - 1) / size, whole)});
      for (size_t k = 0; k < out.size(); ++k) {
        out[k] = sinks_[size_t(head.sinks[k])].address(at + head.offsets[k] - head.offsets[0], count * size);
        if (!out[k]) out[k] = staged + out_stride_ * int64_t(k) + (at - start);
      }
      step.sum ? combine(piece, done, count, scratch, out) : compare(piece, done, count, scratch, out);
      done += count;
      at += count * size;
      if (at >= edge || (done == piece.count && i + 1 == block.end)) {
        write(head, start, at - start, staged);
        start = at;
      }
    }
    finish_piece(piece.step);
  }
}

int64_t Pump::span_of(const Step& step) const {
  const int64_t whole = std::max(grain(step), step.encoding ? step.encoding->stored_block() : 1);
  return std::max(options_.read_bytes / widest(step) / whole, int64_t(1)) * whole;
}

Inputs Pump::inputs_of(const Step& step, char* scratch, std::atomic<int64_t>* bytes_read) const {
  return Inputs(sources_, step, bytes_read, scratch + scratch_bytes_ - decode_bytes_);
}

void Pump::finish_piece(int step) {
  if (--left_[size_t(step)] > 0) return;
  release_held(steps_[size_t(step)]);
}

bool Pump::in_memory(const Step& step) const {
  return std::all_of(step.sinks.begin(), step.sinks.end(), [&](int s) { return sinks_[size_t(s)].in_memory(); });
}

void Pump::refuse_faults() const {
  if (survived_faults() != faults_) MappedReads::refuse_failed();
}

void Pump::write(const Step& step, int64_t offset, int64_t size, const char* staged) {
  refuse_faults();
  for (size_t k = 0; k < step.sinks.size(); ++k) {
    const Sink& sink = sinks_[size_t(step.sinks[k])];
    const int64_t at = offset + step.offsets[k] - step.offsets[0];
    if (!sink.address(at, size)) sink.write(at, size, staged + out_stride_ * int64_t(k));
  }
  bytes_written_ += size * int64_t(step.sinks.size());
}

void Pump::combine(const Piece& piece, int64_t done, int64_t count, char* scratch, const std::vector<void*>& out) {
  const Step& step = steps_[size_t(piece.step)];
  const int64_t first = piece.first + done;
  if (step.inputs.size() == 1 && step.sum->copies() && step.inputs[0].dtype == step.out_dtype)
    return inputs_of(step, scratch).read(0, first, count, out[0]);
  sum(inputs_of(step, scratch), step, first, count, scratch, out, options_.stats_every, &stats_[piece.stats]);
}

std::vector<const void*> Pump::sum(const Inputs& inputs, const Step& step, int64_t first, int64_t count, char* scratch,
                                   const std::vector<void*>& out, int stats_every, RowStats* stats) {
  const size_t n = step.inputs.size();
  std::vector<const void*> x(n);
  std::vector<DType> dtypes(n);
  for (size_t i = 0; i < n; ++i) {
    x[i] = inputs.get(i, first, count, scratch + in_bytes_ * int64_t(i));
    dtypes[i] = step.inputs[i].dtype;
  }
  CombineArgs args{};
  args.x = x.data();
  args.in = dtypes.data();
  args.out = out.data();
  args.keys = step.keys.data();
  args.n = int(n);
  args.k = int(out.size());
  args.out_dtype = step.out_dtype;
  args.stochastic = options_.stochastic;
  args.fp8_saturate = options_.fp8_saturate;
  args.streamed = streamed_ && in_memory(step) && !step.encoding;
  args.stats_every = stats_every;
  args.numel = count;
  args.first = first;
  args.stats = stats;
  step.sum->run(args, scratch + in_total_);
  return x;
}

void Pump::compare(const Piece& piece, int64_t done, int64_t count, char* scratch, const std::vector<void*>& out) {
  const Step& step = steps_[size_t(piece.step)];
  const Inputs inputs = inputs_of(step, scratch);
  const int64_t first = piece.first + done;
  inputs.read(0, first, count, out[0]);
  for (size_t i = 1; i < step.inputs.size(); ++i)
    if (memcmp(inputs.get(i, first, count, scratch), out[0], size_t(count)) != 0) throw Differs(piece.step, int(i));
  for (size_t k = 1; k < out.size(); ++k) memcpy(out[k], out[0], size_t(count));
}

void Pump::prefetch(size_t block) const {
  // The first block asks for the whole window, every later one for the block that enters it.
  const size_t ahead = size_t(options_.ahead), begin = block == 0 ? 1 : block + ahead;
  for (size_t b = begin; b < blocks_.size() && b <= block + ahead; ++b)
    for (size_t i = blocks_[b].begin; i < blocks_[b].end; ++i) {
      const Piece& piece = pieces_[i];
      const Step& step = steps_[size_t(piece.step)];
      if (step.survey && !step.survey->reads_all()) continue;
      const Inputs inputs(sources_, step, nullptr, nullptr);
      for (size_t input = 0; input < step.inputs.size(); ++input) inputs.prefetch(input, piece.first, piece.count);
    }
}

std::vector<std::vector<RowStats>> Pump::stats() const {
  std::vector<std::vector<RowStats>> all(steps_.size());
  for (size_t s = 0; s < steps_.size(); ++s)
    if (steps_[s].sum) all[s].resize(steps_[s].sinks.size(), RowStats{});
  for (const Piece& piece : pieces_)
    for (size_t k = 0; k < all[size_t(piece.step)].size(); ++k)
      add(stats_[piece.stats + k], &all[size_t(piece.step)][k]);
  return all;
}

}  // namespace fi
