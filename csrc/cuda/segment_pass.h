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

#include "pixel_terms.h"
#include "segment.h"
#include "warp_sums.h"

namespace heteroakd::cuda {

// a = (z - m) scale with the exact maximum m; finite for huge and infinite logits.
template <typename F>
HAKD_DEVICE F exactly_scaled(F z, F m, F scale) {
  constexpr F largest = sizeof(F) == 8 ? F(1e300) : F(2e38);
  const F least = F(0) - largest / max(scale, F(1.4427));
  return max_or_nan(least, z - m) * scale;
}

// Whether a thread's logits are held in shared memory.
enum class Hold { kNever, kWherePossible, kAlways };

template <typename F, class Set, int S, Hold kHold>
class SegmentPass {
 public:
  HAKD_DEVICE SegmentPass(const Pass& pass, const Numbers<F>& numbers, int32_t image,
                          const Segment<F, S>& segment, int32_t cell_y, int32_t cell_x,
                          Held<F, S>* held, int32_t held_stride)
      : p(pass),
        n(numbers),
        at(segment),
        image_(image),
        held_(held),
        held_stride_(held_stride),
        terms_(pass, numbers, image) {
    student_ = under(p, p.student, image, at, cell_y, cell_x);
    if (Set::teacher(p)) teacher_ = under(p, p.teacher, image, at, cell_y, cell_x);
  }

  // All lanes of the warp take part. rows: where gradients go unless the student lies on the label
  // grid.
  HAKD_DEVICE void run(const RowWriter<F>& rows, Sums<F>& sums) {
    Totals<F> t[S];
    find_all_totals(t);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      if (p.diagnostics && at.inside[i]) write_diagnostics(t[i], i);
      terms_.begin(t[i], i);
    }
    if (terms_.some([&](auto tag) { return bounds_apart<decltype(tag)>(); })) {
      for_each_class([&](auto tag, int32_t, const Class<F, bool>& k, int i) {
        if (bounds_apart<decltype(tag)>()) terms_.template add_first<Of<decltype(tag)>>(k, i);
      });
    }
    if (terms_.some([&](auto tag) { return Of<decltype(tag)>::kGathers; })) {
      for_each_class([&](auto tag, int32_t, const Class<F, bool>& k, int i) {
        terms_.template gather<Of<decltype(tag)>>(k, i);
      });
#pragma unroll
      for (int i = 0; i < S; ++i) terms_.learn(i);
    }
    if (terms_.some([&](auto tag) { return has_loop<decltype(tag)>(); })) {
      for_each_class([&](auto tag, int32_t c, const Class<F, bool>& k, int i) {
        if (!has_loop<decltype(tag)>()) return;
        Class<F, bool> own = k;
        terms_.template find_numbers<Of<decltype(tag)>>(c, own);
        terms_.template add_own<Of<decltype(tag)>>(own, i);
      });
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
      terms_.find_coefficients(t[i], i, at.label[i], at.y, at.x + i, sums);
      terms_.write(i, at.label[i] >= 0, at.inside[i], at.y, at.x + i);
    }
    if (p.gradients || terms_.values_late()) gradients(rows);
#pragma unroll
    for (int i = 0; i < S; ++i) terms_.finish(i, at.label[i] >= 0, sums);
  }

  // Adds the pixels that have a label to the sums of a term over classes: out [kMostTallies, C], this
  // warp's.
  template <class Term>
  HAKD_DEVICE void tally(double* out, int32_t lane) {
    Totals<F> t[S];
    find_all_totals(t);
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z[S], sum[kMostTallies] = {};
      read_student(c, z);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const bool labelled = at.label[i] >= 0 && at.label[i] < p.classes;
        const Tally<F> found = Term::tally(t[i], class_of(c, z[i], z[i], i, false));
        const F weight = p.pixel_weight == nullptr || !labelled
                             ? F(1)
                             : weight_at<F>(p, place_of(p, image_, at.y, at.x + i));
        for (int j = 0; j < Term::kTallies; ++j) sum[j] += labelled ? weight * found.v[j] : F(0);
      }
      for (int j = 0; j < Term::kTallies; ++j) {
        const F total = over_warp(sum[j]);
        if (lane == 0) out[static_cast<int64_t>(j) * p.classes + c] += static_cast<double>(total);
      }
    }
  }

 private:
  template <class Tag>
  using Of = typename Tag::type;

  HAKD_DEVICE void find_all_totals(Totals<F> (&t)[S]) {
    find_maxima();
#pragma unroll
    for (int i = 0; i < S; ++i) t[i] = no_totals<F>();
    if (soft<Set>(p) || Set::needs(p).student_nll) find_statistics(t);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      find_totals<Set>(
          p, t[i],
          Set::needs(p).student_nll ? label_logit(p.student, student_, student_m_, i) : F(0),
          Set::needs(p).teacher_nll ? label_logit(p.teacher, teacher_, teacher_m_, i) : F(0),
          at.label[i]);
    }
  }

  // Whether a term has a loop over classes of its own, and one before that for its bounds.
  template <class Tag>
  HAKD_DEVICE bool has_loop() const {
    return Of<Tag>::has_loop(terms_.variant(Tag()));
  }
  template <class Tag>
  HAKD_DEVICE bool bounds_apart() const {
    return !Of<Tag>::kRescales && Of<Tag>::bounds(terms_.variant(Tag())) > 0;
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

  HAKD_DEVICE F hard(F a, F e) const {
    return hard_exponential(soft<Set>(p) ? p.power : 1, n.hard_exponent, a, e);
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

  HAKD_DEVICE void find_statistics(Totals<F> (&t)[S]) {
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
        const Class<F, bool> k = class_of(c, z_s[i], z_t[i], i, needs.pair);
        const auto hard_of = [&](int m) {
          return m == 0 ? hard(k.student_a, k.student_e) : hard(k.teacher_a, k.teacher_e);
        };
        add_class<Set>(p, k, hard_of, k.teacher_a - k.student_a, w, t[i]);
      }
    }
    if (needs.weighted_z) {
      terms_.weight_sum = weights;
#pragma unroll
      for (int i = 0; i < S; ++i) t[i].weighted_z *= n.to_logits;
    }
  }

  // z_label - m. -inf stays -inf: the loss of a label on a masked class is infinite.
  HAKD_DEVICE F label_logit(const Logits& model, const Under<F, S>& u, const F (&m)[S], int i) const {
    if (at.label[i] < 0 || at.label[i] == p.classes) return F(0);
    return read_pixel_carefully(model, u, at.label[i], i) - m[i];
  }

  // Class c of pixel i; what no term reads is compiled away.
  HAKD_DEVICE Class<F, bool> class_of(int32_t c, F z_s, F z_t, int i, bool teacher) const {
    Class<F, bool> k{};
    k.student_z = z_s;
    k.teacher_z = z_t;
    k.student_a = student_a(z_s, i);
    k.student_e = exp2(k.student_a);
    if (teacher) {
      k.teacher_a = teacher_a(z_t, i);
      k.teacher_e = exp2(k.teacher_a);
    }
    k.student_hard = hard(k.student_a, k.student_e);
    k.is_label = at.label[i] == c;
    k.unlabelled = at.label[i] == p.classes;
    return k;
  }

  // Of labelled pixels the loss and whether the label is on top, of all whether the teacher's top is there.
  HAKD_DEVICE void write_diagnostics(const Totals<F>& t, int i) const {
    const bool valid = at.label[i] >= 0, labelled = valid && at.label[i] < p.classes;
    const int32_t plane = p.maps ? 2 : 0, x = at.x + i;
    write_plane(p, plane, image_, at.y, x, labelled, t.student_nll);
    write_plane(p, plane + 1, image_, at.y, x, labelled, t.student_label == F(0) ? F(1) : F(0));
    const bool agrees = Set::needs(p).teacher_at_top && t.teacher_at_top == F(0);
    write_plane(p, plane + 2, image_, at.y, x, valid, agrees ? F(1) : F(0));
  }

  // f(tag, c, class, i) for every class, pixel and term.
  template <class Function>
  HAKD_DEVICE void for_each_class(const Function& f) {
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      if (Set::teacher(p)) read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const Class<F, bool> k = class_of(c, z_s[i], z_t[i], i, Set::teacher(p));
        terms_.for_each_here([&](auto tag) { f(tag, c, k, i); });
      }
    }
  }

  HAKD_DEVICE void gradients(const RowWriter<F>& rows) {
    const bool on_labels = p.student.source == Source::kLabels;
    const bool to_rows = p.gradients && !on_labels;
    // The first of the terms that share a gradient writes the sum.
    RowCursor<F> cursor[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (Set::leads(p, k)) cursor[k] = {rows, to_rows ? gradient_of<Set>(p, k) : -1, 0};
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S], g[S][kTerms];  // of each leader
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (Set::leads(p, k)) cursor[k].begin();
      }
      read_student(c, z_s);
      if (Set::teacher(p)) read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const Class<F, bool> k = class_of(c, z_s[i], z_t[i], i, Set::teacher(p));
        terms_.find_gradients(c, k, k.student_hard, i, at.label[i] >= 0, g[i]);
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
            all = some ? all + g[i][k] : g[i][k];
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
          sum += g[i][k];
          right = fma(at.fraction_x[i], g[i][k], right);
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
  PixelTerms<F, Set, S> terms_;
};

}  // namespace heteroakd::cuda
