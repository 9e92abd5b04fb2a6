#include "correction.h"

namespace flowkernels {
namespace {

struct Curve {
  float value, slope;
};

// rho(d) = sqrt(d² + c²) - c as d² / (root + c), which keeps its digits at small d, and its slope
// d / root: both from one division.
struct PseudoHuber {
  float c;

  FK_INLINE_LAMBDA Curve operator()(float d) const {
    const float squares = d * d, root = std::sqrt(squares + c * c), sum = root + c;
    const float inverse = 1.f / (root * sum);
    return {squares * (root * inverse), d * (sum * inverse)};
  }
};

struct Square {
  FK_INLINE_LAMBDA Curve operator()(float d) const { return {d * d, 2.f * d}; }
};

// The two ways to d_con, of v and of v_teacher - v.
template <class T>
struct ToNeighbour {
  const T* v_post;
  float t_post, step;

  FK_INLINE_LAMBDA float operator()(int64_t i, float v, float to_teacher) const {
    return t_post * (widen(v_post[i]) - v) + step * to_teacher;
  }
};

template <class T>
struct ToData {
  const T *x0, *noise;
  float t;

  // Near a straight path d is no larger than the rounding of noise - x0, so that is added back:
  // for s = fl(a - b), a - b - s is exact as below (Knuth, TAOCP 2, 4.2.2).
  FK_INLINE_LAMBDA float operator()(int64_t i, float v, float) const {
    const float a = widen(noise[i]), b = widen(x0[i]), s = a - b;
    const float back = s - a, lost = (a - (s - back)) - (b + back);
    return t * ((s - v) + lost);
  }
};

// Sums of rho over n elements, and r[i] = factor (slope_con + lam_bi slope_bi).
template <class T, class Target>
FK_INLINE void self_corrected_step(const SelfCorrected& a, const Target& target, const T* v,
                                   const T* v_teacher, const T* v_prev, float t_prev, float ahead,
                                   float factor, int64_t n, float* r, double& consistency,
                                   double& bidirectional) {
  const PseudoHuber rho{a.c};
  const float lam_bi = a.lam_bi;
  float con = 0.f, bi = 0.f;
#pragma omp simd reduction(+ : con, bi)
  for (int64_t i = 0; i < n; ++i) {
    const float here = widen(v[i]), to_teacher = widen(v_teacher[i]) - here;
    const Curve forth = rho(target(i, here, to_teacher));
    const Curve back = rho(t_prev * (widen(v_prev[i]) - here) - ahead * to_teacher);
    con += forth.value;
    bi += back.value;
    r[i] = factor * (forth.slope + lam_bi * back.slope);
  }
  consistency += con;
  bidirectional += bi;
}

template <class T>
FK_INLINE void self_corrected_items(const SelfCorrected& a, int64_t begin, int64_t end) {
  Scratch scratch(7, kStep);
  float* r = scratch[5];
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    const int64_t sample = item.sample;
    const float grad_output = value_of(a.grad_output, sample);
    if (a.rescale && grad_output == 1.f) continue;
    const float t = value_of(a.t, sample), t_post = value_of(a.t_post, sample);
    const float t_prev = value_of(a.t_prev, sample);
    const float factor = -t * static_cast<float>(loss_scale(a.extent)) * grad_output;
    double consistency = 0.0, bidirectional = 0.0;
    for (int64_t first = item.first; first < item.last; first += kStep) {
      const int64_t n = std::min(kStep, item.last - first);
      const T* v = typed<T>(a.v, sample, first, scratch[0], n);
      const T* v_teacher = typed<T>(a.v_teacher, sample, first, scratch[1], n);
      const T* v_prev = typed<T>(a.v_prev, sample, first, scratch[2], n);
      if (t_post < a.trunc) {
        const ToData<T> target{typed<T>(a.x0, sample, first, scratch[3], n),
                               typed<T>(a.noise, sample, first, scratch[4], n), t};
        self_corrected_step(a, target, v, v_teacher, v_prev, t_prev, t_prev - t, factor, n, r,
                            consistency, bidirectional);
      } else {
        const ToNeighbour<T> target{typed<T>(a.v_post, sample, first, scratch[3], n), t_post,
                                    t - t_post};
        self_corrected_step(a, target, v, v_teacher, v_prev, t_prev, t_prev - t, factor, n, r,
                            consistency, bidirectional);
      }
      if (a.grad_v)
        write<T>(a.extent, a.grad_v, sample, first, scratch[6], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return r[i]; });
    }
    a.consistency[index] = consistency;
    a.bidirectional[index] = bidirectional;
  }
}

}  // namespace

// With s = sqrt(d² + c²) of each difference, and grad_output and the reduction in `scale`:
//   grad_v = -t scale (d_con / s_con + lam_bi d_bi / s_bi)
// since v has the factor -t in both, in either case of d_con.
FK_CLONES void self_corrected(const SelfCorrected& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a.v, a.v_teacher, a.v_post, a.v_prev, a.x0, a.noise, a.grad_v))
    self_corrected_items<BFloat16>(a, begin, end);
  else if (all_of<Float16>(a.v, a.v_teacher, a.v_post, a.v_prev, a.x0, a.noise, a.grad_v))
    self_corrected_items<Float16>(a, begin, end);
  else
    self_corrected_items<float>(a, begin, end);
}

void self_corrected_total(const SelfCorrected& a, float* total, float* consistency,
                          float* bidirectional) {
  total_loss(a.extent, PerSample{}, a.consistency, consistency);
  total_loss(a.extent, PerSample{}, a.bidirectional, bidirectional);
  const int64_t losses = a.extent.reduction == Reduction::none ? a.extent.batch : 1;
  for (int64_t i = 0; i < losses; ++i) total[i] = consistency[i] + a.lam_bi * bidirectional[i];
}

namespace {

template <class T, class Loss>
FK_INLINE void pair_loss_items(const PairLoss& a, int64_t begin, int64_t end, const Loss& loss) {
  Scratch scratch(4, kStep);
  float* r = scratch[2];
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    const int64_t sample = item.sample;
    const float grad_output = value_of(a.grad_output, sample);
    if (a.rescale && grad_output == 1.f) continue;
    const float t = value_of(a.t, sample), weight = t * t;
    const float factor = weight * static_cast<float>(loss_scale(a.extent)) * grad_output;
    double total = 0.0;
    for (int64_t first = item.first; first < item.last; first += kStep) {
      const int64_t n = std::min(kStep, item.last - first);
      const T* x = typed<T>(a.x, sample, first, scratch[0], n);
      const T* y = typed<T>(a.y, sample, first, scratch[1], n);
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const Curve curve = loss(widen(x[i]) - widen(y[i]));
        sum += curve.value;
        r[i] = factor * curve.slope;
      }
      total += sum;
      if (a.grad_x)
        write<T>(a.extent, a.grad_x, sample, first, scratch[3], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return r[i]; });
      if (a.grad_y)
        write<T>(a.extent, a.grad_y, sample, first, scratch[3], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return -r[i]; });
    }
    a.partial[index] = static_cast<double>(weight) * total;
  }
}

template <class Loss>
FK_INLINE void pair_loss_typed(const PairLoss& a, int64_t begin, int64_t end, const Loss& loss) {
  if (all_of<BFloat16>(a.x, a.y, a.grad_x, a.grad_y))
    pair_loss_items<BFloat16>(a, begin, end, loss);
  else if (all_of<Float16>(a.x, a.y, a.grad_x, a.grad_y))
    pair_loss_items<Float16>(a, begin, end, loss);
  else
    pair_loss_items<float>(a, begin, end, loss);
}

}  // namespace

// With d = x - y and grad_output and the reduction in `scale`:
//   self_reflow  grad_x = 2 t² scale d     pseudo_huber  grad_x = scale d / sqrt(d² + c²)
// and grad_y = -grad_x.
FK_CLONES void pair_loss(const PairLoss& a, int64_t begin, int64_t end) {
  if (a.t)
    pair_loss_typed(a, begin, end, Square{});
  else
    pair_loss_typed(a, begin, end, PseudoHuber{a.c});
}

void pair_loss_total(const PairLoss& a, float* loss) {
  total_loss(a.extent, PerSample{}, a.partial, loss);
}

}  // namespace flowkernels
