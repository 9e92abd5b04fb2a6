"""Exponential moving averages of a model's parameters, apart from any optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flowkernels.ops import multi_tensor
from flowkernels.ops.multi_tensor._layout import walkable
from flowkernels.optim._averages import Swap, Swapper, averaged_state_dict, check_index
from flowkernels.optim._checks import check_decays, check_parameters
from flowkernels.optim._interchange import state_dtype

Tensor = torch.Tensor


class EMA:
    """Moving averages ``ema_k = lerp(ema_k, parameter, 1 - decay_k)``, all in one sweep.

    Averages are float32 for parameters of 16 bits (at a decay of 0.9999 a bfloat16 average would
    never move), float64 for float64 ones, and start from the parameters as they are.

    Args:
        model_or_params: A module, or parameters. A module's averages are named as its parameters,
            others "0", "1", …
        decays: One decay or several, each in [0, 1).

    Raises:
        ValueError: A decay is out of range.
        TypeError: A parameter is complex.

    Example:
        >>> import torch
        >>> from flowkernels.optim import EMA
        >>> model = torch.nn.Linear(2, 2)
        >>> ema = EMA(model, (0.9, 0.999))
        >>> ema.update()
        >>> sorted(ema.state_dict(1))
        ['bias', 'weight']
        >>> with ema.swap(1):
        ...     averaged = model(torch.ones(1, 2))
    """

    def __init__(
        self, model_or_params: torch.nn.Module | Iterable[Tensor], decays: float | Iterable[float]
    ) -> None:
        self.decays = check_decays(decays, "decays")
        self._model = model_or_params if isinstance(model_or_params, torch.nn.Module) else None
        if isinstance(model_or_params, torch.nn.Module):
            named: dict[str, Tensor] = dict(model_or_params.named_parameters())
        else:
            named = {str(index): param for index, param in enumerate(model_or_params)}
        check_parameters(list(named.values()))
        self._params = named
        self.shadows = [
            {name: _shadow(param) for name, param in named.items()} for _ in self.decays
        ]
        self._swapper = Swapper()

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the parameters, in one pass over memory."""
        self._swapper.forbid("update")
        for names, served in self._batches():
            params = [self._params[name] for name in names]
            averages = [shadows[name] for shadows in self.shadows for name in names]
            multi_tensor.ema_(params, averages, self.decays, served=served)

    def _batches(self) -> list[tuple[list[str], bool]]:
        """Names of the parameters that one sweep can take: one device, one backend."""
        batches: dict[Any, list[str]] = {}
        for name, param in self._params.items():
            served = walkable(param, *(shadows[name] for shadows in self.shadows))
            batches.setdefault((param.device, served), []).append(name)
        return [(names, served) for (_, served), names in batches.items()]

    def state_dict(self, i: int | None = None) -> dict[str, Any]:
        """Average ``i`` as the model's state_dict, or (None) everything, to resume from.

        Args:
            i: Index into ``decays``: parameters become their averages in the parameters' dtype,
                buffers stay as they are. None: decays and averages as they are kept.

        Raises:
            IndexError: There is no average ``i``.
        """
        if i is None:
            return {"decays": self.decays, "shadows": [dict(each) for each in self.shadows]}
        shadows = self.shadows[check_index(i, len(self.decays))]
        if self._model is None:
            return {name: shadows[name].to(p.dtype, copy=True) for name, p in self._params.items()}
        averages = {id(param): shadows[name] for name, param in self._params.items()}
        return averaged_state_dict(self._model, averages)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], i: int | None = None) -> None:
        """Load what ``state_dict()`` gave, or a model's state_dict into average ``i``.

        Args:
            state_dict: Either. Of a model's, everything but the parameters is left aside.
            i: Which average a model's state_dict goes to; not needed where there is one.

        Raises:
            ValueError: The number of averages, a name or a shape does not fit; says which.
            IndexError: There is no average ``i``.
        """
        self._swapper.forbid("load_state_dict")
        if i is None and "shadows" in state_dict:
            saved = state_dict["shadows"]
            if len(saved) != len(self.shadows):
                raise ValueError(
                    f"state_dict: got {len(saved)} averages, this EMA keeps {len(self.shadows)}"
                )
            pairs = list(zip(self.shadows, saved, strict=True))
        else:
            if i is None and len(self.decays) != 1:
                raise ValueError(f"i: got None, need which of {len(self.decays)} averages to load")
            pairs = [(self.shadows[check_index(i or 0, len(self.decays))], state_dict)]
        for shadows, values in pairs:
            for name, shadow in shadows.items():
                if name not in values:
                    raise ValueError(f"state_dict: got no {name!r}, need every parameter's")
                if values[name].shape != shadow.shape:
                    raise ValueError(
                        f"state_dict: got shape {tuple(values[name].shape)} for {name!r}, "
                        f"need {tuple(shadow.shape)}"
                    )
        for shadows, values in pairs:
            for name, shadow in shadows.items():
                shadow.copy_(values[name])

    def swap(self, i: int = 0) -> Swap:
        """Exchange the parameters with average ``i``, at once.

        Called again with the same ``i`` it swaps back, bit for bit; so does leaving the returned
        object as a context manager. ``update`` and ``load_state_dict`` refuse in between.

        Raises:
            IndexError: There is no average ``i``.
            RuntimeError: Another average stands in for the parameters.
        """
        shadows = self.shadows[check_index(i, len(self.decays))]
        self._swapper.exchange(
            i, lambda: [(param, shadows[name]) for name, param in self._params.items()]
        )
        return Swap(lambda: self.swap(i))


def _shadow(param: Tensor) -> Tensor:
    target = torch.empty_like(param, dtype=state_dtype(param), requires_grad=False)
    return target.copy_(param.detach())
