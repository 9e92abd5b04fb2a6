// The autograd node of a loss that has its gradients already.
//
// An autograd.Function of Python costs some 20 us more for forward and backward than this, and its
// code more of the caches, where a small loss takes 10 to 50 us altogether. The price: it is built
// for one version of torch, whose C++ interface changes from one to the next. Where it is not
// there, ops/_stored.py runs the same loss through a Python function.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace flowkernels {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// A handle to a node: torch 2.13 counts references in it, torch 2.11 beside it.
using NodePointer = std::decay_t<decltype(std::declval<Tensor&>().grad_fn())>;

template <class T, class Pointer = NodePointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });  // torch::autograd's
  else
    return c10::make_intrusive<T>();
}

inline py::object wrapped(const Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

template <class Tensors>
py::tuple wrapped_all(const Tensors& tensors) {
  py::tuple result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) result[i] = wrapped(tensors[i]);
  return result;
}

// Whether a tensor's memory is its value: under these keys it is not, or not there to be read.
inline bool is_its_memory(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kLazy{
      DispatchKey::Negative,      DispatchKey::Conjugate,        DispatchKey::ZeroTensor,
      DispatchKey::Functionalize, DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper,
      DispatchKey::Python};
  return !tensor.key_set().has_any(kLazy);
}

// Whether the stored gradients are right as they stand: grad_output is a 0-d 1 that the host can
// read. What has no memory (a fake tensor) is a number known to be zero.
inline bool is_one(const Tensor& grad_output) {
  if (grad_output.dim() != 0 || !grad_output.is_cpu() || grad_output.scalar_type() != at::kFloat ||
      !is_its_memory(grad_output))
    return false;
  const void* memory = grad_output.const_data_ptr();
  return memory != nullptr && *static_cast<const float*>(memory) == 1.f;
}

// How Python computes the gradients: objects that may be let go by a thread which does not hold the
// interpreter's lock.
struct Computation {
  py::object backward, settings;
  int64_t wanted = 0;         // bits of the gradients
  std::vector<bool> present;  // which operands there are: the others are None

  variable_list operator()(const Tensor& grad_output, const variable_list& operands,
                           const variable_list& stored) const {
    const py::gil_scoped_acquire lock;
    py::tuple all(present.size());
    size_t next = 0;
    for (size_t i = 0; i < present.size(); ++i)
      all[i] = present[i] ? wrapped(operands[next++]) : py::none();
    const py::object found = py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(
        backward.ptr(), wrapped(grad_output).ptr(), all.ptr(), py::list(wrapped_all(stored)).ptr(),
        py::int_(wanted).ptr(), settings.ptr(), nullptr));
    if (!found) {
      python_error error;
      error.persist();
      throw std::move(error);
    }
    variable_list gradients;
    for (const py::handle each : found)
      gradients.push_back(each.is_none() ? Tensor() : THPVariable_Unpack(each.ptr()));
    return gradients;
  }

  ~Computation() {
    if (!Py_IsInitialized()) {
      backward.release();
      settings.release();
      return;
    }
    const py::gil_scoped_acquire lock;
    backward = py::object();
    settings = py::object();
  }
};

// What hands out stored gradients, or has them computed. ops/_losses.py says when which.
struct LossNode : public Node {
  std::string title;
  std::shared_ptr<Computation> computation = std::make_shared<Computation>();
  // Shared: one thread may free the graph while another walks it.
  std::shared_ptr<std::vector<SavedVariable>> saved =
      std::make_shared<std::vector<SavedVariable>>();
  variable_list stored;

  std::string name() const override { return title; }

  void release_variables() override {
    // Let go of outside the lock: that may run Python.
    variable_list gradients;
    std::shared_ptr<std::vector<SavedVariable>> operands;
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients.swap(stored);
    operands.swap(saved);
  }

  variable_list apply(variable_list&& grad_outputs) override {
    const Tensor grad_output = grad_outputs[0];
    if (!grad_output.defined()) return variable_list(num_outputs());
    variable_list gradients;
    std::shared_ptr<std::vector<SavedVariable>> operands;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      operands = saved;
      if (!at::GradMode::is_enabled()) gradients.swap(stored);  // handed out once
    }
    if (gradients.empty() || !is_one(grad_output))
      gradients = (*computation)(grad_output, unpacked(operands.get()), gradients);
    return placed(gradients, computation->wanted, num_outputs());
  }

  // Compiled autograd: what its graphs are told apart by (settings are their constants), and the
  // call that it traces.
  void compiled_args(CompiledNodeArgs& args) const override {
    const py::gil_scoped_acquire lock;
    args.collect(title);
    args.collect(computation->wanted);
    args.collect(py::repr(computation->settings).cast<std::string>());
    args.collect(computation->present);
    TORCH_CHECK(saved, torch::autograd::ERR_BACKWARD_TWICE);
    args.collect(*saved, /*is_output=*/false);
  }

  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 SwapSavedVariables& swap) override {
    swap.before(*saved);
    const variable_list tensors = unpacked(saved.get());
    const auto call = [computation = computation, results = num_outputs()](
                          const variable_list& inputs, const std::vector<c10::IValue>& values) {
      if (!inputs[0].defined()) return variable_list(results);
      variable_list operands;
      for (const c10::IValue& value : values) operands.push_back(value.toTensor());
      return placed((*computation)(inputs[0], operands, {}), computation->wanted, results);
    };
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::vector<at::TypePtr> schema(tensors.size(), at::TensorType::get());
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), title, call, schema,
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    variable_list results = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, grad_outputs,
        std::vector<c10::IValue>(tensors.begin(), tensors.end()),
        torch::dynamo::autograd::
            IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                torch::dynamo::autograd::get_input_metadata(next_edges())));
    swap.after(*saved);
    return results;
  }

 private:
  static variable_list unpacked(const std::vector<SavedVariable>* saved) {
    TORCH_CHECK(saved, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list tensors;
    for (const SavedVariable& each : *saved) tensors.push_back(each.unpack());
    return tensors;
  }

  static variable_list placed(const variable_list& gradients, int64_t wanted, size_t count) {
    variable_list results(count);
    auto next = gradients.begin();
    for (size_t i = 0; i < count; ++i)
      if (wanted >> i & 1) results[i] = *next++;
    return results;
  }
};

}  // namespace flowkernels
