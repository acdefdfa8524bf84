"""All that every benchmark shares: rows that are kept, workers that end, a command line that knows its machine."""

import importlib
import json

import pytest

from rlinvariant.bench import __main__, gpu, gpu_parity, measure, served
from rlinvariant.bench.compare import Parity
from rlinvariant.bench.measure import Row


def row(bench="linear", case="x", ours=1.0, samples=1, bits=(True, True)):
    return Row(
        bench=bench,
        case=case,
        ours=ours,
        stock=1.0,
        unit="us",
        ratio=ours,
        target=None,
        bits_equal={"ours": bits[0], "stock": bits[1]},
        samples=samples,
        others=0.0,
    )


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        (row(bits=(True, False)), False),
        (row(bits=(False, True)), True),
        (row("peer", bits=(False, True)), False),
        (Parity("parity", "m", "bfloat16", "x", 8, 0, "c", 8), False),
        (Parity("parity", "m", "bfloat16", "x", 8, 1, "c", 8), True),
    ],
)
def test_a_difference_is_written_down_and_fails(tmp_path, row, fails):
    if fails:
        with pytest.raises(SystemExit, match="BITS DIFFER in 1 rows: "):
            measure.write(tmp_path / "x.json", [row], tiny=True)
    else:
        measure.write(tmp_path / "x.json", [row], tiny=True)
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 1


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    def rows():
        yield row()
        yield row(case="y")
        yield row(ours=2.0, samples=2)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure.write(tmp_path / "x.json", rows(), tiny=True)
    content = json.loads((tmp_path / "x.json").read_text())
    assert [(row["case"], row["samples"]) for row in content["rows"]] == [("x", 2), ("y", 1)] and content["complete"] is False
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


@pytest.mark.parametrize("code", ["raise ValueError('no memory')", "import os; os._exit(7)"])
def test_a_worker_that_ends_is_named_with_its_exit_code_and_log(tmp_path, monkeypatch, code, capsys):
    early = "import sys; print('OSError: from a child', file=sys.stderr); [print(i, file=sys.stderr) for i in range(99)]"
    (tmp_path / "ends.py").write_text(f"{early}\n{code}\n")
    (tmp_path / "echoes.py").write_text("import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with measure.Workers({"a": measure.Worker("ends", "a", "/a/path"), "b": measure.Worker("echoes")}) as workers:
        assert workers.ask(["a", "b"], x=1) == {"b": {"x": 1}} == workers.ask(["a", "b"], together=True, x=1)
        alive = workers.alive["b"]
    printed = capsys.readouterr().out
    assert ("ends a ended with exit code 7" if "exit" in code else "ends a ended with exit code 1") in printed
    assert "OSError: from a child" in printed and "98" in printed and "\n50\n" not in printed
    assert ("OSError: from a child" if "exit" in code else "ValueError: no memory") in workers.missing["a"]
    assert alive.process.poll() == 0


def test_a_worker_that_does_not_end_is_ended(tmp_path, monkeypatch):
    (tmp_path / "stays.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = measure.Worker("stays")
    worker.close(seconds=0.2)
    assert worker.process.returncode == -9


@pytest.mark.parametrize("name", list(__main__.BENCHMARKS))
def test_every_benchmark_can_be_imported(name):
    for module in filter(None, __main__.BENCHMARKS[name][:2]):
        bench = importlib.import_module(f"rlinvariant.bench.{module}")
        assert any(callable(getattr(bench, entry, None)) for entry in ("rows", "run", "main", "write"))


def test_each_machine_has_its_benchmarks(monkeypatch, capsys, tmp_path):
    def refused(*argv, machine):
        monkeypatch.setattr(gpu, "name", lambda: machine)
        with pytest.raises(SystemExit, match="2"):
            __main__.main([*argv, "--out", str(tmp_path)])
        return capsys.readouterr().err

    assert "linear: not for this machine (cpu); here: ops, sampler, long, trainer" in refused("linear", machine="cpu")
    assert "ops: not for this machine (h200); here: linear, norms" in refused("ops", machine="h200")
    assert "--tokens: only with families, and with parity on a GPU" in refused("step", "--tokens", "9", machine="cpu")
    assert "--long: only with parity --tokens on a GPU" in refused("parity", "--long", machine="h200")
    assert "invalid choice: 'gemm'" in refused("gemm", machine="cpu")


def test_parity_gets_the_number_of_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "name", lambda: "h200")
    asked = []
    monkeypatch.setattr(gpu_parity, "soak", lambda file, *asks: asked.append((file.name, *asks)))
    monkeypatch.setattr(gpu_parity, "rows", lambda tiny: asked.append(tiny) or [])
    __main__.main(["parity", "--tiny", "--tokens", "99", "--out", str(tmp_path)])
    __main__.main(["parity", "--tokens", "9", "--long", "--out", str(tmp_path)])
    __main__.main(["parity", "--out", str(tmp_path)])
    assert asked == [("parity_soak.json", 99, True, False), ("parity_soak_long.json", 9, False, True), False]


def test_processor_time_of_less_than_a_tick_has_no_ratio():
    """A process's clock ticks every 10 ms, and a fast machine syncs a small model in less."""
    kept = [{"served": {"sync": (0.02, 0.01)}, "engine": {"sync": (0.01, 0.0)}}] * 3
    row = served._row(kept, 0.0, "x", "sync", None, {"same"})
    assert row.ratio == 2 and row.cpu_ratio is None
    assert measure.used(3.0, 2.0) == 1.5
