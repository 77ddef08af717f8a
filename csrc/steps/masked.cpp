#include "masked.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "survey.h"

namespace fi {

namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

bool draws_by_rank(const MaskedTerm& term) { return is_ranked(term.test) && !term.precomputed; }

Score score_view(const ScoreWithFactors& s) { return {s.score.kind, s.score.min_bits, s.factors.data()}; }

}  // namespace

// ---- masked sums ---------------------------------------------------------------------------------------------------

MaskedSum::MaskedSum(const Backend& backend, const std::vector<DType>& dtypes, std::vector<MaskedOutput> outputs,
                     int64_t columns)
    : backend_(backend), outputs_(std::move(outputs)), columns_(columns) {
  for (MaskedOutput& out : outputs_) {
    std::vector<bool> reads(dtypes.size());
    reads[size_t(out.row.base)] = true;
    for (const MaskedTerm& term : out.terms) {
      reads[size_t(term.input)] = true;
      if (term.importance >= 0) reads[size_t(term.importance)] = true;
      ranks_ += draws_by_rank(term);
    }
    for (size_t i = 0; i < reads.size(); ++i) {
      if (!reads[i]) continue;
      out.reads.push_back(int(i));
      out.wide = out.wide || dtypes[i] == DType::F64;
    }
    out.row.terms = out.terms.data();
    out.row.n_terms = int(out.terms.size());
    out.row.reads = out.reads.data();
    out.row.n_reads = int(out.reads.size());
    out.row.score = score_view(out.score);
    rows_.push_back(out.row);
    terms_ = std::max(terms_, out.row.n_terms);
  }
}

// The layout of a thread's scratch: the kernel's; then, if there are ranks, bins, for sorting a row, and the masks.
int64_t MaskedSum::scratch_bytes(int64_t most) const {
  return masked_sum_scratch(terms_) + (ranks_ ? kRankBinsBytes + 16 * columns_ + ranks_ * most : 0);
}

void MaskedSum::run(const CombineArgs& args, char* scratch) const {
  uint64_t* const bins = reinterpret_cast<uint64_t*>(scratch + masked_sum_scratch(terms_));
  uint64_t* const sorting = bins + kRankBinsBytes / 8;
  if (ranks_) memset(bins, 0, kRankCountBytes);
  uint8_t* masks = reinterpret_cast<uint8_t*>(sorting + 2 * columns_);
  std::vector<const uint8_t*> ranked;
  for (const MaskedOutput& out : outputs_) {
    for (const MaskedTerm& term : out.terms) {
      ranked.push_back(draws_by_rank(term) ? masks : nullptr);
      if (!draws_by_rank(term)) continue;
      const DType in0 = args.in[out.row.base], in = args.in[term.input];
      for (int64_t e = 0; e < args.numel; e += columns_)
        backend_.ranked({static_cast<const char*>(args.x[out.row.base]) + e * size_of(in0),
                         static_cast<const char*>(args.x[term.input]) + e * size_of(in), in0, in, out.wide,
                         out.row.limit, term.test, columns_, args.first + e, sorting, bins, masks + e});
      masks += args.numel;
    }
  }
  backend_.masked_sum({args, rows_.data(), columns_, ranked.data(), scratch});
}

// ---- statistics of masked deltas ----------------------------------------------------------------------------------

MaskedStatsSurvey::MaskedStatsSurvey(const Backend& backend, std::vector<DType> dtypes, MaskedStatsRequest request,
                                     int64_t numel, int64_t columns)
    : backend_(backend), dtypes_(std::move(dtypes)), request_(std::move(request)), columns_(columns) {
  for (const DType d : dtypes_) wide_ = wide_ || d == DType::F64;
  for (size_t i = 1; i < request_.tests.size(); ++i) ranks_ = ranks_ || is_ranked(request_.tests[i]);
  // Sums are of chunks and ranks of rows, so a piece reads its first and last row whole. It has several rows, that this
  // is rarely much.
  if (ranks_) part_ = piece_ = round_up(std::max(4 * kChunk, 4 * columns_), kChunk);
  raw_bytes_ = round_up((part_ + (ranks_ ? 2 * columns_ : 0)) * 8, 4096);
  const size_t n = dtypes_.size();
  sums_.resize(size_t((numel + kChunk - 1) / kChunk) * 3 * n);
  counts_.resize(size_t((numel + piece_ - 1) / piece_) * 2 * n);
}

// The layout of a thread's scratch: inputs, the kernel's; then, if there are ranks, bins, for sorting a row, its mask,
// and the masks of a part.
int64_t MaskedStatsSurvey::scratch_bytes() const {
  const int64_t n = int64_t(dtypes_.size());
  return n * raw_bytes_ + masked_stats_scratch(int(n)) + (ranks_ ? kRankBinsBytes + 17 * columns_ + 8 + n * part_ : 0);
}

void MaskedStatsSurvey::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  int64_t* const counts = &counts_[size_t(first / piece_) * 2 * dtypes_.size()];
  for (int64_t done = 0; done < count; done += part_)
    run_part(inputs, first + done, std::min(part_, count - done), counts, scratch);
}

void MaskedStatsSurvey::run_part(const Inputs& inputs, int64_t first, int64_t count, int64_t* counts, char* scratch) {
  const size_t n = dtypes_.size();
  const int64_t end = first + count;
  const int64_t from = ranks_ ? first / columns_ * columns_ : first, to = ranks_ ? round_up(end, columns_) : end;
  std::vector<const char*> raw(n);
  for (size_t i = 0; i < n; ++i)
    raw[i] = static_cast<const char*>(inputs.get(i, from, to - from, scratch + raw_bytes_ * int64_t(i)));
  char* const kernel_scratch = scratch + raw_bytes_ * int64_t(n);
  uint64_t* const bins = reinterpret_cast<uint64_t*>(kernel_scratch + round_up(masked_stats_scratch(int(n)), 8));
  uint64_t* const sorting = bins + kRankBinsBytes / 8;
  if (ranks_) memset(bins, 0, kRankCountBytes);
  uint8_t* const row_mask = reinterpret_cast<uint8_t*>(sorting + 2 * columns_);
  std::vector<uint8_t*> rank_masks(n, nullptr);
  for (size_t i = 1; i < n; ++i) {
    if (!is_ranked(request_.tests[i])) continue;
    rank_masks[i] = row_mask + columns_ + int64_t(i) * part_;
    for (int64_t row = from; row < to; row += columns_) {
      backend_.ranked({raw[0] + (row - from) * size_of(dtypes_[0]), raw[i] + (row - from) * size_of(dtypes_[i]),
                       dtypes_[0], dtypes_[i], wide_, std::numeric_limits<double>::infinity(), request_.tests[i],
                       columns_, row, sorting, bins, row_mask});
      const int64_t begin = std::max(row, first), stop = std::min(row + columns_, end);
      memcpy(rank_masks[i] + (begin - first), row_mask + (begin - row), size_t(stop - begin));
    }
  }
  std::vector<const void*> x(n);
  std::vector<const uint8_t*> ranked(n);
  std::vector<uint8_t*> masks(n);
  for (int64_t done = 0; done < count; done += kChunk) {
    for (size_t i = 0; i < n; ++i) {
      x[i] = raw[i] + (first + done - from) * size_of(dtypes_[i]);
      ranked[i] = rank_masks[i] ? rank_masks[i] + done : nullptr;
      masks[i] =
          request_.mask_indices[i] < 0 ? nullptr : request_.masks->mask(request_.mask_indices[i]) + (first + done) / 8;
    }
    backend_.masked_stats({x.data(), dtypes_.data(), request_.tests.data(), ranked.data(), int(n), wide_,
                           score_view(request_.score), std::min(kChunk, count - done), first + done, columns_,
                           request_.l1, request_.squares, kernel_scratch,
                           &sums_[size_t((first + done) / kChunk) * 3 * n], counts, masks.data()});
  }
}

Answer MaskedStatsSurvey::answer() const {
  const size_t n = dtypes_.size();
  Answer result{sums_, std::vector<int64_t>(2 * n)};
  fold_chunks(3 * n, &result.reals);
  for (size_t i = 0; i < counts_.size(); ++i) result.counts[i % (2 * n)] += counts_[i];
  return result;
}

}  // namespace fi
