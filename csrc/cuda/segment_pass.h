// Every term, for the pixels of a segment: the loops over classes with each pixel's exact maximum.
//
// This is the kernel for what has no faster one (docs/cuda.md says which calls those are), and for
// the pixels that the faster one hands over. Where all classes of a thread's pixels fit into shared
// memory they are interpolated once and held there, where nobody else looks (no barrier); otherwise
// each loop reads and interpolates the logits again. Loops:
//
//     maxima       and whether all logits are finite
//     statistics   sums over the classes of a pixel (`Totals`)
//     bounds, own  what the terms themselves bound and sum, where one does
//     gradients    and the sums that only values need
#pragma once

#include "pixel.h"
#include "segment.h"

namespace heteroakd::cuda {

// a = (z - m) scale with the exact maximum m; finite for huge and infinite logits.
template <typename F>
HAKD_DEVICE F exactly_scaled(F z, F m, F scale) {
  constexpr F largest = sizeof(F) == 8 ? F(1e300) : F(2e38);
  const F least = F(0) - largest / max(scale, F(1.4427));
  return max_or_nan(least, z - m) * scale;
}

// What a term knows of the pixels of a thread, from one loop over classes to the next.
template <class Term, typename F, int S>
struct TermState {
  typename Term::template Known<F> known[S];
  typename Term::template Own<F> own[S];
  First<F> bound[S];
  Coefficients<F> coefficients[S];
};
template <typename F, int S, class List>
struct TermStates;
template <typename F, int S, class... Terms>
struct TermStates<F, S, TermTypes<Terms...>> : TermState<Terms, F, S>... {};

// Whether a thread's logits are held in shared memory.
enum class Hold { kNever, kWherePossible, kAlways };

template <typename F, class Set, int S, Hold kHold>
class SegmentPass {
 public:
  HAKD_DEVICE SegmentPass(const Pass& pass, const Numbers<F>& numbers, int32_t image,
                          const Segment<F, S>& segment, int32_t cell_y, int32_t cell_x,
                          Held<F, S>* held, int32_t held_stride)
      : p(pass), n(numbers), at(segment), image_(image), held_(held), held_stride_(held_stride) {
    student_ = under(p, p.student, image, at, cell_y, cell_x);
    if (Set::teacher(p)) teacher_ = under(p, p.teacher, image, at, cell_y, cell_x);
  }

  // All lanes of the warp take part. rows: where gradients go unless the student lies on the label
  // grid.
  HAKD_DEVICE void run(const RowWriter<F>& rows, Sums<F>& sums) {
    find_maxima();
    Totals<F> t[S];
#pragma unroll
    for (int i = 0; i < S; ++i) t[i] = no_totals<F>();
    PassNumbers<F> pass = n.pass;
    if (soft<Set>(p) || Set::needs(p).student_nll) find_statistics(t, pass.weight_sum);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      find_totals<Set>(
          p, t[i],
          Set::needs(p).student_nll ? label_logit(p.student, student_, student_m_, i) : F(0),
          Set::needs(p).teacher_nll ? label_logit(p.teacher, teacher_, teacher_m_, i) : F(0),
          at.label[i]);
    }
    for_each([&](auto tag) {
      using Term = typename decltype(tag)::type;
      if (!Set::template has<Term>(p)) return;
#pragma unroll
      for (int i = 0; i < S; ++i) begin<Term>(t[i], i);
    });
    if (some([&](auto tag) { return bounds_apart<decltype(tag)>(); })) find_bounds();
    if (some([&](auto tag) { return Of<decltype(tag)>::has_loop(variant(tag)); })) find_own();
    bool late = false;  // whether there are sums that only values need
    for_each([&](auto tag) {
      using Term = typename decltype(tag)::type;
      if (!Set::template has<Term>(p)) return;
      late |= Term::has_value_loop(variant(tag));
      TermState<Term, F, S>& k = state<Term>();
#pragma unroll
      for (int i = 0; i < S; ++i) {
        k.coefficients[i] = pixel_of<Term, Set>(p, n, pass, t[i], k.known[i], k.own[i],
                                                at.label[i] >= 0, sums);
      }
    });
    if (p.gradients || late) gradients(rows);
    for_each([&](auto tag) {
      using Term = typename decltype(tag)::type;
      if (!Set::template has<Term>(p)) return;
      TermState<Term, F, S>& k = state<Term>();
#pragma unroll
      for (int i = 0; i < S; ++i) {
        if constexpr (Term::kHasValueLoop) {
          if (Term::has_value_loop(variant(tag))) {
            sums.of_term[index_of<Term>] +=
                at.label[i] >= 0 ? k.coefficients[i].value * k.own[i].sum : F(0);
          }
        }
        if constexpr (Term::kMapped) {
          if (p.maps && at.inside[i]) {
            write_maps(p, image_, at.y, at.x + i, at.label[i] >= 0, k.known[i].reliability,
                       k.known[i].discrepancy);
          }
        }
      }
    });
  }

 private:
  template <class Tag>
  using Of = typename Tag::type;

  template <class Term>
  HAKD_DEVICE TermState<Term, F, S>& state() {
    return static_cast<TermState<Term, F, S>&>(states_);
  }
  template <class Term>
  HAKD_DEVICE int32_t variant(TermTag<Term>) const {
    return Set::template variant<Term>(p);
  }
  // Whether a term of the pass is one that `f` says yes to.
  template <class Function>
  HAKD_DEVICE bool some(const Function& f) const {
    bool found = false;
    for_each([&](auto tag) {
      if (Set::template has<Of<decltype(tag)>>(p)) found |= f(tag);
    });
    return found;
  }
  // Whether its bounds are found in a loop of their own.
  template <class Tag>
  HAKD_DEVICE bool bounds_apart() const {
    return !Of<Tag>::kRescales && Of<Tag>::bounds(variant(Tag())) > 0;
  }

  // held: [C][models][threads], of which this thread's; null: nothing is held.
  HAKD_DEVICE bool holds() const {
    return kHold == Hold::kAlways || (kHold == Hold::kWherePossible && held_ != nullptr);
  }
  HAKD_DEVICE Held<F, S>& held(int32_t c, int m) const {
    return held_[(Set::teacher(p) ? 2 * c + m : c) * held_stride_];
  }
  HAKD_DEVICE void read_student(int32_t c, F (&z)[S]) const {
    if (!holds()) return read(p.student, student_, c, careful_, at.label, z);
    const Held<F, S> h = held(c, 0);
#pragma unroll
    for (int i = 0; i < S; ++i) z[i] = h.v[i];
  }
  HAKD_DEVICE void read_teacher(int32_t c, F (&z)[S]) const {
    if (!holds()) return read(p.teacher, teacher_, c, careful_, at.label, z);
    const Held<F, S> h = held(c, 1);
#pragma unroll
    for (int i = 0; i < S; ++i) z[i] = h.v[i];
  }
  HAKD_DEVICE void hold(int32_t c, int m, const F (&z)[S]) const {
    if (!holds()) return;
    Held<F, S> h;
#pragma unroll
    for (int i = 0; i < S; ++i) h.v[i] = z[i];
    held(c, m) = h;
  }
  HAKD_DEVICE F student_a(F z, int i) const { return exactly_scaled(z, student_m_[i], n.pass.scale); }
  HAKD_DEVICE F teacher_a(F z, int i) const { return exactly_scaled(z, teacher_m_[i], n.pass.scale); }

  // e at T = 1 from a and e at T.
  HAKD_DEVICE F hard(F a, F e) const {
    const int32_t power = soft<Set>(p) ? p.power : 1;
    if (power == 0) return exp2(a * n.hard_exponent);
    if (power == 1) return e;
    return power == 2 ? e * e : (e * e) * (e * e);
  }

  HAKD_DEVICE void look_at(int32_t c, int m, const F (&z)[S], F (&maximum)[S], F& trace) const {
    constexpr F much = sizeof(F) == 8 ? F(1e100) : F(1e8);  // 1e30 and more is huge
    hold(c, m, z);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      maximum[i] = max_or_nan(maximum[i], z[i]);
      trace = fma(z[i], much, trace);
    }
  }

  // All classes of one model, the plain way: the only loops that read logits which are held, one for
  // each way they can lie.
  template <typename E>
  HAKD_DEVICE void sweep_cells(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                               F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const int64_t down = u.bottom - u.top;
    const char* at_left = u.top + u.left[0];
    const char* at_right = u.top + u.right[0];
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      const F left = between(element_at<E, F>(at_left, is_half),
                             element_at<E, F>(at_left + down, is_half), u.fraction_y);
      const F right = between(element_at<E, F>(at_right, is_half),
                              element_at<E, F>(at_right + down, is_half), u.fraction_y);
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) z[i] = between(left, right, u.fraction_x[i]);
      look_at(c, m, z, maximum, trace);
      at_left += step;
      at_right += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep_gathered(const Logits& model, const Under<F, S>& u, int m,
                                  F (&maximum)[S], F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const char* top = u.top;
    const char* bottom = u.bottom;
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const F left = between(element_at<E, F>(top + u.left[i], is_half),
                               element_at<E, F>(bottom + u.left[i], is_half), u.fraction_y);
        const F right = between(element_at<E, F>(top + u.right[i], is_half),
                                element_at<E, F>(bottom + u.right[i], is_half), u.fraction_y);
        z[i] = between(left, right, u.fraction_x[i]);
      }
      look_at(c, m, z, maximum, trace);
      top += step;
      bottom += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep_labels(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                                F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const char* row = u.top;
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) z[i] = element_at<E, F>(row + u.left[i], is_half);
      look_at(c, m, z, maximum, trace);
      row += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                         F& trace) const {
    switch (model.source) {
      case Source::kCells: sweep_cells<E>(model, u, m, maximum, trace); break;
      case Source::kLabels: sweep_labels<E>(model, u, m, maximum, trace); break;
      default: sweep_gathered<E>(model, u, m, maximum, trace);
    }
  }

  HAKD_DEVICE void find_maximum(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                                F& trace) const {
#pragma unroll
    for (int i = 0; i < S; ++i) maximum[i] = F(-INFINITY);
    const bool wide = model.dtype == Dtype::kDouble;
    if (kHold == Hold::kNever || careful_ || (wide && sizeof(F) == 4)) {
#pragma unroll 1
      for (int32_t c = 0; c < p.classes; ++c) {
        F z[S];
        read(model, u, c, careful_, at.label, z);
        look_at(c, m, z, maximum, trace);
      }
    } else if (wide && sizeof(F) == 8) {
      sweep<double>(model, u, m, maximum, trace);
    } else if (model.dtype == Dtype::kFloat) {
      sweep<float>(model, u, m, maximum, trace);
    } else {
      sweep<uint16_t>(model, u, m, maximum, trace);
    }
  }

  HAKD_DEVICE bool maxima_are_finite() {
    F trace = F(0);
    find_maximum(p.student, student_, 0, student_m_, trace);
    if (Set::teacher(p)) find_maximum(p.teacher, teacher_, 1, teacher_m_, trace);
    return is_finite(trace);
  }

  HAKD_DEVICE void find_maxima() {
    careful_ = false;
    if (__any_sync(kAllLanes, !maxima_are_finite())) {
      careful_ = true;
      maxima_are_finite();
    }
  }

  HAKD_DEVICE void find_statistics(Totals<F> (&t)[S], F& weight_sum) const {
    const Needs needs = Set::needs(p);
    F weights = F(0);
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      if (needs.pair) read_teacher(c, z_t);
      const F w = needs.weighted_z ? class_weight<F>(p, c) : F(0);
      weights += w;
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const bool is_label = at.label[i] == c;
        const F a_s = student_a(z_s[i], i);
        const F e_s = exp2(a_s);
        t[i].student_total += e_s;
        const F h_s = hard(a_s, e_s);
        t[i].student_others += is_label ? F(0) : h_s;
        if (needs.weighted_z) t[i].weighted_z = fma(w, a_s, t[i].weighted_z);
        if (!needs.pair) continue;
        const F a_t = teacher_a(z_t[i], i);
        const F e_t = exp2(a_t);
        t[i].teacher_total += e_t;
        const F h_t = hard(a_t, e_t);
        t[i].teacher_others += is_label ? F(0) : h_t;
        t[i].difference = fma(e_t, a_t - a_s, t[i].difference);
        if (needs.teacher_at_top && a_s == F(0)) t[i].teacher_at_top = a_t;
      }
    }
    if (needs.weighted_z) {
      weight_sum = weights;
#pragma unroll
      for (int i = 0; i < S; ++i) t[i].weighted_z *= n.to_logits;
    }
  }

  // z_label - m. -inf stays -inf: the loss of a label on a masked class is infinite.
  HAKD_DEVICE F label_logit(const Logits& model, const Under<F, S>& u, const F (&m)[S], int i) const {
    if (at.label[i] < 0) return F(0);
    return read_pixel_carefully(model, u, at.label[i], i) - m[i];
  }

  template <class Term>
  HAKD_DEVICE void begin(const Totals<F>& t, int i) {
    constexpr F lowest = sizeof(F) == 8 ? F(-1e300) : F(-2e38);
    TermState<Term, F, S>& k = state<Term>();
    const int32_t v = variant(TermTag<Term>());
    k.known[i] = Term::begin(v, n.terms.template of<Term>(), n.pass, t);
    k.own[i] = {};
    Term::start(v, k.known[i], t, k.own[i]);
    k.bound[i] = {lowest, lowest};
  }

  // Class c of pixel i; what no term reads is compiled away.
  HAKD_DEVICE Class<F, bool> class_of(int32_t c, F z_s, F z_t, int i) const {
    Class<F, bool> k{};
    k.student_z = z_s;
    k.teacher_z = z_t;
    k.student_a = student_a(z_s, i);
    k.student_e = exp2(k.student_a);
    if (Set::teacher(p)) {
      k.teacher_a = teacher_a(z_t, i);
      k.teacher_e = exp2(k.teacher_a);
    }
    k.is_label = at.label[i] == c;
    return k;
  }

  // f(tag, class, i) for every class, pixel and term.
  template <class Function>
  HAKD_DEVICE void for_each_class(const Function& f) {
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      if (Set::teacher(p)) read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        Class<F, bool> k = class_of(c, z_s[i], Set::teacher(p) ? z_t[i] : F(0), i);
        for_each([&](auto tag) {
          if (Set::template has<Of<decltype(tag)>>(p)) f(tag, c, k, i);
        });
      }
    }
  }

  template <class Term>
  HAKD_DEVICE First<F> first(const Class<F, bool>& k, typename Term::template Known<F>& known) const {
    return Term::first(variant(TermTag<Term>()), n.terms.template of<Term>(), n.pass, known, k);
  }

  HAKD_DEVICE void find_bounds() {
    for_each_class([&](auto tag, int32_t, const Class<F, bool>& k, int i) {
      using Term = Of<decltype(tag)>;
      if (!bounds_apart<decltype(tag)>()) return;
      const First<F> found = first<Term>(k, state<Term>().known[i]);
      First<F>& bound = state<Term>().bound[i];
#pragma unroll
      for (int j = 0; j < Term::kFirsts; ++j) {
        bound.v[j] = max_or_nan(bound.v[j], found.v[j]);
      }
    });
  }

  // `other` of a term that has a loop, added to its sums; x_c and y_c.
  template <class Term>
  HAKD_DEVICE Pair<F> add_other(const Class<F, bool>& k, int i,
                                typename Term::template Known<F>& known,
                                typename Term::template Own<F>& own) {
    const int32_t v = variant(TermTag<Term>());
    First<F> relative{};
    if constexpr (Term::kFirsts > 0) {
      if (Term::bounds(v) > 0 || Term::spaces(v) > 0 || Term::kRescales) relative = first<Term>(k, known);
      if (Term::bounds(v) > 0) {
#pragma unroll
        for (int j = 0; j < Term::kFirsts; ++j) relative.v[j] -= state<Term>().bound[i].v[j];
      }
    }
    return Term::other(v, n.terms.template of<Term>(), n.pass, known, k, relative, own);
  }

  HAKD_DEVICE void find_own() {
    for_each_class([&](auto tag, int32_t, const Class<F, bool>& k, int i) {
      using Term = Of<decltype(tag)>;
      const int32_t v = variant(tag);
      if (!Term::has_loop(v)) return;
      TermState<Term, F, S>& s = state<Term>();
      if constexpr (Term::kRescales) {
        if (Term::bounds(v) > 0) {
          const First<F> found = first<Term>(k, s.known[i]);
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
      add_other<Term>(k, i, s.known[i], s.own[i]);
    });
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
                   static_cast<const F*>(p.space_inverse[index_of<Term>])[place];
      k.space_log[j] = static_cast<const F*>(p.space_log[index_of<Term>])[place];
    }
  }

  // The gradient of class c at pixel i; adds to the sums of a value loop.
  template <class Term>
  HAKD_DEVICE F gradient(int32_t c, const Class<F, bool>& known, int i) {
    const int32_t v = variant(TermTag<Term>());
    TermState<Term, F, S>& s = state<Term>();
    const From from_x = Term::student(v), from_y = Term::other_from(v);
    const bool own = from_x == From::kOwn || from_y == From::kOwn;
    Pair<F> pair{F(0), F(0)};
    Class<F, bool> k = known;
    if constexpr (Term::kFirsts > 0) find_shares<Term>(c, k, i);
    if (Term::has_value_loop(v)) {
      pair = add_other<Term>(k, i, s.known[i], s.own[i]);
    } else if (own) {
      typename Term::template Known<F> unused_known = s.known[i];
      typename Term::template Own<F> unused{};
      pair = add_other<Term>(k, i, unused_known, unused);
    }
    const Coefficients<F>& a = s.coefficients[i];
    F g = F(0);
    if (from_x != From::kNone) g = a.student * source(from_x, k, pair.x, c);
    if (from_y != From::kNone) g = fnma(a.other, source(from_y, k, pair.y, c), g);
    if (Term::has_label(v) && k.is_label) g = a.label;
    // an invalid pixel has no bound over space, and may be infinite
    return Term::spaces(v) > 0 && at.label[i] < 0 ? F(0) : g;
  }

  HAKD_DEVICE F source(From from, const Class<F, bool>& k, F own, int32_t c) const {
    switch (from) {
      case From::kStudentHard: return hard(k.student_a, k.student_e);
      case From::kStudent: return k.student_e;
      case From::kTeacher: return k.teacher_e;
      case From::kStudentZ: return k.student_z;
      case From::kTeacherZ: return k.teacher_z;
      case From::kClassWeight: return class_weight<F>(p, c);
      default: return own;
    }
  }

  // Where the sum of the terms that `term` leads goes; -1: nowhere.
  HAKD_DEVICE int32_t gradient_of(int32_t term) const {
    int32_t found = -1;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (Set::leader(p, k) == term && p.gradient_of[k] > found) found = p.gradient_of[k];
    }
    return found;
  }

  HAKD_DEVICE void gradients(const RowWriter<F>& rows) {
    const bool on_labels = p.student.source == Source::kLabels;
    const bool to_rows = p.gradients && !on_labels;
    // The first of the terms that share a gradient writes the sum.
    RowCursor<F> cursor[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (Set::leads(p, k)) cursor[k] = {rows, to_rows ? gradient_of(k) : -1, 0};
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S], g[kTerms][S];  // of each leader
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (Set::leads(p, k)) cursor[k].begin();
      }
      read_student(c, z_s);
      if (Set::teacher(p)) read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const Class<F, bool> known = class_of(c, z_s[i], Set::teacher(p) ? z_t[i] : F(0), i);
        for_each([&](auto tag) {
          using Term = Of<decltype(tag)>;
          constexpr int k = index_of<Term>;
          if (!Set::template has<Term>(p)) return;
          g[k][i] = gradient<Term>(c, known, i);
#pragma unroll
          for (int j = 0; j < k; ++j) {
            if (Set::leader(p, k) == j) g[j][i] += g[k][i];
          }
        });
      }
      if (!p.gradients) continue;
      if (on_labels) {
        const int64_t place = image_ * p.gradient.batch_stride + c * p.gradient.class_stride +
                              at.y * p.gradient.row_stride;
#pragma unroll
        for (int i = 0; i < S; ++i) {
          if (!at.inside[i]) continue;
          F all = F(0);
          bool some = false;
#pragma unroll
          for (int k = 0; k < kTerms; ++k) {
            if (!Set::leads(p, k)) continue;
            all = some ? all + g[k][i] : g[k][i];
            some = true;
          }
          store_logit(const_cast<void*>(p.gradient.data), p.gradient.dtype,
                      place + (at.x + i) * p.gradient.column_stride, all);
        }
        continue;
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (!Set::leads(p, k)) continue;
        F sum = F(0), right = F(0);
#pragma unroll
        for (int i = 0; i < S; ++i) {
          sum += g[k][i];
          right = fma(at.fraction_x[i], g[k][i], right);
        }
        const F left = sum - right;
        const F bottom_left = at.fraction_y * left;
        const F bottom_right = at.fraction_y * right;
        cursor[k].add({left - bottom_left, right - bottom_right, bottom_left, bottom_right});
      }
    }
  }

  const Pass& p;
  const Numbers<F>& n;
  const Segment<F, S>& at;
  int32_t image_;
  Held<F, S>* held_;
  int32_t held_stride_;
  bool careful_ = false;
  Under<F, S> student_, teacher_;
  F student_m_[S], teacher_m_[S];
  TermStates<F, S, AllTerms> states_;
};

}  // namespace heteroakd::cuda
