"""Muon on one device: the plain, readable twin that every faster path must equal (Jordan, 2024)."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonrec.optim.newton_schulz import JORDAN_COEFFICIENT, NS_DTYPES, Coefficients, coefficients_per_step
from muonrec.optim.update import (
    Split,
    adjust_lr,
    apply_update_,
    as_matrix,
    look_ahead,
    matrix_shape,
    orthogonalize_blocks,
    update_momentum_,
    whole,
)

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalized; names, defaults and results are ``torch.optim.Muon``'s.

    Beyond torch: blocks (``splits``), convolution kernels, an iteration in float32 or float64, one triple of
    coefficients per step, and state that exists from construction.

    Not for embeddings, heads, gains or biases: give those to AdamW. Not for parameters on more than one rank, where it
    repeats all work on each: use ``DistributedMuon``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, adjusted by shape (see ``adjust_lr_fn``).
        weight_decay: decoupled, multiplied with the unadjusted ``lr``.
        momentum: how much of the running average of gradients is kept each step.
        nesterov: orthogonalize the average moved one more step towards the gradient.
        ns_coefficients: ``(a, b, c)`` for all steps, or one triple per step.
        eps: floor of the Frobenius norm of an update.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: ``"original"`` (and None), ``"match_rms_adamw"`` or ``"spectral_unclamped"``; see ``adjust_lr``.
        ns_dtype: what the iteration runs in; torch knows bfloat16 alone.
        splits: by parameter name, the blocks of the matrices that stand for several. A group may bring its own.
            They are architecture, not hyper-parameters: ``state_dict`` does not hold them.

    Raises:
        ValueError: a hyper-parameter out of range, a parameter that is not a matrix, a name that comes twice, a split
            that does not add up or that names no parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Coefficients] = JORDAN_COEFFICIENT,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        self.splits = dict(splits or {})
        self.names: dict[Tensor, str] = {}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)  # type: ignore[arg-type]
        self._check_splits()
        with torch.no_grad():
            self._init_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; its ``splits`` join those of the others.

        Raises:
            ValueError: see the class.
        """
        is_late = hasattr(self, "_is_built")
        param_group = dict(param_group)
        self.splits.update(param_group.pop("splits", None) or {})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_hyperparameters(group)
        names = group.get("param_names") or [f"parameter {len(self.names) + i}" for i in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            matrix_shape(name, param.shape)
            if not param.is_floating_point():
                raise ValueError(f"Muon was given '{name}' of {param.dtype}; it needs real floating point parameters")
            if name in self.names.values():
                raise ValueError(
                    f"two parameters are called '{name}'; names must be unique, since state is kept by name"
                )
            self.names[param] = name
        if is_late:
            self._check_splits()
            with torch.no_grad():
                self._init_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A state dict of torch's Muon knows no ns_dtype.
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    def _check_splits(self) -> None:
        self._is_built = True
        params = {name: param for param, name in self.names.items()}
        for name, split in self.splits.items():
            if name not in params:
                close = difflib.get_close_matches(name, params, n=3) or list(params)[:3]
                raise ValueError(f"splits names '{name}', which Muon does not hold; close names are {', '.join(close)}")
            split.check(name, matrix_shape(name, params[name].shape))

    def _init_state(self) -> None:
        # State exists from construction: DCP initializes an optimizer without state by a step with zero gradients.
        for param in self.names:
            if param not in self.state:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    def split_of(self, param: Tensor) -> Split:
        """The blocks of a parameter; one block, where ``splits`` does not name it."""
        name = self.names[param]
        return self.splits.get(name) or whole(matrix_shape(name, param.shape))

    def named_state(self) -> dict[str, dict[str, Tensor]]:
        """The state that this rank holds, by parameter name; the tensors themselves, so that DCP loads in place."""
        return {name: dict(self.state[param]) for param, name in self.names.items() if self.state[param]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. Gradients are not written to."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                buffer = self.state[param]["momentum_buffer"]
                split = self.split_of(param)

                update_momentum_(buffer, param.grad, group["momentum"])
                update = look_ahead(buffer, param.grad, momentum=group["momentum"], nesterov=group["nesterov"])
                update_RC = orthogonalize_blocks(as_matrix(update), split, **newton_schulz_settings(group))
                apply_update_(param, update_RC, split=split, **step_settings(group, self.names[param], param.shape))
        return loss


def newton_schulz_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group goes into ``orthogonalize``."""
    return {
        "coefficients": tuple(coefficients_per_step(group["ns_coefficients"], group["ns_steps"])),
        "eps": group["eps"],
        "dtype": group["ns_dtype"],
    }


def step_settings(group: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Any]:
    """What of a parameter group, and of one parameter's whole shape, goes into ``apply_update_``."""
    return {
        "lr": float(group["lr"]),
        "weight_decay": group["weight_decay"],
        "adjust_lr_fn": group["adjust_lr_fn"],
        "shape": matrix_shape(name, shape),
    }


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(group['lr'].shape)}; use a float or a tensor of one element")
    for key in ("lr", "weight_decay", "eps"):
        if not float(group[key]) >= 0.0:
            raise ValueError(f"{key} is {group[key]}; use 0 or more")
    if not 0.0 <= group["momentum"] <= 1.0:
        raise ValueError(f"momentum is {group['momentum']}; use 0 to 1, since the buffer is an average")
    if group["ns_dtype"] not in NS_DTYPES:
        raise ValueError(f"ns_dtype is {group['ns_dtype']}; use one of {', '.join(map(str, NS_DTYPES))}")
    coefficients_per_step(group["ns_coefficients"], group["ns_steps"])
    adjust_lr(1.0, group["adjust_lr_fn"], (1, 1))
