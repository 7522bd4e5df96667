// What every pass does with a class of a pixel, wherever its logits come from: sums of exponentials
// (`add_class`), and the terms, with what they know of the pixels of a thread (`PixelTerms`). A pass
// owns its loops over classes, and where gradients go.
#pragma once

#include "pixel.h"

namespace heteroakd::cuda {

// Of e at T the power that is e at T = 1, where it is 1 or 2, for loops that are compiled for it; 0:
// any, by exponentials of their own.
template <class Set>
HAKD_DEVICE int32_t fixed_power(const Pass& p) {
  if (!soft<Set>(p)) return 1;
  return p.power == 1 || p.power == 2 ? p.power : 0;
}

// e at T = 1 from a and e at T.
template <typename F>
HAKD_DEVICE F hard_exponential(int32_t power, F exponent, F a, F e) {
  if (power == 0) return exp2(a * exponent);
  if (power == 1) return e;
  return power == 2 ? e * e : (e * e) * (e * e);
}

// Adds a class to the sums of a pixel. hard(m): e at T = 1 of model m; difference: a_t - a_s;
// weight: w_c.
template <class Set, typename F, class Hard>
HAKD_DEVICE void add_class(const Pass& p, const Class<F, bool>& c, const Hard& hard, F difference,
                           F weight, Totals<F>& t) {
  const Needs needs = Set::needs(p);
  t.student_total += c.student_e;
  if (needs.weighted_z) t.weighted_z = fma(weight, c.student_a, t.weighted_z);
  if (needs.pair) {
    t.teacher_total += c.teacher_e;
    t.difference = fma(c.teacher_e, difference, t.difference);
    if (needs.teacher_at_top && c.student_a == F(0)) t.teacher_at_top = c.teacher_a;
  }
  const F student = hard(0);
  if (!c.is_label) t.student_others += student;
  if (!needs.pair) return;
  const F teacher = hard(1);
  if (!c.is_label) t.teacher_others += teacher;
}

// What a term knows of the pixels of a thread, from one loop over classes to the next.
template <class Term, typename F, int N>
struct TermState {
  typename Term::template Known<F> known[N];
  typename Term::template Own<F> own[N];
  First<F> bound[N];
  Coefficients<F> coefficients[N];
};
template <typename F, int N, class List>
struct TermStates;
template <typename F, int N, class... Terms>
struct TermStates<F, N, TermTypes<Terms...>> : TermState<Terms, F, N>... {};

// The terms of a kernel at N pixels of a thread. kOne: all gradients go to one place, and the kernel's
// terms are known.
template <typename F, class Set, int N, bool kOne = false>
class PixelTerms {
 public:
  F weight_sum;  // sum_c w_c, where a term needs it

  HAKD_DEVICE PixelTerms(const Pass& pass, const Numbers<F>& numbers, int32_t image)
      : weight_sum(numbers.pass.weight_sum), p(pass), n(numbers), image_(image) {}

  template <class Term>
  HAKD_DEVICE TermState<Term, F, N>& state() {
    return static_cast<TermState<Term, F, N>&>(states_);
  }
  template <class Term>
  HAKD_DEVICE int32_t variant(TermTag<Term>) const {
    return Set::template variant<Term>(p);
  }
  // f(tag) for every term of the kernel that the call has.
  template <class Function>
  HAKD_DEVICE void for_each_here(const Function& f) const {
    for_each([&](auto tag) {
      if (Set::template has<Of<decltype(tag)>>(p)) f(tag);
    });
  }
  // Whether a term of the pass is one that `f` says yes to.
  template <class Function>
  HAKD_DEVICE bool some(const Function& f) const {
    bool found = false;
    for_each_here([&](auto tag) { found |= f(tag); });
    return found;
  }

  // Of a term over classes: the numbers of class c.
  template <class Term>
  HAKD_DEVICE void find_numbers(int32_t c, Class<F, bool>& k) const {
    if constexpr (Term::kTallies > 0) {
      k.space[0] = static_cast<const F*>(p.space_shift[index_of<Term>])[c];
      k.space[1] = static_cast<const F*>(p.space_inverse[index_of<Term>])[c];
    }
  }

  // When the totals of pixel i are known.
  HAKD_DEVICE void begin(const Totals<F>& t, int i) {
    constexpr F lowest = sizeof(F) == 8 ? F(-1e300) : F(-2e38);
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      TermState<Term, F, N>& k = state<Term>();
      k.known[i] = Term::begin(variant(tag), n.terms.template of<Term>(), n.pass, t);
      k.own[i] = {};  // without Term::start: loops have a_s at hand
      k.bound[i] = {lowest, lowest};
    });
  }

  // `first` of a term raises its bounds.
  template <class Term>
  HAKD_DEVICE void add_first(const Class<F, bool>& c, int i) {
    const First<F> found = first<Term>(c, state<Term>().known[i]);
    First<F>& bound = state<Term>().bound[i];
#pragma unroll
    for (int j = 0; j < Term::kFirsts; ++j) bound.v[j] = max_or_nan(bound.v[j], found.v[j]);
  }

  // The loop before that of a term's own, and what it knows then.
  template <class Term>
  HAKD_DEVICE void gather(const Class<F, bool>& c, int i) {
    if constexpr (Term::kGathers) {
      Term::gather(variant(TermTag<Term>()), n.terms.template of<Term>(), n.pass, c,
                   state<Term>().own[i]);
    }
  }
  HAKD_DEVICE void learn(int i) {
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      if constexpr (Term::kGathers) {
        TermState<Term, F, N>& k = state<Term>();
        Term::learn(variant(tag), n.terms.template of<Term>(), n.pass, k.known[i], k.own[i]);
        k.own[i] = {};
      }
    });
  }

  // The loop of a term's own: sums of `other`, which follow its bounds where these rise as it goes.
  template <class Term>
  HAKD_DEVICE void add_own(const Class<F, bool>& c, int i) {
    const int32_t v = variant(TermTag<Term>());
    TermState<Term, F, N>& s = state<Term>();
    if constexpr (Term::kRescales) {
      if (Term::bounds(v) > 0) {
        const First<F> found = first<Term>(c, s.known[i]);
        F drop[kMostFirsts];
#pragma unroll
        for (int j = 0; j < Term::kFirsts; ++j) {
          const F now = max_or_nan(s.bound[i].v[j], found.v[j]);
          drop[j] = s.bound[i].v[j] - now;
          s.bound[i].v[j] = now;
        }
        Term::rescale(v, n.pass, s.own[i], drop);
      }
    }
    add_other<Term>(c, i, s.known[i], s.own[i]);
  }

  // Adds values (but for those of value loops) and shares of pixel i to the sums; its coefficients
  // are 0 where a term does not count it; with kOne also of terms that the call lacks, of which nothing may come
  // through, not even times 0.
  HAKD_DEVICE void find_coefficients(const Totals<F>& t, int i, int32_t label, int32_t y, int32_t x,
                                     Sums<F>& sums) {
    const bool valid = label >= 0;
    weight_[i] = F(1);
    if (p.pixel_weight != nullptr && valid) {
      weight_[i] = weight_at<F>(p, place_of(p, image_, y, x));
    }
    PassNumbers<F> pass = n.pass;
    pass.weight_sum = weight_sum;
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      constexpr int k = index_of<Term>;
      TermState<Term, F, N>& s = state<Term>();
      if constexpr (Term::kGathers) {
        Term::close(variant(tag), n.terms.template of<Term>(), pass, s.known[i], s.own[i]);
      }
      Coefficients<F>& c = s.coefficients[i];
      const F weight = Term::spaces(variant(tag)) == 0 ? weight_[i] : F(1);  // of those, in the shares
      c = Term::pixel(variant(tag), n.terms.template of<Term>(), pass, t, s.known[i], s.own[i],
                      n.term_scale[k] * weight);
      const bool labelled = !Term::kNeedsLabel || label < p.classes;
      const bool counts = valid && labelled && (!kOne || p.has[k]);
      c.value = counts ? weight * c.value : F(0);
      c.student = counts ? c.student : F(0);
      c.other = counts ? c.other : F(0);
      c.label = counts ? c.label : F(0);
      if (!Term::has_value_loop(variant(tag))) sums.of_term[k] += c.value;
      if constexpr (Term::kHasShares) sums.share[share_index_of<Term>] += counts ? weight * c.share : F(0);
      if constexpr (kOne) {
        for_each([&](auto other) {
          if (!joins<Term>() || index_of<Of<decltype(other)>> != twin<Term>()) return;
          state<Of<decltype(other)>>().coefficients[i].student += c.student;
          state<Of<decltype(other)>>().coefficients[i].other += c.other;
        });
      }
    });
  }

  // The maps, as soon as they can be: what they show takes registers.
  HAKD_DEVICE void write(int i, bool valid, bool inside, int32_t y, int32_t x) {
    if (!p.maps || !inside) return;
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      if constexpr (Term::kMapped) {
        const typename Term::template Known<F>& known = state<Term>().known[i];
        write_plane(p, 0, image_, y, x, valid, known.reliability);
        write_plane(p, 1, image_, y, x, valid, known.discrepancy);
      }
    });
  }

  // Whether there are sums over classes that only values need.
  HAKD_DEVICE bool values_late() const {
    return some([&](auto tag) {
      using Term = Of<decltype(tag)>;
      return Term::has_value_loop(variant(tag)) && p.asked[index_of<Term>];
    });
  }

  // The gradients of class c at pixel i, each added to that of the term that leads it (kOne: of the
  // first); sums of value loops. student_hard: e at T = 1.
  template <class AnyClass>
  HAKD_DEVICE void find_gradients(int32_t c, const AnyClass& k, F student_hard, int i,
                                  bool valid, F (&g)[kTerms]) {
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      constexpr int t = index_of<Term>;
      if constexpr (Set::kKnown) {
        constexpr int leader = kOne ? Set::first() : Set::leader_of(t);
        const F now = gradient<Term>(c, k, student_hard, i, valid, leader != t, g[leader]);
        if (!joins<Term>()) g[leader] = now;
      } else {
        g[t] = gradient<Term>(c, k, student_hard, i, valid, false, F(0));
#pragma unroll
        for (int j = 0; j < t; ++j) {
          if (Set::leader(p, t) == j) g[j] += g[t];
        }
      }
    });
  }

  // The values of value loops, which come last.
  HAKD_DEVICE void finish(int i, bool valid, Sums<F>& sums) {
    for_each_here([&](auto tag) {
      using Term = Of<decltype(tag)>;
      const TermState<Term, F, N>& k = state<Term>();
      if constexpr (Term::kHasValueLoop) {
        if (Term::has_value_loop(variant(tag))) {
          sums.of_term[index_of<Term>] += valid ? k.coefficients[i].value * k.own[i].sum : F(0);
        }
      }
    });
  }

 private:
  template <class Tag>
  using Of = typename Tag::type;

  template <class Term>
  HAKD_FN static constexpr int32_t twin() {
    if constexpr (kOne) return Set::template twin_of<Term>(AllTerms());
    return index_of<Term>;
  }
  // Whether its coefficients were added to those of a term before it.
  template <class Term>
  HAKD_FN static constexpr bool joins() {
    return twin<Term>() != index_of<Term>;
  }

  template <class Term>
  HAKD_DEVICE First<F> first(const Class<F, bool>& c, typename Term::template Known<F>& known) const {
    return Term::first(variant(TermTag<Term>()), n.terms.template of<Term>(), n.pass, known, c);
  }

  // `other` of a term that has a loop, added to its sums; x_c and y_c.
  template <class Term, class AnyClass>
  HAKD_DEVICE Pair<F> add_other(const AnyClass& c, int i, typename Term::template Known<F>& known,
                                typename Term::template Own<F>& own) {
    const int32_t v = variant(TermTag<Term>());
    First<F> relative{};
    if constexpr (Term::kFirsts > 0) {
      if (Term::bounds(v) > 0 || Term::spaces(v) > 0 || Term::kRescales) {
        relative = first<Term>(c, known);
      }
      if (Term::bounds(v) > 0) {
#pragma unroll
        for (int j = 0; j < Term::kFirsts; ++j) relative.v[j] -= state<Term>().bound[i].v[j];
      }
    }
    return Term::other(v, n.terms.template of<Term>(), n.pass, known, c, relative, own);
  }

  // A pixel's share of a softmax over space.
  template <class Term>
  HAKD_DEVICE void find_shares(int32_t c, Class<F, bool>& k, int i) {
    const int32_t v = variant(TermTag<Term>());
    if (Term::spaces(v) == 0) return;
    typename Term::template Known<F> unused = state<Term>().known[i];
    const First<F> found = first<Term>(k, unused);
#pragma unroll
    for (int j = 0; j < Term::kFirsts; ++j) {
      if (j >= Term::spaces(v)) continue;
      const int64_t place = (static_cast<int64_t>(j) * p.batch + image_) * p.classes + c;
      k.space[j] = exp2((found.v[j] - static_cast<const F*>(p.space_shift[index_of<Term>])[place]) *
                        F(kLog2E)) *
                   (weight_[i] * static_cast<const F*>(p.space_inverse[index_of<Term>])[place]);
      k.space_log[j] = static_cast<const F*>(p.space_log[index_of<Term>])[place];
    }
  }

  // What `before` becomes, where the term joins another's gradient.
  template <class Term, class AnyClass>
  HAKD_DEVICE F gradient(int32_t c, const AnyClass& known, F student_hard, int i, bool valid,
                         bool joins, F before) {
    const int32_t v = variant(TermTag<Term>());
    TermState<Term, F, N>& s = state<Term>();
    const From from_x = Term::student(v), from_y = Term::other_from(v);
    const bool own = from_x == From::kOwn || from_y == From::kOwn;
    Pair<F> pair{F(0), F(0)};
    AnyClass k = known;
    if constexpr (Term::kFirsts > 0) find_shares<Term>(c, k, i);
    find_numbers<Term>(c, k);
    if (Term::has_value_loop(v)) {
      pair = add_other<Term>(k, i, s.known[i], s.own[i]);
    } else if (own) {
      typename Term::template Known<F> unused_known = s.known[i];
      typename Term::template Own<F> unused{};
      pair = add_other<Term>(k, i, unused_known, unused);
    }
    const Coefficients<F>& a = s.coefficients[i];
    // of what may be replaced as a whole the sum comes last
    const bool apart = Term::has_label(v) || Term::spaces(v) > 0;
    F g = apart || !joins ? F(0) : before;
    if (from_x != From::kNone) {
      const F x = source(from_x, k, student_hard, pair.x, c);
      g = apart || !joins ? a.student * x : fma(a.student, x, g);
    }
    if (from_y != From::kNone) g = fnma(a.other, source(from_y, k, student_hard, pair.y, c), g);
    if (Term::has_label(v) && k.is_label) g = a.label;
    // an invalid pixel has no bound over space, and may be infinite
    if (Term::spaces(v) > 0 && !valid) g = F(0);
    return apart && joins ? before + g : g;
  }

  HAKD_DEVICE F source(From from, const Class<F, bool>& k, F student_hard, F own, int32_t c) const {
    switch (from) {
      case From::kStudentHard: return student_hard;
      case From::kStudent: return k.student_e;
      case From::kTeacher: return k.teacher_e;
      case From::kStudentZ: return k.student_z;
      case From::kTeacherZ: return k.teacher_z;
      case From::kClassWeight: return class_weight<F>(p, c);
      default: return own;
    }
  }

  const Pass& p;
  const Numbers<F>& n;
  int32_t image_;
  F weight_[N];
  TermStates<F, N, AllTerms> states_;
};

// Where the sum of the terms that `term` leads goes; -1: nowhere.
template <class Set>
HAKD_DEVICE int32_t gradient_of(const Pass& p, int32_t term) {
  int32_t found = -1;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (Set::leader(p, k) == term && p.gradient_of[k] > found) found = p.gradient_of[k];
  }
  return found;
}

}  // namespace heteroakd::cuda
