#include "memory.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu/backend.h"

namespace fi {

namespace {

constexpr int64_t kRange = 16 * kChunk;  // elements that a thread takes at a time

const void* at(uintptr_t address, int64_t elements, DType dtype) {
  return reinterpret_cast<const char*>(address) + elements * size_of(dtype);
}

}  // namespace

std::vector<RowStats> combine_in_memory(const Backend& backend, const std::vector<uintptr_t>& inputs,
                                        const std::vector<uintptr_t>& outputs, const CombineArgs& args, int threads) {
  const int64_t first = args.first, end = first + args.numel, start = first / kRange;
  const int64_t ranges = args.numel ? (end - 1) / kRange - start + 1 : 0;
  const size_t k = outputs.size();
  std::vector<RowStats> partial(size_t(ranges) * k, RowStats{});
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;

  const auto work = [&] {
    try {
      const FloatEnvironment floats;
      std::vector<const void*> x(inputs.size());
      std::vector<void*> out(k);
      for (int64_t r; (r = next++) < ranges;) {
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
      }
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
  } catch (const std::system_error&) {
    // The system allows no more threads: those that run share the work.
  }
  work();
  for (std::thread& t : others) t.join();
  if (error) std::rethrow_exception(error);

  std::vector<RowStats> stats(k, RowStats{});
  for (size_t i = 0; i < partial.size(); ++i) add(partial[i], &stats[i % k]);
  return stats;
}

}  // namespace fi
