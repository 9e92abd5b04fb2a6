"""How a loss whose forward operator writes gradients meets autograd; ``_losses`` says why it does.

There are two ways to record the same graph: the node in C++ (``csrc/autograd``), where it was built
for the torch at hand, and an ``autograd.Function``, which torch.compile can trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowkernels.ops import _autograd, _library, _native
from flowkernels.ops._library import INTERPRETED, Operator
from flowkernels.ops._losses import stores

Tensor = torch.Tensor


class StoredLoss:
    """A loss of ``tensors`` operands and some settings, differentiable in the first of them.

    Its operators, with ``wanted``, the bits of the gradients that are asked for::

        forward(*operands, *settings, wanted) -> [*outputs, *kept, *gradients]
        rescale(gradients, grad_output, *operands, *settings, wanted)
        backward(grad_output, *operands, *settings, wanted) -> gradients

    The first output is the loss, the others have no gradient. What is kept goes to the backward
    pass after the operands. ``single``: there is one gradient, and rescale and backward have it in
    place of a list, and no ``wanted``.
    """

    def __init__(
        self,
        title: str,
        forward: Operator,
        rescale: Operator,
        backward: Operator,
        formula: Callable[..., Tensor],
        *,
        differentiable: int,
        tensors: int,
        outputs: int = 1,
        kept: int = 0,
        single: bool = False,
        backward_arguments: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments,
    ) -> None:
        """``formula(*operands, *kept, *settings)`` is the loss, for a second derivative;
        ``backward_arguments`` makes what rescale and backward take of the same.
        """
        self.forward, self.rescale, self.backward = forward, rescale, backward
        self.formula, self.backward_arguments = formula, backward_arguments
        self.differentiable, self.tensors = differentiable, tensors
        self.outputs, self.kept, self.single = outputs, kept, single
        self._function = _function(title, self)
        self._record = self._record_plain = None
        # The interpreter's kernels are called past the dispatcher, which is all the node knows.
        if _native.NODES is not None and not INTERPRETED:
            self._record, self._record_plain = _native.NODES.recorder(
                f"flowkernels::{forward.name}", f"{title}Backward",
                differentiable, tensors, outputs, kept, self.gradients,
            )  # fmt: skip

    def plain(self, name: str, *arguments: Any) -> Any:
        """What the public function ``name`` answers where its operands are as most are; else None.

        Which is: those that have a gradient are tensors of one kernel dtype, shape and device, the
        others vectors [B] that ask for none, all contiguous, settings are numbers, no backend is
        forced and no tangents are about. C++ finds that out; the checks in Python, which say what
        is wrong, take some 3 µs more.
        """
        if torch.compiler.is_compiling() or self._record_plain is None or _library.forced():
            return None
        if _autograd.in_forward_mode():
            return None
        return self._record_plain(_library.defaults(name), *arguments)

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """The loss, or the tuple of outputs, where a gradient is known to be asked for."""
        if self._record is not None and not torch.compiler.is_compiling():
            _autograd.refuse_transforms(arguments)
            found = self._record(backend, *arguments)
            if found is not None:
                return found
        return _autograd.record(self._function, backend, *arguments)

    def gradients(
        self,
        grad_loss: Tensor,
        saved: Sequence[Tensor | None],
        stored: list[Tensor],
        wanted: int,
        settings: tuple[Any, ...],
    ) -> Sequence[Tensor | None]:
        """The gradients that are wanted, in order; ``settings`` begin with the backend."""
        backend, *settings_of_loss = settings
        if torch.is_grad_enabled():
            count = self.differentiable
            others = (*saved[count:], *settings_of_loss)
            needed = [bool(wanted >> bit & 1) for bit in range(count)]
            found = _autograd.reference_gradients(
                lambda *inputs: self.formula(*inputs, *others), saved[:count], (grad_loss,), needed
            )
            return [gradient for gradient, need in zip(found, needed, strict=True) if need]
        arguments = (grad_loss, *self.backward_arguments(*saved, *settings_of_loss))
        if not self.single:
            if not stored:
                return self.backward(backend, *arguments, wanted)  # type: ignore[no-any-return]
            self.rescale(backend, stored, *arguments, wanted)
        elif not stored:
            return [self.backward(backend, *arguments)]
        else:
            self.rescale(backend, stored[0], *arguments)
        return stored


def _function(title: str, loss: StoredLoss) -> type[_autograd.FusedFunction]:
    class Recorded(_autograd.FusedFunction):
        @staticmethod
        def forward(ctx: Any, backend: str, *arguments: Any) -> Any:
            operands = arguments[: loss.tensors]
            needed = ctx.needs_input_grad[1 : 1 + loss.differentiable]
            wanted = _autograd.mask_of(needed)
            stored = stores(operands[: loss.differentiable], needed)
            found = loss.forward(backend, *arguments, wanted if stored else 0)
            first = loss.outputs + loss.kept
            ctx.save_for_backward(*operands, *found[loss.outputs : first])
            ctx.gradients, ctx.needed, ctx.wanted = list(found[first:]), needed, wanted
            ctx.settings, ctx.arguments = (backend, *arguments[loss.tensors :]), len(arguments)
            ctx.set_materialize_grads(False)  # a gradient that is not there is None, no zeros
            if loss.outputs == 1:
                return found[0]
            ctx.mark_non_differentiable(*found[1 : loss.outputs])
            return tuple(found[: loss.outputs])

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
            if grad_loss is None:
                return (None,) * (1 + ctx.arguments)
            stored = [] if torch.is_grad_enabled() else ctx.gradients
            if stored:
                ctx.gradients = []  # handed out once, and not held on to by what lives longer
            found = loss.gradients(grad_loss, ctx.saved_tensors, stored, ctx.wanted, ctx.settings)
            gradients = _autograd.scatter(found, ctx.needed)
            return (None, *gradients, *(None,) * (ctx.arguments - loss.differentiable))

    return type(title, (Recorded,), {})  # whose node autograd calls <title>Backward
