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
    pass_.weight_sum = static_cast<T>(pass_.classes);
    if (class_weight.has_value()) {
      data_of(*class_weight, "class_weight");
      weight_ = torch::stable::contiguous(torch::stable::to(*class_weight, dtype_));
      pass_.class_weight = static_cast<const T*>(weight_->const_data_ptr());
      pass_.weight_sum = T(0);
      for (int64_t c = 0; c < pass_.classes; ++c) pass_.weight_sum += pass_.class_weight[c];
    }
    set_terms();
    report_.resize(static_cast<size_t>(bands()));
    sums_.resize(static_cast<size_t>(bands() * kTerms * 2));
    pass_.sums = sums_.data();
  }

  // Writes the pass's numerators and denominators where the call wants them; returns the gradients of
  // its groups [slots, B, C, h, w], or nothing.
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
    pass_.slots = pass_.gradients ? terms_.slots : 0;
    for (int k = 0; k < kTerms; ++k) {
      const auto term = static_cast<Term>(k);
      pass_.slot[k] = pass_.gradients ? terms_.slot[k] : -1;
      pass_.scale[k] = terms_.asks(term) ? static_cast<T>(terms_.relative_weight(term)) : T(0);
    }
    set_order();
    if (pass_.gradients) {
      gradients = torch::stable::empty({pass_.slots, pass_.batch, pass_.classes, height_, width_},
                                       dtype_);
      pass_.gradient = static_cast<T*>(gradients.mutable_data_ptr());
      edges.emplace(pass_.slots * bands() * pass_.classes * width_);
      pass_.edges = edges->get();
    }
    int64_t images = 0;
    if (weighs_space()) images = collect_space();
    run();
    if (pass_.gradients) add_edges();

    double s[kTerms * 2] = {};
    for (int k = 0; k < kTerms * 2; ++k) {
      for (int64_t band = 0; band < bands(); ++band) {
        s[k] += sums_[static_cast<size_t>(band * kTerms * 2 + k)];
      }
    }
    const auto valid = static_cast<double>(counts().valid);
    for (const Term term : {kCe, kKd, kHetero, kFeature}) {
      if (!terms_.asks(term)) continue;
      const double numerator = s[term * 2];
      // A sum of divergences is never negative, its rounding may be. A NaN comes through.
      const bool divergence = term == kKd || term == kHetero;
      numerators[terms_.place[term]] = divergence && numerator < 0.0 ? 0.0 : numerator;
      // Most denominators are the number of valid pixels.
      double denominator = valid;
      if ((term == kCe && pass_.class_weight != nullptr) ||
          (term == kHetero && pass_.hetero == Hetero::kSoftmaxKl)) {
        denominator = s[term * 2 + 1];
      }
      if (term == kHetero && weighs_space()) {
        denominator = static_cast<double>(images * pass_.classes);
      }
      denominators[terms_.group[term]] = denominator;
    }
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
    pass_.slots = 1;
    for (int k = 0; k < kTerms; ++k) {
      const bool asked = terms_.asks(static_cast<Term>(k));
      pass_.slot[k] = asked ? 0 : -1;
      pass_.scale[k] =
          asked ? static_cast<T>(grad_totals[terms_.group[k]] * terms_.weight[k]) : T(0);
    }
    set_order();
    if (weighs_space()) collect_space();
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

  bool weighs_space() const {
    return pass_.hetero == Hetero::kPaperSpace && terms_.evaluation && terms_.asks(kHetero);
  }

  // Which term of a slot is the first to add its gradient, and which the last.
  void set_order() {
    for (int k = 0; k < kTerms; ++k) {
      pass_.begins[k] = pass_.ends[k] = true;
      for (int j = 0; j < k; ++j) {
        if (pass_.slot[j] != pass_.slot[k]) continue;
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
    const PassTerms& o = terms_;
    pass_.smoothing = static_cast<T>(o.smoothing);
    pass_.ce = o.asks(kCe);
    pass_.feature = o.asks(kFeature);
    pass_.maps = o.maps;
    pass_.kd = o.kd;
    pass_.hetero_term = o.asks(kHetero);
    pass_.hetero = o.hetero;
    pass_.mix = o.mix;
    pass_.evaluation = o.evaluation;
    pass_.temperature = static_cast<T>(o.temperature);
    pass_.tau = static_cast<T>(o.tau);
    pass_.beta = static_cast<T>(o.beta);
    pass_.one_minus_beta = static_cast<T>(1.0 - o.beta);
    pass_.huge = sizeof(T) == 4 ? 1e30 : 1e290;
    pass_.space_statistics = false;
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
    torch::stable::parallel_for(0, pass_.slots * bands(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = i / bands();
        const int64_t band = i % bands();
        const int64_t next = (band % pass_.bands_per_image + 1) * kBandRows;
        if (next >= height_) continue;
        const T* edge = pass_.edges + i * row;
        const int64_t image = slot * pass_.batch + band / pass_.bands_per_image;
        for (int64_t c = 0; c < pass_.classes; ++c) {
          T* out = pass_.gradient + ((image * pass_.classes + c) * height_ + next) * width_;
          for (int64_t x = 0; x < width_; ++x) out[x] += edge[c * width_ + x];
        }
      }
    });
  }

  // weight_axis = space: the softmax over the valid pixels of an image and class. Returns the
  // number of images that have any.
  int64_t collect_space() {
    const int64_t classes = pass_.classes;
    Uninitialised<T> maxima(bands() * classes);
    Uninitialised<T> partial(bands() * classes);
    Pass<T> whole = pass_;
    pass_.space_statistics = true;
    pass_.space_maximum = maxima.get();
    pass_.space_sum = partial.get();
    pass_.values = pass_.gradients = pass_.ce = pass_.feature = pass_.maps = false;
    pass_.kd = Divergence::kNone;
    run();
    pass_ = whole;
    space_shift_.assign(static_cast<size_t>(pass_.batch * classes), T(0));
    space_weight_.assign(static_cast<size_t>(pass_.batch * classes), T(0));
    int64_t images = 0;
    for (int64_t b = 0; b < pass_.batch; ++b) {
      int64_t valid = 0;
      for (int64_t k = 0; k < pass_.bands_per_image; ++k) {
        valid += report_[static_cast<size_t>(b * pass_.bands_per_image + k)].valid;
      }
      if (valid == 0) continue;
      ++images;
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
        space_shift_[static_cast<size_t>(b * classes + c)] = largest;
        space_weight_[static_cast<size_t>(b * classes + c)] = static_cast<T>(1.0 / sum);
      }
    }
    pass_.space_shift = space_shift_.data();
    pass_.space_weight = space_weight_.data();
    return images;
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
  std::vector<T> space_shift_, space_weight_;
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
  STD_TORCH_CHECK(teacher || !(spec.student.needs_teacher() || spec.teacher.any),
                  "teacher_logits: got None, these terms need them");
}

std::optional<Tensor> teacher_of(const PassTerms& terms, const std::optional<Tensor>& logits) {
  return terms.needs_teacher() ? logits : std::nullopt;
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
    for (const Term term : {kCe, kKd, kHetero, kFeature}) {
      if (terms->asks(term)) t[terms->group[term]] += terms->weight[term] * n[terms->place[term]];
    }
  }
  Tensor report = torch::stable::empty({3}, ScalarType::Long);
  auto* l = static_cast<int64_t*>(report.mutable_data_ptr());
  l[0] = labels.valid;
  l[1] = labels.out_of_range;
  l[2] = labels.first_out_of_range;
  return {numerators, totals, denominators, report, maps, student_saved, teacher_saved};
}

// sum over slots of grad_totals[group] * slot_weight * gradients[slot], in the form of like
Tensor combine_gradients(const Tensor& gradients, const double* grad_totals, const PassTerms& terms,
                         const Tensor& like) {
  STD_TORCH_CHECK(gradients.dim() == 5 && gradients.is_contiguous() &&
                      gradients.size(0) == terms.slots &&
                      gradients.numel() == gradients.size(0) * like.numel(),
                  "saved: expected what sums returned for logits like these");
  Tensor out = torch::stable::empty_like(like);
  double scale[kTerms];
  for (int s = 0; s < terms.slots; ++s) {
    scale[s] = grad_totals[terms.slot_group[s]] * terms.slot_weight[s];
  }
  const Combine job{gradients.const_data_ptr(), terms.slots,  scale,
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
