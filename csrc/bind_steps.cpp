#include "bind_steps.h"

#include <algorithm>
#include <cstring>

#include "histogram.h"
#include "masked.h"
#include "sums.h"
#include "survey.h"

namespace py = pybind11;

namespace fi {

namespace {

// What a kind's function may look at beside the step that it completes.
struct Given {
  const py::dict& keys;
  const Backend& backend;

  template <class T>
  T get(const char* key) const {
    if (!keys.contains(key)) throw py::value_error(std::string("a step lacks `") + key + "`");
    return keys[key].cast<T>();
  }
};

int64_t columns_of(const Given& given, int64_t numel) {
  const int64_t columns = given.get<int64_t>("columns");
  if (columns < 1 || numel % columns != 0) throw py::value_error("a tensor needs whole rows of `columns` elements");
  return columns;
}

int source_of(int source, size_t sources) {
  if (source < 0 || size_t(source) >= sources) throw py::value_error("an operand's source is none of the sources");
  return source;
}

// Parts lie one behind the other, each some whole rows of a source; `rows` are taken out of them.
std::shared_ptr<RowMap> gathered_of(const py::tuple& given, size_t sources, int64_t row_bytes, int64_t rows) {
  auto map = std::make_shared<RowMap>();
  map->row_bytes = row_bytes;
  const auto parts = given[0].cast<std::vector<std::tuple<int, int64_t, int64_t>>>();
  for (int64_t row : numbers_of<int64_t>(given[2].cast<py::buffer>(), rows)) {
    RowMap::Place place{-1, 0};
    const bool zeros = row == -1;
    for (const auto& [source, offset, count] : parts) {
      if (row >= 0 && row < count) place = {source_of(source, sources), offset + row * row_bytes};
      if (row >= 0) row -= count;
      if (place.source >= 0) break;
    }
    if (!zeros && place.source < 0) throw py::value_error("a gathered row is none of the parts' rows");
    map->rows.push_back(place);
  }
  return map;
}

// (source, byte offset, dtype code), or gathered: ([(source, byte offset, rows)], dtype code, i64[rows]).
Operand operand_of(const Given& given, const py::tuple& operand, size_t sources, bool bytes, int64_t numel) {
  if (operand.size() != 3) throw py::value_error("an operand has three parts");
  const bool gathers = py::isinstance<py::list>(operand[0]);
  const DType dtype = dtype_of(operand[gathers ? 1 : 2].cast<int>());
  const int width = bytes ? 1 : size_of(dtype);
  if (!gathers) return {source_of(operand[0].cast<int>(), sources), operand[1].cast<int64_t>(), dtype, width, nullptr};
  const int64_t columns = columns_of(given, numel);
  return {-1, 0, dtype, width, gathered_of(operand, sources, columns * width, numel / columns)};
}

std::vector<DType> dtypes_of(const Step& step) {
  std::vector<DType> dtypes;
  for (const Operand& input : step.inputs) dtypes.push_back(input.dtype);
  return dtypes;
}

// ---- kinds: each completes a step whose inputs, sinks, offsets, keys and numel are there already --------------------

// "tensor" where nothing is said.
std::string per_of(const Given& given) {
  const std::string per = given.keys.contains("per") ? given.get<std::string>("per") : "tensor";
  if (per != "tensor" && per != "row" && per != "column") throw py::value_error("`per` is tensor, row or column");
  return per;
}

void combine_groups(const Given& given, bool per_row, Step* step) {
  const int64_t columns = columns_of(given, step->numel), groups = per_row ? step->numel / columns : columns;
  std::vector<GroupSum::Output> outputs;
  for (auto& [pivot, totals, inputs, weights] :
       given.get<std::vector<std::tuple<int, py::buffer, std::vector<int>, py::buffer>>>("rows")) {
    PyRow row{pivot, 1.0, {}};
    for (const int input : inputs) std::get<2>(row).push_back({input, 0.0});
    check_row(row, step->inputs.size());
    outputs.push_back({pivot, inputs, numbers_of<double>(totals, groups),
                       numbers_of<double>(weights, groups * int64_t(inputs.size()))});
  }
  step->sum = std::make_shared<GroupSum>(given.backend, std::move(outputs), per_row, columns, groups);
}

void combine(const Given& given, Step* step) {
  const std::string per = per_of(given);
  if (given.get<py::list>("rows").size() != step->sinks.size()) throw py::value_error("a row per sink is needed");
  if (per != "tensor") return combine_groups(given, per == "row", step);
  std::vector<Row> rows;
  std::vector<std::vector<Term>> terms;
  for (const PyRow& row : given.get<std::vector<PyRow>>("rows")) {
    check_row(row, step->inputs.size());
    terms.push_back(terms_of(row));
    rows.push_back({std::get<0>(row), 0, std::get<1>(row), nullptr});
  }
  step->sum = std::make_shared<PlainSum>(given.backend, std::move(rows), std::move(terms));
}

void measure(const Given& given, bool deltas, Step* step) {
  const std::string per = per_of(given);
  if (per == "tensor")
    step->survey = std::make_shared<MeasureSurvey>(given.backend, dtypes_of(*step), step->numel, deltas);
  else if (per == "row")
    step->survey = std::make_shared<MeasureRows>(given.backend, dtypes_of(*step), step->numel, deltas,
                                                 columns_of(given, step->numel));
  else
    step->survey = std::make_shared<MeasureColumns>(given.backend, dtypes_of(*step), step->numel, deltas,
                                                    columns_of(given, step->numel));
}

void measure_inputs(const Given& given, Step* step) { measure(given, false, step); }

void measure_deltas(const Given& given, Step* step) { measure(given, true, step); }

void divergence(const Given& given, Step* step) {
  if (step->inputs.size() != 2) throw py::value_error("a divergence has two inputs");
  step->survey =
      std::make_shared<Divergence>(given.backend, dtypes_of(*step), step->numel, columns_of(given, step->numel));
}

KeepTest keep_of(const py::dict& d) {
  const auto limit = [&](const char* key) { return std::min(d[key].cast<uint64_t>(), kWords); };
  const KeepTest keep{d["least"].cast<uint32_t>(), d["most"].cast<uint32_t>(), limit("lo"), limit("hi"),
                      d["key"].cast<uint64_t>()};
  if (keep.lo > keep.hi) throw py::value_error("a keep's limits must not fall with the magnitude");
  return keep;
}

// Ranks hold places in a row as 32 bits.
int64_t ranked_columns_of(const Given& given, const Step& step) {
  const int64_t columns = columns_of(given, step.numel);
  if (columns > int64_t(0xffffffff)) throw py::value_error("columns must be below 2**32");
  return columns;
}

// None, or (kind, least, factors as float32).
OwnScore score_of(const py::object& given, int64_t rows) {
  OwnScore own{};
  if (given.is_none()) return own;
  const auto [kind, least, bytes] = given.cast<std::tuple<std::string, uint32_t, std::string>>();
  own.score = {kind == "spread" ? Score::kSpread : Score::kDivergence, least, nullptr};
  own.factors.resize(bytes.size() / sizeof(float));
  if (!own.factors.empty()) memcpy(own.factors.data(), bytes.data(), own.factors.size() * sizeof(float));
  if (own.score.kind == Score::kDivergence && int64_t(own.factors.size()) != rows)
    throw py::value_error("a divergence needs a factor per row");
  return own;
}

MaskedOutput masked_output_of(const py::dict& d, int64_t numel, int64_t rows, int inputs) {
  MaskedOutput out{};
  const auto input = [&](const py::handle given) {
    const int i = given.cast<int>();
    if (i < 0 || i >= inputs) throw py::value_error("a masked output names none of the inputs");
    return i;
  };
  for (const py::handle item : d["terms"].cast<py::list>()) {
    const auto t = item.cast<py::dict>();
    const bool important = t["importance"].cast<int>() >= 0;
    out.terms.push_back({input(t["input"]), important ? input(t["importance"]) : -1, t["weight"].cast<double>(),
                         t["vote"].cast<double>(), t["share"].cast<double>(), t["alone"].cast<double>(),
                         keep_of(t["keep"].cast<py::dict>()), nullptr});
    if (const py::object known = t["known"]; !known.is_none()) {
      const auto [masks, place] = known.cast<std::pair<std::shared_ptr<Masks>, int>>();
      if (!masks->allocated() || masks->numel() != numel || place < 0 || place >= masks->count())
        throw py::value_error("a term's mask is none of the masks of its tensor");
      out.terms.back().known = masks->mask(place);
      out.masks.push_back(masks);
    }
    if (important != (out.terms[0].importance >= 0)) throw py::value_error("all terms have an importance, or none");
  }
  check_count(out.terms.size(), kMaxInputs, "terms");
  out.row.base = input(d["base"]);
  out.row.votes = d["votes"].cast<bool>();
  out.row.divides = d["divides"].cast<bool>();
  out.row.alone = d["alone"].cast<bool>();
  out.row.important = out.terms[0].importance >= 0;
  out.row.least_share = d["least_share"].cast<double>();
  out.row.other_share = d["other_share"].cast<double>();
  out.row.limit = d["limit"].cast<double>();
  out.score = score_of(d["score"], rows);
  return out;
}

void masked(const Given& given, Step* step) {
  const int64_t columns = ranked_columns_of(given, *step);
  std::vector<MaskedOutput> outputs;
  for (const py::handle d : given.get<py::list>("masked"))
    outputs.push_back(
        masked_output_of(d.cast<py::dict>(), step->numel, step->numel / columns, int(step->inputs.size())));
  if (outputs.size() != step->sinks.size()) throw py::value_error("as many sinks as masked outputs are needed");
  step->sum = std::make_shared<MaskedSum>(given.backend, dtypes_of(*step), std::move(outputs), columns);
}

void kept(const Given& given, Step* step) {
  KeptAsk ask{};
  for (const py::handle d : given.get<py::list>("keeps")) ask.keeps.push_back(keep_of(d.cast<py::dict>()));
  if (ask.keeps.size() != step->inputs.size()) throw py::value_error("as many keeps as inputs are needed");
  const int64_t columns = ranked_columns_of(given, *step);
  ask.score = score_of(given.get<py::object>("score"), step->numel / columns);
  ask.l1 = given.get<bool>("l1");
  ask.squares = given.get<bool>("squares");
  ask.places.resize(ask.keeps.size(), -1);
  if (given.keys.contains("masks")) {
    const auto [masks, places] = given.get<std::pair<std::shared_ptr<Masks>, std::vector<int>>>("masks");
    masks->allocate();
    ask.masks = masks;
    ask.places = places;
    if (ask.masks->numel() != step->numel || ask.places.size() != ask.keeps.size())
      throw py::value_error("masks are needed of this tensor, and a place among them or -1 per input");
    for (const int place : ask.places)
      if (place < -1 || place >= ask.masks->count()) throw py::value_error("an input's mask is none of the masks");
  }
  step->survey = std::make_shared<KeptSurvey>(given.backend, dtypes_of(*step), std::move(ask), step->numel, columns);
}

void histogram(const Given& given, Step* step) {
  const int64_t columns = columns_of(given, step->numel), every = given.get<int64_t>("every");
  OwnScore score = score_of(given.get<py::object>("score"), step->numel / columns);
  const bool scores = score.score.kind != Score::kNone;
  if (scores && step->inputs.size() < 2) throw py::value_error("a score has two inputs or more");
  std::vector<Histogram::Ranked> ranked;
  for (const auto& [input, low, high, shift] :
       given.get<std::vector<std::tuple<int, uint32_t, uint32_t, int>>>("ranked")) {
    if (!scores && (input < 1 || size_t(input) >= step->inputs.size()))
      throw py::value_error("what is ranked is the delta of none of the inputs");
    if (low > high || high > kMostMagnitude || shift < 0 || shift > 30) throw py::value_error("no such bracket");
    ranked.push_back({input, low, high, shift});
  }
  if (ranked.empty() || every < 1) throw py::value_error("a histogram needs brackets, and every strip or fewer");
  step->survey =
      std::make_shared<Histogram>(given.backend, dtypes_of(*step), std::move(ranked), every, std::move(score), columns);
}

// Every kind, and the keys that it may have beside "kind", "inputs", "numel" and "columns", and beside "sinks",
// "offsets", "out_dtype" and "keys" if it writes.
struct Kind {
  const char* name;
  bool writes, bytes;  // bytes: its elements are bytes, whatever the dtype
  void (*complete)(const Given&, Step*);
  std::vector<std::string> keys;
};
const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"combine", true, false, combine, {"rows", "per"}},
      {"same", true, true, nullptr, {}},
      {"measure", false, false, measure_inputs, {"per"}},
      {"measure_deltas", false, false, measure_deltas, {"per"}},
      {"histogram", false, false, histogram, {"ranked", "every", "score"}},
      {"divergence", false, false, divergence, {}},
      {"masked", true, false, masked, {"masked"}},
      {"kept", false, false, kept, {"keeps", "score", "l1", "squares", "masks"}},
  };
  return all;
}

void check_keys(const py::dict& given, const Kind& kind) {
  std::vector<std::string> known = {"kind", "inputs", "numel", "columns"};
  if (kind.writes) known.insert(known.end(), {"sinks", "offsets", "out_dtype", "keys"});
  known.insert(known.end(), kind.keys.begin(), kind.keys.end());
  for (const auto& item : given) {
    const std::string key = item.first.cast<std::string>();
    bool found = false;
    for (const std::string& name : known) found = found || name == key;
    if (!found) throw py::value_error("a step of kind " + std::string(kind.name) + " has no `" + key + "`");
  }
}

void add_outputs(const Given& given, size_t sinks, Step* step) {
  step->sinks = given.get<std::vector<int>>("sinks");
  step->offsets = given.get<std::vector<int64_t>>("offsets");
  if (given.keys.contains("out_dtype")) step->out_dtype = dtype_of(given.get<int>("out_dtype"));
  if (given.keys.contains("keys")) step->keys = given.get<std::vector<uint64_t>>("keys");
  check_count(step->sinks.size(), kMaxOutputs, "outputs");
  if (step->offsets.size() != step->sinks.size()) throw py::value_error("as many offsets as sinks are needed");
  for (const int sink : step->sinks)
    if (sink < 0 || size_t(sink) >= sinks) throw py::value_error("a step's sink is none of the sinks");
}

}  // namespace

DType dtype_of(int code) {
  if (code < 0 || code >= kDTypes) throw py::value_error("no dtype has code " + std::to_string(code));
  return DType(code);
}

void check_count(size_t count, int most, const char* what) {
  if (count < 1 || count > size_t(most))
    throw py::value_error(std::string("expected 1 to ") + std::to_string(most) + " " + what + ", got " +
                          std::to_string(count));
}

void check_row(const PyRow& row, size_t inputs) {
  const auto bad = [&](int i) { return i < 0 || size_t(i) >= inputs; };
  if (bad(std::get<0>(row))) throw py::value_error("a row's pivot is none of the inputs");
  for (const auto& [input, weight] : std::get<2>(row))
    if (bad(input)) throw py::value_error("a row's term is none of the inputs");
}

std::vector<Term> terms_of(const PyRow& row) {
  std::vector<Term> terms;
  for (const auto& [input, weight] : std::get<2>(row)) terms.push_back({input, weight});
  return terms;
}

Step step_of(const py::dict& keys, const Backend& backend, size_t sources, size_t sinks, bool stochastic) {
  const Given given{keys, backend};
  const std::string name = given.get<std::string>("kind");
  const Kind* kind = nullptr;
  for (const Kind& k : kinds())
    if (name == k.name) kind = &k;
  if (!kind) throw py::value_error("no such kind of step: " + name);
  check_keys(keys, *kind);
  Step step;
  step.numel = given.get<int64_t>("numel");
  if (step.numel < 0) throw py::value_error("numel must not be negative");
  for (const py::handle input : given.get<py::list>("inputs"))
    step.inputs.push_back(operand_of(given, input.cast<py::tuple>(), sources, kind->bytes, step.numel));
  check_count(step.inputs.size(), kMaxInputs, "inputs");
  if (kind->writes) add_outputs(given, sinks, &step);
  if (kind->complete) kind->complete(given, &step);
  if (step.sum && stochastic && step.keys.size() != step.sinks.size())
    throw py::value_error("stochastic rounding needs a key per output");
  return step;
}

}  // namespace fi
