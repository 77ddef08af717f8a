// Distributes the rows of sums over kernels, and manages the memory of their statistics.

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "combine.h"
#include "combine_jobs.h"

namespace fi {
namespace cuda {

namespace {

bool is_copy(const SumRow& row) { return row.terms.empty() && row.total == 1.0; }

bool is_wide(const Sum& sum, const SumRow& row) {
  bool wide = sum.in[size_t(row.pivot)] == DType::F64;
  for (const Term& term : row.terms) wide = wide || sum.in[size_t(term.input)] == DType::F64;
  return wide;
}

bool is_aligned(const void* x) { return uintptr_t(x) % 16 == 0; }

// The index of an input in an order; -1 if it is not in it.
int index_in(const std::vector<int>& order, int input) {
  const auto at = std::find(order.begin(), order.end(), input);
  return at == order.end() ? -1 : int(at - order.begin());
}

// Whether a row's terms follow the order, its pivot first, and so can be added by one run through the inputs.
bool follows(const SumRow& row, const std::vector<int>& order) {
  int before = 0;
  for (const Term& term : row.terms) {
    const int index = index_in(order, term.input);
    if (index <= before) return false;
    before = index;
  }
  return true;
}

// Takes out of `rows` those that the fast kernel can do with the pivot of the first that it can do, and adds them to
// the job.
Job fast_of(Job job, std::vector<size_t>* rows) {
  const Sum& sum = *job.sum;
  const DType dtype = sum.out_dtype;
  if (sum.stochastic || (dtype != DType::F32 && dtype != DType::F16 && dtype != DType::BF16)) return job;
  const auto fits = [&](int i) { return sum.in[size_t(i)] == dtype && is_aligned(sum.x[size_t(i)]); };
  std::vector<size_t> others;
  for (const size_t r : *rows) {
    const SumRow& row = sum.rows[r];
    std::vector<int> order = job.inputs;
    if (order.empty()) order = {row.pivot};
    bool good = order[0] == row.pivot && fits(row.pivot) && is_aligned(row.out);
    for (const Term& term : row.terms) {
      good = good && fits(term.input);
      if (index_in(order, term.input) < 0) order.push_back(term.input);
    }
    good = good && order.size() <= kFastInputs && follows(row, order);
    if (good) job.inputs = order;
    (good ? job.rows : others).push_back(r);
  }
  *rows = others;
  return job;
}

// The sampled chunks of a sum, and the bytes of its statistics; 0 if it wants none.
struct Samples {
  int64_t first_chunk = 0, chunks = 0, bytes = 0;
};

Samples samples_of(const Sum& sum) {
  Samples s;
  if (sum.stats_every <= 0 || sum.numel == 0) return s;
  const int64_t every = sum.stats_every, first = sum.first / kChunk, last = (sum.first + sum.numel - 1) / kChunk;
  s.first_chunk = (first + every - 1) / every * every;
  s.chunks = s.first_chunk > last ? 0 : (last - s.first_chunk) / every + 1;
  s.bytes = int64_t(sum.rows.size()) * (kCounts * int64_t(sizeof(int64_t)) + s.chunks * int64_t(sizeof(Sample)));
  return s;
}

struct Jobs {
  std::map<std::pair<DType, size_t>, std::vector<Job>> fast;  // by dtype and number of inputs
  std::vector<Job> any[2], samples[2];                        // in float32, in float64
};

// Adds the rows of a sum. Copies go into the queue at once.
void add_sum(Queue* queue, const Job& empty, Jobs* jobs) {
  const Sum& sum = *empty.sum;
  std::vector<size_t> rows[2], sampled[2];
  for (size_t r = 0; r < sum.rows.size(); ++r) {
    const SumRow& row = sum.rows[r];
    const size_t pivot = size_t(row.pivot), wide = is_wide(sum, row);
    if (is_copy(row) && sum.in[pivot] == sum.out_dtype)
      queue->copy(row.out, sum.x[pivot], sum.numel * size_of(sum.out_dtype));
    else
      rows[wide].push_back(r);
    if (!is_copy(row)) sampled[wide].push_back(r);
  }
  for (Job fast = fast_of(empty, &rows[0]); !fast.rows.empty(); fast = fast_of(empty, &rows[0]))
    jobs->fast[{sum.out_dtype, fast.inputs.size()}].push_back(fast);
  for (const int wide : {0, 1}) {
    Job job = empty;
    job.rows = rows[wide];
    if (!job.rows.empty()) jobs->any[wide].push_back(job);
    job.rows = sampled[wide];
    if (!job.rows.empty() && job.chunks > 0) jobs->samples[wide].push_back(job);
  }
}

}  // namespace

std::vector<RowStats> SumStats::rows() const {
  std::vector<RowStats> all(rows_);
  if (!host_) return all;
  const auto* const counts = reinterpret_cast<const int64_t*>(host_.get() + offset_);
  const auto* const samples = reinterpret_cast<const Sample*>(counts + rows_ * kCounts);
  for (size_t r = 0; r < rows_; ++r) {
    const int64_t* const of_row = counts + r * kCounts;
    add({of_row[kNanIn], of_row[kInfIn], of_row[kNanOut], of_row[kInfOut], 0, 0, 0, 0, 0}, &all[r]);
    for (int64_t c = 0; c < chunks_; ++c) {
      const Sample& s = samples[size_t(c) * rows_ + r];
      add({0, 0, 0, 0, s.sampled, s.changed, s.sum_pp, s.sum_dd, s.sum_od}, &all[r]);
    }
  }
  return all;
}

std::vector<SumStats> combine(Queue* queue, const std::vector<Sum>& sums) {
  std::vector<SumStats> stats;
  int64_t bytes = 0;
  for (const Sum& sum : sums) {
    const Samples samples = samples_of(sum);
    stats.emplace_back(sum.rows.size(), samples.chunks, samples.bytes ? bytes : -1);
    bytes += samples.bytes;
  }
  std::optional<Scratch> memory;
  if (bytes) {
    memory.emplace(queue, bytes, "statistics");
    queue->zero(memory->at(), bytes);
  }
  Jobs jobs;
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i].numel == 0) continue;
    const Samples samples = samples_of(sums[i]);
    char* const of_sum = stats[i].wanted() ? static_cast<char*>(memory->at()) + stats[i].offset() : nullptr;
    add_sum(queue, {&sums[i], {}, {}, samples.first_chunk, samples.chunks, of_sum}, &jobs);
  }
  for (auto& [kind, some] : jobs.fast) launch_fast(queue, kind.first, kind.second, std::move(some));
  for (const int wide : {0, 1}) {
    launch_any(queue, wide, std::move(jobs.any[wide]));
    launch_samples(queue, wide, std::move(jobs.samples[wide]));
  }
  if (!bytes) return stats;
  const std::shared_ptr<const char> host = queue->fetch(memory->at(), bytes);
  for (SumStats& s : stats)
    if (s.wanted()) s.set(host);
  return stats;
}

}  // namespace cuda
}  // namespace fi
