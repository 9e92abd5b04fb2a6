"""State dictionaries: ours in and out without a cast, and torch.optim.AdamW's."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

Tensor = torch.Tensor

# What torch.optim.AdamW keeps in a group beside what AdamWEMA does, with the values that say the
# same as AdamWEMA's update. The last ones choose an implementation and may differ.
_MEANING = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
_IMPLEMENTATION = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


def average_key(index: int) -> str:
    return f"ema_{index}"


def state_dtype(param: Tensor) -> torch.dtype:
    """float32, and float64 for float64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def match_groups(groups: list[Any], saved: list[Any]) -> dict[Any, Tensor]:
    """From saved parameter ids to the parameters of ``groups``."""
    if len(groups) != len(saved):
        raise ValueError(
            f"state_dict: got {len(saved)} parameter groups, this optimiser has {len(groups)}"
        )
    found: dict[Any, Tensor] = {}
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"state_dict: got {len(other['params'])} parameters in group {index}, "
                f"this optimiser has {len(group['params'])}"
            )
        found.update(zip(other["params"], group["params"], strict=True))
    return found


def adopt_group(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group's hyper-parameters over this group's parameters."""
    taken = deepcopy({key: value for key, value in saved.items() if key != "params"})
    for key, needed in _MEANING.items():
        got = taken.pop(key, needed)
        harmless = key == "decoupled_weight_decay" and saved.get("weight_decay", 0.0) == 0
        if got != needed and not harmless:
            raise ValueError(f"state_dict: got {key}={got}, AdamWEMA needs {needed}")
    for key in _IMPLEMENTATION:
        taken.pop(key, None)
    for key in ("lr", "betas", "eps", "weight_decay"):
        taken.setdefault(key, group[key])
    taken["betas"] = tuple(float(beta) for beta in taken["betas"])
    if "param_names" in group:
        taken.setdefault("param_names", group["param_names"])
    taken["params"] = group["params"]
    return taken


def adopt_state(
    param: Tensor, saved: Mapping[str, Any], averages: int, first_moment: bool
) -> dict[str, Any]:
    """A parameter's saved state as tensors of our own: in the parameter's layout, never cast down.

    torch's base class would cast it to the parameter's dtype, and share the caller's tensors.
    """
    known = {"step", "exp_avg", "exp_avg_sq"} | {average_key(k) for k in range(averages)}
    for key in saved:
        if key.startswith("ema_") and key not in known:
            raise ValueError(f"ema_decays: the state holds {key}, this optimiser keeps {averages}")
        if key not in known:
            raise ValueError(f"state_dict: got {key}, need the state of AdamWEMA or AdamW")
    state: dict[str, Any] = {}
    for key, value in saved.items():
        if key == "step":
            step = torch.as_tensor(value, dtype=torch.float32, device=param.device)
            state[key] = step.detach().reshape(()).to(param.device, copy=True)
        elif key != "exp_avg" or first_moment:
            if value.shape != param.shape:
                raise ValueError(
                    f"state_dict: got {key} of shape {tuple(value.shape)} for a parameter of "
                    f"shape {tuple(param.shape)}"
                )
            target = torch.empty_like(param, dtype=state_dtype(param), requires_grad=False)
            state[key] = target.copy_(value.detach())
    return state


def complete_state(param: Tensor, state: dict[str, Any], averages: int, first_moment: bool) -> None:
    """Add what is missing: zeros, and averages that start from the parameter as it is."""
    dtype = state_dtype(param)

    def like(value: Tensor | None) -> Tensor:
        target = torch.empty_like(param, dtype=dtype, requires_grad=False)
        return target.zero_() if value is None else target.copy_(value.detach())

    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    if first_moment and "exp_avg" not in state:
        state["exp_avg"] = like(None)
    if "exp_avg_sq" not in state:
        state["exp_avg_sq"] = like(None)
    for index in range(averages):
        if average_key(index) not in state:
            state[average_key(index)] = like(param)


def to_adamw(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """AdamWEMA's state_dict as one that ``torch.optim.AdamW.load_state_dict`` takes; all copies."""
    state = {}
    for key, saved in state_dict["state"].items():
        second = saved["exp_avg_sq"].detach().clone()
        first = saved.get("exp_avg")
        state[key] = {
            # Not capturable: AdamW keeps its step counts on the host then.
            "step": saved["step"].detach().to("cpu", copy=True),
            "exp_avg": torch.zeros_like(second) if first is None else first.detach().clone(),
            "exp_avg_sq": second,
        }
    groups = [
        {**deepcopy(dict(group)), **_MEANING, **_IMPLEMENTATION}
        for group in state_dict["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
