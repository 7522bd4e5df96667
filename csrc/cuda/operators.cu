// Operators heteroakd_fast_c::sums and gradient on CUDA: checks, memory, and the choice of kernels.
// Nothing here waits for the GPU or looks at data: shapes decide everything, so that forward and
// backward can be captured in a CUDA graph.
//
// Two ways to the gradient. Where the student's logits are on a grid of their own, the gradient of
// each group of terms is collected, without the group's scale, in the one pass that has the
// probabilities at hand; `gradient` adds them up. Where they lie on the label grid, such gradients
// would be the largest tensors of the step: there `gradient` is a second pass that knows every scale
// and writes the sum once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "runtime.h"
#include "staging.h"
#include "tensors.h"

namespace heteroakd::cuda {

int64_t staging_bytes(int32_t models) {
  return (models + 1) * kPlane * static_cast<int64_t>(sizeof(float));
}
int64_t staging_bytes_per_class(int32_t models) {
  return models * kPlane * static_cast<int64_t>(sizeof(float));
}

namespace {

// Of a block: what every device has without being asked for more, four times on a multiprocessor.
constexpr int64_t kSharedBytes = 48 * 1024;
// Beyond this many pixels of a cell, float sums of their gradients lose more than the contract allows;
// the logits are then so few that double costs nothing but time.
constexpr int64_t kMostFloatPixels = 4096;
// What a block may ask for on any device of these architectures.
constexpr int64_t kMostSharedBytes = 99 * 1024;

void check_tensors(const Tensor& student, const std::optional<Tensor>& teacher,
                   const Tensor& target, const std::optional<Tensor>& class_weight,
                   const std::optional<Tensor>& pixel_weight) {
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
  if (!pixel_weight.has_value()) return;
  check_device(student, *pixel_weight, "pixel_weight");
  STD_TORCH_CHECK(pixel_weight->dim() == 3 && pixel_weight->size(0) == target.size(0) &&
                      pixel_weight->size(1) == target.size(1) &&
                      pixel_weight->size(2) == target.size(2),
                  "pixel_weight: expected [B, H, W], as target");
}

class Runner {
 public:
  // student: the logits that learn, those of the teacher for the pass `teacher_ce`.
  Runner(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& target,
         const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight,
         const Spec& spec, const PassTerms& terms, bool gradients)
      : student_(student), terms_(terms), wide_(student.scalar_type() == ScalarType::Double) {
    pass_.batch = narrow(student.size(0), "batch");
    pass_.classes = narrow(student.size(1), "classes");
    pass_.label_height = narrow(target.size(1), "height of the labels");
    pass_.label_width = narrow(target.size(2), "width of the labels");
    pass_.align_corners = spec.align_corners;
    pass_.ignore_index = spec.ignore_index;
    pass_.unlabelled_index = spec.unlabelled_index;
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
    pass_.wide = wide_;
    if (pixel_weight.has_value()) {
      pixel_weight_ = torch::stable::contiguous(torch::stable::to(*pixel_weight, dtype()));
      pass_.pixel_weight = data_of(*pixel_weight_, "pixel_weight");
    }
    set_terms(gradients);
    choose();
  }

  bool on_labels() const { return pass_.student.source == Source::kLabels; }
  // Of a term over classes, once `start` was called; else null.
  const double* value_of(int term) const { return value_[term]; }
  ScalarType dtype() const { return wide_ ? ScalarType::Double : ScalarType::Float; }
  Pass& pass() { return pass_; }
  int64_t chunks() const { return pass_.columns / pass_.per_row; }

  // [gradients, B, C, chunks, chunk_rows + 1, width], and where the terms' gradients go.
  Tensor make_saved() {
    for (int k = 0; k < kTerms; ++k) pass_.gradient_of[k] = terms_.gradient[k];
    Tensor saved = torch::stable::new_empty(
        student_,
        {terms_.gradients, pass_.batch, pass_.classes, chunks(), pass_.chunk_rows + 1,
         pass_.student.width},
        dtype());
    pass_.saved = saved.mutable_data_ptr();
    return saved;
  }

  // See launch_count_pixels; null where there is nothing to count.
  const double* count_pixels(cudaStream_t stream) {
    if (pass_.pixel_weight == nullptr && pass_.unlabelled_index == pass_.ignore_index) return nullptr;
    counts_ = torch::stable::new_empty(student_, {(kCountBlocks + 1) * kPixelCounts},
                                       ScalarType::Double);
    auto* counts = static_cast<double*>(counts_->mutable_data_ptr());
    launch_count_pixels(pass_, counts, stream);
    return counts;
  }

  // The pass; returns the rows of partial sums per image.
  int64_t start(cudaStream_t stream) {
    const int64_t warps = kernel_->threads / kWarpSize;
    const int64_t rows = pass_.programs * warps;
    partials_ = torch::stable::new_empty(student_, {pass_.batch * rows, kPartials},
                                         ScalarType::Double);
    pass_.partials = static_cast<double*>(partials_->mutable_data_ptr());
    for_each_term([&](auto tag, int k) {
      const int spaces = decltype(tag)::type::spaces(terms_.variant[k]);
      if (terms_.asks(k) && spaces > 0) collect_space(k, spaces, rows, stream);
      using Term = typename decltype(tag)::type;
      if (terms_.asks(k) && Term::kTallies > 0) {
        collect_classes(k, Term::needs(terms_.variant[k]), pass_.batch * rows, stream);
      }
    });
    kernel_->launch(pass_, grid(), warps * pass_.warp_bytes, stream, kernel_->name);
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

  void set_terms(bool gradients) {
    pass_.needs = terms_.needs();
    pass_.maps = terms_.maps && !gradients_of_labels(gradients);
    pass_.diagnostics = terms_.diagnostics && !gradients_of_labels(gradients);
    pass_.gradients = gradients;
    pass_.temperature = terms_.temperature;
    const double t = terms_.temperature;
    pass_.power = t == 1.0 ? 1 : t == 2.0 ? 2 : t == 4.0 ? 4 : 0;
    for (int k = 0; k < kTerms; ++k) {
      pass_.has[k] = terms_.has[k];
      pass_.asked[k] = terms_.asks(k);
      pass_.variant[k] = terms_.variant[k];
      pass_.options[k] = terms_.options[k];
      pass_.group[k] = terms_.group[k];
      pass_.gradient_of[k] = -1;
      int leader = 0;
      while (leader < k && terms_.gradient[leader] != terms_.gradient[k]) ++leader;
      pass_.leader[k] = terms_.gradient[k] >= 0 ? leader : k;
      // of a term that a kernel has and the call does not, 0
      pass_.weight[k] = !terms_.asks(k)                  ? 0.0
                        : gradients_of_labels(gradients) ? terms_.weight[k]
                                                         : terms_.relative_weight(k);
    }
  }

  // Whether this pass is the second one, which writes nothing but the gradient.
  bool gradients_of_labels(bool gradients) const { return gradients && on_labels(); }

  // The kernel for this call, and how it cuts an image.
  void choose() {
    const bool cells = on_cells();
    if (cells) {
      const bool kd = pass_.has[kKd], hetero = pass_.has[kHetero];
      kernel_ = kd ? hetero ? &cells_ce_kd_hetero() : &cells_ce_kd()
                   : hetero ? &cells_ce_hetero() : &cells_ce();
    } else if (on_label_grids() &&
               labels_grid(pass_.classes, pass_.teacher.source != Source::kNone) != nullptr) {
      kernel_ = labels_grid(pass_.classes, pass_.teacher.source != Source::kNone);
    } else {
      kernel_ = &segments(pass_, wide_);
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
      hold_pixels();
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
  void hold_pixels() {
    if (kernel_ != &segments(pass_, wide_)) return;
    const int64_t models = pass_.teacher.source == Source::kNone ? 1 : 2;
    const int64_t bytes = kWarpSize * pass_.classes * models * kernel_->pixels * (wide_ ? 8 : 4);
    if (bytes * (kernel_->threads / kWarpSize) > kMostSharedBytes) return;
    pass_.warp_bytes = static_cast<int32_t>(bytes);
    if (wide_ || !together() || pass_.diagnostics) return;
    const Kernel* fixed = segments_fixed(pass_);
    if (fixed != nullptr) kernel_ = fixed;
  }

  // ce, forward kd, and hetero of the preset softmax-kl, in float.
  bool usual() const {
    bool all = !wide_ && pass_.teacher.dtype != Dtype::kDouble && !pass_.diagnostics;
    for (int k = 0; k < kTerms; ++k) {
      const bool known = k == kCe || k == kKd || k == kHetero;
      all = all && (!pass_.has[k] || (known && pass_.variant[k] == 0));
    }
    return all;
  }

  bool on_label_grids() const {
    return usual() && on_labels() &&
           (pass_.teacher.source == Source::kNone || pass_.teacher.source == Source::kLabels);
  }

  // Whether ce and kd have one gradient, as in kernels of fixed terms; with class weights they have two.
  bool together() const {
    return !pass_.has[kCe] || !pass_.has[kKd] || terms_.gradient[kCe] == terms_.gradient[kKd];
  }

  bool on_cells() const {
    const bool same_grid =
        pass_.student.source == Source::kCells &&
        (pass_.teacher.source == Source::kNone || pass_.teacher.source == Source::kCells);
    // Less high, exponentials by products could overflow (cell_pass.h); less wide, most of a thread's
    // pixels would not exist.
    // Of one class everything is exactly 0, and there by chance alone.
    return usual() && together() && same_grid && pass_.classes > 1 &&
           cells_have(3, pass_.student.height, pass_.label_height, pass_.align_corners) &&
           cells_have(2, pass_.student.width, pass_.label_width, pass_.align_corners);
  }

  // The softmaxes over space of a term.
  void collect_space(int term, int spaces, int64_t rows, cudaStream_t stream) {
    const int64_t images = spaces * static_cast<int64_t>(pass_.batch);
    const int64_t classes = pass_.classes;
    Tensor found = torch::stable::new_empty(student_, {images, rows, classes, 2}, dtype());
    Tensor shift = torch::stable::new_empty(student_, {images, classes}, dtype());
    Tensor inverse = torch::stable::new_empty(student_, {images, classes}, dtype());
    Tensor log = torch::stable::new_empty(student_, {images, classes}, dtype());
    pass_.collected = term;
    pass_.space_found = found.mutable_data_ptr();
    pass_.space_shift[term] = shift.mutable_data_ptr();
    pass_.space_inverse[term] = inverse.mutable_data_ptr();
    pass_.space_log[term] = log.mutable_data_ptr();
    const Kernel& statistics = space_statistics(wide_);
    statistics.launch(pass_, grid(), 0, stream, statistics.name);
    launch_reduce_space({pass_.space_found, wide_, rows, images, pass_.classes,
                         shift.mutable_data_ptr(), inverse.mutable_data_ptr(),
                         log.mutable_data_ptr()},
                        stream);
    for (const Tensor& tensor : {found, shift, inverse, log}) space_.push_back(tensor);
  }

  // The sums of a term over classes, and what it makes of them.
  void collect_classes(int term, const Needs& needs, int64_t rows, cudaStream_t stream) {
    const int64_t classes = pass_.classes;
    Tensor tallies = torch::stable::new_empty(student_, {rows, kMostTallies, classes},
                                              ScalarType::Double);
    Tensor sums = torch::stable::new_empty(student_, {kMostTallies * classes + 1},
                                           ScalarType::Double);
    Tensor numbers = torch::stable::new_empty(student_, {2, classes}, dtype());
    Pass alone = pass_;
    alone.collected = term;
    alone.tallies = static_cast<double*>(tallies.mutable_data_ptr());
    alone.needs = needs;
    alone.maps = alone.diagnostics = false;
    if (!needs.teacher) alone.teacher.source = Source::kNone;
    for (int k = 0; k < kTerms; ++k) alone.has[k] = k == term;
    const Kernel& kernel = class_tallies(wide_);
    kernel.launch(alone, grid(), 0, stream, kernel.name);
    auto* found = static_cast<double*>(sums.mutable_data_ptr());
    launch_settle({alone.tallies, rows, term, pass_.classes, pass_.options[term], wide_, found,
                   found + kMostTallies * classes, numbers.mutable_data_ptr()},
                  stream);
    value_[term] = found + kMostTallies * classes;
    char* first = static_cast<char*>(numbers.mutable_data_ptr());
    pass_.space_shift[term] = first;
    pass_.space_inverse[term] = first + classes * (wide_ ? 8 : 4);
    for (const Tensor& tensor : {tallies, sums, numbers}) space_.push_back(tensor);
  }

  static constexpr int kCe = index_of<CrossEntropyTerm>, kKd = index_of<KdTerm>,
                       kHetero = index_of<HeteroTerm>;

  Tensor student_;
  PassTerms terms_;
  bool wide_;
  Pass pass_{};
  const Kernel* kernel_ = nullptr;
  // What kernels read and write lives until they have been launched; the allocator then keeps it
  // for this stream.
  std::optional<Tensor> weight_, pixel_weight_, partials_, counts_;
  std::vector<Tensor> space_;
  const double* value_[kTerms] = {};
};

bool lies_on(const Tensor& logits, const Tensor& target) {
  return logits.size(2) == target.size(1) && logits.size(3) == target.size(2);
}

std::optional<Tensor> teacher_of(const PassTerms& terms, const std::optional<Tensor>& logits) {
  return terms.needs().teacher ? logits : std::nullopt;
}

Spec decode(const std::vector<int64_t>& structure, const Tensor& numbers) {
  STD_TORCH_CHECK(numbers.is_cpu() &&
                      numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous(),
                  "numbers: expected a contiguous float64 vector on the CPU");
  return decode_spec(structure.data(), structure.size(),
                     static_cast<const double*>(numbers.const_data_ptr()),
                     static_cast<size_t>(numbers.numel()));
}

// Results of a call, in the order of the schema.
struct Results {
  Tensor numerators, totals, denominators, labels, maps;
};

// One pass; adds to the call's results and returns what it keeps for `gradient`.
Tensor forward(const Tensor& logits, const std::optional<Tensor>& teacher, const Tensor& target,
               const std::optional<Tensor>& class_weight,
               const std::optional<Tensor>& pixel_weight, const Spec& spec, const PassTerms& terms,
               bool compute_grad, bool report, Results& results, cudaStream_t stream) {
  Runner run(logits, teacher, target, class_weight, pixel_weight, spec, terms,
             compute_grad && !lies_on(logits, target));
  Tensor saved = run.pass().gradients ? run.make_saved()
                                      : torch::stable::new_empty(logits, {0}, run.dtype());
  if (terms.planes() > 0) {
    run.pass().maps_out = results.maps.mutable_data_ptr();
    run.pass().maps_are_float = results.maps.scalar_type() == ScalarType::Float;
  }
  Finish finish{};
  finish.rows = run.start(stream);
  const Pass& pass = run.pass();
  finish.partials = pass.partials;
  finish.images = pass.batch;
  finish.classes = pass.classes;
  for_each_term([&](auto tag, int k) {
    using Term = typename decltype(tag)::type;
    finish.position[k] = terms.position[k];
    finish.group[k] = terms.group[k];
    finish.denominator[k] = Term::denominator(terms.variant[k], class_weight.has_value());
    finish.is_divergence[k] = Term::is_divergence(terms.variant[k]);
    finish.needs_label[k] = Term::kNeedsLabel;
    finish.value[k] = run.value_of(k);
    finish.share_of[k] = Term::kHasShares ? kFirstShare + share_index_of<Term> : -1;
  });
  finish.numerators = static_cast<double*>(results.numerators.mutable_data_ptr());
  finish.denominators = static_cast<double*>(results.denominators.mutable_data_ptr());
  finish.pixels = run.count_pixels(stream);
  finish.weighted = pixel_weight.has_value();
  if (report) finish.report = static_cast<int64_t*>(results.labels.mutable_data_ptr());
  launch_finish_sums(finish, stream);
  const bool wide_logits = logits.scalar_type() == ScalarType::Double;
  return wide_logits ? saved : torch::stable::to(saved, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sums(
    const Tensor& student_logits, const std::optional<Tensor>& teacher_logits, const Tensor& target,
    const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight,
    const Tensor& numbers, std::vector<int64_t> structure, bool student_grad, bool teacher_grad) {
  const Spec spec = decode(structure, numbers);
  check_tensors(student_logits, teacher_logits, target, class_weight, pixel_weight);
  STD_TORCH_CHECK(teacher_logits.has_value() || !(spec.student.needs().teacher || spec.teacher.any),
                  "teacher_logits: got None, these terms need them");
  const OnDevice device(student_logits.get_device_index());
  const cudaStream_t stream = current_stream(student_logits.get_device_index());
  const bool wide = student_logits.scalar_type() == ScalarType::Double;
  const auto empty = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(student_logits, sizes, dtype);
  };
  Results results{empty({spec.terms}, ScalarType::Double), empty({spec.groups}, ScalarType::Double),
                  empty({spec.groups}, ScalarType::Double), empty({4}, ScalarType::Long),
                  empty({0}, wide ? ScalarType::Double : ScalarType::Float)};
  if (spec.student.planes() > 0) {
    results.maps = empty({spec.student.planes(), target.size(0), target.size(1), target.size(2)},
                         wide ? ScalarType::Double : ScalarType::Float);
  }
  Tensor student_saved = empty({0}, ScalarType::Float);
  Tensor teacher_saved = student_saved;
  if (spec.student.any) {
    student_saved = forward(student_logits, teacher_of(spec.student, teacher_logits), target,
                            class_weight, pixel_weight, spec, spec.student, student_grad, true, results, stream);
  }
  if (spec.teacher.any) {
    teacher_saved = forward(*teacher_logits, std::nullopt, target, class_weight, pixel_weight, spec,
                            spec.teacher, teacher_grad, !spec.student.any, results, stream);
  }
  GroupTotals totals{};
  totals.terms = spec.terms;
  totals.groups = spec.groups;
  for (const PassTerms* terms : {&spec.student, &spec.teacher}) {
    for (int k = 0; k < kTerms; ++k) {
      if (terms->position[k] < 0) continue;
      totals.group[terms->position[k]] = terms->group[k];
      totals.weight[terms->position[k]] = terms->weight[k];
    }
  }
  totals.numerators = static_cast<const double*>(results.numerators.const_data_ptr());
  totals.totals = static_cast<double*>(results.totals.mutable_data_ptr());
  launch_group_totals(totals, stream);
  return {results.numerators, results.totals, results.denominators, results.labels,
          results.maps,       student_saved,  teacher_saved};
}

// sum over g of gradient_weight * grad_totals[group] * saved[g], in the form of like
Tensor combine_gradients(const Tensor& saved, const Tensor& grad_totals, const PassTerms& terms,
                         const Tensor& like, cudaStream_t stream) {
  check_device(like, saved, "saved");
  const bool wide = saved.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(saved.dim() == 6 && saved.is_contiguous() &&
                      (wide || saved.scalar_type() == ScalarType::Float) &&
                      saved.size(0) == terms.gradients && saved.size(1) == like.size(0) &&
                      saved.size(2) == like.size(1) &&
                      saved.size(4) >= 2 && saved.size(4) <= kMostChunkRows + 1 &&
                      saved.size(3) == ceil_div(like.size(2) + 1, saved.size(4) - 1) &&
                      saved.size(5) == like.size(3),
                  "saved: expected what sums returned for logits like these");
  Tensor out = torch::stable::empty_like(like);
  Combine k{};
  k.saved = saved.const_data_ptr();
  k.wide = wide;
  k.gradients = terms.gradients;
  for (int g = 0; g < k.gradients; ++g) {
    k.group[g] = terms.gradient_group[g];
    k.weight[g] = terms.gradient_weight[g];
  }
  k.grad_totals = static_cast<const double*>(grad_totals.const_data_ptr());
  k.batch = narrow(like.size(0), "batch");
  k.classes = narrow(like.size(1), "classes");
  k.chunks = saved.size(3);
  k.chunk_rows = saved.size(4) - 1;
  k.out = logits_of(out, "gradient");
  launch_combine_gradients(k, stream);
  return out;
}

// Of one pass's logits. saved: what `sums` kept, or nothing.
Tensor backward(const Tensor& logits, const std::optional<Tensor>& teacher,
                const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                const std::optional<Tensor>& pixel_weight, const Spec& spec, const PassTerms& terms,
                const Tensor& grad_totals,
                const std::optional<Tensor>& saved, cudaStream_t stream) {
  if (saved.has_value()) return combine_gradients(*saved, grad_totals, terms, logits, stream);
  STD_TORCH_CHECK(target.has_value(), "saved, target: got None");
  check_tensors(logits, teacher, *target, class_weight, pixel_weight);
  STD_TORCH_CHECK(lies_on(logits, *target), "saved: got None for logits off the label grid");
  Runner run(logits, teacher, *target, class_weight, pixel_weight, spec, terms, true);
  Tensor gradient = torch::stable::empty_like(logits);
  run.pass().gradient = logits_of(gradient, "gradient");
  run.pass().grad_totals = static_cast<const double*>(grad_totals.const_data_ptr());
  run.start(stream);
  return gradient;
}

std::tuple<Tensor, Tensor> gradient(const Tensor& grad_totals, const Tensor& student_logits,
                                    const std::optional<Tensor>& teacher_logits,
                                    const std::optional<Tensor>& target,
                                    const std::optional<Tensor>& class_weight,
                                    const std::optional<Tensor>& pixel_weight,
                                    const Tensor& numbers,
                                    const std::optional<Tensor>& student_saved,
                                    const std::optional<Tensor>& teacher_saved,
                                    std::vector<int64_t> structure, bool student_grad,
                                    bool teacher_grad) {
  const Spec spec = decode(structure, numbers);
  const OnDevice device(student_logits.get_device_index());
  const cudaStream_t stream = current_stream(student_logits.get_device_index());
  check_device(student_logits, grad_totals, "grad_totals");
  STD_TORCH_CHECK(grad_totals.scalar_type() == ScalarType::Double && grad_totals.is_contiguous() &&
                      grad_totals.numel() == spec.groups,
                  "grad_totals: expected float64 [", spec.groups, "]");
  Tensor student = torch::stable::new_empty(student_logits, {0}, ScalarType::Float);
  Tensor teacher = student;
  if (student_grad && spec.student.any) {
    student = backward(student_logits, teacher_of(spec.student, teacher_logits), target,
                       class_weight, pixel_weight, spec, spec.student, grad_totals, student_saved, stream);
  }
  if (teacher_grad && spec.teacher.any) {
    STD_TORCH_CHECK(teacher_logits.has_value(), "teacher_logits: got None");
    teacher = backward(*teacher_logits, std::nullopt, target, class_weight, pixel_weight, spec,
                       spec.teacher, grad_totals, teacher_saved, stream);
  }
  return {student, teacher};
}

}  // namespace

HAKD_REGISTER(m) {
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("gradient", TORCH_BOX(&gradient));
}

}  // namespace heteroakd::cuda
