#include "spec.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

namespace heteroakd {
namespace {

// Takes the integers and numbers one after the other.
class Reader {
 public:
  Reader(const int64_t* structure, size_t integers, const double* numbers, size_t floats)
      : structure_(structure), integers_(integers), numbers_(numbers), floats_(floats) {}

  bool more() const { return at_ < integers_; }
  bool finished() const { return at_ == integers_ && number_at_ == floats_; }

  int64_t any(const char* name) {
    STD_TORCH_CHECK(at_ < integers_, "structure: ends before ", name);
    return structure_[at_++];
  }
  // In [least, end).
  int64_t integer(const char* name, int64_t least, int64_t end) {
    const int64_t value = any(name);
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

 private:
  const int64_t* structure_;
  size_t integers_, at_ = 0;
  const double* numbers_;
  size_t floats_, number_at_ = 0;
};

// The term of this class with these options, its weight read already; -1: there is none.
int read_options(Reader& read, int64_t index, Options& options) {
  int found = -1;
  bool known = false;
  for_each_term([&](auto tag, int k) {
    using Term = typename decltype(tag)::type;
    if (kPublicIndex[k] != (index == kTeacherCe ? 0 : index)) return;
    if (!known) {
      for (int i = 0; i < Term::kChoiceCount; ++i) {
        const ChoiceRange& choice = Term::kChoices[i];
        options.choice[i] = static_cast<int32_t>(read.integer(choice.name, 0, choice.count));
      }
      for (int i = 0; i < Term::kNumberCount; ++i) {
        const NumberRange& range = Term::kNumbers[i];
        options.number[i] = read.number(range.name, range.least, range.most);
      }
    }
    known = true;
    if (found < 0 && Term::takes(options.choice)) found = k;
  });
  return found;
}

void set_temperature(PassTerms& pass, int term, bool& known) {
  for_each_term([&](auto tag, int k) {
    using Term = typename decltype(tag)::type;
    if (k != term) return;
    for (int i = 0; i < Term::kNumberCount; ++i) {
      if (Term::kOwnTemperature ||
          std::strcmp(Term::kNumbers[i].name, kTemperatureRange.name) != 0) {
        continue;
      }
      const double temperature = pass.options[k].number[i];
      STD_TORCH_CHECK(!known || pass.temperature == temperature, "temperature: got ",
                      pass.temperature, " and ", temperature, " in one pass");
      pass.temperature = temperature;
      known = true;
    }
    pass.variant[k] = Term::variant(pass.options[k]);
  });
}

void assign_gradients(PassTerms& pass) {
  for_each_term([&](auto tag, int k) {
    using Term = typename decltype(tag)::type;
    if (!pass.asks(k)) return;
    for (int g = 0; g < pass.gradients; ++g) {
      if (!Term::kOwnGradient && pass.gradient_group[g] == pass.group[k]) pass.gradient[k] = g;
    }
    if (pass.gradient[k] >= 0) return;
    pass.gradient_group[pass.gradients] = pass.group[k];
    pass.gradient_weight[pass.gradients] = pass.weight[k];
    pass.gradient[k] = pass.gradients++;
  });
}

bool is_mapped(int term) {
  bool found = false;
  for_each_term([&](auto tag, int k) { found |= k == term && decltype(tag)::type::kMapped; });
  return found;
}

}  // namespace

Needs PassTerms::needs() const {
  Needs all;
  for_each_term([&](auto tag, int k) {
    if (has[k]) all = all | decltype(tag)::type::needs(variant[k]);
  });
  if (diagnostics) {
    all.student_nll = all.logits = true;
    all.pair = all.teacher_at_top = all.teacher;
  }
  return all;
}

Spec decode_spec(const int64_t* structure, size_t integers, const double* numbers, size_t floats) {
  STD_TORCH_CHECK(integers >= 4, "structure: got ", integers, " integers");
  Spec spec;
  spec.ignore_index = structure[0];
  Reader read(structure + 1, integers - 1, numbers, floats);
  spec.align_corners = read.flag("align_corners");
  const int64_t written = read.integer("maps", 0, 4);
  const bool maps = (written & 1) != 0;
  spec.unlabelled_index = read.any("unlabelled_index");
  bool temperature_known = false;
  bool seen[kPublicTerms] = {}, mapped = false;
  while (read.more()) {
    const int64_t index = read.integer("term", 0, kPublicTerms);
    const int64_t group = read.integer("group", -1, kPublicTerms);
    STD_TORCH_CHECK(!seen[index], "structure: a term that is there twice");
    seen[index] = true;
    PassTerms& pass = index == kTeacherCe ? spec.teacher : spec.student;
    const double weight = read.number("weight", -HUGE_VAL, HUGE_VAL);
    Options options{};
    const int term = read_options(read, index, options);
    STD_TORCH_CHECK(term >= 0, "structure: no term with these choices");
    pass.any = pass.has[term] = true;
    mapped = mapped || is_mapped(term);
    pass.options[term] = options;
    set_temperature(pass, term, temperature_known);
    if (group < 0) {
      STD_TORCH_CHECK(maps && is_mapped(term), "structure: a term without a group");
      continue;
    }
    STD_TORCH_CHECK(weight != 0.0, "numbers: got weight 0; leave the term out");
    pass.position[term] = spec.terms++;
    pass.group[term] = static_cast<int32_t>(group);
    pass.weight[term] = weight;
    if (group >= spec.groups) spec.groups = static_cast<int32_t>(group) + 1;
  }
  STD_TORCH_CHECK(read.finished() && spec.terms > 0, "structure, numbers: not of one length, or no "
                                                     "term");
  STD_TORCH_CHECK(!maps || mapped, "maps: need the term hetero");
  spec.student.maps = maps;
  STD_TORCH_CHECK((written & 2) == 0 || spec.student.any, "diagnostics: need a term of the student");
  spec.student.diagnostics = (written & 2) != 0;
  assign_gradients(spec.student);
  assign_gradients(spec.teacher);
  return spec;
}

}  // namespace heteroakd
