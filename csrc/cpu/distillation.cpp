// Operators heteroakd_fast_c::sums, gradient, cpu_isa and elementary on the CPU: checks, memory and
// threads around the kernels of band.h.
//
// Two ways to the gradient. Where the logits are on a grid of their own, the gradient of each group
// of terms is collected, without the group's scale, in the one pass that has the probabilities at
// hand; `gradient` adds them up. Where all grids are the label grid, such gradients would be the
// largest tensors of the step: there `gradient` is a second pass that reads the logits again, knows
// every scale and writes the sum once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "strided.h"

namespace heteroakd::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// numerators, totals, denominators, labels, maps, and what each pass keeps for `gradient`
using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;  // of the student's and the teacher's logits

// Beyond this many label pixels per logit along an axis, float sums of their gradients lose more
// than the contract allows; the logits are then so few that double costs nothing but time.
constexpr int64_t kMaxFloatRatio = 64;
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

Workspace& workspace() {
  static thread_local Workspace one;
  return one;
}

template <typename T>
struct Uninitialised {
  std::unique_ptr<T[]> data;
  explicit Uninitialised(int64_t count) : data(new T[static_cast<size_t>(count)]) {}
  T* get() const { return data.get(); }
};

Dtype dtype_of(const Tensor& tensor, const char* name) {
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

LogitsView view_of(const Tensor& tensor, const char* name) {
  LogitsView view{data_of(tensor, name), dtype_of(tensor, name), {}};
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

LogitsView mutable_view_of(Tensor& tensor) {
  LogitsView view{static_cast<const char*>(tensor.mutable_data_ptr()), dtype_of(tensor, "gradient"),
                  {}};
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

void read_labels(const void* reader, int64_t b, int64_t y, int32_t* out, LabelReport& report) {
  static_cast<const StridedLabels*>(reader)->read_row(b, y, out, report);
}

template <typename T>
class Runner {
 public:
  // student: the logits that learn, those of the teacher for the pass `teacher_ce`.
  Runner(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& target,
         const std::optional<Tensor>& class_weight, const Spec& spec, const PassTerms& terms)
      : kernels_(choose_kernels<T>()),
        dtype_(sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
        terms_(terms),
        align_corners_(spec.align_corners),
        labels_(target, student.size(1), spec.ignore_index),
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
    if (terms_.maps) {
      maps = torch::stable::empty({2, pass_.batch, pass_.label_height, pass_.label_width}, dtype_);
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
    collect_space();
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
      numerators[terms_.position[k]] = clamps ? 0.0 : s[k * 2];
      double denominator = 0.0;
      switch (Term::denominator(pass_.variant[k], pass_.class_weight != nullptr)) {
        case Denominator::kValid: denominator = static_cast<double>(counts().valid); break;
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
    pass_.maps = false;
    pass_.gradient_count = 1;
    for (int k = 0; k < kTerms; ++k) {
      pass_.gradient_of[k] = terms_.asks(k) ? 0 : -1;
      pass_.scale[k] = terms_.asks(k)
                           ? static_cast<T>(grad_totals[terms_.group[k]] * terms_.weight[k])
                           : T(0);
    }
    set_order();
    collect_space();
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

  int64_t valid_in(int64_t image) const {
    int64_t valid = 0;
    for (int64_t k = 0; k < pass_.bands_per_image; ++k) {
      valid += report_[static_cast<size_t>(image * pass_.bands_per_image + k)].valid;
    }
    return valid;
  }

  int64_t images_with_pixels() const {
    int64_t images = 0;
    for (int64_t b = 0; b < pass_.batch; ++b) images += valid_in(b) > 0;
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

  // Terms over space: the softmax over the valid pixels of an image and class, by a pass of its own
  // for each.
  void collect_space() {
    for_each_term([&](auto tag, int k) {
      using Term = typename decltype(tag)::type;
      const int spaces = Term::spaces(pass_.variant[k]);
      if (terms_.asks(k) && spaces > 0) collect_space(k, spaces, Term::needs(pass_.variant[k]));
    });
  }

  void collect_space(int term, int spaces, const Needs& needs) {
    const int64_t classes = pass_.classes;
    Uninitialised<T> maxima(kMostFirsts * bands() * classes);
    Uninitialised<T> partial(kMostFirsts * bands() * classes);
    const Pass<T> whole = pass_;
    pass_.collected = term;
    pass_.needs = needs;
    pass_.space_maximum = maxima.get();
    pass_.space_sum = partial.get();
    pass_.values = pass_.gradients = pass_.maps = false;
    for (int k = 0; k < kTerms; ++k) {
      pass_.has[k] = k == term;
      pass_.asked[k] = false;
      pass_.gradient_of[k] = -1;
    }
    run();
    pass_ = whole;
    const auto count = static_cast<size_t>(spaces * pass_.batch * classes);
    space_shift_[term].assign(count, T(0));
    space_inverse_[term].assign(count, T(0));
    space_log_[term].assign(count, T(0));
    for (int64_t b = 0; b < spaces * pass_.batch; ++b) {
      if (valid_in(b % pass_.batch) == 0) continue;
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
  std::optional<Tensor> weight_;
  std::vector<LabelReport> report_;
  std::vector<double> sums_;
  std::vector<T> space_shift_[kTerms], space_inverse_[kTerms], space_log_[kTerms];  // as in Pass
};

// What would be read out of bounds.
void check(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
           const Tensor& target, const std::optional<Tensor>& class_weight, const Spec& spec) {
  const bool teacher = teacher_logits.has_value();
  STD_TORCH_CHECK(student_logits.dim() == 4 && target.dim() == 3 &&
                      student_logits.size(0) == target.size(0) &&
                      (!teacher || (teacher_logits->dim() == 4 &&
                                    teacher_logits->size(0) == student_logits.size(0) &&
                                    teacher_logits->size(1) == student_logits.size(1))),
                  "expected logits [B, C, h, w] and target [B, H, W]");
  STD_TORCH_CHECK(target.numel() == 0 || (student_logits.numel() > 0 &&
                                          (!teacher || teacher_logits->numel() > 0)),
                  "empty logits for a target that is not empty");
  STD_TORCH_CHECK(!class_weight.has_value() || (class_weight->dim() == 1 &&
                                                class_weight->size(0) == student_logits.size(1)),
                  "class_weight: expected [C]");
  STD_TORCH_CHECK(teacher || !(spec.student.needs().teacher || spec.teacher.any),
                  "teacher_logits: got None, these terms need them");
}

std::optional<Tensor> teacher_of(const PassTerms& terms, const std::optional<Tensor>& logits) {
  return terms.needs().teacher ? logits : std::nullopt;
}

bool identity(const Tensor& logits, const std::optional<Tensor>& teacher, const Tensor& target) {
  const auto on_label_grid = [&](const Tensor& one) {
    return one.size(2) == target.size(1) && one.size(3) == target.size(2);
  };
  return on_label_grid(logits) && (!teacher.has_value() || on_label_grid(*teacher));
}

Spec decode(const std::vector<int64_t>& structure, const Tensor& numbers) {
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous(),
                  "numbers: expected a contiguous float64 vector");
  return decode_spec(structure.data(), structure.size(),
                     static_cast<const double*>(numbers.const_data_ptr()),
                     static_cast<size_t>(numbers.numel()));
}

// One pass; adds to the call's results.
Tensor forward(const Tensor& logits, const std::optional<Tensor>& teacher, const Tensor& target,
               const std::optional<Tensor>& class_weight, const Spec& spec, const PassTerms& terms,
               bool compute_grad, double* numerators, double* denominators, Tensor& maps,
               LabelReport& labels) {
  const auto run = [&](auto zero) {
    Runner<decltype(zero)> runner(logits, teacher, target, class_weight, spec, terms);
    Tensor gradients = runner.forward(compute_grad, numerators, denominators, maps);
    labels = runner.counts();
    return gradients;
  };
  if (logits.scalar_type() == ScalarType::Double) return run(0.0);
  if (target.size(1) <= kMaxFloatRatio * logits.size(2) &&
      target.size(2) <= kMaxFloatRatio * logits.size(3)) {
    return run(0.0f);
  }
  const Tensor gradients = run(0.0);
  maps = torch::stable::to(maps, ScalarType::Float);
  return torch::stable::to(gradients, ScalarType::Float);
}

Sums sums(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
          const Tensor& target, const std::optional<Tensor>& class_weight, const Tensor& numbers,
          std::vector<int64_t> structure, bool student_grad, bool teacher_grad) {
  const Spec spec = decode(structure, numbers);
  check(student_logits, teacher_logits, target, class_weight, spec);
  const auto zeros = [](int64_t count) {
    Tensor out = torch::stable::empty({count}, ScalarType::Double);
    std::fill_n(static_cast<double*>(out.mutable_data_ptr()), count, 0.0);
    return out;
  };
  Tensor numerators = zeros(spec.terms), totals = zeros(spec.groups),
         denominators = zeros(spec.groups);
  auto* n = static_cast<double*>(numerators.mutable_data_ptr());
  auto* t = static_cast<double*>(totals.mutable_data_ptr());
  auto* d = static_cast<double*>(denominators.mutable_data_ptr());
  const bool wide = student_logits.scalar_type() == ScalarType::Double;
  Tensor maps = torch::stable::empty({0}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor student_saved = torch::stable::empty({0}, ScalarType::Float);
  Tensor teacher_saved = student_saved;
  LabelReport labels;
  if (spec.student.any) {
    student_saved = forward(student_logits, teacher_of(spec.student, teacher_logits), target,
                            class_weight, spec, spec.student, student_grad, n, d, maps, labels);
  }
  if (spec.teacher.any) {
    Tensor none = maps;
    teacher_saved = forward(*teacher_logits, std::nullopt, target, class_weight, spec, spec.teacher,
                            teacher_grad, n, d, none, labels);
  }
  for (const PassTerms* terms : {&spec.student, &spec.teacher}) {
    for (int k = 0; k < kTerms; ++k) {
      if (terms->asks(k)) t[terms->group[k]] += terms->weight[k] * n[terms->position[k]];
    }
  }
  Tensor report = torch::stable::empty({3}, ScalarType::Long);
  auto* l = static_cast<int64_t*>(report.mutable_data_ptr());
  l[0] = labels.valid;
  l[1] = labels.out_of_range;
  l[2] = labels.first_out_of_range;
  return {numerators, totals, denominators, report, maps, student_saved, teacher_saved};
}

// sum over g of grad_totals[group] * gradient_weight * gradients[g], in the form of like
Tensor combine_gradients(const Tensor& gradients, const double* grad_totals, const PassTerms& terms,
                         const Tensor& like) {
  STD_TORCH_CHECK(gradients.dim() == 5 && gradients.is_contiguous() &&
                      gradients.size(0) == terms.gradients &&
                      gradients.numel() == gradients.size(0) * like.numel(),
                  "saved: expected what sums returned for logits like these");
  Tensor out = torch::stable::empty_like(like);
  double scale[kTerms];
  for (int g = 0; g < terms.gradients; ++g) {
    scale[g] = grad_totals[terms.gradient_group[g]] * terms.gradient_weight[g];
  }
  const Combine job{gradients.const_data_ptr(), terms.gradients,  scale,
                    like.size(0),               like.size(1), like.size(2),
                    like.size(3),               mutable_view_of(out)};
  if (like.numel() == 0) return out;
  const bool wide = gradients.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || gradients.scalar_type() == ScalarType::Float,
                  "saved: expected float32 or float64 gradients");
  void (*combine)(const Combine&, int64_t) =
      wide ? choose_kernels<double>().combine : choose_kernels<float>().combine;
  const int64_t plane = job.height * job.width;
  const int64_t grain = std::max<int64_t>(1, 32768 / plane);
  torch::stable::parallel_for(0, job.batch * job.classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) combine(job, i);
  });
  return out;
}

// Of one pass's logits. saved: what `sums` kept, or nothing.
Tensor backward(const Tensor& logits, const std::optional<Tensor>& teacher,
                const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                const Spec& spec, const PassTerms& terms, const double* grad_totals,
                const std::optional<Tensor>& saved) {
  if (saved.has_value()) return combine_gradients(*saved, grad_totals, terms, logits);
  STD_TORCH_CHECK(target.has_value() && identity(logits, teacher, *target),
                  "saved: got None for logits that are not on the label grid");
  const auto run = [&](auto zero) {
    return Runner<decltype(zero)>(logits, teacher, *target, class_weight, spec, terms)
        .backward(logits, grad_totals);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

Gradients gradient(const Tensor& grad_totals, const Tensor& student_logits,
                   const std::optional<Tensor>& teacher_logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight, const Tensor& numbers,
                   const std::optional<Tensor>& student_saved,
                   const std::optional<Tensor>& teacher_saved, std::vector<int64_t> structure,
                   bool student_grad, bool teacher_grad) {
  const Spec spec = decode(structure, numbers);
  STD_TORCH_CHECK(grad_totals.scalar_type() == ScalarType::Double && grad_totals.is_contiguous() &&
                      grad_totals.numel() == spec.groups,
                  "grad_totals: expected float64 [", spec.groups, "]");
  if (target.has_value()) check(student_logits, teacher_logits, *target, class_weight, spec);
  const auto* scales = static_cast<const double*>(grad_totals.const_data_ptr());
  Tensor student = torch::stable::empty({0}, ScalarType::Float);
  Tensor teacher = student;
  if (student_grad && spec.student.any) {
    student = backward(student_logits, teacher_of(spec.student, teacher_logits), target,
                       class_weight, spec, spec.student, scales, student_saved);
  }
  if (teacher_grad && spec.teacher.any) {
    STD_TORCH_CHECK(teacher_logits.has_value(), "teacher_logits: got None");
    teacher = backward(*teacher_logits, std::nullopt, target, class_weight, spec, spec.teacher,
                       scales, teacher_saved);
  }
  return {student, teacher};
}

std::string cpu_isa() { return choose_kernels<float>().isa; }

Tensor elementary(const Tensor& x, std::string function, std::string isa) {
  const char* names[] = {"exp2", "log", "log2", "log1p", "log1p_unit"};
  int64_t which = 0;
  while (which < 5 && function != names[which]) ++which;
  const Kernels<float>* kernels = float_kernels(isa);
  STD_TORCH_CHECK(which < 5 && kernels != nullptr && x.is_contiguous() &&
                      x.scalar_type() == ScalarType::Float && x.numel() % kernels->lanes == 0,
                  "elementary: no such function or instruction set, or x is not a contiguous "
                  "float32 tensor of whole vectors");
  Tensor out = torch::stable::empty_like(x);
  kernels->elementary(which, static_cast<const float*>(x.const_data_ptr()),
                      static_cast<float*>(out.mutable_data_ptr()), x.numel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CPU, m) {
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("elementary", TORCH_BOX(&elementary));
}

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace heteroakd::cpu
