// Every term for a few vectors of pixels: which loops a call needs, what passes between them, and
// what they end in: sums for the values, coefficients for the gradients.
//
// The loops over classes are in statistics.h, chain.h, paper.h and gradients.h, the formulas of a
// pixel in ../math/distillation.h.
#pragma once

#include "chain.h"
#include "gradients.h"
#include "paper.h"

namespace heteroakd::cpu::HAKD_ISA {

// Cuts a block of memory into arrays; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;  // apart by a line
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

constexpr int kMaxRows = 4;  // label rows at a time

// What is processed together: up to four label rows in one vector of columns.
template <typename T>
struct Group {
  int64_t y, vector;                // of the first
  const int32_t* labels[kMaxRows];  // [N] each
  bool student_careful, teacher_careful;  // huge, infinite or NaN logits are about
};

// The two rows of logits around the label rows at hand, brought to the columns of a vector.
template <typename T>
struct Cell {
  T* lo = nullptr;
  T* hi = nullptr;
  T* lo_range = nullptr;  // maximum and minimum over the classes, [2][N]
  T* hi_range = nullptr;
  int64_t lo_row = -1;
  int64_t hi_row = -1;

  void lay_out(Arena& arena, int64_t classes) {
    constexpr int N = Lanes<T>::N;
    lo = arena.take<T>(classes * N);
    hi = arena.take<T>(classes * N);
    lo_range = arena.take<T>(2 * N);
    hi_range = arena.take<T>(2 * N);
  }
};

// What the gradients need to know of a pixel; where not valid, a factor is 0.
enum Coefficient {
  kCeHard,
  kCeOthers,
  kCeSoft,
  kCeInverse,
  kKdStudent,
  kKdOther,
  kHeteroStudent,
  kHeteroOther,
  kFeatureScale,
  kCoefficients
};

template <typename T>
class Terms {
  using F = Lanes<T>;
  static constexpr int N = F::N;

 public:
  // Tiles [kMaxRows][C][N] of logits, and their maxima over the classes [kMaxRows][N]: filled from
  // outside before `process`.
  T *student_z = nullptr, *teacher_z = nullptr;
  T *student_maximum = nullptr, *teacher_maximum = nullptr;
  const bool reads_pair;  // whether there is a teacher to fill them for

  explicit Terms(const Pass<T>& pass) : reads_pair(pass.has_teacher), p(pass) { choose(); }

  void lay_out(Arena& arena) {
    const int64_t tile = p.classes * N;
    const int64_t group = kMaxRows * tile;
    lane_sums_ = arena.take<double>(kTerms * 2 * N);
    student_z = arena.take<T>(group);
    student_e_ = keeps_z_ ? arena.take<T>(group) : student_z;
    if (reads_pair) {
      teacher_z = arena.take<T>(group);
      teacher_e_ = keeps_z_ ? arena.take<T>(group) : teacher_z;
    }
    if (power_ == 0) hard_ = arena.take<T>(group);
    if (p.kd == Divergence::kReverse || p.kd == Divergence::kJs) kd_q_ = arena.take<T>(group);
    if (keeps_z_ && p.hetero != Hetero::kNone) {
      mixed_ = arena.take<T>(group);
      strength_ = arena.take<T>(tile);
    }
    if (chain_ != nullptr) chain_scratch_ = arena.take<T>(6 * tile);
    coefficients_ = arena.take<T>(kCoefficients * kMaxRows * N);
    student_maximum = arena.take<T>(kMaxRows * N);
    teacher_maximum = arena.take<T>(kMaxRows * N);
    if (p.space_statistics) {
      space_maximum_ = arena.take<T>(tile);
      space_sum_ = arena.take<T>(tile);
    }
  }

  void begin(int64_t image) {
    image_ = image;
    for (int64_t i = 0; i < kTerms * 2 * N; ++i) lane_sums_[i] = 0.0;
    if (!p.space_statistics) return;
    for (int64_t i = 0; i < p.classes * N; ++i) {
      space_maximum_[i] = T(-1e30);
      space_sum_[i] = T(0);
    }
  }

  // The band's sums leave it, lane after lane.
  void end(int64_t band) {
    double* sums = p.sums + band * kTerms * 2;
    for (int k = 0; k < kTerms * 2; ++k) {
      sums[k] = 0.0;
      for (int l = 0; l < N; ++l) sums[k] += lane_sums_[k * N + l];
    }
    if (p.space_statistics) reduce_space(band);
  }

  // Four rows by the way of chain.h: `process` then finds exponentials and sums. False where that
  // is not exact (or not built), and nothing has happened.
  bool chain(const Group<T>& group, const Cell<T>& student, const Cell<T>& teacher,
             const Mask<T>* valid) {
    if (chain_ == nullptr || group.student_careful || group.teacher_careful) return false;
    const T* student_fraction = p.student.row_fraction + group.y;
    const T* teacher_fraction = reads_pair ? p.teacher.row_fraction + group.y : nullptr;
    if (!evenly_spaced(student_fraction)) return false;
    if (reads_pair && !evenly_spaced(teacher_fraction)) return false;
    chain_student_ = chain_side(student, student_fraction);
    if (!chain_fits(chain_student_, scale_)) return false;
    if (reads_pair) {
      chain_teacher_ = chain_side(teacher, teacher_fraction);
      if (!chain_fits(chain_teacher_, scale_)) return false;
    }
    Statistics<F>* statistics[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r) statistics[r] = &chain_statistics_[r];
    chain_(p.classes, chain_student_, chain_teacher_, student_e_, teacher_e_, scale_, group.labels,
           chain_scratch_, statistics);
    for (int r = 0; r < kMaxRows; ++r) {
      if (!chain_held<T>(statistics[r]->student_total, valid[r])) return false;
      chain_reference(chain_student_, student_fraction[r]).store(student_maximum + r * N);
      if (!reads_pair) continue;
      if (!chain_held<T>(statistics[r]->teacher_total, valid[r])) return false;
      chain_reference(chain_teacher_, teacher_fraction[r]).store(teacher_maximum + r * N);
    }
    return true;
  }

  // kRows label rows from group.y on (kUpsample), or as many neighbouring vectors on the label grid.
  // Their logits are in student_z and teacher_z, and the maxima in theirs; unless `chained`, where
  // `chain` has left all there is to know. sink(term): where the gradients of a term go.
  template <int kRows, bool kUpsample, typename Sinks>
  void process(const Group<T>& group, bool chained, const Sinks& sink) {
    pixels<kRows, kUpsample>(group, chained);
    if (!p.gradients) return;
    const T* fraction = p.student.row_fraction + group.y;
    if (p.slot[kCe] >= 0) {
      const T* e = power_ == 0 ? hard_ : student_e_;
      CrossEntropyGradient run;
      if (p.smoothing != T(0)) {
        run = power_ == 2   ? cross_entropy_gradient<T, 2, true, kRows, kUpsample>
              : power_ == 4 ? cross_entropy_gradient<T, 4, true, kRows, kUpsample>
                            : cross_entropy_gradient<T, 1, true, kRows, kUpsample>;
      } else {
        run = power_ == 2   ? cross_entropy_gradient<T, 2, false, kRows, kUpsample>
              : power_ == 4 ? cross_entropy_gradient<T, 4, false, kRows, kUpsample>
                            : cross_entropy_gradient<T, 1, false, kRows, kUpsample>;
      }
      run(p.classes, e, coefficient(kCeHard, 0), coefficient(kCeOthers, 0),
          coefficient(kCeSoft, 0), coefficient(kCeInverse, 0), group.labels, p.weight_sum,
          p.class_weight, fraction, sink(kCe));
    }
    if (p.slot[kKd] >= 0) {
      const T* other = p.kd == Divergence::kForward ? teacher_e_ : kd_q_;
      pair_gradient<T, kRows, kUpsample>(p.classes, student_e_, other, coefficient(kKdStudent, 0),
                                         coefficient(kKdOther, 0), fraction, sink(kKd));
    }
    if (p.slot[kHetero] >= 0) {
      const T* student = p.hetero == Hetero::kPaperSpace ? mixed_ : student_e_;
      const T* other =
          p.hetero == Hetero::kSoftmaxKl && p.mix != Mix::kLogits ? teacher_e_ : mixed_;
      pair_gradient<T, kRows, kUpsample>(p.classes, student, other,
                                         coefficient(kHeteroStudent, 0),
                                         coefficient(kHeteroOther, 0), fraction,
                                         sink(kHetero));
    }
    if (p.slot[kFeature] >= 0) {
      pair_gradient<T, kRows, kUpsample>(p.classes, student_z, teacher_z,
                                         coefficient(kFeatureScale, 0),
                                         coefficient(kFeatureScale, 0), fraction,
                                         sink(kFeature));
    }
  }

 private:
  // --- which loops -------------------------------------------------------------------------------

  using OneModel = void (*)(int64_t, const T*, T*, T*, F, T, T, Labels<T>, Statistics<F>&);
  using TwoModels = void (*)(int64_t, const T*, const T*, T*, T*, T*, F, F, T, T, Labels<T>,
                             Statistics<F>&);
  using Chain = void (*)(int64_t, const ChainSide<T>&, const ChainSide<T>&, T*, T*, T,
                         const int32_t* const*, T*, Statistics<F>* const*);
  using CrossEntropyGradient = void (*)(int64_t, const T*, const T*, const T*, const T*, const T*,
                                        const int32_t* const*, T, const T*, const T*,
                                        const Sink<T>&);

  void choose() {
    const bool softmax_kl = p.hetero == Hetero::kSoftmaxKl;
    needs_pair_ = p.kd != Divergence::kNone || softmax_kl;
    needs_soft_student_ = needs_pair_ || p.hetero == Hetero::kPaper;
    const bool cross = softmax_kl && p.mix == Mix::kProbs && p.values && p.hetero_term;
    normalises_ = !p.feature && p.hetero != Hetero::kPaper && p.hetero != Hetero::kPaperSpace;
    scale_ = static_cast<T>(kLog2E / static_cast<double>(p.temperature));
    power_ = p.temperature == T(1) ? 1 : p.temperature == T(2) ? 2 : p.temperature == T(4) ? 4 : 0;
    // Others read the logits of every pixel themselves. Double has no chain: it is the plain path.
    keeps_z_ = p.feature || p.kd == Divergence::kReverse || p.kd == Divergence::kJs ||
               p.hetero == Hetero::kPaper || p.hetero == Hetero::kPaperSpace ||
               (softmax_kl && p.mix == Mix::kLogits) || p.smoothing != T(0);
    const bool chains = !p.identity && !keeps_z_ && sizeof(T) == 4;
    if (needs_pair_) {
      const int hard = softmax_kl ? 2 : p.ce ? 1 : 0;
      two_models_ = power_ == 1   ? choose_two<1>(hard, cross)
                    : power_ == 2 ? choose_two<2>(hard, cross)
                    : power_ == 4 ? choose_two<4>(hard, cross)
                                  : choose_two<0>(hard, cross);
      if (chains) {
        chain_ = power_ == 1   ? choose_chain<1>(hard, cross)
                 : power_ == 2 ? choose_chain<2>(hard, cross)
                 : power_ == 4 ? choose_chain<4>(hard, cross)
                               : nullptr;
      }
    } else if (needs_soft_student_) {
      one_model_ = power_ == 1   ? choose_one<1>()
                   : power_ == 2 ? choose_one<2>()
                   : power_ == 4 ? choose_one<4>()
                                 : choose_one<0>();
    } else if (p.ce) {
      power_ = 1;
      scale_ = static_cast<T>(kLog2E);
      one_model_ = one_model<T, 1, false, true>;
      if (chains) chain_ = HAKD_ISA::chain<T, 1, 1, false, false>;
    }
  }

  template <int kPower>
  static Chain choose_chain(int hard, bool cross) {
    if (hard == 2) {
      return cross ? HAKD_ISA::chain<T, kPower, 2, true, true>
                   : HAKD_ISA::chain<T, kPower, 2, false, true>;
    }
    return hard == 1 ? HAKD_ISA::chain<T, kPower, 1, false, true>
                     : HAKD_ISA::chain<T, kPower, 0, false, true>;
  }
  template <int kPower>
  static TwoModels choose_two(int hard, bool cross) {
    if (hard == 2) {
      return cross ? two_models<T, kPower, 2, true> : two_models<T, kPower, 2, false>;
    }
    return hard == 1 ? two_models<T, kPower, 1, false> : two_models<T, kPower, 0, false>;
  }
  template <int kPower>
  OneModel choose_one() const {
    return p.ce ? one_model<T, kPower, true, true> : one_model<T, kPower, true, false>;
  }

  // Not where some of the rows lie beyond the first row of logits and repeat it.
  static bool evenly_spaced(const T* f) {
    const T step = (f[3] - f[0]) / T(3);
    const T first = f[1] - f[0] - step;
    const T second = f[2] - f[1] - step;
    const T most = T(1e-6);
    return first < most && first > -most && second < most && second > -most;
  }

  static ChainSide<T> chain_side(const Cell<T>& cell, const T* f) {
    return {cell.lo, cell.hi, cell.lo_range, cell.hi_range, f[0], (f[3] - f[0]) / T(3)};
  }

  T* coefficient(Coefficient k, int row) { return coefficients_ + (k * kMaxRows + row) * N; }

  // --- pixel by pixel ----------------------------------------------------------------------------

  // What the pixels of one vector carry from one step to the next.
  struct Pixels {
    Mask<T> valid;
    F one;                           // 1, or 0 where not valid
    F student_m, teacher_m;          // maxima over the classes
    F student_label, teacher_label;  // z_label - m
    Statistics<F> s;
    F hard_total, hard_inverse, student_nll, teacher_nll;                 // at T = 1
    F student_inverse, teacher_inverse, student_log2, teacher_log2, kl;  // at T
    Reliability<F> reliable;
    F discrepant, weight;
  };

  // Step by step for all the rows at hand: each step is a chain of dependent operations, and rows
  // side by side hide its latency.
  template <int kRows, bool kUpsample>
  void pixels(const Group<T>& group, bool chained) {
    const int32_t* const* labels = group.labels;
    Pixels pixels[kRows];
    F sums[kTerms * 2];
    for (F& sum : sums) sum = F(T(0));
    const int32_t common = common_label<kRows>(labels);
    for (int r = 0; r < kRows; ++r) {
      prepare<kUpsample>(pixels[r], group, r, common, chained);
    }
    const int64_t tile = p.classes * N;
    for (int r = 0; r < kRows; ++r) {
      Pixels& x = pixels[r];
      if (chained) {
        x.s = chain_statistics_[r];
        continue;
      }
      T* hard = hard_ + r * tile;
      if (needs_pair_) {
        two_models_(p.classes, student_z + r * tile, teacher_z + r * tile,
                    student_e_ + r * tile, teacher_e_ + r * tile, hard, x.student_m, x.teacher_m,
                    scale_, static_cast<T>(kLog2E), load_labels<T>(labels[r]), x.s);
      } else if (one_model_ != nullptr) {
        one_model_(p.classes, student_z + r * tile, student_e_ + r * tile, hard, x.student_m,
                   scale_, static_cast<T>(kLog2E), load_labels<T>(labels[r]), x.s);
      }
    }
    for (int r = 0; r < kRows; ++r) hard_totals(pixels[r]);
    for (int r = 0; r < kRows; ++r) soft_totals(pixels[r]);
    if (p.ce) {
      for (int r = 0; r < kRows; ++r) cross_entropy_pixels(pixels[r], r, labels[r], sums);
    }
    if (p.kd != Divergence::kNone) {
      for (int r = 0; r < kRows; ++r) kd_pixels(pixels[r], r, sums);
    }
    if (p.feature) {
      for (int r = 0; r < kRows; ++r) feature_pixels(pixels[r], r, sums);
    }
    if (p.hetero == Hetero::kSoftmaxKl) {
      for (int r = 0; r < kRows; ++r) {
        knowledge(pixels[r], kUpsample ? group.y + r : group.y,
                  kUpsample ? group.vector : group.vector + r);
      }
      if (p.hetero_term) {
        for (int r = 0; r < kRows; ++r) hetero_softmax_kl(pixels[r], r, sums);
      }
    } else if (p.hetero != Hetero::kNone) {
      for (int r = 0; r < kRows; ++r) {
        hetero_paper(pixels[r], kUpsample ? group.y + r : group.y,
                     kUpsample ? group.vector : group.vector + r, r, labels[r], sums);
      }
    }
    if (!p.values) return;
    const bool has[kTerms] = {p.ce, p.kd != Divergence::kNone, p.hetero_term, p.feature};
    for (int k = 0; k < kTerms; ++k) {
      if (has[k]) add_to(lane_sums_ + k * 2 * N, sums[k * 2]);
    }
    if (p.class_weight != nullptr && p.ce) add_to(lane_sums_ + (kCe * 2 + 1) * N, sums[kCe * 2 + 1]);
    if (p.hetero == Hetero::kSoftmaxKl && p.hetero_term) {
      add_to(lane_sums_ + (kHetero * 2 + 1) * N, sums[kHetero * 2 + 1]);
    }
  }

  template <bool kUpsample>
  HAKD_FN void prepare(Pixels& x, const Group<T>& group, int r, int32_t common, bool chained) {
    const int64_t tile = p.classes * N;
    const int32_t* labels = group.labels[r];
    x.valid = is_valid(load_labels<T>(labels));
    x.one = select(x.valid, F(T(1)), F(T(0)));
    x.student_m = F::load(student_maximum + r * N);
    if (p.ce || p.hetero == Hetero::kSoftmaxKl) {
      const F z = kUpsample && chained
                      ? between(chain_student_, p.student.row_fraction[group.y + r], labels, common)
                      : at_label(student_z + r * tile, labels, common);
      x.student_label = z - x.student_m;
    }
    if (reads_pair) x.teacher_m = F::load(teacher_maximum + r * N);
    if (p.hetero == Hetero::kSoftmaxKl) {
      const F z = kUpsample && chained
                      ? between(chain_teacher_, p.teacher.row_fraction[group.y + r], labels, common)
                      : at_label(teacher_z + r * tile, labels, common);
      x.teacher_label = z - x.teacher_m;
    }
    const T log2_of_e = static_cast<T>(kLog2E);
    const T largest_scale = scale_ > log2_of_e ? scale_ : log2_of_e;
    // after the labels: the loss of a label on a masked class is infinite, not merely large
    if (normalises_ && group.student_careful) {
      normalise<T>(p.classes, largest_scale, student_z + r * tile, student_maximum + r * N);
      x.student_m = F(T(0));
    }
    if (normalises_ && group.teacher_careful) {
      normalise<T>(p.classes, largest_scale, teacher_z + r * tile, teacher_maximum + r * N);
      x.teacher_m = F(T(0));
    }
  }

  // The class that all of these pixels are labelled with, or -1: most of a real label map is one
  // class as far as a few vectors reach, and then nothing needs to be gathered.
  template <int kRows>
  HAKD_FN static int32_t common_label(const int32_t* const* labels) {
    const int32_t first = labels[0][0];
    bool same = first >= 0;
    for (int r = 0; r < kRows; ++r) {
      same = same && all(is_class(load_labels<T>(labels[r]), first));
    }
    return same ? first : -1;
  }

  HAKD_FN static F at_label(const T* z, const int32_t* labels, int32_t common) {
    return common >= 0 ? F::load(z + static_cast<int64_t>(common) * N) : gather_tile(z, labels);
  }

  // The logit of the labelled class, interpolated as `interpolate` does it.
  HAKD_FN static F between(const ChainSide<T>& side, T fraction, const int32_t* labels,
                           int32_t common) {
    const F lo = at_label(side.lo, labels, common);
    return fma(F(fraction), at_label(side.hi, labels, common) - lo, lo);
  }

  HAKD_FN void hard_totals(Pixels& x) {
    const F scale(static_cast<T>(kLog2E)), lowest(T(-1e30));
    const bool reliable = p.hetero == Hetero::kSoftmaxKl;
    if (p.ce || reliable) {
      const F e = exp2(max(lowest, x.student_label) * scale);
      x.hard_total = x.s.student_others + e;
      x.hard_inverse = F(T(1)) / x.hard_total;
      x.student_nll = negative_log_likelihood(x.s.student_others, e, x.student_label);
    }
    if (reliable) {
      const F e = exp2(max(lowest, x.teacher_label) * scale);
      x.teacher_nll = negative_log_likelihood(x.s.teacher_others, e, x.teacher_label);
    }
  }

  HAKD_FN void soft_totals(Pixels& x) {
    if (needs_soft_student_) {
      x.student_inverse = F(T(1)) / x.s.student_total;
      x.student_log2 = log2(x.s.student_total);
    }
    if (needs_pair_) {
      x.teacher_inverse = F(T(1)) / x.s.teacher_total;
      x.teacher_log2 = log2(x.s.teacher_total);
      x.kl = kl(x.s.difference, x.teacher_inverse, x.teacher_log2, x.student_log2);
    }
  }

  HAKD_FN void cross_entropy_pixels(const Pixels& x, int r, const int32_t* labels, F* sums) {
    const F zero(T(0));
    CrossEntropyWeights<F> w;
    F label_weight = x.one;
    if (p.class_weight != nullptr) {
      T weights[N];
      for (int l = 0; l < N; ++l) weights[l] = labels[l] < 0 ? T(0) : p.class_weight[labels[l]];
      label_weight = F::load(weights);
    }
    w.hard = F(T(1) - p.smoothing) * label_weight;
    w.soft = F(p.smoothing / static_cast<T>(p.classes));
    w.weight_sum = F(p.weight_sum);
    if (p.values) {
      F loss;
      if (p.smoothing != T(0)) {
        const F weighted = weighted_logits<T>(p.classes, student_z + r * p.classes * N,
                                              x.student_m, p.class_weight);
        loss = cross_entropy<true>(w, x.student_nll, log(x.hard_total), weighted);
      } else {
        loss = cross_entropy<false>(w, x.student_nll, zero, zero);
      }
      sums[kCe * 2] = sums[kCe * 2] + select(x.valid, loss, zero);
      sums[kCe * 2 + 1] = sums[kCe * 2 + 1] + label_weight;
    }
    if (p.slot[kCe] >= 0) {
      const F scale(p.scale[kCe]);
      select(x.valid, scale * w.hard * x.hard_inverse, zero).store(coefficient(kCeHard, r));
      x.s.student_others.store(coefficient(kCeOthers, r));
      select(x.valid, scale * w.soft, zero).store(coefficient(kCeSoft, r));
      x.hard_inverse.store(coefficient(kCeInverse, r));
    }
  }

  HAKD_FN void kd_pixels(const Pixels& x, int r, F* sums) {
    const int64_t tile = p.classes * N;
    const T* student_z = this->student_z + r * tile;
    const T* teacher_z = this->teacher_z + r * tile;
    const T* student_e = student_e_ + r * tile;
    const F zero(T(0)), ln2(static_cast<T>(kLn2));
    const T t = p.temperature;
    const F gradient = F(p.scale[kKd] * t) * x.one;
    F value, on_student, on_other;
    if (p.kd == Divergence::kForward) {
      value = x.kl;
      on_student = gradient * x.student_inverse;
      on_other = gradient * x.teacher_inverse;
    } else {
      const F log2_ratio = x.student_log2 - x.teacher_log2;
      const F top = teacher_at_top<T>(p.classes, student_z, teacher_z, x.student_m, x.teacher_m,
                                      scale_);
      F mean;
      on_other = zero - gradient * ln2 * x.student_inverse;
      if (p.kd == Divergence::kReverse) {
        const F pivot = reverse_ratio(zero, top);
        mean = reverse_products<T>(p.classes, student_z, teacher_z, student_e, x.student_m,
                                   x.teacher_m, scale_, pivot, kd_q_ + r * tile) *
               x.student_inverse;
        value = mean + pivot - log2_ratio;
      } else {
        const F one_minus_beta(p.one_minus_beta);
        const JsWeights<F> w =
            js_weights(F(p.beta), one_minus_beta, x.s.student_total * x.teacher_inverse);
        const F pivot = zero - log2(max(F(kTiny<T>), mixed_target(w.teacher, exp2(top), w.student,
                                                                  F(T(1)))));
        const JsSums<F> js = js_products<T>(p.classes, student_z, teacher_z, student_e,
                                            teacher_e_ + r * tile, x.student_m, x.teacher_m,
                                            scale_, w, pivot, kd_q_ + r * tile);
        mean = js.student * x.student_inverse;
        value = fma(F(p.beta), fma(js.teacher, x.teacher_inverse, log2_ratio),
                    one_minus_beta * (mean + pivot));
        on_other = on_other * one_minus_beta;
      }
      value = ln2 * value;
      on_student = on_other * mean;
    }
    if (p.values) {
      sums[kKd * 2] = sums[kKd * 2] + select(x.valid, F(t * t) * value, zero);
    }
    select(x.valid, on_student, zero).store(coefficient(kKdStudent, r));
    select(x.valid, on_other, zero).store(coefficient(kKdOther, r));
  }

  HAKD_FN void feature_pixels(const Pixels& x, int r, F* sums) {
    const int64_t tile = p.classes * N;
    const F classes(static_cast<T>(p.classes));
    if (p.values) {
      const F sum = squared_difference<T>(p.classes, student_z + r * tile, teacher_z + r * tile);
      sums[kFeature * 2] = sums[kFeature * 2] + select(x.valid, sum / classes, F(T(0)));
    }
    (F(p.scale[kFeature]) * x.one * feature_gradient_scale(classes))
        .store(coefficient(kFeatureScale, r));
  }

  HAKD_FN void knowledge(Pixels& x, int64_t y, int64_t vector) {
    x.reliable = reliability(x.teacher_nll, x.student_nll, F(T(1) / p.tau));
    x.discrepant = discrepancy(x.kl);
    x.weight = p.evaluation ? select(x.valid, x.discrepant, F(T(0))) : x.one;
    if (p.maps) write_maps(y, vector, x.valid, x.reliable.teacher, x.discrepant);
  }

  HAKD_FN void hetero_softmax_kl(const Pixels& x, int r, F* sums) {
    const int64_t tile = p.classes * N;
    const F zero(T(0));
    const T t = p.temperature;
    F value = zero;
    F on_student, on_other;
    if (p.mix == Mix::kTeacher) {
      value = x.kl;
      const F gradient = F(p.scale[kHetero] * t) * x.weight;
      on_student = gradient * x.student_inverse;
      on_other = gradient * x.teacher_inverse;
    } else if (p.mix == Mix::kProbs) {
      if (p.values) {
        const F teacher_weight = x.reliable.teacher * (x.s.student_total * x.teacher_inverse);
        const F student_weight = x.reliable.student;
        const F entropy = mixed_entropy<T>(p.classes, student_e_ + r * tile, teacher_e_ + r * tile,
                                           student_weight, teacher_weight);
        const F cross = mixed_target(teacher_weight, x.s.teacher_cross, student_weight,
                                     x.s.student_self);
        value = F(static_cast<T>(kLn2)) * (entropy - cross) * x.student_inverse;
      }
      const F gradient = F(p.scale[kHetero] * t) * x.weight * x.reliable.teacher;
      on_student = gradient * x.student_inverse;
      on_other = gradient * x.teacher_inverse;
    } else {
      F total, difference;
      mixed_logits<T>(p.classes, student_z + r * tile, teacher_z + r * tile, x.student_m,
                      x.teacher_m, scale_, x.reliable, mixed_ + r * tile, total, difference);
      const F inverse = F(T(1)) / total;
      if (p.values) {
        value = kl(difference, inverse, log2(total), x.student_log2);
      }
      const F gradient = F(p.scale[kHetero] * t) * x.weight;
      on_student = gradient * x.student_inverse;
      on_other = gradient * inverse;
    }
    if (p.values) {
      sums[kHetero * 2] = sums[kHetero * 2] + select(x.valid, x.weight * F(t * t) * value, zero);
      sums[kHetero * 2 + 1] = sums[kHetero * 2 + 1] + x.weight;
    }
    select(x.valid, on_student, zero).store(coefficient(kHeteroStudent, r));
    select(x.valid, on_other, zero).store(coefficient(kHeteroOther, r));
  }

  HAKD_FN void hetero_paper(const Pixels& x, int64_t y, int64_t vector, int r,
                            const int32_t* labels, F* sums) {
    const int64_t tile = p.classes * N;
    const F zero(T(0));
    const T t = p.temperature;
    const T* student_z = this->student_z + r * tile;
    T* mixed = mixed_ + r * tile;
    const T* teacher_z = this->teacher_z + r * tile;
    const Labels<T> label = load_labels<T>(labels);
    const PaperPixel<F> pixel =
        p.mix == Mix::kTeacher
            ? paper_knowledge<T, false>(p.classes, student_z, teacher_z, label, mixed, strength_)
            : paper_knowledge<T, true>(p.classes, student_z, teacher_z, label, mixed, strength_);
    if (p.maps) write_maps(y, vector, x.valid, pixel.reliability, pixel.discrepancy);
    if (p.space_statistics) {
      space_collect<T>(p.classes, strength_, x.valid, space_maximum_, space_sum_);
      return;
    }
    if (!p.hetero_term) return;
    F value, on_student, on_other;
    if (p.hetero == Hetero::kPaperSpace) {
      const T* shift = p.evaluation ? p.space_shift + image_ * p.classes : nullptr;
      const T* inverse = p.evaluation ? p.space_weight + image_ * p.classes : nullptr;
      const F sum = space_products<T>(p.classes, student_z, mixed, strength_, T(1) / t, shift,
                                      inverse, mixed);
      const T mean = p.evaluation ? T(1) : T(1) / static_cast<T>(p.classes);
      value = F(t * t * mean) * sum;
      on_student = F(p.scale[kHetero] * t * mean) * x.one;
      on_other = zero;
    } else {
      const PaperSums<F> q =
          p.evaluation ? paper_products<T, true>(p.classes, student_z, x.student_m, scale_, pixel,
                                                 mixed, strength_, mixed)
                       : paper_products<T, false>(p.classes, student_z, x.student_m, scale_, pixel,
                                                  mixed, strength_, mixed);
      value = F(static_cast<T>(kLn2)) * (x.student_log2 * q.q - q.q_a) * q.inverse;
      on_other = F(p.scale[kHetero] / t) * q.inverse * x.one;
      on_student = on_other * q.q * x.student_inverse;
    }
    if (p.values) {
      sums[kHetero * 2] = sums[kHetero * 2] + select(x.valid, value, zero);
    }
    select(x.valid, on_student, zero).store(coefficient(kHeteroStudent, r));
    select(x.valid, on_other, zero).store(coefficient(kHeteroOther, r));
  }

  void write_maps(int64_t y, int64_t vector, Mask<T> valid, F reliable, F discrepant) {
    T values[2][N];
    select(valid, reliable, F(T(0))).store(values[0]);
    select(valid, discrepant, F(T(0))).store(values[1]);
    const int64_t plane = p.label_height * p.label_width;
    for (int k = 0; k < 2; ++k) {
      T* out = p.map_values + (k * p.batch + image_) * plane + y * p.label_width;
      for (int l = 0; l < N; ++l) {
        const int32_t x = p.pixel[vector * N + l];
        if (x >= 0) out[x] = values[k][l];
      }
    }
  }

  // The lanes of a class become one; in double, because the sum may run over a million pixels.
  void reduce_space(int64_t band) {
    for (int64_t c = 0; c < p.classes; ++c) {
      const T* maximum = space_maximum_ + c * N;
      T largest = maximum[0];
      for (int l = 1; l < N; ++l) largest = maximum[l] > largest ? maximum[l] : largest;
      T factors[N];
      for (int l = 0; l < N; ++l) factors[l] = (maximum[l] - largest) * static_cast<T>(kLog2E);
      exp2(F::load(factors)).store(factors);
      double sum = 0.0;
      for (int l = 0; l < N; ++l) {
        sum += static_cast<double>(space_sum_[c * N + l]) * static_cast<double>(factors[l]);
      }
      p.space_maximum[band * p.classes + c] = largest;
      p.space_sum[band * p.classes + c] = static_cast<T>(sum);
    }
  }

  const Pass<T>& p;
  bool needs_pair_ = false, needs_soft_student_ = false, keeps_z_ = false, normalises_ = false;
  int power_ = 1;     // e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
  T scale_ = T(0);    // log2(e) / T
  int64_t image_ = 0;
  OneModel one_model_ = nullptr;
  TwoModels two_models_ = nullptr;
  Chain chain_ = nullptr;
  double* lane_sums_ = nullptr;  // [kTerms][2][N]
  T *student_e_ = nullptr, *teacher_e_ = nullptr, *hard_ = nullptr, *kd_q_ = nullptr;
  T *mixed_ = nullptr, *strength_ = nullptr, *coefficients_ = nullptr;
  T *chain_scratch_ = nullptr, *space_maximum_ = nullptr, *space_sum_ = nullptr;
  ChainSide<T> chain_student_{}, chain_teacher_{};
  Statistics<F> chain_statistics_[kMaxRows];
};

}  // namespace heteroakd::cpu::HAKD_ISA
