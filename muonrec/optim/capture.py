"""Records a step of Muon in a CUDA graph, for towers of small matrices, where launches cost the time."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from muonrec.optim.muon import Muon

# As torch's notes on CUDA graphs ask for: kernels are loaded and workspaces allocated before the capture.
_NUM_WARM_UP_STEPS = 3


def capture_step(optimizer: Muon) -> Callable[[], None]:
    """Record one step; parameters and state are left as they were.

    The graph reads and writes the tensors that it was captured with. So gradients must stay in place between replays
    (``zero_grad(set_to_none=False)``), a learning rate is changed by ``lr.fill_``, other settings are frozen, and after
    ``load_state_dict``, which replaces the state, a step is captured anew.

    One rank only: with ``assume_all_gradients`` the host need not wait on several either, but then every rank must
    capture and replay alike or all hang, and collectives of NCCL within the graph have not been tried.

    Args:
        optimizer: on one rank, every parameter on one CUDA device with a gradient, every ``lr`` a tensor there.

    Returns:
        A function that makes the step, to the bit of ``optimizer.step()``.

    Raises:
        ValueError: what the step would have to ask the host for: a rate in a float, a gradient that may be missing,
            tensors that are not on one CUDA device, or several ranks.
    """
    with torch.cuda.device(_check_capturable(optimizer)):  # else the step would run beside the graph that records it
        return _capture(optimizer)


def _capture(optimizer: Muon) -> Callable[[], None]:
    held = [*optimizer.names, *chain.from_iterable(state.values() for state in optimizer.named_state().values())]
    before = [tensor.detach().clone() for tensor in held]

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(_NUM_WARM_UP_STEPS):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side_stream)
    with torch.no_grad():
        torch._foreach_copy_(held, before)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def _check_capturable(optimizer: Muon) -> torch.device:
    """The device of everything in the step."""
    num_ranks = getattr(optimizer, "num_ranks", 1)
    if num_ranks > 1:
        raise ValueError(
            f"a step over {num_ranks} ranks was to be captured, but its collectives have not been tried in a graph; "
            "capture is for one rank, call step() here"
        )
    for name, param in ((name, param) for param, name in optimizer.names.items()):
        if param.grad is None:
            raise ValueError(
                f"'{name}' has no gradient, and a captured step cannot skip it; run backward first, and keep gradients "
                "by zero_grad(set_to_none=False)"
            )
    devices = {tensor.device for tensor in optimizer.names}
    for i, group in enumerate(optimizer.param_groups):
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            raise ValueError(
                f"group {i} has lr={rate}, which a captured step would freeze; "
                f"pass lr=torch.tensor({rate}, device='cuda')"
            )
        devices.add(rate.device)
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise ValueError(f"a step was to be captured over {sorted(map(str, devices))}; move all to one CUDA device")
    return next(iter(devices))
