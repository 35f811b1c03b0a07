"""Configs that cannot be run: exit status 2 and one paragraph with the file, the key, the value and the remedy."""

import pytest
from command_line import refused

MINIMAL = "run_dir: r\npolicy: {architecture: {}}\n"


# Texts of whole files, each with what its error must name.
FILES = {
    "empty": ("", ["is empty", "configs/"]),
    "comments only": ("# nothing\n", ["is empty", "configs/"]),
    "a list": ("- run_dir\n- trainer\n", ["is a list", "mapping of keys"]),
    "a text": ("just text\n", ["is a str", "mapping of keys"]),
    "broken": ("run_dir: r\ntrainer: [1\n", ["not valid YAML", "line 2"]),
    "tabs": ("run_dir: r\ntrainer:\n\tsteps: 3\n", ["not valid YAML", "line 3"]),
    "two documents": (f"{MINIMAL}---\n{MINIMAL}", ["not valid YAML", "single document"]),
    "code": ("run_dir: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "python/object"]),
    "a list as a key": ("? [a, b]\n: 3\n", ["not valid YAML", "list"]),
    "a 13th month": ("run_dir: 2025-13-01\n", ["not valid YAML", "month"]),
    "inside itself": ("run_dir: &a [*a]\n", ["Circular"]),
    "half a character": ('run_dir: "\\ud800"\n', ["surrogates"]),
    "key twice": (MINIMAL + "seed: 1\nseed: 2\n", ["'seed' is given twice", "line 4"]),
    "nested key twice": (MINIMAL + "trainer: {steps: 1, steps: 2}\n", ["'steps' is given twice", "line 3"]),
    "unknown key": (MINIMAL + "optimiser: {}\n", ["optimiser: unknown key", "'optimizer'"]),
    "unknown nested key": (MINIMAL + "trainer: {step: 3}\n", ["trainer.step: unknown key", "'steps'"]),
    "unknown deep key": (
        "run_dir: r\npolicy: {architecture: {hiden_size: 3}}\n",
        ["policy.architecture.hiden_size: unknown key", "'hidden_size'"],
    ),
    "unlike any key": (MINIMAL + "verifier: {zzz: 3}\n", ["verifier.zzz", "Known keys here: workers, timeout"]),
    "number as a key": (MINIMAL + "1: 2\n", ["1: unknown key"]),
    "missing key": ("policy: {architecture: {}}\n", ["run_dir: is missing", "run_dir=VALUE"]),
    "empty section": (MINIMAL + "trainer:\n", ["trainer = null", "section"]),
    "number for a text": ("run_dir: 2025\n", ["run_dir = 2025", "text", 'Write it in quotes: "2025"']),
    "word for a list": (MINIMAL + "task: {train: x.jsonl}\n", ["task.train = ", "list", 'Write it as ["x.jsonl"]']),
    "value for section": (MINIMAL + "trainer: 5\n", ["trainer = 5", "section"]),
    "neither policy": ("run_dir: r\n", ["policy.load = null", "exactly one", "Give the one"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files(capsys, tmp_path, name):
    text, expected = FILES[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = refused(capsys, "train", path)
    for part in (str(path), *expected):
        assert part in message


def test_not_utf8(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"run_dir: \xff\n")
    message = refused(capsys, "train", path)
    assert f"{path}: cannot be read" in message
    assert "configs/" in message


@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_missing_file_and_folder(capsys, tmp_path, command):
    more = {"train": [], "eval": ["--checkpoint", "c"], "export": ["--checkpoint", "c", "--out", "o"]}[command]
    assert f"{tmp_path}/no.yaml: no such config file. The recipes" in refused(
        capsys, command, tmp_path / "no.yaml", *more
    )
    assert f"{tmp_path}: cannot be read" in refused(capsys, command, tmp_path, *more)


# Overrides of a config that is right, each with what its error must name besides the file.
VALUES = {
    "foo": ["override 'foo'", "key.sub=value", "trainer.steps=10"],
    "=3": ["override '=3'", "key.sub=value"],
    "trainer..steps=3": ["override 'trainer..steps=3'", "key.sub=value"],
    "trainer.steps.x=3": ['trainer.steps = {"x": 3}', "integer"],
    "run_dir.x.y=3": ["override 'run_dir.x.y=3'", "run_dir is a value"],
    "trainer.steps=[1": ["override 'trainer.steps=[1'", "not valid YAML"],
    "eval={k: [1], k: [2]}": ["override 'eval={k: [1], k: [2]}'", "'k' is given twice"],
    "trainer.stepz=3": ["trainer.stepz: unknown key", "'steps'"],
    "device=foo": ['device = "foo"', "'auto', 'cpu', 'gpu' or 'tpu'"],
    "device=cuda": ['device = "cuda"', "'gpu'"],
    "allocation.rule=best": ['allocation.rule = "best"', "'uniform', 'bernoulli', 'neyman'"],
    "trainer.steps=1.5": ["trainer.steps = 1.5", "integer"],
    "trainer.steps=true": ["trainer.steps = true", "integer"],
    "trainer.steps='3'": ['trainer.steps = "3"', "integer"],
    "trainer.steps=": ["trainer.steps = null", "integer"],
    "trainer.steps=0": ["trainer.steps = 0", "greater than 0"],
    "seed=-1": ["seed = -1", "greater than or equal to 0"],
    "seed=4294967296": ["seed = 4294967296", "less than"],
    "run_dir=": ['run_dir = ""', "at least 1"],
    "run_dir=''": ['run_dir = ""', "at least 1"],
    "optimizer.learning_rate=fast": ['optimizer.learning_rate = "fast"', "number"],
    "optimizer.learning_rate=.nan": ["optimizer.learning_rate = NaN", "finite"],
    "optimizer.learning_rate=.inf": ["optimizer.learning_rate = Infinity", "finite"],
    "optimizer.learning_rate=1e999": ["optimizer.learning_rate = Infinity", "finite"],
    "optimizer.learning_rate=-1e-6": ["optimizer.learning_rate = -1e-06", "greater than 0"],
    "modulation.tau=1.5": ["modulation.tau = 1.5", "less than or equal to 1"],
    "rollout.temperature=0": ["rollout.temperature = 0.0", "only one of each prompt", "eval.temperature=0"],
    "rollout={temperature: -0.0}": ["rollout.temperature = -0.0", "Set it above 0"],
    "rollout.temperature=-1": ["rollout.temperature = -1", "greater than or equal to 0"],
    "eval.temperature=-0.5": ["eval.temperature = -0.5", "greater than or equal to 0"],
    "eval.temperature=1e-46": ["eval.temperature = 1e-46", "beyond float32", "eval.temperature=0"],
    "rollout.temperature=1e-38": ["rollout.temperature = 1e-38", "beyond float32", "training needs more"],
    "eval.temperature=greedy": ['eval.temperature = "greedy"', "number"],
    "rollout.top_p=0": ["rollout.top_p = 0", "greater than 0"],
    "task.train=x.jsonl": ['task.train = ["x.jsonl"]', "task.kind=math"],
    "task.train=": ["task.train = null", "list", "Write []"],
    "eval.k=[]": ["eval.k = []", "at least 1 item"],
    "allocation.prior=[1, 2, 3]": ["allocation.prior = [1, 2, 3]", "at most 2"],
    # Combinations: 64 prompts x 8 rollouts = 512, four heads, width 64.
    "allocation.low=9": ["allocation.low = 9", "64 prompts x 9 rollouts need 576", "512", "at most 8"],
    "allocation.high=7": ["allocation.high = 7", "hold only 448", "512", "at least 8"],
    "trainer.mini_batch=100": ["trainer.mini_batch = 100", "divide the 512 rollouts", "divisor"],
    "trainer.micro_batch=100": ["trainer.micro_batch = 100", "up to 512 rows", "divisor"],
    "trainer={mini_batch: 128, micro_batch: 256}": ["trainer.micro_batch = 256", "up to 128 rows", "divisor"],
    "trainer.row_tokens=20": ["trainer.row_tokens = 20", "a prompt of 16 tokens", "Set 24 or more"],
    "rollout.batch=100": ["rollout.batch = 100", "divide the 512 rollouts", "divisor"],
    "mesh.data=3": ["trainer.micro_batch = 512", "mesh.data * mesh.fsdp = 3 * 1", "multiple of 3"],
    "mesh={data: 2, fsdp: 512}": ["= 2 * 512", "multiple of 1024", "smaller mesh"],
    "mesh.tensor=8": ["policy.architecture.num_kv_heads = 4", "mesh.tensor = 8", "multiple"],
    "mesh.fsdp=128": ["policy.architecture.hidden_size = 64", "mesh.fsdp = 128", "multiple"],
    "policy.architecture.num_heads=6": ["num_heads = 6", "num_kv_heads = 4", "multiple"],
    "policy.architecture.hidden_size=66": ["hidden_size = 66", "num_heads = 4", "multiple"],
    "policy.architecture.head_dim=5": ["head_dim = 5", "even"],
    "policy.load=folder": ['policy.load = "folder"', "exactly one", "leave the other out"],
    "policy.architecture=null": ["policy.load = null", "exactly one"],
    "eval.samples=4": ["eval.k = [1, 8]", "eval.samples = 4", "Raise eval.samples to 8"],
    "objective.advantage=dr_grpo": ["allocation.low = 2", "dr_grpo", "allocation.low=3"],
    "task.kind=math": ["task.train = []", "Give a path"],
    "task.train=[x.jsonl]": ['task.train = ["x.jsonl"]', "task.kind = arithmetic", "task.kind=math"],
    "task.eval=[x.jsonl]": ['task.eval = ["x.jsonl"]', "task.kind=math"],
    "task.tokenizer=folder": ['task.tokenizer = "folder"', "task.kind=math"],
    "task.max_prompt_tokens=13": ["task.max_prompt_tokens = 13", "14 tokens", "14 or more"],
    "rollout.max_tokens=6": ["rollout.max_tokens = 6", "7 tokens", "7 or more"],
    "task.arithmetic.train_prompts=63": ["task.arithmetic.train_prompts = 63", "rollout.prompts = 64"],
}


@pytest.mark.parametrize("override", VALUES)
def test_values_and_combinations(capsys, tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\npolicy: {{architecture: {{}}}}\n")
    message = refused(capsys, "train", path, override)
    for part in VALUES[override]:
        assert part in message
    assert "override" in message or str(path) in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.train=[a]"], ["task.tokenizer = null", "Give a path"]),
        (["task.train=[a]", "task.tokenizer=b", "warmup.steps=3"], ["warmup.steps = 3", "warmup.steps=0"]),
    ],
)
def test_the_math_task_needs_files_and_has_no_worked_solutions(capsys, tmp_path, overrides, expected):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "task: {kind: math}\n")
    message = refused(capsys, "train", path, *overrides)
    for part in (str(path), *expected):
        assert part in message


def test_mesh_against_the_vocabulary(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    message = refused(capsys, "train", path, "policy.architecture.vocab_size=17", "mesh.tensor=2")
    assert "policy.architecture.vocab_size = 17" in message
    assert "mesh.tensor = 2" in message
