"""``flowkernels.patch``: new forwards for the blocks of a diffusers transformer, on the instance.

Nothing is copied and nothing is renamed: parameters, buffers, children, configuration and classes
stay as they are. A patched block has a ``forward`` of its own and a small state beside it; each
call looks at what it is given and takes diffusers' forward for what it does not serve.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from flowkernels.integrations._state import ATTRIBUTE, OPS, Chain, State, bind, own_forward, unbind
from flowkernels.integrations.report import PATCHED, SKIPPED, Fallback, Report, Row

__all__ = ["Handle", "NotPatchedError", "patch"]

_HANDLE = "_flowkernels_handle"

_ROUNDS_ONCE = "not exact: rounds once where eager rounds after every operation"
_NOT_EXACT = {
    "modulated_norm": _ROUNDS_ONCE,
    "gated_residual": _ROUNDS_ONCE,
    "gated_residual_norm": _ROUNDS_ONCE,
    "qk_norm_rope": "not exact: sums the squares in another order than eager",
    "joint_attention": "not exact: its sums may be taken in another order than eager's",
}


class NotPatchedError(RuntimeError):
    """``strict=True`` found something that would be skipped; nothing was changed."""


def patch(
    model: nn.Module,
    ops: str | Collection[str] = "auto",
    exact: bool = False,
    strict: bool = False,
    dry_run: bool = False,
) -> Handle:
    """Run the transformer blocks of a diffusers model as chains of fused operators.

    Served: SD3Transformer2DModel and FluxTransformer2DModel (joint attention included), and the
    norms, gates and feed-forwards of FLUX.2, Qwen-Image, Sana, DiT and PixArt. Only modules of
    exactly these classes, only on this instance. ``state_dict``, ``save_pretrained``, LoRA through
    peft, gradient checkpointing, ``torch.compile`` and ``copy.deepcopy`` work as before. A call
    that is not served (IP-Adapter, ``joint_attention_kwargs``, feed-forward chunking, float64,
    ...) takes the original forward, and the report says so.

    Args:
        model: A diffusers transformer, or a module that contains one; patching it again replaces
            the choices made before.
        ops: ``"auto"`` for all, or names out of ``modulated_norm``, ``gated_residual``,
            ``gated_residual_norm``, ``qk_norm_rope``, ``joint_attention``, ``gelu_tanh``.
        exact: Keep every rounding of eager diffusers in the forward pass, bit for bit; operators
            that cannot are left out and named in the report.
        strict: Raise if anything that ``ops`` asks for would be skipped.
        dry_run: Change nothing; the handle only reports.

    Returns:
        The model's :class:`Handle`, the same one each time it is patched.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: An unknown name in ``ops``.
        NotPatchedError: With ``strict``.
        ImportError: diffusers is not installed.

    Example:
        >>> import flowkernels
        >>> from diffusers import SD3Transformer2DModel
        >>> model = SD3Transformer2DModel(
        ...     sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        ...     joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        ... )
        >>> with flowkernels.patch(model) as handle:
        ...     len(handle.report().patched)
        6
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, need a torch.nn.Module such as pipe.transformer"
        )
    chosen = _names(ops)
    # A compiled model's modules are those of the model inside.
    model = getattr(model, "_orig_mod", model)
    plan = Plan(model, chosen, bool(exact))
    if strict and plan.report().missing:
        first, *others = plan.report().missing
        raise NotPatchedError(
            f"strict: {first.module or 'the model'}, {first.op}: {first.why}"
            + (f" (and {len(others)} more: see the report of a dry run)" if others else "")
        )
    if dry_run:
        return Handle(model, plan, applied=False)
    handle = model.__dict__.get(_HANDLE)
    if handle is None:
        handle = Handle(model, plan, applied=True)
        object.__setattr__(model, _HANDLE, handle)
    handle._apply(plan)
    return handle


def _names(ops: str | Collection[str]) -> frozenset[str]:
    if isinstance(ops, str):
        if ops != "auto":
            raise ValueError(f'ops: got {ops!r}, need "auto" or a collection out of {_listed()}')
        return frozenset(OPS)
    unknown = sorted(str(name) for name in ops if name not in OPS)
    if unknown:
        raise ValueError(f"ops: got {', '.join(unknown)}, need names out of {_listed()}")
    return frozenset(ops)


def _listed() -> str:
    return ", ".join(OPS)


class Plan:
    """Which modules of a model are served, by which operators, and why the others are not."""

    def __init__(self, model: nn.Module, ops: frozenset[str], exact: bool) -> None:
        self.ops, self.exact = ops, exact
        self.rows: list[Row] = []
        self.served: list[tuple[str, nn.Module, Chain]] = []
        for name, module, chain, why in find(model):
            if chain is None:
                self.rows.append(Row(name, "-", SKIPPED, why))
                continue
            rows = [self._row(name, module, chain, op, why) for op in chain.ops(module)]
            self.rows += rows
            if any(row.status == PATCHED for row in rows):
                self.served.append((name, module, chain))
        if not self.rows:
            self.rows.append(
                Row("", "-", SKIPPED, f"not served: no chain for {type(model).__name__}{absent()}")
            )
        self.title = f"flowkernels.patch of {type(model).__name__}" + (", exact" if exact else "")

    def report(self) -> Report:
        return Report(self.title, self.rows)

    def _row(self, name: str, module: nn.Module, chain: Chain, op: str, why: str | None) -> Row:
        if op not in self.ops:
            return Row(name, op, SKIPPED, "not among ops", wanted=False)
        if why is not None:
            return Row(name, op, SKIPPED, why)
        if not self.exact:
            within = op == "qk_norm_rope" and "joint_attention" in self.ops
            return Row(name, op, PATCHED, "within joint_attention" if within else "")
        return Row(name, op, *_exactly(op, module, chain))


def _exactly(op: str, module: nn.Module, chain: Chain) -> tuple[str, str]:
    """Whether an operator keeps eager's bits, for this module's devices and dtypes."""
    if op == "joint_attention" and chain.exact_layout:
        return PATCHED, "the joint layout alone: norms, rotation and softmax are diffusers' own"
    if op in _NOT_EXACT:
        return SKIPPED, _NOT_EXACT[op]
    from flowkernels.integrations._chain import check_gelu

    kinds = {(p.device, p.dtype) for p in module.parameters() if p.is_floating_point()}
    if all(check_gelu(device, dtype) for device, dtype in kinds):
        return PATCHED, "equal to eager for every value of the dtype (all were tried)"
    return SKIPPED, "not exact: its tanh is not torch's to the bit"


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module, Chain | None, Any]]:
    """(name, module, chain, why not) of every module with a chain, or that had one but for why."""
    from flowkernels.integrations._registry import CHAINS, MODELS

    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Chain | None, Any]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        chain = CHAINS.get(type(module))
        if chain is not None:
            yield name, module, chain, _unserved(module, chain)
            return
        if isinstance(module, (*CHAINS, *MODELS)) and type(module) not in MODELS:
            known = next(kind for kind in (*CHAINS, *MODELS) if isinstance(module, kind))
            why = f"{type(module).__name__} is a subclass of {known.__name__}: exact types only"
            yield name, module, None, why
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, "")


def absent() -> str:
    """Chains that this diffusers has no classes for."""
    from flowkernels.integrations._registry import ABSENT

    return f" ({'; '.join(ABSENT)})" if ABSENT else ""


def _unserved(module: nn.Module, chain: Chain) -> str | None:
    ours = module.__dict__.get(ATTRIBUTE) is not None
    if not ours and own_forward(module) is not None:
        return "its forward is wrapped on the instance (offloading, a cache, a hook)"
    from flowkernels.integrations._sources import drift

    return drift(chain.sources) or chain.structure(module)


class Handle:
    """What :func:`patch` returns: the report, and the way back. Also a context manager."""

    def __init__(self, model: nn.Module, plan: Plan, applied: bool) -> None:
        self.model = model
        self._title, self._rows = plan.title, plan.rows
        self._bound: list[tuple[str, nn.Module, Chain]] = []
        self._past: list[Fallback] = []
        self._active = applied
        self._depth = 0

    def report(self) -> Report:
        """What is patched, what is skipped and why; ``str()`` of it is the table."""
        title = self._title + ("" if self._active else ", not applied")
        gone = sum(ATTRIBUTE not in module.__dict__ for _, module, _ in self._bound)
        if gone:
            title += f", {gone} of {len(self._bound)} modules reverted by another handle"
        return Report(title, self._rows, [*self._past, *self._fallbacks()])

    def revert(self) -> None:
        """The original model, to the bit. A second call does nothing.

        Where a hook has wrapped a patched forward since, the wrapper stays and what it wraps
        calls the original.
        """
        self._past += self._fallbacks()
        for _, module, chain in self._bound:
            unbind(module, chain.forward)
        self._bound = []
        self._active = False
        if self.model.__dict__.get(_HANDLE) is self:
            object.__delattr__(self.model, _HANDLE)

    def __enter__(self) -> Handle:
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.revert()

    def _apply(self, plan: Plan) -> None:
        served, chosen = {id(module) for _, module, _ in plan.served}, (plan.ops, plan.exact)
        for _, module, chain in self._bound:
            if id(module) not in served:
                unbind(module, chain.forward)
        for name, module, chain in plan.served:
            old: State | None = module.__dict__.get(ATTRIBUTE)
            same = old is not None and (old.ops, old.exact, old.active) == (*chosen, True)
            if not same or own_forward(module) is None:
                bind(module, chain.forward, State(name, plan.ops, plan.exact))
        self._title, self._rows, self._bound = plan.title, plan.rows, plan.served
        self._active = True

    def _fallbacks(self) -> Iterator[Fallback]:
        for name, module, _ in self._bound:
            state: State | None = module.__dict__.get(ATTRIBUTE)
            for why, calls in state.fallbacks.items() if state is not None else ():
                yield Fallback(name, why, calls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        copied = Handle.__new__(Handle)
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__, _rows=list(self._rows), _past=[], _depth=0)
        copied.model = copy.deepcopy(self.model, memo)
        copied._bound = [
            (name, copy.deepcopy(module, memo), chain) for name, module, chain in self._bound
        ]
        return copied

    def __reduce__(self) -> Any:
        # A pickled model comes back unpatched.
        return (type(None), ())

    def __repr__(self) -> str:
        patched = len(self.report().patched)
        return f"Handle({type(self.model).__name__}, {patched} operators patched)"
