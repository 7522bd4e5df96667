// Operators heteroakd_fast_c::cuda_forward, cuda_backward, cuda_combine and cuda_kernel: checks,
// memory, and the choice of kernels. Nothing here waits for the GPU or looks at data: shapes decide
// everything, so that forward and backward can be captured in a CUDA graph.
//
// Two ways to the gradient. Where the student's logits are on a grid of their own, the gradients of
// every term's numerator are collected, unscaled, in the one pass that has the probabilities at hand;
// backward is `cuda_combine`, which adds them up. Where they lie on the label grid, such gradients
// would be the largest tensors of the step: there backward is a second pass that knows every scale
// and writes the sum once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>

#include "kernels.h"
#include "runtime.h"
#include "staging.h"

namespace heteroakd::cuda {

int64_t staging_bytes(int32_t models) {
  return (models + 1) * kPlane * static_cast<int64_t>(sizeof(float));
}
int64_t staging_bytes_per_class(int32_t models) {
  return models * kPlane * static_cast<int64_t>(sizeof(float));
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of a block: what every device has without being asked for more, four times on a multiprocessor.
constexpr int64_t kSharedBytes = 48 * 1024;
// Beyond this many pixels of a cell, float sums of their gradients lose more than the contract allows;
// the logits are then so few that double costs nothing but time.
constexpr int64_t kMostFloatPixels = 4096;
// What a block may ask for on any device of these architectures.
constexpr int64_t kMostSharedBytes = 99 * 1024;

// The options of a call, by the names of the schema.
struct Options {
  int64_t place[kTerms];  // of a term among the call's, -1: not asked for
  KdDivergence kd;
  Hetero hetero;
  Mix mix;
  bool evaluation;
  double kd_beta, temperature, tau;
  int64_t ignore_index;
  bool align_corners;
  double label_smoothing;

  bool asks(Term term) const { return place[term] >= 0; }
};

Options options_of(int64_t place_ce, int64_t place_kd, int64_t place_hetero, int64_t place_feature,
                   int64_t kd_divergence, int64_t hetero, int64_t mix, bool evaluation,
                   double kd_beta, double temperature, double tau, int64_t ignore_index,
                   bool align_corners, double label_smoothing) {
  STD_TORCH_CHECK(kd_divergence >= 0 && kd_divergence <= 3 && hetero >= 0 && hetero <= 3 &&
                      mix >= 0 && mix <= 2,
                  "kd_divergence, hetero, mix: got ", kd_divergence, ", ", hetero, ", ", mix,
                  ", expected 0 to 3, 0 to 3 and 0 to 2");
  STD_TORCH_CHECK(temperature > 0.0 && tau > 0.0 && label_smoothing >= 0.0 && label_smoothing <= 1.0,
                  "temperature, tau, label_smoothing: got ", temperature, ", ", tau, ", ",
                  label_smoothing, ", expected > 0, > 0 and in [0, 1]");
  STD_TORCH_CHECK((kd_divergence > 0 || place_kd < 0) && (hetero > 0 || place_hetero < 0),
                  "kd_divergence and hetero must name what the places ask for");
  return {{place_ce, place_kd, place_hetero, place_feature},
          static_cast<KdDivergence>(kd_divergence),
          static_cast<Hetero>(hetero),
          static_cast<Mix>(mix),
          evaluation,
          kd_beta,
          temperature,
          tau,
          ignore_index,
          align_corners,
          label_smoothing};
}

int32_t narrow(int64_t n, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n <= std::numeric_limits<int32_t>::max() - 1024, what, ": ", n,
                  " is more than the kernels count to");
  return static_cast<int32_t>(n);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

const void* data_of(const Tensor& tensor, const char* name) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0, name, ": the tensor has no memory");
  return data;
}

Logits logits_of(const Tensor& tensor, const char* name) {
  Logits logits{};
  logits.data = data_of(tensor, name);
  logits.batch_stride = tensor.stride(0);
  logits.class_stride = tensor.stride(1);
  logits.row_stride = tensor.stride(2);
  logits.column_stride = tensor.stride(3);
  logits.height = narrow(tensor.size(2), "height of the logits");
  logits.width = narrow(tensor.size(3), "width of the logits");
  logits.dtype = dtype_of(tensor, name);
  logits.source = Source::kNone;
  const auto address = reinterpret_cast<uintptr_t>(logits.data);
  const bool apart = (logits.batch_stride | logits.class_stride | logits.row_stride) % 4 == 0;
  logits.vectors = logits.column_stride == 1 && logits.width % 4 == 0 && apart &&
                   address % (4 * static_cast<size_t>(tensor.element_size())) == 0;
  return logits;
}

Labels labels_of(const Tensor& target) {
  LabelDtype dtype = LabelDtype::kInt64;
  switch (target.scalar_type()) {
    case ScalarType::Byte: dtype = LabelDtype::kUint8; break;
    case ScalarType::Int: dtype = LabelDtype::kInt32; break;
    case ScalarType::Long: break;
    default:
      STD_TORCH_CHECK(false, "target: expected uint8, int32 or int64");
  }
  return {data_of(target, "target"), target.stride(0), target.stride(1), target.stride(2), dtype};
}

// The most pixels that a cell has along an axis.
int64_t most_pixels(int64_t logits, int64_t labels, bool align_corners) {
  if (align_corners) {
    return logits == 1 || labels == 1 ? labels : ceil_div(labels - 1, logits - 1);
  }
  return ceil_div(labels, logits);
}

// Whether cells are that many pixels high (or wide).
bool cells_have(int64_t pixels, int64_t logits, int64_t labels, bool align_corners) {
  return align_corners ? labels - 1 >= pixels * (logits - 1) : labels >= pixels * logits;
}

void check_device(const Tensor& first, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(first.get_device_index() == other.get_device_index(), name,
                  ": not on the device of the logits");
}

void check_tensors(const Tensor& student, const std::optional<Tensor>& teacher,
                   const Tensor& target, const std::optional<Tensor>& class_weight) {
  STD_TORCH_CHECK(student.dim() == 4 && target.dim() == 3 && student.size(0) == target.size(0),
                  "expected student_logits [B, C, h, w] and target [B, H, W]");
  STD_TORCH_CHECK(!teacher.has_value() ||
                      (teacher->dim() == 4 && teacher->size(0) == student.size(0) &&
                       teacher->size(1) == student.size(1)),
                  "teacher_logits: expected [B, C, h', w'] with the student's B and C");
  check_device(student, target, "target");
  if (teacher.has_value()) check_device(student, *teacher, "teacher_logits");
  if (class_weight.has_value()) check_device(student, *class_weight, "class_weight");
  STD_TORCH_CHECK(student.numel() > 0 && target.numel() > 0 &&
                      (!teacher.has_value() || teacher->numel() > 0),
                  "student_logits, teacher_logits, target: expected tensors that are not empty");
  STD_TORCH_CHECK(!class_weight.has_value() ||
                      (class_weight->dim() == 1 && class_weight->size(0) == student.size(1)),
                  "class_weight: expected [C]");
}

class Run {
 public:
  Run(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& target,
      const std::optional<Tensor>& class_weight, const Options& options, bool maps, bool gradients)
      : student_(student), wide_(student.scalar_type() == ScalarType::Double) {
    check_tensors(student, teacher, target, class_weight);
    pass_.batch = narrow(student.size(0), "batch");
    pass_.classes = narrow(student.size(1), "classes");
    pass_.label_height = narrow(target.size(1), "height of the labels");
    pass_.label_width = narrow(target.size(2), "width of the labels");
    pass_.align_corners = options.align_corners;
    pass_.ignore_index = options.ignore_index;
    pass_.target = labels_of(target);
    pass_.student = logits_of(student, "student_logits");
    pass_.student.source = on_label_grid(student) ? Source::kLabels : Source::kCells;
    if (!on_labels()) {
      pass_.rows_per_cell = narrow(
          most_pixels(pass_.student.height, pass_.label_height, pass_.align_corners), "cell");
      pass_.columns_per_cell = narrow(
          most_pixels(pass_.student.width, pass_.label_width, pass_.align_corners), "cell");
      const int64_t pixels = static_cast<int64_t>(pass_.rows_per_cell) * pass_.columns_per_cell;
      narrow(pixels, "pixels of a cell");
      wide_ = wide_ || pixels > kMostFloatPixels;
    }
    if (teacher.has_value()) {
      pass_.teacher = logits_of(*teacher, "teacher_logits");
      const bool same = pass_.student.source == Source::kCells &&
                        teacher->size(2) == student.size(2) && teacher->size(3) == student.size(3);
      pass_.teacher.source =
          on_label_grid(*teacher) ? Source::kLabels : same ? Source::kCells : Source::kGather;
    }
    if (class_weight.has_value()) {
      weight_ = torch::stable::contiguous(torch::stable::to(*class_weight, dtype()));
      pass_.class_weight = data_of(*weight_, "class_weight");
    }
    set_terms(options, teacher.has_value(), maps, gradients);
    choose(options);
  }

  bool on_labels() const { return pass_.student.source == Source::kLabels; }
  const Kernel& kernel() const { return *kernel_; }
  ScalarType dtype() const { return wide_ ? ScalarType::Double : ScalarType::Float; }
  Pass& pass() { return pass_; }
  int64_t chunks() const { return pass_.columns / pass_.per_row; }

  // [slots, B, C, chunks, chunk_rows + 1, width], and where the terms' gradients go.
  Tensor make_saved() {
    int32_t slots = 0;
    for (int k = 0; k < kTerms; ++k) {
      if (pass_.place[k] >= 0) pass_.slot[k] = slots++;
    }
    Tensor saved = torch::stable::new_empty(
        student_,
        {slots, pass_.batch, pass_.classes, chunks(), pass_.chunk_rows + 1,
         pass_.student.width},
        dtype());
    pass_.saved = saved.mutable_data_ptr();
    return saved;
  }

  // The pass; returns the rows of partial sums per image.
  int64_t start(cudaStream_t stream) {
    const int64_t warps = kernel_->threads / kWarpSize;
    const int64_t rows = pass_.programs * warps;
    partials_ = torch::stable::new_empty(student_, {pass_.batch * rows, kPartials},
                                         ScalarType::Double);
    pass_.partials = static_cast<double*>(partials_->mutable_data_ptr());
    if (pass_.hetero == Hetero::kPaperSpace && pass_.evaluation && pass_.hetero_term) {
      collect_space(rows, stream);
    }
    kernel_->launch(pass_, grid(), warps * pass_.warp_bytes, stream);
    return rows;
  }

 private:
  bool on_label_grid(const Tensor& logits) const {
    return logits.size(2) == pass_.label_height && logits.size(3) == pass_.label_width;
  }

  // The rule of `_saved_shape` in backends/cuda.py.
  bool large_cells() const {
    return static_cast<int64_t>(pass_.rows_per_cell) * pass_.columns_per_cell >= 64;
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(narrow(
        static_cast<int64_t>(pass_.batch) * pass_.programs, "blocks")));
  }

  void set_terms(const Options& o, bool has_teacher, bool maps, bool gradients) {
    pass_.ce = o.asks(kCe);
    pass_.feature = o.asks(kFeature);
    pass_.kd = o.asks(kKd) ? o.kd : KdDivergence::kNone;
    pass_.hetero_term = o.asks(kHetero);
    pass_.hetero = o.asks(kHetero) || maps ? o.hetero : Hetero::kNone;
    pass_.mix = o.mix;
    pass_.evaluation = o.evaluation;
    pass_.maps = maps;
    pass_.gradients = gradients;
    pass_.temperature = o.temperature;
    pass_.tau = o.tau;
    pass_.kd_beta = o.kd_beta;
    pass_.smoothing = o.label_smoothing;
    const double t = o.temperature;
    pass_.power = t == 1.0 ? 1 : t == 2.0 ? 2 : t == 4.0 ? 4 : 0;
    for (int k = 0; k < kTerms; ++k) {
      pass_.place[k] = static_cast<int32_t>(o.place[k]);
      pass_.slot[k] = -1;
    }
    STD_TORCH_CHECK(has_teacher || (pass_.kd == KdDivergence::kNone && !pass_.feature &&
                                    pass_.hetero == Hetero::kNone),
                    "teacher_logits: got None, these terms need them");
  }

  // The kernel for this call, and how it cuts an image.
  void choose(const Options& o) {
    const bool cells = on_cells(o);
    if (cells) {
      const bool kd = pass_.kd != KdDivergence::kNone;
      const bool hetero = pass_.hetero != Hetero::kNone;
      kernel_ = kd ? hetero ? &cells_ce_kd_hetero() : &cells_ce_kd()
                   : hetero ? &cells_ce_hetero() : &cells_ce();
    } else if (on_label_grids(o) &&
               labels_grid(pass_.classes, pass_.teacher.source != Source::kNone) != nullptr) {
      kernel_ = labels_grid(pass_.classes, pass_.teacher.source != Source::kNone);
    } else {
      kernel_ = &segments(wide_);
    }
    if (on_labels()) {
      pass_.rows = pass_.label_height;
      pass_.per_row = narrow(ceil_div(pass_.label_width, kernel_->pixels), "cells of a row");
    } else {
      pass_.rows = pass_.student.height + 1;
      pass_.per_row = pass_.student.width + 1;
    }
    pass_.chunk_rows = !on_labels() && large_cells() ? 1 : kMostChunkRows;
    pass_.columns = narrow(ceil_div(pass_.rows, pass_.chunk_rows) * pass_.per_row, "cells of an image");
    pass_.halo = pass_.gradients && !on_labels();
    const int64_t warps = kernel_->threads / kWarpSize;
    const int64_t lanes = kWarpSize - (pass_.halo ? 1 : 0);
    pass_.programs = narrow(ceil_div(pass_.columns, warps * lanes), "blocks of an image");
    if (!cells) {
      hold_pixels(o);
      return;
    }
    const int32_t models = kernel_->staged_models;
    const int64_t room = kSharedBytes / warps / 16 * 16 - staging_bytes(models);
    const int64_t most = room / staging_bytes_per_class(models);
    const int64_t blocks = ceil_div(pass_.classes, most);
    pass_.staged_classes = narrow(ceil_div(pass_.classes, blocks), "staged classes");
    pass_.warp_bytes = narrow(
        ceil_div(staging_bytes(models) + pass_.staged_classes * staging_bytes_per_class(models),
                 16) * 16,
        "shared memory");
  }

  // The kernels by segments hold their pixels in shared memory where they fit.
  void hold_pixels(const Options& o) {
    if (kernel_ != &segments(wide_)) return;
    const int64_t models = pass_.teacher.source == Source::kNone ? 1 : 2;
    const int64_t bytes = kWarpSize * pass_.classes * models * kernel_->pixels * (wide_ ? 8 : 4);
    if (bytes * (kernel_->threads / kWarpSize) > kMostSharedBytes) return;
    pass_.warp_bytes = static_cast<int32_t>(bytes);
    if (wide_ || pass_.feature || (pass_.ce && o.label_smoothing != 0.0)) return;
    const Kernel* fixed = segments_fixed(pass_.kd, pass_.hetero, pass_.mix);
    if (fixed != nullptr) kernel_ = fixed;
  }

  // ce, forward kd, and hetero of the preset softmax-kl, in float.
  bool usual(const Options& o) const {
    return !wide_ && pass_.teacher.dtype != Dtype::kDouble && !pass_.feature &&
           (!pass_.ce || o.label_smoothing == 0.0) &&
           (pass_.kd == KdDivergence::kNone || pass_.kd == KdDivergence::kForward) &&
           (pass_.hetero == Hetero::kNone ||
            (pass_.hetero == Hetero::kSoftmaxKl && pass_.mix == Mix::kProbs));
  }

  bool on_label_grids(const Options& o) const {
    return usual(o) && on_labels() &&
           (pass_.teacher.source == Source::kNone || pass_.teacher.source == Source::kLabels);
  }

  bool on_cells(const Options& o) const {
    const bool same_grid =
        pass_.student.source == Source::kCells &&
        (pass_.teacher.source == Source::kNone || pass_.teacher.source == Source::kCells);
    // Less high, exponentials by products could overflow (cell_pass.h); less wide, most of a thread's
    // pixels would not exist.
    // Of one class everything is exactly 0, and there by chance alone.
    return usual(o) && same_grid && pass_.classes > 1 &&
           cells_have(3, pass_.student.height, pass_.label_height, pass_.align_corners) &&
           cells_have(2, pass_.student.width, pass_.label_width, pass_.align_corners);
  }

  void collect_space(int64_t rows, cudaStream_t stream) {
    const int64_t batch = pass_.batch;
    const int64_t classes = pass_.classes;
    space_found_ = torch::stable::new_empty(student_, {batch, rows, classes, 2}, dtype());
    space_shift_ = torch::stable::new_empty(student_, {batch, classes}, dtype());
    space_weight_ = torch::stable::new_empty(student_, {batch, classes}, dtype());
    pass_.space_found = space_found_->mutable_data_ptr();
    pass_.space_shift = space_shift_->mutable_data_ptr();
    pass_.space_weight = space_weight_->mutable_data_ptr();
    space_statistics(wide_).launch(pass_, grid(), 0, stream);
    launch_reduce_space({pass_.space_found, wide_, rows, pass_.batch, pass_.classes,
                         space_shift_->mutable_data_ptr(), space_weight_->mutable_data_ptr()},
                        stream);
  }

  Tensor student_;
  bool wide_;
  Pass pass_{};
  const Kernel* kernel_ = nullptr;
  // What kernels read and write lives until they have been launched; the allocator then keeps it
  // for this stream.
  std::optional<Tensor> weight_, partials_, space_found_, space_shift_, space_weight_;
};

void check_sums(const Tensor& sums, const char* name) {
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.dim() == 1 &&
                      sums.is_contiguous(),
                  name, ": expected a contiguous float64 vector");
}

Tensor cuda_forward(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
                    const Tensor& target, const std::optional<Tensor>& class_weight,
                    const Tensor& numerators, const Tensor& denominators,
                    const std::optional<Tensor>& report, const std::optional<Tensor>& maps,
                    int64_t place_ce, int64_t place_kd, int64_t place_hetero,
                    int64_t place_feature, int64_t kd_divergence, int64_t hetero, int64_t mix,
                    bool evaluation, double kd_beta, double temperature, double tau,
                    int64_t ignore_index, bool align_corners, double label_smoothing,
                    bool compute_grad) {
  const OnDevice device(student_logits.get_device_index());
  const cudaStream_t stream = current_stream(student_logits.get_device_index());
  const Options options = options_of(place_ce, place_kd, place_hetero, place_feature,
                                     kd_divergence, hetero, mix, evaluation, kd_beta, temperature,
                                     tau, ignore_index, align_corners, label_smoothing);
  check_device(student_logits, numerators, "numerators");
  check_device(student_logits, denominators, "denominators");
  if (report.has_value()) check_device(student_logits, *report, "report");
  if (maps.has_value()) check_device(student_logits, *maps, "maps");
  STD_TORCH_CHECK(!maps.has_value() || (hetero > 0 && teacher_logits.has_value()),
                  "maps: need hetero and teacher_logits");
  check_sums(numerators, "numerators");
  check_sums(denominators, "denominators");
  for (const int64_t place : options.place) {
    STD_TORCH_CHECK(place < numerators.size(0) && place < denominators.size(0),
                    "numerators, denominators: expected a number for every term");
  }
  const bool on_labels = student_logits.dim() == 4 && target.dim() == 3 &&
                         student_logits.size(2) == target.size(1) &&
                         student_logits.size(3) == target.size(2);
  Run run(student_logits, teacher_logits, target, class_weight, options, maps.has_value(),
          compute_grad && !on_labels);
  Tensor saved = run.pass().gradients ? run.make_saved()
                                      : torch::stable::new_empty(student_logits, {0}, run.dtype());
  if (maps.has_value()) {
    const bool narrow_maps = maps->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(maps->is_contiguous() && maps->numel() == 2 * target.numel() &&
                        (narrow_maps || maps->scalar_type() == run.dtype()),
                    "maps: expected contiguous [2, B, H, W] in the dtype of the arithmetic");
    run.pass().maps_out = maps->mutable_data_ptr();
    run.pass().maps_are_float = narrow_maps;
  }
  Finish finish{};
  finish.rows = run.start(stream);
  const Pass& pass = run.pass();
  finish.partials = pass.partials;
  finish.images = pass.batch;
  finish.classes = pass.classes;
  finish.weighted = class_weight.has_value();
  finish.knowledge = options.hetero == Hetero::kSoftmaxKl;
  finish.per_image = options.hetero == Hetero::kPaperSpace && evaluation;
  for (int k = 0; k < kTerms; ++k) finish.place[k] = pass.place[k];
  finish.numerators = static_cast<double*>(numerators.mutable_data_ptr());
  finish.denominators = static_cast<double*>(denominators.mutable_data_ptr());
  if (report.has_value()) {
    STD_TORCH_CHECK(report->scalar_type() == ScalarType::Long && report->numel() == 2 &&
                        report->is_contiguous(),
                    "report: expected int64 [2]");
    finish.report = static_cast<int64_t*>(report->mutable_data_ptr());
  }
  launch_finish_sums(finish, stream);
  const bool wide_logits = student_logits.scalar_type() == ScalarType::Double;
  return wide_logits ? saved : torch::stable::to(saved, ScalarType::Float);
}

Tensor cuda_backward(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
                     const Tensor& target, const std::optional<Tensor>& class_weight,
                     const Tensor& grad_numerators, int64_t place_ce, int64_t place_kd,
                     int64_t place_hetero, int64_t place_feature, int64_t kd_divergence,
                     int64_t hetero, int64_t mix, bool evaluation, double kd_beta,
                     double temperature, double tau, int64_t ignore_index, bool align_corners,
                     double label_smoothing) {
  const OnDevice device(student_logits.get_device_index());
  const cudaStream_t stream = current_stream(student_logits.get_device_index());
  const Options options = options_of(place_ce, place_kd, place_hetero, place_feature,
                                     kd_divergence, hetero, mix, evaluation, kd_beta, temperature,
                                     tau, ignore_index, align_corners, label_smoothing);
  check_device(student_logits, grad_numerators, "grad_numerators");
  check_sums(grad_numerators, "grad_numerators");
  for (const int64_t place : options.place) {
    STD_TORCH_CHECK(place < grad_numerators.size(0),
                    "grad_numerators: expected a number for every term");
  }
  Run run(student_logits, teacher_logits, target, class_weight, options, false, true);
  STD_TORCH_CHECK(run.on_labels(), "student_logits: expected logits on the label grid");
  Tensor gradient = torch::stable::empty_like(student_logits);
  run.pass().gradient = logits_of(gradient, "gradient");
  run.pass().grad_numerators = static_cast<const double*>(grad_numerators.const_data_ptr());
  run.start(stream);
  return gradient;
}

Tensor cuda_combine(const Tensor& saved, const Tensor& grad_numerators, int64_t place_0,
                    int64_t place_1, int64_t place_2, int64_t place_3, const Tensor& like) {
  const OnDevice device(saved.get_device_index());
  const cudaStream_t stream = current_stream(saved.get_device_index());
  check_device(saved, grad_numerators, "grad_numerators");
  check_device(saved, like, "like");
  check_sums(grad_numerators, "grad_numerators");
  const bool wide = saved.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(saved.dim() == 6 && like.dim() == 4 && saved.is_contiguous() &&
                      (wide || saved.scalar_type() == ScalarType::Float) &&
                      saved.size(0) <= kTerms && saved.size(1) == like.size(0) &&
                      saved.size(2) == like.size(1) &&
                      saved.size(4) >= 2 && saved.size(4) <= kMostChunkRows + 1 &&
                      saved.size(3) == ceil_div(like.size(2) + 1, saved.size(4) - 1) &&
                      saved.size(5) == like.size(3),
                  "saved: expected what cuda_forward returned for logits like these");
  Tensor out = torch::stable::empty_like(like);
  Combine k{};
  k.saved = saved.const_data_ptr();
  k.wide = wide;
  k.slots = static_cast<int32_t>(saved.size(0));
  const int64_t place[kTerms] = {place_0, place_1, place_2, place_3};
  for (int s = 0; s < k.slots; ++s) {
    STD_TORCH_CHECK(place[s] >= 0 && place[s] < grad_numerators.size(0),
                    "grad_numerators: expected a number for every saved gradient");
    k.place[s] = static_cast<int32_t>(place[s]);
  }
  k.scales = static_cast<const double*>(grad_numerators.const_data_ptr());
  k.batch = narrow(like.size(0), "batch");
  k.classes = narrow(like.size(1), "classes");
  k.chunks = saved.size(3);
  k.chunk_rows = saved.size(4) - 1;
  k.out = logits_of(out, "gradient");
  launch_combine_gradients(k, stream);
  return out;
}

std::string cuda_kernel(const Tensor& student_logits, const std::optional<Tensor>& teacher_logits,
                        const Tensor& target, int64_t place_ce, int64_t place_kd,
                        int64_t place_hetero, int64_t place_feature, int64_t kd_divergence,
                        int64_t hetero, int64_t mix, bool align_corners, double label_smoothing,
                        bool maps) {
  const Options options =
      options_of(place_ce, place_kd, place_hetero, place_feature, kd_divergence, hetero, mix, true,
                 0.5, 1.0, 1.0, 255, align_corners, label_smoothing);
  return Run(student_logits, teacher_logits, target, std::nullopt, options, maps, false)
      .kernel()
      .name;
}

}  // namespace

HAKD_REGISTER(m) {
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
  m.impl("cuda_combine", TORCH_BOX(&cuda_combine));
  m.impl("cuda_kernel", TORCH_BOX(&cuda_kernel));
}

}  // namespace heteroakd::cuda
