"""llama.cpp's and vLLM's tests of their servers against ours: those of NAME_passes.txt must pass.

The model is stories260K, which llama.cpp's tests download too. Like llama.cpp, the server gives it contexts beyond
those that it was trained with.
"""

import json
from pathlib import Path

import pytest

import matquant
from clients.conftest import with_template
from clients.sdists import assert_listed_tests_pass, unpacked

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 8192


@pytest.fixture(scope="module")
def stories(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    model = with_template(data / "models" / "stories260K", folder / "model", CHATML)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return matquant.quantize(model, folder / "stories", method="rtn", scope="linears")


def test_tests_of_llamacpp(stories: Path) -> None:
    parts = ("tools/server/tests", "models/templates")
    sources = unpacked("llamacpp", "llama-cpp-python==0.3.36", within="vendor/llama.cpp/", parts=parts)
    templates = {"MATQUANT_TEMPLATES": str(sources / "models" / "templates")}
    assert_listed_tests_pass("llamacpp", stories, folder=sources / "tools" / "server" / "tests", variables=templates)


def test_tests_of_vllm(stories: Path) -> None:
    sources = unpacked("vllm", "vllm==0.33.0", within="", parts=("tests/entrypoints", "tests/__init__.py"))
    options = ["--noconftest", "-c", "/dev/null", "--rootdir", str(sources)]
    assert_listed_tests_pass("vllm", stories, folder=sources, options=options)
