// Every term for a few vectors of pixels: which loops a call needs, what passes between them, and
// what they end in: sums for the values, coefficients for the gradients.
//
// The loops over classes are in statistics.h, chain.h, own_loop.h and gradients.h, the terms in
// ../terms.
#pragma once

#include "arena.h"
#include "chain.h"
#include "gradients.h"
#include "own_loop.h"

namespace heteroakd::cpu::HAKD_ISA {

constexpr int kMaxRows = 4;  // label rows at a time

// What is processed together: up to four label rows in one vector of columns.
template <typename T>
struct Group {
  int64_t y, vector;                // of the first
  const int32_t* labels[kMaxRows];  // [N] each
  bool student_careful, teacher_careful;  // huge, infinite or NaN logits are among them
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

// What the gradients need to know of a pixel; where not valid, each is 0.
enum Coefficient { kStudentCoefficient, kOtherCoefficient, kLabelCoefficient, kCoefficients };

template <typename T>
class Terms {
  using F = Lanes<T>;
  static constexpr int N = F::N;

 public:
  // Tiles [kMaxRows][C][N] of logits, and their maxima over the classes [kMaxRows][N]: filled from
  // outside before `process`.
  T *student_z = nullptr, *teacher_z = nullptr;
  T *student_maximum = nullptr, *teacher_maximum = nullptr;
  // Of all pixels of the band, as groups have them; no weights: null.
  const int32_t* labels = nullptr;
  const T* weights = nullptr;
  const bool reads_pair;  // whether there is a teacher to fill them for

  explicit Terms(const Pass<T>& pass)
      : reads_pair(pass.has_teacher),
        p(pass),
        needs_(pass.needs) {
    choose();
  }

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
    for_each_term([&](auto tag, int k) __attribute__((always_inline)) {
      using Term = typename decltype(tag)::type;
      const int32_t v = p.variant[k];
      if (!p.has[k]) return;
      const bool own_x = Term::student(v) == From::kOwn, own_y = Term::other_from(v) == From::kOwn;
      if (own_x || Term::kFirsts > 0) own_tiles_[k][0] = arena.take<T>(Term::kFirsts > 0 && !own_x ? tile : group);
      if (own_y || Term::kFirsts > 1) own_tiles_[k][1] = arena.take<T>(own_y ? group : tile);
    });
    if (chain_ != nullptr) chain_scratch_ = arena.take<T>(6 * tile);
    coefficients_ = arena.take<T>(kTerms * kCoefficients * kMaxRows * N);
    student_maximum = arena.take<T>(kMaxRows * N);
    teacher_maximum = arena.take<T>(kMaxRows * N);
    if (p.collected < 0) return;
    space_maximum_ = arena.take<T>(kMostFirsts * tile);
    space_sum_ = arena.take<T>(kMostFirsts * tile);
    if (p.tallies == nullptr) return;
    tallies_ = arena.take<T>(kMostTallies * tile);
    tally_sums_ = arena.take<double>(kMostTallies * tile);
  }

  void begin(int64_t image) {
    image_ = image;
    for (int64_t i = 0; i < kTerms * 2 * N; ++i) lane_sums_[i] = 0.0;
    if (p.collected < 0) return;
    for (int64_t i = 0; i < kMostFirsts * p.classes * N; ++i) {
      space_maximum_[i] = T(-1e30);
      space_sum_[i] = T(0);
    }
    for (int64_t i = 0; i < kMostTallies * p.classes * N && p.tallies != nullptr; ++i) {
      tallies_[i] = T(0);
      tally_sums_[i] = 0.0;
    }
  }

  // The band's sums leave it, lane after lane.
  void end(int64_t band) {
    double* sums = p.sums + band * kTerms * 2;
    for (int k = 0; k < kTerms * 2; ++k) {
      sums[k] = 0.0;
      for (int l = 0; l < N; ++l) sums[k] += lane_sums_[k * N + l];
    }
    if (p.collected < 0) return;
    if (p.tallies != nullptr) return reduce_tallies(band);
    reduce_space(band);
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
    ClassSums<F>* sums[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r) sums[r] = &totals_[r];
    chain_(p.classes, chain_student_, chain_teacher_, student_e_, teacher_e_, scale_, group.labels,
           chain_scratch_, sums);
    for (int r = 0; r < kMaxRows; ++r) {
      if (!chain_held<T>(totals_[r].student_total, valid[r])) return false;
      chain_reference(chain_student_, student_fraction[r]).store(student_maximum + r * N);
      if (!reads_pair) continue;
      if (!chain_held<T>(totals_[r].teacher_total, valid[r])) return false;
      chain_reference(chain_teacher_, teacher_fraction[r]).store(teacher_maximum + r * N);
    }
    return true;
  }

  // kRows label rows from group.y on (kUpsample), or as many neighbouring vectors on the label grid.
  // Their logits are in student_z and teacher_z, and the maxima in theirs; unless `chained`, where
  // `chain` has left all there is to know. sink(term): where the gradients of a term go.
  template <int kRows, bool kUpsample, typename Sinks>
  void process(const Group<T>& group, bool chained, const Sinks& sink) {
    totals<kRows, kUpsample>(group, chained);
    if (p.diagnostics) diagnose<kRows, kUpsample>(group);
    for_each_term([&](auto tag, int k) __attribute__((always_inline)) {
      using Term = typename decltype(tag)::type;
      if (!p.has[k]) return;
      pixels<Term, kRows, kUpsample>(group);
      if (p.gradient_of[k] >= 0) send_gradient<Term, kRows, kUpsample>(group, sink(k));
    });
  }

 private:
  // --- which loops -------------------------------------------------------------------------------

  using OneModel = void (*)(int64_t, const T*, T*, T*, F, T, T, Labels<T>, ClassSums<F>&);
  using TwoModels = void (*)(int64_t, const T*, const T*, T*, T*, T*, F, F, T, T, Labels<T>,
                             ClassSums<F>&);
  using Chain = void (*)(int64_t, const ChainSide<T>&, const ChainSide<T>&, T*, T*, T,
                         const int32_t* const*, T*, ClassSums<F>* const*);
  using Gradient = void (*)(int64_t, const GradientParts<T>&, const T*, const Sink<T>&);

  void choose() {
    const bool soft = needs_.pair || needs_.student_total;
    const bool cross = needs_.mixture && p.values;
    normalises_ = !needs_.raw_logits;
    scale_ = p.numbers.scale;
    const T t = p.numbers.temperature;
    power_ = t == T(1) ? 1 : t == T(2) ? 2 : t == T(4) ? 4 : 0;
    // Double has no chain: it is the plain path.
    keeps_z_ = needs_.keeps_logits();
    const bool chains = !p.identity && !keeps_z_ && sizeof(T) == 4;
    if (needs_.pair) {
      const int hard = needs_.teacher_nll ? 2 : needs_.student_nll ? 1 : 0;
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
    } else if (soft) {
      one_model_ = power_ == 1   ? choose_one<1>()
                   : power_ == 2 ? choose_one<2>()
                   : power_ == 4 ? choose_one<4>()
                                 : choose_one<0>();
    } else if (needs_.student_nll) {
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
    return needs_.student_nll ? one_model<T, kPower, true, true> : one_model<T, kPower, true, false>;
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

  T* coefficient(int term, Coefficient k, int row) {
    return coefficients_ + ((term * kCoefficients + k) * kMaxRows + row) * N;
  }

  // --- pixel by pixel ----------------------------------------------------------------------------

  // Step by step for all the rows at hand: each step is a chain of dependent operations, and rows
  // side by side hide its latency.
  template <int kRows, bool kUpsample>
  void totals(const Group<T>& group, bool chained) {
    const int32_t common = common_label<kRows>(group.labels);
    for (int r = 0; r < kRows; ++r) prepare<kUpsample>(group, r, common, chained);
    const int64_t tile = p.classes * N;
    for (int r = 0; r < kRows && !chained; ++r) {
      T* hard = hard_ + r * tile;
      const Labels<T> labels = load_labels<T>(group.labels[r]);
      const F student_m = F::load(student_maximum + r * N);
      if (needs_.pair) {
        two_models_(p.classes, student_z + r * tile, teacher_z + r * tile, student_e_ + r * tile,
                    teacher_e_ + r * tile, hard, student_m, F::load(teacher_maximum + r * N),
                    scale_, static_cast<T>(kLog2E), labels, totals_[r]);
      } else if (one_model_ != nullptr) {
        one_model_(p.classes, student_z + r * tile, student_e_ + r * tile, hard, student_m, scale_,
                   static_cast<T>(kLog2E), labels, totals_[r]);
      }
    }
    if (needs_.student_nll) {
      for (int r = 0; r < kRows; ++r) find_student_nll(totals_[r]);
    }
    if (needs_.teacher_nll) {
      for (int r = 0; r < kRows; ++r) find_teacher_nll(totals_[r]);
    }
    if (needs_.pair || needs_.student_total) {
      for (int r = 0; r < kRows; ++r) find_student_total(totals_[r]);
    }
    if (needs_.pair) {
      for (int r = 0; r < kRows; ++r) find_pair(totals_[r]);
    }
    if (needs_.teacher_at_top) {
      for (int r = 0; r < kRows; ++r) {
        totals_[r].teacher_at_top = teacher_at_top<T>(
            p.classes, student_z + r * tile, teacher_z + r * tile,
            F::load(student_maximum + r * N), F::load(teacher_maximum + r * N), scale_);
      }
    }
    if (needs_.weighted_z && p.values) {
      for (int r = 0; r < kRows; ++r) {
        totals_[r].weighted_z = weighted_logits<T>(p.classes, student_z + r * tile,
                                                   F::load(student_maximum + r * N), p.class_weight);
      }
    }
  }

  template <bool kUpsample>
  HAKD_FN void prepare(const Group<T>& group, int r, int32_t common, bool chained) {
    const int64_t tile = p.classes * N;
    const int32_t* labels = group.labels[r];
    Totals<F>& t = totals_[r];
    if (needs_.student_nll) {
      const F z = kUpsample && chained
                      ? between(chain_student_, p.student.row_fraction[group.y + r], labels, common)
                      : at_label(student_z + r * tile, labels, common);
      t.student_label = z - F::load(student_maximum + r * N);
      t.label_weight = F(T(1));
      if (p.class_weight != nullptr) {
        T weights[N];
        const auto classes = static_cast<uint32_t>(p.classes);
        for (int l = 0; l < N; ++l) {
          const bool labelled = static_cast<uint32_t>(labels[l]) < classes;
          weights[l] = labelled ? p.class_weight[labels[l]] : T(0);
        }
        t.label_weight = F::load(weights);
      }
    }
    if (needs_.teacher_nll) {
      const F z = kUpsample && chained
                      ? between(chain_teacher_, p.teacher.row_fraction[group.y + r], labels, common)
                      : at_label(teacher_z + r * tile, labels, common);
      t.teacher_label = z - F::load(teacher_maximum + r * N);
    }
    if (p.unlabelled) {
      // Nobody can be asked but the teacher: reliability becomes 1 by a student that is never right.
      const Mask<T> unlabelled = is_unlabelled(group.labels[r]);
      if (needs_.student_nll) t.student_label = select(unlabelled, F(T(-1e30)), t.student_label);
      if (needs_.teacher_nll) t.teacher_label = select(unlabelled, F(T(0)), t.teacher_label);
    }
    const T log2_of_e = static_cast<T>(kLog2E);
    const T largest_scale = scale_ > log2_of_e ? scale_ : log2_of_e;
    // after the labels: the loss of a label on a masked class is infinite, not merely large
    if (normalises_ && group.student_careful) {
      normalise<T>(p.classes, largest_scale, student_z + r * tile, student_maximum + r * N);
    }
    if (normalises_ && group.teacher_careful && reads_pair) {
      normalise<T>(p.classes, largest_scale, teacher_z + r * tile, teacher_maximum + r * N);
    }
  }

  // The class that all of these pixels are labelled with, or -1: most of a real label map is one
  // class as far as a few vectors reach, and then nothing needs to be gathered.
  // Of unlabelled pixels alone that is the number of classes.
  template <int kRows>
  HAKD_FN static int32_t common_label(const int32_t* const* labels) {
    const int32_t first = labels[0][0];
    bool same = first >= 0;
    for (int r = 0; r < kRows; ++r) {
      same = same && all(is_class(load_labels<T>(labels[r]), first));
    }
    return same ? first : -1;
  }

  // Of an unlabelled pixel what lies behind the last class: there is room for a class (Arena), and
  // whatever is there is replaced.
  HAKD_FN static F at_label(const T* z, const int32_t* labels, int32_t common) {
    return common >= 0 ? F::load(z + static_cast<int64_t>(common) * N) : gather_tile(z, labels);
  }

  const T* weights_of(const Group<T>& group, int r) const {
    return weights == nullptr ? nullptr : weights + (group.labels[r] - labels);
  }

  HAKD_FN Mask<T> is_unlabelled(const int32_t* labels) const {
    return is_class(load_labels<T>(labels), static_cast<int32_t>(p.classes));
  }

  // The logit of the labelled class, interpolated as `interpolate` does it.
  HAKD_FN static F between(const ChainSide<T>& side, T fraction, const int32_t* labels,
                           int32_t common) {
    const F lo = at_label(side.lo, labels, common);
    return fma(F(fraction), at_label(side.hi, labels, common) - lo, lo);
  }

  // Value and coefficients of a term at the rows at hand.
  template <class Term, int kRows, bool kUpsample>
  HAKD_FN void pixels(const Group<T>& group) {
    constexpr int k = index_of<Term>;
    const int32_t v = p.variant[k];
    if constexpr (Term::kTallies > 0) {
      if (p.collected == k) tally<Term, kRows>(group);
      if (!p.gradients) return;  // its value is known
    }
    const auto& numbers = p.term_numbers.template of<Term>();
    const F zero(T(0));
    typename Term::template Known<F> known[kRows];
    for (int r = 0; r < kRows; ++r) known[r] = Term::begin(v, numbers, p.numbers, totals_[r]);
    F value = zero, share = zero;
    for (int r = 0; r < kRows; ++r) {
      const Labels<T> labels = load_labels<T>(group.labels[r]);
      const Mask<T> valid = Term::kNeedsLabel ? is_labelled(labels, p.classes) : is_valid(labels);
      typename Term::template Own<F> own{};
      with_variant<Term>(v, [&](auto variant) __attribute__((always_inline)) {
        constexpr int32_t kVariant = decltype(variant)::value;
        constexpr bool kLoops = Term::has_loop(kVariant) || Term::student(kVariant) == From::kOwn ||
                                Term::other_from(kVariant) == From::kOwn;
        if constexpr (kLoops || Term::has_value_loop(kVariant)) {
          if (kLoops || (p.asked[k] && p.values)) {
            own = loop<Term, kVariant>(group, r, valid, known[r]);
          }
        }
      });
      if constexpr (Term::kMapped) {
        if (p.maps) {
          write_plane<kUpsample>(group, r, 0, valid, known[r].reliability);
          write_plane<kUpsample>(group, r, 1, valid, known[r].discrepancy);
        }
      }
      if (!p.asked[k]) continue;
      Coefficients<F> c =
          Term::pixel(v, numbers, p.numbers, totals_[r], known[r], own, p.scale[k]);
      F of_pixel = c.value;
      if constexpr (Term::kHasValueLoop) {
        if (Term::has_value_loop(v)) of_pixel = of_pixel * own.sum;
      }
      if (weights != nullptr && Term::spaces(v) == 0) {  // over space the shares have it
        const F weight = F::load(weights_of(group, r));
        of_pixel = of_pixel * weight;
        c = {c.value, c.share * weight, c.student * weight, c.other * weight, c.label * weight};
      }
      value = value + select(valid, of_pixel, zero);
      if (p.has_shares[k]) share = share + select(valid, c.share, zero);
      if (Term::student(v) != From::kNone) {
        select(valid, c.student, zero).store(coefficient(k, kStudentCoefficient, r));
      }
      if (Term::other_from(v) != From::kNone) {
        select(valid, c.other, zero).store(coefficient(k, kOtherCoefficient, r));
      }
      if (Term::has_label(v)) {
        select(valid, c.label, zero).store(coefficient(k, kLabelCoefficient, r));
      }
    }
    if (!p.values || !p.asked[k]) return;
    add_to(lane_sums_ + k * 2 * N, value);
    if (p.has_shares[k]) add_to(lane_sums_ + (k * 2 + 1) * N, share);
  }

  HAKD_FN LoopTiles<T> tiles_of(const Group<T>& group, int r) const {
    const int64_t tile = p.classes * N;
    LoopTiles<T> tiles;
    tiles.student_z = student_z + r * tile;
    tiles.student_e = student_e_ + r * tile;
    // what no term reads is read all the same where nothing is compiled away
    tiles.teacher_z = (reads_pair ? teacher_z : student_z) + r * tile;
    tiles.teacher_e = (reads_pair ? teacher_e_ : student_e_) + r * tile;
    tiles.student_hard = power_ == 0 ? hard_ + r * tile : student_e_ + r * tile;
    tiles.power = power_;
    tiles.student_m = F::load(student_maximum + r * N);
    tiles.teacher_m = F::load(teacher_maximum + r * N);
    tiles.labels = group.labels[r];
    tiles.weights = weights_of(group, r);
    return tiles;
  }

  // Sums of a term over classes. Few addends are added up in T before they are in double.
  template <class Term, int kRows>
  void tally(const Group<T>& group) {
    LoopTiles<T> tiles[kRows];
    Labels<T> labels[kRows];
    F weight[kRows];
    for (int r = 0; r < kRows; ++r) {
      tiles[r] = tiles_of(group, r);
      labels[r] = load_labels<T>(group.labels[r]);
      weight[r] = weights == nullptr ? F(T(1)) : F::load(weights_of(group, r));
    }
    const int64_t tile = p.classes * N;
    for (int64_t c = 0; c < p.classes; ++c) {
      Tally<F> sum;
      for (int j = 0; j < Term::kTallies; ++j) sum.v[j] = F::load(tallies_ + j * tile + c * N);
      for (int r = 0; r < kRows; ++r) {
        const Mask<T> valid = is_labelled(labels[r], p.classes);
        const auto one = class_of<T, false>(c, tiles[r], scale_, labels[r], valid);
        const Tally<F> found = Term::tally(totals_[r], one);
        for (int j = 0; j < Term::kTallies; ++j) {
          sum.v[j] = sum.v[j] + select(valid, weight[r] * found.v[j], F(T(0)));
        }
      }
      for (int j = 0; j < Term::kTallies; ++j) sum.v[j].store(tallies_ + j * tile + c * N);
    }
    if (++tallied_ % 16 == 0) flush_tallies();
  }

  void flush_tallies() {
    for (int64_t i = 0; i < kMostTallies * p.classes * N; ++i) {
      tally_sums_[i] += static_cast<double>(tallies_[i]);
      tallies_[i] = T(0);
    }
  }

  void reduce_tallies(int64_t band) {
    flush_tallies();
    const int64_t bands = p.batch * p.bands_per_image;
    for (int64_t i = 0; i < kMostTallies * p.classes; ++i) {
      double sum = 0.0;
      for (int l = 0; l < N; ++l) sum += tally_sums_[i * N + l];
      p.tallies[(i / p.classes * bands + band) * p.classes + i % p.classes] = sum;
    }
  }

  // The loops over classes of one term and row.
  template <class Term, int32_t kVariant>
  typename Term::template Own<F> loop(const Group<T>& group, int r, Mask<T> valid,
                                      typename Term::template Known<F>& known) {
    constexpr int k = index_of<Term>;
    constexpr bool kBounds = Term::bounds(kVariant) > 0;
    constexpr int32_t kLoopVariant = kBounds ? kVariant & ~Term::kFirstBits : kVariant;
    const int64_t tile = p.classes * N;
    LoopTiles<T> tiles = tiles_of(group, r);
    // a tile of `first` that the gradient reads, too, there is for every row
    const bool own_x = Term::student(kVariant) == From::kOwn;
    const bool own_y = Term::other_from(kVariant) == From::kOwn;
    tiles.own_x = own_x ? own_tiles_[k][0] + r * tile : nullptr;
    tiles.own_y = own_y ? own_tiles_[k][1] + r * tile : nullptr;
    tiles.first[0] = own_x ? tiles.own_x : own_tiles_[k][0];
    tiles.first[1] = own_y ? tiles.own_y : own_tiles_[k][1];
    if (Term::kTallies > 0) {
      tiles.shift[0] = p.space_shift[k];
      tiles.shift[1] = p.space_inverse[k];
    }
    for (int i = 0; i < Term::spaces(kVariant) && p.space_shift[k] != nullptr; ++i) {
      const int64_t first = (i * p.batch + image_) * p.classes;
      tiles.shift[i] = p.space_shift[k] + first;
      tiles.inverse[i] = p.space_inverse[k] + first;
      tiles.log[i] = p.space_log[k] + first;
    }
    First<F> maxima{{F(T(0)), F(T(0))}};
    if (kBounds || p.collected == k || !p.asked[k]) {
      if constexpr (Term::kFirsts > 0) {
        maxima = find_first<T, Term, kVariant & Term::kFirstBits>(p, tiles, known);
      }
    }
    for (int i = 0; i < Term::spaces(kVariant) && p.collected == k; ++i) {
      const int64_t plane = i * p.classes * N;
      collect_space<T>(p.classes, tiles.first[i], valid, tiles.weights, space_maximum_ + plane,
                       space_sum_ + plane);
    }
    if (!p.asked[k]) return {};
    if constexpr (Term::kGathers) {
      gather_loop<T, Term, kLoopVariant>(p, tiles, known);
      const auto own =
          own_loop<T, Term, kLoopVariant, kBounds>(p, tiles, maxima, totals_[r], known);
      Term::close(kVariant, p.term_numbers.template of<Term>(), p.numbers, known, own);
      // of these sums x and y are made
      if (p.gradients) own_loop<T, Term, kLoopVariant, kBounds>(p, tiles, maxima, totals_[r], known);
      return own;
    } else {
      return own_loop<T, Term, kLoopVariant, kBounds>(p, tiles, maxima, totals_[r], known);
    }
  }

  template <class Term, int kRows, bool kUpsample>
  HAKD_FN void send_gradient(const Group<T>& group, const Sink<T>& sink) {
    constexpr int k = index_of<Term>;
    const auto tile_of = [&](From from, const T* own) __attribute__((always_inline)) -> const T* {
      return from == From::kStudentHard && power_ == 0 ? hard_
             : from == From::kStudentHard              ? student_e_
             : from == From::kStudent                  ? student_e_
             : from == From::kTeacher                  ? teacher_e_
             : from == From::kStudentZ                 ? student_z
             : from == From::kTeacherZ                 ? teacher_z
                                                       : own;
    };
    with_variant<Term>(p.variant[k], [&](auto variant) __attribute__((always_inline)) {
      constexpr int32_t v = decltype(variant)::value;
      constexpr From x = Term::student(v), y = Term::other_from(v);
      constexpr OtherKind kOther = y == From::kNone          ? OtherKind::kNone
                                   : y == From::kClassWeight ? OtherKind::kClassWeight
                                                             : OtherKind::kTile;
      static_assert(y != From::kStudentHard, "only x is taken to a power");
      constexpr bool kLabel = Term::has_label(v);
      const GradientParts<T> parts{tile_of(x, own_tiles_[k][0]),
                                   tile_of(y, own_tiles_[k][1]),
                                   coefficient(k, kStudentCoefficient, 0),
                                   coefficient(k, kOtherCoefficient, 0),
                                   coefficient(k, kLabelCoefficient, 0),
                                   group.labels,
                                   p.class_weight};
      Gradient run = term_gradient<T, x == From::kNone ? 0 : 1, kOther, kLabel, kRows, kUpsample>;
      if constexpr (x == From::kStudentHard) {
        if (power_ == 2) run = term_gradient<T, 2, kOther, kLabel, kRows, kUpsample>;
        if (power_ == 4) run = term_gradient<T, 4, kOther, kLabel, kRows, kUpsample>;
      }
      run(p.classes, parts, p.student.row_fraction + group.y, sink);
    });
  }

  // Of labelled pixels the loss and whether the label is on top, of all whether the teacher's top is there.
  template <int kRows, bool kUpsample>
  void diagnose(const Group<T>& group) {
    const F zero(T(0)), one(T(1));
    const int plane = p.maps ? 2 : 0;
    for (int r = 0; r < kRows; ++r) {
      const Labels<T> labels = load_labels<T>(group.labels[r]);
      const Mask<T> valid = is_valid(labels), without = is_unlabelled(group.labels[r]);
      const Totals<F>& t = totals_[r];
      const auto labelled = [&](F x) { return select(without, zero, x); };
      write_plane<kUpsample>(group, r, plane, valid, labelled(t.student_nll));
      write_plane<kUpsample>(group, r, plane + 1, valid,
                             labelled(select(equal(t.student_label, zero), one, zero)));
      const F agrees = needs_.teacher_at_top ? select(equal(t.teacher_at_top, zero), one, zero) : zero;
      write_plane<kUpsample>(group, r, plane + 2, valid, agrees);
    }
  }

  template <bool kUpsample>
  void write_plane(const Group<T>& group, int r, int plane, Mask<T> valid, F x) {
    T values[N];
    select(valid, x, F(T(0))).store(values);
    const int64_t y = kUpsample ? group.y + r : group.y;
    const int64_t vector = kUpsample ? group.vector : group.vector + r;
    T* out = p.map_values +
             ((plane * p.batch + image_) * p.label_height + y) * p.label_width;
    for (int l = 0; l < N; ++l) {
      const int32_t place = p.pixel[vector * N + l];
      if (place >= 0) out[place] = values[l];
    }
  }

  // The lanes of a class become one; in double, because the sum may run over a million pixels.
  void reduce_space(int64_t band) {
    const int64_t bands = p.batch * p.bands_per_image;
    for (int64_t i = 0; i < kMostFirsts * p.classes; ++i) {
      const T* maximum = space_maximum_ + i * N;
      T largest = maximum[0];
      for (int l = 1; l < N; ++l) largest = maximum[l] > largest ? maximum[l] : largest;
      T factors[N];
      for (int l = 0; l < N; ++l) factors[l] = (maximum[l] - largest) * static_cast<T>(kLog2E);
      exp2(F::load(factors)).store(factors);
      double sum = 0.0;
      for (int l = 0; l < N; ++l) {
        sum += static_cast<double>(space_sum_[i * N + l]) * static_cast<double>(factors[l]);
      }
      const int64_t to = (i / p.classes * bands + band) * p.classes + i % p.classes;
      p.space_maximum[to] = largest;
      p.space_sum[to] = static_cast<T>(sum);
    }
  }

  const Pass<T>& p;
  const Needs needs_;
  bool keeps_z_ = false, normalises_ = false;
  int power_ = 1;     // e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
  T scale_ = T(0);    // log2(e) / T
  int64_t image_ = 0;
  OneModel one_model_ = nullptr;
  TwoModels two_models_ = nullptr;
  Chain chain_ = nullptr;
  double* lane_sums_ = nullptr;  // [kTerms][2][N]
  T *student_e_ = nullptr, *teacher_e_ = nullptr, *hard_ = nullptr, *coefficients_ = nullptr;
  // Of each term tiles for first.v, x and y: of every row where the gradient reads them.
  T* own_tiles_[kTerms][kMostFirsts] = {};
  T* tallies_ = nullptr;  // [kMostTallies][C][N]
  double* tally_sums_ = nullptr;
  int64_t tallied_ = 0;
  T *chain_scratch_ = nullptr, *space_maximum_ = nullptr, *space_sum_ = nullptr;
  ChainSide<T> chain_student_{}, chain_teacher_{};
  Totals<F> totals_[kMaxRows];
};

}  // namespace heteroakd::cpu::HAKD_ISA
