"""A reward of the user's own: where its module is found, and what is said where it is not."""

import sys

import pytest

from dynamo_jax.tasks.grading import own


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, behind all others, as a worker has it."""
    files = {
        "own_reward.py": "import statistics\ndef score(output, gold): return statistics.mean([1, 2])\n",
        "statistics.py": "raise ImportError('not this one')\n",
        "own_package/__init__.py": "from own_package.inner import score\n",
        "own_package/inner.py": "def score(output, gold): return 3\n",
        "own_folder/inner.py": "def score(output, gold): return 4\n",
        "own_half.py": "import no_such_module_at_all\n",
        "json.py": "def score(output, gold): return 1\n",
        "test/own.py": "def score(output, gold): return 1\n",
        "math.py": "def score(output, gold): return 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(here, name):
    return own.load(name, [path for path in sys.path if path] + [str(here)])


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("own_reward:score", 1.5),
        ("own_package:score", 3),
        ("own_package.inner:score", 3),
        ("own_folder.inner:score", 4),
    ],
)
def test_modules_and_packages_of_the_current_folder(here, name, reward):
    assert load(here, name)("", "") == reward


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", ["No module named 'nowhere'. It was looked for in ", "{here}"]),
        ("own_package.no:f", ["No module named 'own_package.no'. It was looked for in ", "{here}"]),
        ("own_reward.x:f", ["'own_reward' is not a package"]),
        ("own_half:f", ["own_half.py", "import no_such_module_at_all", "No module named 'no_such_module_at_all'"]),
        ("own_reward:none", ["own_reward ({here}/own_reward.py) has no none"]),
        ("own_folder:none", ["own_folder ({here}/own_folder) has no none"]),
        ("json:score", ["json/__init__.py) has no score; {here}/json.py is hidden by another module of that name"]),
        ("math:score", ["has no score; {here}/math.py is hidden by another module of that name, give it a name"]),
        ("test.own:score", ["No module named 'test.own'; {here}/test/own.py is hidden by another module of that name"]),
        (".own_reward:score", ["cannot be loaded:\n", "relative"]),
    ],
)  # fmt: skip
def test_what_is_not_there(here, name, words):
    with pytest.raises(own.LoadError) as caught:
        load(here, name)
    message = str(caught.value)
    assert all(word.format(here=here) in message for word in words), message
