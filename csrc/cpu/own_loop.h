// The loops over classes that belong to a term, for one vector of pixels: maxima over the classes (or
// totals over space), then the sums of `other` and what the gradient needs of it.
//
// Arrays are tiles [C][N]: class by class, N pixels each.
#pragma once

#include "statistics.h"

namespace heteroakd::cpu::HAKD_ISA {

// What the loops of one vector of pixels read and write.
template <typename T>
struct LoopTiles {
  const T *student_z, *teacher_z, *student_e, *teacher_e;
  const T* student_hard;  // e at T = 1 is this to `power`
  int power;
  T* first[kMostFirsts];  // first.v, where it is kept
  T *own_x, *own_y;       // for the gradient; may be first[0] and first[1]
  Lanes<T> student_m, teacher_m;
  const int32_t* labels;
  const T* weights;       // of the pixels, or null
  const T* shift[kMostFirsts];    // [C], of terms over space; of those over classes, the numbers
  const T* inverse[kMostFirsts];
  const T* log[kMostFirsts];
};

// What a term reads of class c; the rest is compiled away. kHasA: the logits are still there.
template <typename T, bool kHasA>
HAKD_FN Class<Lanes<T>, Mask<T>> class_of(int64_t c, const LoopTiles<T>& tiles, T scale,
                                          const Labels<T>& labels, Mask<T> unlabelled) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  Class<F, Mask<T>> k;
  k.student_z = F::load(tiles.student_z + c * N);
  k.teacher_z = F::load(tiles.teacher_z + c * N);
  k.student_a = kHasA ? (k.student_z - tiles.student_m) * F(scale) : F(T(0));
  k.teacher_a = kHasA ? (k.teacher_z - tiles.teacher_m) * F(scale) : F(T(0));
  k.student_e = F::load(tiles.student_e + c * N);
  k.teacher_e = F::load(tiles.teacher_e + c * N);
  k.student_hard = F::load(tiles.student_hard + c * N);
  if (tiles.power > 1) k.student_hard = power<2>(k.student_hard);
  if (tiles.power > 2) k.student_hard = power<2>(k.student_hard);
  k.is_label = is_class(labels, static_cast<int32_t>(c));
  k.unlabelled = unlabelled;
  return k;
}

// first.v into its tiles; returns the maxima over the classes.
template <typename T, class Term, int32_t kVariant>
First<Lanes<T>> find_first(const Pass<T>& p, const LoopTiles<T>& all,
                           typename Term::template Known<Lanes<T>>& known_out) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const LoopTiles<T> tiles = all;
  const auto numbers = p.term_numbers.template of<Term>();
  const PassNumbers<T> pass = p.numbers;
  auto known = known_out;
  const Labels<T> labels = load_labels<T>(tiles.labels);
  const Mask<T> unlabelled = is_class(labels, static_cast<int32_t>(p.classes));
  First<F> maxima{{F(-kInfinity<T>), F(-kInfinity<T>)}};
  for (int64_t c = 0; c < p.classes; ++c) {
    auto k = class_of<T, true>(c, tiles, pass.scale, labels, unlabelled);
    for (int i = 0; i < 2 && Term::kTallies > 0; ++i) k.space[i] = F(tiles.shift[i][c]);
    const First<F> first = Term::first(kVariant, numbers, pass, known, k);
    for (int i = 0; i < Term::kFirsts; ++i) {
      first.v[i].store(tiles.first[i] + c * N);
      maxima.v[i] = max(first.v[i], maxima.v[i]);
    }
  }
  known_out = known;
  return maxima;
}

// The sums of `gather`, and what is known of them.
template <typename T, class Term, int32_t kVariant>
void gather_loop(const Pass<T>& p, const LoopTiles<T>& all,
                 typename Term::template Known<Lanes<T>>& known) {
  using F = Lanes<T>;
  const LoopTiles<T> tiles = all;
  const auto numbers = p.term_numbers.template of<Term>();
  const PassNumbers<T> pass = p.numbers;
  typename Term::template Own<F> own{};
  const Labels<T> labels = load_labels<T>(tiles.labels);
  const Mask<T> unlabelled = is_class(labels, static_cast<int32_t>(p.classes));
  for (int64_t c = 0; c < p.classes; ++c) {
    const auto k = class_of<T, Term::needs(kVariant).logits>(c, tiles, pass.scale, labels, unlabelled);
    Term::gather(kVariant, numbers, pass, k, own);
  }
  Term::learn(kVariant, numbers, pass, known, own);
}

// Sums of `other`, and own_x, own_y where the gradient reads them. Where the term has bounds, first.v
// is in its tiles and `maxima` are its maxima; otherwise it is found here.
template <typename T, class Term, int32_t kVariant, bool kBounds>
typename Term::template Own<Lanes<T>> own_loop(const Pass<T>& p, const LoopTiles<T>& all,
                                               const First<Lanes<T>>& maxima,
                                               const Totals<Lanes<T>>& totals,
                                               typename Term::template Known<Lanes<T>>& known_out) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  constexpr int kSpaces = Term::spaces(kVariant);
  const LoopTiles<T> tiles = all;
  const auto numbers = p.term_numbers.template of<Term>();
  const PassNumbers<T> pass = p.numbers;
  auto known = known_out;
  typename Term::template Own<F> own{};
  Term::start(kVariant, known, totals, own);
  const Labels<T> labels = load_labels<T>(tiles.labels);
  const Mask<T> unlabelled = is_class(labels, static_cast<int32_t>(p.classes));
  const First<F> bound = maxima;
  const F weight = tiles.weights == nullptr ? F(T(1)) : F::load(tiles.weights);
  const Mask<T> valid = is_valid(labels);
  for (int64_t c = 0; c < p.classes; ++c) {
    auto k = class_of<T, Term::needs(kVariant).logits>(c, tiles, pass.scale, labels, unlabelled);
    First<F> first;
    if constexpr (kBounds) {
      for (int i = 0; i < Term::kFirsts; ++i) {
        first.v[i] = F::load(tiles.first[i] + c * N) - bound.v[i];
      }
    } else {
      first = Term::first(kVariant, numbers, pass, known, k);
    }
    for (int i = 0; i < kSpaces; ++i) {
      // an invalid pixel has no bound over space
      const F below = select(valid, first.v[i] - F(tiles.shift[i][c]), F(T(-1e30)));
      k.space[i] = exp2(below * F(T(kLog2E))) * (weight * F(tiles.inverse[i][c]));
      k.space_log[i] = F(tiles.log[i][c]);
    }
    for (int i = 0; i < 2 && Term::kTallies > 0; ++i) k.space[i] = F(tiles.shift[i][c]);
    const Pair<F> pair = Term::other(kVariant, numbers, pass, known, k, first, own);
    if constexpr (Term::student(kVariant) == From::kOwn) pair.x.store(tiles.own_x + c * N);
    if constexpr (Term::other_from(kVariant) == From::kOwn) pair.y.store(tiles.own_y + c * N);
  }
  if constexpr (!kBounds && Term::kFirsts > 0) known_out = known;
  return own;
}

// Adds one vector of pixels to a class's maximum and sum of exp, times the pixels' weights, over space,
// lane by lane, with a running maximum.
template <typename T>
void collect_space(int64_t classes, const T* logits, Mask<T> valid, const T* weights, T* maximum,
                   T* sum) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F weight = weights == nullptr ? F(T(1)) : F::load(weights);
  for (int64_t c = 0; c < classes; ++c) {
    const F v = select(valid, F::load(logits + c * N), F(T(-1e30)));
    const F before = F::load(maximum + c * N);
    const F now = max(v, before);
    // a NaN must show; max drops one in its first operand
    const F total = F::load(sum + c * N) * exp2((before - now) * F(T(kLog2E)));
    const F more = select(valid, weight * exp2((v - now) * F(T(kLog2E))), F(T(0)));
    now.store(maximum + c * N);
    (total + more).store(sum + c * N);
  }
}

}  // namespace heteroakd::cpu::HAKD_ISA
