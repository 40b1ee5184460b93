"""muonrec: TorchRec's fused tables below, a distributed Muon above.

``muonrec.optim`` needs torch alone. The names below join it to TorchRec and are imported when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muonrec.checkpoint import load, save
    from muonrec.checkpoint.foreign import adopt_checkpoint
    from muonrec.comparison.callables import compare
    from muonrec.embeddings.joined import build_optimizer, explain
    from muonrec.embeddings.overlap import OverlappedPipeline
    from muonrec.embeddings.sharding import FSDP2Wrapper

__version__ = "0.1.0"

__all__ = [
    "FSDP2Wrapper",
    "OverlappedPipeline",
    "__version__",
    "adopt_checkpoint",
    "build_optimizer",
    "compare",
    "explain",
    "load",
    "save",
]

_HOMES = {
    "build_optimizer": "muonrec.embeddings.joined",
    "explain": "muonrec.embeddings.joined",
    "OverlappedPipeline": "muonrec.embeddings.overlap",
    "FSDP2Wrapper": "muonrec.embeddings.sharding",
    "save": "muonrec.checkpoint",
    "adopt_checkpoint": "muonrec.checkpoint.foreign",
    "load": "muonrec.checkpoint",
    "compare": "muonrec.comparison.callables",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives (PEP 562), so that ``import muonrec`` needs torch at most."""
    if name not in _HOMES:
        raise AttributeError(f"module 'muonrec' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "muonrec":  # ours, so no installation mends it
            raise
        if name == "compare":
            raise ImportError(
                f"muonrec.compare needs {missing}, which cannot be imported ({error}); pip install 'muonrec[compare]'",
                name=error.name,
            ) from error
        raise ImportError(
            f"muonrec.{name} needs {missing or 'torchrec'}, which cannot be imported ({error}); with CUDA run "
            "pip install 'muonrec[torchrec,data]', without it run make setup in a clone; "
            "python -m muonrec doctor says what is missing",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
