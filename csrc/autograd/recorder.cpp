// flowkernels._nodes: calls of losses that put a LossNode into the graph.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

#include "loss_node.h"

namespace flowkernels {
namespace {

std::optional<c10::IValue> value_of(PyObject* argument) {
  if (THPVariable_Check(argument)) return THPVariable_Unpack(argument);
  if (argument == Py_None) return c10::IValue();
  if (PyBool_Check(argument)) return argument == Py_True;
  if (PyLong_Check(argument)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (overflow != 0) return std::nullopt;
    return static_cast<int64_t>(value);
  }
  if (PyFloat_Check(argument)) return PyFloat_AsDouble(argument);
  return std::nullopt;
}

bool is_kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// A tensor that kernels read as it lies.
bool is_readable(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && is_its_memory(tensor) &&
         is_kernel_dtype(tensor.scalar_type()) && tensor.is_contiguous();
}

// Calls a loss's forward operator, (tensors..., settings..., wanted) -> [outputs, kept, gradients],
// and puts a node behind the first output.
class Recorder {
 public:
  Recorder(const std::string& name, std::string title, int64_t differentiable, int64_t tensors,
           int64_t outputs, int64_t kept, py::object backward)
      : operation_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")),
        title_(std::move(title)),
        differentiable_(differentiable),
        tensors_(tensors),
        outputs_(outputs),
        kept_(kept),
        backward_(std::move(backward)) {}

  // (backend, *operands): the outputs, or None where somebody may override what operators do, or
  // torch.jit traces. Somebody has checked the operands and knows that a gradient is asked for.
  py::object record(PyObject* const* arguments, size_t count) const {
    std::optional<torch::jit::Stack> stack = stack_of(arguments + 1, count - 1);
    if (!stack) return py::none();
    return recorded(*stack, py::reinterpret_borrow<py::object>(arguments[0]), arguments + 1);
  }

  // (backends, *operands): the same for operands that nobody has checked, with a graph or without;
  // None, too, where they are not plain. `backends` says by type of device which one serves them.
  py::object record_plain(PyObject* const* arguments, size_t count) const {
    std::optional<torch::jit::Stack> stack = stack_of(arguments + 1, count - 1);
    if (!stack || !are_plain(*stack)) return py::none();
    PyObject* backend = PyDict_GetItemString(
        arguments[0], (*stack)[0].toTensor().is_cpu() ? "cpu" : "cuda");  // no others are plain
    if (backend == nullptr || PyUnicode_CompareWithASCIIString(backend, "reference") == 0)
      return py::none();
    if (asks_for_gradient(*stack))
      return recorded(*stack, py::reinterpret_borrow<py::object>(backend), arguments + 1);
    stack->emplace_back(int64_t{0});
    return wrapped_outputs(call(*stack));
  }

 private:
  // None where operators may be overridden or traced, or an argument is none that they take.
  std::optional<torch::jit::Stack> stack_of(PyObject* const* arguments, size_t count) const {
    if (at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled() ||
        count + 1 != operation_.schema().arguments().size())
      return std::nullopt;
    std::optional<torch::jit::Stack> stack(std::in_place);
    stack->reserve(count + 1);
    for (size_t i = 0; i < count; ++i) {
      if (THPVariable_Check(arguments[i]) && !THPVariable_CheckExact(arguments[i]))
        return std::nullopt;
      std::optional<c10::IValue> value = value_of(arguments[i]);
      if (!value) return std::nullopt;
      stack->push_back(*std::move(value));
    }
    return stack;
  }

  // What the checks in Python come to for most calls: the tensors that have a gradient are of one
  // dtype, shape and device, the others vectors [B] that ask for none, and no transform of
  // torch.func is active. Ints given for floats are made floats.
  bool are_plain(torch::jit::Stack& stack) const {
    if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
        !stack[0].isTensor())
      return false;
    const Tensor& x = stack[0].toTensor();
    if (x.dim() == 0 || !(x.is_cpu() || x.is_cuda())) return false;
    const std::vector<c10::Argument>& schema = operation_.schema().arguments();
    for (size_t i = 0; i < stack.size(); ++i) {
      const c10::TypePtr& type = schema[i].type();
      if (stack[i].isNone() && type->kind() == c10::TypeKind::OptionalType) continue;
      if (i >= static_cast<size_t>(tensors_)) {
        if (stack[i].isInt() && type->kind() == c10::TypeKind::FloatType)
          stack[i] = static_cast<double>(stack[i].toInt());
        if (!(type->kind() == c10::TypeKind::FloatType  ? stack[i].isDouble()
              : type->kind() == c10::TypeKind::BoolType ? stack[i].isBool()
                                                        : stack[i].isInt()))
          return false;
        continue;
      }
      if (!stack[i].isTensor()) return false;
      const Tensor& tensor = stack[i].toTensor();
      if (!is_readable(tensor) || tensor.device() != x.device()) return false;
      if (i < static_cast<size_t>(differentiable_)
              ? tensor.scalar_type() != x.scalar_type() || tensor.sizes() != x.sizes()
              : tensor.dim() != 1 || tensor.size(0) != x.size(0) || tensor.requires_grad())
        return false;
    }
    return true;
  }

  bool asks_for_gradient(const torch::jit::Stack& stack) const {
    if (at::GradMode::is_enabled())
      for (int64_t i = 0; i < differentiable_; ++i)
        if (stack[i].isTensor() && stack[i].toTensor().requires_grad()) return true;
    return false;
  }

  std::vector<Tensor> call(torch::jit::Stack& stack) const {
    const py::gil_scoped_release unlocked;
    const at::AutoDispatchBelowADInplaceOrView below;
    operation_.callBoxed(&stack);
    return stack[0].toTensorVector();
  }

  py::object recorded(torch::jit::Stack& stack, py::object backend,
                      PyObject* const* arguments) const {
    auto node = make_node<LossNode>();
    Computation& computation = *node->computation;
    bool stores = true;
    for (int64_t i = 0; i < differentiable_; ++i) {
      const bool needed = stack[i].isTensor() && stack[i].toTensor().requires_grad();
      node->add_next_edge(needed ? torch::autograd::impl::gradient_edge(stack[i].toTensor())
                                 : torch::autograd::Edge());
      computation.wanted |= int64_t{needed} << i;
      stores &= !needed || stack[i].toTensor().scalar_type() != at::kHalf;
    }
    for (int64_t i = 0; i < tensors_; ++i) {
      computation.present.push_back(stack[i].isTensor());
      if (stack[i].isTensor()) node->saved->emplace_back(stack[i].toTensor(), /*is_output=*/false);
    }
    py::tuple settings(stack.size() - tensors_ + 1);
    settings[0] = std::move(backend);
    for (size_t i = 1; i < settings.size(); ++i)
      settings[i] = py::reinterpret_borrow<py::object>(arguments[tensors_ + i - 1]);
    computation.settings = std::move(settings);
    computation.backward = backward_;
    node->title = title_;
    stack.emplace_back(stores ? computation.wanted : int64_t{0});
    std::vector<Tensor> found = call(stack);
    for (int64_t i = outputs_; i < outputs_ + kept_; ++i) {
      computation.present.push_back(true);
      node->saved->emplace_back(found[i], /*is_output=*/false);
    }
    node->stored.assign(found.begin() + outputs_ + kept_, found.end());
    torch::autograd::set_history(found[0], node);
    return wrapped_outputs(std::move(found));
  }

  py::object wrapped_outputs(std::vector<Tensor> found) const {
    if (outputs_ == 1) return wrapped(found[0]);
    found.resize(outputs_);
    return wrapped_all(found);
  }

  c10::OperatorHandle operation_;
  std::string title_;
  int64_t differentiable_, tensors_, outputs_, kept_;
  py::object backward_;
};

// A function of Python, called without a tuple of its arguments.
template <py::object (Recorder::*function)(PyObject* const*, size_t) const>
PyObject* called(PyObject* recorder, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count > 0, "a recorder takes the backend and the operands");
  const auto* self = static_cast<Recorder*>(PyCapsule_GetPointer(recorder, nullptr));
  return (self->*function)(arguments, static_cast<size_t>(count)).release().ptr();
  END_HANDLE_TH_ERRORS
}

template <py::object (Recorder::*function)(PyObject* const*, size_t) const>
py::object method(const char* name, const py::capsule& recorder) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<function>)),
      METH_FASTCALL, nullptr};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, recorder.ptr()));
}

py::tuple recorder(const std::string& name, std::string title, int64_t differentiable,
                   int64_t tensors, int64_t outputs, int64_t kept, py::object backward) {
  auto made = std::make_unique<Recorder>(name, std::move(title), differentiable, tensors, outputs,
                                         kept, std::move(backward));
  const py::capsule owner(made.release(),
                          [](void* memory) { delete static_cast<Recorder*>(memory); });
  return py::make_tuple(method<&Recorder::record>("record", owner),
                        method<&Recorder::record_plain>("record_plain", owner));
}

}  // namespace
}  // namespace flowkernels

PYBIND11_MODULE(_nodes, m) {
  namespace py = pybind11;
  m.doc() = "The autograd node of losses, for the version of torch it was built with.";
  m.def("recorder", &flowkernels::recorder, py::arg("operator"), py::arg("title"),
        py::arg("differentiable"), py::arg("tensors"), py::arg("outputs"), py::arg("kept"),
        py::arg("backward"), "The functions record and record_plain of one loss.");
}
