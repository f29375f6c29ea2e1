"""The benchmark as a program: what it refuses, how it judges, and that the documentation shows what was measured."""

import copy
import json
import sys

import pytest
import torch

from bench import __main__ as command
from bench import ceilings, compare, guard, record, tables, timing
from bench.problem import Problem, measure

COMMITTED = sorted(record.RESULTS.glob("*/bench.json"))


@pytest.fixture(autouse=True)
def _one_thread():
    """As the command sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(own=(0.9, 1.0, 1.1), torch_ratio=(1.9, 2.0, 2.1), name="skew", **more):
    ratios = {"torch": torch_ratio} if torch_ratio else {}
    return {
        "name": name,
        "size": "tiny",
        "dtype": "float32",
        "pass": "forward",
        "seconds": {"lipfast": own},
        "ratios": ratios,
        "work": None,
        **more,
    }


def result(*rows):
    found = json.loads(json.dumps(record.circumstances("cpu")))
    return {**found, "ceilings": None, "results": list(rows)}


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    return command.main()


@pytest.fixture
def keep(tmp_path):
    def kept(name, found):
        record.write(tmp_path / name, found)
        return tmp_path / name

    return kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no_such_op"], "no such op or bound: no_such_op; there are"),
        (["--device", "cuda"], "torch finds no GPU here"),
        (["--dtype", "tf32"], "an arithmetic of the CPU expected, got tf32"),
        (["--repeats", "0"], "--repeats: at least 1 expected, got 0"),
    ],
)
def test_names_what_it_cannot_run(words, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *words) == 2
    out = capsys.readouterr()
    assert said in out.err
    assert (out.err.count("\n"), out.out) == (1, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "lipfast-bench/1"}, "schema 'lipfast-bench/2' expected, got 'lipfast-bench/1'"),
        ({"machine": {"cpu": "another", "threads": 1}}, "expected, with cpu"),
    ],
)
def test_refuses_a_file_of_another_schema_or_machine_in_one_line(change, said, keep, monkeypatch, capsys):
    old, new = keep("old.json", result(row())), keep("new.json", result(row()) | change)
    for words in (["--compare", old, new], ["--check", new]):
        assert run(monkeypatch, *words) == 2
        out = capsys.readouterr()
        assert said in out.err
        assert out.err.count("\n") == 1
        assert not out.out


@pytest.mark.parametrize("text", ["", "[]", '{"results": []}', "no json"])
def test_refuses_what_is_no_result_file(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.json").write_text(text)
    assert run(monkeypatch, "--compare", tmp_path / "file.json", tmp_path / "file.json") == 2
    assert run(monkeypatch, "--tables", tmp_path / "nowhere.json") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"bench: {tmp_path / 'file.json'}: ")
    assert second.startswith(f"bench: {tmp_path / 'nowhere.json'}: cannot be read")


def test_verdicts_respect_the_spread(keep, monkeypatch, capsys):
    old = row()
    pairs = {
        "faster": row(torch_ratio=(2.4, 2.5, 2.6)),
        "slower": row(torch_ratio=(1.4, 1.5, 1.6)),
        "not told apart": row(torch_ratio=(1.4, 1.6, 1.95)),
    }
    for verdict, new in pairs.items():
        assert compare.judge(old, new)[2] == verdict
        assert run(monkeypatch, "--compare", keep("old.json", result(old)), keep("new.json", result(new))) == (
            verdict == "slower"
        )
        assert f"1 {verdict}" in capsys.readouterr().out


def test_without_a_definition_seconds_are_compared():
    old, new = row(torch_ratio=None), row(own=(1.3, 1.4, 1.5), torch_ratio=None)
    assert compare.judge(old, new) == ("seconds", pytest.approx(0.4), "slower")
    assert compare.judge(row(), row(own=(9, 9, 9)))[0] == "x torch"  # a slower machine is no slower op


@pytest.mark.parametrize(("measured", "lost"), [([3.0], 0), ([2.6], 0), ([2.5, 2.9], 0), ([2.5, 2.5], 1)])
def test_the_guard_fails_where_an_op_loses_twice_in_a_row(measured, lost, keep, monkeypatch, capsys):
    path = keep("file.json", result(row(torch_ratio=(3.0, 3.0, 3.0))))
    left = list(measured)
    monkeypatch.setattr(guard, "rounds", lambda turns, *_: {**{who: [1.0] for who in turns}, "torch": [left.pop(0)]})
    assert run(monkeypatch, "--check", path, "--quick") == lost
    assert not left
    assert f"1 measured, {lost} lost" in capsys.readouterr().out


def test_the_guard_asks_for_the_same_torch(keep, monkeypatch, capsys):
    found = result(row())
    found["versions"]["torch"] = "2.10.0"
    assert run(monkeypatch, "--check", keep("file.json", found)) == 2
    assert "torch 2.10.0 expected" in capsys.readouterr().err


def test_a_run_keeps_every_row_and_leaves_no_half_of_a_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "deep" / "file.json"
    assert run(monkeypatch, "skew", "max_min", "--quick", "--json", path) == 0
    kept = compare.rows(record.read(path))
    assert {(name, direction) for name, _, _, direction in kept} == {
        (name, direction) for name in ("skew", "max_min") for direction in ("forward", "both")
    }
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert run(monkeypatch, "--compare", path, path) == 0
    assert "4 not told apart" in capsys.readouterr().out


def test_what_the_guard_is_recorded_from_is_what_it_measures(tmp_path, monkeypatch, capsys):
    for words, beside in (([], {"torch", "solve"}), (["--guard"], {"torch"})):
        assert run(monkeypatch, "cayley", "--quick", "--json", tmp_path / "file.json", *words) == 0
        assert all(set(row["ratios"]) == beside for row in record.read(tmp_path / "file.json")["results"])


def test_times_are_taken_in_turns_and_compared_round_by_round(monkeypatch, capsys):
    order = []
    turns = {who: lambda who=who: order.append(who) for who in ("lipfast", "torch", "peer")}
    monkeypatch.setattr(timing, "_cpu_clock", lambda run, loops: (run(), float(len(order)))[1])
    found = measure(Problem("p", "s", "forward", turns, scale={"peer": 2.0}), 3, "cpu", None)
    assert order[-9:] == ["lipfast", "torch", "peer"] * 3
    at = len(order) - 9
    assert found["seconds"]["torch"][1] == at + 5
    assert found["ratios"]["peer"][1] == pytest.approx(2 * (at + 6) / (at + 4))


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 9), (2.0, 6), (100.0, 3)])
def test_long_candidates_take_fewer_rounds(seconds, rounds, monkeypatch):
    monkeypatch.setattr(timing, "_cpu_clock", lambda run, loops: (run(), seconds)[1])
    assert len(timing.rounds({"long": lambda: None}, 9, "cpu")["long"]) == rounds
    assert len(timing.rounds({"long": lambda: None}, 2, "cpu")["long"]) == 2


def test_the_floor_is_that_of_the_nearer_ceiling(monkeypatch):
    limits = ceilings.Ceilings("cpu")
    limits.copy, limits.product = {size: 1e9 for size in ceilings.SIZES}, {"float32": 1e12}
    assert limits.of(ceilings.Work(10**6, 10**6), "float32")["floor"] == pytest.approx(1e-3)
    assert limits.of(ceilings.Work(10**6, 10**10), "float32")["floor"] == pytest.approx(1e-2)
    limits.copy[ceilings.SIZES[0]] = 1e11  # what fits a cache is copied faster
    assert limits.of(ceilings.Work(10**4), "float32")["floor"] == pytest.approx(1e-7)


def test_own_time_is_the_compiled_one_where_torch_sees_through_the_op():
    seen = row(own=(2.0, 2.0, 2.0))
    seen["ratios"] |= {"lipfast compiled": (0.5, 0.5, 0.5), "compiled": (0.5, 0.5, 0.5), "peer": (4.0, 4.0, 4.0)}
    assert tables.own(seen) == (1.0, True)
    assert tables.best_peer(seen) == "8 (peer)"
    assert tables.own(row()) == (1.0, False)
    assert tables.best_peer(row()) == "-"


@pytest.mark.skipif(not COMMITTED, reason="no result of a whole run is at hand")
def test_the_documentation_shows_the_committed_results():
    found = [(path.resolve(), record.read(path)) for path in COMMITTED]
    for page, table in ((tables.README, tables.short(found)), (tables.PAGE, tables.long(found))):
        assert tables.between(page.read_text(), table) == page.read_text()


def test_a_page_without_marks_is_left_alone(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="marks"):
        tables.between("a page", "a table")


def test_plots_every_forward_pass(tmp_path):
    found = result(row(work={"flops": 10**9, "bytes": 10**6, "floor": 0.01}))
    found = copy.deepcopy(found) | {
        "ceilings": {"bytes_per_second": {"65536": 9e10, "1073741824": 1e10}, "flops_per_second": {"float32": 1e11}}
    }
    tables.plot(found, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
