"""AdamW with exponential moving averages, clipping and low-precision copies in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from flowkernels.ops import multi_tensor
from flowkernels.optim import _checks as checks
from flowkernels.optim import _interchange as interchange
from flowkernels.optim._averages import Swap, Swapper, averaged_state_dict, check_index
from flowkernels.optim._gather import Batch, Gathered, State, gather
from flowkernels.optim._interchange import average_key

Tensor = torch.Tensor


class AdamWEMA(Optimizer):
    """AdamW that clips, skips bad steps and keeps moving averages, without waiting for the device.

    A read-only pass takes the global norm (and with it finiteness); then one sweep over memory::

        g   = grad / grad_scale · min(1, max_grad_norm / (norm + 1e-6))
        m   = lerp(m, g, 1 - β₁),   v = β₂ v + (1 - β₂) g²
        p   = p (1 - lr λ) - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)
        ema = lerp(ema, p, 1 - decay)   for each decay,   copy = p in the copy's dtype

    as ``clip_grad_norm_``, ``torch.optim.AdamW`` and an EMA would one after the other. State is
    float32 for parameters of 16 bits and stays so through ``load_state_dict``; float64 parameters
    have float64 state. With β₁ = 0 there is no first moment, and no buffer for it.

    Where a gradient is not finite the step is skipped: parameters, moments, averages, copies and
    step counts keep every bit. A parameter without a gradient keeps its value, as in torch; its
    averages, if it was ever updated, go on towards that value like those of any EMA.

    Args:
        params: Parameters, named parameters or groups, as for any ``torch.optim.Optimizer``.
        lr: Learning rate: a number, or a tensor of one element on the parameters' device (which a
            captured CUDA graph reads anew at each replay).
        betas: Decays of the first and second moment, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, per unit of ``lr``.
        ema_decays: Decays of the averages to keep, each in [0, 1). An average starts from the
            parameter as it is when its first gradient comes.
        max_grad_norm: Clip the global norm over all groups to this. None: no clipping.
        skip_nonfinite: Skip a step whose norm is not finite. With False and no ``max_grad_norm``
            the norm is not computed.
        grad_scale: What the loss was multiplied by: a number or a tensor of one element. May be
            assigned to between steps (``optimizer.grad_scale = …``).
        low_precision_copies: A tensor (or None) for each parameter in order, written in each step
            with the new value in its own dtype: the bfloat16 weights that a model runs with, where
            ``params`` are their float32 masters. A master without a gradient takes its copy's, and
            ``zero_grad`` clears both. A group may carry its own under this name.

    Attributes:
        skipped: 0-d int64 tensor on the device: steps skipped so far.
        grad_norm: 0-d tensor on the device: the unscaled, unclipped norm of the last step, float32
            (float64 for float64 gradients); NaN before the first step and where not computed.

    Raises:
        ValueError: A hyper-parameter is out of range; the message names it.
        TypeError: A parameter or gradient is complex.
        RuntimeError: (from ``step``) a gradient is sparse, or a norm is asked for over parameters
            of several devices.

    Example:
        >>> import torch
        >>> from flowkernels.optim import AdamWEMA
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = AdamWEMA(model.parameters(), 1e-3, ema_decays=(0.999,), max_grad_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.swap_ema(0):
        ...     averaged = model(torch.ones(2, 4))

    Source: Adam, arXiv 1412.6980; AdamW, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decays: Iterable[float] = (),
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        grad_scale: float | Tensor | None = None,
        low_precision_copies: Iterable[Tensor | None] | None = None,
    ) -> None:
        self.ema_decays = checks.check_decays(ema_decays, "ema_decays")
        self.max_grad_norm = checks.check_max_grad_norm(max_grad_norm)
        self.skip_nonfinite = bool(skip_nonfinite)
        self.grad_scale = grad_scale
        self._copies: dict[Tensor, Tensor] = {}
        self._swapper = Swapper()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if low_precision_copies is not None:
            self._add_copies(self._all_params(), low_precision_copies)
        device = self._all_params()[0].device if self._all_params() else torch.device("cpu")
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)

    @property
    def grad_scale(self) -> float | Tensor | None:
        """What the loss was multiplied by; gradients are divided by it."""
        return self._grad_scale

    @grad_scale.setter
    def grad_scale(self, value: float | Tensor | None) -> None:
        self._grad_scale = checks.check_grad_scale(value)
        self._scale_on: dict[torch.device, Tensor | None] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may carry ``low_precision_copies`` of its own parameters."""
        group = dict(param_group) if isinstance(param_group, dict) else param_group
        copies = group.pop("low_precision_copies", None) if isinstance(group, dict) else None
        super().add_param_group(group)
        try:
            checks.check_group(group)
            checks.check_parameters(group["params"])
            group["betas"] = tuple(float(beta) for beta in group["betas"])
            if copies is not None:
                self._add_copies(group["params"], copies)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _add_copies(self, params: list[Tensor], copies: Iterable[Tensor | None]) -> None:
        listed = checks.check_copies(copies, params)
        pairs = zip(params, listed, strict=True)
        self._copies.update({param: copy for param, copy in pairs if copy is not None})

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    # ---- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. ``closure``, if given, re-evaluates the model; its loss is returned."""
        self._swapper.forbid("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = [gather(group, self._copies, self._states) for group in self.param_groups]
        batches = [batch for each in gathered for batch in each.batches]
        norm = self._norm(batches) if batches else None
        skipped = self._skipped_on(batches[0].device) if batches else None
        for group, each in zip(self.param_groups, gathered, strict=True):
            for batch in each.batches:
                self._update(group, batch, norm, skipped)
                skipped = None  # counted once a step
            self._average_idle(each, norm)
        return loss

    def _states(self, params: list[Tensor], group: dict[str, Any]) -> list[State]:
        """The state of parameters that have a gradient, complete, in order."""
        states = [self.state[param] for param in params]
        first_moment = group["betas"][0] > 0
        count = len(self.ema_decays)
        if any(len(state) != 2 + first_moment + count for state in states):
            for param, state in zip(params, states, strict=True):
                if not first_moment:
                    state.pop("exp_avg", None)
                interchange.complete_state(param, state, count, first_moment)
        return states

    def _norm(self, batches: list[Batch]) -> Tensor | None:
        """The global norm over every batch; None where nobody asks for it."""
        if self.max_grad_norm is None and not self.skip_nonfinite:
            return None
        devices = sorted({str(batch.device) for batch in batches})
        if len(devices) > 1:
            raise RuntimeError(
                f"params: are on {', '.join(devices)}; max_grad_norm and skip_nonfinite take a "
                "norm over all of them and need one device (or None and False)"
            )
        scale = self._scale(batches[0].device)
        norms = []
        for served in (True, False):
            grads = [grad for batch in batches if batch.served is served for grad in batch.grads]
            if grads:
                norms.append(multi_tensor.grad_norm(grads, scale, served=served))
        self.grad_norm = norms[0] if len(norms) == 1 else _root_sum(norms)
        return self.grad_norm

    def _scale(self, device: torch.device) -> Tensor | None:
        if isinstance(self._grad_scale, Tensor):
            return checks.scalar_on(self._grad_scale, device, "grad_scale")
        if device not in self._scale_on:
            self._scale_on[device] = checks.scalar_on(self._grad_scale, device, "grad_scale")
        return self._scale_on[device]

    def _skipped_on(self, device: torch.device) -> Tensor:
        if self.skipped.device != device:  # the model moved after the optimiser was made
            self.skipped = self.skipped.to(device)
        return self.skipped

    def _update(
        self, group: dict[str, Any], batch: Batch, norm: Tensor | None, skipped: Tensor | None
    ) -> None:
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = checks.scalar_on(lr, batch.device, "lr")
        multi_tensor.adamw_ema_(
            batch.params,
            batch.grads,
            batch.states_of("exp_avg") if beta1 else [],
            batch.states_of("exp_avg_sq"),
            batch.averages_of(self._average_keys()),
            batch.copies,
            batch.states_of("step"),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decays=self.ema_decays,
            skipped=skipped,
            norm=norm,
            grad_scale=self._scale(batch.device),
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            served=batch.served,
        )

    def _average_keys(self) -> list[str]:
        return [average_key(index) for index in range(len(self.ema_decays))]

    def _average_idle(self, gathered: Gathered, norm: Tensor | None) -> None:
        """Averages of parameters without a gradient go on, unless the step is skipped."""
        if not self.ema_decays:
            return
        keys = self._average_keys()
        idle = [param for param in gathered.idle if keys[0] in self.state.get(param, ())]
        for device in {param.device for param in idle}:
            params = [param for param in idle if param.device == device]
            averages = [self.state[param][key] for key in keys for param in params]
            multi_tensor.ema_(
                params, averages, self.ema_decays, norm=norm if self.skip_nonfinite else None
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters and of their low-precision copies."""
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            if copy.grad is not None:
                copy.grad = None if set_to_none else copy.grad.detach().zero_()

    # ---- averages ------------------------------------------------------------------------------

    def ema_state_dict(self, model: torch.nn.Module, i: int = 0) -> dict[str, Any]:
        """``model.state_dict()`` with average ``i`` in place of the parameters owned here.

        Args:
            model: Holds the parameters, or their low-precision copies; may hold others too.
            i: Index into ``ema_decays``.

        Returns:
            A state_dict that ``model.load_state_dict`` takes, in the model's dtypes; buffers as
            they are. A parameter that was never updated is its own average. The averages in it are
            copies.

        Raises:
            IndexError: There is no average ``i``.
        """
        pairs = self._average_pairs(check_index(i, len(self.ema_decays)))
        return averaged_state_dict(model, {id(weight): average for weight, average in pairs})

    def swap_ema(self, i: int = 0) -> Swap:
        """Exchange the parameters (and their copies) with average ``i``, at once.

        Called again with the same ``i`` it swaps back, bit for bit; so does leaving the returned
        object as a context manager. ``step`` and ``load_state_dict`` refuse in between. The
        parameters are kept aside meanwhile: as much memory as they take.

        Raises:
            IndexError: There is no average ``i``.
            RuntimeError: Another average stands in for the parameters.
        """
        check_index(i, len(self.ema_decays))
        self._swapper.exchange(i, lambda: self._average_pairs(i))
        return Swap(lambda: self.swap_ema(i))

    def _average_pairs(self, index: int) -> Iterable[tuple[Tensor, Tensor]]:
        """(parameter or copy, average) for everything that was ever updated."""
        key = average_key(index)
        for param in self._all_params():
            average = self.state.get(param, {}).get(key)
            if average is not None:
                yield param, average
                if param in self._copies:
                    yield self._copies[param], average

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As any optimiser's, with the count of skipped steps beside ``state``.

        A parameter's state is ``step``, ``exp_avg`` (unless β₁ = 0), ``exp_avg_sq`` and ``ema_0``,
        ``ema_1``, …
        """
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load an AdamWEMA's state, or a ``torch.optim.AdamW``'s, bit for bit and by copy.

        What the state lacks starts afresh: averages from the parameters as they are now (so load
        the model first), moments from zero. With β₁ = 0 a saved first moment is dropped.

        Raises:
            ValueError: The state is of other parameters, of more averages, or of an update that
                AdamWEMA does not make (amsgrad, maximize, coupled weight decay).
        """
        self._swapper.forbid("load_state_dict")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        owners = interchange.match_groups(self.param_groups, saved_groups)
        groups = [
            interchange.adopt_group(*pair)
            for pair in zip(self.param_groups, saved_groups, strict=True)
        ]
        for group in groups:
            checks.check_group(group)
        first_moment = {p: group["betas"][0] > 0 for group in groups for p in group["params"]}
        state: Any = type(self.state)(dict)
        for key, saved in state_dict["state"].items():
            if key not in owners:
                raise ValueError(f"state_dict: got state for {key!r}, which is in no group")
            param = owners[key]
            count = len(self.ema_decays)
            state[param] = interchange.adopt_state(param, saved, count, first_moment[param])
            interchange.complete_state(param, state[param], count, first_moment[param])
        self.__setstate__({"state": state, "param_groups": groups})
        if "skipped" in state_dict:
            self.skipped.copy_(state_dict["skipped"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def to_adamw_state_dict(self) -> dict[str, Any]:
        """The state as a dict that ``torch.optim.AdamW.load_state_dict`` takes; all copies.

        A first moment that is not kept (β₁ = 0) is written as zeros. Averages are left out. AdamW
        itself casts the moments of 16-bit parameters to the parameters' dtype.
        """
        return interchange.to_adamw(super().state_dict())

    def __getstate__(self) -> dict[str, Any]:
        own = ("ema_decays", "max_grad_norm", "skip_nonfinite", "_grad_scale", "_scale_on")
        kept = (*own, "_copies", "_swapper", "skipped", "grad_norm")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}


def _root_sum(norms: list[Tensor]) -> Tensor:
    """The norm of parts from their norms, in float64 where one is."""
    total = torch.stack([norm.to(torch.float64) for norm in norms]).square().sum().sqrt()
    return total.to(norms[0].dtype if norms[0].dtype == norms[1].dtype else torch.float64)
