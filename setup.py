"""Packaging of skipmega. Tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="skipmega",
    version="0.1.0",
    description="Pre-training of language models whose layers are skipped per token.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["skipmega", "skipmega.*"]),
    package_data={"skipmega": ["py.typed", "evaluation/suites/*", "inspection/routers/html/*"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.20",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "jinja2>=3",
        "numpy",
        "nvidia-ml-py",
        "sentencepiece>=0.2.1",
        "datasets>=4",
        "zstandard",
        "tqdm",
    ],
    extras_require={
        "hf": ["transformers>=5,<6", "tokenizers", "safetensors", "protobuf"],
        "eval": ["lm-eval==0.4.13", "accelerate", "scipy"],
        "prepare": ["datatrove>=0.10,<0.11", "spacy>=3.8,<4", "regex"],
        "report": ["matplotlib", "scipy"],
        "logging": ["tensorboard", "wandb"],
        "flash": ["flash-attn-4==4.0.0b36"],
        "mpi": ["mpi4py"],
        "dev": [
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "playwright",
            "hypothesis",
        ],
    },
)
