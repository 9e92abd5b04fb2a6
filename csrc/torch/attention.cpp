// flowkernels::qk_norm_rope_* and joint_heads_* on CPU.
#include "../cpu/heads.h"
#include "../cpu/modulate.h"
#include "common.h"

namespace flowkernels {
namespace {

// Tokens whose share of a weight's gradient is one float32 row. Fixed, whatever the threads.
constexpr int64_t kRowsPerChunk = 32;

enum Rounding : int64_t { kFp32 = 0, kTorch = 1, kDiffusers = 2 };

float* floats(const Tensor& tensor) { return reinterpret_cast<float*>(data(tensor)); }

HeadView heads_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": need [B, S, H, E]");
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, name,
                  ": need a unit stride in the last dimension");
  return {data(tensor), dtype_of(tensor, name), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

const float* angles(const Tensor& tensor, const char* name, int64_t head_dim, int64_t& stride) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == head_dim && head_dim % 2 == 0 &&
                      tensor.scalar_type() == ScalarType::Float && tensor.stride(1) == 1,
                  name, ": need float32 [S, E] with an even E and a unit last stride");
  stride = tensor.stride(0);
  return floats(tensor);
}

// The pieces of one call, in the order of its operands.
class Call {
 public:
  Call(const Tensor& like, double eps, int64_t rounding) : rounding_(rounding) {
    a_.batch = like.size(0);
    a_.heads = like.size(2);
    a_.head_dim = like.size(3);
    a_.eps = static_cast<float>(eps);
    a_.rows_per_chunk = kRowsPerChunk;
  }

  void rope(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
    if (!cos || !sin) return;
    a_.rope.cos = angles(*cos, "cos", a_.head_dim, a_.rope.cos_stride);
    a_.rope.sin = angles(*sin, "sin", a_.head_dim, a_.rope.sin_stride);
    a_.rope.interleaved = interleaved;
  }

  void packing(const OptionalTensor& lengths, const Tensor& k1, const OptionalTensor& k2) {
    if (!lengths) return;
    STD_TORCH_CHECK(lengths->dim() == 2 && lengths->scalar_type() == ScalarType::Int &&
                        lengths->size(1) == (k2 ? 2 : 1),
                    "key_lengths: need int32 [B, streams]");
    a_.packing.lengths = static_cast<const int32_t*>(lengths->data_ptr());
    a_.packing.batch_stride = lengths->stride(0);
    a_.packing.stream_stride = lengths->stride(1);
    a_.packing.rows[0] = k1.size(1);
    a_.packing.rows[1] = k2 ? k2->size(1) : 0;
  }

  // One tensor, whose rows start at row `offset` of `joint`.
  HeadsPiece& add(const Tensor& input, const Tensor& joint, int stream, int64_t offset,
                  const char* name) {
    HeadsPiece& p = a_.pieces[a_.count++];
    p = HeadsPiece{};
    p.input = heads_of(input, name);
    p.joint = heads_of(joint, name);
    p.rows = input.size(1);
    p.joint_rows = joint.size(1);
    p.offset = offset;
    p.stream = stream;
    return p;
  }

  void norm(HeadsPiece& p, const OptionalTensor& weight, const Tensor& rstd) {
    p.norm = true;
    p.weight = view_of(weight, "weight");
    p.rstd = floats(rstd);
    if (rounding_ == kTorch) p.weighted = p.joint.dtype;
    if (rounding_ == kDiffusers) p.normed = p.weighted = p.weight ? p.weight.dtype : p.input.dtype;
  }

  void rotate(HeadsPiece& p, int64_t position) {
    p.rope = a_.rope.cos != nullptr;
    p.position = position;
  }

  void pack(HeadsPiece& p) { p.packed = a_.packing.lengths != nullptr; }
  void drop() { --a_.count; }

  void forward() const {
    int64_t rows = 0;
    for (int i = 0; i < a_.count; ++i) rows += piece_rows(a_, i);
    parallel(rows, a_.heads * a_.head_dim,
             [&](int64_t begin, int64_t end) { heads_forward(a_, begin, end); });
  }

  void backward() const {
    int64_t chunks = 0;
    for (int i = 0; i < a_.count; ++i) chunks += piece_chunks(a_, i);
    parallel(chunks, a_.rows_per_chunk * a_.heads * a_.head_dim,
             [&](int64_t begin, int64_t end) { heads_backward(a_, begin, end); });
  }

  int64_t chunks(const HeadsPiece& p) const {
    return (a_.batch * p.rows + a_.rows_per_chunk - 1) / a_.rows_per_chunk;
  }

 private:
  Heads a_{};
  int64_t rounding_;
};

// Gradients in the order of their bits, whichever order they are asked for in.
class Gradients {
 public:
  explicit Gradients(int64_t wanted) : wanted_(wanted) {}

  bool wants(int bit) const { return wanted_ >> bit & 1; }

  HeadView heads(int bit, const Tensor& input) {
    if (!wants(bit)) return {};
    results_[bit] = empty_like(input, input.scalar_type());
    return heads_of(*results_[bit], "gradient");
  }

  // Partial rows of a weight's gradient; none are written where nothing is normed: it is zero then.
  float* partial(int bit, const OptionalTensor& weight, int64_t chunks) {
    if (!wants(bit) || !weight) return nullptr;
    results_[bit] = empty_like(*weight, weight->scalar_type());
    sums_.push_back({bit, chunks, empty({chunks, weight->size(0)}, ScalarType::Float, *weight)});
    return floats(sums_.back().rows);
  }

  std::vector<Tensor> take() {
    for (const Sum& sum : sums_) {
      Tensor& result = *results_[sum.bit];
      ReducePartials a{};
      a.partial = floats(sum.rows);
      a.batch = 1;
      a.chunks = sum.chunks;
      a.columns = result.size(0);
      a.out = data(result);
      a.out_dtype = dtype_of(result, "gradient");
      reduce_partials(a, 0, 1);
    }
    std::vector<Tensor> found;
    for (OptionalTensor& result : results_)
      if (result) found.push_back(*result);
    return found;
  }

 private:
  struct Sum {
    int bit;
    int64_t chunks;
    Tensor rows;
  };

  int64_t wanted_;
  OptionalTensor results_[10];
  std::vector<Sum> sums_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_forward(
    const Tensor q, const Tensor k, const OptionalTensor q_weight, const OptionalTensor k_weight,
    const OptionalTensor cos, const OptionalTensor sin, bool interleaved, double eps,
    int64_t rounding) {
  Call call(q, eps, rounding);
  call.rope(cos, sin, interleaved);
  const auto add = [&](const Tensor& x, const OptionalTensor& weight, const char* name) {
    Tensor out = empty_like(x, promote(x.scalar_type(), weight));
    Tensor rstd = empty({x.size(0), x.size(1), x.size(2)}, ScalarType::Float, x);
    HeadsPiece& p = call.add(x, out, 0, 0, name);
    call.norm(p, weight, rstd);
    call.rotate(p, 0);
    return std::make_pair(out, rstd);
  };
  const auto [q_out, q_rstd] = add(q, q_weight, "q");
  const auto [k_out, k_rstd] = add(k, k_weight, "k");
  call.forward();
  return {q_out, k_out, q_rstd, k_rstd};
}

std::vector<Tensor> qk_norm_rope_backward(const Tensor grad_q, const Tensor grad_k, const Tensor q,
                                          const Tensor k, const OptionalTensor q_weight,
                                          const OptionalTensor k_weight, const OptionalTensor cos,
                                          const OptionalTensor sin, const Tensor q_rstd,
                                          const Tensor k_rstd, bool interleaved, double eps,
                                          int64_t rounding, int64_t wanted) {
  Call call(q, eps, rounding);
  call.rope(cos, sin, interleaved);
  Gradients gradients(wanted);
  const auto add = [&](int bit, const Tensor& grad, const Tensor& x, const OptionalTensor& weight,
                       const Tensor& rstd, const char* name) {
    HeadsPiece& p = call.add(x, grad, 0, 0, name);
    call.norm(p, weight, rstd);
    call.rotate(p, 0);
    p.grad = gradients.heads(bit, x);
    p.partial = gradients.partial(bit + 2, weight, call.chunks(p));
    if (!p.grad && !p.partial) call.drop();
  };
  add(0, grad_q, q, q_weight, q_rstd, "q");
  add(1, grad_k, k, k_weight, k_rstd, "k");
  call.backward();
  return gradients.take();
}

// Everything of a joint call that its two directions share.
struct Streams {
  const Tensor* x[6];                // q, k, v of each stream; null where there is one stream
  const OptionalTensor* weights[4];  // q, k of each stream
  bool norm[2];

  int count() const { return x[3] ? 6 : 3; }

  // Rows of the joint q (0), k (1) or v (2).
  int64_t rows(int kind) const { return x[kind]->size(1) + (x[3] ? x[3 + kind]->size(1) : 0); }

  ScalarType dtype() const {
    ScalarType found = x[0]->scalar_type();
    for (int i = 1; i < count(); ++i) found = promote(found, x[i]->scalar_type());
    for (const OptionalTensor* weight : weights) found = promote(found, *weight);
    return found;
  }
};

Streams streams_of(const Tensor& q1, const Tensor& k1, const Tensor& v1, const OptionalTensor& q2,
                   const OptionalTensor& k2, const OptionalTensor& v2,
                   const OptionalTensor& q1_weight, const OptionalTensor& k1_weight,
                   const OptionalTensor& q2_weight, const OptionalTensor& k2_weight, bool norm1,
                   bool norm2) {
  const auto pointer = [](const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; };
  return {{&q1, &k1, &v1, pointer(q2), pointer(k2), pointer(v2)},
          {&q1_weight, &k1_weight, &q2_weight, &k2_weight},
          {norm1, norm2}};
}

// Piece i of a joint call: tensor kind i % 3 of stream i / 3.
HeadsPiece& add_piece(Call& call, const Streams& streams, int i, const Tensor& joint,
                      const Tensor& rstd) {
  static constexpr const char* kNames[] = {"q1", "k1", "v1", "q2", "k2", "v2"};
  const int stream = i / 3, kind = i % 3;
  const int64_t offset = stream == 0 ? 0 : streams.x[kind]->size(1);
  HeadsPiece& p = call.add(*streams.x[i], joint, stream, offset, kNames[i]);
  if (kind != 0) call.pack(p);
  if (kind == 2) return p;
  if (streams.norm[stream])
    call.norm(p, *streams.weights[2 * stream + kind], rstd);
  else if (rstd.numel() != 0)
    p.rstd = floats(rstd);
  // Positions are those of the keys: a stream's queries may be absent.
  call.rotate(p, stream == 0 ? 0 : streams.x[1]->size(1));
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> joint_heads_forward(
    const Tensor q1, const Tensor k1, const Tensor v1, const OptionalTensor q2,
    const OptionalTensor k2, const OptionalTensor v2, const OptionalTensor q1_weight,
    const OptionalTensor k1_weight, const OptionalTensor q2_weight, const OptionalTensor k2_weight,
    const OptionalTensor cos, const OptionalTensor sin, const OptionalTensor key_lengths,
    bool norm1, bool norm2, bool interleaved, double eps, int64_t rounding) {
  const Streams streams =
      streams_of(q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight, norm1, norm2);
  const int64_t batch = q1.size(0), heads = q1.size(2), head_dim = q1.size(3);
  const ScalarType dtype = streams.dtype();
  std::vector<Tensor> joint, rstd;
  for (int kind = 0; kind < 3; ++kind)
    joint.push_back(empty({batch, streams.rows(kind), heads, head_dim}, dtype, q1));
  for (int kind = 0; kind < 2; ++kind)
    rstd.push_back(norm1 || norm2 ? empty({batch, streams.rows(kind), heads}, ScalarType::Float, q1)
                                  : empty({0}, ScalarType::Float, q1));
  Call call(q1, eps, rounding);
  call.rope(cos, sin, interleaved);
  call.packing(key_lengths, k1, k2);
  for (int i = 0; i < streams.count(); ++i)
    add_piece(call, streams, i, joint[i % 3], rstd[i % 3 == 0 ? 0 : 1]);
  call.forward();
  return {joint[0], joint[1], joint[2], rstd[0], rstd[1]};
}

std::vector<Tensor> joint_heads_backward(
    const Tensor grad_q, const Tensor grad_k, const Tensor grad_v, const Tensor q1, const Tensor k1,
    const Tensor v1, const OptionalTensor q2, const OptionalTensor k2, const OptionalTensor v2,
    const OptionalTensor q1_weight, const OptionalTensor k1_weight, const OptionalTensor q2_weight,
    const OptionalTensor k2_weight, const OptionalTensor cos, const OptionalTensor sin,
    const OptionalTensor key_lengths, const Tensor q_rstd, const Tensor k_rstd, bool norm1,
    bool norm2, bool interleaved, double eps, int64_t rounding, int64_t wanted) {
  const Streams streams =
      streams_of(q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight, norm1, norm2);
  const Tensor* grads[] = {&grad_q, &grad_k, &grad_v};
  Call call(q1, eps, rounding);
  call.rope(cos, sin, interleaved);
  call.packing(key_lengths, k1, k2);
  Gradients gradients(wanted);
  for (int i = 0; i < streams.count(); ++i) {
    const int stream = i / 3, kind = i % 3;
    HeadsPiece& p = add_piece(call, streams, i, *grads[kind], kind == 0 ? q_rstd : k_rstd);
    p.grad = gradients.heads(i, *streams.x[i]);
    if (kind != 2) {
      const int weight = 2 * stream + kind;
      float* partial =
          gradients.partial(6 + weight, *streams.weights[weight], p.norm ? call.chunks(p) : 0);
      p.partial = p.norm ? partial : nullptr;
    }
    if (!p.grad && !p.partial) call.drop();
  }
  call.backward();
  return gradients.take();
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("qk_norm_rope_forward", TORCH_BOX(&qk_norm_rope_forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("joint_heads_forward", TORCH_BOX(&joint_heads_forward));
  m.impl("joint_heads_backward", TORCH_BOX(&joint_heads_backward));
}
