"""Runs and ablations are read whole; a damaged one is refused in one line, and what a reader must know is noted."""

import json
import re
import shlex
import shutil

import pytest

from rlinvariant import cli
from rlinvariant.config import parse
from rlinvariant.errors import UserError
from rlinvariant.publish import card_facts
from rlinvariant.report import html
from rlinvariant.report.study import command, load
from tests.report.runs import write_ablation, write_run


def test_mixed_recipes_are_refused_in_one_line_that_names_the_runs(tmp_path):
    path = write_ablation(tmp_path / "ablation-f")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, recipe="countdown")
    with pytest.raises(UserError) as raised:
        html.write(path)
    message = str(raised.value)
    assert "an ablation of recipe=arithmetic, but drift/seed-1 has recipe=countdown" in message and "\n" not in message
    assert not (path / "report.html").exists()


def test_other_schemas_are_refused(tmp_path):
    path = write_ablation(tmp_path / "ablation-g")
    shutil.rmtree(path / "drift" / "seed-1")
    write_run(path / "drift" / "seed-1", 1, schema=2)
    with pytest.raises(UserError, match="expected runs of schema 1, but drift/seed-1 has schema 2"):
        load(path)
    (path / "ablation.json").write_text('{"schema": 7}')
    with pytest.raises(UserError, match="schema 7, expected 1"):
        load(path)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    for change, message in [
        (lambda: None, "holds no ablation.json and no config.json"),
        (lambda: (tmp_path / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda: (tmp_path / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda: (tmp_path / "ablation.json").write_text('{"schema": 1}'), "not the description of an ablation"),
    ]:
        change()
        with pytest.raises(UserError, match=message) as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value)
    run = write_run(tmp_path / "run", 0)
    run.metrics.write_text('{"step": 1}\n{\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of JSON"):
        load(run.path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"a": 1}\n', r'metrics\.jsonl:1: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 1}\n[1]\n', r'metrics\.jsonl:2: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 1.0}\n', r'metrics\.jsonl:1: expected a JSON object with an integer "step"'),
        ("metrics.jsonl", '{"step": 4, "reward": "high"}\n', 'step 4: reward is "high", expected a number or null'),
        (
            "metrics.jsonl",
            '{"step": 4, "onpolicy/mismatched_tokens": 0.5}\n',
            r"tokens is 0\.5, expected a whole number of tokens",
        ),
        ("config.json", '{"seed": 3}', r"config\.json: seed is 3, expected \{"),
        ("config.json", '{"steps": {"value": "many"}}', r'config\.json: steps is "many", expected an integer'),
        ("environment.json", '{"packages": 5}', r"environment\.json: packages is 5, expected a JSON object"),
        ("environment.json", '{"cpu": {"isa": [1]}}', r"environment\.json: cpu\.isa is \[1\], expected a JSON object"),
        ("environment.json", '{"schema": 2}', "schema 2, expected 1; report it with the version that wrote it"),
        (
            "result.json",
            '{"accuracy_after": "good"}',
            r'result\.json: heldout_reward_after is "good", expected a number or null',
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_says_what_was_expected(tmp_path, capsys, name, content, message):
    run = write_run(tmp_path / "run", 0, steps=1)
    (run.path / name).write_text(content)
    assert cli.main(["report", str(run.path)]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and str(run.path) in printed and printed.count("\n") == 1


def test_runs_that_differ_in_where_they_were_made_and_short_ones_are_noted(tmp_path):
    path = write_ablation(tmp_path / "ablation-n")
    assert not load(path).notes
    shutil.rmtree(path / "drift" / "seed-1")
    other = {"cpu": {"model": "x"}, "gpu": {"name": "x"}}
    write_run(path / "drift" / "seed-1", 1, ["invariance=off"], steps=9, packages={}, git={"commit": "x"}, **other)
    notes = "\n".join(load(path).notes)
    for what in ("sets of package versions", "git commits", "CPU models", "GPUs"):
        assert f"The runs were made with 2 different {what}" in notes
    assert "Fewer than 10 steps in drift/seed-1: the reward there is the mean over all of them." in notes


def test_short_runs_are_not_named_one_by_one_where_all_are(tmp_path):
    notes = load(write_ablation(tmp_path / "ablation-n", steps=4)).notes
    assert "Fewer than 10 steps in every run: the reward there is the mean over all of them." in notes
    alone = load(write_run(tmp_path / "run", 0, steps=4).path).notes
    assert "Fewer than 10 steps: the reward there is the mean over all of them." in alone


def test_the_command_of_a_run_gives_its_configuration_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        "recipe=arithmetic",
        "steps=3",
        "invariance=off",
        "trainer.learning_rate=1e-05",
        "wandb.tags=a b,c",
        "run=x",
        "trainer.vllm_importance_sampling_correction=true",
        "sampler.enforce_eager=false",
    ]
    config = parse(argv)
    program, train, *again = shlex.split(command(json.loads(json.dumps(config.resolved()))))
    assert (program, train) == ("rlinvariant", "train")
    assert parse(again).resolved() == config.resolved()


def test_the_command_on_a_card_is_that_of_the_report_without_ways_to_files_and_secrets(tmp_path, monkeypatch):
    """No recipe, a file of settings, a list of files, a value longer than an error would show."""
    monkeypatch.chdir(tmp_path)
    rows, rewards = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    rows.write_text('{"prompt": "1+1="}\n' * 40)
    rewards.write_text("def a(completions, **_):\n    return [0.0] * len(completions)\n\n\nb = a\n")
    tags = ",".join(f"tag{i}" for i in range(60))
    (tmp_path / "settings.yaml").write_text(f"steps: 3\nseed: 7\ndata:\n  path: {rows}\n")
    config = parse(
        [
            "config=settings.yaml",
            "model=org/base",
            f"reward={rewards}:a,{rewards}:b",
            f"wandb.tags={tags},https://me:secret@host",
            "run=x",
            "seed=8",
        ]
    )
    facts = card_facts(config, range(40), None, {})
    _, _, *given = shlex.split(facts["command"])
    expected = {
        "run=x",
        "model=org/base",
        "reward=rewards.py:a,rewards.py:b",
        f"wandb.tags={tags},https://***@host",
        "data.path=rows.jsonl",
    }
    assert set(given) == expected | {"steps=3", "seed=8"}
    assert facts["data"].startswith("40 prompts, data.path=rows.jsonl") and str(tmp_path) not in str(facts)
    whole = shlex.split(command(config.resolved()))
    assert f"data.path={rows}" in whole and f"reward={rewards}:a,{rewards}:b" in whole, "the control: the user's own report"
    assert [argument.partition("=")[0] for argument in whole[2:]] == [argument.partition("=")[0] for argument in given]


def test_a_script_is_its_own_command():
    config = {"recipe": {"value": "train_it.py", "source": "script"}, "run": {"value": "x", "source": "script"}}
    assert command(config) == command(config, shared=True) == "python train_it.py"


def test_the_commands_of_the_command_line(ablation, tmp_path, capsys):
    assert cli.main(["report", str(ablation)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {ablation / 'report.html'}\n")
    for arguments, message in [
        (["report", str(tmp_path)], "holds no ablation.json and no config.json"),
        (["report", str(tmp_path / "none")], "none: no such directory, here or in "),
        (["report", "runs/nope"], "error: runs/nope: no such directory, here or in "),
        (["report"], "report: the following arguments are required: RUN; see rlinvariant report --help"),
        (["report", str(ablation), "b"], "b: no such directory, here or in "),
        (["dashboard", "draw"], "dashboard: argument action: invalid choice: 'draw' (choose from "),
        (["dashboard", "push", "a", "b"], "dashboard: unrecognized arguments: b; see rlinvariant dashboard --help"),
    ]:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_runs_that_the_ablation_does_not_name_are_said_to_be_there(tmp_path):
    """Runs that were copied from another machine, and a later command's arms, may not vanish in silence."""
    path = write_ablation(tmp_path / "ablation-a", seeds=[0], steps=2)
    assert not any("Not in" in note for note in load(path).notes), "control"
    for name in ("drift/seed-1", "sampler/seed-0", "drift/seed-0.interrupted-1"):
        write_run(path / name, 1, steps=2)
    assert any("in no number here: drift/seed-1, sampler/seed-0. rlinvariant" in note for note in load(path).notes)


def test_a_run_that_has_ended_and_whose_metrics_were_cut_is_said_to_lack_them(tmp_path):
    run = write_run(tmp_path / "run", 0, steps=12)
    assert not any("metrics.jsonl" in note for note in load(run.path).notes), "control"
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:5]))
    assert "this run: result.json says that it has ended, and metrics.jsonl does at step 5 of 12." in load(run.path).notes
