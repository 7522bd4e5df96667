// The options of a call, decoded from what heteroakd_fast/spec.py encodes: `LossSpec`. Which options a
// term has is said by the term (terms/).
#pragma once

#include <cstddef>
#include <cstdint>

#include "terms/list.h"

namespace heteroakd {

// What a pass over one model's logits computes; terms by their index in terms/list.h.
struct PassTerms {
  bool any = false;                // whether there is such a pass
  bool has[kTerms] = {};           // asked for, or there for the maps alone
  int32_t position[kTerms];        // among the call's numerators; -1: not asked for
  int32_t group[kTerms];           // of its denominator among the call's
  int32_t variant[kTerms] = {};
  double weight[kTerms] = {};
  Options options[kTerms] = {};
  // Terms of one group add their gradients up in gradient `gradient[term]` of `gradients`, each
  // times its weight over that of the gradient's first term, `gradient_weight`. Only terms whose
  // value comes with the factor of its gradient have one of their own in any case.
  int32_t gradient[kTerms];
  int32_t gradients = 0;
  int32_t gradient_group[kTerms];
  double gradient_weight[kTerms] = {};

  double temperature = 1.0;
  bool maps = false, diagnostics = false;  // what is written of each pixel
  int32_t planes() const { return (maps ? 2 : 0) + (diagnostics ? 3 : 0); }

  PassTerms() {
    for (int k = 0; k < kTerms; ++k) position[k] = group[k] = gradient[k] = gradient_group[k] = -1;
  }
  bool asks(int term) const { return position[term] >= 0; }
  double relative_weight(int term) const { return weight[term] / gradient_weight[gradient[term]]; }
  Needs needs() const;
};

struct Spec {
  int64_t ignore_index, unlabelled_index;  // the same where no pixel is unlabelled
  bool align_corners;
  int32_t terms = 0, groups = 0;  // numerators and denominators of the call
  PassTerms student, teacher;
};

// Raises what torch raises from a check where the numbers encode no call.
Spec decode_spec(const int64_t* structure, size_t integers, const double* numbers, size_t floats);

}  // namespace heteroakd
