"""Other people's clients against ``matquant serve``, each in an environment that is made once (make test-serve).

Environments lie under MATQUANT_ENGINES (default .engines/): "clients" for openai, langchain-openai and lm-eval, "node"
for OpenAI's package of npm, "browser" for the playground, "serve-llamacpp" and "serve-vllm" for their tests of servers.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import matquant
from environments import make_environment
from origin import ROOT
from server_process import Server, running

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("MATQUANT_ENGINES", ROOT / ".engines")).resolve()
MODEL = ROOT / "examples" / "reference" / "model"
CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}\n"
    "Answer with <tool_call>{}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(model: Path, out: Path, template: str = CHATML) -> Path:
    """Copy a model without a chat template, and give it one."""
    shutil.copytree(model, out)
    (out / "chat_template.jinja").write_text(template)
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, rounded, with a chat template that lists tools."""
    folder = tmp_path_factory.mktemp("clients")
    model = with_template(MODEL, folder / "model")
    return matquant.quantize(model, folder / "tiny", method="rtn", scope="linears")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Server]:
    with running(checkpoint) as found:
        yield found


def run_client(script: str, *arguments: str | Path) -> str:
    """Run a script of this folder in the environment of the clients; return what it prints. It asserts by itself."""
    python = make_environment(CACHE / "clients", (HERE / "clients.txt").read_text().split())
    return run_command([python, HERE / script, *arguments])


def run_command(
    command: list[str | Path], *, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> str:
    """Run a command without this project on its path, and without any hub; return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OPENAI_API_KEY")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= variables or {}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
