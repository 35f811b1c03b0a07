"""The config tree: strict reading, overrides, round trips, what a resume may change."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from dynamo_jax.config import Config, ConfigError, choices, differences, dump_config, load_config, resolved
from dynamo_jax.config.load import FREE_ON_RESUME

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
# What a recipe leaves open because it is on the user's disk.
OPEN = ["task.train=[train.jsonl]", "task.tokenizer=folder"]
KL_IN_REWARD = "objective.kl={coefficient: 0.1, in: reward}"
MINIMAL = "run_dir: r\npolicy: {architecture: {}}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_say_how_they_are_run(path):
    text = path.read_text()
    needs_files = yaml.safe_load(text)["task"]["kind"] == "math"
    config = load_config(path, OPEN if needs_files else [])
    assert config.run_dir
    assert text.startswith(f"# dynamo-jax train configs/{path.name}")


def test_there_are_recipes():
    assert {"arithmetic_cpu", "gsm8k_tiny_cpu"} <= {path.stem for path in RECIPES}


def test_choices_are_written_once():
    """No other file lists the words of a setting, as a tuple, a list, a set or another `Literal`."""
    words = {frozenset(get_args(value)): name for name, value in vars(choices).items() if get_args(value)}
    assert frozenset({"token", "sequence"}) in words
    package = Path(choices.__file__).parents[1]
    again = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path != Path(choices.__file__) and isinstance(node, ast.Tuple | ast.List | ast.Set):
                listed = frozenset(e.value for e in node.elts if isinstance(e, ast.Constant))
                again += [f"{path.name}:{node.lineno} is {words[listed]}"] if listed in words else []
    assert not again


def test_import_and_load_need_neither_jax_nor_numpy():
    code = (
        "import sys; from dynamo_jax.config import load_config; load_config(sys.argv[1]);"
        "sys.exit(bool({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, CONFIGS / "arithmetic_cpu.yaml"], check=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("+1.5e+3", 1500.0), (".5e0", 0.5), ("5.e-1", 0.5), ("2", 2.0), ("0.25", 0.25)],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    from_file = load(tmp_path, f"{MINIMAL}optimizer: {{learning_rate: {text}}}\n")
    from_override = load(tmp_path, MINIMAL, f"optimizer.learning_rate={text}")
    assert from_file.optimizer.learning_rate == from_override.optimizer.learning_rate == value


def test_what_only_looks_like_a_number_stays_a_text(tmp_path):
    assert load(tmp_path, MINIMAL, "run_dir=runs/1e-6").run_dir == "runs/1e-6"
    assert load(tmp_path, MINIMAL, "run_dir=1e-6x").run_dir == "1e-6x"


def test_overrides_replace_add_and_come_in_order(tmp_path):
    overrides = ("seed=3", "seed=4", "policy.architecture.num_layers=5", "eval.k=[1, 2]", "rollout.top_p=0.5")
    config = load(tmp_path, MINIMAL + "eval: {samples: 4}\n", *overrides)
    assert (config.seed, config.policy.architecture.num_layers, config.eval.k) == (4, 5, (1, 2))
    assert config.eval.samples == 4  # its neighbours in the file stay
    assert config.rollout.top_p == 0.5


def test_override_may_open_a_section_that_the_file_leaves_empty(tmp_path):
    assert load(tmp_path, "run_dir: r\npolicy:\n", "policy.architecture.hidden_size=32").policy.architecture is not None
    assert load(tmp_path, "run_dir: r\n", "policy.load=a=b").policy.load == "a=b"  # only the first `=` divides


def test_a_file_may_leave_out_everything_with_a_default(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config == dataclasses.replace(Config(run_dir="r"), policy=config.policy)
    assert config.mini_batch == config.micro_batch == config.rollout_batch == 64 * 8


def test_batch_sizes_follow_from_one_another(tmp_path):
    config = load(tmp_path, MINIMAL, "trainer.mini_batch=128")
    assert (config.mini_batch, config.micro_batch, config.rollout_batch) == (128, 128, 512)
    config = load(tmp_path, MINIMAL, "trainer.mini_batch=128", "trainer.micro_batch=32", "rollout.batch=64")
    assert (config.mini_batch, config.micro_batch, config.rollout_batch) == (128, 32, 64)


def test_rows_hold_the_longest_rollout(tmp_path):
    """16 prompt tokens and 8 of a completion; from one tile of 128 slots on, whole tiles."""
    for max_tokens, row_tokens in ((8, 24), (113, 129), (496, 512), (497, 640), (1008, 1024)):
        assert load(tmp_path, MINIMAL, f"rollout.max_tokens={max_tokens}").row_tokens == row_tokens
    assert load(tmp_path, MINIMAL, "trainer.row_tokens=40").row_tokens == 40
    with pytest.raises(ConfigError, match=r"row_tokens = 23: does not hold a prompt of 16 .* of 8.* Set 24 or more"):
        load(tmp_path, MINIMAL, "trainer.row_tokens=23")


def test_remat_is_a_word_and_older_files_have_a_boolean(tmp_path):
    for given, word in (("true", "full"), ("false", "none"), ("dots", "dots"), ("attention", "attention")):
        config = load(tmp_path, MINIMAL, f"policy.remat={given}")
        assert config.policy.remat == resolved(config)["policy"]["remat"] == word
    with pytest.raises(ConfigError, match="remat"):
        load(tmp_path, MINIMAL, "policy.remat=some")


@pytest.mark.parametrize("text", ["0", "0.0", "0e0", "1e-3", "1e-10"])
def test_an_evaluation_may_be_greedy(tmp_path, text):
    config = load(tmp_path, MINIMAL, f"eval.temperature={text}")
    assert config.eval.temperature == float(text)
    assert config.rollout.temperature == 1.0
    assert load(tmp_path, dump_config(config)) == config


def test_nothing_can_be_changed_after_loading(tmp_path):
    config = load(tmp_path, MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.trainer.steps = 3


MATH = "run_dir: r\npolicy: {architecture: {}}\ntask: {kind: math, train: [a], tokenizer: b%s}\n"


def test_values_for_the_template_are_plain_and_free(tmp_path):
    assert load(tmp_path, MINIMAL).task.chat_template_kwargs == {}
    text = (
        MATH % ", chat_template_kwargs: {enable_thinking: false, date_string: 2026-11-27, size: {a: [1, null, 1e-3]}}"
    )
    values = {"enable_thinking": False, "date_string": "2026-11-27", "size": {"a": [1, None, 0.001]}}
    config = load(tmp_path, text)
    assert config.task.chat_template_kwargs == values
    more = load(
        tmp_path, text, "task.chat_template_kwargs.enable_thinking=true", "task.chat_template_kwargs.effort=low"
    )
    assert more.task.chat_template_kwargs == values | {"enable_thinking": True, "effort": "low"}
    whole = load(tmp_path, text, "task.chat_template_kwargs={effort: low}")
    assert whole.task.chat_template_kwargs == {"effort": "low"}
    assert len({hash(c) for c in (config, more, whole)}) == 1  # a config stays hashable; equality sees the values
    assert config != more != whole


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"enable_thinking": False},
        {"a": None, "b": [], "c": {}, "d": {"e": {"f": [{"g": "h"}]}}},
        {"text": "1e-6", "more": "true", "other": "0100", "lines": "a: b\n# c\n", "word": "null", "date": "2026-01-02"},
        {"whole": 3, "large": 10**25, "small": 1e-7, "negative": -0.5, "字": "你好 🙂"},
    ],
)
def test_values_for_the_template_are_written_and_read_back(tmp_path, values):
    config = load(tmp_path, MATH % f", chat_template_kwargs: {json.dumps(values, ensure_ascii=False)}")
    assert config.task.chat_template_kwargs == values
    again = load(tmp_path, dump_config(config))
    assert again == config
    assert json.dumps(again.task.chat_template_kwargs) == json.dumps(values)  # types, too
    assert yaml.safe_load(dump_config(config)) == resolved(config)
    assert differences(resolved(config), resolved(again)) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({}, {"a": False}, "{} -> {'a': False}"),
        ({}, {"a": None}, "{} -> {'a': None}"),
        ({"a": {}}, {}, "{'a': {}} -> {}"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "{'a': {'b': 1}} -> {'a': {'b': 2}}"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),  # in another order
    ],
)
def test_other_values_for_the_template_are_no_resume(tmp_path, old, new, difference):
    trees = [resolved(load(tmp_path, MATH % f", chat_template_kwargs: {json.dumps(values)}")) for values in (old, new)]
    assert differences(*trees) == ([f"task.chat_template_kwargs: {difference}"] if difference else [])
    if not old:  # as it was before there was such a setting
        before = without(trees[0], ["task", "chat_template_kwargs"])
        assert "chat_template_kwargs" not in before["task"]
        assert differences(before, trees[1]) == [f"task.chat_template_kwargs: {difference}"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{messages: [a]}", ['kwargs.messages = ["a"]', "from the program", "Take it out"]),
        ("{tools: null}", ["kwargs.tools = null", "from the program"]),
        ("{tokenize: true}", ["kwargs.tokenize = true", "from the program"]),
        ("{add_generation_prompt: false}", ["kwargs.add_generation_prompt = false", "from the program"]),
        ("{strftime_now: 2026-11-27}", ['kwargs.strftime_now = "2026-11-27"', "from the program"]),
        ("{chat_template: x, enable_thinking: false}", ['kwargs.chat_template = "x"', "from the program"]),
        ("{continue_final_message: x}", ["continue_final_message", "from the program"]),
        ("{raise_exception: x}", ["raise_exception", "from the program"]),
        ("{self: 1}", ["kwargs.self = 1", "from the program"]),
        ("{true: 1}", ["kwargs.true = 1", "from the program"]),
        ("{enable-thinking: false}", ["kwargs.enable-thinking = false", "letters, digits and _"]),
        ("{'': 1}", ["kwargs. = 1", "letters"]),
        ("{1: a}", ['kwargs.1 = "a"', "letters"]),
        ("{a b: 1}", ["kwargs.a b = 1", "letters"]),
        ("{a: .nan}", ["kwargs.a = NaN", "not finite"]),
        ("{a: {b: [1, -.inf]}}", ["kwargs.a = ", "-Infinity", "not finite"]),
        ("[enable_thinking]", ['kwargs = ["enable_thinking"]', "a section of keys"]),
        ("false", ["kwargs = false", "a section of keys"]),
        ("null", ["kwargs = null", "a section of keys"]),
        ("enable_thinking", ['kwargs = "enable_thinking"', "a section of keys"]),
    ],
)
def test_values_that_no_template_could_read_are_refused(tmp_path, values, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MATH % f", chat_template_kwargs: {values}")
    assert f"{tmp_path}/c.yaml: task.chat_template_" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [(MINIMAL, "task.kind = arithmetic uses no chat template"), (MATH % ", chat_template: false", "= false uses no")],
)
def test_values_without_a_template_are_refused(tmp_path, text, why):
    with pytest.raises(
        ConfigError, match=r'task\.chat_template_kwargs = \{"enable_thinking": false\}: .*Take them out'
    ):
        load(tmp_path, text, "task.chat_template_kwargs.enable_thinking=false")
    with pytest.raises(ConfigError, match=why):
        load(tmp_path, text, "task.chat_template_kwargs.enable_thinking=false")
    load(tmp_path, text, "task.chat_template_kwargs={}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_resolved_text_reads_back_to_the_same_config(tmp_path, path):
    kind = yaml.safe_load(path.read_text())["task"]["kind"]
    config = load_config(path, ["optimizer.learning_rate=1e-7", *(OPEN if kind == "math" else [])])
    written = dump_config(config)
    assert load(tmp_path, written) == config
    # Any YAML reader gets the same values, not only ours: 1.0e-07, never 1e-07.
    assert yaml.safe_load(written) == resolved(config)


def test_the_resolved_tree_has_every_key_with_plain_values(tmp_path):
    tree = resolved(load(tmp_path, MINIMAL))
    assert tree["eval"]["k"] == [1, 8]
    assert tree["policy"]["load"] is None
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}


# --- what a resume may change


def changed(tmp_path: Path, *overrides: str) -> list[str]:
    return differences(resolved(load(tmp_path, MINIMAL)), resolved(load(tmp_path, MINIMAL, *overrides)))


@pytest.mark.parametrize(
    "override",
    ["run_dir=x", "device=cpu", "mesh.data=2", "trainer.steps=7", "trainer.micro_batch=64", "trainer.row_tokens=64",
     "rollout.batch=64", "policy.remat=true", "checkpoint.every=3", "checkpoint.keep=9", "logging.progress=false",
     "verifier.workers=7", "task.allow_overlap=true", "objective.kl.host_memory=true"],
)  # fmt: skip
def test_where_and_how_fast_may_change_on_resume(tmp_path, override):
    assert changed(tmp_path, override) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("trainer.mini_batch=256", "trainer.mini_batch: None -> 256"),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate: 0.0005 -> 0.001"),
        ("policy.architecture.num_layers=3", "policy.architecture.num_layers: 2 -> 3"),
        ("policy.compute_dtype=bfloat16", "policy.compute_dtype: 'float32' -> 'bfloat16'"),
        ("eval.k=[1]", "eval.k: [1, 8] -> [1]"),
        ("verifier.timeout=1", "verifier.timeout: 5.0 -> 1.0"),
        ("rollout.top_k=5", "rollout.top_k: 0 -> 5"),
    ],
)
def test_what_changes_the_result_is_named(tmp_path, override, difference):
    assert changed(tmp_path, override) == [difference]


def test_a_section_that_appears_is_a_difference(tmp_path):
    loaded = resolved(load(tmp_path, "run_dir: r\npolicy: {load: folder}\n"))
    names = [line.partition(":")[0] for line in differences(resolved(load(tmp_path, MINIMAL)), loaded)]
    assert {"policy.load", "policy.architecture.hidden_size"} <= set(names)


def test_a_longer_run_may_not_stretch_the_fall_of_its_learning_rate(tmp_path):
    """1,024 rollouts a step in mini-batches of 256: 4 updates."""
    batch = ["rollout.prompts=64", "rollout.per_prompt=16", "trainer.mini_batch=256", "trainer.steps=100"]

    def of(*overrides: str) -> dict[str, object]:
        return resolved(load(tmp_path, MINIMAL, *batch, *overrides))

    old = of("optimizer.schedule=cosine")
    assert differences(old, of("optimizer.schedule=cosine", "trainer.steps=200")) == [
        "optimizer.decay_steps: 400 -> 800"
    ]
    assert differences(old, of("optimizer.schedule=cosine", "trainer.steps=200", "optimizer.decay_steps=400")) == []
    assert differences(of(), of("trainer.steps=200")) == []
    before = {**old, "optimizer": {"learning_rate": 5e-4}}  # as it was before there were schedules
    assert differences(before, of("trainer.steps=200")) == []


def test_free_keys_exist(tmp_path):
    tree = resolved(load(tmp_path, MINIMAL))
    for key in FREE_ON_RESUME:
        node = tree
        for part in key.split("."):
            assert part in node, f"{key}: a typing error here would let nothing through"
            node = node[part]


# --- errors of the tree; those of whole files and commands are in test_cli.py and test_cli_config.py


def test_a_key_that_is_no_name_in_python_is_written_as_it_is(tmp_path):
    config = load(tmp_path, f"{MINIMAL}objective: {{kl: {{in: reward}}}}\n", "objective.kl.estimator=k1")
    kl = config.objective.kl
    assert (kl.in_, dataclasses.replace(kl, in_="loss").in_) == ("reward", "loss")
    assert resolved(config)["objective"]["kl"] == {
        "coefficient": 0.0, "estimator": "k1", "in": "reward", "host_memory": False,
    }  # fmt: skip
    assert load(tmp_path, dump_config(config)) == config
    other = load(tmp_path, MINIMAL, "objective.kl.estimator=k1", "objective.kl.in=loss")
    assert differences(resolved(config), resolved(other)) == ["objective.kl.in: 'reward' -> 'loss'"]
    for override, message in (
        ("objective.kl.in_=loss", "objective.kl.in_: unknown key. Did you mean 'in'?"),
        ("objective.kl.in=los", "objective.kl.in = \"los\": should be 'loss' or 'reward'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(tmp_path, MINIMAL, override)


def test_every_wrong_key_is_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, "trainer.stepz=1", "seed=-1")
    assert len(str(error.value).splitlines()) == 2
    assert "trainer.stepz" in str(error.value)
    assert "seed = -1" in str(error.value)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)


def test_base_is_merged_below_and_may_be_replaced(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "run_dir: b\npolicy: {architecture: {}}\neval: {samples: 4, k: [1, 2]}\nseed: 1\n"
    )
    (tmp_path / "other.yaml").write_text("run_dir: o\npolicy: {architecture: {}}\nseed: 9\n")
    (tmp_path / "sub" / "middle.yaml").write_text("base: ../base.yaml\nseed: 2\neval: {k: [1]}\n")
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("base: middle.yaml\nrun_dir: t\neval: {every: 3}\n")
    config = load_config(top, ["optimizer.learning_rate=1e-4"])
    assert (config.run_dir, config.seed, config.eval.samples, config.eval.k, config.eval.every) == ("t", 2, 4, (1,), 3)
    assert config.optimizer.learning_rate == 1e-4
    other = load_config(top, [f"base={tmp_path / 'other.yaml'}"])
    assert (other.run_dir, other.seed, other.eval.samples, other.eval.every) == ("t", 9, 8, 3)
    assert "base" not in resolved(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: missing.yaml\n", ["missing.yaml: no such config file"]),
        ("base: c.yaml\n", ["c.yaml: base = ", "comes back to itself"]),
        ("base: 3\n", ["base = 3: should be the path of a config file"]),
        ("base: [a]\n", ["should be the path"]),
        ("base: b.yaml\nsed: 1\n", ["c.yaml over ", "b.yaml: sed: unknown key. Did you mean 'seed'?"]),
        ("base: b.yaml\npolicy: 3\n", ["policy = 3"]),
    ],
)
def test_base_that_cannot_be_used_is_named(tmp_path, text, words):
    (tmp_path / "b.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("objective.clip_low=null", "objective.clip_low"),
        ("objective.clip_cov={enabled: true, low: 5.0}", "objective.clip_cov.low"),
        ("objective.overlong.enabled=true", "objective.overlong.buffer"),
        ("objective.fork_fraction=1.0", "objective.fork_fraction"),
        ("objective.correction={kind: mask, low: 2.5}", "objective.correction.low"),
        ("objective.correction={low: 1.5}", "objective.correction.low"),
        ("objective.correction={kind: truncate, high: 0.9}", "objective.correction.high"),
        ("optimizer.floor=0.1", "optimizer.floor"),
        ("optimizer.decay_steps=9", "optimizer.decay_steps"),
        ("optimizer={schedule: linear, warmup_steps: 150}", "optimizer.warmup_steps"),
        ("optimizer={schedule: cosine, warmup_steps: 20, decay_steps: 20}", "optimizer.warmup_steps"),
        ("optimizer.rounding=stochastic", "optimizer.rounding"),
        ("allocation.rule=released", "allocation.half_life"),
        ("allocation={rule: released, half_life: 1e8}", "allocation.half_life"),
    ],
)
def test_methods_that_cannot_run_are_refused(tmp_path, override, key):
    with pytest.raises(ConfigError, match=rf"c\.yaml: {key} = "):
        load(tmp_path, MINIMAL, override)


def test_counts_that_must_not_fade_say_how(tmp_path):
    with pytest.raises(ConfigError, match=r"never fade.* Set allocation\.half_life=1e9\."):
        load(tmp_path, MINIMAL, "allocation.rule=released")
    lasting = load(tmp_path, MINIMAL, "allocation.rule=released", "allocation.half_life=1e9")
    assert lasting.allocation.half_life == 1e9
    load(tmp_path, MINIMAL, "allocation.half_life=1")  # other rules may forget as they like


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["objective.clip_cov.enabled=true", "objective.kl_cov.enabled=true"], "two answers"),
        (["objective.overlong={enabled: true, buffer: 2}", "objective.advantage=w_reinforce"], "no graded reward"),
        (["rollout.dynamic_sampling.enabled=true", "allocation.rule=reinforce_ada"], "rounds of its own"),
        (["objective.ratio=sequence", "modulation.entropy_change=sequence_mean"], "ratios of tokens"),
        (
            ["objective.kl={coefficient: 0.1, in: reward}", "objective.advantage=w_reinforce"],
            r"kl.in = .* right and wr",
        ),
        (
            ["objective.kl={coefficient: 0.1, in: reward}", "rollout.dynamic_sampling.enabled=true"],
            "Set objective.kl.in",
        ),
        (["objective.kl={coefficient: 0.1, in: reward}", "allocation.rule=reinforce_ada"], "before the reference has"),
        (["objective.kl_cov.enabled=true"], r"one update .*Set trainer.mini_batch to a part of the 512 rollouts"),
        (["objective.kl_cov.enabled=true", "trainer.mini_batch=512"], "one update"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(tmp_path, overrides, word):
    with pytest.raises(ConfigError, match=word):
        load(tmp_path, MINIMAL, *overrides)


def test_kl_cov_with_several_updates_a_step_is_accepted(tmp_path):
    assert load(tmp_path, MINIMAL, "objective.kl_cov.enabled=true", "trainer.mini_batch=256").objective.kl_cov.enabled


def test_micro_batch_is_free_on_resume_unless_modulation_depends_on_it(tmp_path):
    for scope, changes in (("minibatch", []), ("microbatch", ["trainer.micro_batch: None -> 64"])):
        text = f"{MINIMAL}modulation: {{scope: {scope}}}\n"
        old, new = (resolved(load(tmp_path, text, *o)) for o in ([], ["trainer.micro_batch=64"]))
        assert differences(old, new) == changes


def without(tree: dict[str, object], keys: list[str]) -> dict[str, object]:
    """The tree as a version wrote it that did not know this key."""
    first, *rest = keys
    return {k: without(v, rest) if k == first and rest else v for k, v in tree.items() if rest or k != first}


def test_a_key_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    tree = resolved(load(tmp_path, MINIMAL, "policy.architecture={}"))

    def paths(tree, *above):
        for key, value in tree.items():
            yield [*above, key]
            if isinstance(value, dict):
                yield from paths(value, *above, key)

    for keys in paths(tree):
        if keys not in (["run_dir"], ["policy"]) and keys[:2] != ["policy", "architecture"]:
            assert differences(without(tree, keys), tree) == [], keys
    changed = resolved(load(tmp_path, MINIMAL, "policy.architecture={}", "objective.clip_high=0.3", "eval.samples=9"))
    for section, name, values in (("objective", "clip_high", "0.2 -> 0.3"), ("eval", "samples", "8 -> 9")):
        assert f"{section}.{name}: {values}" in differences(without(tree, [section, name]), changed)
        assert f"{section}.{name}: {values}" in differences(without(tree, [section]), changed)
    assert differences(without(tree, ["policy", "architecture", "qkv_bias"]), tree) == []
