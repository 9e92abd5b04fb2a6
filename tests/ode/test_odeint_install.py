"""flowkernels in torchdiffeq's place, and back."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from flowkernels import ode

torchdiffeq = pytest.importorskip("torchdiffeq")
import flowkernels.integrations.torchdiffeq as ours  # noqa: E402


def test_install_replaces_and_uninstall_reverts() -> None:
    theirs = {name: getattr(torchdiffeq, name) for name in ours.NAMES}
    user = types.ModuleType("somebodys_module")
    user.solve = torchdiffeq.odeint  # type: ignore[attr-defined]
    sys.modules[user.__name__] = user
    try:
        ours.install()
        ours.install()
        for name in ours.NAMES:
            assert getattr(torchdiffeq, name) is getattr(ode, name)
        assert user.solve is ode.odeint
        y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
        assert y.shape == (2, 2)
        ours.uninstall()
        for name, function in theirs.items():
            assert getattr(torchdiffeq, name) is function
        assert user.solve is theirs["odeint"]
    finally:
        ours.uninstall()
        del sys.modules[user.__name__]


def test_install_is_a_context_manager() -> None:
    before = torchdiffeq.odeint
    with ours.install():
        assert torchdiffeq.odeint is ode.odeint
        # What torchdiffeq's own functions call inside stays theirs.
        assert torchdiffeq._impl.adjoint.odeint is before
    assert torchdiffeq.odeint is before


def test_a_name_that_was_changed_since_is_left_alone() -> None:
    before = torchdiffeq.odeint
    mine = object()
    with ours.install():
        torchdiffeq.odeint = mine
    try:
        assert torchdiffeq.odeint is mine
    finally:
        torchdiffeq.odeint = before


def test_installing_within_leaves_it_to_the_outer_block() -> None:
    theirs = torchdiffeq.odeint
    with ours.install():
        with ours.install():
            pass
        assert torchdiffeq.odeint is ode.odeint
    assert torchdiffeq.odeint is theirs
