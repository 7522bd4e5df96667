// What a term is to the kernels: the contract of the files beside this one.
//
// Every gradient has the shape
//     g_c = student x_c - other y_c,   of the labelled class, where the term says so, `label`,
// and a term answers, with no loop of its own, from sums over the classes of a pixel:
//
//     needs        which of those sums, and of what else, there must be (`Needs`)
//     begin        what it knows of a pixel before its loop over classes (`Known`)
//     first        up to two numbers of a class, of which its loop needs the maxima (or, of terms over
//                  space, the totals over the pixels of an image and class) before anything else
//     gather       what is summed over classes before that, where x_c or y_c are made of sums, and
//     learn        what is known of it; `close` what is known of the sums of `other`
//     other        x_c and y_c, and what is summed over classes for the value (`Own`)
//     pixel        value, share of the denominator and coefficients of the gradient
//     denominator  what the sum of the values is divided by
//
// A term over classes is a function of sums over all pixels of the call, a few for each class, which a
// pass of its own collects before:
//
//     tally        what is added up of a class at a pixel
//     settle       of these sums of a class its addend of the value, and two numbers of it (`Class::space`)
//     conclude     of the sum of the addends the value, and what the numbers are multiplied by
//
// The kernels own the loops: `F` is a pixel or a vector of pixels, `M` what comparing two of them
// gives, `S` a number of the call. Options that decide which code runs are a term's `variant`: an
// argument that is a constant where a kernel is compiled for it. A new term: CONTRIBUTING.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/distillation.h"

namespace heteroakd {

// --- options -------------------------------------------------------------------------------------

constexpr int kMaxNumbers = 4, kMaxChoices = 4;

// In the order of the fields of the term's class in terms.py; its weight is not among them.
struct Options {
  double number[kMaxNumbers];
  int32_t choice[kMaxChoices];
};
struct NumberRange {
  const char* name;
  double least, most;
};
struct ChoiceRange {
  const char* name;
  int32_t count;
};
constexpr NumberRange kTemperatureRange{"temperature", 1e-4, 1e4};

// --- what a term asks for ------------------------------------------------------------------------

struct Needs {
  bool teacher = false;        // reads the teacher's logits
  bool student_nll = false;    // at T = 1: totals, negative log likelihood of the label
  bool teacher_nll = false;
  bool student_total = false;  // at T
  bool pair = false;           // at T: both totals and KL(p_t || p_s)
  // With `pair` and `teacher_nll`: sum e_t a_s and sum e_s a_s, of which the sums of its value loop
  // begin, where that loop has no a_s (on the CPU, without `logits`). Elsewhere both are 0.
  bool mixture = false;
  bool teacher_at_top = false;  // with `pair`: a_t of the class where a_s is 0
  bool weighted_z = false;      // with `student_nll`: sum_c w_c (z_c - m); w_c is 1 without class weights
  bool logits = false;          // its loops read a; without it, a is 0 there
  bool raw_logits = false;      // its loops or its gradient read z as it was: huge ones stay huge

  // Whether logits are read after their exponentials are found, which else take their memory.
  HAKD_FN constexpr bool keeps_logits() const {
    return logits || raw_logits || teacher_at_top || weighted_z;
  }

  HAKD_FN constexpr Needs operator|(const Needs& o) const {
    return {teacher || o.teacher,
            student_nll || o.student_nll,
            teacher_nll || o.teacher_nll,
            student_total || o.student_total,
            pair || o.pair,
            mixture || o.mixture,
            teacher_at_top || o.teacher_at_top,
            weighted_z || o.weighted_z,
            logits || o.logits,
            raw_logits || o.raw_logits};
  }
};

enum class Denominator : int32_t { kValid, kClassWeight, kShares, kImages, kClasses };

// Where x_c and y_c of the gradient come from.
enum class From : int32_t {
  kNone,          // there is none
  kStudentHard,   // e of the student at T = 1
  kStudent,       // e of the student at T
  kTeacher,
  kStudentZ,
  kTeacherZ,
  kClassWeight,   // w_c, 1 without class weights
  kOwn,           // `other`
};

// --- what a term gets ----------------------------------------------------------------------------

// Numbers of a pass that are not a term's.
template <typename S>
struct PassNumbers {
  S temperature, inverse_temperature;
  S scale;       // a = (z - m) scale
  S classes;
  S weight_sum;  // sum_c w_c
};

// Sums over the classes of a pixel.
template <typename F>
struct ClassSums {
  F student_total, teacher_total;    // of e at the temperature T
  F student_others, teacher_others;  // of e at T = 1, without the labelled class
  F difference;                      // sum e_t (a_t - a_s)
  F teacher_cross, student_self;     // sum e_t a_s, sum e_s a_s; 0 where loops have a_s at hand
};

// And what follows from them, as far as the terms of the pass need it.
template <typename F>
struct Totals : ClassSums<F> {
  F label_weight;                  // w_y; 1 without class weights
  F student_label, teacher_label;  // z_y - m
  F label_e;                       // e_y at T = 1
  F hard_total, hard_inverse, student_nll, teacher_nll;
  F weighted_z;                    // sum_c w_c (z_c - m)
  F student_inverse, student_log2, teacher_inverse, teacher_log2, kl;
  F teacher_at_top;                // a_t of the class where a_s is 0
};

// Each once, where a term of the pass needs it.
template <typename F>
HAKD_FN void find_student_nll(Totals<F>& t) {
  t.label_e = exp2(max(F(-1e30), t.student_label) * F(kLog2E));
  t.hard_total = t.student_others + t.label_e;
  t.hard_inverse = reciprocal(t.hard_total);
  t.student_nll = negative_log_likelihood(t.student_others, t.label_e, t.student_label);
}
template <typename F>
HAKD_FN void find_teacher_nll(Totals<F>& t) {
  const F e = exp2(max(F(-1e30), t.teacher_label) * F(kLog2E));
  t.teacher_nll = negative_log_likelihood(t.teacher_others, e, t.teacher_label);
}
template <typename F>
HAKD_FN void find_student_total(Totals<F>& t) {
  t.student_inverse = reciprocal(t.student_total);
  t.student_log2 = log2(t.student_total);
}
template <typename F>
HAKD_FN void find_pair(Totals<F>& t) {
  t.teacher_inverse = reciprocal(t.teacher_total);
  t.teacher_log2 = log2(t.teacher_total);
  t.kl = kl(t.difference, t.teacher_inverse, t.teacher_log2, t.student_log2);
}

// One class of a pixel.
template <typename F, typename M>
struct Class {
  F student_z, teacher_z, student_a, teacher_a, student_e, teacher_e;
  M is_label, unlabelled;  // unlabelled: no class of the pixel is
  F student_hard;              // e of the student at T = 1
  // Of terms over space: the pixel's share of the softmax of first.v[k], and log of what that divided by;
  // of terms over classes: the numbers of the class.
  F space[2], space_log[2];
  static constexpr bool kBounded = false;
};
// One whose e is no smaller than about 1e-36, and a no larger in size than its logarithm.
template <typename F, typename M>
struct BoundedClass : Class<F, M> {
  static constexpr bool kBounded = true;
};

// --- what a term gives ---------------------------------------------------------------------------

template <typename F>
struct First {
  F v[2];
};

template <typename F>
struct Pair {
  F x, y;
};

template <typename F>
struct Coefficients {
  F value;  // of a value loop: what Own::sum is multiplied by
  F share;  // of the denominator
  F student, other, label;
};

constexpr int kMostTallies = 3;

template <typename F>
struct Tally {
  F v[kMostTallies];
};

struct Settled {
  double value, number[2];
};

struct Conclusion {
  double value, factor;
};

// What a term has that does not say otherwise.
struct TermDefaults {
  template <typename S>
  struct Numbers {};
  template <typename F>
  struct Known {};
  template <typename F>
  struct Own {};

  static constexpr int kNumberCount = 0, kChoiceCount = 0;
  static constexpr NumberRange kNumbers[] = {{"", 0.0, 0.0}};
  static constexpr ChoiceRange kChoices[] = {{"", 0}};
  static constexpr int kFirsts = 0;         // how many numbers of `first` there are
  static constexpr int32_t kFirstBits = 0;  // of a variant, those that only `first` reads
  static constexpr int32_t kVariants = 1;
  static constexpr bool kNeedsLabel = false;      // leaves out pixels without one
  static constexpr bool kOwnTemperature = false;  // not that of the pass
  static constexpr bool kMapped = false;  // Known has `reliability` and `discrepancy`

  HAKD_FN static constexpr bool takes(const int32_t*) { return true; }
  HAKD_FN static constexpr int32_t variant(const Options&) { return 0; }

  // Maxima over classes, or totals over space, that `other` needs: of first.v[0 .. n).
  HAKD_FN static constexpr int bounds(int32_t) { return 0; }
  HAKD_FN static constexpr int spaces(int32_t) { return 0; }
  // Whether the coefficients need `Own`, the sums of `other` over the classes; and whether the value
  // alone does: it then is Coefficients::value times Own::sum, and the sums may come last.
  HAKD_FN static constexpr bool has_loop(int32_t) { return false; }
  HAKD_FN static constexpr bool has_value_loop(int32_t) { return false; }
  static constexpr bool kHasValueLoop = false;  // of some variant
  static constexpr bool kHasShares = false;     // of some variant: a denominator of its own
  static constexpr bool kOverSpace = false;     // of some variant: `spaces`
  static constexpr int kTallies = 0;            // of a term over classes: how many sums it has
  static constexpr bool kGathers = false;       // has `gather`, `learn` and `close`

  HAKD_FN static constexpr bool has_label(int32_t) { return false; }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool) { return Denominator::kValid; }
  // Whether the sum of the values is one that cannot be negative, though its rounding may be.
  HAKD_FN static constexpr bool is_divergence(int32_t) { return true; }
  // Whether its gradient stands apart from those of the terms with the same denominator.
  static constexpr bool kOwnGradient = false;

  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options&, S) {
    return {};
  }
  template <typename N, typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t, const N&, const PassNumbers<S>&, const Totals<F>&) {
    return {};
  }
  template <typename N, typename S, typename K, typename F, typename M>
  HAKD_FN static First<F> first(int32_t, const N&, const PassNumbers<S>&, K&, const Class<F, M>&) {
    return {F(0), F(0)};
  }
  template <typename F, typename M>
  HAKD_FN static Tally<F> tally(const Totals<F>&, const Class<F, M>&) {
    return {};
  }
  HAKD_FN static Settled settle(const Options&, const double*) { return {}; }
  HAKD_FN static Conclusion conclude(const Options&, double value, double) { return {value, 1.0}; }
  // Adds a class to Own; what is known of these sums; and of those of `other`.
  template <typename N, typename S, typename F, typename M, typename O>
  HAKD_FN static void gather(int32_t, const N&, const PassNumbers<S>&, const Class<F, M>&, O&) {}
  template <typename N, typename S, typename K, typename O>
  HAKD_FN static void learn(int32_t, const N&, const PassNumbers<S>&, K&, const O&) {}
  template <typename N, typename S, typename K, typename O>
  HAKD_FN static void close(int32_t, const N&, const PassNumbers<S>&, K&, const O&) {}
  // Where the sums of `other` begin, if not at 0.
  template <typename K, typename F, typename O>
  HAKD_FN static void start(int32_t, const K&, const Totals<F>&, O&) {}
  template <typename N, typename S, typename K, typename F, typename M, typename O>
  HAKD_FN static Pair<F> other(int32_t, const N&, const PassNumbers<S>&, const K&,
                               const Class<F, M>&, const First<F>&, O&) {
    return {F(0), F(0)};
  }
  // Brings the sums of `other` from old bounds of first.v to new ones, drop = old - new: for one loop
  // over classes instead of two, where it is what `first` does that is expensive.
  static constexpr bool kRescales = false;
  template <typename S, typename O, typename F>
  HAKD_FN static void rescale(int32_t, const PassNumbers<S>&, O&, const F*) {}
};

}  // namespace heteroakd
