"""Every wrong configuration is refused by one line that says what to do; every right one knows where it came from."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlinvariant.config import (
    ALIASES,
    OWNED,
    TRAINER_CHOICES,
    TRAINER_DEFAULTS,
    Config,
    check,
    fields,
    load_recipe,
    parse,
    recipe_names,
    trl_fields,
)
from rlinvariant.config.help import FIRST_FIELDS
from rlinvariant.errors import ConfigErrors, UserError

REPO = Path(__file__).parents[1]
RECIPE = """
import chz
from rlinvariant import config

DEFAULTS = {"steps": 7, "trainer.learning_rate": 1e-3, "data.size": 5}

@chz.chz
class Data(config.Data):
    size: int = 1
    path: str | None = None

def datasets(config, tokenizer): ...
def reward_funcs(config): return []
def prepare_model(config): return "made"
"""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path


def good(*argv: str, env: dict[str, str] | None = None) -> Config:
    return parse(["recipe=mine.py", *argv], env or {})


def errors(*argv: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigErrors) as raised:
        good(*argv, env=env)
    assert str(raised.value).splitlines() == raised.value.errors, "one line each"
    return raised.value.errors


WHOLE = "the sampler must draw from the whole distribution, which is the one that is trained; remove it"
EXACT = "False with invariance=exact"
MASTERS = f"{EXACT}: masters stay float32 and the modules cast; use dtype=bfloat16"
NO_DIRECTORY = "no such directory; give a Hugging Face model directory or a hub id ORG/NAME"
REPLACED = f"{EXACT}: it replaces operations that the invariant ops own; remove it"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stps=3", "stps=3: unknown key; did you mean steps?"),
        ("trainer.lerning_rate=1", "trainer.lerning_rate=1: unknown key; did you mean trainer.learning_rate?"),
        ("trainer.max_step=1", "trainer.max_step=1: unknown key; did you mean trainer.max_steps?"),
        ("learning_rate=1", "learning_rate=1: unknown key; did you mean trainer.learning_rate?"),
        ("sampler.kv_cache=1", "sampler.kv_cache=1: unknown key; did you mean sampler.kv_cache_gib?"),
        ("data.sise=1", "data.sise=1: unknown key; did you mean data.size?"),
        ("zzz=1", "zzz=1: unknown key"),
        ("...seed=1", "...seed=1: unknown key; did you mean seed?"),
        ("sources=1", "sources=1: unknown key"),
        ("steps", "steps: expected key=value, e.g. steps=100"),
        ("--steps=4", "--steps=4: expected key=value without dashes; write steps=4"),
        ("steps=many", "steps=many: expected int; default 7"),
        ("steps=1.5", "steps=1.5: expected int; default 7"),
        ("resume=yes", "resume=yes: expected bool; default False"),
        ("invariance=exat", "invariance=exat: expected one of exact, off, sampler, trainer; default 'exact'"),
        ("dtype=float16", "dtype=float16: expected one of bfloat16, float32; default 'bfloat16'"),
        ("wandb.mode=on", "wandb.mode=on: expected one of auto, online, offline, disabled; default 'auto'"),
        ("data.size=big", "data.size=big: expected int; default 5"),
        ("sampler.enforce_eager=auto", "sampler.enforce_eager=auto: expected bool | None; default None"),
        ("trainer.beta=small", "trainer.beta=small: expected float; default 0.0"),
        (
            "trainer.loss_type=ppo",
            "trainer.loss_type=ppo: expected one of grpo, dr_grpo, dapo, bnpo, cispo, sapo, vespo, luspo; default 'dapo'",
        ),
        (
            "trainer.save_strategy=never",
            "trainer.save_strategy=never: expected one of no, steps, epoch, best; default 'steps'",
        ),
        ("steps=0", "steps=0: expected at least 1"),
        ("seed=-1", "seed=-1: expected 0 to 4294967295"),
        (
            "trainer.temperature=0",
            "trainer.temperature=0.0: expected at least 0.01, to which vLLM raises smaller ones; 1.0 samples from the model "
            "itself",
        ),
        ("trainer.top_p=0.95", f"trainer.top_p=0.95: expected 1.0: {WHOLE}"),
        ("trainer.top_k=20", f"trainer.top_k=20: expected 0: {WHOLE}"),
        ("trainer.min_p=0.1", f"trainer.min_p=0.1: expected None: {WHOLE}"),
        ("trainer.repetition_penalty=1.1", f"trainer.repetition_penalty=1.1: expected 1.0: {WHOLE}"),
        ("trainer.generation_kwargs={'n': 2}", f"trainer.generation_kwargs={{'n': 2}}: expected None: {WHOLE}"),
        ("trainer.bf16=true", f"trainer.bf16=True: expected {MASTERS}"),
        ("trainer.fp16=true", f"trainer.fp16=True: expected {MASTERS}"),
        ("trainer.use_liger_kernel=true", f"trainer.use_liger_kernel=True: expected {REPLACED}"),
        ("trainer.cast_lm_head_to_fp32=true", f"trainer.cast_lm_head_to_fp32=True: expected {REPLACED}"),
        ("trainer.torch_compile=true", f"trainer.torch_compile=True: expected {REPLACED}"),
        (
            "trainer.neftune_noise_alpha=5",
            "trainer.neftune_noise_alpha=5.0: expected None with invariance=exact: the noise is in the trainer's "
            "forward alone; remove it",
        ),
        (
            "trainer.num_generations=1",
            "trainer.num_generations=1: expected at least 2: a group of one has no advantage",
        ),
        ("trainer.num_iterations=0", "trainer.num_iterations=0: expected at least 1"),
        (
            "trainer.num_generations=3",
            "trainer.num_generations=3: expected a divisor of the 8 samples of a rollout "
            "(trainer.per_device_train_batch_size=8, 1 process(es)); change one of them",
        ),
        (
            "trainer.generation_batch_size=12",
            "trainer.generation_batch_size=12: expected a multiple of trainer.per_device_train_batch_size x processes = 8 x 1",
        ),
        (
            "trainer.auto_find_batch_size=true",
            "trainer.auto_find_batch_size=True: expected False; lower trainer.per_device_train_batch_size",
        ),
        ("trainer.max_completion_length=0", "trainer.max_completion_length=0: expected at least 1"),
        (
            "sampler.max_model_len=512",
            "sampler.max_model_len=512: expected more than trainer.max_completion_length=512, to leave room for the prompt",
        ),
        ("sampler.max_num_seqs=0", "sampler.max_num_seqs=0: expected at least 1"),
        (
            "trainer.mask_truncated_completions=true",
            "trainer.mask_truncated_completions=True: expected False with invariance=exact: TRL drops truncated completions "
            "before they could be compared; remove it",
        ),
        (
            "trainer.logging_strategy=no",
            "trainer.logging_strategy=no: expected steps: every step is counted and written; remove it",
        ),
        (
            "trainer.logging_steps=10",
            "trainer.logging_steps=10.0: expected 1: every step is counted and written; remove it",
        ),
        ("trainer.report_to=wandb", "trainer.report_to=['wandb']: expected no wandb or all: W&B is set by wandb.mode="),
        (
            "trainer.use_vllm=true",
            "trainer.use_vllm=true: not a setting here; rlinvariant attaches its own vLLM; see sampler.*",
        ),
        (
            "trainer.vllm_server_host=h",
            "trainer.vllm_server_host=h: not a setting here; rlinvariant attaches its own vLLM; see sampler.*",
        ),
        ("trainer.output_dir=x", "trainer.output_dir=x: not a setting here; use run=NAME, which gives runs/NAME"),
        (
            "trainer.max_tool_calling_iterations=3",
            "trainer.max_tool_calling_iterations=3: not a setting here; tools are not supported",
        ),
        ("model=nowhere", f"model=nowhere: {NO_DIRECTORY}"),
        ("model=./no/where", f"model=./no/where: {NO_DIRECTORY}"),
        ("model=runs/x/checkpoint-3", f"model=runs/x/checkpoint-3: {NO_DIRECTORY}"),
        ("run=a/../b", "run=a/../b: expected a name of letters, digits, '.', '_' and '-'; it is a directory under runs/"),
        ("resume=true", "resume=True: expected run=NAME too, the run to continue"),
        ("staleness=-1", "staleness=-1: expected 0 or more optimizer steps"),
    ],
)
def test_one_mistake_gives_one_line(argument: str, message: str) -> None:
    assert errors(argument) == [message]


def test_unknown_recipes_are_suggested_and_listed() -> None:
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=arithmetik", "data.size=3"], {})
    (line,) = raised.value.errors
    assert line.startswith("recipe=arithmetik: unknown recipe; did you mean arithmetic?; there are: ")
    with pytest.raises(ConfigErrors, match=r"^recipe: missing; write recipe=NAME with one of .*arithmetic"):
        parse([], {})
    with pytest.raises(ConfigErrors, match=r"^recipe=no/file\.py: no such file; give the path of a recipe \.py, or one of"):
        parse(["recipe=no/file.py"], {})


def test_incomplete_recipe_is_refused() -> None:
    Path("half.py").write_text("def datasets(config, tokenizer): ...\n")
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=half.py"], {})
    assert raised.value.errors == ["recipe=half.py: does not define reward_funcs; see recipes/arithmetic.py"]


def test_mistakes_in_a_recipe_name_it() -> None:
    Path("bad.py").write_text(RECIPE.replace('"steps": 7', '"steps": "x", "trainer.bta": 1'))
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=bad.py"], {})
    assert raised.value.errors == [
        "recipe bad: steps=x: expected int; default 100",
        "recipe bad: trainer.bta=1: unknown key; did you mean trainer.beta?",
    ]


def test_recipe_without_a_model_needs_one() -> None:
    Path("plain.py").write_text(RECIPE.replace("def prepare_model", "def unused"))
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=plain.py"], {})
    assert raised.value.errors == ["model: missing, recipe plain has none of its own; write model=DIRECTORY or model=ORG/NAME"]
    assert parse(["recipe=plain.py", "model=Qwen/Qwen3-0.6B"], {}).model == "Qwen/Qwen3-0.6B"


def test_model_directories_are_looked_into() -> None:
    Path("empty").mkdir()
    assert errors("model=empty") == ["model=empty: expected a Hugging Face model directory, found no config.json in it"]
    Path("empty/adapter_config.json").touch()
    assert errors("model=empty") == [
        "model=empty: expected a whole model, found a PEFT adapter; merge it (merge_and_unload) first"
    ]
    Path("whole").mkdir()
    Path("whole/config.json").touch()
    assert good("model=whole").model == "whole"


def test_recipe_checks_are_in_the_same_list() -> None:
    Path("checking.py").write_text(RECIPE + '\ndef check(config): return [f"data.size={config.data.size}: too small"]\n')
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=checking.py", "steps=0"], {})
    assert raised.value.errors == ["steps=0: expected at least 1", "data.size=5: too small"]


def test_all_conflicts_come_in_one_list() -> None:
    env = {"VLLM_BATCH_INVARIANT": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").touch()
    found = errors("stps=3", "steps=x", "trainer.top_p=0.9", "trainer.use_vllm=true", "run=taken", env=env)
    assert [line.split(":")[0] for line in found] == [
        "stps=3",
        "steps=x",
        "trainer.use_vllm=true",
        "trainer.top_p=0.9",
        "ACCELERATE_MIXED_PRECISION=bf16",
        "VLLM_BATCH_INVARIANT=1",
        "run=taken",
    ]


def test_environment_conflicts() -> None:
    assert errors(env={"VLLM_BATCH_INVARIANT": "1"}) == [
        "VLLM_BATCH_INVARIANT=1: expected unset; invariance= decides; run `unset VLLM_BATCH_INVARIANT`"
    ]
    assert errors(env={"ACCELERATE_MIXED_PRECISION": "bf16"}) == [
        "ACCELERATE_MIXED_PRECISION=bf16: expected no with invariance=exact; set mixed_precision: 'no' in the "
        "accelerate config, drop --mixed_precision, and use dtype=bfloat16"
    ]


def test_what_exact_mode_refuses_is_allowed_where_the_trainer_is_stock() -> None:
    env = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for invariance in ("off", "sampler"):
        assert good(f"invariance={invariance}", "trainer.bf16=true", env=env).trainer.bf16
    assert "with invariance=trainer" in errors("invariance=trainer", "trainer.bf16=true")[0]


def test_allowed_in_exact_mode() -> None:
    config = good(
        "trainer.beta=0.1",
        "trainer.gradient_checkpointing=true",
        "trainer.num_iterations=2",
        "trainer.vllm_importance_sampling_correction=true",
        "trainer.temperature=0.7",
    )
    assert config.trainer.vllm_importance_sampling_correction and config.trainer.num_iterations == 2


def test_a_stale_run_starts_anew() -> None:
    Path("runs/old").mkdir(parents=True)
    assert good("run=old", "resume=true").resume
    assert errors("run=old", "resume=true", "staleness=4") == [
        "staleness=4: expected 0 with resume=True: the older weights are in no checkpoint; start a new run"
    ]


def test_steps_and_max_steps_are_one_value() -> None:
    assert errors("steps=4", "trainer.max_steps=5") == ["steps=4 and trainer.max_steps=5: both set the same value; keep steps"]
    assert errors("trainer.seed=4", "seed=4") == ["seed=4 and trainer.seed=4: both set the same value; keep seed"]
    config = good("trainer.max_steps=5", "trainer.seed=9")
    assert (config.steps, config.seed, config.sources["steps"]) == (5, 9, "command line")


def test_both_rollout_sizes_conflict() -> None:
    assert errors("trainer.generation_batch_size=16", "trainer.steps_per_generation=2") == [
        "trainer.generation_batch_size=16 and trainer.steps_per_generation=2: both set the size of a rollout; keep one"
    ]


def test_processes_count_in_batch_sizes() -> None:
    argv = ("trainer.num_generations=16", "trainer.per_device_train_batch_size=8")
    assert "divisor of the 8 samples" in errors(*argv)[0]
    good(*argv, env={"WORLD_SIZE": "2"})


def test_defaults_then_recipe_then_command_line() -> None:
    resolved = good("trainer.beta=0.5", "data.path=x").resolved()
    json.dumps(resolved, allow_nan=False)
    assert resolved["steps"] == {"value": 7, "source": "recipe mine"}
    assert resolved["data.size"] == {"value": 5, "source": "recipe mine"}
    assert resolved["data.path"] == {"value": "x", "source": "command line"}
    assert resolved["trainer.beta"] == {"value": 0.5, "source": "command line"}
    assert resolved["trainer.epsilon"] == {"value": 0.2, "source": "default"}
    assert "sources" not in resolved


def test_secrets_are_not_written() -> None:
    assert good("trainer.hub_token=hf_secret").resolved()["trainer.hub_token"]["value"] == "***"


def test_values_take_the_types_of_their_fields() -> None:
    config = good(
        "trainer.learning_rate=2e-5",
        "trainer.lr_scheduler_type=cosine",
        "trainer.gradient_checkpointing_kwargs={'use_reentrant': False}",
        "trainer.reward_weights=0.5,2",
        "trainer.epsilon_high=None",
        "wandb.tags=a,b",
        "sampler.enforce_eager=true",
    )
    assert config.trainer.learning_rate == 2e-5
    assert config.resolved()["trainer.lr_scheduler_type"]["value"] == "cosine"
    assert config.trainer.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert config.trainer.reward_weights == [0.5, 2.0]
    assert config.trainer.epsilon_high is None
    assert config.wandb.tags == ["a", "b"]
    assert config.sampler.enforce_eager is True


def test_grpo_config_holds_the_values(in_tmp: Path) -> None:
    config = good("steps=3", "seed=5", "trainer.beta=0.1", "run=one")
    grpo = config.grpo_config()
    assert (grpo.max_steps, grpo.seed, grpo.beta, grpo.learning_rate) == (3, 5, 0.1, 1e-3)
    assert grpo.bf16 is False and grpo.use_vllm is False and grpo.logging_steps == 1
    assert grpo.vllm_importance_sampling_correction is False
    assert grpo.output_dir == os.path.join("runs", "one", "checkpoints")


def test_what_trl_refuses_later_is_one_line() -> None:
    config = good("trainer.vllm_importance_sampling_clip_min=5", "run=one")
    with pytest.raises(UserError, match=r"^trainer\.\*: vllm_importance_sampling_clip_min \(5\.0\) must be less"):
        config.grpo_config()


def test_tables_name_fields_that_trl_has() -> None:
    from trl.trainer.grpo_config import GRPOConfig

    names = set(GRPOConfig.__dataclass_fields__)
    aliases = {alias.removeprefix("trainer.") for alias in ALIASES}
    assert names >= set(OWNED) | set(TRAINER_CHOICES) | set(TRAINER_DEFAULTS) | aliases
    ours = {key.removeprefix("trainer.") for key in good().resolved() if key.startswith("trainer.")}
    assert ours == names - set(OWNED) - aliases


def test_run_directories_are_not_overwritten() -> None:
    Path("runs/taken").mkdir(parents=True)
    assert good("run=taken").run == "taken"  # what a start that failed may leave
    Path("runs/taken/config.json").touch()
    assert errors("run=taken") == ["run=taken: runs/taken exists; choose another name, or add resume=true to continue it"]
    assert good("run=taken", "resume=true").run_dir == Path("runs/taken")
    assert good("run=taken", env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).run == "taken"
    assert errors("run=new", "resume=true") == ["run=new: runs/new does not exist, nothing to resume; drop resume=true"]


def test_ranks_agree_on_the_name_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = good(env=env | {"RANK": "0"}).run
    later = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: later)
    assert first.startswith("mine-") and good(env=env | {"RANK": "1"}).run == first
    assert errors(env={"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) == [
        "run: missing; with several hosts write run=NAME, so that all use one directory"
    ]


def test_a_recipe_may_derive_from_another(in_tmp: Path) -> None:
    Path("child.py").write_text(
        "from rlinvariant.recipes.arithmetic import DEFAULTS as PARENT, Data, datasets, prepare_model, reward_funcs\n"
        'DEFAULTS = {**PARENT, "invariance": "off", "data.digits": 2}\n'
    )
    config = parse([f"recipe={in_tmp}/child.py"], {})
    assert (config.invariance, config.data.digits, config.sources["data.digits"]) == ("off", 2, "recipe child")
    assert config.load_recipe() is load_recipe(config.recipe)


def test_a_base_and_other_defaults_are_a_recipe(in_tmp: Path) -> None:
    (in_tmp / "deep").mkdir()
    Path("deep/parent.py").write_text('BASE = "../mine.py"\nDEFAULTS = {"trainer.max_steps": 5, "data.size": 6}\n')
    Path("child.py").write_text('BASE = "deep/parent.py"\nDEFAULTS = {"steps": 9}\n')
    Path("packaged.py").write_text('BASE = "countdown_ppo"\ndef reward_funcs(config): return ["mine"]\n')
    config, mine = parse(["recipe=child.py"], {}), load_recipe("mine.py")
    assert (config.steps, config.data.size, config.trainer.learning_rate) == (9, 6, 1e-3)
    assert config.sources["data.size"] == config.sources["steps"] == "recipe child"
    child, packaged, countdown = config.load_recipe(), load_recipe("packaged.py"), load_recipe("countdown")
    assert (child.datasets, child.data, child.prepare_model) == (mine.datasets, mine.data, mine.prepare_model)
    assert packaged.datasets is countdown.datasets and packaged.reward_funcs is not countdown.reward_funcs
    assert packaged.defaults == load_recipe("countdown_ppo").defaults


def test_a_base_that_leads_back_or_nowhere_is_one_line(in_tmp: Path) -> None:
    for name, base in (("a", "./b.py"), ("b", "./a.py"), ("self", "./self.py"), ("typo", "arithmetik"), ("gone", "./no.py")):
        Path(f"{name}.py").write_text(f'BASE = "{base}"\n')

    def refused(recipe: str) -> str:
        with pytest.raises(ConfigErrors) as raised:
            parse([f"recipe={recipe}"], {})
        (line,) = raised.value.errors
        return line

    assert refused("a.py").endswith(": its BASE leads back to it: a -> b -> a; let one of them have no BASE")
    assert "self -> self" in refused("self.py")
    assert refused("typo.py").startswith(
        "recipe=typo.py: BASE=arithmetik: unknown recipe; did you mean arithmetic?; there are: "
    )
    assert refused("gone.py").startswith(
        "recipe=gone.py: BASE=./no.py: no such file; give the path of a recipe .py, or one of "
    )


def test_check_is_pure(in_tmp: Path) -> None:
    config = good("run=one")
    before = dict(os.environ), sorted(in_tmp.rglob("*"))
    assert check(config, {}) == [] == check(config, {})
    assert (dict(os.environ), sorted(in_tmp.rglob("*"))) == before


def shown_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    from rlinvariant.cli import main

    assert main(["train", *argv]) == 0
    return capsys.readouterr().out


def test_help_says_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_help(capsys, "--help", "recipe=mine.py", "trainer.epsilon=0.5").splitlines()
    lines = {line.partition("=")[0].strip(): (line.strip(), shown[i + 1]) for i, line in enumerate(shown) if "=" in line}
    assert lines["steps"] == ("steps=7  [recipe mine]", "      int. Optimizer steps.")
    assert lines["data.size"][0] == "data.size=5  [recipe mine]"
    assert lines["trainer.epsilon"][0] == "trainer.epsilon=0.5  [command line]", "what the user has set is shown"
    assert lines["model"][0] == "model=None  [default]"
    assert lines["invariance"][1].startswith("      one of exact, off, sampler, trainer. ")


@pytest.mark.parametrize("width", [80, 200])
def test_help_shows_fifteen_fields_and_all_when_asked(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    first, everything = shown_help(capsys, "--help"), shown_help(capsys, "--help=all")
    keys = [
        [line.split("=")[0].strip() for line in text.splitlines() if re.match(r"  [\w.]+=.*]$", line)]
        for text in (first, everything)
    ]
    assert sorted(keys[0]) == sorted(FIRST_FIELDS) and len(keys[0]) == 15
    assert sorted(keys[1]) == sorted(good().resolved().keys() - {"data.size", "data.path"})
    assert f"{len(keys[1]) - 15} more fields: --help=all" in first and "more fields" not in everything
    examples = [line for line in everything.splitlines() if "rlinvariant train recipe" in line]
    assert all(len(line) <= min(width, 120) or line in examples for line in everything.splitlines())


def test_help_with_a_mistake_is_that_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    from rlinvariant.cli import main

    assert main(["train", "--help", "stps=3"]) == 2
    assert capsys.readouterr() == ("", "error: stps=3: unknown key; did you mean steps?\n")
    assert main(["train", "--help", "recipe=gsm8k"]) == 0, "that it needs a model is no mistake yet"


def test_train_prints_errors_without_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rlinvariant.cli import main

    for rank, shown in (("0", "error: stps=3: unknown key; did you mean steps?\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "recipe=arithmetic", "stps=3"], script="train.py") == 2
        assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train"], "recipe: missing"),
        (["train", "recipe=nope"], "recipe=nope: unknown recipe"),
        (["train", "recipe=arithmetic", "stps=3"], "stps=3: unknown key; did you mean steps?"),
        (["train", "recipe=arithmetic", "trainer.optim=adma"], "trainer.optim=adma: expected one of adamw_torch"),
        (["train", "recipe=countdown_ppo", "steps=0"], "steps=0: expected at least 1"),
        (["train", "recipe=gsm8k"], "model: missing"),
        (["train", "--help=all", "recipe=arithmetic"], ""),
    ],
)
def test_a_wrong_command_line_is_answered_without_a_framework(arguments: list[str], error: str) -> None:
    """Each takes seconds to import. Nothing is measured in time: that depends on the machine."""
    code = (
        "import sys; from rlinvariant.cli import main\n"
        f"code = main({arguments!r})\n"
        "print(sorted({'accelerate', 'datasets', 'numpy', 'torch', 'transformers', 'trl', 'vllm'} & set(sys.modules)), code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {2 if error else 0}"
    assert done.stderr.startswith(f"error: {error}" if error else "")


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_imported_without_a_framework(recipe: str) -> None:
    code = (
        f"import sys, rlinvariant.recipes.{recipe}\n"
        "print(sorted({'datasets', 'tokenizers', 'torch', 'transformers', 'trl'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "[]\n"


def test_the_table_of_trls_fields_is_that_of_the_class() -> None:
    live = json.loads(trl_fields.as_json(trl_fields.table_of_class()))
    assert fields.table() == live
    packaged = json.loads(fields.PACKAGED_TABLE.read_text())
    if packaged["versions"] == fields.installed():
        assert packaged == live, "run `make fields`"


def test_other_versions_have_their_fields_from_the_class_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, made = {"trl": "1.16.9", "transformers": "5.19.9"}, []
    table = fields.table()
    monkeypatch.setenv("RLINVARIANT_CACHE", str(in_tmp / "cache"))
    monkeypatch.setattr(fields, "installed", lambda: versions)
    monkeypatch.setattr(trl_fields, "table_of_class", lambda: made.append(1) or table | {"versions": versions})
    assert fields.table() == fields.table() == table | {"versions": versions} and made == [1]
    (in_tmp / "file").touch()
    monkeypatch.setenv("RLINVARIANT_CACHE", str(in_tmp / "file"))  # no directory can be made there
    assert fields.table()["versions"] == versions and made == [1, 1]


def test_every_choice_of_an_enum_is_taken_by_trl(in_tmp: Path) -> None:
    """GRPOConfig makes enums of strings itself."""
    config = good("trainer.lr_scheduler_type=cosine", "trainer.save_strategy=epoch", "trainer.optim=sgd", "run=one")
    args = config.grpo_config()
    assert (args.lr_scheduler_type.value, args.save_strategy.value, args.optim.value) == ("cosine", "epoch", "sgd")
