// One band of one image: the fused pass.
//
// For every pixel of the band: interpolate both models' logits, evaluate every term asked for, and
// send the gradients back through the adjoint of the interpolation. Nothing of B x C x H x W is
// stored: a band holds a few rows of logits and of their gradients, a vector of pixels its tiles.
//
// Order of work. The band's rows of logits are packed (float, dense, padded). Then, vector of
// columns by vector of columns, the label rows are walked downwards: the two rows of logits around
// them are brought to the vector's columns once per row of logits (horizontally), every label row
// is a mixture of the two (vertically, one multiply-add), and its gradient is collected in two
// tiles that return to the logits' columns once per row of logits. So horizontal work is paid per
// row of logits and everything per label row is contiguous, whatever the ratio of the grids.
//
// Cost per pixel and class, preset softmax-kl, ce + hetero, T a power of two (in operations of a
// vector, which a multiply-add is one of): interpolation 4 + 10 per label row of a cell, 2
// exponentials (8 each), 13 for their sums, 1 logarithm (9) and 3 for the value of
// KL(m || p_s), 9 for both gradients and the vertical adjoint, 4 + 8 per label row of a cell for
// the horizontal one: the floor is about 57 at stride 4. Bytes: each logit read and each gradient
// written once per band (9/8 of them, for 8 rows), each label once. docs/cpu.md has what of it is
// reached.
//
// Bands do not depend on the number of threads, and what crosses their border goes to an edge row
// that is added afterwards: the bits of every result are the same for any thread count.
#pragma once

#include "chain.h"
#include "gradients.h"
#include "paper.h"
#include "rows.h"

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
// On the label grid: vectors at a time, and what a row of them takes; not a power of two.
constexpr int kChunk = 16;
template <typename T>
constexpr int64_t kChunkStepOf = kChunk * Lanes<T>::N + 16;

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
class Band {
  using F = Lanes<T>;
  static constexpr int N = F::N;
  static constexpr int64_t kChunkStep = kChunkStepOf<T>;

 public:
  Band(const Pass<T>& pass, void* workspace, int64_t band) : p(pass), band_(band) {
    if (pass.has_teacher || pass.hetero != Hetero::kNone) reads_pair_ = true;
    choose();
    lay_out(workspace);
  }

  static size_t workspace_bytes(const Pass<T>& pass) {
    Band band(pass, nullptr, 0);
    return band.bytes_ + 64;
  }

  void run(LabelReport& report) {
    image_ = band_ / p.bands_per_image;
    const int64_t k = band_ % p.bands_per_image;
    first_row_ = k * p.band_rows;
    end_row_ = first_row_ + p.band_rows < p.student.height ? first_row_ + p.band_rows
                                                            : p.student.height;
    first_label_row_ = p.first_label_row[k];
    end_label_row_ = p.first_label_row[k + 1];
    for (int64_t i = 0; i < kTerms * 2 * N; ++i) lane_sums_[i] = 0.0;
    read_labels(report);
    if (p.space_statistics) {
      fill(space_maximum_, p.classes * N, T(-1e30));
      fill(space_sum_, p.classes * N, T(0));
    }
    if (p.identity) {
      run_identity();
    } else {
      run_interpolated();
    }
    double* sums = p.sums + band_ * kTerms * 2;
    for (int k2 = 0; k2 < kTerms * 2; ++k2) {
      sums[k2] = 0.0;
      for (int l = 0; l < N; ++l) sums[k2] += lane_sums_[k2 * N + l];
    }
    if (p.space_statistics) reduce_space();
  }

 private:
  // The two rows of logits around the label rows at hand, brought to the columns of a vector.
  struct Cell {
    T* lo = nullptr;
    T* hi = nullptr;
    T* lo_range = nullptr;  // maximum and minimum over the classes, [2][N]
    T* hi_range = nullptr;
    int64_t lo_row = -1;
    int64_t hi_row = -1;
  };

  // --- memory ------------------------------------------------------------------------------------

  void lay_out(void* workspace) {
    Arena arena(workspace);
    int64_t label_rows = 0;
    for (int64_t k = 0; k < p.bands_per_image; ++k) {
      const int64_t rows = p.first_label_row[k + 1] - p.first_label_row[k];
      label_rows = rows > label_rows ? rows : label_rows;
    }
    const int64_t tile = p.classes * N;
    label_row_ = arena.take<int32_t>(p.label_width);
    labels_ = arena.take<int32_t>(label_rows * p.vectors * N);
    lane_sums_ = arena.take<double>(kTerms * 2 * N);
    const int64_t rows = p.band_rows + 1;
    const int64_t slots = p.gradients ? p.slots : 0;
    if (p.identity) {
      student_rows_ = arena.take<T>(p.classes * kChunkStep);
      if (reads_pair_) teacher_rows_ = arena.take<T>(p.classes * kChunkStep);
      if (p.gradients) row_gradients_ = arena.take<T>(p.classes * kChunkStep);
    } else {
      student_rows_ = arena.take<T>(rows * p.classes * p.student.padded);
      if (reads_pair_) {
        teacher_rows_ = arena.take<T>(p.teacher.max_rows * p.classes * p.teacher.padded);
      }
      row_gradients_ = arena.take<T>(slots * rows * p.classes * p.student.padded);
      lay_out(arena, student_);
      if (reads_pair_) lay_out(arena, teacher_);
      if (chain_ != nullptr) chain_scratch_ = arena.take<T>(6 * tile);
    }
    const int64_t group = kMaxRows * tile;
    student_z_ = arena.take<T>(group);
    student_e_ = keeps_z_ ? arena.take<T>(group) : student_z_;
    if (reads_pair_) {
      teacher_z_ = arena.take<T>(group);
      teacher_e_ = keeps_z_ ? arena.take<T>(group) : teacher_z_;
    }
    if (power_ == 0) hard_ = arena.take<T>(group);
    if (p.kd == KdDivergence::kReverse || p.kd == KdDivergence::kJs) kd_q_ = arena.take<T>(group);
    if (keeps_z_ && p.hetero != Hetero::kNone) {
      mixed_ = arena.take<T>(group);
      strength_ = arena.take<T>(tile);
    }
    for (int64_t s = 0; s < slots && !p.identity; ++s) {
      gradient_sum_[s] = arena.take<T>(tile);
      gradient_upper_[s] = arena.take<T>(tile);
    }
    coefficients_ = arena.take<T>(kCoefficients * kMaxRows * N);
    student_maximum_ = arena.take<T>(kMaxRows * N);
    teacher_maximum_ = arena.take<T>(kMaxRows * N);
    if (p.space_statistics) {
      space_maximum_ = arena.take<T>(tile);
      space_sum_ = arena.take<T>(tile);
    }
    bytes_ = arena.used();
  }

  void lay_out(Arena& arena, Cell& cell) {
    cell.lo = arena.take<T>(p.classes * N);
    cell.hi = arena.take<T>(p.classes * N);
    cell.lo_range = arena.take<T>(2 * N);
    cell.hi_range = arena.take<T>(2 * N);
  }

  T* coefficient(Coefficient k, int row) { return coefficients_ + (k * kMaxRows + row) * N; }

  HAKD_FN static void swap(T*& a, T*& b) {
    T* t = a;
    a = b;
    b = t;
  }

  HAKD_FN static void fill(T* p, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) p[i] = value;
  }

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
    needs_pair_ = p.kd != KdDivergence::kNone || softmax_kl;
    needs_soft_student_ = needs_pair_ || p.hetero == Hetero::kPaper;
    const bool cross = softmax_kl && p.mix == Mix::kProbs && p.values && p.hetero_term;
    normalises_ = !p.feature && p.hetero != Hetero::kPaper && p.hetero != Hetero::kPaperSpace;
    scale_ = static_cast<T>(kLog2E / static_cast<double>(p.temperature));
    power_ = p.temperature == T(1) ? 1 : p.temperature == T(2) ? 2 : p.temperature == T(4) ? 4 : 0;
    // Others read the logits of every pixel themselves. Double has no chain: it is the plain path.
    keeps_z_ = p.feature || p.kd == KdDivergence::kReverse || p.kd == KdDivergence::kJs ||
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
      if (chains) chain_ = chain<T, 1, 1, false, false>;
    }
  }

  template <int kPower>
  static Chain choose_chain(int hard, bool cross) {
    if (hard == 2) {
      return cross ? chain<T, kPower, 2, true, true> : chain<T, kPower, 2, false, true>;
    }
    return hard == 1 ? chain<T, kPower, 1, false, true> : chain<T, kPower, 0, false, true>;
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

  // --- labels ------------------------------------------------------------------------------------

  void read_labels(LabelReport& report) {
    for (int64_t y = first_label_row_; y < end_label_row_; ++y) {
      int32_t* row = label_row_;
      if (!read_dense_labels(y, row, report)) p.read_labels(p.labels.reader, image_, y, row, report);
      int32_t* out = labels_ + (y - first_label_row_) * p.vectors * N;
      const int64_t block = p.apart * N;
      int64_t x = 0;
      for (; x + block <= p.label_width; x += block) {
        for (int l = 0; l < N; ++l) {
          for (int64_t v = 0; v < p.apart; ++v) out[x + v * N + l] = row[x + l * p.apart + v];
        }
      }
      for (int64_t i = x; i < p.vectors * N; ++i) out[i] = p.pixel[i] < 0 ? -1 : row[p.pixel[i]];
    }
  }

  // A row that lies densely in memory and has no label out of range; false where that is not so.
  bool read_dense_labels(int64_t y, int32_t* out, LabelReport& report) const {
    const LabelsView& view = p.labels;
    if (view.stride[2] != 1 && p.label_width > 1) return false;
    const int64_t offset = image_ * view.stride[0] + y * view.stride[1];
    int64_t valid = 0;
    bool good;
    if (view.dtype == LabelDtype::kUint8) {
      good = read_labels_as(reinterpret_cast<const uint8_t*>(view.data) + offset, out, valid);
    } else if (view.dtype == LabelDtype::kInt32) {
      good = read_labels_as(reinterpret_cast<const int32_t*>(view.data) + offset, out, valid);
    } else {
      good = read_labels_as(reinterpret_cast<const int64_t*>(view.data) + offset, out, valid);
    }
    if (good) report.valid += valid;
    return good;
  }

  template <typename S>
  bool read_labels_as(const S* in, int32_t* out, int64_t& valid) const {
    const int64_t classes = p.labels.num_classes;
    const int64_t ignore = p.labels.ignore_index;
    int64_t bad = 0;
    for (int64_t x = 0; x < p.label_width; ++x) {
      const int64_t label = static_cast<int64_t>(in[x]);
      const bool in_range = static_cast<uint64_t>(label) < static_cast<uint64_t>(classes);
      const bool ignored = label == ignore;
      out[x] = in_range && !ignored ? static_cast<int32_t>(label) : -1;
      valid += in_range && !ignored;
      bad += !in_range && !ignored;
    }
    return bad == 0;
  }

  const int32_t* labels_of(int64_t y, int64_t vector) const {
    return labels_ + ((y - first_label_row_) * p.vectors + vector) * N;
  }

  // --- logits on the label grid ------------------------------------------------------------------

  // By chunks of columns: the planes of the classes lie at large, often even distances, so that
  // lines of the same column compete for the same sets of a cache. A run of each is copied.
  void run_identity() {
    for (int64_t y = first_label_row_; y < end_label_row_; ++y) {
      for (int64_t first = 0; first < p.vectors; first += kChunk) {
        const int64_t end = first + kChunk < p.vectors ? first + kChunk : p.vectors;
        identity_chunk(y, first, end);
      }
    }
    if (p.gradients && p.streams) fence();
  }

  void identity_chunk(int64_t y, int64_t first, int64_t end) {
    const int64_t x0 = first * N;
    const int64_t count = (end * N < p.label_width ? end * N : p.label_width) - x0;
    const int64_t vectors_end = end - (end - first) % kMaxRows;
    student_careful_ = load_chunk(p.student_logits, y, x0, count, student_rows_);
    if (reads_pair_) {
      teacher_careful_ = load_chunk(p.teacher_logits, y, x0, count, teacher_rows_);
    }
    if (p.gradients) fill(row_gradients_, p.classes * kChunkStep, T(0));
    for (int64_t v = first; v < vectors_end; v += kMaxRows) identity_group<kMaxRows>(y, v, v - first);
    for (int64_t v = vectors_end; v < end; ++v) identity_group<1>(y, v, v - first);
    if (p.gradients) {
      write_columns<T>(p.out, p.classes, image_, y, x0, count, kChunkStep, row_gradients_,
                       p.streams);
    }
  }

  bool load_chunk(const LogitsView& view, int64_t y, int64_t x0, int64_t count, T* rows) {
    read_columns<T>(view, p.classes, image_, y, x0, count, kChunkStep, rows);
    for (int64_t c = 0; c < p.classes; ++c) {
      for (int64_t x = count; x % N != 0; ++x) rows[c * kChunkStep + x] = T(0);
    }
    return any_huge<T>(p.classes, rows, count, kChunkStep, p.huge);
  }

  // Neighbouring vectors of a row take the place of the rows of `group`.
  template <int kVectors>
  void identity_group(int64_t y, int64_t vector, int64_t in_chunk) {
    Mask<T> valid[kVectors];
    bool some = false;
    for (int r = 0; r < kVectors; ++r) {
      valid[r] = is_valid(load_labels<T>(labels_of(y, vector + r)));
      some = some || any(valid[r]);
    }
    if (!some) return;
    const int64_t x = in_chunk * N;
    const int64_t ahead = (vector + kChunk) * N;
    load_identity<kVectors>(student_rows_ + x, valid, student_z_, student_maximum_,
                            p.student_logits, y, ahead);
    if (reads_pair_) {
      load_identity<kVectors>(teacher_rows_ + x, valid, teacher_z_, teacher_maximum_,
                              p.teacher_logits, y, ahead);
    }
    gradient_sum_[0] = row_gradients_ + x;
    process<kVectors, false>(y, vector, false);
  }

  template <int kVectors>
  void load_identity(const T* row, const Mask<T>* valid, T* z, T* maximum, const LogitsView& view,
                     int64_t y, int64_t ahead) {
    const int64_t tile = p.classes * N;
    // The same columns of the next chunk, so that memory works while the arithmetic does.
    const int64_t size = view.dtype == Dtype::kDouble ? 8 : view.dtype == Dtype::kFloat ? 4 : 2;
    const char* next = view.data + (image_ * view.stride[0] + y * view.stride[2] + ahead) * size;
    const int64_t next_step = view.stride[1] * size;
    const int64_t bytes = kVectors * N * size;
    F m[kVectors];
    for (int r = 0; r < kVectors; ++r) m[r] = F(-kInfinity<T>);
    for (int64_t c = 0; c < p.classes; ++c) {
      for (int64_t byte = 0; byte < bytes; byte += 64) {
        __builtin_prefetch(next + c * next_step + byte, 0, 2);
      }
      for (int r = 0; r < kVectors; ++r) {
        const F x = F::load(row + c * kChunkStep + r * N, valid[r]);
        x.store(z + r * tile + c * N);
        m[r] = max(x, m[r]);
      }
    }
    for (int r = 0; r < kVectors; ++r) m[r].store(maximum + r * N);
  }

  // --- logits on a grid of their own -------------------------------------------------------------

  void run_interpolated() {
    const int64_t rows = end_row_ - first_row_ + 1;
    const int64_t row_elements = p.classes * p.student.padded;
    if (p.gradients) fill(row_gradients_, p.slots * (p.band_rows + 1) * row_elements, T(0));
    if (first_label_row_ < end_label_row_) {
      const int64_t packed = end_row_ < p.student.height ? rows : rows - 1;
      student_careful_ = pack_rows<T>(p.student_logits, p.student, p.classes, image_, first_row_,
                                      packed, p.huge, student_rows_);
      if (reads_pair_) {
        teacher_first_ = p.teacher.row_lower[first_label_row_];
        int64_t last = p.teacher.row_lower[end_label_row_ - 1] + 1;
        last = last < p.teacher.height ? last : p.teacher.height - 1;
        teacher_careful_ =
            pack_rows<T>(p.teacher_logits, p.teacher, p.classes, image_, teacher_first_,
                         last - teacher_first_ + 1, p.huge, teacher_rows_);
      }
      for (int64_t vector = 0; vector < p.vectors; ++vector) sweep(vector);
    }
    if (p.gradients) write_rows();
  }

  void sweep(int64_t vector) {
    student_.lo_row = student_.hi_row = teacher_.lo_row = teacher_.hi_row = -1;
    gradient_row_ = -1;
    for (int64_t y = first_label_row_; y < end_label_row_;) {
      const int32_t lower = p.student.row_lower[y];
      int rows = 1;
      while (rows < kMaxRows && y + rows < end_label_row_ &&
             p.student.row_lower[y + rows] == lower &&
             (!reads_pair_ || p.teacher.row_lower[y + rows] == p.teacher.row_lower[y])) {
        ++rows;
      }
      if (rows == 4) {
        group<4>(y, vector);
      } else if (rows >= 2) {
        rows = 2;
        group<2>(y, vector);
      } else {
        group<1>(y, vector);
      }
      y += rows;
    }
    finish_gradient(vector);
  }

  template <int kRows>
  void group(int64_t y, int64_t vector) {
    Mask<T> valid[kRows];
    bool some = false;
    for (int r = 0; r < kRows; ++r) {
      valid[r] = is_valid(load_labels<T>(labels_of(y + r, vector)));
      some = some || any(valid[r]);
    }
    if (!some) return;
    move(student_, p.student, p.student.row_lower[y], student_rows_, first_row_, student_careful_,
         vector);
    if (reads_pair_) {
      move(teacher_, p.teacher, p.teacher.row_lower[y], teacher_rows_, teacher_first_,
           teacher_careful_, vector);
    }
    if (p.gradients) move_gradient(p.student.row_lower[y], vector);
    if constexpr (kRows == kMaxRows) {
      if (chained(y, vector, valid)) {
        process<kRows, true>(y, vector, true);
        return;
      }
    }
    interpolate<T, kRows>(p.classes, student_.lo, student_.hi, p.student.row_fraction + y, valid,
                          student_careful_, static_cast<T>(p.huge), student_z_, student_maximum_);
    if (reads_pair_) {
      interpolate<T, kRows>(p.classes, teacher_.lo, teacher_.hi, p.teacher.row_fraction + y, valid,
                            teacher_careful_, static_cast<T>(p.huge), teacher_z_,
                            teacher_maximum_);
    }
    process<kRows, true>(y, vector, false);
  }

  // Four rows by the way of chain.h, into `chain_statistics_`; false where that is not exact.
  bool chained(int64_t y, int64_t vector, const Mask<T>* valid) {
    if (chain_ == nullptr || student_careful_ || teacher_careful_) return false;
    if (!evenly_spaced(p.student.row_fraction + y)) return false;
    if (reads_pair_ && !evenly_spaced(p.teacher.row_fraction + y)) return false;
    const ChainSide<T> student = chain_side(student_, p.student, y);
    ChainSide<T> teacher{};
    if (!chain_fits(student, scale_)) return false;
    if (reads_pair_) {
      teacher = chain_side(teacher_, p.teacher, y);
      if (!chain_fits(teacher, scale_)) return false;
    }
    const int32_t* labels[kMaxRows];
    Statistics<F>* statistics[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r) {
      labels[r] = labels_of(y + r, vector);
      statistics[r] = &chain_statistics_[r];
    }
    chain_(p.classes, student, teacher, student_e_, teacher_e_, scale_, labels, chain_scratch_,
           statistics);
    for (int r = 0; r < kMaxRows; ++r) {
      if (!chain_held<T>(statistics[r]->student_total, valid[r])) return false;
      chain_reference(student, p.student.row_fraction[y + r]).store(student_maximum_ + r * N);
      if (!reads_pair_) continue;
      if (!chain_held<T>(statistics[r]->teacher_total, valid[r])) return false;
      chain_reference(teacher, p.teacher.row_fraction[y + r]).store(teacher_maximum_ + r * N);
    }
    return true;
  }

  // Not where some of the rows lie beyond the first row of logits and repeat it.
  static bool evenly_spaced(const T* f) {
    const T step = (f[3] - f[0]) / T(3);
    const T first = f[1] - f[0] - step;
    const T second = f[2] - f[1] - step;
    const T most = T(1e-6);
    return first < most && first > -most && second < most && second > -most;
  }

  ChainSide<T> chain_side(const Cell& cell, const Geometry<T>& g, int64_t y) const {
    const T* f = g.row_fraction + y;
    return {cell.lo, cell.hi, cell.lo_range, cell.hi_range, f[0], (f[3] - f[0]) / T(3)};
  }

  void move(Cell& cell, const Geometry<T>& g, int64_t row, const T* rows, int64_t first,
            bool careful, int64_t vector) {
    if (cell.lo_row == row) return;
    const int64_t step = p.classes * g.padded;
    if (cell.hi_row == row) {
      swap(cell.lo, cell.hi);
      swap(cell.lo_range, cell.hi_range);
    } else {
      expand_row<T>(g, vector, p.classes, rows + (row - first) * step, careful,
                    static_cast<T>(p.huge), cell.lo, cell.lo_range);
    }
    cell.lo_row = row;
    const int64_t next = row + 1 < g.height ? row + 1 : row;
    expand_row<T>(g, vector, p.classes, rows + (next - first) * step, careful,
                  static_cast<T>(p.huge), cell.hi, cell.hi_range);
    cell.hi_row = next > row ? next : -1;
  }

  // Gradients are collected for the rows `row` and `row + 1`; going down by one, what was the upper
  // row's share starts the new sum.
  void move_gradient(int64_t row, int64_t vector) {
    if (gradient_row_ == row) return;
    if (gradient_row_ >= 0 && gradient_row_ + 1 == row) {
      for (int64_t s = 0; s < p.slots; ++s) {
        if (!gradient_folded_) fold_lower(s, vector);
        swap(gradient_sum_[s], gradient_upper_[s]);
      }
    } else {
      finish_gradient(vector);
      for (int64_t s = 0; s < p.slots; ++s) fill(gradient_sum_[s], p.classes * N, T(0));
    }
    gradient_row_ = row;
    gradient_first_ = true;
    gradient_folded_ = false;
  }

  T* fold_row(int64_t slot, int64_t vector) {
    return gradient_rows(slot, gradient_row_) + kPadBefore + p.student.column_base[vector];
  }

  T* gradient_rows(int64_t slot, int64_t row) {
    return row_gradients_ +
           (slot * (p.band_rows + 1) + row - first_row_) * p.classes * p.student.padded;
  }

  void fold_lower(int64_t slot, int64_t vector) {
    T* sum = gradient_sum_[slot];
    const T* upper = gradient_upper_[slot];
    for (int64_t i = 0; i < p.classes * N; i += N) (F::load(sum + i) - F::load(upper + i)).store(sum + i);
    fold_columns<T>(p.student, vector, p.classes, sum, gradient_rows(slot, gradient_row_));
  }

  void finish_gradient(int64_t vector) {
    if (!p.gradients || gradient_row_ < 0) return;
    for (int64_t s = 0; s < p.slots; ++s) {
      if (!gradient_folded_) fold_lower(s, vector);
      if (gradient_row_ + 1 < p.student.height) {  // else its weights are 0
        fold_columns<T>(p.student, vector, p.classes, gradient_upper_[s],
                        gradient_rows(s, gradient_row_ + 1));
      }
    }
  }

  // What went to the padding belongs to the row's ends; then the rows leave the band.
  void write_rows() {
    const Geometry<T>& g = p.student;
    const int64_t count = end_row_ - first_row_;
    for (int64_t s = 0; s < p.slots; ++s) {
      for (int64_t c = 0; c < p.classes; ++c) {
        for (int64_t r = 0; r <= count; ++r) {
          T* row = gradient_rows(s, first_row_ + r) + c * g.padded + kPadBefore;
          row[0] += row[-1];
          row[g.width - 1] += row[g.width];
          T* out = r < count
                       ? p.gradient + (((s * p.batch + image_) * p.classes + c) * g.height +
                                       first_row_ + r) * g.width
                       : p.edges + ((s * p.batch * p.bands_per_image + band_) * p.classes + c) *
                                       g.width;
          for (int64_t x = 0; x < g.width; ++x) out[x] = row[x];
        }
      }
    }
  }

  // --- the terms ---------------------------------------------------------------------------------

  // kRows label rows from y on (or, on the label grid, that many neighbouring vectors), whose logits
  // are in student_z_ and teacher_z_.
  // `has_statistics`: the sums are in chain_statistics_ and the exponentials in their tiles.
  template <int kRows, bool kUpsample>
  void process(int64_t y, int64_t vector, bool has_statistics) {
    const int32_t* labels[kRows];
    for (int r = 0; r < kRows; ++r) {
      labels[r] = kUpsample ? labels_of(y + r, vector) : labels_of(y, vector + r);
    }
    pixels<kRows, kUpsample>(y, vector, labels, has_statistics);
    if (!p.gradients) return;
    const T* fraction = p.student.row_fraction + y;
    const auto sink = [&](Term term) __attribute__((always_inline)) {
      const int s = p.slot[term];
      return Sink<T>{gradient_sum_[s],  gradient_upper_[s], gradient_first_,
                     gradient_folded_,  kUpsample ? fold_row(s, vector) : nullptr,
                     kUpsample ? p.student.padded : kChunkStep,
                     p.student.column_fraction + vector * N};
    };
    if (kUpsample) {
      const int64_t next = y + kRows;
      gradient_folded_ = p.student.column_mode[vector] == ColumnMode::kConsecutive &&
                         (next == end_label_row_ ||
                          p.student.row_lower[next] != p.student.row_lower[y]);
    }
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
          coefficient(kCeSoft, 0), coefficient(kCeInverse, 0), labels, p.weight_sum,
          p.class_weight, fraction, sink(kCe));
    }
    if (p.slot[kKd] >= 0) {
      const T* other = p.kd == KdDivergence::kForward ? teacher_e_ : kd_q_;
      pair_gradient<T, kRows, kUpsample>(p.classes, student_e_, other, coefficient(kKdStudent, 0),
                                         coefficient(kKdOther, 0), fraction, sink(kKd));
    }
    if (p.slot[kHetero] >= 0) {
      const T* student = p.hetero == Hetero::kPaperSpace ? mixed_ : student_e_;
      const T* other =
          p.hetero == Hetero::kSoftmaxKl && p.mix == Mix::kProbs ? teacher_e_ : mixed_;
      pair_gradient<T, kRows, kUpsample>(p.classes, student, other,
                                         coefficient(kHeteroStudent, 0),
                                         coefficient(kHeteroOther, 0), fraction,
                                         sink(kHetero));
    }
    if (p.slot[kFeature] >= 0) {
      pair_gradient<T, kRows, kUpsample>(p.classes, student_z_, teacher_z_,
                                         coefficient(kFeatureScale, 0),
                                         coefficient(kFeatureScale, 0), fraction,
                                         sink(kFeature));
    }
    gradient_first_ = false;
  }

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
  void pixels(int64_t y, int64_t vector, const int32_t* const* labels, bool has_statistics) {
    Pixels pixels[kRows];
    F sums[kTerms * 2];
    for (F& sum : sums) sum = F(T(0));
    const int32_t common = common_label<kRows>(labels);
    for (int r = 0; r < kRows; ++r) {
      prepare<kUpsample>(pixels[r], y, r, labels[r], common, has_statistics);
    }
    const int64_t tile = p.classes * N;
    for (int r = 0; r < kRows; ++r) {
      Pixels& x = pixels[r];
      if (has_statistics) {
        x.s = chain_statistics_[r];
        continue;
      }
      T* hard = hard_ + r * tile;
      if (needs_pair_) {
        two_models_(p.classes, student_z_ + r * tile, teacher_z_ + r * tile,
                    student_e_ + r * tile, teacher_e_ + r * tile, hard, x.student_m, x.teacher_m,
                    scale_, static_cast<T>(kLog2E), load_labels<T>(labels[r]), x.s);
      } else if (one_model_ != nullptr) {
        one_model_(p.classes, student_z_ + r * tile, student_e_ + r * tile, hard, x.student_m,
                   scale_, static_cast<T>(kLog2E), load_labels<T>(labels[r]), x.s);
      }
    }
    for (int r = 0; r < kRows; ++r) hard_totals(pixels[r]);
    for (int r = 0; r < kRows; ++r) soft_totals(pixels[r]);
    if (p.ce) {
      for (int r = 0; r < kRows; ++r) cross_entropy_pixels(pixels[r], r, labels[r], sums);
    }
    if (p.kd != KdDivergence::kNone) {
      for (int r = 0; r < kRows; ++r) kd_pixels(pixels[r], r, sums);
    }
    if (p.feature) {
      for (int r = 0; r < kRows; ++r) feature_pixels(pixels[r], r, sums);
    }
    if (p.hetero == Hetero::kSoftmaxKl) {
      for (int r = 0; r < kRows; ++r) {
        knowledge(pixels[r], kUpsample ? y + r : y, kUpsample ? vector : vector + r);
      }
      if (p.hetero_term) {
        for (int r = 0; r < kRows; ++r) hetero_softmax_kl(pixels[r], r, sums);
      }
    } else if (p.hetero != Hetero::kNone) {
      for (int r = 0; r < kRows; ++r) {
        hetero_paper(pixels[r], kUpsample ? y + r : y, kUpsample ? vector : vector + r, r,
                     labels[r], sums);
      }
    }
    if (!p.values) return;
    const bool has[kTerms] = {p.ce, p.kd != KdDivergence::kNone, p.hetero_term, p.feature};
    for (int k = 0; k < kTerms; ++k) {
      if (has[k]) add_to(lane_sums_ + k * 2 * N, sums[k * 2]);
    }
    if (p.class_weight != nullptr && p.ce) add_to(lane_sums_ + (kCe * 2 + 1) * N, sums[kCe * 2 + 1]);
    if (p.hetero == Hetero::kSoftmaxKl && p.hetero_term) {
      add_to(lane_sums_ + (kHetero * 2 + 1) * N, sums[kHetero * 2 + 1]);
    }
  }

  template <bool kUpsample>
  HAKD_FN void prepare(Pixels& x, int64_t y, int r, const int32_t* labels, int32_t common,
                       bool chained) {
    const int64_t tile = p.classes * N;
    x.valid = is_valid(load_labels<T>(labels));
    x.one = select(x.valid, F(T(1)), F(T(0)));
    if (normalises_) {
      if (student_careful_) normalise<T>(p.classes, student_z_ + r * tile, student_maximum_ + r * N);
      if (reads_pair_ && teacher_careful_) {
        normalise<T>(p.classes, teacher_z_ + r * tile, teacher_maximum_ + r * N);
      }
    }
    x.student_m = F::load(student_maximum_ + r * N);
    const bool hard = p.ce || p.hetero == Hetero::kSoftmaxKl;
    if (hard) {
      const F z = kUpsample && chained ? between(student_, p.student.row_fraction[y + r], labels, common)
                                       : at_label(student_z_ + r * tile, labels, common);
      x.student_label = z - x.student_m;
    }
    if (reads_pair_) {
      x.teacher_m = F::load(teacher_maximum_ + r * N);
      if (p.hetero == Hetero::kSoftmaxKl) {
        const F z = kUpsample && chained ? between(teacher_, p.teacher.row_fraction[y + r], labels, common)
                                         : at_label(teacher_z_ + r * tile, labels, common);
        x.teacher_label = z - x.teacher_m;
      }
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
  HAKD_FN static F between(const Cell& cell, T fraction, const int32_t* labels, int32_t common) {
    const F lo = at_label(cell.lo, labels, common);
    return fma(F(fraction), at_label(cell.hi, labels, common) - lo, lo);
  }

  HAKD_FN void hard_totals(Pixels& x) {
    const F scale(static_cast<T>(kLog2E));
    const bool reliable = p.hetero == Hetero::kSoftmaxKl;
    if (p.ce || reliable) {
      const F e = exp2(x.student_label * scale);
      x.hard_total = x.s.student_others + e;
      x.hard_inverse = F(T(1)) / x.hard_total;
      x.student_nll = negative_log_likelihood(x.s.student_others, e, x.student_label);
    }
    if (reliable) {
      const F e = exp2(x.teacher_label * scale);
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
        const F weighted = weighted_logits<T>(p.classes, student_z_ + r * p.classes * N,
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
    const T* student_z = student_z_ + r * tile;
    const T* teacher_z = teacher_z_ + r * tile;
    const T* student_e = student_e_ + r * tile;
    const F zero(T(0)), ln2(static_cast<T>(kLn2));
    const T t = p.temperature;
    const F gradient = F(p.scale[kKd] * t) * x.one;
    F value, on_student, on_other;
    if (p.kd == KdDivergence::kForward) {
      value = x.kl;
      on_student = gradient * x.student_inverse;
      on_other = gradient * x.teacher_inverse;
    } else if (p.kd == KdDivergence::kReverse) {
      const F mean = reverse_products<T>(p.classes, student_z, teacher_z, student_e, x.student_m,
                                         x.teacher_m, scale_, kd_q_ + r * tile) *
                     x.student_inverse;
      value = ln2 * (mean - x.student_log2 + x.teacher_log2);
      on_other = zero - gradient * ln2 * x.student_inverse;
      on_student = on_other * mean;
    } else {
      const JsSums<F> js = js_products<T>(p.classes, student_z, teacher_z, student_e,
                                          teacher_e_ + r * tile, x.student_m, x.teacher_m, scale_,
                                          x.s, x.student_log2, x.teacher_log2, p.kd_beta,
                                          kd_q_ + r * tile);
      const F student_share(T(1) - p.kd_beta);
      value = ln2 * fma(F(p.kd_beta), js.teacher, student_share * js.student);
      on_other = zero - gradient * ln2 * student_share;
      on_student = on_other * js.student * x.student_inverse;
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
      const F sum = squared_difference<T>(p.classes, student_z_ + r * tile, teacher_z_ + r * tile);
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
    if (p.mix == Mix::kProbs) {
      const F teacher_weight = x.reliable.teacher * x.teacher_inverse;
      const F student_weight = x.reliable.student * x.student_inverse;
      if (p.values) {
        const F entropy = mixed_entropy<T>(p.classes, student_e_ + r * tile, teacher_e_ + r * tile,
                                           student_weight, teacher_weight);
        const F cross = mixed_target(teacher_weight, x.s.teacher_cross, student_weight,
                                     x.s.student_self);
        value = F(static_cast<T>(kLn2)) * (entropy - cross + x.student_log2);
      }
      const F gradient = F(p.scale[kHetero] * t) * x.weight * x.reliable.teacher;
      on_student = gradient * x.student_inverse;
      on_other = gradient * x.teacher_inverse;
    } else {
      F total, difference;
      mixed_logits<T>(p.classes, student_z_ + r * tile, teacher_z_ + r * tile, x.student_m,
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
    const T* student_z = student_z_ + r * tile;
    T* mixed = mixed_ + r * tile;
    const PaperPixel<F> pixel = paper_knowledge<T>(p.classes, student_z, teacher_z_ + r * tile,
                                                   load_labels<T>(labels), mixed, strength_);
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
  void reduce_space() {
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
      p.space_maximum[band_ * p.classes + c] = largest;
      p.space_sum[band_ * p.classes + c] = static_cast<T>(sum);
    }
  }

  const Pass<T>& p;
  int64_t band_;
  bool reads_pair_ = false, needs_pair_ = false, needs_soft_student_ = false;
  bool keeps_z_ = false, normalises_ = false, student_careful_ = false, teacher_careful_ = false;
  bool gradient_first_ = true, gradient_folded_ = false;
  int power_ = 1;
  T scale_ = T(0);  // log2(e) / T
  OneModel one_model_ = nullptr;
  TwoModels two_models_ = nullptr;
  Chain chain_ = nullptr;
  T* chain_scratch_ = nullptr;
  Statistics<F> chain_statistics_[kMaxRows];
  size_t bytes_ = 0;
  int64_t image_ = 0, first_row_ = 0, end_row_ = 0, first_label_row_ = 0, end_label_row_ = 0;
  int64_t teacher_first_ = 0, gradient_row_ = -1;
  int32_t* label_row_ = nullptr;
  int32_t* labels_ = nullptr;
  double* lane_sums_ = nullptr;
  T *student_rows_ = nullptr, *teacher_rows_ = nullptr, *row_gradients_ = nullptr;
  Cell student_, teacher_;
  T *student_z_ = nullptr, *teacher_z_ = nullptr, *student_e_ = nullptr, *teacher_e_ = nullptr;
  T *hard_ = nullptr, *kd_q_ = nullptr, *mixed_ = nullptr, *strength_ = nullptr;
  T *gradient_sum_[kTerms] = {}, *gradient_upper_[kTerms] = {};
  T *coefficients_ = nullptr, *student_maximum_ = nullptr, *teacher_maximum_ = nullptr;
  T *space_maximum_ = nullptr, *space_sum_ = nullptr;
};

}  // namespace heteroakd::cpu::HAKD_ISA
