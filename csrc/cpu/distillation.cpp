// Operators heteroakd_fast_c::distillation, combine_gradients, cpu_isa and elementary on the CPU:
// checks, memory and threads around the kernels of band.h.
//
// Two ways to the gradient. Where the logits are on a grid of their own, the gradients of every
// term's numerator are collected, unscaled, in the one pass that has the probabilities at hand;
// backward is `combine_gradients`, which adds them up. Where all grids are the label grid, such
// gradients would be the largest tensors of the step: there backward is a second pass that reads
// the logits again, knows every scale and writes the sum once.
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
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

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

// The options of a call, by the names of the schema.
struct Options {
  int64_t terms;  // bits of Term
  KdDivergence kd;
  Hetero hetero;
  Mix mix;
  bool evaluation;
  double kd_beta, temperature, tau;
  int64_t ignore_index;
  bool align_corners;
  double label_smoothing;
  bool maps, compute_grad;

  bool asks(Term term) const { return (terms >> term & 1) != 0; }
};

void read_labels(const void* reader, int64_t b, int64_t y, int32_t* out, LabelReport& report) {
  static_cast<const StridedLabels*>(reader)->read_row(b, y, out, report);
}

template <typename T>
class Runner {
 public:
  Runner(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& target,
         const std::optional<Tensor>& class_weight, const Options& options)
      : kernels_(choose_kernels<T>()),
        dtype_(sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
        options_(options),
        labels_(target, student.size(1), options.ignore_index),
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

  bool identity() const { return pass_.identity; }

  Result forward() {
    pass_.values = true;
    pass_.gradients = options_.compute_grad && !pass_.identity;
    Tensor maps = torch::stable::empty({0}, dtype_);
    if (options_.maps) {
      maps = torch::stable::empty({2, pass_.batch, pass_.label_height, pass_.label_width}, dtype_);
      pass_.map_values = static_cast<T*>(maps.mutable_data_ptr());
      std::fill_n(pass_.map_values, maps.numel(), T(0));
    }
    Tensor gradients = torch::stable::empty({0}, dtype_);
    std::optional<Uninitialised<T>> edges;
    pass_.slots = 0;
    for (int k = 0; k < kTerms; ++k) {
      const bool wanted = pass_.gradients && options_.asks(static_cast<Term>(k));
      pass_.slot[k] = wanted ? pass_.slots++ : -1;
      pass_.scale[k] = T(1);
    }
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

    Tensor sums = torch::stable::empty({kTerms, 2}, ScalarType::Double);
    auto* s = static_cast<double*>(sums.mutable_data_ptr());
    for (int k = 0; k < kTerms * 2; ++k) {
      s[k] = 0.0;
      for (int64_t band = 0; band < bands(); ++band) {
        s[k] += sums_[static_cast<size_t>(band * kTerms * 2 + k)];
      }
    }
    // A sum of divergences is never negative, its rounding may be. A NaN comes through.
    for (const Term term : {kKd, kHetero}) {
      if (s[term * 2] < 0.0) s[term * 2] = 0.0;
    }
    // Most denominators are the number of valid pixels.
    Tensor labels = label_counts();
    const auto valid = static_cast<double>(static_cast<const int64_t*>(labels.const_data_ptr())[0]);
    for (int k = 0; k < kTerms; ++k) {
      const bool weighted = (k == kCe && pass_.class_weight != nullptr) ||
                            (k == kHetero && pass_.hetero == Hetero::kSoftmaxKl);
      if (!weighted && options_.asks(static_cast<Term>(k))) s[k * 2 + 1] = valid;
    }
    if (weighs_space()) s[kHetero * 2 + 1] = static_cast<double>(images * pass_.classes);
    return {sums, labels, maps, gradients};
  }

  Result backward(const Tensor& student, const Tensor& grad_numerators) {
    STD_TORCH_CHECK(pass_.identity, "distillation: grad_numerators are for logits on the label grid");
    Tensor gradient = torch::stable::empty_like(student);
    pass_.out = mutable_view_of(gradient);
    pass_.streams = gradient.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    const auto* scale = static_cast<const double*>(grad_numerators.const_data_ptr());
    pass_.values = false;
    pass_.gradients = true;
    pass_.maps = false;
    pass_.slots = 1;
    for (int k = 0; k < kTerms; ++k) {
      pass_.slot[k] = options_.asks(static_cast<Term>(k)) ? 0 : -1;
      pass_.scale[k] = static_cast<T>(scale[k]);
    }
    if (weighs_space()) collect_space();
    run();
    return {torch::stable::empty({0}, ScalarType::Double), label_counts(),
            torch::stable::empty({0}, dtype_), gradient};
  }

 private:
  int64_t bands() const { return pass_.batch * pass_.bands_per_image; }

  bool on_label_grid(const Tensor& logits) const {
    return logits.size(2) == pass_.label_height && logits.size(3) == pass_.label_width;
  }

  bool weighs_space() const {
    return pass_.hetero == Hetero::kPaperSpace && options_.evaluation && options_.asks(kHetero);
  }

  void set_grids(const Tensor& student, const std::optional<Tensor>& teacher) {
    const int64_t apart =
        pass_.identity ? 1
                       : Columns::distance(width_, pass_.label_width, options_.align_corners);
    const Columns columns(pass_.label_width, kernels_.lanes, apart);
    pixel_ = columns.pixel;
    pass_.lanes = columns.lanes;
    pass_.vectors = columns.vectors;
    pass_.apart = apart;
    pass_.pixel = pixel_.data();
    pass_.student_logits = view_of(student, "student_logits");
    student_map_ = GridMap<T>(height_, width_, pass_.label_height, pass_.label_width,
                              options_.align_corners, columns);
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
                              pass_.label_width, options_.align_corners, columns);
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
    const Options& o = options_;
    pass_.smoothing = static_cast<T>(o.label_smoothing);
    pass_.ce = o.asks(kCe);
    pass_.feature = o.asks(kFeature);
    pass_.maps = o.maps;
    pass_.kd = o.asks(kKd) ? o.kd : KdDivergence::kNone;
    pass_.hetero_term = o.asks(kHetero);
    pass_.hetero = o.asks(kHetero) || o.maps ? o.hetero : Hetero::kNone;
    pass_.mix = o.mix;
    pass_.evaluation = o.evaluation;
    pass_.temperature = static_cast<T>(o.temperature);
    pass_.tau = static_cast<T>(o.tau);
    pass_.kd_beta = static_cast<T>(o.kd_beta);
    pass_.kd_one_minus_beta = static_cast<T>(1.0 - o.kd_beta);
    pass_.huge = sizeof(T) == 4 ? 1e30 : 1e290;
    pass_.space_statistics = false;
    STD_TORCH_CHECK(pass_.has_teacher || (pass_.kd == KdDivergence::kNone && !pass_.feature &&
                                          pass_.hetero == Hetero::kNone),
                    "distillation: these terms need teacher_logits");
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
    STD_TORCH_CHECK(!failed, "distillation: out of memory for the rows of a band (", bytes,
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
    pass_.kd = KdDivergence::kNone;
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

  Tensor label_counts() const {
    LabelReport total;
    for (const LabelReport& report : report_) merge(total, report);
    Tensor labels = torch::stable::empty({3}, ScalarType::Long);
    auto* l = static_cast<int64_t*>(labels.mutable_data_ptr());
    l[0] = total.valid;
    l[1] = total.out_of_range;
    l[2] = total.first_out_of_range;
    return labels;
  }

  const Kernels<T>& kernels_;
  ScalarType dtype_;
  Options options_;
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

Result distillation(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
                    const Tensor& target, const std::optional<Tensor>& class_weight, int64_t terms,
                    int64_t kd_divergence, int64_t hetero, int64_t mix, bool evaluation,
                    double kd_beta, double temperature, double tau, int64_t ignore_index,
                    bool align_corners, double label_smoothing, bool maps, bool compute_grad,
                    const std::optional<Tensor>& grad_numerators) {
  const bool teacher = teacher_logits.has_value();
  STD_TORCH_CHECK(student_logits.dim() == 4 && target.dim() == 3 &&
                      student_logits.size(0) == target.size(0) &&
                      (!teacher || (teacher_logits->dim() == 4 &&
                                    teacher_logits->size(0) == student_logits.size(0) &&
                                    teacher_logits->size(1) == student_logits.size(1))),
                  "distillation: expected logits [B, C, h, w] and target [B, H, W]");
  STD_TORCH_CHECK(target.numel() == 0 || (student_logits.numel() > 0 &&
                                          (!teacher || teacher_logits->numel() > 0)),
                  "distillation: empty logits for a target that is not empty");
  STD_TORCH_CHECK(!class_weight.has_value() || (class_weight->dim() == 1 &&
                                                class_weight->size(0) == student_logits.size(1)),
                  "distillation: expected class_weight [C]");
  STD_TORCH_CHECK(terms >= 0 && terms < 1 << kTerms && kd_divergence >= 0 && kd_divergence <= 3 &&
                      hetero >= 0 && hetero <= 3 && mix >= 0 && mix <= 2,
                  "distillation: an option is out of range");
  STD_TORCH_CHECK((kd_divergence > 0 || (terms >> kKd & 1) == 0) &&
                      (hetero > 0 || ((terms >> kHetero & 1) == 0 && !maps)),
                  "distillation: kd_divergence and hetero must name what terms and maps ask for");
  STD_TORCH_CHECK(!grad_numerators.has_value() ||
                      (grad_numerators->scalar_type() == ScalarType::Double &&
                       grad_numerators->numel() == kTerms && grad_numerators->is_contiguous()),
                  "distillation: expected grad_numerators f64[4]");
  const Options options{terms,
                        static_cast<KdDivergence>(kd_divergence),
                        static_cast<Hetero>(hetero),
                        static_cast<Mix>(mix),
                        evaluation,
                        kd_beta,
                        temperature,
                        tau,
                        ignore_index,
                        align_corners,
                        label_smoothing,
                        maps,
                        compute_grad};
  const auto run = [&](auto zero) -> Result {
    using T = decltype(zero);
    Runner<T> runner(student_logits, teacher_logits, target, class_weight, options);
    return grad_numerators.has_value() ? runner.backward(student_logits, *grad_numerators)
                                       : runner.forward();
  };
  const bool many = target.size(1) > kMaxFloatRatio * student_logits.size(2) ||
                    target.size(2) > kMaxFloatRatio * student_logits.size(3);
  if (student_logits.scalar_type() == ScalarType::Double) return run(0.0);
  if (!many || grad_numerators.has_value()) return run(0.0f);
  auto [sums, labels, map_values, gradients] = run(0.0);
  return {sums, labels, torch::stable::to(map_values, ScalarType::Float),
          torch::stable::to(gradients, ScalarType::Float)};
}

Tensor combine_gradients(const Tensor& gradients, const Tensor& scales, const Tensor& like) {
  STD_TORCH_CHECK(gradients.dim() == 5 && like.dim() == 4 && gradients.is_contiguous() &&
                      gradients.numel() == gradients.size(0) * like.numel() &&
                      scales.numel() == gradients.size(0) && scales.is_contiguous() &&
                      scales.scalar_type() == ScalarType::Double,
                  "combine_gradients: expected gradients [K, B, C, h, w], scales f64[K] and like "
                  "[B, C, h, w]");
  Tensor out = torch::stable::empty_like(like);
  const Combine job{gradients.const_data_ptr(),
                    static_cast<int32_t>(gradients.size(0)),
                    static_cast<const double*>(scales.const_data_ptr()),
                    like.size(0),
                    like.size(1),
                    like.size(2),
                    like.size(3),
                    mutable_view_of(out)};
  if (like.numel() == 0) return out;
  const bool wide = gradients.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || gradients.scalar_type() == ScalarType::Float,
                  "combine_gradients: expected float32 or float64 gradients");
  void (*combine)(const Combine&, int64_t) =
      wide ? choose_kernels<double>().combine : choose_kernels<float>().combine;
  const int64_t plane = job.height * job.width;
  const int64_t grain = std::max<int64_t>(1, 32768 / plane);
  torch::stable::parallel_for(0, job.batch * job.classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) combine(job, i);
  });
  return out;
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
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("combine_gradients", TORCH_BOX(&combine_gradients));
  m.impl("elementary", TORCH_BOX(&elementary));
}

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace heteroakd::cpu
