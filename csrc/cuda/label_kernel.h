// The usual terms (ce, forward kd, hetero of the preset softmax-kl) with all logits on the label grid.
//
// Memory bound: each logit is read once and, backward, each gradient written once. So a thread
// fetches all classes of its S pixels into shared memory first, every copy in flight at once, and
// the loops over classes work there, where nobody else looks: no barrier. S = 4 (16 bytes a load)
// where few classes leave room for enough warps, else 1.
//
//     maxima       exact, per pixel
//     statistics   and z becomes what the last loop needs: e_s and e_t backward, a_s and e_t forward
//     pixel        reliability, discrepancy, values, coefficients of the gradients
//     late         forward: sum_c x_c (log2 x_c - a_s,c)
//     gradients    backward, when the terms' scales are known: all terms in two coefficients and
//                  the label's own, g_c = student e_s,c - other e_t,c + ce_c
//
// Cost per pixel and class for ce + hetero in fp32: forward 8 bytes and about 40 instructions with 3
// special functions, backward 12 bytes and 42 with 2 (19 classes; docs/cuda.md). On an H100 memory
// takes 1.8 and 2.7 times as long as issuing them.
#pragma once

#include "copy.h"
#include "runtime.h"
#include "segment_pass.h"
#include "warp_sums.h"

namespace heteroakd::cuda {

constexpr int kLabelThreads = 64;

// S floats of a thread in shared memory.
template <int S>
struct Pixels;
template <>
struct Pixels<1> {
  float v[1];
};
template <>
struct alignas(16) Pixels<4> {
  float v[4];
};

template <class Set, int S, bool kGrad>
class LabelPass {
  static constexpr int kModels = Set::kTeacher ? 2 : 1;

 public:
  // memory: [C][kModels][threads] of Pixels<S>, of which this thread's.
  HAKD_DEVICE LabelPass(const Pass& pass, const Numbers<float>& numbers, int32_t image, int32_t y,
                        int32_t x, bool exists, Pixels<S>* memory)
      : p(pass),
        n(numbers),
        memory_(memory),
        image_(image),
        y_(y),
        x_(x),
        terms_(pass, numbers, image) {
    wide_ = exists ? p.label_width - x : 0;
    wide_ = wide_ < S ? wide_ : S;
  }

  HAKD_DEVICE void run(Sums<float>& sums) {
    fetch(0, p.student);
    if (Set::kTeacher) fetch(1, p.teacher);
    int32_t label[1][S];
    load_labels<float>(p, image_, y_, x_, wide_ > 0 ? 1 : 0, wide_, label, sums.valid, sums.bad);
    copies_arrived();
    // Whatever an invalid pixel holds stays in this thread: its coefficients and sums are selected.
#pragma unroll
    for (int i = 0; i < S; ++i) label_[i] = label[0][i];

    float student_m[S], teacher_m[S], student_label[S], teacher_label[S];
    maxima(0, student_m);
    label_logits(0, student_m, student_label);
    if (Set::kTeacher) {
      maxima(1, teacher_m);
      label_logits(1, teacher_m, teacher_label);
    }
    Totals<float> t[S];
    switch (fixed_power<Set>(p)) {
      case 1: statistics<1>(student_m, teacher_m, t); break;
      case 2: statistics<2>(student_m, teacher_m, t); break;
      default: statistics<0>(student_m, teacher_m, t);
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
      find_totals<Set>(p, t[i], student_label[i], Set::kNeeds.teacher_nll ? teacher_label[i] : 0.0f,
                       label_[i]);
      terms_.begin(t[i], i);
      terms_.find_coefficients(t[i], i, label_[i], y_, x_ + i, sums);
      if (!kGrad) terms_.write(i, label_[i] >= 0, i < wide_, y_, x_ + i);
    }
    if (kGrad) {
      switch (fixed_power<Set>(p)) {
        case 1: gradients<1>(); break;
        case 2: gradients<2>(); break;
        default: gradients<0>();
      }
      return;
    }
    if (terms_.values_late()) find_late();
#pragma unroll
    for (int i = 0; i < S; ++i) terms_.finish(i, label_[i] >= 0, sums);
  }

 private:
  HAKD_DEVICE Pixels<S>& at(int32_t c, int m) const {
    return memory_[(c * kModels + m) * kLabelThreads];
  }

  HAKD_DEVICE void fetch(int m, const Logits& model) const {
    if (wide_ <= 0) {
#pragma unroll 4
      for (int32_t c = 0; c < p.classes; ++c) at(c, m) = {};
      return;
    }
    int64_t place = image_ * model.batch_stride + y_ * model.row_stride + x_ * model.column_stride;
    if (model.dtype == Dtype::kFloat && (S == 1 || model.vectors)) {
#pragma unroll 4
      for (int32_t c = 0; c < p.classes; ++c) {
        start_copy<static_cast<int>(sizeof(Pixels<S>))>(&at(c, m),
                                                        static_cast<const float*>(model.data) + place);
        place += model.class_stride;
      }
    } else if (S == 4 && model.vectors) {
#pragma unroll 4
      for (int32_t c = 0; c < p.classes; ++c) {
        *reinterpret_cast<float4*>(&at(c, m)) = load_four(model.data, model.dtype, place);
        place += model.class_stride;
      }
    } else {
#pragma unroll 4
      for (int32_t c = 0; c < p.classes; ++c) {
        Pixels<S> z;
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int64_t next = i < wide_ ? i : 0;
          z.v[i] = load_narrow(model.data, model.dtype, place + next * model.column_stride);
        }
        at(c, m) = z;
        place += model.class_stride;
      }
    }
  }

  HAKD_DEVICE void maxima(int m, float (&found)[S]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) found[i] = -INFINITY;
#pragma unroll 4
    for (int32_t c = 0; c < p.classes; ++c) {
      const Pixels<S> z = at(c, m);
#pragma unroll
      for (int i = 0; i < S; ++i) found[i] = max_or_nan(found[i], z.v[i]);
    }
  }

  HAKD_DEVICE void label_logits(int m, const float (&maximum)[S], float (&found)[S]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) {
      found[i] = label_[i] < 0 ? 0.0f : at(class_or_0(p, label_[i]), m).v[i] - maximum[i];
    }
  }

  template <int kPower>
  HAKD_DEVICE float hard(float a, float e) const {
    return hard_exponential(kPower, n.hard_exponent, a, e);
  }

  template <int kPower>
  HAKD_DEVICE void statistics(const float (&student_m)[S], const float (&teacher_m)[S],
                              Totals<float> (&s)[S]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) s[i] = no_totals<float>();
    const float least = -2e38f / max(n.pass.scale, 1.4427f);
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      Pixels<S> student = at(c, 0);
      Pixels<S> teacher;
      if (Set::kTeacher) teacher = at(c, 1);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        Class<float, bool> k{};
        k.is_label = label_[i] == c;
        k.student_a = max_or_nan(least, student.v[i] - student_m[i]) * n.pass.scale;
        k.student_e = exp2(k.student_a);
        if (Set::kTeacher) {
          k.teacher_a = max_or_nan(least, teacher.v[i] - teacher_m[i]) * n.pass.scale;
          k.teacher_e = exp2(k.teacher_a);
        }
        const auto hard_of = [&](int m) {
          return m == 0 ? hard<kPower>(k.student_a, k.student_e)
                        : hard<kPower>(k.teacher_a, k.teacher_e);
        };
        add_class<Set>(p, k, hard_of, k.teacher_a - k.student_a, 0.0f, s[i]);
        // The general power is found anew from a.
        student.v[i] = kGrad && kPower != 0 ? k.student_e : k.student_a;
        teacher.v[i] = k.teacher_e;
      }
      at(c, 0) = student;
      if (Set::kTeacher) at(c, 1) = teacher;
    }
  }

  HAKD_DEVICE void find_late() {
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      const Pixels<S> student = at(c, 0);  // a_s
      const Pixels<S> teacher = at(c, 1);  // e_t
#pragma unroll
      for (int i = 0; i < S; ++i) {
        Class<float, bool> k{};
        k.student_a = student.v[i];
        k.student_e = exp2(k.student_a);
        k.teacher_e = teacher.v[i];
        float unused[kTerms];
        terms_.find_gradients(c, k, 0.0f, i, label_[i] >= 0, unused);
      }
    }
  }

  template <int kPower>
  HAKD_DEVICE void gradients() {
    const Logits& out = p.gradient;
    int64_t place = image_ * out.batch_stride + y_ * out.row_stride + x_ * out.column_stride;
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      const Pixels<S> student = at(c, 0);  // e_s, or a_s of a general power
      Pixels<S> teacher;
      if (Set::kTeacher) teacher = at(c, 1);
      float g[S];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        Class<float, bool> k{};
        k.is_label = label_[i] == c;
        k.student_a = student.v[i];
        k.student_e = kPower == 0 ? exp2(student.v[i]) : student.v[i];
        if (Set::kTeacher) k.teacher_e = teacher.v[i];
        float sum[kTerms];
        terms_.find_gradients(c, k, hard<kPower>(k.student_a, k.student_e), i, label_[i] >= 0, sum);
        g[i] = sum[Set::first()];
        if (label_[i] < 0) g[i] = 0.0f;
      }
      store(place, g);
      place += out.class_stride;
    }
  }

  HAKD_DEVICE void store(int64_t place, const float (&g)[S]) const {
    void* data = const_cast<void*>(p.gradient.data);
    if constexpr (S == 4) {
      if (p.gradient.vectors) {
        if (wide_ > 0) store_four(data, p.gradient.dtype, place, g);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
      if (i >= wide_) continue;
      store_logit(data, p.gradient.dtype, place + i * p.gradient.column_stride, g[i]);
    }
  }

  const Pass& p;
  const Numbers<float>& n;
  Pixels<S>* memory_;
  int32_t image_, y_, x_, wide_;
  int32_t label_[S];
  PixelTerms<float, Set, S, true> terms_;
};

template <class Set, int S, bool kGrad>
__global__ void __launch_bounds__(kLabelThreads) label_kernel(const __grid_constant__ Pass p) {
  HAKD_SHARED_MEMORY(float4, shared_memory);
  const Thread thread = this_thread<kLabelThreads>(p);
  const Column& column = thread.column;
  const Numbers<float> n = numbers_of<Set, float>(p);
  auto* memory = reinterpret_cast<Pixels<S>*>(shared_memory) + threadIdx.x;
  ThreadSums thread_sums;
  const int32_t x = (column.cell + 1) * S;
#pragma unroll 1
  for (int32_t t = 0; t < p.chunk_rows; ++t) {
    const int32_t y = column.chunk * p.chunk_rows + t;
    const bool exists = column.exists && y < p.label_height;
    __syncwarp();  // what the row above left in shared memory has been written
    Sums<float> sums = no_sums<float>();
    LabelPass<Set, S, kGrad>(p, n, thread.image, y, x, exists, memory).run(sums);
    thread_sums.template add<Set>(sums);
  }
  write_sums<Set>(p, thread.row, thread_sums, column.own, thread.lane);
}

}  // namespace heteroakd::cuda
