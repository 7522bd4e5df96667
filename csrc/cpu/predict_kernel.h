// Argmax of bilinearly upsampled logits without the upsampled logits; included once per instruction
// set.
//
// Order of work. A unit has a strip of label rows and a chunk of columns. The label rows between the
// same two rows of logits are taken together, up to kRows at a time. Of these two rows the chunk's
// columns are packed (widened, dense, padded, [C][step]). In a cell, the pixels between four
// neighbouring logits, no class can win whose largest corner is below what the largest logit exceeds
// everywhere: the largest over the classes of the smallest corner; or, where different classes win at
// the corners, the smallest corner of their mean, for the largest of some numbers is no less than their
// mean, and bilinear functions are smallest at a corner. What remains, the candidates, is found for
// blocks of as many cells as a vector has lanes. Then, vector of columns by vector of columns, each candidate is interpolated
// horizontally in both rows, and vertically in all label rows: a multiply-add, a comparison and two
// selections per pixel and candidate.
//
// Cost per pixel and class at stride 4 in operations on a vector of pixels (a multiply-add is one): 6
// where every class is a candidate (random logits); of confident logits one to three classes are, and
// 0.9 finds them. Bytes: each logit read 9/8 times, each prediction written once.
//
// Values are exact up to three roundings of each linear interpolation. Logits beyond 2^126 count as
// 2^126: infinities then are numbers, a masked class (-inf) loses to all others, and no product is
// NaN. A NaN is packed as 2^127; a class with one at a corner has it in the whole cell, where it
// wins, the first of them, as in torch.
#pragma once

#include "../math/labels.h"
#include "predict.h"
#include "rows.h"

namespace heteroakd::cpu::HAKD_ISA {

template <typename T>
constexpr T kLargestLogit = sizeof(T) == 4 ? T(0x1p126) : T(0x1p1022);
template <typename T>
constexpr T kInPlaceOfNan = kLargestLogit<T> * T(2);

template <typename T>
class Unit {
  using F = Lanes<T>;
  static constexpr int N = F::N;
  static constexpr int kRows = N >= 16 ? 8 : 4;  // what registers hold
  // more than the rounding of a mean of four, relative to the largest
  static constexpr T kSlack = sizeof(T) == 4 ? T(0x1p-20) : T(0x1p-49);

 public:
  Unit(const Prediction<T>& job, void* workspace) : p(job) { lay_out(workspace); }

  static size_t workspace_bytes(const Prediction<T>& job) { return Unit(job, nullptr).bytes_ + 64; }

  void run(int64_t unit, int64_t* table, LabelReport& report) {
    chunk_ = &p.chunk[unit % p.chunks];
    const int64_t strip = unit / p.chunks % p.strips;
    image_ = unit / p.chunks / p.strips;
    row_[0] = row_[1] = -1;
    found_ = -1;
    const int32_t* lower = p.grid.row_lower;
    const int64_t end = p.first_row[strip + 1];
    for (int64_t y = p.first_row[strip]; y < end;) {
      int64_t rows = 1;
      while (y + rows < end && rows < kRows && lower[y + rows] == lower[y]) ++rows;
      find_rows(y, rows);
      if (p.prunes && found_ != lower[y]) {
        find_candidates();
        found_ = lower[y];
      }
      for (int64_t v = chunk_->first_vector; v < chunk_->end_vector; v += p.apart) {
        predict_group(v, y, rows);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* line = line_ + r * p.most_pixels;
        if (p.out != nullptr) {
          write_row(y + r, line);
        } else {
          count_row(y + r, line, table, report);
        }
      }
      y += rows;
    }
  }

 private:
  void lay_out(void* workspace) {
    char* const base = static_cast<char*>(workspace);
    bytes_ = 0;
    const auto take = [&](size_t bytes) {
      char* const at = base + bytes_;
      bytes_ += (bytes + 63) / 64 * 64;
      return at;
    };
    const auto plane = static_cast<size_t>(p.classes * p.step);
    words_ = (p.classes + 63) / 64;
    for (T*& rows : packed_) rows = reinterpret_cast<T*>(take(plane * sizeof(T)));
    for (int32_t*& row : winner_) {
      row = reinterpret_cast<int32_t*>(take(static_cast<size_t>(p.step) * 4));
    }
    line_ = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(kRows * p.most_pixels) * 2));
    bits_ = reinterpret_cast<uint64_t*>(take(static_cast<size_t>(p.blocks * words_) * 8));
    list_ = reinterpret_cast<int32_t*>(take(static_cast<size_t>(p.classes) * 4));
    if (workspace == nullptr || p.prunes) return;
    for (int64_t c = 0; c < p.classes; ++c) list_[c] = static_cast<int32_t>(c);
  }

  // --- logits ------------------------------------------------------------------------------------

  // The two rows of logits around these label rows, and whether one is enough.
  void find_rows(int64_t y, int64_t rows) {
    const int64_t lower = p.grid.row_lower[y];
    single_ = true;
    for (int64_t r = 0; r < rows; ++r) single_ = single_ && p.grid.row_fraction[y + r] == T(0);
    // candidates serve all label rows of the cell
    if (p.prunes) single_ = false;
    const int64_t upper = single_ || lower + 1 >= p.grid.height ? lower : lower + 1;
    const int top = slot_of(lower, upper);
    const int bottom = slot_of(upper, lower);
    top_ = packed_[top];
    bottom_ = packed_[bottom];
    top_winner_ = winner_[top];
    bottom_winner_ = winner_[bottom];
    nans_ = nan_in_[top] || nan_in_[bottom];
  }

  // Where a row is packed; not over `other`.
  int slot_of(int64_t row, int64_t other) {
    if (row_[0] == row) return 0;
    if (row_[1] == row) return 1;
    const int slot = row_[0] == other ? 1 : 0;
    pack(row, slot);
    return slot;
  }

  void pack(int64_t row, int slot) {
    row_[slot] = row;
    T* const rows = packed_[slot];
    const int64_t first = chunk_->first_column < 0 ? 0 : chunk_->first_column;
    int64_t end = chunk_->first_column + chunk_->columns;
    if (end > p.grid.width) end = p.grid.width;
    const int64_t before = first - chunk_->first_column;
    const int64_t count = end - first;
    read_columns<T>(p.logits, p.classes, image_, row, first, count, p.step, rows + before);
    const F most(kLargestLogit<T>), least(-kLargestLogit<T>), nan(kInPlaceOfNan<T>);
    auto nans = less(most, most);
    for (int64_t c = 0; c < p.classes; ++c) {
      T* const line = rows + c * p.step;
      for (int64_t x = 0; x < before; ++x) line[x] = line[before];
      const T last = line[before + count - 1];
      for (int64_t x = before + count; x < p.step; ++x) line[x] = last;
      for (int64_t x = 0; x < p.step; x += N) {
        // not less: true of NaN, which max and min give on as their second operand
        const F z = min(most, max(least, F::load(line + x)));
        const auto is_nan = not_less(abs(z), nan);
        nans = either(nans, is_nan);
        select(is_nan, nan, z).store(line + x);
      }
    }
    nan_in_[slot] = any(nans);
    if (p.prunes) find_winners(slot);
  }

  // The class of the largest logit at each column of a row.
  void find_winners(int slot) {
    for (int64_t x = 0; x < p.step; x += N) {
      F best(-kInfinity<T>), index(T(0));
      for (int64_t c = 0; c < p.classes; ++c) {
        const F z = F::load(packed_[slot] + c * p.step + x);
        index = select(less(best, z), F(static_cast<T>(c)), index);
        best = max(z, best);
      }
      T found[N];
      index.store(found);
      for (int l = 0; l < N; ++l) winner_[slot][x + l] = static_cast<int32_t>(found[l]);
    }
  }

  // --- candidates --------------------------------------------------------------------------------

  void find_candidates() {
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t x = block * N;
      F bound(-kInfinity<T>);
      for (int64_t c = 0; c < p.classes; ++c) {
        const T* a = top_ + c * p.step + x;
        const T* b = bottom_ + c * p.step + x;
        const F least = min(min(F::load(a), F::load(a + 1)), min(F::load(b), F::load(b + 1)));
        bound = max(least, bound);
      }
      if (!nans_) {
        T means[N];
        for (int l = 0; l < N; ++l) means[l] = mean_of_winners(x + l);
        bound = max(F::load(means), bound);
      }
      for (int64_t word = 0; word < words_; ++word) {
        uint64_t bits = 0;
        const int64_t first = word * 64;
        const int64_t count = p.classes - first < 64 ? p.classes - first : 64;
        for (int64_t c = 0; c < count; ++c) {
          const T* a = top_ + (first + c) * p.step + x;
          const T* b = bottom_ + (first + c) * p.step + x;
          const F most = max(max(F::load(a), F::load(a + 1)), max(F::load(b), F::load(b + 1)));
          bits |= static_cast<uint64_t>(any(not_less(most, bound))) << c;
        }
        bits_[block * words_ + word] = bits;
      }
    }
  }

  // The smallest corner of the mean of the classes that win at the corners of a cell, less its
  // rounding; nothing where one class wins at all of them.
  T mean_of_winners(int64_t x) const {
    const int32_t winners[4] = {top_winner_[x], top_winner_[x + 1], bottom_winner_[x],
                                bottom_winner_[x + 1]};
    int32_t distinct[4];
    int count = 0;
    for (const int32_t c : winners) {
      bool known = false;
      for (int k = 0; k < count; ++k) known = known || distinct[k] == c;
      if (!known) distinct[count++] = c;
    }
    if (count == 1) return -kInfinity<T>;
    const T weight = T(1) / static_cast<T>(count);
    T mean[4] = {};
    T largest(0);
    for (int k = 0; k < count; ++k) {
      const T* a = top_ + distinct[k] * p.step + x;
      const T* b = bottom_ + distinct[k] * p.step + x;
      const T corners[4] = {a[0], a[1], b[0], b[1]};
      for (int i = 0; i < 4; ++i) {
        mean[i] += weight * corners[i];
        const T size = corners[i] < T(0) ? -corners[i] : corners[i];
        largest = size > largest ? size : largest;
      }
    }
    T least = mean[0];
    for (const T m : mean) least = m < least ? m : least;
    return least - largest * kSlack;
  }

  // The candidates of a group's cells as a list in ascending order; their number.
  int64_t list_candidates(int64_t group) {
    if (!p.prunes) return p.classes;
    const int64_t first = (p.first_cell[group] - chunk_->first_column) / N;
    const int64_t last = (p.last_cell[group] - chunk_->first_column) / N;
    int64_t count = 0;
    for (int64_t word = 0; word < words_; ++word) {
      uint64_t bits = 0;
      for (int64_t block = first; block <= last; ++block) bits |= bits_[block * words_ + word];
      for (; bits != 0; bits &= bits - 1) {
        list_[count++] = static_cast<int32_t>(word * 64 + __builtin_ctzll(bits));
      }
    }
    return count;
  }

  // --- pixels ------------------------------------------------------------------------------------

  void predict_group(int64_t vector, int64_t y, int64_t rows) {
    const int64_t count = list_candidates(vector / p.apart);
    if (count == 1) {
      const int64_t first = p.pixel[vector * N] - chunk_->first_pixel;
      const int64_t pixels = N * p.apart;
      const int64_t end = first + pixels < chunk_->pixels ? first + pixels : chunk_->pixels;
      for (int64_t r = 0; r < rows; ++r) {
        uint16_t* const line = line_ + r * p.most_pixels;
        for (int64_t x = first; x < end; ++x) line[x] = static_cast<uint16_t>(list_[0]);
      }
      return;
    }
    for (int64_t v = vector; v < vector + p.apart; ++v) {
      if (p.exact_columns) {
        predict_rows<kExact>(v, y, rows, count);
      } else if (p.grid.column_mode[v] == ColumnMode::kConsecutive) {
        predict_rows<kConsecutive>(v, y, rows, count);
      } else if (p.grid.column_mode[v] == ColumnMode::kPermuted) {
        predict_rows<kPermuted>(v, y, rows, count);
      } else {
        predict_rows<kScattered>(v, y, rows, count);
      }
    }
  }

  enum Mode { kExact, kConsecutive, kPermuted, kScattered };

  template <Mode kMode>
  void predict_rows(int64_t vector, int64_t y, int64_t rows, int64_t count) {
    int64_t r = 0;
    if constexpr (kRows == 8) {
      for (; r + 8 <= rows; r += 8) predict<kMode, 8>(vector, y + r, r, count);
    }
    for (; r + 4 <= rows; r += 4) predict<kMode, 4>(vector, y + r, r, count);
    for (; r + 2 <= rows; r += 2) predict<kMode, 2>(vector, y + r, r, count);
    for (; r < rows; ++r) predict<kMode, 1>(vector, y + r, r, count);
  }

  // The columns of a vector in a packed row.
  template <Mode kMode>
  struct Taps {
    F fraction;
    int32_t base;
    int32_t lower[N], upper[N];

    HAKD_FN void read(const T* row, F& a, F& b) const {
      if (kMode == kExact) {
        a = b = F::load(row + base);
      } else if (kMode == kConsecutive) {
        a = F::load(row + base);
        b = F::load(row + base + 1);
      } else if (kMode == kPermuted) {
        a = permute_two(row, base, lower);
        b = permute_two(row, base, upper);
      } else {
        T both[2][N];
        for (int l = 0; l < N; ++l) {
          both[0][l] = row[lower[l]];
          both[1][l] = row[upper[l]];
        }
        a = F::load(both[0]);
        b = F::load(both[1]);
      }
    }

    HAKD_FN F interpolate(const T* row) const {
      F a, b;
      read(row, a, b);
      return kMode == kExact ? a : fma(fraction, b - a, a);
    }

    HAKD_FN F largest(const T* row) const {
      F a, b;
      read(row, a, b);
      return max(a, b);
    }
  };

  template <Mode kMode, int R>
  void predict(int64_t vector, int64_t y, int64_t line, int64_t count) {
    Taps<kMode> taps;
    taps.fraction = F::load(p.grid.column_fraction + vector * N);
    taps.base = p.grid.column_base[vector] - chunk_->first_column;
    for (int l = 0; l < N; ++l) {
      taps.lower[l] = p.grid.column_lower[vector * N + l] - chunk_->first_column;
      taps.upper[l] = taps.lower[l] + 1;
    }
    F best[R], index[R], fraction[R];
    for (int r = 0; r < R; ++r) {
      best[r] = F(-kInfinity<T>);
      index[r] = F(T(0));
      fraction[r] = F(p.grid.row_fraction[y + r]);
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t c = list_[k];
      const T* const a = top_ + c * p.step;
      const T* const b = bottom_ + c * p.step;
      F z = taps.interpolate(a);
      F difference = single_ ? F(T(0)) : taps.interpolate(b) - z;
      if (nans_) {
        const F nan(kInPlaceOfNan<T>);
        const auto is_nan = not_less(max(taps.largest(a), taps.largest(b)), nan);
        z = select(is_nan, nan, z);
        difference = select(is_nan, F(T(0)), difference);
      }
      const F number(static_cast<T>(c));
      for (int r = 0; r < R; ++r) {
        const F here = fma(fraction[r], difference, z);
        index[r] = select(less(best[r], here), number, index[r]);
        best[r] = max(here, best[r]);
      }
    }
    const int32_t* const pixel = p.pixel + vector * N;
    const int64_t first = pixel[0] - chunk_->first_pixel;
    for (int r = 0; r < R; ++r) {
      T found[N];
      int32_t number[N];
      index[r].store(found);
      for (int l = 0; l < N; ++l) number[l] = static_cast<int32_t>(found[l]);
      uint16_t* const out = line_ + (line + r) * p.most_pixels + first;
      for (int l = 0; l < N && pixel[l] >= 0; ++l) {
        out[l * p.apart] = static_cast<uint16_t>(number[l]);
      }
    }
  }

  // --- results -----------------------------------------------------------------------------------

  void write_row(int64_t y, const uint16_t* line) const {
    const int64_t at = (image_ * p.label_height + y) * p.label_width + chunk_->first_pixel;
    if (p.bytes) {
      auto* const out = static_cast<uint8_t*>(p.out) + at;
      for (int64_t x = 0; x < chunk_->pixels; ++x) out[x] = static_cast<uint8_t>(line[x]);
    } else {
      auto* const out = static_cast<int64_t*>(p.out) + at;
      for (int64_t x = 0; x < chunk_->pixels; ++x) out[x] = line[x];
    }
  }

  void count_row(int64_t y, const uint16_t* line, int64_t* table, LabelReport& report) const {
    switch (p.labels.dtype) {
      case LabelDtype::kUint8: count_row_as<uint8_t>(y, line, table, report); break;
      case LabelDtype::kInt32: count_row_as<int32_t>(y, line, table, report); break;
      default: count_row_as<int64_t>(y, line, table, report);
    }
  }

  template <typename S>
  void count_row_as(int64_t y, const uint16_t* line, int64_t* table, LabelReport& report) const {
    const LabelsView& view = p.labels;
    const S* const in = reinterpret_cast<const S*>(view.data) + image_ * view.stride[0] +
                        y * view.stride[1] + chunk_->first_pixel * view.stride[2];
    for (int64_t x = 0; x < chunk_->pixels; ++x) {
      const auto label = static_cast<int64_t>(in[x * view.stride[2]]);
      const LabelKind kind = label_kind(label, view.num_classes, view.ignore_index, view.ignore_index);
      if (kind == LabelKind::kClass) {
        int64_t* const entry = table + label * p.classes + line[x];
        if (p.shared) {
          __atomic_fetch_add(entry, int64_t{1}, __ATOMIC_RELAXED);
        } else {
          ++*entry;
        }
        ++report.labelled;
        ++report.distilled;
      } else if (kind == LabelKind::kOutOfRange) {
        const int64_t at = (image_ * p.label_height + y) * p.label_width + chunk_->first_pixel + x;
        if (report.bad_labels++ == 0 || at < report.first_bad_label) report.first_bad_label = at;
      }
    }
  }

  const Prediction<T>& p;
  size_t bytes_ = 0;
  int64_t words_ = 0;  // of a set of classes
  T* packed_[2];       // [C][step] of two rows of logits
  int32_t* winner_[2];  // [step] their largest classes
  uint16_t* line_;     // [kRows][pixels] predictions
  uint64_t* bits_;     // [blocks][words] candidates
  int32_t* list_;      // [C] candidates in order; all classes where nothing is pruned

  const ColumnChunk* chunk_ = nullptr;
  int64_t image_ = 0;
  int64_t row_[2];   // which rows are packed
  bool nan_in_[2];
  int64_t found_ = -1;  // the cell row of the candidates
  const T* top_ = nullptr;
  const T* bottom_ = nullptr;
  const int32_t* top_winner_ = nullptr;
  const int32_t* bottom_winner_ = nullptr;
  bool single_ = false, nans_ = false;
};

template <typename T>
void run_unit(const Prediction<T>& job, int64_t unit, void* workspace, int64_t* table,
              LabelReport& report) {
  Unit<T>(job, workspace).run(unit, table, report);
}

template <typename T>
const Predictor<T>* predictor() {
  static constexpr Predictor<T> kPredictor = {kIsaName, Lanes<T>::N, Unit<T>::workspace_bytes,
                                              run_unit<T>};
  return &kPredictor;
}

}  // namespace heteroakd::cpu::HAKD_ISA
