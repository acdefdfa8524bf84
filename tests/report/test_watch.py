"""The live page: it follows a run that is written, keeps what a reader has set, and answers nobody else."""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rlinvariant.errors import UserError
from rlinvariant.report import comparison, completions, html_samples, watch
from rlinvariant.report.rundir import _append_lines
from tests.report.pages import HOSTILE
from tests.report.runs import row, write_run
from tests.report.said import said


@contextmanager
def served(*paths: Path) -> Iterator[str]:
    """Serve the live page of directories and give its address."""
    server, address = watch.server(watch.Page(lambda: comparison.load(paths), paths), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


until = """(test) => new Promise((done, fail) => { const look = () => test() ? done(true) : setTimeout(look, 50); look();
setTimeout(() => fail(new Error("not seen: " + test)), 500000); })"""


def ask(address: str, path: str = "", host: str | None = None) -> tuple[int, str]:
    """Return status and body of one request."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=500)
    headers = {} if host is None else {"Host": host}
    connection.request("GET", path if path.startswith("/") else where.path + path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_a_page_follows_the_run_and_keeps_what_the_reader_has_set(tmp_path, chromium):
    run = write_run(tmp_path / "run", 0, steps=12, finished=False)
    for step in (1, 2):
        completions.write(run.path, said(step, groups=30, prompt=HOSTILE))
    page = chromium
    with served(run.path) as address:
        page.open(address)
        page.run(f"({until})(() => document.querySelectorAll('div.said').length === 60)")
        assert "60 of 120 completions. All that there are." in page.run("document.getElementById('said').innerText")
        set_search = (
            "search = [...document.querySelectorAll('#said label')].find((l) => l.innerText.startsWith('search')).lastChild"
        )
        page.run(f"{set_search}; search.value = '/sample 11[0-9]/'; search.dispatchEvent(new Event('input'))")
        page.run(f"({until})(() => document.querySelectorAll('div.said').length === 10)")
        page.run("document.querySelector('.charts select').value = 'tokens'")
        before = page.run("document.getElementById('outcome').innerText")
        _append_lines(run.metrics, [row(step, 0, 0.01) for step in range(13, 16)])
        completions.write(run.path, said(3))
        page.run(f"({until})(() => document.getElementById('exactness').innerText.includes('not exact'))")
        after = page.run("document.getElementById('outcome').innerText")
        assert "0 / 768 tokens" in before and "/ 960 tokens" in after and "0 / 960" not in after
        assert page.run("document.querySelector('.charts select').value") == "tokens" and page.run("search.value") != ""
        label = page.run("document.querySelector('figure script').textContent")
        assert json.loads(label)["lines"][0]["steps"][-1] == 15 and not page.log
        assert "pwned" not in page.run("document.title")
        page.run("fetch = async () => new Response('no such page', {status: 404})")  # of a server with another key
        page.run(f"({until})(() => document.getElementById('live-status').innerText.includes('has ended'))")


def test_a_page_that_was_opened_before_the_first_step_gets_all_parts(tmp_path, chromium):
    run = write_run(tmp_path / "run", 0, steps=0, finished=False)
    shutil.rmtree(run.completions)  # none are kept: charts may not wait for them
    with served(run.path) as address:
        chromium.open(address)
        assert chromium.run("document.querySelectorAll('figure, #reward').length") == 0
        _append_lines(run.metrics, [row(step, 0, 0.0) for step in (1, 2)])
        for _ in range(10000):  # the page loads itself anew, which ends what is being asked
            with suppress(RuntimeError):
                if chromium.run("!!document.querySelector('.bar.charts') && !!document.querySelector('.live canvas')"):
                    break
            time.sleep(0.05)
        assert "Reward" in chromium.run("document.querySelector('nav').innerText")
        assert chromium.run("document.getElementById('live-status').innerText") == "live" and not chromium.log


def test_each_run_is_answered_with_its_own_completions(tmp_path, chromium):
    none = write_run(tmp_path / "none", 0)
    next(none.completions.iterdir()).unlink()
    others = [write_run(tmp_path / f"other-{seed}", seed, ["trainer.learning_rate=1"]) for seed in (0, 1)]
    for run, step in zip(others, (7, 8), strict=True):
        completions.write(run.path, said(step))
    study = comparison.load([none.path, *(run.path for run in others)])
    with pytest.raises(UserError, match="no completions were kept"):
        html_samples.answer(study, {"run": "0"})
    page = chromium
    with served(none.path, *(run.path for run in others)) as address:
        page.open(address)
        for index, prompt in ((0, "7+0="), (1, "8+0=")):
            page.run(f"which = document.querySelector('#said select'); which.selectedIndex = {index}")
            page.run("which.dispatchEvent(new Event('input'))")
            page.run(f"({until})(() => document.querySelector('#said pre.prompt')?.innerText === '{prompt}')")
        assert page.run("which.innerText").split("\n") == ["other, seed 0", "other, seed 1"]


def test_only_who_has_the_key_and_this_machine_is_answered(tmp_path):
    run = write_run(tmp_path / "run", 0)
    with served(run.path) as address:
        port = urlsplit(address).port
        assert ask(address)[0] == 200 and ask(address, host=f"localhost:{port}")[0] == 200, "control"
        for path in ("/", "/version", "/../", f"/{'x' * 16}/", address.split("/")[3]):
            assert ask(address, path)[0] == 404
        assert ask(address, host="evil.example")[0] == ask(address, host=f"evil.example:{port}")[0] == 403
        for query in ("run=9", "run=x", "step=99", "sort=nothing", "search=/(/"):
            status, body = ask(address, f"completions?{query}")
            assert status == 400 and json.loads(body)["error"], query


def test_a_run_that_cannot_be_read_yet_is_said_on_the_page(tmp_path):
    run = write_run(tmp_path / "run", 0)
    whole = run.config.read_text()
    run.config.write_text(whole[:50])
    with served(run.path) as address:
        status, body = ask(address)
        assert status == 200 and "config.json" in body and "nothing to show yet" in body
        first = ask(address, "version")
        run.config.write_text(whole)
        assert ask(address, "version") != first and "Reward" in ask(address)[1]


def test_a_port_that_is_taken_is_one_line(tmp_path):
    page = watch.Page(lambda: comparison.load([tmp_path]), [tmp_path])
    taken, _ = watch.server(page, 0)
    with taken, pytest.raises(UserError, match=r"--port \d+: cannot be had \(Address already in use\)"):
        watch.server(page, taken.server_port)
    with pytest.raises(UserError, match="--port 70000: cannot be had"):
        watch.server(page, 70000)
