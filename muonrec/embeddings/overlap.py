"""The dense step while gradients of embeddings travel: TorchRec's pipeline for it, made safe."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding_types import ShardedEmbeddingModule, ShardingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline.backward_injection import InjectionSite, OutputDistTensorFinder
from torchrec.distributed.train_pipeline.experimental_pipelines import TrainPipelineSparseDistBwdOpt
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDist

from muonrec.embeddings.joined import JoinedOptimizer

logger = logging.getLogger(__name__)

Out = TypeVar("Out")


class OverlappedPipeline(TrainPipelineSparseDistBwdOpt):
    """TorchRec's `TrainPipelineSparseDistBwdOpt`, whose results are those of `TrainPipelineSparseDist`.

    Where the gradient of looked-up rows sets out for the ranks that hold them, within the backward pass, it steps those
    parts of the optimizer that have all their gradients; the others step after the backward pass. Which parts these are
    is seen in the first step and agreed on by the ranks: with FSDP2, a part whose parameters all lie in blocks above
    the embeddings. TorchRec's own steps the whole optimizer there, whatever is missing, and gives it to the site named
    by the user.

    Only for FSDP2: DDP hands out reduced gradients when the backward pass is over, so each replica would step with its
    own and drift away in silence. Tested with gloo on two ranks; with NCCL it is untried, and what it saves is
    unmeasured.

    Args:
        model: sharded, everything outside of the tables by `muonrec.FSDP2Wrapper`.
        optimizer: of `muonrec.build_optimizer`.
        device: of this rank.
        **settings: as `TrainPipelineSparseDist` takes them.

    Raises:
        ValueError: a dense parameter is replicated; names it.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: JoinedOptimizer, device: torch.device, **settings: Any
    ) -> None:
        dense = {name: part for name, part in optimizer.parts.items() if name != "tables"}
        replicated = [key for part in dense.values() for key, p in part.params.items() if not isinstance(p, DTensor)]
        if replicated:
            raise ValueError(
                f"{replicated[0]!r} and {len(replicated) - 1} more are replicated, as under DDP, whose gradients are "
                "reduced when the backward pass is over, too late to overlap; shard the model with "
                "DistributedModelParallel(..., data_parallel_wrapper=muonrec.FSDP2Wrapper()), or use "
                "TrainPipelineSparseDist"
            )
        super().__init__(model=model, optimizer=optimizer, device=device, site_fqn="", **settings)
        self.early: list[str] | None = None
        """Names of the parts that step within the backward pass; None before the first step."""
        self._parts = dense
        self._sites = _sites(model)
        self._last_site = -1
        self._seen: list[tuple[int, dict[str, set[str]]]] = []
        self._stepped: dict[str, set[str]] = {}

    def _pipeline_model(self, *args: Any, **kwargs: Any) -> None:
        TrainPipelineSparseDist._pipeline_model(self, *args, **kwargs)  # the class between would step everything
        for i, site in enumerate(self._sites):
            self.register_backward_hook(site, lambda _, i=i: self._at_site(i))

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        """One step, as in `TrainPipelineSparseDist`."""
        self._seen, self._stepped = [], {}
        output = super().progress(dataloader_iter)
        if self._model.training:
            self._after_backward()
        return output

    def _at_site(self, site: int) -> None:
        if self.early is None:
            self._seen.append((site, {name: self._with_gradient(name) for name in self._parts}))
        elif site == self._last_site:
            _wait_for_gradients(self._model)
            for name in self.early:
                self._stepped[name] = self._with_gradient(name)
                self._parts[name].step()

    def _after_backward(self) -> None:
        if self.early is None:
            self._choose()
        for name, part in self._optimizer.parts.items():
            if name not in self._stepped:
                part.step()
            elif late := self._with_gradient(name) - self._stepped[name]:
                raise ValueError(
                    f"the gradients of {sorted(late)} came after {name!r} had stepped without them, which they did not "
                    "in the first step; use TrainPipelineSparseDist for a model whose graph changes"
                )

        # What a scheduler of torch looks at, to warn of a schedule that runs ahead of the steps.
        self._optimizer._opt_called = True

    def _choose(self) -> None:
        """The last site of the backward pass, and the parts that have every gradient there, on every rank."""
        site, there = self._seen[-1] if self._seen else (-1, {})
        mine = (site, {name: self._with_gradient(name) - there.get(name, set()) for name in self._parts})
        everyone = [mine]
        if dist.get_world_size() > 1:
            everyone = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        self._last_site = max(site for site, _ in everyone)
        late = {name: sorted(set().union(*(rank[name] for _, rank in everyone))) for name in self._parts}
        is_agreed = len({site for site, _ in everyone}) == 1 and self._last_site >= 0
        self.early = [name for name in self._parts if is_agreed and not late[name]]
        for name in self._parts.keys() - set(self.early):
            logger.warning(
                "%r steps after the backward pass, and nothing of it overlaps: the gradients of %s come after those of "
                "the embeddings, or are FSDP2's root's; put modules above the embeddings into FSDP2Wrapper(blocks=...)",
                name,
                ", ".join(late[name][:4]),
            )
        logger.info("within the backward pass step %s", self.early or "no parts")

    def _with_gradient(self, part: str) -> set[str]:
        return {key for key, param in self._parts[part].params.items() if param.grad is not None}


def _sites(model: DistributedModelParallel) -> list[InjectionSite]:
    """Where outputs of embeddings are handed out, of each sharded module and sharding; none on a single rank."""
    if dist.get_world_size() == 1:
        return []
    return [
        InjectionSite(fqn=path, tensor_finder=OutputDistTensorFinder(sharding_type=ShardingType(sharding)))
        for path, module in model.module.named_modules()
        if isinstance(module, ShardedEmbeddingModule)
        for sharding in sorted({plan.sharding_type for plan in module.module_sharding_plan.values()})
        if sharding != ShardingType.DATA_PARALLEL.value
    ]


def _wait_for_gradients(model: torch.nn.Module) -> None:
    """Let the current stream wait for the reductions that FSDP2 runs on its own; it would at the end of backward."""
    if not torch.cuda.is_available():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            context = module._get_fsdp_state()._comm_ctx
            torch.cuda.current_stream().wait_stream(context.reduce_scatter_stream)
            torch.cuda.current_stream().wait_stream(context.all_reduce_stream)
            return  # all of them share one
