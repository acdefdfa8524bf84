"""Every wrong configuration is refused by one line that says what to do."""

import os
from pathlib import Path

import pytest

from rlinvariant.config.check import check_run
from rlinvariant.conflicts import spread_problems
from rlinvariant.errors import UserError
from tests.config.common import errors, good

TRAINED = "the sampler must draw from the distribution that is trained, which knows of no penalty; remove it"
KEEP_ALL = "set it, or keep all tokens"
MOVED = f"after an optimizer step other tokens are kept, and those that were drawn need not be among them; {KEEP_ALL}"
REFERENCE = f"the reference's share outside of the kept tokens has no meaning yet; {KEEP_ALL}"
EXACT = "False with invariance=exact"
MASTERS = f"{EXACT}: masters stay float32 and the modules cast; use dtype=bfloat16"
NO_DIRECTORY = "no such directory; give a Hugging Face model directory or a hub id ORG/NAME, or smollm2-135m-instruct"
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
        ("name=a1", "name=a1: unknown key; did you mean run?"),
        ("zzz=1", "zzz=1: unknown key"),
        ("...seed=1", "...seed=1: unknown key; did you mean seed?"),
        ("sources=1", "sources=1: unknown key"),
        ("steps", "steps: expected key=value, e.g. steps=100"),
        ("--steps=4", "--steps=4: expected key=value without dashes; write steps=4"),
        ("steps=many", "steps=many: expected int; default 7"),
        ("steps=1.5", "steps=1.5: expected int; default 7"),
        ("resume=yes", "resume=yes: expected bool or force; default False"),
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
        ("lora.r=-1", "lora.r=-1: expected a rank, at least 1, or 0 for no adapters"),
        ("lora.alpha=4", "lora.alpha=4: expected lora.r=RANK too, or it does nothing; remove it"),
        ("seed=-1", "seed=-1: expected 0 to 4294967295"),
        (
            "trainer.temperature=0",
            "trainer.temperature=0.0: expected 0.01 to 2, as vLLM raises what is less and takes no more; 1.0 samples from the "
            "model itself",
        ),
        ("trainer.top_p=0", "trainer.top_p=0.0: expected more than 0 and at most 1; 1.0: no limit"),
        ("trainer.top_p=1.5", "trainer.top_p=1.5: expected more than 0 and at most 1; 1.0: no limit"),
        ("trainer.top_k=-2", "trainer.top_k=-2: expected a whole number of tokens, 1 or more; or 0: no limit"),
        ("trainer.min_p=1.0", "trainer.min_p=1.0: expected 0 or more and less than 1; 0: no limit"),
        ("trainer.min_p=-0.1", "trainer.min_p=-0.1: expected 0 or more and less than 1; 0: no limit"),
        ("trainer.repetition_penalty=1.1", f"trainer.repetition_penalty=1.1: expected 1.0: {TRAINED}"),
        (
            "trainer.generation_kwargs={'n': 2}",
            "trainer.generation_kwargs={'n': 2}: expected None: what it has is in no part of the policy that is trained; "
            "remove it",
        ),
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
            "sampler.max_num_batched_tokens=1",
            "sampler.max_num_batched_tokens=1: expected at least sampler.max_num_seqs=128",
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


def test_model_directories_are_looked_into() -> None:
    Path("empty").mkdir()
    assert errors("model=empty") == ["model=empty: expected a Hugging Face model directory, found no config.json in it"]
    Path("empty/adapter_config.json").touch()
    assert errors("model=empty") == [
        "empty/adapter_config.json: cannot be read as JSON (Expecting value: line 1 column 1 (char 0)); take another copy of it"
    ]
    Path("empty/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert errors("model=empty") == [
        "model=empty: expected a whole model, found a PEFT adapter for org/base; merge it: rlinvariant merge empty"
    ]
    Path("whole").mkdir()
    Path("whole/config.json").touch()
    assert good("model=whole").model == "whole"


def test_all_conflicts_come_in_one_list() -> None:
    env = {"VLLM_BATCH_INVARIANT": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").touch()
    found = errors("stps=3", "steps=x", "trainer.top_p=0.0", "trainer.use_vllm=true", "run=taken", env=env)
    assert [line.split(":")[0] for line in found] == [
        "stps=3",
        "steps=x",
        "trainer.use_vllm=true",
        "trainer.top_p=0.0",
        "ACCELERATE_MIXED_PRECISION=bf16",
        "VLLM_BATCH_INVARIANT=1",
        "run=taken",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("trainer.num_iterations=2",), ["trainer.num_iterations=2: expected 1 WITH: MOVED"]),
        (
            ("trainer.steps_per_generation=2",),
            ["trainer.steps_per_generation=2: expected trainer.gradient_accumulation_steps=1 WITH: MOVED"],
        ),
        (
            ("trainer.generation_batch_size=16",),
            ["trainer.generation_batch_size=16: expected 8, a step's completions, WITH: MOVED"],
        ),
        (("staleness=1",), ["staleness=1: expected 0 WITH: MOVED"]),
        (("trainer.beta=0.1",), ["trainer.beta=0.1: expected 0.0 WITH: REFERENCE"]),
        (("algorithm=ppo", "ppo.kl_coef=0.1"), ["ppo.kl_coef=0.1: expected 0 WITH: REFERENCE"]),
        (
            ("staleness=1", "trainer.beta=0.1"),
            ["staleness=1: expected 0 WITH: MOVED", "trainer.beta=0.1: expected 0.0 WITH: REFERENCE"],
        ),
    ],
)
def test_what_cannot_stand_beside_truncated_sampling(settings: tuple[str, ...], expected: list[str]) -> None:
    truncation = "trainer.top_k=20", "trainer.top_p=0.95", "trainer.min_p=0.02"
    words = {"WITH": f"with {', '.join(truncation)}", "MOVED": MOVED, "REFERENCE": REFERENCE}
    for short, long in words.items():
        expected = [line.replace(short, long) for line in expected]
    assert errors(*settings, *truncation) == expected
    good(*settings)


def test_what_can_stand_beside_truncated_sampling() -> None:
    good("trainer.top_p=0.95", "trainer.steps_per_generation=2", "trainer.gradient_accumulation_steps=4")
    good("trainer.top_p=0.95", "invariance=off", "trainer.beta=0.1", "trainer.num_iterations=2")  # as TRL does it
    good("trainer.top_k=-1", "staleness=1")  # as vLLM writes that there is no limit


@pytest.mark.parametrize("side", ["sampler", "trainer"])
def test_one_stock_side_cannot_truncate(side: str) -> None:
    (line,) = errors(f"invariance={side}", "trainer.top_p=0.9")
    assert line.startswith(f"invariance={side}: expected exact with trainer.top_p=0.9: of one stock side")


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
    assert good("run=old", "resume=true", "staleness=4").resume is True
    assert good("run=old", "resume=force").resume == "force"


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


def test_what_cannot_be_spread_is_one_line() -> None:
    spread = "sampler.tensor_parallel_size=2"
    divisor = "a divisor of the 1 process of a host; start more by machine=, or choose one"
    assert errors(spread) == [f"{spread}: expected {divisor}"]
    four = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert good(spread, env=four).sampler.tensor_parallel_size == 2
    assert errors("sampler.tensor_parallel_size=3", env=four)[0].startswith(
        "sampler.tensor_parallel_size=3: expected a divisor of the 4 processes of a host"
    )
    assert errors(spread, env=four | {"LOCAL_WORLD_SIZE": "1"}), "two hosts do not share an engine"
    assert spread_problems(2, "off") and not spread_problems(2, "sampler") and not spread_problems(1, "off")


def test_what_trl_refuses_later_is_one_line() -> None:
    config = good("trainer.vllm_importance_sampling_clip_min=5", "run=one")
    with pytest.raises(UserError, match=r"^trainer\.\*: vllm_importance_sampling_clip_min \(5\.0\) must be less"):
        config.grpo_config()


def test_run_directories_are_not_overwritten() -> None:
    Path("runs/taken").mkdir(parents=True)
    assert good("run=taken").run == "taken"  # what a start that failed may leave
    Path("runs/taken/config.json").touch()
    assert errors("run=taken") == ["run=taken: runs/taken exists; choose another name, or add resume=true to continue it"]
    assert good("run=taken", "resume=true").run_dir == Path("runs/taken")
    assert good("run=taken", env={"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).run == "taken"
    assert good("run=new", "resume=true").run == "new", "killed before its directory was made, the same command starts it"


def test_a_run_directory_that_may_not_be_looked_into_is_one_line(tmp_path: Path) -> None:
    config, root = good("run=x"), os.geteuid() == 0  # who may look into everything
    tmp_path.chmod(0)
    try:
        os.seteuid(65534) if root else None
        (line,) = check_run(config, {})
    finally:
        os.seteuid(0) if root else None
        tmp_path.chmod(0o700)
    assert line.startswith("run=x: runs/x cannot be written (") and "Permission denied" in line


TOKEN = "0123456789abcdef" * 4
ONE = "sampler.servers=http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ONE], f"{ONE}: expected sampler.trainer_token_file=FILE too, the one that the servers were started with"),
        (
            ["sampler.trainer_token_file=t"],
            "sampler.trainer_token_file=t: expected sampler.servers too, or it does nothing; remove it",
        ),
        (
            [f"{ONE},http://127.0.0.1:8000/", "sampler.trainer_token_file=t"],
            f"{ONE},http://127.0.0.1:8000/: the same address twice; name each server once",
        ),
        *(
            (
                [f"sampler.servers={url}", "sampler.trainer_token_file=t"],
                f"sampler.servers={url}: expected http://HOST:PORT or https://HOST:PORT, without user, path or query",
            )
            for url in ("127.0.0.1:8000", "ftp://a:1", "http://me:pw@a:1", "http://a:1/v1", "http://a:1?x", "http://")
        ),
        (
            [ONE, "sampler.trainer_token_file=t", "invariance=off", "trainer.bf16=false"],
            "invariance=off: expected exact with sampler.servers, which run the invariant ops; remove one",
        ),
        (
            [ONE, "sampler.trainer_token_file=t", "sampler.kv_cache_gib=2"],
            "sampler.kv_cache_gib=2.0: expected none with sampler.servers: the server decides it, by the options of its start; "
            "remove it",
        ),
    ],
)
def test_servers_that_cannot_be_drawn_from_are_refused(arguments, message, in_tmp):
    (in_tmp / "t").touch(0o600)
    (in_tmp / "t").write_text(TOKEN)
    assert good(ONE, "sampler.trainer_token_file=t", "sampler.max_model_len=2048").sampler.servers == ["http://127.0.0.1:8000"]
    assert message in errors(*arguments)
    (in_tmp / "t").chmod(0o644)
    assert any("mode 644" in line for line in errors(ONE, "sampler.trainer_token_file=t"))
