import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from lipfast.certify import Certificate
from lipfast.report import report

pytest.importorskip("matplotlib")


def _certificate(radius, kind: str = "bound", **changes) -> Certificate:
    N = len(radius)
    fields = {"prediction": torch.arange(N), "label": torch.arange(N).clamp(max=N - 2), "eps": (0.1, 0.2), "p": math.inf}
    return Certificate(torch.tensor(radius).double(), method="interval", kind=kind, **{**fields, **changes})


def _run(folder, certificates=(), config=None, epochs: int = 3):
    folder.mkdir()
    settings = {"recipe": "interval", "data": "digits", "model": "cnn_small", "parameters": 1234, "settings": {"eps": 0.1}}
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    rows = [{"epoch": e + 1, "loss": 1 / (e + 1), "lr": 0.1, "seconds": 2.5 * e} for e in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, certificate in enumerate(certificates):
        certificate.save(folder / f"certificate-{i}.npz")
    return folder


class _Page(HTMLParser):
    """Text, attributes and the tags that were left open."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.attributes, self.rows = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_failure_probability_shows_wherever_its_bound_does(tmp_path):
    certain, likely = _certificate([0.2] * 3), _certificate([0.2] * 3, failure_probability=1e-9)
    label = "bound with probability 1 - 1e-09"
    text = report([_run(tmp_path / "a", [likely])], tmp_path / "r.html").read_text()
    page = _Page(text)
    assert any(f"a, interval, {label}" in row for row in page.rows)
    assert any(f"(l_inf, interval, {label})" in cell for row in page.rows for cell in row)
    assert f"a, interval ({label})" in page.texts  # the plot's legend
    assert "so probable for each image by itself" in text
    assert "A bound is proven" not in text
    both = report([_run(tmp_path / "b", [certain, likely])], tmp_path / "r.html").read_text()
    assert "A bound is proven" in both
    assert any("b, interval, bound" in row and f"b, interval, {label}" in row for row in _Page(both).rows)
    assert "probab" not in report([_run(tmp_path / "c", [certain])], tmp_path / "r.html").read_text()


def test_tables_hold_the_accuracies_of_each_certificate(tmp_path):
    bound = _certificate([0.3, 0.15, 0.05, 0.3])
    estimate = _certificate([0.3, 0.3, 0.15, 0.3], kind="estimate")
    coarse = _certificate([0.15, 0.15, 0.15, 0.0], eps=(0.15,))
    out = report([_run(tmp_path / "a", [bound, estimate]), _run(tmp_path / "b", [coarse])], tmp_path / "r.html")
    page = _Page(out.read_text())
    assert page.open == []
    assert ["eps", "a, interval, bound", "a, interval, estimate: not a certificate", "b, interval, bound"] in page.rows
    assert ["0 (clean)", "75.00 %", "75.00 %", "75.00 %"] in page.rows
    assert ["0.1", "50.00 %", "75.00 %", "≥ 75.00 %"] in page.rows
    assert ["0.15", "≥ 50.00 %", "75.00 %", "75.00 %"] in page.rows
    assert ["0.2", "25.00 %", "50.00 %", "–"] in page.rows
    assert [
        "a",
        "interval",
        "digits",
        "cnn_small",
        "1,234",
        "3",
        "5",
        "75.00 %",
        "25.00 % at 0.2 (l_inf, interval)",
    ] in page.rows
    assert any("eps in pixel units, l_inf" in text for text in page.texts)


def test_each_norm_has_its_own_plot(tmp_path):
    run = _run(tmp_path / "a", [_certificate([0.2] * 3), _certificate([0.2] * 3, p=2.0, pixel_range=(0.0, 1.0))])
    text = report([run], tmp_path / "r.html").read_text()
    assert text.count("<svg") == 3
    assert "Certified accuracy, l_2" in text
    assert "Balls cut with the range of pixels: a, interval (0.0, 1.0)" in text


def test_an_estimate_is_never_shown_without_saying_so(tmp_path):
    proven = report([_run(tmp_path / "a", [_certificate([0.2] * 3)])], tmp_path / "r.html").read_text()
    guessed = report([_run(tmp_path / "b", [_certificate([0.2] * 3, kind="estimate")])], tmp_path / "r.html").read_text()
    assert "estimate" not in proven
    for place in ("<th[^>]*>[^<]*", r"<text[^>]*>b, interval \(", "<text[^>]*>broad and pale: ", "<p [^>]*>An "):
        assert re.search(place + "estimate( is|:) not a certificate", guessed)


def test_the_file_needs_nothing_else(tmp_path):
    run = _run(tmp_path / "a", [_certificate([0.2] * 3)])
    text = report([run], tmp_path / "r.html").read_text()
    for name, value in _Page(text).attributes:
        assert name.startswith("xmlns") or "//" not in (value or "")
        assert name not in ("href", "src", "xlink:href") or value.startswith("#")
    assert "@import" not in text
    ids = re.findall(r'<(?:path|clipPath|style)[^>]* id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert report([run], tmp_path / "again.html").read_text() == text


def test_strings_from_outside_stay_text(tmp_path):
    evil = '<script>alert("&")</script>'
    run = _run(
        tmp_path / "<b>$x_{$", [_certificate([0.2] * 3, data=evil)], {"recipe": evil, evil: evil, "data": None, "flip": False}
    )
    page = report([run], tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    rows = _Page(page).rows
    assert [evil, evil] in rows
    assert ["data", "–"] in rows
    assert ["flip", "no"] in rows


def test_settings_that_differ_are_marked(tmp_path):
    runs = [_run(tmp_path / "a"), _run(tmp_path / "b", config={"settings": {"eps": 0.2}})]
    page = report(runs, tmp_path / "r.html").read_text()
    assert re.findall(r'<tr class="differs"><td class="text">([^<]*)', page) == ["settings.eps"]


def test_numbers_that_never_change_have_no_plot(tmp_path):
    text = report([_run(tmp_path / "a")], tmp_path / "r.html").read_text()
    assert ">loss<" in text
    assert ">lr<" not in text
    assert "<svg" not in report([_run(tmp_path / "b", epochs=0)], tmp_path / "r.html").read_text()


def test_folders_of_one_name_go_by_their_paths(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        _run(tmp_path / name / "run")
    text = report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "r.html").read_text()
    assert str(tmp_path / "b" / "run") in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is no run folder"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
        (lambda run: (run / "config.json").write_text("[1]"), "must be JSON objects"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo'), "is damaged"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "is damaged"),
        (lambda run: (run / "certificate-0.npz").write_bytes(b"PK"), "is damaged or no certificate"),
    ],
)
def test_names_what_is_wrong_with_a_run(tmp_path, damage, message):
    run = _run(tmp_path / "a", [_certificate([0.2] * 3)])
    damage(run)
    with pytest.raises(ValueError, match=message) as error:
        report([run], tmp_path / "r.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r.html").exists()


def test_names_what_is_wrong_with_the_call(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="cannot be written"):
        report([_run(tmp_path / "a")], tmp_path / "absent" / "r.html")
