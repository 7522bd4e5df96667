// The CPU kernels under a sanitizer, without torch: every term on every kind of grid, with every
// instruction set that this processor has. See docs/sanitizers.md; tests/sanitize/run.py compiles
// and runs it.
//
// Every case runs twice, and both results must agree bit by bit:
//   once serially, on arrays from the heap that are exactly as large as they must be, between the
//   sanitizer's red zones;
//   once by four threads, on arrays that end where an unreadable page begins. That page also stops
//   the loads and stores that no sanitizer instruments: those written as processor intrinsics.
// The two runs find different garbage in their workspaces and results, so that a value which was
// not written, or was read before, shows as a difference.
//
// `kernels list` names the instruction sets, `kernels ISA` runs all cases with one of them, and
// `kernels PLANT ISA` runs one case with a defect: PLANT is overrun (logits that are one
// element short), overflow (a stride beyond 64 bits), page (labels that are one short, found by the
// page alone) or race (two threads do the same bands). What follows must not be exit code 0.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/geometry.h"
#include "../../csrc/cpu/pass.h"
#include "../../csrc/math/labels.h"

namespace heteroakd::cpu {
namespace {

constexpr int64_t kBandRows = 8;
constexpr int kThreads = 4;

enum class Plant { kNone, kOverrun, kOverflow, kPage, kRace };
Plant plant = Plant::kNone;

// --- memory --------------------------------------------------------------------------------------

enum class Place { kHeap, kPage };

// `bytes` of memory and not one more, at a multiple of 64 where their number is one (always, on the
// heap), full of garbage.
class Block {
 public:
  Block() = default;
  Block(size_t bytes, Place place) : bytes_(bytes), place_(place) {
    if (bytes == 0) return;
    if (place == Place::kHeap) {
      data_ = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
    } else {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      mapped_ = (bytes + page - 1) / page * page + page;
      void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                          -1, 0);
      if (memory == MAP_FAILED) {
        std::perror("mmap");
        std::exit(2);
      }
      base_ = static_cast<char*>(memory);
      mprotect(base_ + mapped_ - page, page, PROT_NONE);
      data_ = base_ + mapped_ - page - bytes;
    }
    spoil();
  }
  Block(Block&& other) noexcept { swap(other); }
  Block& operator=(Block&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Block() {
    if (base_ != nullptr) {
      munmap(base_, mapped_);
    } else if (data_ != nullptr) {
      ::operator delete(data_, std::align_val_t(64));
    }
  }

  // NaN and -1, or huge numbers.
  void spoil() {
    if (bytes_ > 0) std::memset(data_, place_ == Place::kHeap ? 0xff : 0x7f, bytes_);
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Block& other) {
    std::swap(data_, other.data_);
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(place_, other.place_);
  }

  char* data_ = nullptr;
  char* base_ = nullptr;  // of a mapping
  size_t bytes_ = 0, mapped_ = 0;
  Place place_ = Place::kHeap;
};

// --- inputs --------------------------------------------------------------------------------------

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t end) { return static_cast<int64_t>(next()) % end; }
};

enum class Layout { kDense, kChannelsLast, kPaddedRows, kEverySecond };

struct Shape {
  int64_t height, width;
};

// Where something happens.
struct Grid {
  const char* name;
  int64_t batch, classes;
  Shape student, teacher, labels;
  Dtype dtype, teacher_dtype;
  Layout layout;
  LabelDtype label_dtype;
  bool align_corners;
  bool wild;  // NaN, infinite and huge logits, most of them at ignored pixels
};

constexpr Dtype kF32 = Dtype::kFloat, kF64 = Dtype::kDouble, kF16 = Dtype::kHalf,
                kBf16 = Dtype::kBFloat16;
constexpr Layout kDense = Layout::kDense, kLast = Layout::kChannelsLast,
                 kPadded = Layout::kPaddedRows, kSecond = Layout::kEverySecond;
constexpr LabelDtype kU8 = LabelDtype::kUint8, kI32 = LabelDtype::kInt32, kI64 = LabelDtype::kInt64;

const Grid kGrids[] = {
    {"ratio 2", 2, 2, {17, 9}, {17, 9}, {34, 18}, kBf16, kBf16, kDense, kU8, false, false},
    {"ratio 4", 2, 19, {9, 10}, {9, 10}, {36, 40}, kF32, kF32, kDense, kI64, false, false},
    {"ratio 4, wide", 1, 3, {9, 37}, {9, 37}, {36, 148}, kF16, kF16, kLast, kI32, false, false},
    {"ratios 8 and 4", 1, 33, {3, 5}, {6, 10}, {24, 40}, kF32, kBf16, kLast, kU8, false, false},
    {"one class", 2, 1, {9, 6}, {5, 3}, {18, 12}, kF32, kF16, kPadded, kI32, false, false},
    {"no integer", 1, 19, {10, 7}, {4, 9}, {23, 31}, kF16, kF32, kPadded, kI64, false, false},
    {"no integer, 33", 1, 33, {9, 5}, {9, 5}, {31, 19}, kF64, kF64, kSecond, kU8, false, false},
    {"down", 1, 19, {21, 30}, {13, 17}, {13, 11}, kBf16, kF32, kDense, kI32, false, false},
    {"down, far", 1, 2, {40, 90}, {70, 35}, {5, 7}, kF32, kF64, kLast, kI64, false, false},
    {"corners", 2, 19, {9, 5}, {5, 9}, {17, 17}, kF32, kF32, kDense, kU8, true, false},
    {"ratio 70", 1, 2, {2, 1}, {1, 2}, {10, 70}, kF32, kF32, kDense, kI64, false, false},
    {"width 1", 2, 3, {9, 1}, {5, 1}, {18, 1}, kF32, kBf16, kDense, kI64, false, false},
    {"from width 1", 1, 19, {9, 1}, {3, 2}, {20, 17}, kF16, kF64, kLast, kI32, false, false},
    {"to width 1", 1, 19, {9, 5}, {9, 8}, {20, 1}, kBf16, kF32, kPadded, kU8, false, false},
    {"one pixel", 1, 2, {1, 1}, {1, 1}, {1, 1}, kF32, kF32, kDense, kI64, false, false},
    {"wild", 2, 19, {9, 7}, {9, 7}, {36, 28}, kF32, kF32, kDense, kI64, false, true},
    {"wild, bf16", 1, 5, {9, 7}, {6, 5}, {25, 22}, kBf16, kF16, kLast, kU8, false, true},
    {"same", 2, 19, {11, 35}, {11, 35}, {11, 35}, kF32, kF32, kDense, kI64, false, false},
    {"same, long", 1, 3, {3, 300}, {3, 300}, {3, 300}, kBf16, kF16, kDense, kU8, false, false},
    {"same, aligned", 1, 33, {9, 32}, {9, 32}, {9, 32}, kF32, kF32, kDense, kI32, false, false},
    {"same, last", 1, 19, {9, 21}, {9, 21}, {9, 21}, kF16, kF16, kLast, kI32, false, false},
    {"same, double", 1, 2, {9, 40}, {9, 40}, {9, 40}, kF64, kF64, kPadded, kU8, true, false},
    {"same, width 1", 1, 19, {9, 1}, {9, 1}, {9, 1}, kF32, kF32, kSecond, kI64, false, false},
    {"same, wild", 1, 19, {9, 21}, {9, 21}, {9, 21}, kF32, kBf16, kDense, kI64, false, true},
};

// What happens.
struct What {
  const char* name;
  int terms;
  KdDivergence kd;
  Hetero hetero;
  Mix mix;
  bool evaluation;
  double temperature, smoothing;
  bool weighted, maps, teacher;
};

constexpr int bit(Term term) { return 1 << term; }
constexpr int kAll = bit(kCe) | bit(kKd) | bit(kHetero) | bit(kFeature);
constexpr auto kNoKd = KdDivergence::kNone;
constexpr auto kNoHetero = Hetero::kNone, kKl = Hetero::kSoftmaxKl, kPaper = Hetero::kPaper,
               kSpace = Hetero::kPaperSpace;
constexpr auto kProbs = Mix::kProbs, kLogits = Mix::kLogits, kTeacher = Mix::kTeacher;

const What kWhats[] = {
    {"ce", bit(kCe), kNoKd, kNoHetero, kProbs, true, 1, 0, false, false, false},
    {"ce, smooth", bit(kCe), kNoKd, kNoHetero, kProbs, true, 1, 0.1, false, false, false},
    {"ce, weighted", bit(kCe), kNoKd, kNoHetero, kProbs, true, 1, 0.1, true, false, false},
    {"kd", bit(kKd), KdDivergence::kForward, kNoHetero, kProbs, true, 2, 0, false, false, true},
    {"kd, reverse", bit(kKd), KdDivergence::kReverse, kNoHetero, kProbs, true, 1, 0, false, false,
     true},
    {"kd, js", bit(kKd), KdDivergence::kJs, kNoHetero, kProbs, true, 1.7, 0, false, false, true},
    {"kl", bit(kHetero), kNoKd, kKl, kProbs, true, 1, 0, false, false, true},
    {"kl and ce", bit(kCe) | bit(kHetero), kNoKd, kKl, kProbs, true, 2, 0, false, false, true},
    {"kl, T 1.7", bit(kCe) | bit(kHetero), kNoKd, kKl, kProbs, true, 1.7, 0, false, true, true},
    {"kl, logits", bit(kHetero), kNoKd, kKl, kLogits, true, 1.7, 0, false, false, true},
    {"kl, teacher", bit(kHetero), kNoKd, kKl, kTeacher, true, 1.7, 0, false, true, true},
    {"kl, no evaluation", bit(kHetero), kNoKd, kKl, kProbs, false, 1, 0, false, false, true},
    {"kl, logits, no evaluation", bit(kHetero), kNoKd, kKl, kLogits, false, 2, 0, false, false,
     true},
    {"paper", bit(kHetero), kNoKd, kPaper, kLogits, true, 1.7, 0, false, true, true},
    {"paper, no evaluation", bit(kHetero), kNoKd, kPaper, kLogits, false, 1, 0, false, false,
     true},
    {"paper, teacher", bit(kHetero), kNoKd, kPaper, kTeacher, true, 1, 0, false, false, true},
    {"space", bit(kHetero), kNoKd, kSpace, kLogits, true, 2, 0, false, false, true},
    {"space, no evaluation", bit(kHetero), kNoKd, kSpace, kLogits, false, 1, 0, false, false,
     true},
    {"feature", bit(kFeature), kNoKd, kNoHetero, kProbs, true, 1, 0, false, false, true},
    {"maps alone", 0, kNoKd, kKl, kProbs, true, 1, 0, false, true, true},
    {"all", kAll, KdDivergence::kForward, kKl, kProbs, true, 1.5, 0.1, true, true, true},
    {"all, space", kAll, KdDivergence::kJs, kSpace, kLogits, true, 2, 0, false, true, true},
};

int64_t size_of(Dtype dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

// Logits [batch, classes, height, width]: the elements from the first to the last, nothing behind.
class Logits {
 public:
  Logits(const Grid& grid, Shape shape, Dtype dtype, Layout layout, Place place)
      : dtype_(dtype), batch_(grid.batch), classes_(grid.classes), shape_(shape) {
    const int64_t h = shape.height, w = shape.width, c = classes_;
    const int64_t column = layout == kLast ? c : layout == kSecond ? 2 : 1;
    const int64_t row = layout == Layout::kPaddedRows ? w + 5 : w * column;
    const int64_t plane = layout == Layout::kChannelsLast ? 1 : h * row;
    const int64_t strides[] = {layout == Layout::kChannelsLast ? h * row : c * plane, plane, row,
                               column};
    std::copy(strides, strides + 4, stride_);
    int64_t last = (batch_ - 1) * strides[0] + (c - 1) * plane + (h - 1) * row + (w - 1) * column;
    if (plant == Plant::kOverrun) --last;
    block_ = Block(static_cast<size_t>((last + 1) * size_of(dtype)), place);
  }

  // Ordinary logits, and the others in the first row of every image where it is wild.
  void fill(Random& random, bool wild) {
    const int64_t count = static_cast<int64_t>(block_.bytes()) / size_of(dtype_);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = random.next();
      const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
      if (dtype_ == kF32) block_.as<float>()[i] = static_cast<float>(bits % 8192) / 1024.0f - 4.0f;
      if (dtype_ == kF64) block_.as<double>()[i] = static_cast<double>(bits % 8192) / 1024.0 - 4.0;
      // between 1/8 and 4
      if (dtype_ == kF16) {
        block_.as<uint16_t>()[i] = static_cast<uint16_t>(sign | (0x3000 + bits % 0x1400));
      }
      if (dtype_ == kBf16) {
        block_.as<uint16_t>()[i] = static_cast<uint16_t>(sign | (0x3e00 + bits % 0x0280));
      }
    }
    if (!wild) return;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t x = 0; x < shape_.width; ++x) {
        const int64_t c = random.below(classes_);
        const int64_t at = b * stride_[0] + c * stride_[1] + x * stride_[3];
        const int which = static_cast<int>(random.below(4));
        const double big[] = {NAN, INFINITY, -INFINITY, 3e38};
        const uint16_t half[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff};
        const uint16_t bfloat[] = {0x7fc0, 0x7f80, 0xff80, 0x7f7f};
        if (dtype_ == kF32) block_.as<float>()[at] = static_cast<float>(big[which]);
        if (dtype_ == kF64) block_.as<double>()[at] = big[which];
        if (dtype_ == kF16) block_.as<uint16_t>()[at] = half[which];
        if (dtype_ == kBf16) block_.as<uint16_t>()[at] = bfloat[which];
      }
    }
  }

  LogitsView view() const {
    return {block_.as<char>(), dtype_, {stride_[0], stride_[1], stride_[2], stride_[3]}};
  }
  const Block& block() const { return block_; }

 private:
  Dtype dtype_;
  int64_t batch_, classes_;
  Shape shape_;
  int64_t stride_[4];
  Block block_;
};

// Labels [batch, height, width]: a class, 255 (ignored), and in few places one that is no class,
// which sends the kernel to `read`. Int64 labels lie in every second element.
class Labels {
 public:
  Labels(const Grid& grid, Place place, Random& random) : grid_(grid) {
    const Shape shape = grid.labels;
    step_ = grid.label_dtype == kI64 ? 2 : 1;
    const int64_t count = grid.batch * shape.height * shape.width;
    const int64_t size = grid.label_dtype == kU8 ? 1 : grid.label_dtype == kI32 ? 4 : 8;
    const int64_t shortage = plant == Plant::kPage ? 1 : 0;
    block_ = Block(static_cast<size_t>(((count - 1) * step_ + 1 - shortage) * size), place);
    for (int64_t i = 0; i < count - shortage; ++i) {
      const int64_t y = i / shape.width % shape.height;
      int64_t label = random.below(grid.classes);
      if (random.below(5) == 0) label = 255;
      if (random.below(97) == 0) label = grid.classes + 7;
      // the rows that wild logits reach, but for a pixel now and then
      const int64_t reach = 2 * ((shape.height + grid.student.height - 1) / grid.student.height);
      if (grid.wild && y < reach && random.below(41) != 0) label = 255;
      if (y % 8 == 5) label = 255;  // a whole row
      if (grid.label_dtype == kU8) block_.as<uint8_t>()[i * step_] = static_cast<uint8_t>(label);
      if (grid.label_dtype == kI32) block_.as<int32_t>()[i * step_] = static_cast<int32_t>(label);
      if (grid.label_dtype == kI64) block_.as<int64_t>()[i * step_] = label;
    }
  }

  LabelsView view() const {
    const Shape s = grid_.labels;
    return {block_.as<char>(), grid_.label_dtype,
            {s.height * s.width * step_,
             plant == Plant::kOverflow ? INT64_MAX / 2 : s.width * step_, step_},
            grid_.classes, 255, this};
  }

  static void read(const void* reader, int64_t b, int64_t y, int32_t* out, LabelReport& report) {
    const auto& self = *static_cast<const Labels*>(reader);
    const Shape s = self.grid_.labels;
    for (int64_t x = 0; x < s.width; ++x) {
      const int64_t flat = (b * s.height + y) * s.width + x;
      const int64_t at = flat * self.step_;
      const int64_t label = self.grid_.label_dtype == kU8    ? self.block_.as<uint8_t>()[at]
                            : self.grid_.label_dtype == kI32 ? self.block_.as<int32_t>()[at]
                                                             : self.block_.as<int64_t>()[at];
      const LabelKind kind = label_kind(label, self.grid_.classes, 255);
      out[x] = kind == LabelKind::kClass ? static_cast<int32_t>(label) : -1;
      report.valid += kind == LabelKind::kClass;
      if (kind == LabelKind::kOutOfRange && report.out_of_range++ == 0) {
        report.first_out_of_range = flat;
      }
    }
  }

 private:
  Grid grid_;
  int64_t step_;
  Block block_;
};

// --- one call, as Runner in csrc/cpu/distillation.cpp makes it ---------------------------------

enum class Mode { kForward, kForwardWithoutGradients, kBackward, kBackwardStreaming };

// Everything that a call leaves, as bytes.
using Outcome = std::vector<std::vector<char>>;

template <typename T>
class Call {
 public:
  Call(const Kernels<T>& kernels, const Grid& grid, const What& what, Mode mode, Place place)
      : kernels_(kernels), grid_(grid), what_(what), place_(place), random_{},
        student_(grid, grid.student, grid.dtype, grid.layout, place),
        teacher_(grid, grid.teacher, grid.teacher_dtype, grid.layout, place),
        labels_(grid, place, random_) {
    student_.fill(random_, grid.wild);
    teacher_.fill(random_, grid.wild);
    const auto same = [&](Shape s) {
      return s.height == grid.labels.height && s.width == grid.labels.width;
    };
    pass_.batch = grid.batch;
    pass_.classes = grid.classes;
    pass_.label_height = grid.labels.height;
    pass_.label_width = grid.labels.width;
    pass_.has_teacher = what.teacher;
    pass_.identity = same(grid.student) && (!what.teacher || same(grid.teacher));
    set_grids();
    pass_.labels = labels_.view();
    pass_.read_labels = Labels::read;
    set_terms();
    set_results(mode);
  }

  Outcome run(int threads) {
    if (what_.evaluation && (what_.terms & bit(kHetero)) != 0 && pass_.hetero == kSpace) {
      collect_space(threads);
    }
    run_bands(threads);
    Outcome outcome;
    for (const Block* block : {&sums_, &gradient_, &edges_, &maps_, &combined_}) {
      keep(outcome, *block);
    }
    if (out_) keep(outcome, out_->block());
    const auto* reports = reinterpret_cast<const char*>(reports_.data());
    outcome.emplace_back(reports, reports + reports_.size() * sizeof(LabelReport));
    return outcome;
  }

 private:
  int64_t bands() const { return pass_.batch * pass_.bands_per_image; }

  template <typename S>
  Block array(int64_t count) const {
    return Block(static_cast<size_t>(count) * sizeof(S), place_);
  }

  static void keep(Outcome& outcome, const Block& block) {
    const char* data = block.as<char>();
    outcome.emplace_back(data, data + block.bytes());
  }

  void set_grids() {
    const int64_t apart = pass_.identity
                              ? 1
                              : Columns::distance(grid_.student.width, pass_.label_width,
                                                  grid_.align_corners);
    const Columns columns(pass_.label_width, kernels_.lanes, apart);
    pixel_ = columns.pixel;
    pass_.lanes = columns.lanes;
    pass_.vectors = columns.vectors;
    pass_.apart = apart;
    pass_.pixel = pixel_.data();
    pass_.student_logits = student_.view();
    student_map_ = GridMap<T>(grid_.student.height, grid_.student.width, pass_.label_height,
                              pass_.label_width, grid_.align_corners, columns);
    const std::vector<int32_t>& lower = student_map_.row_lower();
    pass_.band_rows = kBandRows;
    pass_.bands_per_image = (grid_.student.height + kBandRows - 1) / kBandRows;
    size_t y = 0;
    for (int64_t band = 0; band <= pass_.bands_per_image; ++band) {
      while (y < lower.size() && lower[y] < band * kBandRows) ++y;
      first_label_row_.push_back(static_cast<int64_t>(y));
    }
    pass_.first_label_row = first_label_row_.data();
    pass_.student = student_map_.view(kBandRows + 1);
    if (!what_.teacher) return;
    pass_.teacher_logits = teacher_.view();
    teacher_map_ = GridMap<T>(grid_.teacher.height, grid_.teacher.width, pass_.label_height,
                              pass_.label_width, grid_.align_corners, columns);
    const std::vector<int32_t>& rows = teacher_map_.row_lower();
    int64_t most = 1;
    for (int64_t band = 0; band < pass_.bands_per_image; ++band) {
      const auto begin = static_cast<size_t>(first_label_row_[static_cast<size_t>(band)]);
      const auto end = static_cast<size_t>(first_label_row_[static_cast<size_t>(band) + 1]);
      if (begin < end) most = std::max<int64_t>(most, rows[end - 1] - rows[begin] + 2);
    }
    pass_.teacher = teacher_map_.view(most);
  }

  void set_terms() {
    pass_.class_weight = nullptr;
    pass_.weight_sum = static_cast<T>(pass_.classes);
    if (what_.weighted) {
      weight_ = array<T>(pass_.classes);
      pass_.weight_sum = T(0);
      for (int64_t c = 0; c < pass_.classes; ++c) {
        weight_.as<T>()[c] = static_cast<T>(0.5 + 0.25 * static_cast<double>(c % 5));
        pass_.weight_sum += weight_.as<T>()[c];
      }
      pass_.class_weight = weight_.as<T>();
    }
    pass_.smoothing = static_cast<T>(what_.smoothing);
    pass_.ce = asks(kCe);
    pass_.feature = asks(kFeature);
    pass_.maps = what_.maps;
    pass_.kd = asks(kKd) ? what_.kd : kNoKd;
    pass_.hetero_term = asks(kHetero);
    pass_.hetero = what_.hetero;
    pass_.mix = what_.mix;
    pass_.evaluation = what_.evaluation;
    pass_.temperature = static_cast<T>(what_.temperature);
    pass_.tau = T(0.7);
    pass_.kd_beta = T(0.3);
    pass_.huge = sizeof(T) == 4 ? 1e30 : 1e290;
    pass_.space_statistics = false;
  }

  void set_results(Mode mode) {
    const bool backward = mode == Mode::kBackward || mode == Mode::kBackwardStreaming;
    reports_.resize(static_cast<size_t>(bands()));
    sums_ = array<double>(bands() * kTerms * 2);
    pass_.sums = sums_.as<double>();
    pass_.values = !backward;
    pass_.gradients = mode != Mode::kForwardWithoutGradients;
    pass_.maps = what_.maps && !backward;
    if (pass_.maps) {
      const int64_t count = 2 * pass_.batch * pass_.label_height * pass_.label_width;
      maps_ = array<T>(count);
      pass_.map_values = maps_.as<T>();
      std::fill_n(pass_.map_values, count, T(0));
    }
    pass_.slots = 0;
    for (int k = 0; k < kTerms; ++k) {
      const bool wanted = pass_.gradients && asks(static_cast<Term>(k));
      pass_.slot[k] = !wanted ? -1 : backward ? 0 : pass_.slots++;
      pass_.scale[k] = backward ? T(0.25) : T(1);
    }
    if (backward) {
      pass_.slots = 1;
      // as torch.empty_like: dense, and channels_last where the logits are
      out_ = std::make_unique<Logits>(grid_, grid_.student, grid_.dtype,
                                      grid_.layout == kLast ? kLast : kDense, place_);
      pass_.out = out_->view();
      pass_.streams = mode == Mode::kBackwardStreaming;
    } else if (pass_.gradients) {
      gradient_ = array<T>(pass_.slots * pass_.batch * pass_.classes * plane());
      edges_ = array<T>(pass_.slots * bands() * pass_.classes * grid_.student.width);
      pass_.gradient = gradient_.as<T>();
      pass_.edges = edges_.as<T>();
    }
  }

  bool asks(Term term) const { return (what_.terms & bit(term)) != 0; }
  int64_t plane() const { return grid_.student.height * grid_.student.width; }

  // Bands are dealt round robin to threads, each with a workspace of its own.
  void run_bands(int threads) {
    const size_t bytes = kernels_.workspace_bytes(pass_);
    const auto work = [&](int64_t first, int64_t step) {
      Block workspace(bytes, place_);
      for (int64_t band = first; band < bands(); band += step) {
        LabelReport& report = reports_[static_cast<size_t>(band)];
        report = LabelReport();
        workspace.spoil();
        kernels_.run_band(pass_, band, workspace.as<void>(), report);
      }
    };
    if (threads == 1) {
      work(plant == Plant::kOverflow ? 1 : 0, 1);  // the first rows would hide it
    } else {
      std::vector<std::thread> pool;
      for (int i = 0; i < threads; ++i) {
        if (plant == Plant::kRace) {
          pool.emplace_back(work, 0, 1);
        } else {
          pool.emplace_back(work, i, threads);
        }
      }
      for (std::thread& thread : pool) thread.join();
    }
    combine(threads);
  }

  // backward of a forward with gradients: the terms' gradients, added up plane by plane.
  void combine(int threads) {
    if (gradient_.bytes() == 0 || pass_.space_statistics) return;
    Logits sum(grid_, grid_.student, grid_.dtype, grid_.layout == kLast ? kLast : kDense, place_);
    const double scale[kTerms] = {0.5, 0.25, 1.5, -1.0};
    const Combine job{gradient_.as<void>(), pass_.slots,         scale,
                      pass_.batch,          pass_.classes,       grid_.student.height,
                      grid_.student.width,  sum.view()};
    const int64_t planes = pass_.batch * pass_.classes;
    const auto work = [&](int64_t first, int64_t step) {
      for (int64_t i = first; i < planes; i += step) kernels_.combine(job, i);
    };
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back(work, i, threads);
    work(0, threads);
    for (std::thread& thread : pool) thread.join();
    combined_ = Block(sum.block().bytes(), place_);
    std::memcpy(combined_.as<char>(), sum.block().as<char>(), sum.block().bytes());
  }

  // The softmax over an image's pixels: a sweep of its own, before the pass.
  void collect_space(int threads) {
    const int64_t classes = pass_.classes;
    const Block maxima = array<T>(bands() * classes);
    const Block partial = array<T>(bands() * classes);
    const Pass<T> whole = pass_;
    pass_.space_statistics = true;
    pass_.space_maximum = maxima.as<T>();
    pass_.space_sum = partial.as<T>();
    pass_.values = pass_.gradients = pass_.ce = pass_.feature = pass_.maps = false;
    pass_.kd = kNoKd;
    run_bands(threads);
    pass_ = whole;
    space_shift_ = array<T>(pass_.batch * classes);
    space_weight_ = array<T>(pass_.batch * classes);
    for (int64_t i = 0; i < pass_.batch * classes; ++i) {
      const int64_t first = i / classes * pass_.bands_per_image * classes + i % classes;
      T largest = maxima.as<T>()[first];
      for (int64_t k = 1; k < pass_.bands_per_image; ++k) {
        largest = std::max(largest, maxima.as<T>()[first + k * classes]);
      }
      double sum = 0.0;
      for (int64_t k = 0; k < pass_.bands_per_image; ++k) {
        const T part = partial.as<T>()[first + k * classes];
        if (!(part > T(0))) continue;
        sum += static_cast<double>(part) *
               std::exp(static_cast<double>(maxima.as<T>()[first + k * classes] - largest));
      }
      space_shift_.as<T>()[i] = largest;
      space_weight_.as<T>()[i] = sum > 0.0 ? static_cast<T>(1.0 / sum) : T(0);
    }
    pass_.space_shift = space_shift_.as<T>();
    pass_.space_weight = space_weight_.as<T>();
  }

  const Kernels<T>& kernels_;
  const Grid grid_;
  const What what_;
  const Place place_;
  Random random_;
  Logits student_, teacher_;
  Labels labels_;
  Pass<T> pass_{};
  std::vector<int32_t> pixel_;
  std::vector<int64_t> first_label_row_;
  GridMap<T> student_map_, teacher_map_;
  std::vector<LabelReport> reports_;
  std::unique_ptr<Logits> out_;
  Block weight_, sums_, gradient_, edges_, maps_, combined_, space_shift_, space_weight_;
};

// --- everything ----------------------------------------------------------------------------------

struct Score {
  int cases = 0, wrong = 0;
};

template <typename T>
void try_case(const Kernels<T>& kernels, const Grid& grid, const What& what, Mode mode,
              Score& score) {
  const Outcome serial = Call<T>(kernels, grid, what, mode, Place::kHeap).run(1);
  const Outcome threaded = Call<T>(kernels, grid, what, mode, Place::kPage).run(kThreads);
  ++score.cases;
  if (serial == threaded) return;
  const char* names[] = {"sums", "gradients", "edges", "maps", "combined", "gradient or labels",
                         "labels"};
  for (size_t i = 0; i < serial.size(); ++i) {
    if (serial[i] == threaded[i]) continue;
    if (++score.wrong > 20) return;
    std::printf("%s%s: '%s' on '%s', mode %d: %s differ between one thread and %d\n", kernels.isa,
                sizeof(T) == 8 ? " in double" : "", what.name, grid.name, static_cast<int>(mode),
                names[i], kThreads);
  }
}

template <typename T>
void try_elementary(const Kernels<T>& kernels, Score& score) {
  const int64_t count = kernels.lanes * 3;
  for (int64_t which = 0; which < 5; ++which) {
    std::vector<char> results[2];
    for (const Place place : {Place::kHeap, Place::kPage}) {
      const Block x(static_cast<size_t>(count) * sizeof(T), place);
      const Block y(static_cast<size_t>(count) * sizeof(T), place);
      for (int64_t i = 0; i < count; ++i) {
        const double part = static_cast<double>(i) / static_cast<double>(count);
        x.as<T>()[i] = static_cast<T>(0.01 + 0.9 * part);
      }
      kernels.elementary(which, x.as<T>(), y.as<T>(), count);
      results[place == Place::kPage].assign(y.as<char>(), y.as<char>() + y.bytes());
    }
    ++score.cases;
    score.wrong += results[0] != results[1];
  }
}

bool same_grid(const Grid& grid, const What& what) {
  const auto same = [&](Shape s) {
    return s.height == grid.labels.height && s.width == grid.labels.width;
  };
  return same(grid.student) && (!what.teacher || same(grid.teacher));
}

template <typename T>
bool try_all(const Kernels<T>& kernels) {
  Score score;
  // The portable kernels are slow under a sanitizer: every third pair of a grid and a what.
  const int every = std::strcmp(kernels.isa, "portable") == 0 ? 3 : 1;
  int pair = 0;
  for (const Grid& grid : kGrids) {
    for (const What& what : kWhats) {
      if (pair++ % every != 0) continue;
      try_case(kernels, grid, what, Mode::kForwardWithoutGradients, score);
      if (same_grid(grid, what)) {
        try_case(kernels, grid, what, Mode::kBackward, score);
        try_case(kernels, grid, what, Mode::kBackwardStreaming, score);
      } else {
        try_case(kernels, grid, what, Mode::kForward, score);
      }
    }
  }
  try_elementary(kernels, score);
  std::printf("%s%s: %d cases, %s\n", kernels.isa, sizeof(T) == 8 ? " in double" : "", score.cases,
              score.wrong == 0 ? "equal bits from one thread and from four" : "NOT equal");
  std::fflush(stdout);
  return score.wrong == 0;
}

// The kernels' own code is what must be caught doing it.
template <typename T>
void do_planted(const Kernels<T>& kernels) {
  const Grid grid = {"planted", 1, 5, {17, 9}, {17, 9}, {34, 18}, kF32, kF32, kDense, kU8, false,
                     false};
  const Place place = plant == Plant::kPage ? Place::kPage : Place::kHeap;
  Call<T>(kernels, grid, kWhats[0], Mode::kForward, place).run(plant == Plant::kRace ? 2 : 1);
}

const Kernels<float>* kernels_of(const std::string& isa) {
#if defined(__x86_64__) || defined(__i386__)
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
               ? kernels_avx512()
               : nullptr;
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c")
               ? kernels_avx2()
               : nullptr;
  }
#endif
  return isa == "portable" ? kernels_portable() : nullptr;
}

int usage() {
  std::fprintf(stderr, "usage: kernels list | ISA | overrun|overflow|page|race ISA\n");
  return 2;
}

int main_with(int count, char** arguments) {
  const char* isas[] = {"avx512", "avx2", "portable"};
  if (count == 2 && std::string(arguments[1]) == "list") {
    for (const char* isa : isas) {
      if (kernels_of(isa) != nullptr) std::printf("%s\n", isa);
    }
    std::printf("double\n");
    return 0;
  }
  if (count == 2) {
    const std::string isa = arguments[1];
    if (isa == "double") return try_all(*kernels_double()) ? 0 : 1;
    const Kernels<float>* kernels = kernels_of(isa);
    if (kernels == nullptr) return usage();
    return try_all(*kernels) ? 0 : 1;
  }
  if (count != 3) return usage();
  const std::string what = arguments[1], isa = arguments[2];
  plant = what == "overrun"    ? Plant::kOverrun
          : what == "overflow" ? Plant::kOverflow
          : what == "page"     ? Plant::kPage
          : what == "race"     ? Plant::kRace
                               : Plant::kNone;
  if (plant == Plant::kNone) return usage();
  if (isa == "double") {
    do_planted(*kernels_double());
  } else if (const Kernels<float>* kernels = kernels_of(isa)) {
    do_planted(*kernels);
  } else {
    return usage();
  }
  std::printf("%s: the planted %s was not caught\n", isa.c_str(), what.c_str());
  return 0;
}

}  // namespace
}  // namespace heteroakd::cpu

int main(int count, char** arguments) { return heteroakd::cpu::main_with(count, arguments); }
