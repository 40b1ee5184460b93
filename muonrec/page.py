"""How a report becomes a page: its template, and how numbers are spelled in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render ``template``, a file of the package, into ``path``; whatever is not marked safe is escaped.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("jinja2 is not installed; pip install 'muonrec[report]'", name="jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("muonrec", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(values))
    return path


def pretty(metric: str) -> str:
    """``NDCG@10`` for ``ndcg@10``, ``Recall@10``, ``Normalized entropy``."""
    name, at, k = metric.partition("@")
    return (name.upper() if name in ("ndcg", "mrr", "auc") else name.capitalize().replace("_", " ")) + at + k


def percent(share: float, digits: int = 1) -> str:
    """``+5.1 %`` for 0.051, with a true minus; ``unknown`` for what is not finite."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−") if math.isfinite(share) else "unknown"


def times(ratio: float) -> str:
    """``2.1 times``."""
    return f"{ratio:.1f} times"


def duration(seconds: float | None) -> str:
    """In seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short(value: Any) -> str:
    """A setting on one line of a table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
