// One pass on the CPU: memory and threads around the kernels of band.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "strided.h"

namespace heteroakd::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int64_t kBandRows = 8;
// A gradient larger than this is written past the caches, which could not hold it anyway.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// A thread's memory, kept from call to call: fresh pages cost more than the arithmetic on them.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Null when there is no memory.
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::malloc(bytes + 64);
      if (data_ == nullptr) return nullptr;
      size_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(data_);
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

  // What only a very large call needed is given back.
  void trim() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{32} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline Workspace& workspace() {
  static thread_local Workspace one;
  return one;
}

template <typename T>
struct Uninitialised {
  std::unique_ptr<T[]> data;
  explicit Uninitialised(int64_t count) : data(new T[static_cast<size_t>(count)]) {}
  T* get() const { return data.get(); }
};

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
  return Dtype::kFloat;
}

inline LogitsView view_of(const Tensor& tensor, const char* name) {
  LogitsView view{data_of(tensor, name), dtype_of(tensor, name), {}};
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

inline LogitsView mutable_view_of(Tensor& tensor) {
  LogitsView view{static_cast<const char*>(tensor.mutable_data_ptr()), dtype_of(tensor, "gradient"),
                  {}};
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

inline void read_labels(const void* reader, int64_t b, int64_t y, int32_t* out, LabelReport& report) {
  static_cast<const StridedLabels*>(reader)->read_row(b, y, out, report);
}

template <typename T>
class Runner {
 public:
  // student: the logits that learn, those of the teacher for the pass `teacher_ce`.
  Runner(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& target,
         const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight,
         const Spec& spec, const PassTerms& terms)
      : kernels_(choose_kernels<T>()),
        dtype_(sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
        terms_(terms),
        align_corners_(spec.align_corners),
        labels_(target, student.size(1), spec.ignore_index, spec.unlabelled_index),
        height_(student.size(2)),
        width_(student.size(3)) {
    pass_.batch = student.size(0);
    pass_.classes = student.size(1);
    pass_.label_height = target.size(1);
    pass_.label_width = target.size(2);
    pass_.has_teacher = teacher.has_value();
    pass_.identity = on_label_grid(student) && (!teacher.has_value() || on_label_grid(*teacher));
    set_grids(student, teacher);
    pass_.labels = labels_.view();
    pass_.read_labels = read_labels;
    pass_.class_weight = nullptr;
    pass_.numbers.weight_sum = static_cast<T>(pass_.classes);
    if (class_weight.has_value()) {
      data_of(*class_weight, "class_weight");
      weight_ = torch::stable::contiguous(torch::stable::to(*class_weight, dtype_));
      pass_.class_weight = static_cast<const T*>(weight_->const_data_ptr());
      pass_.numbers.weight_sum = T(0);
      for (int64_t c = 0; c < pass_.classes; ++c) pass_.numbers.weight_sum += pass_.class_weight[c];
    }
    pass_.unlabelled = spec.unlabelled_index != spec.ignore_index;
    pass_.pixel_weight = nullptr;
    if (pixel_weight.has_value()) {
      pixel_weight_ = dense_weights(*pixel_weight, target, dtype_);
      pass_.pixel_weight = static_cast<const T*>(pixel_weight_->const_data_ptr());
    }
    set_terms();
    report_.resize(static_cast<size_t>(bands()));
    sums_.resize(static_cast<size_t>(bands() * kTerms * 2));
    pass_.sums = sums_.data();
  }

  // Writes the pass's numerators and denominators where the call wants them; returns the gradients of
  // its groups [gradients, B, C, h, w], or nothing.
  Tensor forward(bool compute_grad, double* numerators, double* denominators, Tensor& maps) {
    pass_.values = true;
    pass_.gradients = compute_grad && !pass_.identity;
    if (terms_.planes() > 0) {
      maps = torch::stable::empty(
          {terms_.planes(), pass_.batch, pass_.label_height, pass_.label_width}, dtype_);
      pass_.map_values = static_cast<T*>(maps.mutable_data_ptr());
      std::fill_n(pass_.map_values, maps.numel(), T(0));
    }
    Tensor gradients = torch::stable::empty({0}, dtype_);
    std::optional<Uninitialised<T>> edges;
    pass_.gradient_count = pass_.gradients ? terms_.gradients : 0;
    for (int k = 0; k < kTerms; ++k) {
      pass_.gradient_of[k] = pass_.gradients ? terms_.gradient[k] : -1;
      pass_.scale[k] = terms_.asks(k) ? static_cast<T>(terms_.relative_weight(k)) : T(0);
    }
    set_order();
    if (pass_.gradients) {
      gradients = torch::stable::empty(
          {pass_.gradient_count, pass_.batch, pass_.classes, height_, width_}, dtype_);
      pass_.gradient = static_cast<T*>(gradients.mutable_data_ptr());
      edges.emplace(pass_.gradient_count * bands() * pass_.classes * width_);
      pass_.edges = edges->get();
    }
    collect();
    run();
    if (pass_.gradients) add_edges();

    double s[kTerms * 2] = {};
    for (int k = 0; k < kTerms * 2; ++k) {
      for (int64_t band = 0; band < bands(); ++band) {
        s[k] += sums_[static_cast<size_t>(band * kTerms * 2 + k)];
      }
    }
    for_each_term([&](auto tag, int k) {
      using Term = typename decltype(tag)::type;
      if (!terms_.asks(k)) return;
      // A sum of divergences is never negative, its rounding may be. A NaN comes through.
      const bool clamps = Term::is_divergence(pass_.variant[k]) && s[k * 2] < 0.0;
      numerators[terms_.position[k]] = Term::kTallies > 0 ? value_[k] : clamps ? 0.0 : s[k * 2];
      double denominator = 0.0;
      switch (Term::denominator(pass_.variant[k], pass_.class_weight != nullptr)) {
        case Denominator::kValid: denominator = pixels_of(Term::kNeedsLabel); break;
        case Denominator::kClasses:
          denominator = pixels_of(true) > 0.0 ? static_cast<double>(pass_.classes) : 0.0;
          break;
        case Denominator::kImages:
          denominator = static_cast<double>(images_with_pixels() * pass_.classes);
          break;
        default: denominator = s[k * 2 + 1];
      }
      denominators[terms_.group[k]] = denominator;
    });
    return gradients;
  }

  // The gradient of logits on the label grid, where every model is on it. grad_totals: f64 [groups].
  Tensor backward(const Tensor& student, const double* grad_totals) {
    Tensor gradient = torch::stable::empty_like(student);
    pass_.out = mutable_view_of(gradient);
    pass_.streams = gradient.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    pass_.values = false;
    pass_.gradients = true;
    pass_.maps = pass_.diagnostics = false;
    pass_.gradient_count = 1;
    for (int k = 0; k < kTerms; ++k) {
      pass_.gradient_of[k] = terms_.asks(k) ? 0 : -1;
      pass_.scale[k] = terms_.asks(k)
                           ? static_cast<T>(grad_totals[terms_.group[k]] * terms_.weight[k])
                           : T(0);
    }
    set_order();
    collect();
    run();
    return gradient;
  }

  LabelReport counts() const {
    LabelReport total;
    for (const LabelReport& report : report_) merge(total, report);
    return total;
  }

 private:
  int64_t bands() const { return pass_.batch * pass_.bands_per_image; }

  bool on_label_grid(const Tensor& logits) const {
    return logits.size(2) == pass_.label_height && logits.size(3) == pass_.label_width;
  }

  // |V|, or the sum of the weights over V.
  double pixels_of(bool labelled) const {
    const LabelReport all = counts();
    if (pass_.pixel_weight != nullptr) {
      return labelled ? all.labelled_weight : all.distilled_weight;
    }
    return static_cast<double>(labelled ? all.labelled : all.distilled);
  }

  int64_t distilled_in(int64_t image) const {
    int64_t found = 0;
    for (int64_t k = 0; k < pass_.bands_per_image; ++k) {
      found += report_[static_cast<size_t>(image * pass_.bands_per_image + k)].distilled;
    }
    return found;
  }

  int64_t images_with_pixels() const {
    int64_t images = 0;
    for (int64_t b = 0; b < pass_.batch; ++b) images += distilled_in(b) > 0;
    return images;
  }

  // Which term of a gradient is the first to add to it, and which the last.
  void set_order() {
    for (int k = 0; k < kTerms; ++k) {
      pass_.begins[k] = pass_.ends[k] = true;
      for (int j = 0; j < k; ++j) {
        if (pass_.gradient_of[j] != pass_.gradient_of[k]) continue;
        pass_.begins[k] = false;
        pass_.ends[j] = false;
      }
    }
  }

  void set_grids(const Tensor& student, const std::optional<Tensor>& teacher) {
    const int64_t apart =
        pass_.identity ? 1
                       : Columns::distance(width_, pass_.label_width, align_corners_);
    const Columns columns(pass_.label_width, kernels_.lanes, apart);
    pixel_ = columns.pixel;
    pass_.lanes = columns.lanes;
    pass_.vectors = columns.vectors;
    pass_.apart = apart;
    pass_.pixel = pixel_.data();
    pass_.student_logits = view_of(student, "student_logits");
    student_map_ = GridMap<T>(height_, width_, pass_.label_height, pass_.label_width,
                              align_corners_, columns);
    // A label row belongs to the band of its lower row of logits.
    const std::vector<int32_t>& lower = student_map_.row_lower();
    pass_.band_rows = kBandRows;
    pass_.bands_per_image = (height_ + kBandRows - 1) / kBandRows;
    size_t y = 0;
    for (int64_t band = 0; band <= pass_.bands_per_image; ++band) {
      while (y < lower.size() && lower[y] < band * kBandRows) ++y;
      first_label_row_.push_back(static_cast<int64_t>(y));
    }
    pass_.first_label_row = first_label_row_.data();
    pass_.student = student_map_.view(kBandRows + 1);
    if (!teacher.has_value()) return;
    pass_.teacher_logits = view_of(*teacher, "teacher_logits");
    teacher_map_ = GridMap<T>(teacher->size(2), teacher->size(3), pass_.label_height,
                              pass_.label_width, align_corners_, columns);
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
    pass_.maps = terms_.maps;
    pass_.diagnostics = terms_.diagnostics;
    pass_.huge = sizeof(T) == 4 ? 1e30 : 1e290;
    pass_.collected = -1;
    pass_.needs = terms_.needs();
    const auto t = static_cast<T>(terms_.temperature);
    pass_.numbers = {t, T(1) / t, static_cast<T>(kLog2E / static_cast<double>(t)),
                     static_cast<T>(pass_.classes), pass_.numbers.weight_sum};
    pass_.term_numbers.set(terms_.options, static_cast<T>(pass_.classes));
    for_each_term([&](auto tag, int k) {
      pass_.has[k] = terms_.has[k];
      pass_.asked[k] = terms_.asks(k);
      pass_.variant[k] = terms_.variant[k];
      const Denominator denominator =
          decltype(tag)::type::denominator(terms_.variant[k], pass_.class_weight != nullptr);
      pass_.has_shares[k] =
          denominator == Denominator::kShares || denominator == Denominator::kClassWeight;
    });
  }

  void run() {
    const size_t bytes = kernels_.workspace_bytes(pass_);
    // No exception may cross the C interface of parallel_for: only an allocation can fail here.
    std::atomic<bool> failed{false};
    torch::stable::parallel_for(0, bands(), 1, [&](int64_t begin, int64_t end) {
      void* memory = workspace().get(bytes);
      if (memory == nullptr) {
        failed = true;
        return;
      }
      for (int64_t band = begin; band < end; ++band) {
        LabelReport& report = report_[static_cast<size_t>(band)];
        report = LabelReport();
        kernels_.run_band(pass_, band, memory, report);
      }
      workspace().trim();
    });
    STD_TORCH_CHECK(!failed, "sums: out of memory for the rows of a band (", bytes,
                    " bytes per thread)");
  }

  // Adds each band's edge row to the first row of the next band.
  void add_edges() {
    const int64_t row = pass_.classes * width_;
    torch::stable::parallel_for(0, pass_.gradient_count * bands(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t gradient = i / bands();
        const int64_t band = i % bands();
        const int64_t next = (band % pass_.bands_per_image + 1) * kBandRows;
        if (next >= height_) continue;
        const T* edge = pass_.edges + i * row;
        const int64_t image = gradient * pass_.batch + band / pass_.bands_per_image;
        for (int64_t c = 0; c < pass_.classes; ++c) {
          T* out = pass_.gradient + ((image * pass_.classes + c) * height_ + next) * width_;
          for (int64_t x = 0; x < width_; ++x) out[x] += edge[c * width_ + x];
        }
      }
    });
  }

  // What terms over space and over classes divide by, by a pass of its own for each.
  void collect() {
    for_each_term([&](auto tag, int k) {
      using Term = typename decltype(tag)::type;
      const int spaces = Term::spaces(pass_.variant[k]);
      if (terms_.asks(k) && spaces > 0) collect_space(k, spaces, Term::needs(pass_.variant[k]));
      if constexpr (Term::kTallies > 0) {
        if (terms_.asks(k)) collect_classes<Term>();
      }
    });
  }

  void run_alone(int term, const Needs& needs) {
    pass_.collected = term;
    pass_.needs = needs;
    pass_.values = pass_.gradients = pass_.maps = pass_.diagnostics = false;
    for (int k = 0; k < kTerms; ++k) {
      pass_.has[k] = k == term;
      pass_.asked[k] = false;
      pass_.gradient_of[k] = -1;
    }
    run();
  }

  // The sums over all labelled pixels, and what the term makes of them.
  template <class Term>
  void collect_classes() {
    constexpr int term = index_of<Term>;
    const int64_t classes = pass_.classes;
    Uninitialised<double> tallies(kMostTallies * bands() * classes);
    const Pass<T> whole = pass_;
    pass_.tallies = tallies.get();
    run_alone(term, Term::needs(pass_.variant[term]));
    pass_ = whole;
    std::vector<Settled> settled(static_cast<size_t>(classes));
    double value = 0.0;
    for (int64_t c = 0; c < classes; ++c) {
      double sums[kMostTallies] = {};
      for (int64_t i = 0; i < kMostTallies * bands(); ++i) {
        sums[i / bands()] += tallies.get()[i * classes + c];
      }
      settled[static_cast<size_t>(c)] = Term::settle(terms_.options[term], sums);
      value += settled[static_cast<size_t>(c)].value;
    }
    const Conclusion all =
        Term::conclude(terms_.options[term], value, static_cast<double>(classes));
    value_[term] = all.value;
    space_shift_[term].clear();
    space_inverse_[term].clear();
    for (const Settled& one : settled) {
      space_shift_[term].push_back(static_cast<T>(one.number[0] * all.factor));
      space_inverse_[term].push_back(static_cast<T>(one.number[1] * all.factor));
    }
    pass_.space_shift[term] = space_shift_[term].data();
    pass_.space_inverse[term] = space_inverse_[term].data();
  }

  // The softmax over the valid pixels of an image and class.
  void collect_space(int term, int spaces, const Needs& needs) {
    const int64_t classes = pass_.classes;
    Uninitialised<T> maxima(kMostFirsts * bands() * classes);
    Uninitialised<T> partial(kMostFirsts * bands() * classes);
    const Pass<T> whole = pass_;
    pass_.space_maximum = maxima.get();
    pass_.space_sum = partial.get();
    run_alone(term, needs);
    pass_ = whole;
    const auto count = static_cast<size_t>(spaces * pass_.batch * classes);
    space_shift_[term].assign(count, T(0));
    space_inverse_[term].assign(count, T(0));
    space_log_[term].assign(count, T(0));
    for (int64_t b = 0; b < spaces * pass_.batch; ++b) {
      if (distilled_in(b % pass_.batch) == 0) continue;
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t first = b * pass_.bands_per_image * classes + c;
        T largest = maxima.get()[first];
        for (int64_t k = 1; k < pass_.bands_per_image; ++k) {
          largest = std::max(largest, maxima.get()[first + k * classes]);
        }
        double sum = 0.0;
        for (int64_t k = 0; k < pass_.bands_per_image; ++k) {
          const double below = static_cast<double>(maxima.get()[first + k * classes]) -
                               static_cast<double>(largest);
          sum += std::exp(below) * static_cast<double>(partial.get()[first + k * classes]);
        }
        space_shift_[term][static_cast<size_t>(b * classes + c)] = largest;
        space_inverse_[term][static_cast<size_t>(b * classes + c)] = static_cast<T>(1.0 / sum);
        space_log_[term][static_cast<size_t>(b * classes + c)] =
            static_cast<T>(static_cast<double>(largest) + std::log(sum));
      }
    }
    pass_.space_shift[term] = space_shift_[term].data();
    pass_.space_inverse[term] = space_inverse_[term].data();
    pass_.space_log[term] = space_log_[term].data();
  }

  const Kernels<T>& kernels_;
  ScalarType dtype_;
  PassTerms terms_;
  bool align_corners_;
  StridedLabels labels_;
  int64_t height_, width_;
  Pass<T> pass_{};
  std::vector<int32_t> pixel_;
  std::vector<int64_t> first_label_row_;
  GridMap<T> student_map_, teacher_map_;
  std::optional<Tensor> weight_, pixel_weight_;
  std::vector<LabelReport> report_;
  std::vector<double> sums_;
  double value_[kTerms] = {};  // of terms over classes
  std::vector<T> space_shift_[kTerms], space_inverse_[kTerms], space_log_[kTerms];  // as in Pass
};

}  // namespace heteroakd::cpu
