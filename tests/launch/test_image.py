"""The image: who runs in it, what gets the signals, and that all that its Dockerfile names exists."""

import fnmatch
import json
import re
import subprocess
import sys

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from recorder import ROOT


@pytest.fixture(scope="module")
def instructions():
    parser = DockerfileParser(path=str(ROOT / "launch" / "Dockerfile"))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


@pytest.fixture(scope="module")
def extras(tmp_path_factory):
    """The extras of setup.py, as setuptools understands them."""
    program = "import json, setuptools; setuptools.setup = lambda **k: print(json.dumps(k['extras_require'])); "
    program += "exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def values(instructions, name):
    return [value for instruction, value in instructions if instruction == name]


def test_dynamo_jax_is_process_1_and_not_below_a_shell(instructions):
    assert json.loads(values(instructions, "ENTRYPOINT")[-1]) == ["dynamo-jax"]
    assert isinstance(json.loads(values(instructions, "CMD")[-1]), list)
    assert "SHELL" not in dict(instructions)


def test_nothing_runs_as_root(instructions):
    names = [name for name, _ in instructions]
    user = values(instructions, "USER")[-1]
    assert user not in ("root", "0")
    assert f" {user} " in next(value for value in values(instructions, "RUN") if "useradd" in value)
    last = max(i for i, name in enumerate(names) if name == "USER")
    assert "RUN" not in names[last:]


def test_dependencies_are_a_layer_that_a_change_of_the_code_keeps(instructions):
    names = [name if name != "COPY" else value.split()[0] for name, value in instructions]
    install = next(i for i, (name, value) in enumerate(instructions) if name == "RUN" and "pip install" in value)
    assert names.index("setup.py") < install < names.index("dynamo_jax")


def test_what_it_copies_exists_and_reaches_the_builder(instructions):
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"  # all is left out but what is named
    named = [line[1:] for line in lines if line.startswith("!")]
    copied = [source for value in values(instructions, "COPY") for source in value.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, name) for name in named)


def test_extras_that_it_names_exist(instructions, extras):
    install = next(value for value in values(instructions, "RUN") if "pip install" in value)
    accelerators = re.search(r"in ([\w|]+)\) ;;", install)[1].split("|")
    assert sorted(accelerators) == ["cuda", "tpu"]
    fixed = re.search(r"\[\$EXTRA,([\w,]+)\]", install)[1].split(",")
    assert {*accelerators, *fixed} <= extras.keys()
    assert any("gcsfs" in requirement for requirement in extras["gcs"])


@pytest.mark.parametrize(("extra", "status"), [("cuda", 0), ("tpu", 0), ("", 2), ("test", 2)])
def test_the_build_argument_is_checked(instructions, extra, status):
    install = next(value for value in values(instructions, "RUN") if "pip install" in value)
    check = install.split("&&")[0]
    done = subprocess.run(["sh", "-c", check], env={"EXTRA": extra}, capture_output=True, check=False)
    assert done.returncode == status


def test_machines_drivers_are_looked_for_where_they_are_mounted(instructions):
    environment = " ".join(values(instructions, "ENV"))
    for setting in ("LD_LIBRARY_PATH=/usr/local/nvidia/lib64", "NVIDIA_VISIBLE_DEVICES=all", "compute,utility"):
        assert setting in environment


def test_cloud_build_builds_this_image():
    build = yaml.safe_load((ROOT / "launch" / "cloudbuild.yaml").read_text())
    arguments = build["steps"][0]["args"]
    assert arguments[arguments.index("--file") + 1] == "launch/Dockerfile"
    assert arguments[arguments.index("--build-arg") + 1] == "EXTRA=${_EXTRA}"
    assert build["images"] == [arguments[arguments.index("--tag") + 1]] == ["${_IMAGE}"]
