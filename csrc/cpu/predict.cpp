// Operators heteroakd_fast_c::predict and confusion_matrix on the CPU: checks, memory and threads
// around the kernel of predict_kernel.h.
//
// Memory beyond the result: per thread two rows of a chunk of logits (kChunkBytes, or what 16 columns
// of all classes take) and, where it has at most kTableBytes, a table of counts. Larger tables are
// shared: counts are integers, so the order in which threads add to them does not matter.
#include "predict.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "runner.h"

namespace heteroakd::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t{256} << 10;
constexpr int64_t kTableBytes = int64_t{1} << 20;
// From so many pixels of a cell on, finding its candidates costs less than it saves, or little more.
constexpr int64_t kPruneFrom = 4;
// At least so many units of work, if strips of two rows of logits make as many.
constexpr int64_t kUnits = 16;

template <typename T>
const Predictor<T>& choose_predictor() {
  if constexpr (sizeof(T) == 8) {
    return *predictor_double();
  } else {
    const std::string isa = choose_kernels<float>().isa;
    const Predictor<float>* found = isa == "avx512" ? predictor_avx512()
                                    : isa == "avx2" ? predictor_avx2()
                                                    : predictor_portable();
    return found != nullptr ? *found : *predictor_portable();
  }
}

template <typename T>
class Evaluation {
 public:
  Evaluation(const Tensor& logits, int64_t height, int64_t width, bool align_corners)
      : predictor_(choose_predictor<T>()),
        columns_(width, predictor_.lanes,
                 Columns::distance(logits.size(3), width, align_corners)),
        grid_(logits.size(2), logits.size(3), height, width, align_corners, columns_) {
    job_.batch = logits.size(0);
    job_.classes = logits.size(1);
    job_.label_height = height;
    job_.label_width = width;
    job_.logits = view_of(logits, "logits");
    job_.grid = grid_.view(2);
    job_.exact_columns = logits.size(3) == width;
    job_.apart = columns_.vectors == 0 ? 1 : std::max<int64_t>(1, apart(logits, align_corners));
    job_.pixel = columns_.pixel.data();
    job_.prunes = job_.classes > 2 &&
                  height * width >= kPruneFrom * logits.size(2) * logits.size(3) &&
                  height >= logits.size(2) && width >= logits.size(3);
    set_chunks();
    set_strips();
  }

  void predict(Tensor& out) {
    job_.out = out.mutable_data_ptr();
    job_.bytes = out.scalar_type() == ScalarType::Byte;
    run(nullptr);
  }

  LabelReport count(const Tensor& target, int64_t ignore_index, int64_t* table) {
    const StridedLabels labels(target, job_.classes, ignore_index, ignore_index);
    job_.labels = labels.view();
    job_.shared = job_.classes * job_.classes * 8 > kTableBytes;
    run(table);
    LabelReport total;
    for (const LabelReport& report : reports_) merge(total, report);
    return total;
  }

 private:
  int64_t apart(const Tensor& logits, bool align_corners) const {
    return Columns::distance(logits.size(3), job_.label_width, align_corners);
  }

  // Groups of vectors, their cells, and as many groups to a chunk as its memory has room for.
  void set_chunks() {
    const int64_t lanes = predictor_.lanes;
    const int64_t groups = columns_.vectors / job_.apart;
    const int64_t pixels = lanes * job_.apart;
    for (int64_t group = 0; group < groups; ++group) {
      int32_t first = static_cast<int32_t>(job_.grid.width), last = 0;
      for (int64_t i = group * pixels; i < (group + 1) * pixels; ++i) {
        if (job_.pixel[i] < 0) continue;
        first = std::min(first, job_.grid.column_lower[i]);
        last = std::max(last, job_.grid.column_lower[i]);
      }
      first_cell_.push_back(first);
      last_cell_.push_back(last);
    }
    const int64_t room =
        kChunkBytes / (2 * job_.classes * static_cast<int64_t>(sizeof(T))) - 3 * lanes;
    int64_t most = 0;
    for (int64_t group = 0; group < groups;) {
      ColumnChunk chunk{};
      chunk.first_vector = group * job_.apart;
      chunk.first_column = first_cell_[static_cast<size_t>(group)];
      int32_t end = chunk.first_column;
      const int64_t begin = group;
      do {
        for (int64_t v = group * job_.apart; v < (group + 1) * job_.apart; ++v) {
          chunk.first_column = std::min(chunk.first_column, job_.grid.column_base[v]);
        }
        end = last_cell_[static_cast<size_t>(group)] + 2;
        ++group;
      } while (group < groups && last_cell_[static_cast<size_t>(group)] - chunk.first_column < room);
      chunk.end_vector = group * job_.apart;
      chunk.first_pixel = begin * pixels;
      chunk.pixels = std::min(group * pixels, job_.label_width) - chunk.first_pixel;
      chunk.columns = end - chunk.first_column;
      most = std::max<int64_t>(most, chunk.columns);
      most_pixels_ = std::max(most_pixels_, chunk.pixels);
      chunks_.push_back(chunk);
    }
    job_.first_cell = first_cell_.data();
    job_.last_cell = last_cell_.data();
    job_.chunks = static_cast<int64_t>(chunks_.size());
    job_.chunk = chunks_.data();
    job_.most_pixels = most_pixels_;
    job_.blocks = most / lanes + 1;
    // what the loads of the last vector and of the last block touch; not a power of two
    const int64_t step = std::max(most + 2 * lanes + 1, (job_.blocks + 1) * lanes);
    job_.step = (step + 15) / 16 * 16;
    if (job_.step / 16 % 2 == 0) job_.step += 16;
  }

  // A label row belongs to the strip of its lower row of logits.
  void set_strips() {
    const std::vector<int32_t>& lower = grid_.row_lower();
    const int64_t height = job_.grid.height;
    int64_t rows = kBandRows;
    if (height > job_.label_height) rows = rows * height / job_.label_height;
    while (rows > 2 && job_.batch * job_.chunks * ((height + rows - 1) / rows) < kUnits) rows /= 2;
    job_.strips = (height + rows - 1) / rows;
    size_t y = 0;
    for (int64_t strip = 0; strip <= job_.strips; ++strip) {
      while (y < lower.size() && lower[y] < strip * rows) ++y;
      first_row_.push_back(static_cast<int64_t>(y));
    }
    job_.first_row = first_row_.data();
  }

  void run(int64_t* table) {
    const int64_t units = job_.batch * job_.strips * job_.chunks;
    const int64_t entries = job_.classes * job_.classes;
    const size_t bytes = predictor_.workspace_bytes(job_);
    const bool own = table != nullptr && !job_.shared;
    const size_t all = bytes + (own ? static_cast<size_t>(entries) * 8 : 0);
    reports_.resize(static_cast<size_t>(units));
    // No exception may cross the C interface of parallel_for: only an allocation can fail here.
    std::atomic<bool> failed{false};
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      char* const memory = static_cast<char*>(workspace().get(all));
      if (memory == nullptr) {
        failed = true;
        return;
      }
      auto* const counts = own ? reinterpret_cast<int64_t*>(memory + bytes) : table;
      if (own) std::fill_n(counts, entries, int64_t{0});
      for (int64_t unit = begin; unit < end; ++unit) {
        predictor_.run(job_, unit, memory, counts, reports_[static_cast<size_t>(unit)]);
      }
      if (own) {
        for (int64_t i = 0; i < entries; ++i) {
          if (counts[i] != 0) __atomic_fetch_add(table + i, counts[i], __ATOMIC_RELAXED);
        }
      }
      workspace().trim();
    });
    STD_TORCH_CHECK(!failed, "predict: out of memory for two rows of logits (", all,
                    " bytes per thread)");
  }

  const Predictor<T>& predictor_;
  Columns columns_;
  GridMap<T> grid_;
  Prediction<T> job_{};
  std::vector<int32_t> first_cell_, last_cell_;
  std::vector<ColumnChunk> chunks_;
  std::vector<int64_t> first_row_;
  std::vector<LabelReport> reports_;
  int64_t most_pixels_ = 0;
};

// What would be read out of bounds.
void check(const Tensor& logits, int64_t height, int64_t width) {
  STD_TORCH_CHECK(logits.dim() == 4 && height >= 0 && width >= 0 && logits.size(1) >= 1 &&
                      logits.size(1) <= 65536,
                  "predict: expected logits [B, C, h, w] and a size that is not negative");
  STD_TORCH_CHECK(logits.numel() > 0 || logits.size(0) * height * width == 0,
                  "predict: empty logits for a size that is not empty");
}

template <typename Body>
void with_type(const Tensor& logits, const Body& body) {
  if (logits.scalar_type() == ScalarType::Double) {
    body(0.0);
  } else {
    body(0.0f);
  }
}

Tensor predict(const Tensor& logits, int64_t height, int64_t width, bool align_corners,
               bool bytes) {
  check(logits, height, width);
  STD_TORCH_CHECK(!bytes || logits.size(1) <= 256, "predict: uint8 holds no more than 256 classes");
  Tensor out = torch::stable::empty({logits.size(0), height, width},
                                    bytes ? ScalarType::Byte : ScalarType::Long);
  if (out.numel() == 0) return out;
  with_type(logits, [&](auto zero) {
    Evaluation<decltype(zero)>(logits, height, width, align_corners).predict(out);
  });
  return out;
}

std::tuple<Tensor, Tensor> confusion_matrix(const Tensor& logits, const Tensor& target,
                                            int64_t ignore_index, bool align_corners) {
  STD_TORCH_CHECK(target.dim() == 3 && logits.dim() == 4 && target.size(0) == logits.size(0),
                  "confusion_matrix: expected logits [B, C, h, w] and target [B, H, W]");
  check(logits, target.size(1), target.size(2));
  Tensor out = torch::stable::empty({logits.size(1), logits.size(1)}, ScalarType::Long);
  auto* const table = static_cast<int64_t*>(out.mutable_data_ptr());
  std::fill_n(table, out.numel(), int64_t{0});
  LabelReport labels;
  if (target.numel() > 0) {
    with_type(logits, [&](auto zero) {
      Evaluation<decltype(zero)> evaluation(logits, target.size(1), target.size(2), align_corners);
      labels = evaluation.count(target, ignore_index, table);
    });
  }
  return {out, report_tensor(labels)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CPU, m) {
  m.impl("predict", TORCH_BOX(&predict));
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
}

}  // namespace heteroakd::cpu
