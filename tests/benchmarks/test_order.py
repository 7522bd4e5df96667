"""The choice between compiled backends: from a measured table, or on paper, and it says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, case
from benchmarks.order import entry, main, merge
from benchmarks.results import Results
from heteroakd_fast import backends
from heteroakd_fast.backends import order as orders
from heteroakd_fast.spec import LossSpec

USUAL = LossSpec(terms=("ce", "kd", "hetero"))
OTHER = (
    LossSpec(terms=("kd",), kd_divergence="js"),
    LossSpec(terms=("hetero",), mix="logits"),
    LossSpec(terms=("hetero",), mix="teacher"),
    LossSpec(terms=("hetero",), preset="paper", mix="logits"),
    LossSpec(terms=("ce",), maps=True, preset="paper"),
    LossSpec(terms=("ce", "feature")),
)


def results_of(times: dict[str, dict[str, float]], cases: list[Case]) -> Results:
    rows: list[dict[str, Any]] = [
        {
            "case": one.key,
            "setting": "main",
            "provider": provider,
            "cannot": None,
            "forward_ms": [milliseconds / 2] * 3,
            "backward_ms": [milliseconds / 2] * 3,
        }
        for one in cases
        for provider, milliseconds in times[one.objective].items()
    ]
    empty: dict[str, Any] = {
        "schema": 1, "suite": "gpu", "environment": {"gpu": "GPU X", "commit": "0123456789ab"},
        "settings": {}, "rates": {}, "floors": {}, "groups": {}, "peak_bytes": {}, "crops": [],
        "crop_budget": 0, "steps": [], "step_batches": [], "seconds": 0.0,
    }  # fmt: skip
    return Results(
        {**empty, "cases": [{"key": one.key, **one.fields()} for one in cases], "rows": rows}
    )


CASES = [case(objective, "Cityscapes", 2, 4) for objective in ("ce", "ce+hetero", "ce+paper")]
TIMES = {
    "ce": {"heteroakd[cuda]": 1.0, "heteroakd[triton]": 2.0, "eager": 9.0},
    "ce+hetero": {"heteroakd[cuda]": 2.0, "heteroakd[triton]": 2.0},
    "ce+paper": {"heteroakd[cuda]": 6.0, "heteroakd[triton]": 3.0},
}


def test_entry_is_the_geometric_mean_by_kind() -> None:
    assert entry(results_of(TIMES, CASES), "abc") == {
        "other": {"faster": "triton", "ratio": 2.0, "cases": 1, "commit": "abc"},
        "usual": {"faster": "cuda", "ratio": 1.414, "cases": 2, "commit": "abc"},
    }


def test_one_backend_alone_gives_no_entry(tmp_path: Path) -> None:
    alone = {name: {"heteroakd[triton]": 1.0} for name in TIMES}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of(alone, CASES).data))
    assert main([str(path)]) == 1


def test_measured_table_decides_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "order.json"
    merge("GPU X", entry(results_of(TIMES, CASES), "0123456789ab"), table)
    merge("GPU Y", {}, table)
    monkeypatch.setattr(orders, "_table", lambda: json.loads(table.read_text()))
    usual = orders.order("cuda", "usual", "GPU X")
    assert usual.names == ("cuda", "triton")
    assert usual.reason.startswith("measured on GPU X: 1.41 times as fast as triton over 2 cases")
    assert orders.order("cuda", "other", "GPU X").names == ("triton", "cuda")
    assert "not measured on GPU Y" in orders.order("cuda", "usual", "GPU Y").reason


def test_committed_table_is_of_known_backends() -> None:
    for kinds in orders._table().values():
        assert kinds.keys() <= orders.KINDS.keys()
        assert all(row["faster"] in orders.CANDIDATES["cuda"] for row in kinds.values())


def test_kinds() -> None:
    assert orders.kind_of(USUAL) == "usual"
    assert orders.kind_of(LossSpec(terms=("ce", "teacher_ce"))) == "usual"
    assert [orders.kind_of(spec) for spec in OTHER] == ["other"] * len(OTHER)
    for spec in (USUAL, *OTHER):  # as it is known while a graph is traced
        assert orders.kind_of(LossSpec.from_options(spec.structure())) == orders.kind_of(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_the_choice_says_why() -> None:
    text = backends.explain(USUAL, "cuda")
    assert " of cuda -> triton -> reference; cuda cannot run: " in text
    assert "not measured" in text
    assert backends.explain(USUAL, "mps") == "reference of reference; none is compiled for it"
