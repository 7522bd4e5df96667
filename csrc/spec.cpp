#include "spec.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace heteroakd {
namespace {

// Takes the integers and numbers one after the other.
class Reader {
 public:
  Reader(const int64_t* structure, size_t integers, const double* numbers, size_t floats)
      : structure_(structure), integers_(integers), numbers_(numbers), floats_(floats) {}

  bool more() const { return at_ < integers_; }
  bool finished() const { return at_ == integers_ && number_at_ == floats_; }

  // In [least, end).
  int64_t integer(const char* name, int64_t least, int64_t end) {
    STD_TORCH_CHECK(at_ < integers_, "structure: ends before ", name);
    const int64_t value = structure_[at_++];
    STD_TORCH_CHECK(value >= least && value < end, "structure: got ", name, " ", value,
                    ", expected ", least, " to ", end - 1);
    return value;
  }
  bool flag(const char* name) { return integer(name, 0, 2) != 0; }

  double number(const char* name, double least, double most) {
    STD_TORCH_CHECK(number_at_ < floats_, "numbers: end before ", name);
    const double value = numbers_[number_at_++];
    STD_TORCH_CHECK(value >= least && value <= most, "numbers: got ", name, " ", value,
                    ", expected ", least, " to ", most);
    return value;
  }
  double weight() { return number("weight", -HUGE_VAL, HUGE_VAL); }
  double temperature(const char* name) { return number(name, 1e-4, 1e4); }

 private:
  const int64_t* structure_;
  size_t integers_, at_ = 0;
  const double* numbers_;
  size_t floats_, number_at_ = 0;
};

void set_temperature(PassTerms& pass, double temperature, bool& known) {
  STD_TORCH_CHECK(!known || pass.temperature == temperature,
                  "temperature: got ", pass.temperature, " and ", temperature, " in one pass");
  pass.temperature = temperature;
  known = true;
}

void assign_slots(PassTerms& pass) {
  for (const Term term : {kCe, kKd, kFeature, kHetero}) {
    if (!pass.asks(term)) continue;
    for (int s = 0; s < pass.slots; ++s) {
      if (term != kHetero && pass.slot_group[s] == pass.group[term]) pass.slot[term] = s;
    }
    if (pass.slot[term] >= 0) continue;
    pass.slot_group[pass.slots] = pass.group[term];
    pass.slot_weight[pass.slots] = pass.weight[term];
    pass.slot[term] = pass.slots++;
  }
}

}  // namespace

Spec decode_spec(const int64_t* structure, size_t integers, const double* numbers, size_t floats) {
  STD_TORCH_CHECK(integers >= 3, "structure: got ", integers, " integers");
  Spec spec;
  spec.ignore_index = structure[0];
  Reader read(structure + 1, integers - 1, numbers, floats);
  spec.align_corners = read.flag("align_corners");
  const bool maps = read.flag("maps");
  bool temperature_known = false;
  while (read.more()) {
    const auto index = static_cast<TermIndex>(
        read.integer("term", 0, static_cast<int64_t>(TermIndex::kCount)));
    const int64_t group = read.integer("group", -1, static_cast<int64_t>(TermIndex::kCount));
    PassTerms& pass = index == TermIndex::kTeacherCe ? spec.teacher : spec.student;
    Term term = kCe;
    const double weight = read.weight();
    switch (index) {
      case TermIndex::kCe:
      case TermIndex::kTeacherCe:
        pass.smoothing = read.number("label_smoothing", 0.0, 1.0);
        break;
      case TermIndex::kKd:
        term = kKd;
        pass.kd = static_cast<Divergence>(1 + read.integer("divergence", 0, 3));
        set_temperature(pass, read.temperature("temperature"), temperature_known);
        pass.beta = read.number("beta", 0.0, 1.0);
        break;
      case TermIndex::kHetero: {
        term = kHetero;
        STD_TORCH_CHECK(pass.hetero == Hetero::kNone, "structure: a term that is there twice");
        const bool paper = read.flag("preset");
        pass.mix = static_cast<Mix>(read.integer("mix", 0, 3));
        pass.evaluation = !read.flag("evaluation");
        const bool space = read.flag("weight_axis");
        STD_TORCH_CHECK(paper ? pass.mix != Mix::kProbs : !space,
                        "structure: no such preset, mix and weight_axis");
        pass.hetero = !paper ? Hetero::kSoftmaxKl : space ? Hetero::kPaperSpace : Hetero::kPaper;
        set_temperature(pass, read.temperature("temperature"), temperature_known);
        pass.tau = read.temperature("tau");
        break;
      }
      default:
        term = kFeature;
    }
    STD_TORCH_CHECK(group >= 0 || (term == kHetero && maps), "structure: a term without a group");
    pass.any = true;
    if (group < 0) continue;
    STD_TORCH_CHECK(!pass.asks(term), "structure: a term that is there twice");
    STD_TORCH_CHECK(weight != 0.0, "numbers: got weight 0; leave the term out");
    pass.place[term] = spec.terms++;
    pass.group[term] = static_cast<int32_t>(group);
    pass.weight[term] = weight;
    if (group >= spec.groups) spec.groups = static_cast<int32_t>(group) + 1;
  }
  STD_TORCH_CHECK(read.finished() && spec.terms > 0, "structure, numbers: not of one length, or no "
                                                     "term");
  STD_TORCH_CHECK(!maps || spec.student.hetero != Hetero::kNone, "maps: need the term hetero");
  spec.student.maps = maps;
  assign_slots(spec.student);
  assign_slots(spec.teacher);
  return spec;
}

}  // namespace heteroakd
