"""Muon on one device: the plain, readable twin that every faster path must equal (Jordan, 2024)."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from muonrec.optim.newton_schulz import JORDAN_COEFFICIENT, NS_DTYPES, NsCoefficients, coefficients_per_step
from muonrec.optim.update import (
    Split,
    adjust_lr,
    apply_update_,
    as_matrix,
    look_ahead,
    matrix_shape,
    normalize_neurons,
    orthogonalize_blocks,
    second_momentum_shape,
    update_dtype,
    update_momentum_,
    whole,
)

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalized; names, defaults and results are ``torch.optim.Muon``'s.

    Beyond torch: blocks (``splits``), convolution kernels, an iteration in float32 or float64, coefficients by name or
    by step, NorMuon, cautious decay, and state that exists from construction. The defaults are torch's, so that its
    figures and ours can be compared; what is off by default changes the result.

    Not for embeddings, heads, gains or biases: give those to AdamW. Not for parameters on more than one rank, where it
    repeats all work on each: use ``DistributedMuon``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, adjusted by shape (see ``adjust_lr_fn``). In a tensor on the parameters' device it is never
            read by the host, so that a step can be captured in a CUDA graph and the rate changed by ``lr.fill_``; the
            result is that of a float up to rounding in the parameter's dtype. Saved as a float, loaded into the tensor.
        weight_decay: decoupled, multiplied with the unadjusted ``lr``. 0.1 is torch's, and Moonlight's
            (arXiv 2502.16982): the update has the same size at every step, so that without decay weights only grow.
        momentum: how much of the running average of gradients is kept each step.
        nesterov: orthogonalize the average moved one more step towards the gradient. On, as Jordan found it better.
        ns_coefficients: ``(a, b, c)`` for all steps, one triple per step, or ``"jordan"`` or ``"polar_express"``.
            Jordan's is the default, since every published learning rate of Muon was found with it; it leaves singular
            values anywhere in about 0.7 to 1.2. Polar Express ends nearer to 1 for as many steps.
        eps: floor of the Frobenius norm of an update.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: ``"original"`` (and None), ``"match_rms_adamw"`` or ``"spectral_unclamped"``; see ``adjust_lr``.
        ns_dtype: what the iteration runs in; torch knows bfloat16 alone. float32 is four times as slow on a processor
            with bfloat16 instructions, to remove an error that is small beside that of Jordan's coefficients.
        ns_gram: iterate on the Gram matrix of what is more than twice as long as wide, 1.2 to 1.4 times as fast. Off:
            in bfloat16 it rounds otherwise than torch, a tenth less where singular values span a thousand or more, and
            up to twice as much where they are alike.
        normuon_beta2: 0.95 makes it NorMuon (arXiv 2510.05491): each neuron's update is divided by the root of its
            running mean square, kept as ``second_momentum_buffer``, a number a neuron. None, the default, is Muon.
        cautious_weight_decay: decay only what the update does not move away from zero (arXiv 2510.12402). Off: it
            decays about half as much, so that a ``weight_decay`` tuned without it no longer holds.
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
        ns_coefficients: NsCoefficients = JORDAN_COEFFICIENT,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        ns_gram: bool = False,
        normuon_beta2: float | None = None,
        cautious_weight_decay: bool = False,
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
            "ns_gram": ns_gram,
            "normuon_beta2": normuon_beta2,
            "cautious_weight_decay": cautious_weight_decay,
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
        # A state dict of torch's Muon knows no more than torch's settings.
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
        self._init_second_momentum(self.names)

    def _init_second_momentum(self, params: Iterable[Tensor]) -> None:
        """Begin the running averages of NorMuon that are not there."""
        groups = [group for group in self.param_groups if group["normuon_beta2"] is not None]
        users = {param for group in groups for param in group["params"]}
        for param in params:
            if param in users and "second_momentum_buffer" not in self.state[param]:
                shape = second_momentum_shape(self.split_of(param), matrix_shape(self.names[param], param.shape))
                # Not in bfloat16, where an average stops moving at one part in 256.
                dtype = torch.promote_types(param.dtype, torch.float32)
                self.state[param]["second_momentum_buffer"] = torch.zeros(shape, dtype=dtype, device=param.device)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with learning rates as floats."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group["lr"] = float(group["lr"])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; rates in tensors stay in them, and running averages that were not saved begin anew."""
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(group["lr"])
        saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved_keys, params, strict=True):
            saved = state_dict["state"].get(key, {}).get("second_momentum_buffer")
            if saved is not None:  # torch has cast it to the dtype of the parameter
                self.state[param]["second_momentum_buffer"] = saved.to(param.device, copy=True)
        self._init_second_momentum(param for param in params if self.state[param])

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
                if group["normuon_beta2"] is not None:
                    update_RC = update_RC.to(update_dtype(param.dtype, group["ns_dtype"]))
                    second_momentum = self.state[param]["second_momentum_buffer"]
                    update_RC = normalize_neurons(update_RC, second_momentum, split, beta2=group["normuon_beta2"])
                shape = matrix_shape(self.names[param], param.shape)
                apply_update_(param, update_RC, split=split, shape=shape, **step_settings(group))
        return loss


def newton_schulz_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group goes into ``orthogonalize``."""
    return {
        "coefficients": coefficients_per_step(group["ns_coefficients"], group["ns_steps"]),
        "eps": group["eps"],
        "dtype": group["ns_dtype"],
        "gram": group["ns_gram"],
    }


def step_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group goes into ``apply_update_``."""
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "cautious": group["cautious_weight_decay"],
        "adjust_lr_fn": group["adjust_lr_fn"],
    }


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(group['lr'].shape)}; use a float or a tensor of one element")
    for key in ("lr", "weight_decay", "eps"):
        if not float(group[key]) >= 0.0:
            raise ValueError(f"{key} is {group[key]}; use 0 or more")
    if not 0.0 <= group["momentum"] <= 1.0:
        raise ValueError(f"momentum is {group['momentum']}; use 0 to 1, since the buffer is an average")
    beta2 = group["normuon_beta2"]
    if beta2 is not None and not 0.0 <= beta2 < 1.0:
        raise ValueError(f"normuon_beta2 is {beta2}; use 0 to below 1 (0.95 is NorMuon's), or None for Muon")
    if group["ns_dtype"] not in NS_DTYPES:
        raise ValueError(f"ns_dtype is {group['ns_dtype']}; use one of {', '.join(map(str, NS_DTYPES))}")
    coefficients_per_step(group["ns_coefficients"], group["ns_steps"])
    adjust_lr(1.0, group["adjust_lr_fn"], (1, 1))
