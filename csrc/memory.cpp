#include "memory.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "cpu/backend.h"

namespace fi {

namespace {

constexpr int64_t kRange = 16 * kChunk;  // elements that a thread takes at a time

const void* at(uintptr_t address, int64_t elements, DType dtype) {
  return reinterpret_cast<const char*>(address) + elements * size_of(dtype);
}

// Calls work(r, ...) for every range r of 0..ranges-1, on so many threads at most: on fewer where the system allows no
// more. make() makes what one thread calls. Throws the last exception of any of them.
template <class Make>
void for_ranges(int64_t ranges, int threads, const Make& make) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      const FloatEnvironment floats;
      auto run = make();
      for (int64_t r; (r = next++) < ranges;) run(r);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  const int64_t helpers = std::min<int64_t>(threads, ranges) - 1;
  std::vector<std::thread> others;
  others.reserve(size_t(std::max<int64_t>(0, helpers)));
  try {
    for (int64_t t = 0; t < helpers; ++t) others.emplace_back(work);
  } catch (const std::exception&) {
    // The system allows no more threads, or no memory for them: those that run share the work.
  }
  work();
  for (std::thread& t : others) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace

std::vector<RowStats> combine_in_memory(const Backend& backend, const std::vector<uintptr_t>& inputs,
                                        const std::vector<uintptr_t>& outputs, const CombineArgs& args, int threads) {
  const int64_t first = args.first, end = first + args.numel, start = first / kRange;
  const int64_t ranges = args.numel ? (end - 1) / kRange - start + 1 : 0;
  const size_t k = outputs.size();
  std::vector<RowStats> partial(size_t(ranges) * k, RowStats{});
  for_ranges(ranges, threads, [&] {
    return [&, x = std::vector<const void*>(inputs.size()), out = std::vector<void*>(k)](int64_t r) mutable {
      const int64_t lo = std::max(first, (start + r) * kRange), hi = std::min(end, (start + r + 1) * kRange);
      for (size_t i = 0; i < x.size(); ++i) x[i] = at(inputs[i], lo - first, args.in[i]);
      for (size_t i = 0; i < k; ++i) out[i] = const_cast<void*>(at(outputs[i], lo - first, args.out_dtype));
      CombineArgs part = args;
      part.x = x.data();
      part.out = out.data();
      part.first = lo;
      part.numel = hi - lo;
      part.stats = &partial[size_t(r) * k];
      backend.combine(part);
    };
  });
  std::vector<RowStats> stats(k, RowStats{});
  for (size_t i = 0; i < partial.size(); ++i) add(partial[i], &stats[i % k]);
  return stats;
}

void sum_in_memory(const Backend& backend, const std::vector<MemorySum>& sums, const Row& row, int threads) {
  // Of each thread's share: the sums follow each other as if they were one, cut where a sum ends too.
  int64_t numel = 0, bytes = 0;
  for (const MemorySum& sum : sums) {
    numel += sum.numel;
    bytes += sum.numel * size_of(sum.out_dtype);
    for (const DType dtype : sum.in) bytes += sum.numel * size_of(dtype);
  }
  std::vector<size_t> begins;  // of each range, the sum that it begins in
  std::vector<int64_t> ends;   // of each sum, among all elements
  int64_t end = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    ends.push_back(end += sums[i].numel);
    while (int64_t(begins.size()) * kRange < end) begins.push_back(i);
  }
  const bool streamed = worth_streaming(bytes);
  for_ranges(int64_t(begins.size()), threads, [&] {
    return [&, x = std::vector<const void*>()](int64_t r) mutable {
      int64_t from = r * kRange;
      const int64_t to = std::min(numel, from + kRange);
      for (size_t i = begins[size_t(r)]; from < to; ++i) {
        const MemorySum& sum = sums[i];
        const int64_t lo = from - (ends[i] - sum.numel), hi = std::min(to, ends[i]) - (ends[i] - sum.numel);
        if (hi <= lo) continue;
        x.resize(sum.inputs.size());
        for (size_t k = 0; k < x.size(); ++k) x[k] = at(sum.inputs[k], lo, sum.in[k]);
        void* out = const_cast<void*>(at(sum.out, lo, sum.out_dtype));
        RowStats stats{};
        CombineArgs args{};
        args.x = x.data();
        args.in = sum.in.data();
        args.rows = &row;
        args.out = &out;
        args.n = int(x.size());
        args.k = 1;
        args.out_dtype = sum.out_dtype;
        args.fp8_saturate = true;
        args.streamed = streamed;
        args.numel = hi - lo;
        args.first = lo;
        args.stats = &stats;
        backend.combine(args);
        from += hi - lo;
      }
    };
  });
}

}  // namespace fi
