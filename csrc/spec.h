// The options of a call, decoded from what heteroakd_fast/spec.py encodes: `LossSpec`. The enums here
// are the only ones in C++; a test compares them with Python's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heteroakd {

// A term as Python numbers it (terms.TERMS).
enum class TermIndex : int64_t { kCe, kTeacherCe, kKd, kHetero, kFeature, kCount };

// The terms of a pass over one model's logits; `teacher_ce` is `ce` of the pass over the teacher's.
enum Term : int32_t { kCe, kKd, kHetero, kFeature, kTerms };

// kNone stands for a pass without the term; the others are Python's choices.
enum class Divergence : int32_t { kNone, kForward, kReverse, kJs };
enum class Hetero : int32_t { kNone, kSoftmaxKl, kPaper, kPaperSpace };
enum class Mix : int32_t { kProbs, kLogits, kTeacher };

// What a pass over one model's logits computes.
struct PassTerms {
  bool any = false;         // whether there is such a pass
  int32_t place[kTerms] = {-1, -1, -1, -1};  // of a term among the call's numerators; -1: not asked for
  int32_t group[kTerms] = {-1, -1, -1, -1};  // of its denominator among the call's
  double weight[kTerms] = {0.0, 0.0, 0.0, 0.0};
  // Terms of one group add their gradients up: in slot `slot`, each times its weight over that of the
  // slot's first term, `slot_weight`. Only hetero, whose value comes with the factor of its gradient,
  // has a slot of its own in any case.
  int32_t slot[kTerms] = {-1, -1, -1, -1};
  int32_t slots = 0;
  int32_t slot_group[kTerms] = {-1, -1, -1, -1};
  double slot_weight[kTerms] = {0.0, 0.0, 0.0, 0.0};

  double smoothing = 0.0;
  Divergence kd = Divergence::kNone;
  double beta = 0.5;
  Hetero hetero = Hetero::kNone;  // also set for the maps alone
  Mix mix = Mix::kProbs;
  bool evaluation = true;
  double temperature = 1.0, tau = 1.0;
  bool maps = false;

  bool asks(Term term) const { return place[term] >= 0; }
  bool needs_teacher() const {
    return asks(kKd) || asks(kFeature) || hetero != Hetero::kNone;
  }
  double relative_weight(Term term) const { return weight[term] / slot_weight[slot[term]]; }
};

struct Spec {
  int64_t ignore_index;
  bool align_corners;
  int32_t terms = 0, groups = 0;  // numerators and denominators of the call
  PassTerms student, teacher;
};

// Raises what torch raises from a check where the numbers encode no call.
Spec decode_spec(const int64_t* structure, size_t integers, const double* numbers, size_t floats);

}  // namespace heteroakd
