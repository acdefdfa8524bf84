"""The page of pairs: for every two capabilities, the test that runs both, or the line that refuses them.

Refusals are asked of the code that refuses; that each test is there, and that no pair is left out, tests/bench/test_pairs.py
asserts. docs/generate.py writes the page.
"""

import functools
from itertools import combinations

SAID = {  # a capability -> the setting that asks for it
    "LoRA": "lora.r=8",
    "turns": "tools=",
    "top-p": "trainer.top_p=0.9",
    "PPO": "algorithm=ppo",
    "windows": "a model with `sliding_window`",
    "shards": "machine=cpu2_fsdp2",
    "shared sampler": "sampler.tensor_parallel_size=2",
    "servers": "sampler.servers=http://HOST:8000",
    "mixtures": "a model with experts",
}
PAIRS = "tests/trainer/test_pairs.py::test_a_pair_trains_exactly"
RANKS = "tests/trainer/test_pairs.py::test_two_processes_with_shards_and_a_shared_sampler_train_exactly_what_else_there_is"
SERVED = "tests/trainer/test_served_runs.py::test_servers_draw_turns_of_a_mixture_with_a_window_for_ppo"
FAMILY = "tests/verification/test_verify.py::test_every_supported_family_is_exact"
TESTED = {  # a pair -> the test in which both are exact, on a CPU
    ("LoRA", "turns"): "tests/verification/test_verify.py::test_adapters_are_certified",
    ("LoRA", "top-p"): PAIRS,
    ("LoRA", "PPO"): "tests/trainer/test_lora_ppo.py::test_policy_and_critic_train_adapters_on_one_base",
    ("LoRA", "windows"): PAIRS,
    ("LoRA", "shards"): "tests/trainer/test_adapters_in_shards.py::test_shards_train_the_adapters_of_whole_models_bit_for_bit",
    ("LoRA", "mixtures"): PAIRS,
    (
        "LoRA",
        "shared sampler",
    ): "tests/trainer/test_adapters_in_shards.py::test_a_shared_sampler_draws_and_trains_the_same_adapters",
    ("LoRA", "servers"): "tests/trainer/test_served_adapters.py::test_a_run_of_adapters_by_servers_is_the_run_of_an_engine",
    ("turns", "top-p"): "tests/trainer/test_turns.py::test_turns_of_a_truncated_policy_are_exact",
    ("turns", "PPO"): "tests/trainer/test_turns.py::test_ppo_over_turns",
    ("turns", "windows"): FAMILY,
    ("turns", "shared sampler"): (
        "tests/trainer/test_spread.py::test_ranks_with_a_shared_sampler_take_as_many_turns_as_their_samples"
    ),
    ("turns", "shards"): RANKS,
    ("turns", "servers"): SERVED,
    ("turns", "mixtures"): FAMILY,
    ("top-p", "PPO"): "tests/trainer/test_truncation.py::test_ppo_truncates_exactly",
    ("top-p", "windows"): PAIRS,
    ("top-p", "servers"): "tests/sampler/test_served.py::test_servers_draw_what_an_engine_draws",
    ("top-p", "shards"): RANKS,
    ("top-p", "shared sampler"): RANKS,
    ("top-p", "mixtures"): PAIRS,
    ("PPO", "windows"): PAIRS,
    ("PPO", "shards"): "tests/trainer/test_sharding.py::test_shards_train_the_weights_of_whole_models_bit_for_bit",
    ("PPO", "shared sampler"): RANKS,
    ("PPO", "servers"): SERVED,
    ("PPO", "mixtures"): PAIRS,
    ("windows", "shards"): RANKS,
    ("windows", "shared sampler"): RANKS,
    ("windows", "servers"): SERVED,
    ("windows", "mixtures"): PAIRS,
    ("shards", "shared sampler"): "tests/trainer/test_spread.py::test_a_shared_sampler_draws_and_trains_the_same_bytes",
    ("shards", "mixtures"): "tests/trainer/test_pairs.py::test_a_mixture_in_shards_trains_exactly",
    ("shards", "servers"): "tests/trainer/test_served_runs.py::test_two_processes_draw_from_servers_what_one_draws_itself",
    ("servers", "mixtures"): SERVED,
}


@functools.cache
def refused() -> dict[tuple[str, str], str]:
    """Return the line with which each pair that cannot be had is refused."""
    from rlinvariant.conflicts import server_problems
    from rlinvariant.models.families import FAMILIES
    from rlinvariant.models.limits import uncuttable

    urls = [SAID["servers"].partition("=")[2]]
    lines = {
        ("shared sampler", "servers"): server_problems(urls, "FILE", "exact", [SAID["shared sampler"]]),
        ("shared sampler", "mixtures"): [
            f"{SAID['shared sampler']}: {line}" for line in uncuttable(FAMILIES["qwen3-moe"](), 2)
        ],
    }
    found = {}
    for pair, (line,) in lines.items():
        found[pair] = line
    return found


def page() -> str:
    """Return the page: one row for each pair."""
    rows = ["| | and | |", "|---|---|---|"]
    for pair in combinations(SAID, 2):
        status = f"exact on a CPU: `{TESTED[pair]}`" if pair in TESTED else f"refused: `{refused()[pair]}`"
        rows.append(f"| {pair[0]} | {pair[1]} | {status} |")
    asks = "\n".join(f"* **{name}**: `{said}`" if "`" not in said else f"* **{name}**: {said}" for name, said in SAID.items())
    lead = (
        "What can be had together, two by two. *Exact* means that a test trains, draws or verifies with both, and every "
        "compared log-prob is the same 32 bits; a test of several at once is one for each two of them. *Refused* means one "
        "line before weights are loaded. On a GPU what [limits](../limits.md) says of each alone holds for both."
    )
    return f"# Pairs\n\n{lead}\n\n{asks}\n\n" + "\n".join(rows) + "\n"
