// All terms, in one place: what loops over them.
#pragma once

#include "ce.h"
#include "cwd.h"
#include "dice.h"
#include "dkd.h"
#include "feature.h"
#include "focal.h"
#include "hetero.h"
#include "kd.h"
#include "lskd.h"
#include "ofa.h"
#include "paper.h"
#include "tversky.h"

namespace heteroakd {

template <class... Terms>
struct TermTypes {
  static constexpr int kCount = sizeof...(Terms);
};

// The index of a term here is the kernels'; `kPublicIndex` has that in terms.TERMS, where one class may
// stand for several terms of the kernels (`takes` tells which) and `kTeacherCe` for cross entropy
// in the pass over the teacher's logits.
using AllTerms = TermTypes<CrossEntropyTerm, KdTerm, HeteroTerm, PaperTerm, FeatureTerm,
                           CwdTerm, DkdTerm, FocalTerm, OfaTerm, DiceTerm, TverskyTerm,
                           LskdTerm>;
constexpr int kTerms = AllTerms::kCount;
constexpr int64_t kPublicIndex[kTerms] = {0, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 2};
constexpr int64_t kTeacherCe = 1, kPublicTerms = 11;
constexpr int kMostGradients = kPublicTerms - 1;  // of the student's logits

constexpr int kMostFirsts = 2;

template <class Term>
struct TermTag {
  using type = Term;
};

namespace detail {
template <class F, class... Terms>
HAKD_HOST_FN void visit(TermTypes<Terms...>, const F& f) {
  int k = 0;
  (f(TermTag<Terms>(), k++), ...);
}
template <class... Terms>
HAKD_FN constexpr int count_shares(TermTypes<Terms...>, int terms) {
  const bool has[] = {Terms::kHasShares...};
  int found = 0;
  for (int k = 0; k < terms; ++k) found += has[k];
  return found;
}
template <class Wanted, class... Terms>
HAKD_FN constexpr int find(TermTypes<Terms...>) {
  const bool same[] = {std::is_same<Wanted, Terms>::value...};
  int k = 0;
  while (!same[k]) ++k;
  return k;
}
}  // namespace detail

// f(TermTag<Term>, index) for every term.
template <class F>
HAKD_HOST_FN void for_each_term(const F& f) {
  detail::visit(AllTerms(), f);
}

template <class Term>
constexpr int index_of = detail::find<Term>(AllTerms());

// Terms with denominators of their own, and the index of a term among them.
constexpr int kShares = detail::count_shares(AllTerms(), kTerms);
template <class Term>
constexpr int share_index_of = detail::count_shares(AllTerms(), index_of<Term>);

// f(std::integral_constant<int32_t, variant>).
template <class Term, int32_t kFirst = 0, class F>
HAKD_HOST_FN void with_variant(int32_t variant, const F& f) {
  if constexpr (kFirst < Term::kVariants) {
    if (variant == kFirst) {
      f(std::integral_constant<int32_t, kFirst>());
    } else {
      with_variant<Term, kFirst + 1>(variant, f);
    }
  }
}

// The numbers of every term, in the type of the arithmetic.
template <class Term, typename S>
struct NumbersOf {
  typename Term::template Numbers<S> numbers;
};
template <typename S, class List>
struct AllNumbers;
template <typename S, class... Terms>
struct AllNumbers<S, TermTypes<Terms...>> : NumbersOf<Terms, S>... {
  template <class Term>
  HAKD_FN const typename Term::template Numbers<S>& of() const {
    return static_cast<const NumbersOf<Term, S>&>(*this).numbers;
  }
  HAKD_FN void set(const Options* options, S classes) {
    ((NumbersOf<Terms, S>::numbers =
          Terms::template numbers<S>(options[index_of<Terms>], classes)),
     ...);
  }
};
template <typename S>
using TermNumbers = AllNumbers<S, AllTerms>;

}  // namespace heteroakd
