// What an adaptive solver decides after each step, and its plan of the next one: C++ and CUDA.
//
//   accepted = moving and (ratio <= 1 or dt <= min_step)
//   size'    = clamp(size * clip(safety * ratio^(-1/order), least, ifactor), min_step, max_step),
//              least = 1 after a ratio below 1, else dfactor
//   t'       = t1 where accepted, else t
//
// The next step, of dt = size' from t' to t1', stands still (dt = 0) once t' has reached the end.
// Numbers of samples lie in rows of a plan [kPlanRows, columns]; the record of a step is its plan
// with the ratio and what was decided. No FMA: the numbers are those of separate operators.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FK_BOTH __host__ __device__ inline
#else
#define FK_BOTH inline
#endif

namespace flowkernels {

// t, t1, dt in the caller's time (signed), the size before the step stood still, and below.
enum PlanRow { kStart, kEnd, kStep, kSize, kRatio, kFlags, kPlanRows };
constexpr int kAccepted = 1, kMoving = 2, kStuck = 4;  // stuck: t + dt is t

constexpr int kMostNodes = 64;

struct StepControl {
  double order, safety, ifactor, dfactor, min_step, max_step;
  double end;   // of the solve
  double sign;  // of the caller's time
  int32_t node_count;
  bool double_times;
  double nodes[kMostNodes];  // of the stages after the first
  int64_t columns;
  const double* plan;  // of the step that was taken
  double* record;
  double* next;       // the plan of the next step
  bool* accepted;     // [columns]
  void* stage_times;  // [node_count, columns], the caller's, of the next step
};

FK_BOTH double plus_product(double t, double c, double dt) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(t, __dmul_rn(c, dt));
#else
  return t + c * dt;
#endif
}

// Keeps a NaN.
FK_BOTH double clamped(double x, double least, double most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

FK_BOTH double next_size(const StepControl& a, double dt, double ratio) {
  double factor = a.ifactor;
  if (ratio != 0.) {
    const double least = ratio < 1. ? 1. : a.dfactor;
    factor = a.safety / pow(ratio, 1. / a.order);
    factor = factor < least ? least : factor;
    factor = factor > a.ifactor ? a.ifactor : factor;
  }
  return clamped(dt * factor, a.min_step, a.max_step);
}

// The stages at a step's end look just before it: the slope may jump there.
template <typename Time>
FK_BOTH void write_times(const StepControl& a, int64_t column, double t, double dt, double t1) {
  for (int32_t i = 0; i < a.node_count; ++i) {
    const double c = a.nodes[i];
    Time at = static_cast<Time>(c == 1. ? t1 : plus_product(t, c, dt));
    if (c == 1.) {
      if constexpr (sizeof(Time) == sizeof(float))
        at = nextafterf(at, -HUGE_VALF);
      else
        at = nextafter(at, -HUGE_VAL);
    }
    static_cast<Time*>(a.stage_times)[i * a.columns + column] = static_cast<Time>(a.sign) * at;
  }
}

// From the ratio of a column's error to its tolerance: its record, and what comes next.
FK_BOTH void control_step(const StepControl& a, int64_t column, double ratio) {
  const auto row = [&](double* table, int index) -> double& {
    return table[index * a.columns + column];
  };
  const auto planned = [&](int index) { return a.plan[index * a.columns + column]; };
  const double dt = a.sign * planned(kStep), largest = 1.7976931348623157e308;
  const int flags = static_cast<int>(planned(kFlags));
  const bool moved = flags & kMoving, accepted = moved && (ratio <= 1. || dt <= a.min_step);
  for (int index = kStart; index <= kSize; ++index) row(a.record, index) = planned(index);
  row(a.record, kRatio) = ratio;
  row(a.record, kFlags) = flags | (accepted ? kAccepted : 0);
  a.accepted[column] = accepted;

  const double t = planned(accepted ? kEnd : kStart);
  double size = moved ? next_size(a, dt, ratio) : planned(kSize);
  size = clamped(fabs(size) <= largest ? size : a.min_step, a.min_step, a.max_step);
  const bool moving = t < a.end;
  const bool stuck = moving && !(t + size > t);
  const double next = moving ? size : 0., t1 = t + next;
  row(a.next, kStart) = t;
  row(a.next, kEnd) = t1;
  row(a.next, kStep) = a.sign * next;
  row(a.next, kSize) = size;
  row(a.next, kRatio) = 0.;
  row(a.next, kFlags) = (moving ? kMoving : 0) | (stuck ? kStuck : 0);
  if (a.double_times)
    write_times<double>(a, column, t, next, t1);
  else
    write_times<float>(a, column, t, next, t1);
}

}  // namespace flowkernels
