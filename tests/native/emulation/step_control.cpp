// C functions over the emulated launchers of csrc/cuda/step_control.cu, for ctypes.
#include "../../../csrc/cuda/runge_kutta.cuh"

using namespace flowkernels;

namespace {

View view_of(void* data, int dtype, int64_t stride) {
  View view;
  view.data = static_cast<char*>(data);
  if (dtype < 3) view.dtype = static_cast<DType>(dtype);
  view.batch_stride = stride;
  return view;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. limits as the operator's.
extern "C" int emulated_control(int dtype, int64_t batch, int64_t elements, int64_t count,
                                void** ks, const double* weights, int per_sample, double* plan,
                                void* y0, void* y1, double rtol, double atol, const double* nodes,
                                int node_count, const double* limits, unsigned* tickets,
                                double* partial, double* record, double* next, bool* accepted,
                                void* times) {
  std::vector<View> stages;
  for (int64_t s = 0; s < count; ++s) stages.push_back(view_of(ks[s], dtype, elements));
  cuda::StageList list{};
  list.batch = batch;
  list.elements = elements;
  list.is_double = dtype == 3;
  list.ks = stages.data();
  list.weights = weights;
  list.count = count;
  StepControl control{};
  control.columns = per_sample ? batch : 1;
  list.dt.data = plan + kStep * control.columns;
  list.dt.is_double = true;
  list.dt.stride = per_sample ? 1 : 0;
  cuda::ErrorTerms terms{};
  terms.y0 = view_of(y0, dtype, elements);
  terms.y1 = view_of(y1, dtype, elements);
  terms.rtol_value = rtol;
  terms.atol_value = atol;
  double* const numbers[] = {&control.order,   &control.safety,   &control.ifactor,
                             &control.dfactor, &control.min_step, &control.max_step,
                             &control.end,     &control.sign};
  for (int i = 0; i < 8; ++i) *numbers[i] = limits[i];
  control.node_count = node_count;
  for (int i = 0; i < node_count; ++i) control.nodes[i] = nodes[i];
  control.double_times = dtype == 3;
  control.plan = plan;
  control.record = record;
  control.next = next;
  control.accepted = accepted;
  control.stage_times = times;
  launches = 0;
  cuda::rk_control(list, terms, control, partial, tickets, nullptr);
  return launches;
}

extern "C" int emulated_begin(int dtype, int64_t batch, int64_t elements, const void* y0,
                              const void* y1, const void* first, const void* last,
                              const bool* accepted, const double* dt, double weight, void* y,
                              void* slope, void* at) {
  cuda::StepBegin a{};
  a.batch = batch;
  a.elements = elements;
  a.is_double = dtype == 3;
  if (dtype < 3) a.dtype = static_cast<DType>(dtype);
  a.y0 = y0;
  a.y1 = y1;
  a.first = first;
  a.last = last;
  a.accepted = accepted;
  a.dt = dt;
  a.weight = weight;
  a.y = y;
  a.slope = slope;
  a.at = at;
  launches = 0;
  cuda::rk_begin(a, nullptr);
  return launches;
}

extern "C" int64_t chunks_of_call(int64_t batch, int64_t elements) {
  cuda::StageList list{};
  list.batch = batch;
  list.elements = elements;
  return cuda::error_chunks(list);
}

extern "C" void order_blocks(bool last_first) { backwards = last_first; }
