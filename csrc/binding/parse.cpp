#include "parse.h"

#include <algorithm>
#include <unordered_map>

namespace py = pybind11;

namespace fi {

namespace {

// An attribute, looked up by an interned string: `name` is a literal, so its address is the key of the string.
py::object attribute(const py::handle& from, const char* name) {
  static auto* const names = new std::unordered_map<const void*, py::object>;  // never freed: Python may have ended
  py::object& known = (*names)[name];
  if (!known) known = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  return py::getattr(from, known);
}

template <class T>
T get(const py::handle& from, const char* name) {
  return attribute(from, name).cast<T>();
}

int input_of(const py::handle& from, const char* name, size_t inputs, const char* what) {
  const int i = get<int>(from, name);
  if (i < 0 || size_t(i) >= inputs) throw py::value_error(what);
  return i;
}

ParsedDecoder decoder_of(const py::handle& object) {
  ParsedDecoder decoder;
  if (object.is_none()) return decoder;
  decoder.name = get<std::string>(object, "name");
  decoder.columns = get<int64_t>(object, "columns");
  if (decoder.name.empty() || decoder.columns < 1) throw py::value_error("a decoder has a name, and columns");
  for (const auto& [source, offset, bytes] :
       get<std::vector<std::tuple<int, int64_t, int64_t>>>(object, "companions")) {
    if (bytes < 0) throw py::value_error("a companion has 0 bytes or more");
    decoder.companions.push_back({source, offset, bytes});
  }
  decoder.parameters = get<std::vector<double>>(object, "parameters");
  return decoder;
}

ParsedEncoder encoder_of(const py::handle& object, const ParsedStep& step) {
  ParsedEncoder encoder;
  if (object.is_none()) return encoder;
  encoder.name = get<std::string>(object, "name");
  encoder.columns = get<int64_t>(object, "columns");
  encoder.parameters = get<std::vector<int64_t>>(object, "parameters");
  encoder.scales = get<std::vector<std::pair<int, int64_t>>>(object, "scales");
  encoder.magnitudes = get<std::vector<float>>(object, "magnitudes");
  if (encoder.name.empty() || encoder.columns < 1) throw py::value_error("an encoder has a name, and columns");
  if (!encoder.scales.empty() && encoder.scales.size() != step.sinks.size())
    throw py::value_error("an encoder has a place for the scales of every output, or of none");
  if (step.out_dtype != DType::F32) throw py::value_error("what is encoded is float32");
  return encoder;
}

ParsedLowRank::Factor factor_of(const py::handle& object) {
  return {get<int>(object, "source"),     get<int64_t>(object, "offset"),    dtype_of(get<int>(object, "dtype")),
          get<int64_t>(object, "first"),  get<int64_t>(object, "by_matrix"), get<int64_t>(object, "by_index"),
          get<int64_t>(object, "by_rank")};
}

ParsedLowRank::Change change_of(const py::handle& object) {
  ParsedLowRank::Change change{};
  change.replaces = get<bool>(object, "replaces");
  if (change.replaces) {
    change.rows = {get<int>(object, "source"), get<int64_t>(object, "offset"), dtype_of(get<int>(object, "dtype")),
                   get<std::vector<int64_t>>(object, "rows")};
    return change;
  }
  ParsedLowRank::Product& p = change.product;
  p.left = factor_of(attribute(object, "left"));
  p.right = factor_of(attribute(object, "right"));
  p.rank = get<int64_t>(object, "rank");
  p.scale = get<double>(object, "scale");
  if (p.rank < 1) throw py::value_error("a product has a rank of 1 or more");
  const py::object magnitude = attribute(object, "magnitude");
  p.has_magnitude = !magnitude.is_none();
  if (p.has_magnitude) p.magnitude = factor_of(magnitude);
  p.per_row = get<bool>(object, "per_row");
  return change;
}

ParsedLowRank low_rank_of(const py::handle& object) {
  ParsedLowRank parsed;
  if (object.is_none()) return parsed;
  parsed.stored = dtype_of(get<int>(object, "stored"));
  std::tie(parsed.matrices, parsed.rows, parsed.columns) = get<std::tuple<int64_t, int64_t, int64_t>>(object, "shape");
  for (const py::handle change : attribute(object, "changes")) parsed.changes.push_back(change_of(change));
  if (parsed.changes.empty() || parsed.matrices < 1 || parsed.rows < 1 || parsed.columns < 1)
    throw py::value_error("what is added needs changes, and a shape");
  return parsed;
}

ParsedOperand operand_of(const py::handle& object) {
  ParsedOperand operand{};
  operand.dtype = dtype_of(get<int>(object, "dtype"));
  operand.gathered = get<bool>(object, "gathered");
  if (operand.gathered) {
    operand.parts = get<std::vector<std::tuple<int, int64_t, int64_t>>>(object, "parts");
    operand.rows = attribute(object, "rows");
    for (const py::handle decoder : attribute(object, "decoders")) operand.decoders.push_back(decoder_of(decoder));
    if (!operand.decoders.empty() && (operand.decoders.size() != operand.parts.size() || operand.dtype != DType::F32))
      throw py::value_error("a gathered operand with decoders has one, or None, for each part, and is float32");
    return operand;
  }
  operand.source = get<int>(object, "source");
  operand.offset = get<int64_t>(object, "offset");
  operand.decoder = decoder_of(attribute(object, "decoder"));
  if (!operand.decoder.name.empty() && operand.dtype != DType::F32)
    throw py::value_error("a decoded operand is float32");
  operand.low_rank = low_rank_of(attribute(object, "low_rank"));
  if (!operand.low_rank.changes.empty() && operand.dtype != DType::F32)
    throw py::value_error("an operand with products added is float32");
  return operand;
}

Per per_of(const py::handle& step) {
  const std::string per = get<std::string>(step, "per");
  if (per == "tensor") return Per::kTensor;
  if (per == "row") return Per::kRow;
  if (per == "column") return Per::kColumn;
  throw py::value_error("`per` is tensor, row or column");
}

ParsedScore score_of(const py::handle& object) {
  ParsedScore score;
  if (object.is_none()) return score;
  const std::string kind = get<std::string>(object, "kind");
  if (kind != "variance" && kind != "divergence") throw py::value_error("no such score: " + kind);
  score.kind = kind == "variance" ? Score::kVariance : Score::kDivergence;
  score.min_bits = get<uint32_t>(object, "min_bits");
  score.factors = get<std::string>(object, "factors");
  return score;
}

MaskTest test_of(const py::handle& object) {
  const auto limit = [&](const char* name) { return std::min(get<uint64_t>(object, name), kWords); };
  const MaskTest test{get<uint32_t>(object, "min_bits"), get<uint32_t>(object, "max_bits"), limit("low_limit"),
                      limit("high_limit"), get<uint64_t>(object, "key")};
  if (test.low_limit > test.high_limit) throw py::value_error("a mask's limits must not fall with the magnitude");
  return test;
}

ParsedMaskedOutput masked_output_of(const py::handle& object, size_t inputs) {
  constexpr const char* kNone = "a masked output names none of the inputs";
  ParsedMaskedOutput out{};
  out.base = input_of(object, "base", inputs, kNone);
  for (const py::handle term : attribute(object, "terms")) {
    const bool important = get<int>(term, "importance") >= 0;
    out.important = out.terms.empty() ? important : out.important;
    if (important != out.important) throw py::value_error("all terms have an importance, or none");
    out.terms.push_back({input_of(term, "input", inputs, kNone),
                         important ? input_of(term, "importance", inputs, kNone) : -1, get<double>(term, "weight"),
                         get<double>(term, "sign_weight"), get<double>(term, "share"), get<double>(term, "sole_weight"),
                         test_of(attribute(term, "test")), attribute(term, "precomputed_mask")});
  }
  check_count(out.terms.size(), kMaxInputs, "terms");
  out.elects_signs = get<bool>(object, "elects_signs");
  out.divides = get<bool>(object, "divides");
  out.has_sole_weights = get<bool>(object, "has_sole_weights");
  out.least_share = get<double>(object, "least_share");
  out.other_share = get<double>(object, "other_share");
  out.limit = get<double>(object, "limit");
  out.score = score_of(attribute(object, "score"));
  return out;
}

// ---- kinds: each reads what only its steps have --------------------------------------------------------------------

void check_outputs(size_t described, const ParsedStep& step) {
  if (described != step.sinks.size()) throw py::value_error("as many outputs as sinks must be described");
}

void combine(const py::handle& object, ParsedStep* step) {
  for (const py::handle row : attribute(object, "rows")) step->rows.push_back(parse_row(row, step->inputs.size()));
  check_outputs(step->rows.size(), *step);
}

void group_combine(const py::handle& object, ParsedStep* step) {
  step->per = per_of(object);
  if (step->per == Per::kTensor) throw py::value_error("groups are rows or columns");
  for (const py::handle row : attribute(object, "rows")) {
    ParsedGroupRow parsed;
    parsed.pivot = input_of(row, "pivot", step->inputs.size(), "a row's pivot is none of the inputs");
    parsed.inputs = get<std::vector<int>>(row, "inputs");
    for (const int i : parsed.inputs)
      if (i < 0 || size_t(i) >= step->inputs.size()) throw py::value_error("a row's term is none of the inputs");
    if (parsed.inputs.size() > size_t(kMaxInputs)) throw py::value_error("a row has too many terms");
    parsed.totals = Numbers<double>(get<py::buffer>(row, "totals"));
    parsed.weights =
        Numbers<double>(get<py::buffer>(row, "weights"), parsed.totals.size() * int64_t(parsed.inputs.size()));
    step->group_rows.push_back(std::move(parsed));
  }
  check_outputs(step->group_rows.size(), *step);
}

void masked_sum(const py::handle& object, ParsedStep* step) {
  for (const py::handle output : attribute(object, "outputs"))
    step->outputs.push_back(masked_output_of(output, step->inputs.size()));
  check_outputs(step->outputs.size(), *step);
}

void measure(const py::handle& object, ParsedStep* step) {
  step->per = per_of(object);
  step->deltas = get<bool>(object, "deltas");
}

void masked_stats(const py::handle& object, ParsedStep* step) {
  for (const py::handle test : attribute(object, "tests")) step->tests.push_back(test_of(test));
  if (step->tests.size() != step->inputs.size()) throw py::value_error("as many mask tests as inputs are needed");
  step->score = score_of(attribute(object, "score"));
  step->l1 = get<bool>(object, "l1");
  step->squares = get<bool>(object, "squares");
  step->fills = attribute(object, "fills");
}

void histogram(const py::handle& object, ParsedStep* step) {
  step->score = score_of(attribute(object, "score"));
  step->every = get<int64_t>(object, "every");
  const bool scores = step->score.kind != Score::kNone;
  if (scores && step->inputs.size() < 2) throw py::value_error("a score has two inputs or more");
  for (const py::handle bracket : attribute(object, "brackets")) {
    const ParsedBracket b{get<int>(bracket, "input"), get<uint32_t>(bracket, "low"), get<uint32_t>(bracket, "high"),
                          get<int>(bracket, "shift")};
    if (!scores && (b.input < 1 || size_t(b.input) >= step->inputs.size()))
      throw py::value_error("what is ranked is the delta of none of the inputs");
    if (b.low > b.high || b.high > kMostMagnitude || b.shift < 0 || b.shift > 30)
      throw py::value_error("no such bracket");
    step->brackets.push_back(b);
  }
  if (step->brackets.empty() || step->every < 1)
    throw py::value_error("a histogram needs brackets, and every strip or fewer");
}

void divergence(const py::handle&, ParsedStep* step) {
  if (step->inputs.size() != 2) throw py::value_error("a divergence has two inputs");
}

// Every kind of step, by the name that its class in Python has as `kind`.
struct KindRow {
  StepKind kind;
  const char* name;
  bool writes, sums;  // sums: outputs have a dtype, and keys where rounding is stochastic
  void (*parse)(const py::handle&, ParsedStep*);
};
constexpr KindRow kKinds[] = {
    {StepKind::kCopyEqual, "copy_equal", true, false, nullptr},
    {StepKind::kCombine, "combine", true, true, combine},
    {StepKind::kGroupCombine, "group_combine", true, true, group_combine},
    {StepKind::kMaskedSum, "masked_sum", true, true, masked_sum},
    {StepKind::kMeasure, "measure", false, false, measure},
    {StepKind::kMaskedStats, "masked_stats", false, false, masked_stats},
    {StepKind::kHistogram, "histogram", false, false, histogram},
    {StepKind::kDivergence, "divergence", false, false, divergence},
};

const KindRow& kind_of(const std::string& name) {
  for (const KindRow& row : kKinds)
    if (name == row.name) return row;
  throw py::value_error("no such kind of step: " + name);
}

}  // namespace

ParsedStep parse_step(const py::handle& object) {
  const std::string kind = get<std::string>(object, "kind");
  if (kind == "largest_magnitudes") {
    ParsedStep sum = parse_step(attribute(object, "of"));
    if (sum.encoder.name.empty()) throw py::value_error("magnitudes are measured of sums that are encoded");
    sum.measures = true;
    return sum;
  }
  const KindRow& row = kind_of(kind);
  ParsedStep step;
  step.kind = row.kind;
  step.writes = row.writes;
  step.numel = get<int64_t>(object, "numel");
  step.columns = get<int64_t>(object, "columns");
  if (step.numel < 0) throw py::value_error("numel must not be negative");
  for (const py::handle input : attribute(object, "inputs")) step.inputs.push_back(operand_of(input));
  check_count(step.inputs.size(), kMaxInputs, "inputs");
  if (row.writes) {
    step.sinks = get<std::vector<int>>(object, "sinks");
    step.offsets = get<std::vector<int64_t>>(object, "offsets");
    check_count(step.sinks.size(), kMaxOutputs, "outputs");
    if (step.offsets.size() != step.sinks.size()) throw py::value_error("as many offsets as sinks are needed");
  }
  if (row.sums) {
    step.out_dtype = dtype_of(get<int>(object, "out_dtype"));
    step.keys = get<std::vector<uint64_t>>(object, "keys");
    if (!step.keys.empty() && step.keys.size() != step.sinks.size())
      throw py::value_error("stochastic rounding needs a key per output");
    step.encoder = encoder_of(attribute(object, "encoder"), step);
  }
  if (row.parse) row.parse(object, &step);
  return step;
}

ParsedRow parse_row(const py::handle& object, size_t inputs) {
  ParsedRow row{
      input_of(object, "pivot", inputs, "a row's pivot is none of the inputs"), get<double>(object, "total"), {}};
  for (const auto& [input, weight] : get<std::vector<std::pair<int, double>>>(object, "terms")) {
    if (input < 0 || size_t(input) >= inputs) throw py::value_error("a row's term is none of the inputs");
    row.terms.push_back({input, weight});
  }
  if (row.terms.size() > size_t(kMaxInputs))
    throw py::value_error("a row has at most " + std::to_string(kMaxInputs) + " terms, got " +
                          std::to_string(row.terms.size()));
  return row;
}

int64_t columns_of(const ParsedStep& step, int64_t numel) {
  if (step.columns < 1 || numel % step.columns != 0)
    throw py::value_error("a tensor needs whole rows of `columns` elements");
  return step.columns;
}

DType dtype_of(int code) {
  if (code < 0 || code >= kDTypes) throw py::value_error("no dtype has code " + std::to_string(code));
  return DType(code);
}

void check_count(size_t count, int most, const char* what) {
  if (count < 1 || count > size_t(most))
    throw py::value_error(std::string("expected 1 to ") + std::to_string(most) + " " + what + ", got " +
                          std::to_string(count));
}

const char* name_of(StepKind kind) {
  for (const KindRow& row : kKinds)
    if (row.kind == kind) return row.name;
  return "";
}

}  // namespace fi
