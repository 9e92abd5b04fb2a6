#include "losses.h"

#include "loss_rows.h"

namespace flowkernels {
namespace {

// Every gradient is a combination of d and e: weights of the two, for each output.
struct Combination {
  View output;
  float of_d, of_e;
};

// The gradients that are wanted, from `first` on.
template <class T, int kCount>
FK_INLINE void take_gradients(LossRow<T>& row, const Combination (&outputs)[kCount],
                              const Item& item, int64_t first) {
  row.wanted = 0;
  for (const Combination& each : outputs)
    if (each.output)
      row.gradients[row.wanted++] = {in_place<T>(each.output, item.sample, first), each.of_d,
                                     each.of_e};
  for (int64_t k = 0; k < row.wanted; ++k) row.stream &= starts_line(row.gradients[k].out);
}

// The sum of an item in the CPU's own instructions; `row_at` gives the operands from an element on.
template <class T, int kCount, class F>
FK_INLINE double own_item(const LossExtent& extent, float (*sum)(const LossRow<T>&, int64_t),
                          const Combination (&outputs)[kCount], const Item& item, const F& row_at) {
  double total = 0.0;
  for (int64_t first = item.first; first < item.last; first += kBlock) {
    LossRow<T> row = row_at(first);
    row.stream = streamed<T>(extent);
    take_gradients(row, outputs, item, first);
    total += sum(row, std::min(kBlock, item.last - first));
  }
  return total;
}

template <class T>
FK_INLINE void flow_matching_items(const FlowMatching& a, const LossRows<T>* own, int64_t begin,
                                   int64_t end) {
  Scratch scratch(5, kStep);
  float* r = scratch[3];
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    const int64_t sample = item.sample;
    const float grad_output = value_of(a.grad_output, sample);
    if (a.rescale && grad_output == 1.f) continue;
    const float factor =
        2.f * static_cast<float>(loss_scale(a.extent)) * value_of(a.weight, sample) * grad_output;
    const float inverse = 1.f / value_of(a.dt, sample);
    if (own) {
      const Combination outputs[3] = {{a.grad_v, factor, 0.f},
                                      {a.grad_x0, factor * inverse, 0.f},
                                      {a.grad_noise, -factor * inverse, 0.f}};
      a.partial[index] = own_item(a.extent, own->flow_matching, outputs, item,
                                  [&](int64_t first) FK_INLINE_LAMBDA {
                                    LossRow<T> row{};
                                    row.v = in_place<T>(a.v, sample, first);
                                    row.x0 = in_place<T>(a.x0, sample, first);
                                    row.noise = in_place<T>(a.noise, sample, first);
                                    row.inverse = inverse;
                                    return row;
                                  });
      continue;
    }
    double total = 0.0;
    for (int64_t first = item.first; first < item.last; first += kStep) {
      const int64_t n = std::min(kStep, item.last - first);
      const T* v = typed<T>(a.v, sample, first, scratch[0], n);
      const T* x0 = typed<T>(a.x0, sample, first, scratch[1], n);
      const T* noise = typed<T>(a.noise, sample, first, scratch[2], n);
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const float residual = widen(v[i]) - (widen(noise[i]) - widen(x0[i])) * inverse;
        sum += residual * residual;
        r[i] = factor * residual;
      }
      total += sum;
      if (a.grad_v)
        write<T>(a.extent, a.grad_v, sample, first, scratch[4], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return r[i]; });
      if (a.grad_x0)
        write<T>(a.extent, a.grad_x0, sample, first, scratch[4], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return inverse * r[i]; });
      if (a.grad_noise)
        write<T>(a.extent, a.grad_noise, sample, first, scratch[4], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return -inverse * r[i]; });
    }
    a.partial[index] = total;
  }
}

template <class T>
FK_INLINE bool all_of(const FlowMatching& a) {
  return all_of<T>(a.v, a.x0, a.noise, a.grad_v, a.grad_x0, a.grad_noise);
}

}  // namespace

// With r = v - (noise - x0) / dt (dt is 1 where there is none) and
// c = 2 · scale · weight · grad_output:
//   grad_v = c r     grad_x0 = c r / dt     grad_noise = -c r / dt
FK_CLONES void flow_matching(const FlowMatching& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a))
    flow_matching_items(a, loss_rows<BFloat16>(), begin, end);
  else
    flow_matching_items(a, all_of<float>(a) ? loss_rows<float>() : nullptr, begin, end);
}

void flow_matching_total(const FlowMatching& a, float* loss) {
  total_loss(a.extent, a.weight, a.partial, loss);
}

namespace {

// The teacher's velocity after guidance, as float32 unless there is none.
template <class T>
struct Guided {
  const T *u, *uncond;
  float guidance;

  FK_INLINE_LAMBDA float operator()(int64_t i, std::true_type) const {
    return widen(uncond[i]) + guidance * (widen(u[i]) - widen(uncond[i]));
  }
  FK_INLINE_LAMBDA float operator()(int64_t i, std::false_type) const { return widen(u[i]); }
};

template <class T>
FK_INLINE Guided<T> guided(const FGM& a, int64_t sample, int64_t first, float* u_row,
                           float* uncond_row, int64_t n) {
  return {typed<T>(a.u, sample, first, u_row, n),
          a.u_uncond ? typed<T>(a.u_uncond, sample, first, uncond_row, n) : nullptr, a.guidance};
}

template <class T>
FK_INLINE void store_combination(const LossExtent& extent, const Combination& a, int64_t sample,
                                 int64_t first, const float* d, const float* e, float* row,
                                 int64_t n) {
  const float of_d = a.of_d, of_e = a.of_e;
  if (of_d == 0.f)
    write<T>(extent, a.output, sample, first, row, n,
             [=](int64_t i) FK_INLINE_LAMBDA { return of_e * e[i]; });
  else if (of_e == 0.f)
    write<T>(extent, a.output, sample, first, row, n,
             [=](int64_t i) FK_INLINE_LAMBDA { return of_d * d[i]; });
  else
    write<T>(extent, a.output, sample, first, row, n,
             [=](int64_t i) FK_INLINE_LAMBDA { return of_d * d[i] + of_e * e[i]; });
}

FK_INLINE void zero(const View& gradient, int64_t sample, int64_t first, int64_t n) {
  std::memset(element(gradient, sample, first), 0, n * element_size(gradient.dtype));
}

template <class T, class HasUncond>
FK_INLINE void fgm_size_items(const FGM& a, int64_t begin, int64_t end, HasUncond has_uncond) {
  Scratch scratch(4, kStep);
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    double total = 0.0;
    for (int64_t first = item.first; first < item.last; first += kStep) {
      const int64_t n = std::min(kStep, item.last - first);
      const Guided<T> u = guided<T>(a, item.sample, first, scratch[0], scratch[1], n);
      const T* x0 = typed<T>(a.x0, item.sample, first, scratch[2], n);
      const T* noise = typed<T>(a.noise, item.sample, first, scratch[3], n);
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i)
        sum += std::fabs(u(i, has_uncond) - (widen(noise[i]) - widen(x0[i])));
      total += sum;
    }
    a.size[index] = total;
  }
}

// Elements that fgm takes at a time, of its up to five operands and five gradients. Measured with
// three float32 gradients, forward and backward: at 32x4x32x32 blocks of 128 take 151 us, of 256
// 157 us, of 1024 160 us; at 16x16x128x128 128 and 256 2.1 ms, 1024 3.3 ms.
constexpr int64_t kShortStep = 128;

template <class T, class HasUncond>
FK_INLINE void fgm_items(const FGM& a, const LossRows<T>* own, int64_t begin, int64_t end,
                         HasUncond has_uncond) {
  Scratch scratch(8, kStep);
  float* d = scratch[5];
  float* e = scratch[6];
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    const float lam = a.lam, omega = a.omega[item.sample];
    const float grad_output = value_of(a.grad_output, item.sample);
    if (a.rescale && grad_output == 1.f) continue;
    const float c = 2.f * static_cast<float>(loss_scale(a.extent)) * omega * grad_output;
    const float on_u = c * a.guidance, on_uncond = c * (1.f - a.guidance);
    const Combination outputs[5] = {{a.grad_u, on_u * lam, on_u},
                                    {a.grad_v, c * (1.f - lam), -c},
                                    {a.grad_x0, c, 0.f},
                                    {a.grad_noise, -c, 0.f},
                                    {a.grad_u_uncond, on_uncond * lam, on_uncond}};
    if (std::isnan(omega)) {
      for (const Combination& each : outputs)
        if (each.output) zero(each.output, item.sample, item.first, item.last - item.first);
      a.partial[index] = NAN;
      continue;
    }
    if (own) {
      a.partial[index] =
          own_item(a.extent, own->fgm, outputs, item, [&](int64_t first) FK_INLINE_LAMBDA {
            LossRow<T> row{};
            row.v = in_place<T>(a.v, item.sample, first);
            row.x0 = in_place<T>(a.x0, item.sample, first);
            row.noise = in_place<T>(a.noise, item.sample, first);
            row.u = in_place<T>(a.u, item.sample, first);
            row.uncond = in_place<T>(a.u_uncond, item.sample, first);
            row.guidance = a.guidance;
            row.lam = lam;
            return row;
          });
      continue;
    }
    double total = 0.0;
    for (int64_t first = item.first; first < item.last; first += kShortStep) {
      const int64_t n = std::min(kShortStep, item.last - first);
      const Guided<T> u = guided<T>(a, item.sample, first, scratch[0], scratch[1], n);
      const T* v = typed<T>(a.v, item.sample, first, scratch[2], n);
      const T* x0 = typed<T>(a.x0, item.sample, first, scratch[3], n);
      const T* noise = typed<T>(a.noise, item.sample, first, scratch[4], n);
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const float velocity = widen(v[i]), difference = u(i, has_uncond) - velocity;
        const float error = velocity - (widen(noise[i]) - widen(x0[i]));
        sum += difference * (2.f * error + lam * difference);
        d[i] = difference;
        e[i] = error;
      }
      total += sum;
      for (const Combination& each : outputs)
        if (each.output)
          store_combination<T>(a.extent, each, item.sample, first, d, e, scratch[7], n);
    }
    a.partial[index] = total;
  }
}

template <class T>
FK_INLINE bool all_of(const FGM& a) {
  return all_of<T>(a.u, a.v, a.x0, a.noise, a.u_uncond, a.grad_u, a.grad_v, a.grad_x0, a.grad_noise,
                   a.grad_u_uncond);
}

}  // namespace

FK_CLONES void fgm_size(const FGM& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a) && a.u_uncond)
    fgm_size_items<BFloat16>(a, begin, end, std::true_type{});
  else if (all_of<BFloat16>(a))
    fgm_size_items<BFloat16>(a, begin, end, std::false_type{});
  else if (a.u_uncond)
    fgm_size_items<float>(a, begin, end, std::true_type{});
  else
    fgm_size_items<float>(a, begin, end, std::false_type{});
}

void fgm_omega(const FGM& a, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const float weight = value_of(a.weight, sample);
    a.omega[sample] = weight;
    if (!a.sid) continue;
    const double size =
        sample_sum(a.size, sample, a.extent.chunks) / static_cast<double>(a.extent.elements);
    a.omega[sample] =
        weight * static_cast<float>(value_of(a.t, sample) / (2.0 * std::max(size, 1e-5)));
  }
}

// With ω scaled by the reduction and grad_output:
//   ∂u = ω (2λ d + 2 e), ∂u_cond = guidance ∂u, ∂u_uncond = (1 - guidance) ∂u
//   ∂v = ω (2(1-λ) d - 2 e)      ∂x0 = 2ω d      ∂noise = -2ω d
FK_CLONES void fgm(const FGM& a, int64_t begin, int64_t end) {
  const LossRows<float>* own = all_of<float>(a) ? loss_rows<float>() : nullptr;
  if (all_of<BFloat16>(a) && a.u_uncond)
    fgm_items(a, loss_rows<BFloat16>(), begin, end, std::true_type{});
  else if (all_of<BFloat16>(a))
    fgm_items(a, loss_rows<BFloat16>(), begin, end, std::false_type{});
  else if (a.u_uncond)
    fgm_items(a, own, begin, end, std::true_type{});
  else
    fgm_items(a, own, begin, end, std::false_type{});
}

int32_t fgm_total(const FGM& a, float* loss) {
  const double scale = loss_scale(a.extent);
  double total = 0.0;
  int32_t skipped = 0;
  for (int64_t sample = 0; sample < a.extent.batch; ++sample) {
    const double weighted =
        static_cast<double>(a.omega[sample]) * sample_sum(a.partial, sample, a.extent.chunks);
    const auto mean = static_cast<float>(weighted / static_cast<double>(a.extent.elements));
    double value = scale * weighted;
    if (!std::isfinite(mean) || !std::isfinite(value_of(a.t, sample))) {
      value = 0.0;
      ++skipped;
      a.omega[sample] = NAN;
      for (const View& gradient : {a.grad_u, a.grad_v, a.grad_x0, a.grad_noise, a.grad_u_uncond})
        if (gradient) zero(gradient, sample, 0, a.extent.elements);
    }
    if (a.extent.reduction == Reduction::none) loss[sample] = static_cast<float>(value);
    total += value;
  }
  if (a.extent.reduction == Reduction::none) return skipped;
  if (a.extent.reduction == Reduction::mean && a.extent.batch == 0) total = NAN;
  *loss = static_cast<float>(total);
  return skipped;
}

}  // namespace flowkernels
