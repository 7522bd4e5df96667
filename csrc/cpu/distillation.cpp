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

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "runner.h"

namespace heteroakd::cpu {
namespace {

// numerators, totals, denominators, labels, maps, and what each pass keeps for `gradient`
using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;  // of the student's and the teacher's logits

// Beyond this many label pixels per logit along an axis, float sums of their gradients lose more
// than the contract allows; the logits are then so few that double costs nothing but time.
constexpr int64_t kMaxFloatRatio = 64;

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
               const std::optional<Tensor>& class_weight,
               const std::optional<Tensor>& pixel_weight, const Spec& spec, const PassTerms& terms,
               bool compute_grad, double* numerators, double* denominators, Tensor& maps,
               LabelReport& labels) {
  const auto run = [&](auto zero) {
    Runner<decltype(zero)> runner(logits, teacher, target, class_weight, pixel_weight, spec, terms);
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
          const Tensor& target, const std::optional<Tensor>& class_weight,
          const std::optional<Tensor>& pixel_weight, const Tensor& numbers,
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
                            class_weight, pixel_weight, spec, spec.student, student_grad, n, d, maps,
                            labels);
  }
  if (spec.teacher.any) {
    Tensor none = maps;
    teacher_saved = forward(*teacher_logits, std::nullopt, target, class_weight, pixel_weight, spec,
                            spec.teacher, teacher_grad, n, d, none, labels);
  }
  for (const PassTerms* terms : {&spec.student, &spec.teacher}) {
    for (int k = 0; k < kTerms; ++k) {
      if (terms->asks(k)) t[terms->group[k]] += terms->weight[k] * n[terms->position[k]];
    }
  }
  return {numerators, totals,        denominators, report_tensor(labels),
          maps,       student_saved, teacher_saved};
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
                const std::optional<Tensor>& pixel_weight, const Spec& spec, const PassTerms& terms,
                const double* grad_totals,
                const std::optional<Tensor>& saved) {
  if (saved.has_value()) return combine_gradients(*saved, grad_totals, terms, logits);
  STD_TORCH_CHECK(target.has_value() && identity(logits, teacher, *target),
                  "saved: got None for logits that are not on the label grid");
  const auto run = [&](auto zero) {
    return Runner<decltype(zero)>(logits, teacher, *target, class_weight, pixel_weight,
                                   spec, terms)
        .backward(logits, grad_totals);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

Gradients gradient(const Tensor& grad_totals, const Tensor& student_logits,
                   const std::optional<Tensor>& teacher_logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight,
                   const std::optional<Tensor>& pixel_weight, const Tensor& numbers,
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
                       class_weight, pixel_weight, spec, spec.student, scales, student_saved);
  }
  if (teacher_grad && spec.teacher.any) {
    STD_TORCH_CHECK(teacher_logits.has_value(), "teacher_logits: got None");
    teacher = backward(*teacher_logits, std::nullopt, target, class_weight, pixel_weight, spec,
                       spec.teacher, scales, teacher_saved);
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
