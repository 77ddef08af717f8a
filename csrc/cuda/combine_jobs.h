// Interface between combine.cu and the kernels of combine_fast.cu and combine_any.cu.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "combine.h"
#include "table.h"

namespace fi {
namespace cuda {

// The statistics of a sum in the device's memory: kCounts of every row, then a sample of every row for each sampled
// chunk of the tensor that the sum touches.
enum Count { kNanIn, kInfIn, kNanOut, kInfOut, kCounts };
struct Sample {
  int64_t sampled, changed;
  double sum_pp, sum_dd, sum_od;
};

// Some rows of one sum, that one kernel does.
struct Job {
  const Sum* sum;
  std::vector<size_t> rows;
  std::vector<int> inputs;      // of `fast`: those that are read, in an order that all rows agree on
  int64_t first_chunk, chunks;  // that are sampled: the first, and how many
  char* stats;                  // null if none are wanted

  int64_t* counts(size_t row) const { return stats ? reinterpret_cast<int64_t*>(stats) + row * kCounts : nullptr; }
  // The sample of the first sampled chunk; that of the next is one sample per row of the sum further on.
  Sample* samples(size_t row) const {
    return stats ? reinterpret_cast<Sample*>(stats + sum->rows.size() * sizeof(int64_t) * kCounts) + row : nullptr;
  }
  int index_of(int input) const { return int(std::find(inputs.begin(), inputs.end(), input) - inputs.begin()); }
};

constexpr int kFastInputs = 8;

// One dtype of BF16, F16 and F32, nearest, operands at multiples of 16 bytes, terms in the order of `inputs`. All jobs
// have this dtype and as many inputs.
void launch_fast(Queue* queue, DType dtype, size_t inputs, std::vector<Job> jobs);
// Anything else. wide: in float64, which every row with an F64 input needs.
void launch_any(Queue* queue, bool wide, std::vector<Job> jobs);
// Samples of what the other two have stored.
void launch_samples(Queue* queue, bool wide, std::vector<Job> jobs);

// Calls launch(table) with the small table, if all fits into it.
template <class Launch>
void launch_table(const TableWriter& writer, Launch launch) {
  if (writer.fits_small())
    launch(writer.small());
  else
    launch(writer.table());
}

// Puts jobs into tables by `add`, and each full table into the queue by `launch`. A job that fits into no table is done
// some rows at a time.
template <class Add, class Launch>
void launch_jobs(std::vector<Job> jobs, Add add, Launch launch) {
  TableWriter table;
  for (size_t i = 0; i < jobs.size();) {
    if (add(jobs[i], &table)) {
      ++i;
    } else if (!table.empty()) {
      launch(table);
      table.clear();
    } else {
      const size_t half = jobs[i].rows.size() / 2;
      if (half == 0) throw std::invalid_argument("a row of a sum has too many terms for a kernel");
      Job rest = jobs[i];
      rest.rows.erase(rest.rows.begin(), rest.rows.begin() + ptrdiff_t(half));
      jobs[i].rows.resize(half);
      jobs.insert(jobs.begin() + ptrdiff_t(i) + 1, std::move(rest));
    }
  }
  if (!table.empty()) launch(table);
}

}  // namespace cuda
}  // namespace fi
