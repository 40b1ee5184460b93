"""The report over made-up run folders."""

from __future__ import annotations

import html.parser
from pathlib import Path

from muonrec.report import config_differences, write_report
from muonrec.runs import paired_differences, read_run, read_runs
from tests.test_runs import make_run


class Balance(html.parser.HTMLParser):
    """Raises where tags do not nest; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(path: Path) -> str:
    parser = Balance()
    parser.feed(path.read_text())
    assert parser.open == []
    return " ".join(" ".join(parser.text).split())


def test_report_of_two_runs_holds_every_section(tmp_path):
    runs = read_runs([make_run(tmp_path / "adamw"), make_run(tmp_path / "muon", optimizer="muon", lift=0.05)])
    path = write_report(tmp_path / "out", runs)
    text = text_of(path)
    for title in (
        "Results",
        "Paired differences to adamw",
        "Validation",
        "Training",
        "Who is served",
        "Routing",
        "Versions",
    ):
        assert title in text
    assert "Sharding plan" in text and "row_wise" in text and "dense_optimizer.lr" in text and "best possible" in text
    assert path.read_text().count("<svg") == 5
    assert "http" not in path.read_text().replace("http://www.w3.org", "")
    assert "<script" not in path.read_text()


def test_headline_says_what_the_paired_interval_says(tmp_path):
    control, arm = read_runs([make_run(tmp_path / "adamw"), make_run(tmp_path / "muon", optimizer="muon", lift=0.05)])
    interval = paired_differences(control, arm, ["ndcg@10"])["ndcg@10"]
    assert interval.low > 0
    value = arm.metrics["metrics"]["ndcg@10"]["mean"]
    text = text_of(write_report(tmp_path, [control, arm]))
    assert f"muon reaches NDCG@10 {value:.4f}" in text
    assert f"It is {100 * interval.mean:.1f} % better than adamw" in text
    assert f"{100 * value / 0.5:.0f} % of the best possible" in text


def test_a_difference_whose_interval_holds_zero_is_called_none(tmp_path):
    runs = read_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
    text = text_of(write_report(tmp_path, runs))
    assert "No difference to one is shown: +0.0 %" in text
    assert text.count("no difference shown") == 3
    assert "better" not in text and "worse" not in text


def test_runs_that_were_evaluated_unlike_are_called_not_comparable(tmp_path):
    runs = read_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
    runs[1].ranked.protocol["mask_seen"] = True
    assert "not comparable: one and two were not evaluated alike" in text_of(write_report(tmp_path, runs))


def test_report_of_a_run_that_only_trained_shows_its_curves(tmp_path):
    path = write_report(tmp_path, [read_run(make_run(tmp_path / "run", evaluated=False))])
    assert "run has not been evaluated yet" in text_of(path)
    assert path.read_text().count("<svg") == 3


def test_report_of_a_run_that_logged_nothing_is_still_a_page(tmp_path):
    (tmp_path / "resolved.yaml").write_text("seed: 0\n")
    path = write_report(tmp_path, [read_run(tmp_path, name="empty")])
    assert "empty has not been evaluated yet" in text_of(path)
    assert "<svg" not in path.read_text()


def test_names_of_runs_are_escaped(tmp_path):
    run = read_run(make_run(tmp_path / "run"), name="<b>&run")
    page = write_report(tmp_path, [run]).read_text()
    assert "<b>&run" not in page and "&lt;b&gt;&amp;run" in page


def test_the_same_runs_give_the_same_bytes(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert write_report(tmp_path / "a", [run]).read_bytes() == write_report(tmp_path / "b", [run]).read_bytes()


def test_config_differences_are_those_settings_alone_that_differ(tmp_path):
    runs = read_runs(
        [make_run(tmp_path / "a", evaluated=False), make_run(tmp_path / "b", optimizer="muon", evaluated=False)]
    )
    assert config_differences(runs) == [
        ("dense_optimizer.lr", ["0.001", "0.02"]),
        ("dense_optimizer.name", ["adamw", "muon"]),
    ]


def test_groups_without_users_are_left_out(tmp_path):
    run = read_runs([make_run(tmp_path / "one")])[0]
    title, rows = next(iter(run.metrics["breakdowns"].items()))
    nobody = {"group": ">999", "num_users": 0}
    run.metrics["breakdowns"][title] = [*rows, nobody]
    text = text_of(write_report(tmp_path, [run]))
    assert "999" not in text
    assert rows[0]["group"].replace("<=", "≤ ") in text
