#include "steps.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "../steps/histogram.h"
#include "../steps/magnitudes.h"
#include "../steps/masked.h"
#include "../steps/sums.h"
#include "../steps/survey.h"
#include "parse.h"

namespace py = pybind11;

namespace fi {

namespace {

int source_of(int source, size_t sources) {
  if (source < 0 || size_t(source) >= sources) throw py::value_error("an operand's source is none of the sources");
  return source;
}

std::shared_ptr<Decoding> decoding_of(const ParsedDecoder& parsed, const Backend& backend, size_t sources,
                                      int64_t numel) {
  if (parsed.name.empty()) return nullptr;
  const Decoder* decoder = find_decoder(backend.decoders, parsed.name.c_str());
  if (!decoder) throw py::value_error("no such decoder: " + parsed.name);
  std::vector<Decoding::Companion> companions;
  for (const ParsedDecoder::Companion& c : parsed.companions)
    companions.push_back({source_of(c.source, sources), c.offset, c.bytes});
  return std::make_shared<Decoding>(*decoder, numel, parsed.columns, std::move(companions), parsed.parameters);
}

// Parts lie one behind the other, each some whole rows of a source; `rows` are taken out of them.
std::shared_ptr<RowMap> gathered_of(const ParsedOperand& operand, const Backend& backend, size_t sources,
                                    int64_t row_bytes, int64_t rows) {
  auto map = std::make_shared<RowMap>();
  map->row_bytes = row_bytes;
  for (size_t i = 0; i < operand.parts.size(); ++i) {
    const auto& [source, offset, count] = operand.parts[i];
    const int64_t numel = count * row_bytes / int64_t(size_of(operand.dtype));
    map->parts.push_back({source_of(source, sources), offset,
                          operand.decoders.empty() ? nullptr : decoding_of(operand.decoders[i], backend, sources, numel)});
  }
  for (int64_t row : numbers_of<int64_t>(operand.rows.cast<py::buffer>(), rows)) {
    RowMap::Location location{-1, 0};
    const bool zeros = row == -1;
    for (size_t i = 0; i < operand.parts.size() && location.part < 0; ++i) {
      const int64_t count = std::get<2>(operand.parts[i]);
      if (row >= 0 && row < count) location = {int(i), row * row_bytes};
      if (row >= 0) row -= count;
    }
    if (!zeros && location.part < 0) throw py::value_error("a gathered row is none of the parts' rows");
    map->rows.push_back(location);
  }
  return map;
}

// Checks that the elements of a factor that are used, `length` times `rank` of each matrix, do not run backwards: where
// they end in the file is seen when they are read.
LowRank::Factor factor_of(const ParsedLowRank::Factor& f, size_t sources, bool optional = false) {
  if (f.first < 0 || f.by_matrix < 0 || f.by_index < 0 || f.by_rank < 0 || f.offset < 0)
    throw py::value_error("a factor's strides must not be negative");
  const int source = optional && f.source == -1 ? -1 : source_of(f.source, sources);
  return {source, f.offset, f.dtype, f.first, f.by_matrix, f.by_index, f.by_rank};
}

LowRank::Rows rows_of(const ParsedLowRank::Rows& parsed, size_t sources, int64_t rows) {
  LowRank::Rows result{source_of(parsed.source, sources), parsed.offset, parsed.dtype, {}};
  for (size_t i = 0; i < parsed.rows.size(); ++i) result.places.emplace_back(parsed.rows[i], int64_t(i));
  std::sort(result.places.begin(), result.places.end());
  const auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
  if (result.places.empty() || result.places.front().first < 0 || result.places.back().first >= rows ||
      std::adjacent_find(result.places.begin(), result.places.end(), same) != result.places.end())
    throw py::value_error("rows that are replaced are rows of the tensor, each once");
  return result;
}

std::shared_ptr<LowRank> low_rank_of(const ParsedOperand& operand, const Backend& backend, size_t sources,
                                     int64_t numel) {
  const ParsedLowRank& parsed = operand.low_rank;
  if (parsed.changes.empty()) return nullptr;
  if (parsed.matrices * parsed.rows * parsed.columns != numel)
    throw py::value_error("a tensor to which products are added has matrices x rows x columns elements");
  std::vector<LowRank::Change> changes;
  for (const ParsedLowRank::Change& change : parsed.changes) {
    LowRank::Change made{};
    if (change.replaces) {
      made.rows = rows_of(change.rows, sources, parsed.matrices * parsed.rows);
    } else {
      const ParsedLowRank::Product& p = change.product;
      made.product = {factor_of(p.left, sources, true),
                      factor_of(p.right, sources),
                      p.rank,
                      float(p.scale),
                      p.has_magnitude,
                      p.per_row,
                      {}};
      if (p.has_magnitude) made.product.magnitude = factor_of(p.magnitude, sources);
      if (p.has_magnitude && parsed.matrices != 1) throw py::value_error("magnitudes are of one matrix");
    }
    changes.push_back(std::move(made));
  }
  LowRank::Base base{source_of(operand.source, sources), operand.offset, parsed.stored,
                     decoding_of(operand.decoder, backend, sources, numel)};
  return std::make_shared<LowRank>(backend, std::move(base), parsed.matrices, parsed.rows, parsed.columns,
                                   std::move(changes));
}

Operand operand_of(const ParsedStep& step, const ParsedOperand& operand, const Backend& backend, size_t sources) {
  const bool bytes = step.kind == StepKind::kCopyEqual;
  const int width = bytes ? 1 : size_of(operand.dtype);
  if (operand.gathered) {
    const int64_t columns = columns_of(step, step.numel);
    if (bytes && !operand.decoders.empty()) throw py::value_error("bytes of decoded rows are not compared");
    const int64_t rows = step.numel / columns;
    return {-1, 0, operand.dtype, width, gathered_of(operand, backend, sources, columns * width, rows)};
  }
  if (bytes && !operand.low_rank.changes.empty())
    throw py::value_error("bytes of a tensor to which products are added are not compared");
  const std::shared_ptr<LowRank> low_rank = low_rank_of(operand, backend, sources, step.numel);
  return {source_of(operand.source, sources),
          operand.offset,
          operand.dtype,
          width,
          nullptr,
          bytes || low_rank ? nullptr : decoding_of(operand.decoder, backend, sources, step.numel),
          low_rank};
}

std::vector<DType> dtypes_of(const Step& step) {
  std::vector<DType> dtypes;
  for (const Operand& input : step.inputs) dtypes.push_back(input.dtype);
  return dtypes;
}

// Parameters: the kind of the scales; rows and columns of a block; rows of a matrix; whether scales are powers of two.
// A format whose scales are among the codes has none.
void encode(const ParsedEncoder& parsed, const Backend& backend, size_t sinks, Step* step) {
  const Encoder* encoder = find_encoder(parsed.name.c_str());
  if (!encoder) throw py::value_error("no such encoder: " + parsed.name);
  const bool among = encoder->block_elements > 1;
  std::vector<int64_t> numbers = parsed.parameters;
  if (among && numbers.empty())
    numbers = {int64_t(ScaleKind::kF16), 1, encoder->block_elements, step->numel / parsed.columns, 0};
  if (numbers.size() == 4) numbers.push_back(0);
  if (numbers.size() != 5 || numbers[0] < 0 || numbers[0] > 3 || numbers[1] < 1 || numbers[2] < 1 || numbers[3] < 1)
    throw py::value_error("the parameters of " + parsed.name + " are a kind of scales, and rows and columns of blocks");
  const int64_t matrix = numbers[3] * parsed.columns;
  if (step->numel % matrix != 0 || parsed.columns % encoder->block_elements != 0)
    throw py::value_error("a tensor has whole matrices, and a row whole blocks of " + parsed.name);
  if (parsed.scales.empty() != among) throw py::value_error("scales have a place where they are not among the codes");
  std::vector<Encoding::Place> places;
  for (const auto& [sink, offset] : parsed.scales) {
    if (sink < 0 || size_t(sink) >= sinks) throw py::value_error("the sink of scales is none of the sinks");
    places.push_back({sink, offset});
  }
  const bool whole = numbers[1] >= numbers[3] && numbers[2] >= parsed.columns;
  const size_t matrices = size_t(step->numel / matrix) * step->sinks.size();
  if (!parsed.magnitudes.empty() && (!whole || parsed.magnitudes.size() != matrices))
    throw py::value_error("magnitudes are known of each matrix of each output, where it is one block");
  step->encoding =
      std::make_shared<Encoding>(backend, *encoder, Encoding::Format{ScaleKind(numbers[0]), numbers[4] != 0},
                                 step->numel, Blocks{numbers[3], parsed.columns, numbers[1], numbers[2]},
                                 step->sum->grain(), std::move(places), parsed.magnitudes);
}

// Turns a step that writes sums into one that measures them.
void measure_sums_of(const ParsedEncoder& parsed, const Backend& backend, Step* step) {
  const int64_t matrix = parsed.parameters.size() < 4 ? step->numel : parsed.parameters[3] * parsed.columns;
  step->survey = std::make_shared<SumMagnitudes>(backend, step->sum, dtypes_of(*step), step->sinks.size(),
                                                 find_encoder(parsed.name.c_str())->codes, step->numel, matrix);
  step->sum = nullptr;
  step->encoding = nullptr;
  step->sinks.clear();
  step->offsets.clear();
  step->keys.clear();
}

// ---- kinds: each completes a step whose inputs, sinks, offsets, keys and numel are there already --------------------

void combine(const ParsedStep& parsed, const Backend& backend, Step* step) {
  std::vector<Row> rows;
  std::vector<std::vector<Term>> terms;
  for (const ParsedRow& row : parsed.rows) {
    terms.push_back(row.terms);
    rows.push_back({row.pivot, 0, row.total, nullptr});
  }
  step->sum = std::make_shared<PlainSum>(backend, std::move(rows), std::move(terms));
}

void group_combine(const ParsedStep& parsed, const Backend& backend, Step* step) {
  const int64_t columns = columns_of(parsed, step->numel);
  const bool per_row = parsed.per == Per::kRow;
  const int64_t groups = per_row ? step->numel / columns : columns;
  std::vector<GroupSum::Output> outputs;
  for (const ParsedGroupRow& row : parsed.group_rows) {
    if (row.totals.size() != groups)
      throw py::value_error("a row has " + std::to_string(row.totals.size()) + " totals for " + std::to_string(groups) +
                            " rows or columns");
    outputs.push_back({row.pivot, row.inputs, row.totals.copy(), row.weights.copy()});
  }
  step->sum = std::make_shared<GroupSum>(backend, std::move(outputs), per_row, columns, groups);
}

void measure(const ParsedStep& parsed, const Backend& backend, Step* step) {
  const bool deltas = parsed.deltas;
  if (parsed.per == Per::kTensor)
    step->survey = std::make_shared<MeasureSurvey>(backend, dtypes_of(*step), step->numel, deltas);
  else if (parsed.per == Per::kRow)
    step->survey =
        std::make_shared<MeasureRows>(backend, dtypes_of(*step), step->numel, deltas, columns_of(parsed, step->numel));
  else
    step->survey = std::make_shared<MeasureColumns>(backend, dtypes_of(*step), step->numel, deltas,
                                                    columns_of(parsed, step->numel));
}

void divergence(const ParsedStep& parsed, const Backend& backend, Step* step) {
  step->survey = std::make_shared<Divergence>(backend, dtypes_of(*step), step->numel, columns_of(parsed, step->numel));
}

// The length of a row of a step that may rank elements: ranks are 32-bit numbers.
int64_t ranked_columns_of(const ParsedStep& parsed, const Step& step) {
  const int64_t columns = columns_of(parsed, step.numel);
  if (columns > int64_t(0xffffffff)) throw py::value_error("columns must be below 2**32");
  return columns;
}

ScoreWithFactors score_of(const ParsedScore& parsed, int64_t rows) {
  ScoreWithFactors result{};
  result.score = {parsed.kind, parsed.min_bits, nullptr};
  result.factors.resize(parsed.factors.size() / sizeof(float));
  if (!result.factors.empty())
    memcpy(result.factors.data(), parsed.factors.data(), result.factors.size() * sizeof(float));
  if (result.score.kind == Score::kDivergence && int64_t(result.factors.size()) != rows)
    throw py::value_error("a divergence needs a factor per row");
  return result;
}

MaskedOutput masked_output_of(const ParsedMaskedOutput& parsed, int64_t numel, int64_t rows) {
  MaskedOutput out{};
  for (const ParsedTerm& term : parsed.terms) {
    out.terms.push_back(
        {term.input, term.importance, term.weight, term.sign_weight, term.share, term.sole_weight, term.test, nullptr});
    if (term.precomputed.is_none()) continue;
    const auto masks = term.precomputed.attr("masks").cast<std::shared_ptr<Masks>>();
    const int index = term.precomputed.attr("index").cast<int>();
    if (!masks->allocated() || masks->numel() != numel || index < 0 || index >= masks->count())
      throw py::value_error("a term's mask is none of the masks of its tensor");
    out.terms.back().precomputed = masks->mask(index);
    out.masks.push_back(masks);
  }
  out.row.base = parsed.base;
  out.row.elects_signs = parsed.elects_signs;
  out.row.divides = parsed.divides;
  out.row.has_sole_weights = parsed.has_sole_weights;
  out.row.important = parsed.important;
  out.row.least_share = parsed.least_share;
  out.row.other_share = parsed.other_share;
  out.row.limit = parsed.limit;
  out.score = score_of(parsed.score, rows);
  return out;
}

void masked_sum(const ParsedStep& parsed, const Backend& backend, Step* step) {
  const int64_t columns = ranked_columns_of(parsed, *step);
  std::vector<MaskedOutput> outputs;
  for (const ParsedMaskedOutput& output : parsed.outputs)
    outputs.push_back(masked_output_of(output, step->numel, step->numel / columns));
  step->sum = std::make_shared<MaskedSum>(backend, dtypes_of(*step), std::move(outputs), columns);
}

void masked_stats(const ParsedStep& parsed, const Backend& backend, Step* step) {
  const int64_t columns = ranked_columns_of(parsed, *step);
  MaskedStatsRequest request{parsed.tests, score_of(parsed.score, step->numel / columns), parsed.l1, parsed.squares,
                             nullptr,      std::vector<int>(parsed.tests.size(), -1)};
  if (!parsed.fills.is_none()) {
    const auto masks = parsed.fills.attr("masks").cast<std::shared_ptr<Masks>>();
    request.mask_indices = parsed.fills.attr("places").cast<std::vector<int>>();
    if (masks->numel() != step->numel || request.mask_indices.size() != request.tests.size())
      throw py::value_error("masks are needed of this tensor, and an index among them or -1 per input");
    for (const int index : request.mask_indices)
      if (index < -1 || index >= masks->count()) throw py::value_error("an input's mask is none of the masks");
    masks->allocate();
    request.masks = masks;
  }
  step->survey =
      std::make_shared<MaskedStatsSurvey>(backend, dtypes_of(*step), std::move(request), step->numel, columns);
}

void histogram(const ParsedStep& parsed, const Backend& backend, Step* step) {
  const int64_t columns = columns_of(parsed, step->numel);
  std::vector<Histogram::Ranked> ranked;
  for (const ParsedBracket& b : parsed.brackets) ranked.push_back({b.input, b.low, b.high, b.shift});
  step->survey = std::make_shared<Histogram>(backend, dtypes_of(*step), std::move(ranked), parsed.every,
                                             score_of(parsed.score, step->numel / columns), columns);
}

// The kinds of steps, by the function that completes one. Copies of equal bytes have neither a sum nor a survey.
struct KindRow {
  StepKind kind;
  void (*complete)(const ParsedStep&, const Backend&, Step*);
};
constexpr KindRow kKinds[] = {
    {StepKind::kCopyEqual, nullptr},    {StepKind::kCombine, combine},       {StepKind::kGroupCombine, group_combine},
    {StepKind::kMaskedSum, masked_sum}, {StepKind::kMeasure, measure},       {StepKind::kMaskedStats, masked_stats},
    {StepKind::kHistogram, histogram},  {StepKind::kDivergence, divergence},
};

}  // namespace

Step step_of(const py::handle& object, const Backend& backend, size_t sources, size_t sinks, bool stochastic) {
  const ParsedStep parsed = parse_step(object);
  Step step;
  step.numel = parsed.numel;
  for (const ParsedOperand& operand : parsed.inputs)
    step.inputs.push_back(operand_of(parsed, operand, backend, sources));
  step.sinks = parsed.sinks;
  step.offsets = parsed.offsets;
  step.out_dtype = parsed.out_dtype;
  step.keys = parsed.keys;
  for (const int sink : step.sinks)
    if (sink < 0 || size_t(sink) >= sinks) throw py::value_error("a step's sink is none of the sinks");
  for (const KindRow& row : kKinds)
    if (row.kind == parsed.kind && row.complete) row.complete(parsed, backend, &step);
  const bool encodes = !parsed.encoder.name.empty();
  if (step.sum && stochastic && (encodes || step.keys.size() != step.sinks.size()))
    throw py::value_error(encodes ? "codes are rounded to nearest" : "stochastic rounding needs a key per output");
  if (encodes && step.numel > 0) encode(parsed.encoder, backend, sinks, &step);
  if (parsed.measures) measure_sums_of(parsed.encoder, backend, &step);
  return step;
}

}  // namespace fi
