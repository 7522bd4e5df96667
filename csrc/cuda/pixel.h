// What is done once per pixel, between the loops over classes: sums over classes become values and
// the coefficients of the gradients. The terms are in ../terms.
#pragma once

#include "elementary.h"
#include "memory.h"

namespace heteroakd::cuda {

// --- which terms a kernel has ----------------------------------------------------------------------

// f(TermTag<Term>) for every term.
template <class F, class... Terms>
HAKD_DEVICE void visit(TermTypes<Terms...>, const F& f) {
  (f(TermTag<Terms>()), ...);
}
template <class F>
HAKD_DEVICE void for_each(const F& f) {
  visit(AllTerms(), f);
}

// Asks the call, which has no terms but these: what others would keep of a pixel takes registers.
template <class List>
struct Any;
template <class... Terms>
struct Any<TermTypes<Terms...>> {
  static constexpr bool kKnown = false;
  template <class Term>
  HAKD_DEVICE static bool has(const Pass& p) {
    return may_have<Term>() && p.has[index_of<Term>];
  }
  template <class Term>
  HAKD_DEVICE static int32_t variant(const Pass& p) {
    return p.variant[index_of<Term>];
  }
  template <class Term>
  HAKD_FN static constexpr bool may_have() {
    return (std::is_same<Term, Terms>::value || ...);
  }
  template <class Term>
  static bool covers(int32_t) {
    return may_have<Term>();
  }
  HAKD_DEVICE static Needs needs(const Pass& p) { return p.needs; }
  HAKD_DEVICE static bool teacher(const Pass& p) { return p.teacher.source != Source::kNone; }
  HAKD_DEVICE static int32_t leader(const Pass& p, int32_t term) { return p.leader[term]; }
  HAKD_DEVICE static bool leads(const Pass& p, int32_t term) {
    return p.has[term] && p.leader[term] == term;
  }
};

using All = Any<AllTerms>;
using Usual = Any<TermTypes<CrossEntropyTerm, KdTerm, HeteroTerm, FeatureTerm>>;
using UsualPaper = Any<TermTypes<CrossEntropyTerm, KdTerm, PaperTerm, FeatureTerm>>;

// Known when the kernel is compiled: the variant of each term, in the order of AllTerms, or -1; the rest
// are not there. A call may have fewer of them, and terms without a gradient of their own have one together.
template <int32_t... kVariants>
struct Fixed {
  static constexpr bool kKnown = true;
  template <class Term>
  HAKD_FN static constexpr int32_t fixed() {
    const int32_t variants[] = {kVariants...};
    return index_of<Term> < static_cast<int>(sizeof...(kVariants)) ? variants[index_of<Term>] : -1;
  }
  template <class... Terms>
  HAKD_FN static constexpr Needs needs_of(TermTypes<Terms...>) {
    Needs n;
    ((n = n | (fixed<Terms>() >= 0 ? Terms::needs(fixed<Terms>()) : Needs())), ...);
    return n;
  }
  // Of each term four bits that say which one leads it, and 15 where it is not there.
  template <class... Terms>
  HAKD_FN static constexpr uint64_t leaders_of(TermTypes<Terms...>) {
    const bool there[] = {fixed<Terms>() >= 0 ...};
    const bool joins[] = {fixed<Terms>() >= 0 && !Terms::kOwnGradient...};
    uint64_t found = 0;
    int32_t first = 0;
    while (first < kTerms && !joins[first]) ++first;
    for (int k = 0; k < kTerms; ++k) {
      found |= static_cast<uint64_t>(!there[k] ? 15 : joins[k] ? first : k) << 4 * k;
    }
    return found;
  }
  static constexpr uint64_t kLeaders = leaders_of(AllTerms());
  static_assert(kTerms <= 15, "four bits a term");
  static constexpr Needs kNeeds = needs_of(AllTerms());
  static constexpr bool kTeacher = kNeeds.teacher;

  template <class Term>
  HAKD_FN static constexpr bool may_have() {
    return fixed<Term>() >= 0;
  }
  template <class Term>
  static bool covers(int32_t variant) {
    return fixed<Term>() == variant;
  }
  template <class Term>
  HAKD_DEVICE static constexpr bool has(const Pass&) {
    return may_have<Term>();
  }
  template <class Term>
  HAKD_DEVICE static constexpr int32_t variant(const Pass&) {
    return fixed<Term>();
  }
  HAKD_DEVICE static constexpr Needs needs(const Pass&) { return needs_of(AllTerms()); }
  HAKD_DEVICE static constexpr bool teacher(const Pass&) { return kTeacher; }
  // The first term whose gradient is made of the same x and y: where both go to one place, the
  // coefficients add.
  template <class Term, class... Terms>
  HAKD_FN static constexpr int32_t twin_of(TermTypes<Terms...>) {
    const int32_t shapes[] = {shape<Terms>()...};
    int32_t k = 0;
    while (shapes[k] != shape<Term>()) ++k;
    return k;
  }
  template <class Term>
  HAKD_FN static constexpr int32_t shape() {
    constexpr int32_t v = fixed<Term>();
    constexpr From x = Term::student(v), y = Term::other_from(v);
    const bool alone = v < 0 || Term::has_label(v) || x == From::kOwn || y == From::kOwn;
    return alone ? -1 - index_of<Term> : static_cast<int32_t>(x) * 16 + static_cast<int32_t>(y);
  }
  HAKD_FN static constexpr int32_t first() {
    int32_t k = 0;
    while (leader_of(k) == 15) ++k;
    return k;
  }
  HAKD_FN static constexpr int32_t leader_of(int32_t term) {
    return static_cast<int32_t>(kLeaders >> 4 * term & 15);
  }
  HAKD_DEVICE static constexpr int32_t leader(const Pass&, int32_t term) { return leader_of(term); }
  HAKD_DEVICE static constexpr bool leads(const Pass& p, int32_t term) {
    return leader(p, term) == term;
  }
};

//               ce                        kd                hetero
constexpr int32_t kPlainCe = CrossEntropyTerm::kPlain;
using Ce = Fixed<kPlainCe>;
using CeKd = Fixed<kPlainCe, KdTerm::kForward>;
using CeHetero = Fixed<kPlainCe, -1, HeteroTerm::kProbs>;
using CeKdHetero = Fixed<kPlainCe, KdTerm::kForward, HeteroTerm::kProbs>;

// Whether a kernel for these terms can run a call.
template <class Set, class... Terms>
bool covers(const Pass& p, TermTypes<Terms...>) {
  return ((!p.has[index_of<Terms>] || Set::template covers<Terms>(p.variant[index_of<Terms>])) &&
          ...);
}

template <class Set>
HAKD_DEVICE bool soft(const Pass& p) {
  return Set::needs(p).pair || Set::needs(p).student_total;
}

// --- numbers of the call, in the type of the arithmetic ----------------------------------------------

template <typename F>
struct Numbers {
  PassNumbers<F> pass;       // scale: log2(e) / T, or log2(e) where no T is used
  TermNumbers<F> terms;
  F to_logits;               // 1 / scale
  F hard_exponent;           // e at T = 1 is e to this power
  F term_scale[kTerms];      // of a term's gradient
};

template <class Set, typename F>
HAKD_DEVICE Numbers<F> numbers_of(const Pass& p) {
  Numbers<F> n;
  const bool softened = soft<Set>(p);
  const F t = static_cast<F>(p.temperature);
  const F classes = static_cast<F>(p.classes);
  n.pass = {t, F(1) / t, softened ? F(kLog2E) / t : F(kLog2E), classes, classes};
  n.terms.set(p.options, classes);
  n.to_logits = F(1) / n.pass.scale;
  n.hard_exponent = softened ? t : F(1);
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    n.term_scale[k] = static_cast<F>(p.weight[k]);
    if (p.grad_totals != nullptr && p.group[k] >= 0) {
      n.term_scale[k] = static_cast<F>(p.weight[k] * p.grad_totals[p.group[k]]);
    }
  }
  return n;
}

template <typename F>
HAKD_DEVICE F class_weight(const Pass& p, int32_t c) {
  return p.class_weight == nullptr ? F(1) : static_cast<const F*>(p.class_weight)[c];
}

// A class to read where the pixel has none.
HAKD_DEVICE int32_t class_or_0(const Pass& p, int32_t label) {
  return label < 0 || label >= p.classes ? 0 : label;
}

// --- sums --------------------------------------------------------------------------------------------

template <typename F>
HAKD_DEVICE Totals<F> no_totals() {
  Totals<F> t;
  t.student_total = t.teacher_total = t.student_others = t.teacher_others = F(0);
  t.difference = t.teacher_cross = t.student_self = F(0);
  t.weighted_z = t.teacher_at_top = F(0);
  return t;
}

// What follows from the sums over classes of a pixel. Of an invalid pixel anything: what comes of it
// is selected.
template <class Set, typename F>
HAKD_DEVICE void find_totals(const Pass& p, Totals<F>& t, F student_label, F teacher_label,
                             int32_t label) {
  const Needs needs = Set::needs(p);
  // Nobody can be asked but the teacher: reliability becomes 1 by a student that is never right.
  const bool unlabelled = label == p.classes;
  t.student_label = unlabelled ? F(-1e30) : student_label;
  t.teacher_label = unlabelled ? F(0) : teacher_label;
  t.label_weight = class_weight<F>(p, class_or_0(p, label));
  if (needs.student_nll) find_student_nll(t);
  if (needs.teacher_nll) find_teacher_nll(t);
  if (soft<Set>(p)) find_student_total(t);
  if (needs.pair) find_pair(t);
}

// Of a few pixels.
template <typename F>
struct Sums {
  F of_term[kTerms];
  F share[kShares];
  int32_t valid, bad;

  // Of the set's terms; the counts stay.
  template <class Set>
  HAKD_DEVICE void add(const Sums& more) {
    for_each([&](auto tag) {
      using Term = typename decltype(tag)::type;
      if (!Set::template may_have<Term>()) return;
      of_term[index_of<Term>] += more.of_term[index_of<Term>];
      if constexpr (Term::kHasShares) {
        share[share_index_of<Term>] += more.share[share_index_of<Term>];
      }
    });
  }
};

template <typename F>
HAKD_DEVICE Sums<F> no_sums() {
  Sums<F> sums;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) sums.of_term[k] = F(0);
#pragma unroll
  for (int k = 0; k < kShares; ++k) sums.share[k] = F(0);
  sums.valid = sums.bad = 0;
  return sums;
}

// Of all pixels of a thread, which may be a whole image: float would stop growing at 2^24.
struct ThreadSums {
  double of_term[kTerms] = {};
  double share[kShares] = {};
  int64_t valid = 0, bad = 0;

  template <class Set, typename F>
  HAKD_DEVICE void add(const Sums<F>& sums) {
    for_each([&](auto tag) {
      using Term = typename decltype(tag)::type;
      if (!Set::template may_have<Term>()) return;
      of_term[index_of<Term>] += static_cast<double>(sums.of_term[index_of<Term>]);
      if constexpr (Term::kHasShares) {
        share[share_index_of<Term>] += static_cast<double>(sums.share[share_index_of<Term>]);
      }
    });
    valid += sums.valid;
    bad += sums.bad;
  }
};

// --- maps ----------------------------------------------------------------------------------------

template <typename F>
HAKD_DEVICE void write_plane(const Pass& p, int32_t which, int32_t image, int32_t y, int32_t x,
                             bool valid, F value) {
  const int64_t plane = static_cast<int64_t>(p.label_height) * p.label_width;
  const int64_t at = (which * static_cast<int64_t>(p.batch) + image) * plane +
                     static_cast<int64_t>(y) * p.label_width + x;
  if (sizeof(F) == 8 && p.maps_are_float) {
    static_cast<float*>(p.maps_out)[at] = valid ? static_cast<float>(value) : 0.0f;
  } else {
    static_cast<F*>(p.maps_out)[at] = valid ? value : F(0);
  }
}

}  // namespace heteroakd::cuda
